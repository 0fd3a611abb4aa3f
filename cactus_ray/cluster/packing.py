"""Several trials on one GPU: as many as a profile says its memory has room for, and fewer once it ran out after all.

A trial that shares a GPU asks Ray for a part of it, as verifiers do, so that what each has adds up to one. Ray does not
hold anybody to their part: the profile and its margin do. What a trial computes does not depend on its neighbours, only
how long it takes; where that counts, ``auto`` leaves a GPU to one trial.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray
import torch

from cactus_ray.cluster.resources import TINY, Plan, plan
from cactus_ray.cluster.train_workers import describe
from cactus_ray.config import DataConfig, RunConfig
from cactus_ray.data import load
from cactus_ray.errors import ConfigError, UserError
from cactus_ray.search.settings import ResourceSettings
from cactus_ray.search.space import Space
from cactus_ray.training.bench import measure
from cactus_ray.training.evaluate import proxy_accuracies
from cactus_ray.training.run import start
from cactus_ray.training.workers import Alone

MOST = 4
"""Trials on a GPU that ``auto`` allows: they take turns on its processors, so that more of them gain ever less."""
MARGIN = 0.1
"""Share of a GPU's memory that stays free: for fragments, and for what a profile of single steps has not seen."""

PROFILE_SECONDS = 300.0
"""So long a profile may wait for a GPU and take: one that others hold is no reason to hold up the study."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Memory of one training process on a GPU, in bytes.

    ``peak``: most that tensors took at once in a step or an evaluation; ``held``: most that torch's allocator kept,
    which others cannot have; ``context``: what was in use beside it (CUDA's context and libraries, and whatever else
    runs there); ``total``: of the GPU.
    """

    device: str
    peak: int
    held: int
    context: int
    total: int


@dataclass(frozen=True, slots=True)
class Packing:
    """How many trials share a GPU, and why."""

    per_gpu: int
    why: str
    profile: Profile | None = None

    def to_dict(self) -> dict[str, Any]:
        profile = {} if self.profile is None else {"profile": asdict(self.profile)}
        return {"trials_per_gpu": self.per_gpu, "why": self.why, **profile}


def room(profile: Profile, part: float = 1.0) -> int:
    """Trials whose memory fits ``part`` of a GPU beside the margin: from 1, which is always tried, to ``MOST``."""
    return max(1, min(MOST, int((part - MARGIN) * profile.total / (profile.held + profile.context))))


def per_gpu(resources: ResourceSettings) -> int:
    """How many trials share a GPU by what each of their workers asks for."""
    gpus = resources.gpus_per_worker
    return int(1.0 / gpus + TINY) if 0.0 < gpus < 1.0 else 1


def packed(space: Space, number: int) -> Space:
    """The space with so many trials on a GPU: each asks for that part of it."""
    r = space.resources
    if number == per_gpu(r):
        return space
    return replace(space, resources=replace(r, gpus_per_worker=1.0 / number, trials_per_gpu=None))


def decided(space: Space, lowered: int | None, profiled: Callable[[], Profile]) -> Packing | None:
    """How many trials shall share a GPU; None where none has one, or several workers train each.

    ``lowered``: to how many an earlier driver had to go down. ``profiled`` is called only where the number hangs on it.
    """
    r = space.resources
    if r.workers > 1 or not 0.0 < r.gpus_per_worker <= 1.0:
        return None
    asked = r.trials_per_gpu or per_gpu(r)
    found = Packing(asked, "as resources say")
    if r.trials_per_gpu is None and r.gpus_per_worker == 1.0:
        found = _automatic(space, lowered, profiled)
    if lowered is not None and lowered < found.per_gpu:
        return replace(found, per_gpu=lowered, why="an earlier trial ran out of memory")
    return found


def _automatic(space: Space, lowered: int | None, profiled: Callable[[], Profile]) -> Packing:
    if space.search.concurrency == 1:
        return Packing(1, "search.concurrency is 1")
    if lowered == 1:
        return Packing(1, "an earlier trial ran out of memory")
    asked = {o.metric for o in space.objectives} | {c.metric for c in space.constraints} | set(space.front)
    if "train_seconds" in asked:
        return Packing(1, "train_seconds counts, and neighbours would change it")
    try:
        profile = profiled()
    except Exception as error:  # whatever it is, trials that have a GPU each run without a profile
        return Packing(1, f"no profile: {describe(error)}")
    return Packing(room(profile, space.resources.trials_part), "by profile", profile)


def loosened(
    space: Space, gpus: float, available: Mapping[str, float], nodes: Sequence[Mapping[str, float]] = ()
) -> Plan | None:
    """The plan after a trial that had ``gpus`` of a GPU ran out of its memory: half as many trials to a GPU.

    Where so large a part does not fit beside the verifiers, the next smaller one that does. None where the trial had
    all that they leave of a GPU: then it does not fit at all.
    """
    number = int(space.resources.trials_part / gpus + TINY) if 0.0 < gpus < 1.0 else 1
    for fewer in range(max(number // 2, 1), number):
        with contextlib.suppress(UserError):
            return plan(packed(space, fewer), available, nodes)
    return None


# --- the profile ---------------------------------------------------------------------------------------------------


def dearest(space: Space) -> list[RunConfig]:
    """Configurations among which is about the one that needs most memory.

    Every method with every model at its largest and the largest batch, everything else at its first or at its last
    value (ranges and numbers: least or largest).
    """
    ends = {p.name: _sorted(p.domain.ends()) for p in space.parameters}
    methods, models = (ends.pop(name, (None,)) for name in ("method", "model.name"))
    found: dict[str, RunConfig] = {}
    for method in methods:
        for model in models:
            for place in (0, -1):
                chosen: dict[str, Any] = {"method": method, "model.name": model}
                chosen = {name: value for name, value in chosen.items() if value is not None}
                for name, values in ends.items():
                    largest = name.startswith("model.") or name == "train.batch_size"
                    chosen[name] = values[-1 if largest else place]
                try:
                    config = space.configuration(chosen, 1)
                except ConfigError:  # such ends cannot be drawn together
                    continue
                found.setdefault(replace(config, seed=0).config_hash, config)
    return list(found.values())


def _sorted(values: Sequence[Any]) -> Sequence[Any]:
    numbers = all(isinstance(v, int | float) for v in values)
    return sorted(values) if numbers else values


def profile(
    space: Space, trust_code: bool, available: Mapping[str, float], nodes: Sequence[Mapping[str, float]] = ()
) -> Profile:
    """A profile from a whole GPU of the Ray that is joined, before anything else of the study runs there.

    Raises UserError where trials would not even fit by fours, or no GPU came free in time, and whatever a step raises.
    """
    plan(packed(space, MOST), available, nodes)  # or the task below would wait for what is not there
    task = ray.remote(num_cpus=space.resources.cpus_per_worker, num_gpus=1, max_retries=0)(measured)
    reference = task.remote(dearest(space), space.data, trust_code)
    try:
        found: Profile = ray.get(reference, timeout=PROFILE_SECONDS)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(reference, force=True)
        raise UserError(f"not done after {PROFILE_SECONDS:g} s") from None
    return found


def measured(configs: Sequence[RunConfig], data: DataConfig, trust_code: bool) -> Profile:
    """Profile steps of every stage, and evaluations, in this process. UserError where torch sees no GPU."""
    if not torch.cuda.is_available():
        raise UserError("torch sees no GPU where a trial would train")
    splits = load(data, ("train", "selection"))
    peak = held = 0
    for config in configs:
        torch.cuda.reset_peak_memory_stats()
        costs = measure([("step", config)], splits, repeats=1, steps=1, device="cuda", trust_code=trust_code)
        held = max(held, torch.cuda.max_memory_reserved())
        run = start(config, splits, None, None, Alone(), trust_code, "cuda")
        proxy_accuracies(run.graph, run.kept(), *run.selection, config.threat, Alone())
        peak = max(peak, torch.cuda.max_memory_allocated(), *(step.peak_bytes or 0 for step in costs.steps))
        held = max(held, torch.cuda.max_memory_reserved())
        del run
        gc.collect()
        torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    context = max(total - free - torch.cuda.memory_reserved(), 0)
    return Profile(torch.cuda.get_device_name(), peak, held, context, total)
