"""Sharing a cluster: the numbers, and a refusal with the numbers."""

import pytest

from cactus_ray.cluster.resources import plan
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
    assert shares.trial_resources == {"CPU": 0.001}


def test_a_stated_concurrency_is_kept_to_the_letter() -> None:
    shares = plan(space({"verifiers": 1}, concurrency=1), {"CPU": 16.0})
    assert (shares.training, shares.in_flight) == (1, 1)


def test_gpus_limit_how_many_train() -> None:
    shares = plan(space({"gpus_per_worker": 0.5, "verifiers": 2}), {"CPU": 64.0, "GPU": 1.0})
    assert (shares.execution, shares.training) == ("train", 2)


@pytest.mark.parametrize(
    ("resources", "available", "named"),
    [
        ({"workers": 4, "verifiers": 1}, {"CPU": 4.0}, "4 CPU"),
        ({"verifiers": 2}, {"CPU": 2.0}, "2 verifier"),
        ({"gpus_per_worker": 1}, {"CPU": 8.0}, "0 GPU"),
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
