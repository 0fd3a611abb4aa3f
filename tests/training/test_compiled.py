"""Passes through ``torch.compile``: the same training, and no compilation after the first step of the ramp."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from cactus_ray.data import DataSet
from cactus_ray.errors import ConfigError
from cactus_ray.training.bench import _Bench
from cactus_ray.training.compiled import AS_WRITTEN, passes_of
from cactus_ray.training.loop import EpochReport, TrainResult, train
from cactus_ray.training.passes import Phase
from cactus_ray.training.run import _on_device

# dynamo looks at .grad of every tensor that it is given, and hides the warning, which pytest makes an error
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

CACTUS: dict[str, Any] = {
    "method": "cactus", "train__batch_size": 64, "train__epochs": 6, "train__warmup": 0.17, "train__ramp": 0.5,
    "compression_set": {"strategy": "single", "member_fraction": 0.25, "refresh_every": 2}, "awp_radius": 0.25,
}  # fmt: skip


@pytest.fixture
def cheap_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs and gradients as the compiler would get them, run as they are."""
    monkeypatch.setattr("cactus_ray.training.compiled.BACKEND", "aot_eager")


def _trained(config: Any, data: DataSet, state: bytes | None = None) -> tuple[TrainResult, list[int], list[bytes]]:
    """The result, how many graphs there were after each epoch, and each epoch's state."""
    graphs: list[int] = []
    states: list[bytes] = []
    counters.clear()

    def report(epoch: EpochReport) -> bool:
        graphs.append(counters["stats"]["unique_graphs"])
        states.append(epoch.save())
        return True

    return train(config, data, report=report, state=state), graphs, states


@pytest.mark.usefixtures("cheap_backend")
def test_a_run_compiles_in_the_first_steps_and_learns_the_same(run_config: Any, few_digits: DataSet) -> None:
    written, none, _ = _trained(run_config(**CACTUS), few_digits)
    found, graphs, states = _trained(run_config(**CACTUS, train__compile="step"), few_digits)
    assert set(none) == {0}
    # the clean pass, of the network and of members; with the ramp the attack, and certified loss of both
    assert graphs == [2, 5, 5, 5, 5, 5]
    assert not counters["graph_break"]
    losses = [[epoch["loss"] for epoch in result.history] for result in (written, found)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    # from its state a stopped run goes on bit by bit the same, compiled anew
    again, _, _ = _trained(run_config(**CACTUS, train__compile="step"), few_digits, states[3])
    for name, tensor in found.network.params.items():
        assert torch.equal(again.network.params[name], tensor)


@pytest.mark.slow
def test_a_step_compiled_by_inductor_is_the_same(run_config: Any, few_digits: DataSet) -> None:
    losses: list[list[float]] = []
    for compile_ in ("none", "step"):
        config = run_config(**CACTUS, train__compile=compile_, model={"name": "cnn_small", "batch_norm": True})
        bench = _Bench.of("", config, few_digits, "cpu", Phase(), False)
        losses.append([])
        for _ in range(5):
            bench.step()
            losses[-1].append(float(bench.seen[0]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_off_is_absent(run_config: Any) -> None:
    off = run_config(train__compile="none")
    assert off.config_hash == run_config().config_hash != run_config(train__compile="step").config_hash
    assert passes_of(off.train, torch.device("cpu")) is AS_WRITTEN


def test_refused_without_a_compiler(run_config: Any, few_digits: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"train\.compile: got 'step'; expected none: .* no-such-compiler"):
        train(run_config(train__compile="step"), few_digits, report=lambda _: True)


def test_counters_of_a_state_stay_on_the_host() -> None:
    found = _on_device({"moves": torch.zeros((), dtype=torch.int64), "fc.U": torch.ones(2)}, "meta")
    assert {name: tensor.device.type for name, tensor in found.items()} == {"moves": "cpu", "fc.U": "meta"}
