"""What the desk makes of trials that wait for resources or run out of them, and whose mail it takes. Without Ray."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cactus_ray.cluster import desk as module
from cactus_ray.cluster.desk import Desk
from cactus_ray.cluster.mailbox import Mailbox
from cactus_ray.cluster.packing import loosened, packed
from cactus_ray.cluster.resources import plan
from cactus_ray.search.settings import ResourceSettings
from cactus_ray.search.space import parse_space


def test_a_trial_that_does_not_begin_is_named_once_with_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    resources = ResourceSettings(workers=2, cpus_per_worker=2.0)
    shares: Any = SimpleNamespace(resources=resources)
    desk = Desk(Any, shares, Any, Any)  # type: ignore[arg-type]
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    desk.pending = {"t0001": 1000.0, "t0002": 1050.0}
    now[0] += 30
    desk.name_pending()
    assert not caplog.text
    now[0] += 31
    desk.name_pending()
    desk.name_pending()
    assert caplog.text.count("t0001: not begun after 60 s: it needs 4 CPU and 0 GPU, 1 CPU") == 1
    assert "3 CPU are missing" in caplog.text
    assert list(desk.pending) == ["t0002"]


def test_mail_of_an_attempt_that_was_given_up_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    answered: list[Any] = []
    mail = [
        ("rung", "t0001#1", {"epoch": 2}), ("stopped", "t0001#1", {"seconds": 1.0}),
        ("epoch", "t0001#2", {"epoch": 1}), ("epoch", "t0002#1", {"epoch": 1}),
    ]  # fmt: skip
    study: Any = SimpleNamespace(training={"t0001"}, epoch=lambda trial, **content: heard.append((trial, content)))
    box: Any = SimpleNamespace(
        take=SimpleNamespace(remote=lambda: mail), answer=SimpleNamespace(remote=lambda *word: answered.append(word))
    )
    desk = Desk(study, Any, Any, box)  # type: ignore[arg-type]
    desk.senders = {"t0001": "t0001#2", "t0002": "t0002#1"}
    monkeypatch.setattr(ray, "get", lambda found: found)
    desk.take_mail()
    assert heard == [("t0001", {"epoch": 1})]
    assert answered == [("t0001#1", 2, False)]  # so that it ends


def test_states_come_after_the_epochs_that_they_are_of_and_only_the_newest() -> None:
    async def course() -> None:
        box = Mailbox()
        await box.save("t0001#1", 1, b"old")
        await box.put(("epoch", "t0001#1", {"epoch": 2}))
        await box.save("t0001#1", 2, b"new")
        assert await box.take() == [
            ("epoch", "t0001#1", {"epoch": 2}), ("saved", "t0001#1", {"epoch": 2, "data": b"new"}),
        ]  # fmt: skip
        assert await box.take() == []
        await box.hand("t0001#1", b"new")
        await box.hand("t0001#2", b"new")
        assert (await box.state("t0001#1"), await box.state("t0001#2")) == (None, b"new")
        await box.put(("trained", "t0001#2", {}))
        assert await box.state("t0001#2") is None

    asyncio.run(course())


def test_what_a_dead_trial_held_is_freed_and_only_that(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = (("t0001", "aa"), ("t0001", "bb"), ("t0002", "cc"))
    mail = [("holds", f"{trial}#2", {"group": group}) for trial, group in groups]
    died: list[str] = []
    study: Any = SimpleNamespace(training={"t0001", "t0002"}, died=lambda trial, why: died.append(trial))
    mailbox: Any = SimpleNamespace(take=SimpleNamespace(remote=lambda: None))
    desk = Desk(study, Any, Any, mailbox)  # type: ignore[arg-type]
    monkeypatch.setattr(ray, "get", lambda reference: [mail.pop(0) for _ in range(len(mail))])
    desk.senders = {"t0001": "t0001#2", "t0002": "t0002#2"}
    freed: list[str] = []
    monkeypatch.setattr(desk, "_free", freed.append)
    desk.take_mail()
    desk.trainer_ended("t0002", error=False)
    assert (freed, died) == ([], [])
    desk.trainer_ended("t0001", error=True)
    assert (freed, died) == (["bb"], ["t0001"])  # its workers were started twice, and what the first held is gone
    assert desk.groups == {}
    mail.append(("holds", "t0001#1", {"group": "dd"}))  # of an attempt that was given up before it was heard
    desk.take_mail()
    assert (freed, desk.groups) == (["bb", "dd"], {})


def test_trials_that_run_out_together_halve_the_number_once_and_one_that_had_it_all_fails_with_its_peak() -> None:
    tight = parse_space(
        {
            "name": "tight", "data": {"name": "digits"}, "model": {"name": "mlp"}, "threat": {"epsilon": 0.1},
            "levels": ["dense"], "resources": {"gpus_per_worker": 1, "gpus_per_verifier": 0.25, "trials_per_gpu": 4},
        }
    )  # fmt: skip
    cluster = {"CPU": 8.0, "GPU": 1.0}
    said: list[Any] = []
    study: Any = SimpleNamespace(
        out_of_memory=lambda trial, packing: said.append((trial, packing["trials_per_gpu"], packing["had"])),
        failed=lambda trial, error: said.append((trial, error)),
    )
    desk = Desk(study, plan(packed(tight, 4), cluster), Any, Any, lambda gpus: loosened(tight, gpus, cluster))  # type: ignore[arg-type]
    for trial in ("t0001", "t0002"):
        desk._out_of_memory(trial, "CUDA out of memory", 0.25)
    assert said == [("t0001", 2, 0.25), ("t0002", 2, 0.25)]
    assert desk.shares.training == 1  # half a GPU beside the verifier's quarter
    desk._out_of_memory("t0001", "CUDA out of memory", 0.5, 7_500_000_000, 16_000_000_000)
    assert said[-1] == (
        "t0001",
        "out of memory after 7.5 of 16 GB with 0.5 GPU and no other trial on it beside 1 verifier(s) of 0.25; a "
        "smaller model or train.batch_size would need less (CUDA out of memory)",
    )
