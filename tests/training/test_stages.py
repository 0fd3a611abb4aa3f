"""Stages: whose turn it is, what each of them trains, and that a stopped run goes on in the middle of any."""

from typing import Any

import pytest
import torch
from test_loop import BATCH_NORM, assert_same, go_on, in_two_workers, train_with_stop

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import materialize
from cactus_ray.config import RunConfig
from cactus_ray.data import DataSet
from cactus_ray.options import STAGE_SHARES
from cactus_ray.training import methods
from cactus_ray.training.loop import train
from cactus_ray.training.schedule import epsilon_at, learning_rate_at
from cactus_ray.training.stages import Span, Stage, spans
from cactus_ray.training.state import State, unpack_state
from cactus_ray.training.step import Step

STAGED = tuple(STAGE_SHARES)


@pytest.mark.parametrize(
    ("shares", "epochs", "ends"),
    [
        ((100, 20, 100), 220, (100, 120, 220)),
        ((100, 20, 100), 20, (9, 11, 20)),
        ((100, 20, 100), 3, (1, 2, 3)),
        ((1000, 1, 1), 4, (2, 3, 4)),
        ((1, 1, 1000), 5, (1, 2, 5)),
        (None, 7, (7,)),
    ],
)
def test_stages_share_the_epochs(shares: tuple[float, ...] | None, epochs: int, ends: tuple[int, ...]) -> None:
    assert spans(shares, epochs) == tuple(Span(a, b) for a, b in zip((0, *ends), ends, strict=False))


def states_of(config: RunConfig, data: DataSet) -> list[State]:
    """The saved state after every epoch."""
    found: list[State] = []
    train(config, data, report=lambda r: found.append(unpack_state(r.save())) is None)
    return found


def test_schedules_of_a_stage(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(method="hydra", train__epochs=8, stage_shares=[4, 2, 2])
    history = train(config, few_digits, report=go_on).history
    steps = 256 // 64
    for epoch, metrics in enumerate(history):
        first, length = ((0, 4), (4, 2), (6, 2))[(epoch >= 4) + (epoch >= 6)]
        done = ((epoch - first + 1) * steps - 1) / (length * steps)  # the last step of the epoch
        ramped = done if epoch < 4 else 1.0
        assert metrics["epsilon"] == pytest.approx(epsilon_at(ramped, config.train, 0.05))
        assert metrics["learning_rate"] == learning_rate_at(done, config.train, config.learning_rate)
    assert [m["epsilon"] < 0.05 for m in history] == [True, False, *[False] * 6]
    assert [m["standard_weight"] for m in history[4:]] == pytest.approx([config.standard_weight] * 4)


@pytest.mark.parametrize("method", STAGED)
@pytest.mark.parametrize("average", ["none", "ema"])
def test_a_run_stopped_in_any_stage_goes_on_bit_by_bit(
    method: str, average: str, run_config: Any, few_digits: DataSet
) -> None:
    shares = [2] * len(STAGE_SHARES[method])
    config = run_config(
        method=method,
        model=BATCH_NORM,
        train__epochs=sum(shares),
        stage_shares=shares,
        train__average=average,
        **({"admm_every": 2} if method == "atmc" else {}),  # the duals have moved before each stop
    )
    whole = train(config, few_digits, report=go_on)
    for epochs in range(1, sum(shares)):  # in the middle of every stage, and where one ends and the next begins
        _, state = train_with_stop(config, few_digits, epochs)
        resumed = train(config, few_digits, report=go_on, state=state)
        assert_same(whole.last, resumed.last)
        assert_same(whole.best, resumed.best)
        assert [m["loss"] for m in whole.history] == [m["loss"] for m in resumed.history]


@pytest.mark.parametrize("method", STAGED)
def test_two_workers_agree(method: str, run_config: Any, few_digits: DataSet) -> None:
    config = run_config(method=method, model=BATCH_NORM, train__epochs=len(STAGE_SHARES[method]))
    both = in_two_workers(lambda workers: train(config, few_digits, report=go_on, workers=workers))
    assert_same(both[0].network, both[1].network)


def test_best_is_of_the_last_stage(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(method="hydra", train__epochs=6, stage_shares=[2, 2, 2], target_sparsity=0.97)
    states = states_of(config, few_digits)
    assert [s.best is None for s in states] == [True] * 4 + [False] * 2
    best = train(config, few_digits, report=go_on).best
    assert float((best.params["fc1.weight"] == 0).float().mean()) == pytest.approx(0.97, abs=0.001)


def test_every_stage_has_its_own_optimizer(run_config: Any, few_digits: DataSet) -> None:
    states = states_of(run_config(method="hydra", train__epochs=3, model=BATCH_NORM), few_digits)
    trained = [set(s.moments) for s in states]
    assert trained[0] == trained[2] == {"fc1.weight", "bn1.weight", "bn1.bias", "fc2.weight", "fc2.bias"}
    assert trained[1] == {"fc1.scores", "fc2.scores", "bn1.weight", "bn1.bias"}
    assert [float(s.moments["bn1.weight"]["step"]) for s in states] == [4.0] * 3
    assert [s.stage for s in states] == ["pretrain", "mask", "finetune"]
    assert [set(s.auxiliary) for s in states] == [set(), {"fc1.scores", "fc2.scores"}, {"fc1.mask", "fc2.mask"}]


def test_averages_are_of_the_last_stage(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(
        method="hydra", train__epochs=6, stage_shares=[2, 2, 2], train__average="swa", train__average_from=0.0
    )
    assert [s.averages for s in states_of(config, few_digits)] == [0, 0, 0, 0, 1, 2]


def test_what_a_stage_does_after_a_move_stays(
    run_config: Any, few_digits: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clip(step: Step) -> None:
        step.params["fc1.weight"].clamp_(-0.01, 0.01)
        step.auxiliary["moves"] += 1

    def count(config: RunConfig, graph: Graph, params: Params, auxiliary: Params) -> None:
        auxiliary["moves"] = torch.zeros((), dtype=torch.int64)

    stage = Stage("clipped", begin=count, after=clip)
    monkeypatch.setitem(methods.STAGES, "sabr", (stage,))
    states = states_of(run_config(train__epochs=3), few_digits)
    assert [int(s.auxiliary["moves"]) for s in states] == [4, 8, 12]
    assert all(float(s.params["fc1.weight"].abs().max()) <= 0.01 for s in states)


# --- hydra ---------------------------------------------------------------------------------------------------------


def test_hydra_searches_with_frozen_weights_and_finetunes_what_is_left(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(method="hydra", train__epochs=6, stage_shares=[2, 2, 2], target_sparsity=0.8, train__l1=1e-4)
    first, second, third = (states_of(config, few_digits)[i] for i in (1, 3, 5))
    for name in ("fc1", "fc2"):
        weight, score, mask = f"{name}.weight", second.auxiliary[f"{name}.scores"], third.auxiliary[f"{name}.mask"]
        assert torch.equal(first.params[weight], second.params[weight])
        kept = round(0.8 * mask.numel())
        assert int((mask == 0).sum()) == kept
        assert float(score.abs()[mask == 0].max()) <= float(score.abs()[mask == 1].min())
        assert not torch.equal(third.params[weight][mask == 1], second.params[weight][mask == 1])
    by_magnitude = second.params["fc1.weight"].abs().flatten().argsort()[: round(0.8 * 24 * 64)]
    assert int(third.auxiliary["fc1.mask"].flatten()[by_magnitude].sum()) > 0  # the search has moved the mask


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.83, 0.97])
def test_pruning_the_finished_network_to_its_sparsity_changes_nothing(
    sparsity: float, run_config: Any, few_digits: DataSet
) -> None:
    config = run_config(method="hydra", train__epochs=3, target_sparsity=sparsity)
    network = train(config, few_digits, report=go_on).network
    kept = network.params["fc1.weight"].abs().flatten()
    tiny = network.params["fc1.weight"].flatten().clone()
    tiny[kept.argmax()] = 1e-38  # a survivor that is all but zero, and one that has become exactly zero
    tiny[kept.topk(2).indices[1]] = 0.0
    for params in (network.params, network.params | {"fc1.weight": tiny.view_as(network.params["fc1.weight"])}):
        dense = materialize(network.graph, params, parse_level("dense")).params
        pruned = materialize(network.graph, params, parse_level(f"prune:lu-l1:{sparsity}")).params
        for name, tensor in dense.items():
            assert torch.equal(tensor, pruned[name]), name
