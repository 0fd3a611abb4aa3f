import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cactus_ray.bounds.graph import Params
from cactus_ray.data import DataSet
from cactus_ray.errors import ConfigError, UserError
from cactus_ray.models.network import Network, pack, unpack
from cactus_ray.training import perturb
from cactus_ray.training.evaluate import evenly_spaced
from cactus_ray.training.loop import EpochReport, NonFiniteLossError, TrainResult, train
from cactus_ray.training.run import Run
from cactus_ray.training.state import generator_for

BATCH_NORM = {"name": "mlp", "hidden": [12], "batch_norm": True}
CACTUS = {"method": "cactus", "awp_radius": 0.5, "compression_set": {"refresh_every": 3}}


def go_on(_: EpochReport) -> bool:
    return True


def assert_same(ours: Network, theirs: Network) -> None:
    assert ours.params.keys() == theirs.params.keys()
    for name, tensor in ours.params.items():
        assert torch.equal(tensor, theirs.params[name]), name


def train_with_stop(config: Any, data: DataSet, epochs: int) -> tuple[TrainResult, bytes]:
    saved: list[bytes] = []

    def report(epoch: EpochReport) -> bool:
        if epoch.epoch < epochs:
            return True
        saved.append(epoch.save())
        return False

    return train(config, data, report=report), saved[0]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("model", [BATCH_NORM, {"name": "mlp", "hidden": [12]}])
def test_resumed_is_bit_by_bit_the_same(
    optimizer: str, model: dict[str, Any], run_config: Any, few_digits: DataSet
) -> None:
    config = run_config(**CACTUS, model=model, train__epochs=6, train__optimizer=optimizer, train__l1=1e-5)
    whole = train(config, few_digits, report=go_on)
    part, state = train_with_stop(config, few_digits, 3)
    assert (part.stopped, part.epochs) == (True, 3)
    resumed = train(config, few_digits, report=go_on, state=state)
    assert (resumed.stopped, resumed.epochs) == (False, 6)
    assert_same(whole.last, resumed.last)
    assert_same(whole.best, resumed.best)
    keys = ("loss", "standard_accuracy", "ibp_certified_accuracy")
    assert [[m[k] for k in keys] for m in whole.history] == [[m[k] for k in keys] for m in resumed.history]


def test_two_runs_give_the_same_and_another_seed_another_network(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(**CACTUS)
    first, second = (train(config, few_digits, report=go_on) for _ in range(2))
    assert_same(first.network, second.network)
    other = train(replace(config, seed=1), few_digits, report=go_on)
    assert not torch.equal(first.network.params["fc1.weight"], other.network.params["fc1.weight"])


def test_reports_and_result(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(train__epochs=8, learning_rate=0.02)
    reports: list[EpochReport] = []
    result = train(config, few_digits, report=lambda r: reports.append(r) is None)
    assert [(r.epoch, r.epochs) for r in reports] == [(i, 8) for i in range(1, 9)]
    assert result.history == [r.metrics for r in reports]
    assert result.seconds == pytest.approx(sum(r.metrics["seconds"] for r in reports))
    assert {"loss", "standard_accuracy", "ibp_certified_accuracy"} <= reports[0].metrics.keys()
    assert reports[-1].metrics["epsilon"] == pytest.approx(0.05)
    assert reports[-1].metrics["loss"] < reports[0].metrics["loss"]
    assert reports[-1].metrics["standard_accuracy"] > 0.7
    assert reports[-1].metrics["ibp_certified_accuracy"] <= reports[-1].metrics["standard_accuracy"]
    assert result.network.config == config
    assert result.network.class_names == few_digits.class_names
    assert unpack(pack(result.network)).params.keys() == result.network.params.keys()


def test_best_counts_only_after_the_ramp(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(train__epochs=8, train__ramp=0.65, train__keep="best", learning_rate=0.03)
    scores, networks = [], []

    def report(epoch: EpochReport) -> bool:
        scores.append((epoch.metrics["ibp_certified_accuracy"], epoch.metrics["standard_accuracy"]))
        networks.append(epoch.save())
        return True

    result = train(config, few_digits, report=report)
    after = range(5, 8)  # epochs 6 to 8 end after the ramp, which ends at 0.75
    chosen = max(after, key=lambda i: (scores[i], -i))
    if chosen == 7:
        assert_same(result.best, result.last)
    else:
        assert not torch.equal(result.best.params["fc1.weight"], result.last.params["fc1.weight"])
    assert result.network is result.best
    continued = train(config, few_digits, report=go_on, state=networks[chosen])
    assert_same(continued.best, result.best)


def test_batch_norm_statistics_follow_the_clean_batches_as_torch_does(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(model=BATCH_NORM, train__epochs=1, train__batch_size=64, learning_rate=1e-9)
    result = train(config, few_digits, report=go_on)
    params = result.network.params  # all but constant at this learning rate
    images, _ = few_digits.split("train")
    order = torch.randperm(256, generator=generator_for(config.seed, 0, "order"))
    reference = nn.BatchNorm1d(12)
    for batch in order.split(64):
        reference(nn.functional.linear(images[batch].flatten(1), params["fc1.weight"]))
    torch.testing.assert_close(params["bn1.running_mean"], reference.running_mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(params["bn1.running_var"], reference.running_var, atol=1e-4, rtol=1e-4)


def test_statistics_of_a_convolution_count_every_pixel(run_config: Any, few_digits: DataSet) -> None:
    model = {"name": "cnn7", "width": 0.05}
    config = run_config(model=model, train__epochs=1, train__batch_size=256, learning_rate=1e-9)
    result = train(config, few_digits, report=go_on)
    params = result.network.params
    images = few_digits.split("train")[0] * params["normalize.scale"] + params["normalize.shift"]
    reference = nn.BatchNorm2d(len(params["bn1.weight"]))
    reference(nn.functional.conv2d(images, params["conv1.weight"], padding=1))
    torch.testing.assert_close(params["bn1.running_mean"], reference.running_mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(params["bn1.running_var"], reference.running_var, atol=1e-6, rtol=1e-6)


def test_non_finite_loss_ends_with_its_step(run_config: Any, few_digits: DataSet) -> None:
    images, _ = few_digits.split("train")
    config = run_config(method="ibp", train__epochs=3, train__batch_size=64)
    order = torch.randperm(256, generator=generator_for(config.seed, 0, "order"))
    broken = images.clone()
    broken[order[64 * 2 + 5]] = float("nan")  # in the third of four steps
    data = replace(few_digits, images=few_digits.images | {"train": broken})
    reports: list[EpochReport] = []
    with pytest.raises(NonFiniteLossError, match="loss is not finite at step 3") as caught:
        train(config, data, report=lambda r: reports.append(r) is None)
    assert (caught.value.step, caught.value.epoch) == (3, 1)
    assert reports == []
    assert pickle.loads(pickle.dumps(caught.value)).step == 3  # it crosses processes


def test_a_gradient_that_overflows_is_found(run_config: Any, few_digits: DataSet) -> None:
    network = train(run_config(train__epochs=1), few_digits, report=go_on).network
    huge = replace(network, params=network.params | {"fc2.weight": 1e36 * network.params["fc2.weight"]})
    with pytest.raises(NonFiniteLossError, match="gradient is not finite at step 1") as caught:
        train(run_config(), few_digits, report=go_on, init=huge)
    assert (caught.value.step, caught.value.epoch) == (1, 1)


def test_start_from_a_network(run_config: Any, few_digits: DataSet) -> None:
    first = train(run_config(), few_digits, report=go_on).network
    config = run_config(train__epochs=1, learning_rate=1e-9)
    again = train(config, few_digits, report=go_on, init=first).network
    torch.testing.assert_close(again.params["fc1.weight"], first.params["fc1.weight"], atol=1e-6, rtol=0)
    wider = run_config(model={"name": "mlp", "hidden": [25]})
    with pytest.raises(UserError, match=r"'fc1.bias' has shape \[24\]; expected \[25\]"):
        train(wider, few_digits, report=go_on, init=first)


def test_foreign_states_are_refused(run_config: Any, few_digits: DataSet) -> None:
    config = run_config()
    _, state = train_with_stop(config, few_digits, 1)
    with pytest.raises(UserError, match="same configuration"):
        train(replace(config, learning_rate=0.1), few_digits, report=go_on, state=state)
    for broken in (b"", b"garbage" * 10, state[:-20], pack(train(config, few_digits, report=go_on).network)):
        with pytest.raises(UserError, match="training state"):
            train(config, few_digits, report=go_on, state=broken)


def test_a_batch_larger_than_the_data_is_one_step(run_config: Any, few_digits: DataSet) -> None:
    result = train(run_config(train__batch_size=1000, train__epochs=2), few_digits, report=go_on)
    assert result.epochs == 2


def test_an_epoch_may_see_a_part_of_the_images_and_another_one_each_time(
    run_config: Any, few_digits: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = len(few_digits.labels["train"])
    seen: list[Tensor] = []
    whole_batch = Run.batch

    def batch(run: Run, chosen: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(chosen)
        return whole_batch(run, chosen)

    monkeypatch.setattr(Run, "batch", batch)
    config = run_config(train__epochs=2, train__batch_size=8, train__epoch_fraction=0.25)
    whole = train(config, few_digits, report=go_on)
    steps = int(0.25 * images) // 8
    assert len(seen) == 2 * steps
    first, second = (torch.cat(seen[i * steps : (i + 1) * steps]).tolist() for i in range(2))
    assert len(set(first)) == len(first) == len(set(second)) == 8 * steps
    assert set(first) != set(second)
    _, state = train_with_stop(config, few_digits, 1)
    assert_same(train(config, few_digits, report=go_on, state=state).network, whole.network)
    least = train(run_config(train__epochs=1, train__epoch_fraction=1e-6), few_digits, report=go_on)
    assert least.epochs == 1  # of one step


def test_a_whole_epoch_is_what_it_was_without_the_setting(run_config: Any, few_digits: DataSet) -> None:
    plain, stated = run_config(train__epochs=1), run_config(train__epochs=1, train__epoch_fraction=1.0)
    assert plain.config_hash != stated.config_hash
    assert_same(*(train(config, few_digits, report=go_on).network for config in (plain, stated)))


def test_evenly_spaced() -> None:
    assert evenly_spaced(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert evenly_spaced(101, 3).tolist() == [0, 50, 100]


# --- workers -------------------------------------------------------------------------------------------------------


class Threads:
    """Two workers in two threads of this process."""

    def __init__(self, rank: int, shared: dict[str, Any]) -> None:
        self.rank, self.size, self.shared = rank, 2, shared

    def mean_(self, tensors: list[Tensor], /) -> None:
        self.shared[f"{self.rank}"] = [t.detach().clone() for t in tensors]
        self.shared["barrier"].wait()
        means = [(a + b) / 2 for a, b in zip(self.shared["0"], self.shared["1"], strict=True)]
        self.shared["barrier"].wait()
        with torch.no_grad():
            for tensor, mean in zip(tensors, means, strict=True):
                tensor.copy_(mean)


def in_two_workers(job: Callable[[Threads], TrainResult]) -> list[TrainResult]:
    shared: dict[str, Any] = {"barrier": threading.Barrier(2, timeout=240)}
    results: dict[int, TrainResult] = {}
    threads = [threading.Thread(target=lambda r=r: results.__setitem__(r, job(Threads(r, shared)))) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[0], results[1]]


def test_two_workers_agree_with_each_other_and_with_one(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(method="cactus", learning_rate=0.002, compression_set={"refresh_every": 2, "family": "gu-grad"})
    one = train(config, few_digits, report=go_on)
    both = in_two_workers(lambda workers: train(config, few_digits, report=go_on, workers=workers))
    assert_same(both[0].network, both[1].network)
    for name, tensor in one.network.params.items():
        torch.testing.assert_close(both[0].network.params[name], tensor, atol=2e-3, rtol=0)
    assert both[0].history[-1]["standard_accuracy"] == pytest.approx(one.history[-1]["standard_accuracy"], abs=0.02)


@pytest.mark.parametrize(
    "options", [{"awp_radius": 0.5}, {"awp_radius": 0.5, "awp_steps": 2, "awp_member": "pruned"}, {"method": "awp"}]
)
def test_two_workers_perturb_alike(
    options: dict[str, Any], run_config: Any, few_digits: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[Tensor]] = {}
    apply = perturb.apply

    def recorded(params: Params, deltas: Params) -> Params:
        seen.setdefault(threading.get_ident(), []).extend(delta.detach().clone() for delta in deltas.values())
        return apply(params, deltas)

    monkeypatch.setattr(perturb, "apply", recorded)
    config = run_config(**{"method": "cactus", "train__epochs": 1} | options)
    in_two_workers(lambda workers: train(config, few_digits, report=go_on, workers=workers))
    first, second = seen.values()
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(bool(a.any()) for a in first)


def test_workers_average_batch_norm_and_stop_together(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(model=BATCH_NORM, train__epochs=5)

    def job(workers: Threads) -> TrainResult:
        return train(config, few_digits, report=lambda r: workers.rank == 0 or r.epoch < 2, workers=workers)

    both = in_two_workers(job)
    assert [(r.stopped, r.epochs) for r in both] == [(True, 2)] * 2
    assert_same(both[0].network, both[1].network)


def test_batch_that_cannot_be_split_is_refused(run_config: Any, few_digits: DataSet) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size: got 63; expected a multiple of the 2 workers"):
        train(run_config(train__batch_size=63), few_digits, report=go_on, workers=Threads(0, {}))


# --- what the losses need of the loop ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mtl_ibp", "staps", "crown_ibp"])
def test_resumed_runs_of_other_losses_are_the_same(method: str, run_config: Any, few_digits: DataSet) -> None:
    config = run_config(method=method, model=BATCH_NORM, train__epochs=4, train__ramp=0.2, train__regularizer=0.2)
    whole = train(config, few_digits, report=go_on)
    _, state = train_with_stop(config, few_digits, 2)
    assert_same(whole.last, train(config, few_digits, report=go_on, state=state).last)


def test_running_statistics_follow_the_clean_and_the_adversarial_batch(run_config: Any, few_digits: DataSet) -> None:
    options = {"train__epochs": 1, "train__batch_size": 256, "train__warmup": 0.0, "train__ramp": 0.0}
    config = run_config(method="exp_ibp", model=BATCH_NORM, threat__epsilon=1e-7, learning_rate=1e-9, **options)
    params = train(config, few_digits, report=go_on).network.params
    mean = nn.functional.linear(few_digits.split("train")[0].flatten(1), params["fc1.weight"]).mean(0)
    # Both batches are the same at this radius: two moves of a tenth each from zero.
    torch.testing.assert_close(params["bn1.running_mean"], (1 - 0.9**2) * mean, atol=1e-4, rtol=1e-4)


def test_training_radius_may_exceed_the_threat(run_config: Any, few_digits: DataSet) -> None:
    result = train(run_config(method="ibp", train__epsilon_factor=2.0), few_digits, report=go_on)
    assert result.history[-1]["epsilon"] == pytest.approx(0.1)


def test_a_tail_that_the_model_does_not_have_is_refused_at_once(run_config: Any, few_digits: DataSet) -> None:
    with pytest.raises(ConfigError, match=r"train\.crop_padding: got 8; expected less than the 8 pixels of a side"):
        train(run_config(train__crop_padding=8), few_digits, report=go_on)
    with pytest.raises(ConfigError, match=r"train\.batch_size: got 1; expected at least 2 images a step and worker"):
        train(run_config(model=BATCH_NORM, train__batch_size=1), few_digits, report=go_on)
    seldom = {"method": "cactus", "compression_set": {"member_fraction": 0.01}}
    with pytest.raises(ConfigError, match=r"compression_set\.member_fraction: got 0\.01; .*members see 1"):
        train(run_config(model=BATCH_NORM, **seldom), few_digits, report=go_on)
    with pytest.raises(ConfigError, match=r"tail_layers: got 5; expected one of 1, 2"):
        train(run_config(method="taps", tail_layers=5), few_digits, report=go_on)
