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
