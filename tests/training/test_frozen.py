"""A user's own network in training: weights that its factory set are where it starts, frozen ones where they stay."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cactus_ray.data import DataSet
from cactus_ray.errors import ConfigError, UserError
from cactus_ray.models import create
from cactus_ray.models.network import Network
from cactus_ray.training.loop import EpochReport, TrainResult, train
from cactus_ray.training.run import start
from cactus_ray.training.state import unpack_state
from cactus_ray.training.workers import Alone

STEM = ("0.weight", "0.bias", "1.weight", "1.bias")


@pytest.fixture(autouse=True)
def _factories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "models")


def own(name: str, **changes: Any) -> dict[str, Any]:
    return {"model": {"factory": f"brought_networks:{name}"}, "train__epochs": 1, "train__batch_size": 128} | changes


def trained(config: Any, data: DataSet, **options: Any) -> TrainResult:
    return train(config, data, report=options.pop("report", lambda epoch: True), trust_code=True, **options)


def initial(config: Any, data: DataSet, init: Network | None = None) -> dict[str, Tensor]:
    return {k: v.detach() for k, v in start(config, data, None, init, Alone(), True, "cpu").params.items()}


# --- where training starts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pretrained", "loaded", "drawn_otherwise", "frozen"])
def test_weights_that_the_factory_sets_are_where_training_starts(
    name: str, run_config: Any, few_digits: DataSet
) -> None:
    config = run_config(**own(name))
    assert config.train.initialization == "ibp"
    made = create(config, few_digits.input_shape, few_digits.classes, trust_code=True)
    found = initial(config, few_digits)
    assert all(torch.equal(found[key], tensor) for key, tensor in made.params.items())


def test_what_torch_draws_is_replaced_by_the_initialisation(run_config: Any, few_digits: DataSet) -> None:
    made = create(run_config(**own("plain")), few_digits.input_shape, few_digits.classes, trust_code=True).params
    ours = initial(run_config(**own("plain")), few_digits)
    torchs = initial(run_config(**own("plain", train__initialization="default")), few_digits)
    assert not torch.equal(ours["0.weight"], made["0.weight"])
    assert torch.equal(ours["3.weight"], made["3.weight"])  # the last layer's
    assert all(torch.equal(torchs[key], tensor) for key, tensor in made.items())


def test_a_network_file_comes_before_what_the_factory_sets(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(**own("frozen"))
    made = create(config, few_digits.input_shape, few_digits.classes, trust_code=True)
    init = Network(made.graph, {key: torch.full_like(t, 0.25) for key, t in made.params.items()})
    found = trained(config, few_digits, init=init).network.params
    assert bool((found["0.weight"] == 0.25).all())  # frozen as in the file
    assert not bool((found["3.weight"] == 0.25).any())


# --- where it leaves frozen tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"method": "sabr", "train__weight_decay": 0.1, "train__l1": 0.01},
        {"method": "pgd", "train__optimizer": "sgd", "train__weight_decay": 0.1},
        {"method": "standard", "train__optimizer": "adamw", "train__weight_decay": 0.1, "train__average": "ema"},
        {"method": "ibp", "train__average": "swa", "train__average_from": 0.0},
        {"method": "cactus", "awp_radius": 1.0, "compression_set": {"family": "gu-grad"}},
        {"method": "cactus", "awp_radius": 1.0, "awp_member": "pruned", "compression_set": {"family": "gs-l2"}},
        {"method": "awp", "awp_gamma": 0.05},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values() if isinstance(value, str)),
)
def test_frozen_tensors_stay_to_the_last_bit_and_all_others_move(
    options: dict[str, Any], run_config: Any, few_digits: DataSet
) -> None:
    config = run_config(**own("frozen_stem", **options))
    before = initial(config, few_digits)
    result = trained(config, few_digits)
    for network in (result.network, result.last, result.best):
        for name, tensor in network.params.items():
            assert torch.equal(tensor, before[name]) is (name in STEM), name


def test_members_are_perturbed_in_frozen_layers_too(
    run_config: Any, few_digits: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is deployed is rounded in every layer."""
    from cactus_ray.training import perturb

    seen: dict[str, float] = {}
    apply = perturb.apply

    def recorded(params: dict[str, Tensor], deltas: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.update({name: max(seen.get(name, 0.0), float(d.abs().max())) for name, d in deltas.items()})
        return apply(params, deltas)

    monkeypatch.setattr(perturb, "apply", recorded)
    trained(run_config(**own("frozen", method="cactus", awp_radius=1.0)), few_digits)
    assert seen["0.weight"] > 0
    assert seen["3.weight"] > 0


def test_gradients_of_frozen_tensors_do_not_add_up_over_steps(run_config: Any, few_digits: DataSet) -> None:
    """A member that reads them reads those of its own step."""
    config = run_config(**own("frozen"))
    run = start(config, few_digits, None, None, Alone(), True, "cpu")
    weight = run.params["0.weight"]
    weight.grad = torch.ones_like(weight)
    assert "0.weight" not in run.leaves()
    run.clear_gradients()
    assert weight.grad is None


def test_a_stopped_run_goes_on_with_the_same_tensors_frozen(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(**own("frozen_stem", train__epochs=2))
    states: list[bytes] = []

    def keep(epoch: EpochReport) -> bool:
        states.append(epoch.save())
        return True

    through = trained(config, few_digits, report=keep).network.params
    assert unpack_state(states[0]).frozen == set(STEM)
    resumed = trained(config, few_digits, state=states[0]).network.params
    assert all(torch.equal(resumed[name], tensor) for name, tensor in through.items())


@pytest.mark.parametrize("method", ["hydra", "qa_ibp", "atmc", "c_sam"])
def test_methods_that_rewrite_all_weights_refuse_frozen_ones(method: str, run_config: Any, few_digits: DataSet) -> None:
    with pytest.raises(ConfigError) as caught:
        trained(run_config(**own("frozen_stem", method=method)), few_digits)
    message = str(caught.value)
    assert message.startswith(f"method: got {method!r}; expected one of cactus, nrsloss, awp, ibp")
    assert "brought_networks:frozen_stem sets requires_grad=False for 0.bias and 3 more" in message


# --- several workers -----------------------------------------------------------------------------------------------


class Threads:
    """Two workers in two threads of this process."""

    size = 2

    def __init__(self, rank: int, sent: dict[int, list[Tensor]], barrier: threading.Barrier) -> None:
        self.rank, self.sent, self.barrier = rank, sent, barrier

    def mean_(self, tensors: list[Tensor], /) -> None:
        self.sent[self.rank] = [tensor.detach().clone() for tensor in tensors]
        self.barrier.wait()
        means = [(a + b) / 2 for a, b in zip(self.sent[0], self.sent[1], strict=True)]
        self.barrier.wait()
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.detach().copy_(mean)


def in_two_workers(config: Any, data: DataSet) -> list[TrainResult | Exception]:
    found: dict[int, TrainResult | Exception] = {}
    sent: dict[int, list[Tensor]] = {}
    barrier = threading.Barrier(2, timeout=240)

    def work(rank: int) -> None:
        try:
            found[rank] = trained(config, data, workers=Threads(rank, sent, barrier))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[0], found[1]]


def test_two_workers_keep_frozen_tensors(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(**own("frozen", method="cactus", awp_radius=1.0))
    first, second = in_two_workers(config, few_digits)
    assert isinstance(first, TrainResult)
    assert isinstance(second, TrainResult)
    assert bool((first.network.params["0.weight"] == 0.123).all())
    assert all(torch.equal(tensor, second.network.params[name]) for name, tensor in first.network.params.items())


def test_workers_to_whom_a_factory_gives_other_weights_do_not_train(run_config: Any, few_digits: DataSet) -> None:
    for error in in_two_workers(run_config(**own("other_weights_each_time")), few_digits):
        assert isinstance(error, UserError)
        assert "gives other weights to each of the 2 workers" in str(error)
