"""What the desk says of trials that wait for their resources. No Ray is started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cactus_ray.cluster import desk as module
from cactus_ray.cluster.desk import Desk
from cactus_ray.search.settings import ResourceSettings


def test_a_trial_that_does_not_begin_is_named_once_with_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    resources = ResourceSettings(workers=2, cpus_per_worker=2.0)
    study: Any = SimpleNamespace(space=SimpleNamespace(resources=resources))
    desk = Desk(study, Any, Any, Any)  # type: ignore[arg-type]
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


def test_what_a_dead_trial_held_is_freed_and_only_that(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = (("t0001", "aa"), ("t0001", "bb"), ("t0002", "cc"))
    mail = [("holds", trial, {"group": group}) for trial, group in groups]
    failed: list[str] = []
    study: Any = SimpleNamespace(training={"t0001", "t0002"}, failed=lambda trial, why: failed.append(trial))
    mailbox: Any = SimpleNamespace(take=SimpleNamespace(remote=lambda: None))
    desk = Desk(study, Any, Any, mailbox)  # type: ignore[arg-type]
    monkeypatch.setattr(ray, "get", lambda reference: [mail.pop(0) for _ in range(len(mail))])
    freed: list[str] = []
    monkeypatch.setattr(desk, "_free", freed.append)
    desk.take_mail()
    desk.trainer_ended("t0002", error=False)
    assert (freed, failed) == ([], [])
    desk.trainer_ended("t0001", error=True)
    assert (freed, failed) == (["bb"], ["t0001"])  # its workers were started twice, and what the first held is gone
    assert desk.groups == {}
