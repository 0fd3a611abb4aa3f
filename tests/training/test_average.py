"""Averages of weights: of what they say, with batch-norm statistics of their own, and through a stop."""

from typing import Any

import pytest
import torch
from test_loop import BATCH_NORM, CACTUS, assert_same, go_on, in_two_workers, train_with_stop

from cactus_ray.bounds.graph import Params, is_buffer
from cactus_ray.compression.calibration import recalibrate
from cactus_ray.data import DataSet, calibration
from cactus_ray.errors import ConfigError
from cactus_ray.training.average import include
from cactus_ray.training.loop import EpochReport, train
from cactus_ray.training.state import unpack_state


def test_the_first_networks_count_the_same_then_the_past_fades() -> None:
    values = [torch.tensor([float(v)]) for v in (1, 3, 8, 0, 5)]
    plain: Params = {}
    moving: Params = {}
    counts = [0, 0]
    expected = 0.0
    for i, value in enumerate(values):
        counts[0] = include(plain, counts[0], {"w": value, "n.running_mean": value}, None)
        counts[1] = include(moving, counts[1], {"w": value}, 0.75)
        share = max(1 / (i + 1), 0.25)
        expected += share * (float(value) - expected)
    assert counts == [5, 5]
    assert plain.keys() == {"w"}
    assert plain["w"].item() == pytest.approx(17 / 5)
    assert moving["w"].item() == pytest.approx(expected)


@pytest.mark.parametrize("model", [BATCH_NORM, {"name": "mlp", "hidden": [12]}])
def test_swa_is_the_mean_of_the_epochs(model: dict[str, Any], run_config: Any, few_digits: DataSet) -> None:
    plain = run_config(**CACTUS, model=model, train__epochs=6)
    states: list[Params] = []
    train(plain, few_digits, report=lambda r: states.append(unpack_state(r.save()).params) is None)
    config = run_config(**CACTUS, model=model, train__epochs=6, train__average="swa", train__average_from=0.5)
    found = train(config, few_digits, report=go_on)
    expected = dict(states[-1])
    for name, tensor in expected.items():
        if not is_buffer(name):
            expected[name] = torch.stack([tensors[name] for tensors in states[2:]]).mean(0)  # ends of epochs 3 to 6
            assert not torch.equal(expected[name], tensor)
    expected = recalibrate(found.last.graph, expected, calibration(few_digits)[0])
    for name, tensor in expected.items():
        torch.testing.assert_close(found.last.params[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("augmentation", [{}, {"train__crop_padding": 1, "train__flip": True}])
def test_resumed_is_bit_by_bit_the_same(
    kind: str, augmentation: dict[str, Any], run_config: Any, few_digits: DataSet
) -> None:
    config = run_config(
        **CACTUS, **augmentation, model=BATCH_NORM, train__epochs=5, train__average=kind, train__average_from=0.4,
    )  # fmt: skip
    whole = train(config, few_digits, report=go_on)
    for epochs in (1, 3):  # before and after averaging has begun
        _, state = train_with_stop(config, few_digits, epochs)
        resumed = train(config, few_digits, report=go_on, state=state)
        assert_same(whole.last, resumed.last)
        assert_same(whole.best, resumed.best)
        assert whole.history[-1]["ibp_certified_accuracy"] == resumed.history[-1]["ibp_certified_accuracy"]


def test_what_is_scored_and_kept_is_the_average(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(
        model=BATCH_NORM, train__epochs=8, train__average="ema", train__average_decay=0.9, learning_rate=0.02
    )
    reports: list[EpochReport] = []
    states: list[Params] = []

    def report(epoch: EpochReport) -> bool:
        reports.append(epoch)
        states.append(unpack_state(epoch.save()).params)
        return True

    result = train(config, few_digits, report=report)
    assert not torch.equal(result.last.params["fc1.weight"], states[-1]["fc1.weight"])
    assert reports[-1].metrics["standard_accuracy"] > 0.7
    best = max(range(3, 8), key=lambda i: (
        reports[i].metrics["ibp_certified_accuracy"], reports[i].metrics["standard_accuracy"], -i
    ))  # fmt: skip
    assert best == 7, "the run must be one whose last epoch is the best for the next line to say something"
    assert_same(result.best, result.last)


def test_two_workers_average_the_same(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(
        model=BATCH_NORM, train__epochs=3, train__average="ema", train__crop_padding=1, learning_rate=0.002
    )
    both = in_two_workers(lambda workers: train(config, few_digits, report=go_on, workers=workers))
    assert_same(both[0].network, both[1].network)
    one = train(config, few_digits, report=go_on)
    torch.testing.assert_close(
        both[0].network.params["fc2.weight"], one.network.params["fc2.weight"], atol=5e-3, rtol=0
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train__average_decay": 0.9},
            r"train\.average_decay: got 0\.9; expected nothing without train\.average: ema$",
        ),
        ({"train__average": "swa", "train__average_decay": 0.9}, r"train\.average_decay.*nothing without"),
        ({"train__average_from": 0.5}, r"train\.average_from.*ema or swa"),
        ({"train__average": "mean"}, r"train\.average: got 'mean'; expected one of none, ema, swa"),
        ({"train__crop_padding": -1}, r"train\.crop_padding: got -1; expected a whole number in \[0, 64\]"),
    ],
)
def test_options_without_use_are_refused(options: dict[str, Any], message: str, run_config: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        run_config(**options)


def test_defaults_of_an_average(run_config: Any) -> None:
    train_ = run_config(train__average="ema", train__warmup=0.1, train__ramp=0.3).train
    assert (train_.average_from, train_.average_decay) == (pytest.approx(0.4), 0.999)
    assert run_config(train__average="swa").train.average_decay is None
