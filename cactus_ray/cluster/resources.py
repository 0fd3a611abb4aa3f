"""Who gets which CPU and GPU: worked out before anything starts, so that an impossible request never pends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cactus_ray.errors import UserError
from cactus_ray.search.settings import ResourceSettings
from cactus_ray.search.space import Space

TINY = 1e-9
"""Slack of sums of fractions: ten tenths are one."""


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


def plan(space: Space, available: Mapping[str, float], nodes: Sequence[Mapping[str, float]] = ()) -> Plan:
    """Share ``available`` ({"CPU": ..., "GPU": ...}) between trials and verifiers.

    ``nodes``: the same by node, because no worker and no verifier is spread over two; without it there is one node.
    Raises UserError with the numbers if not even one trial and the verifiers fit.
    """
    r = space.resources
    execution = execution_of(r)
    shape = list(nodes) or [available]
    fitting = _fitting(r, shape)
    if fitting < 1:
        largest = ""
        if len(shape) > 1:
            by_node = ", ".join(_amounts(node) for node in shape[:8]) + (", ..." if len(shape) > 8 else "")
            largest = f" in {len(shape)} nodes ({by_node}), and a worker or verifier has to fit one of them"
        raise UserError(
            f"resources: a trial needs {r.workers * r.cpus_per_worker:g} CPU and {r.workers * r.gpus_per_worker:g} GPU "
            f"beside {r.verifiers} verifier(s) of {r.cpus_per_verifier:g} CPU and {r.gpus_per_verifier:g} GPU, but the "
            f"cluster has {_amounts(available)}{largest}; lower workers, verifiers or what each of them asks for, or "
            "use a larger cluster"
        )
    wanted = space.search.concurrency
    training = fitting if wanted is None else min(fitting, wanted)
    # One trial more than can train keeps the trainers busy while verdicts are awaited; a stated concurrency is kept
    # to the letter, because at 1 the order of asks and tells, and so the study, is reproducible.
    in_flight = training + 1 if wanted is None else wanted
    trial_resources = (
        {"CPU": float(r.cpus_per_worker), "GPU": float(r.gpus_per_worker)}
        if execution == "direct"
        # Nothing at all is refused by Tune ("empty head"), and any part of a CPU would be missing to the workers.
        else {"memory": 1.0}
    )
    verifier_resources = {"CPU": float(r.cpus_per_verifier), "GPU": float(r.gpus_per_verifier)}
    return Plan(execution, training, in_flight, trial_resources, verifier_resources, r.verifiers)


def missing(resources: ResourceSettings, free: Mapping[str, float]) -> str:
    """What a trial that is not scheduled waits for, in numbers. ``free``: what the cluster has left."""
    wanted = {
        "CPU": resources.workers * resources.cpus_per_worker, "GPU": resources.workers * resources.gpus_per_worker
    }  # fmt: skip
    lacking = {kind: amount - free.get(kind, 0.0) for kind, amount in wanted.items()}
    short = " and ".join(f"{amount:g} {kind}" for kind, amount in lacking.items() if amount > TINY)
    text = f"it needs {_amounts(wanted)}, {_amounts(free)} are free"
    if short:
        return f"{text}: {short} are missing (what else runs on this cluster, or has a node gone?)"
    return f"{text}: enough in all, so no single node has room for a worker, or Ray is still starting it"


def _amounts(of: Mapping[str, float]) -> str:
    return f"{of.get('CPU', 0.0):g} CPU and {of.get('GPU', 0.0):g} GPU"


def _fitting(r: ResourceSettings, nodes: Sequence[Mapping[str, float]]) -> int:
    """Trials that fit beside the verifiers; 0 also where the verifiers alone do not fit."""
    cpus = [node.get("CPU", 0.0) for node in nodes]
    gpus = [[1.0] * int(node.get("GPU", 0.0) + TINY) for node in nodes]

    def placed(wanted_cpus: float, wanted_gpus: float) -> bool:
        for i, free in enumerate(gpus):
            if cpus[i] + TINY >= wanted_cpus and _place(free, wanted_gpus):
                cpus[i] -= wanted_cpus
                return True
        return False

    if not all(placed(r.cpus_per_verifier, r.gpus_per_verifier) for _ in range(r.verifiers)):
        return 0
    trials = 0
    while all(placed(r.cpus_per_worker, r.gpus_per_worker) for _ in range(r.workers)):
        trials += 1
    return trials


def _place(free: list[float], wanted: float) -> bool:
    """Take ``wanted`` GPUs out of ``free``: a part of one from the fullest that has it, as no two can give a part."""
    if wanted >= 1:
        whole = [i for i, left in enumerate(free) if left > 1 - TINY][: int(wanted + TINY)]
        if len(whole) < int(wanted + TINY):
            return False
        for i in whole:
            free[i] = 0.0
        return True
    room = [i for i, left in enumerate(free) if left + TINY >= wanted]
    if wanted > 0 and not room:
        return False
    if wanted > 0:
        free[min(room, key=lambda i: free[i])] -= wanted
    return True
