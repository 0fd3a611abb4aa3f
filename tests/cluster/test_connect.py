"""A Ray that does not come up is one clear error."""

import pytest
import ray
from ray._private import services

from cactus_ray.cluster.connect import connected, patient
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


def test_a_start_waits_for_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def unknown_twice(address: str, node: str) -> str:
        calls.append(node)
        if len(calls) < 3:
            raise RuntimeError("no such node")
        return node

    monkeypatch.setattr(services, "get_node", unknown_twice)
    with patient(3600.0):
        assert services.get_node("address", "node") == "node"
    assert len(calls) == 3
    assert services.get_node is unknown_twice


def test_a_node_that_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(address: str, node: str) -> str:
        raise RuntimeError("no such node")

    monkeypatch.setattr(services, "get_node", unknown)
    with patient(0.0), pytest.raises(RuntimeError, match="no such node"):
        services.get_node("address", "node")
