"""The part of a GPU that verifiers have beside trials, where a space leaves it to us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cactus_ray.cluster.packing import MARGIN, Profile, loosened, packed, room
from cactus_ray.cluster.resources import plan
from cactus_ray.errors import ConfigError
from cactus_ray.search.settings import ResourceSettings
from cactus_ray.search.space import Space, load_space, parse_space

CIFAR10 = Path(__file__).parents[2] / "search_spaces" / "cifar10.yaml"


def space(**resources: Any) -> Space:
    plain = {
        "name": "parts", "data": {"name": "digits"}, "model": {"name": "mlp"}, "threat": {"epsilon": 0.1},
        "levels": ["dense"], "resources": resources,
    }  # fmt: skip
    return parse_space(plain, "parts.yaml")


def units(gpus: float) -> int:
    """What Ray makes of a request: ten-thousandths, rounded."""
    return int(gpus * 10_000 + 0.5)


@pytest.mark.parametrize("verifiers", [1, 2, 3, 7])
@pytest.mark.parametrize("workers", [1.0, 0.5, 1 / 3, 0.25, 1 / 6, 1 / 7])
def test_trials_and_verifiers_fill_one_gpu_and_no_trial_is_lost(workers: float, verifiers: int) -> None:
    shares = plan(space(gpus_per_worker=workers, verifiers=verifiers), {"CPU": 64.0, "GPU": 1.0})
    r = shares.resources
    assert shares.training == round(1 / workers)
    assert shares.verifier_resources["GPU"] == r.verifier_gpus > 0
    assert shares.training * units(r.worker_gpus) + verifiers * units(r.verifier_gpus) <= 10_000


def test_a_trial_that_leaves_room_anyway_keeps_all_that_it_asked_for() -> None:
    r = ResourceSettings(gpus_per_worker=0.4)
    assert (r.worker_gpus, r.verifier_gpus) == (0.4, 0.2)


@pytest.mark.parametrize(
    ("resources", "worker", "verifier"),
    [
        ({}, 0.0, 0.0),
        ({"gpus_per_worker": 2.0}, 2.0, 0.0),  # whole GPUs have no part to leave
        ({"gpus_per_worker": 1.0, "gpus_per_verifier": 0.0}, 1.0, 0.0),
        ({"gpus_per_worker": 0.5, "gpus_per_verifier": 0.25}, 0.5, 0.25),
        ({"gpus_per_verifier": 1.0}, 0.0, 1.0),
    ],
)
def test_what_is_said_is_kept(resources: dict[str, Any], worker: float, verifier: float) -> None:
    r = space(**resources).resources
    assert (r.worker_gpus, r.verifier_gpus) == (worker, verifier)


def test_auto_is_a_word_and_others_are_refused() -> None:
    assert space(gpus_per_verifier="auto") == space()
    with pytest.raises(ConfigError, match=r"gpus_per_verifier: got 'some'; expected auto or a finite number"):
        space(gpus_per_verifier="some")


def test_where_only_gpu_nodes_lack_cpus_verifiers_do_without() -> None:
    nodes = [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 0.0}]
    shares = plan(space(gpus_per_worker=1), {"CPU": 5.0, "GPU": 1.0}, nodes)
    assert (shares.training, shares.verifier_resources["GPU"], shares.verifier_nodes) == (1, 0.0, (1,))


@pytest.mark.parametrize(("number", "left"), [(4, 2), (3, 1), (2, 1), (1, None)])
def test_a_lack_of_memory_halves_the_trials_of_what_is_theirs(number: int, left: int | None) -> None:
    asked = packed(space(gpus_per_worker=1), number)
    had = plan(asked, {"CPU": 64.0, "GPU": 1.0}).resources.worker_gpus
    looser = loosened(space(gpus_per_worker=1), had, {"CPU": 64.0, "GPU": 1.0})
    assert (None if looser is None else round(1 / looser.resources.gpus_per_worker)) == left


def test_memory_for_verifiers_is_left_free() -> None:
    profile = Profile("a GPU", 1, 2, 0, 10)
    assert room(profile) == int((1 - MARGIN) * 10 / 2)
    assert room(profile, 0.8) == int((0.8 - MARGIN) * 10 / 2) == 3


def test_the_shipped_study_of_cifar10_verifies_on_its_gpu() -> None:
    shares = plan(load_space(CIFAR10), {"CPU": 4.0, "GPU": 1.0})
    assert (shares.training, shares.verifiers, shares.verifier_resources["GPU"]) == (1, 1, 0.2)
