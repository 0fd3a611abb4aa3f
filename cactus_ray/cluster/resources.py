"""Who gets which CPU and GPU: worked out before anything starts, so that an impossible request never pends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cactus_ray.errors import UserError
from cactus_ray.search.settings import ResourceSettings
from cactus_ray.search.space import Space


@dataclass(frozen=True, slots=True)
class Plan:
    """How a study shares its cluster.

    ``execution``: "direct" (the loop runs in the trial's actor) or "train" (Ray Train workers; the trial's actor then
    asks for next to nothing, because Train's placement group holds the compute). ``training``: trials that train at
    once. ``in_flight``: trials that train or wait for verdicts.
    """

    execution: str
    training: int
    in_flight: int
    trial_resources: dict[str, float]
    verifier_resources: dict[str, float]
    verifiers: int


def execution_of(resources: ResourceSettings) -> str:
    """ "train" or "direct"; auto takes Ray Train for several workers or a GPU, because its start-up costs seconds."""
    if resources.execution != "auto":
        return resources.execution
    return "train" if resources.workers > 1 or resources.gpus_per_worker > 0 else "direct"


def plan(space: Space, available: Mapping[str, float]) -> Plan:
    """Share ``available`` ({"CPU": ..., "GPU": ...}) between trials and verifiers.

    Raises UserError with the numbers if not even one trial and the verifiers fit.
    """
    r = space.resources
    execution = execution_of(r)
    cpus, gpus = available.get("CPU", 0.0), available.get("GPU", 0.0)
    trial_cpus, trial_gpus = r.workers * r.cpus_per_worker, r.workers * r.gpus_per_worker
    fitting = int((cpus - r.verifiers) / trial_cpus + 1e-9)
    if trial_gpus > 0:
        fitting = min(fitting, int(gpus / trial_gpus + 1e-9))
    if fitting < 1:
        raise UserError(
            f"resources: a trial needs {trial_cpus:g} CPU and {trial_gpus:g} GPU beside {r.verifiers} verifier(s) of "
            f"1 CPU, but the cluster has {cpus:g} CPU and {gpus:g} GPU; lower workers, cpus_per_worker, "
            "gpus_per_worker or verifiers, or use a larger cluster"
        )
    wanted = space.search.concurrency
    training = fitting if wanted is None else min(fitting, wanted)
    # One trial more than can train keeps the trainers busy while verdicts are awaited; a stated concurrency is kept
    # to the letter, because at 1 the order of asks and tells, and so the study, is reproducible.
    in_flight = training + 1 if wanted is None else wanted
    trial_resources = (
        {"CPU": float(r.cpus_per_worker), "GPU": float(r.gpus_per_worker)}
        if execution == "direct"
        else {"CPU": 0.001}  # exactly 0 is refused by Tune ("empty head")
    )
    return Plan(execution, training, in_flight, trial_resources, {"CPU": 1.0}, r.verifiers)
