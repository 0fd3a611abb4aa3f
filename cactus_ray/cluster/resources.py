"""Who gets which CPU and GPU: worked out before anything starts, so that an impossible request never pends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cactus_ray.errors import UserError
from cactus_ray.search.settings import TINY as TINY
from cactus_ray.search.settings import ResourceSettings
from cactus_ray.search.space import Space


@dataclass(frozen=True, slots=True)
class Plan:
    """How a study shares its cluster.

    ``execution``: "direct" (the loop runs in the trial's actor) or "train" (Ray Train workers; the trial's actor then
    asks for next to nothing, because Train's placement group holds the compute). ``training``: trials that train at
    once. ``in_flight``: trials that train or wait for verdicts. ``verifier_nodes``: the node of each verifier, by its
    place in the list that was planned for: where trials lose least. What is left is cut into equal workers, so it does
    not matter where Ray puts those. ``resources``: what was planned for.
    """

    execution: str
    training: int
    in_flight: int
    trial_resources: dict[str, float]
    verifier_resources: dict[str, float]
    verifiers: int
    verifier_nodes: tuple[int, ...]
    resources: ResourceSettings


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
    verifier_nodes, fitting = _fitting(r, shape)
    if fitting < 1 and r.gpus_per_verifier is None and r.verifier_gpus > 0:  # auto is a wish
        return plan(replace(space, resources=replace(r, gpus_per_verifier=0.0)), available, nodes)
    if fitting < 1:
        largest = ""
        if len(shape) > 1:
            by_node = ", ".join(_amounts(node) for node in shape[:8]) + (", ..." if len(shape) > 8 else "")
            largest = f" in {len(shape)} nodes ({by_node}), and a worker or verifier has to fit one of them"
        raise UserError(
            f"resources: a trial needs {r.workers * r.cpus_per_worker:g} CPU and {r.workers * r.worker_gpus:g} GPU "
            f"beside {r.verifiers} verifier(s) of {r.cpus_per_verifier:g} CPU and {r.verifier_gpus:g} GPU, but the "
            f"cluster has {_amounts(available)}{largest}; lower workers, verifiers or what each of them asks for, or "
            "use a larger cluster"
        )
    wanted = space.search.concurrency
    training = fitting if wanted is None else min(fitting, wanted)
    # One trial more than can train keeps the trainers busy while verdicts are awaited; a stated concurrency is kept
    # to the letter, because at 1 the order of asks and tells, and so the study, is reproducible.
    in_flight = training + 1 if wanted is None else wanted
    trial_resources = (
        {"CPU": float(r.cpus_per_worker), "GPU": float(r.worker_gpus)}
        if execution == "direct"
        # Nothing at all is refused by Tune ("empty head"), and any part of a CPU would be missing to the workers.
        else {"memory": 1.0}
    )
    verifier_resources = {"CPU": float(r.cpus_per_verifier), "GPU": float(r.verifier_gpus)}
    return Plan(
        execution, training, in_flight, trial_resources, verifier_resources, r.verifiers, verifier_nodes, r
    )  # fmt: skip


def missing(resources: ResourceSettings, free: Mapping[str, float]) -> str:
    """What a trial that is not scheduled waits for, in numbers. ``free``: what the cluster has left."""
    wanted = {
        "CPU": resources.workers * resources.cpus_per_worker, "GPU": resources.workers * resources.worker_gpus
    }  # fmt: skip
    lacking = {kind: amount - free.get(kind, 0.0) for kind, amount in wanted.items()}
    short = " and ".join(f"{amount:g} {kind}" for kind, amount in lacking.items() if amount > TINY)
    text = f"it needs {_amounts(wanted)}, {_amounts(free)} are free"
    if short:
        return f"{text}: {short} are missing (what else runs on this cluster, or has a node gone?)"
    return f"{text}: enough in all, so no single node has room for a worker, or Ray is still starting it"


def _amounts(of: Mapping[str, float]) -> str:
    return f"{of.get('CPU', 0.0):g} CPU and {of.get('GPU', 0.0):g} GPU"


@dataclass(slots=True)
class _Room:
    """What one node has left: CPUs, and of each of its GPUs."""

    cpus: float
    gpus: list[float]

    def workers(self, cpus: float, gpus: float) -> int:
        """How many equal workers fit, in whatever order they come."""
        by_cpu = int((self.cpus + TINY) / cpus)
        if gpus >= 1:
            return min(by_cpu, sum(left > 1 - TINY for left in self.gpus) // int(gpus + TINY))
        if gpus > 0:
            return min(by_cpu, sum(int((left + TINY) / gpus) for left in self.gpus))
        return by_cpu

    def after(self, cpus: float, gpus: float) -> _Room | None:
        """What is left after one more; None where it does not fit. Parts of a GPU come from the fullest that has room,
        as no two can give one; Ray does the same within a node."""
        left = list(self.gpus)
        if self.workers(cpus, gpus) < 1:
            return None
        if gpus >= 1:
            for i in [i for i, free in enumerate(left) if free > 1 - TINY][: int(gpus + TINY)]:
                left[i] = 0.0
        elif gpus > 0:
            left[min((i for i, free in enumerate(left) if free + TINY >= gpus), key=lambda i: left[i])] -= gpus
        return _Room(self.cpus - cpus, left)


def _fitting(r: ResourceSettings, nodes: Sequence[Mapping[str, float]]) -> tuple[tuple[int, ...], int]:
    """The node of each verifier, and the trials that fit beside them; 0 also where the verifiers alone do not fit."""
    rooms = [_Room(node.get("CPU", 0.0), [1.0] * int(node.get("GPU", 0.0) + TINY)) for node in nodes]
    worker = r.cpus_per_worker, r.worker_gpus
    chosen: list[int] = []
    for _ in range(r.verifiers):
        found = [
            (i, after) for i, room in enumerate(rooms) if (after := room.after(r.cpus_per_verifier, r.verifier_gpus))
        ]
        if not found:
            return tuple(chosen), 0
        lost = {i: rooms[i].workers(*worker) - after.workers(*worker) for i, after in found}
        place, after = min(found, key=lambda pair: (lost[pair[0]], pair[1].cpus, pair[0]))
        rooms[place] = after
        chosen.append(place)
    return tuple(chosen), sum(room.workers(*worker) for room in rooms) // r.workers
