"""What is freed when the actor of a Ray Train trial is dead."""

import time

import pytest
import ray

from cactus_ray.cluster.ray_train import free

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("shared_ray")]


def free_cpus(wanted: float, seconds: float = 120.0) -> float:
    """CPUs that are free, once that is ``wanted`` or after so long."""
    deadline = time.monotonic() + seconds
    while (found := ray.available_resources().get("CPU", 0.0)) != wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def test_a_placement_group_is_freed_by_its_id_and_a_second_time_does_no_harm() -> None:
    held, other = (ray.util.placement_group([{"CPU": 1}]) for _ in range(2))
    assert held.wait(120)
    assert other.wait(120)
    free(held.id.hex())
    assert free_cpus(3.0) == 3.0
    free(held.id.hex())
    free("ab" * len(held.id.binary()))
    assert free_cpus(3.0) == 3.0
    free(other.id.hex())
