"""A Ray that does not come up is one clear error."""

import pytest
import ray

from cactus_ray.cluster.connect import connected
from cactus_ray.errors import RunFailedError

TIMED_OUT = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


def refusing(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def init(**options: object) -> None:
        raise Exception(message)  # as Ray does

    monkeypatch.setattr(ray, "init", init)


def test_a_machine_too_busy_for_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, TIMED_OUT)
    with pytest.raises(RunFailedError, match="the same command goes on"), connected(None, cpus=1):
        pass


def test_any_other_fault_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, "what is this")
    with pytest.raises(Exception, match="what is this") as found, connected(None, cpus=1):
        pass
    assert not isinstance(found.value, RunFailedError)
