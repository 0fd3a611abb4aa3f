"""A Ray that does not come up is one clear error."""

import pytest
import ray

from cactus_ray.cluster.connect import connected
from cactus_ray.errors import RunFailedError, UserError

TIMED_OUT = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


def refusing(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def init(**options: object) -> None:
        raise Exception(message)  # as Ray does

    monkeypatch.setattr(ray, "init", init)


def test_a_machine_too_busy_for_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, TIMED_OUT)
    with pytest.raises(RunFailedError, match="the same command goes on"), connected(None, cpus=1):
        pass


@pytest.mark.parametrize("fault", [OSError(28, "No space"), KeyError("x"), AssertionError("what\n  is this"), None])
def test_any_other_fault_of_the_start_is_one_line_with_its_class(
    monkeypatch: pytest.MonkeyPatch, fault: Exception | None
) -> None:
    fault = fault or Exception("much\n" * 1000)

    def init(**options: object) -> None:
        raise fault

    monkeypatch.setattr(ray, "init", init)
    words = rf"^Ray did not start; .*\({type(fault).__name__}: "
    with pytest.raises(RunFailedError, match=words) as found, connected(None, cpus=1):
        pass
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 800
    with pytest.raises(UserError, match=r"^--address: got 'auto'; .*" + type(fault).__name__), connected("auto"):
        pass
