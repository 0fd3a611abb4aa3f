"""Sharing a cluster: the numbers, and a refusal with the numbers."""

import pytest

from cactus_ray.cluster.resources import missing, plan
from cactus_ray.errors import UserError
from cactus_ray.search.space import Space, parse_space

BASE = {
    "name": "plan",
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "threat": {"epsilon": 0.1},
    "levels": ["dense"],
}


def space(resources: dict[str, object], **search: object) -> Space:
    return parse_space({**BASE, "resources": resources, "search": search}, "plan.yaml")


def test_small_trials_run_directly_and_one_more_waits_for_verdicts() -> None:
    shares = plan(space({"workers": 1, "verifiers": 1}), {"CPU": 4.0})
    assert (shares.execution, shares.training, shares.in_flight) == ("direct", 3, 4)
    assert shares.trial_resources["CPU"] == 1.0


def test_several_workers_go_through_ray_train_which_holds_the_compute() -> None:
    shares = plan(space({"workers": 2, "verifiers": 1}), {"CPU": 8.0})
    assert (shares.execution, shares.training) == ("train", 3)
    assert shares.trial_resources == {"memory": 1.0}  # no part of a CPU: two would not do for a worker and a verifier
    assert plan(space({"workers": 2, "verifiers": 2}), {"CPU": 4.0}).training == 1  # nothing is left, nor needed


def test_a_stated_concurrency_is_kept_to_the_letter() -> None:
    shares = plan(space({"verifiers": 1}, concurrency=1), {"CPU": 16.0})
    assert (shares.training, shares.in_flight) == (1, 1)


def test_gpus_limit_how_many_train() -> None:
    shares = plan(space({"gpus_per_worker": 0.5, "verifiers": 2}), {"CPU": 64.0, "GPU": 1.0})
    assert (shares.execution, shares.training) == ("train", 2)


@pytest.mark.parametrize(
    ("verifiers", "part", "per_worker", "gpus", "training"),
    [
        (2, 0.25, 0.5, 1.0, 1),  # half a GPU is left for one trial
        (4, 0.25, 0.0, 1.0, 60),  # trials need none
        (3, 0.25, 0.5, 2.0, 2),  # a quarter beside the verifiers is no half, nor has it to be
        (1, 0.1, 1.0, 2.0, 1),  # no trial on the GPU that a verifier shares
        (1, 1.0, 0.25, 2.0, 4),
        (10, 0.1, 0.5, 2.0, 2),  # ten tenths are one
    ],
)
def test_verifiers_share_gpus_in_parts(
    verifiers: int, part: float, per_worker: float, gpus: float, training: int
) -> None:
    resources = {"verifiers": verifiers, "gpus_per_verifier": part, "gpus_per_worker": per_worker}
    shares = plan(space(resources), {"CPU": 60.0 + verifiers, "GPU": gpus})
    assert shares.training == training
    assert shares.verifier_resources == {"CPU": 1.0, "GPU": part}


def test_verifiers_may_have_a_part_of_a_cpu() -> None:
    shares = plan(space({"verifiers": 4, "cpus_per_verifier": 0.25}), {"CPU": 2.0})
    assert (shares.training, shares.verifiers, shares.verifier_resources["CPU"]) == (1, 4, 0.25)


@pytest.mark.parametrize(
    ("resources", "available", "named"),
    [
        ({"workers": 4, "verifiers": 1}, {"CPU": 4.0}, "4 CPU"),
        ({"verifiers": 2}, {"CPU": 2.0}, "2 verifier"),
        ({"gpus_per_worker": 1}, {"CPU": 8.0}, "0 GPU"),
        ({"gpus_per_verifier": 0.6, "verifiers": 2}, {"CPU": 8.0, "GPU": 1.0}, "0.6 GPU, but the cluster has 8 CPU"),
        ({"gpus_per_verifier": 0.4, "gpus_per_worker": 0.7}, {"CPU": 8.0, "GPU": 1.0}, "0.7 GPU beside"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_numbers(
    resources: dict[str, object], available: dict[str, float], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        plan(space(resources), available)


def test_direct_execution_of_several_workers_is_refused() -> None:
    with pytest.raises(UserError, match="direct runs one worker, not 2"):
        plan(space({"workers": 2, "execution": "direct"}), {"CPU": 8.0})


@pytest.mark.parametrize(
    ("resources", "nodes", "training"),
    [
        ({"workers": 2, "cpus_per_worker": 3}, [4.0, 4.0, 4.0], 1),  # three workers of 3 CPUs fit, and two make a trial
        ({"cpus_per_worker": 2}, [3.0, 3.0], 2),
        ({"cpus_per_worker": 2, "verifiers": 3}, [3.0, 3.0], 1),
        ({"workers": 4}, [1.0] * 9, 2),
    ],
)
def test_nothing_is_spread_over_two_nodes(resources: dict[str, object], nodes: list[float], training: int) -> None:
    shapes = [{"CPU": cpus} for cpus in nodes]
    assert plan(space(resources), {"CPU": sum(nodes)}, shapes).training == training


@pytest.mark.parametrize(
    ("resources", "nodes", "places", "training"),
    [
        ({"cpus_per_worker": 3}, [(3, 0), (2, 0)], (1,), 1),  # first fit would leave no node for the trial
        ({"cpus_per_worker": 3, "verifiers": 3}, [(4, 0), (4, 0), (1, 0)], (2, 0, 1), 2),
        ({"verifiers": 2, "gpus_per_verifier": 0.5, "gpus_per_worker": 1}, [(8, 1), (8, 1)], (0, 0), 1),
        ({"verifiers": 2}, [(8, 4), (8, 0)], (0, 0), 14),
        ({"verifiers": 2, "gpus_per_worker": 1}, [(2, 2), (2, 0)], (1, 1), 2),
    ],
)
def test_verifiers_go_where_trials_lose_least(
    resources: dict[str, object], nodes: list[tuple[float, float]], places: tuple[int, ...], training: int
) -> None:
    shapes = [{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in nodes]
    total = {kind: sum(shape[kind] for shape in shapes) for kind in ("CPU", "GPU")}
    shares = plan(space(resources), total, shapes)
    assert (shares.verifier_nodes, shares.training) == (places, training)


def test_a_worker_that_fits_no_node_is_refused_with_the_nodes() -> None:
    with pytest.raises(UserError, match=r"8 CPU and 0 GPU in 4 nodes \(2 CPU and 0 GPU, .*fit one of them"):
        plan(space({"cpus_per_worker": 3}), {"CPU": 8.0}, [{"CPU": 2.0}] * 4)


def test_what_a_waiting_trial_lacks_is_named() -> None:
    wanted = space({"workers": 2, "cpus_per_worker": 2, "gpus_per_worker": 1, "gpus_per_verifier": 0}).resources
    assert "2 CPU and 1 GPU are free: 2 CPU and 1 GPU are missing" in missing(wanted, {"CPU": 2.0, "GPU": 1.0})
    assert "enough in all" in missing(wanted, {"CPU": 4.0, "GPU": 2.0})
