"""What a training step costs, in plain forward passes: the unit in which methods are compared across machines.

F is the fastest plain forward of the same network and batch. A step's *ideal* counts its passes (``passes``);
efficiency = ideal x F / step.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cactus_ray.bounds.exact import exact_arithmetic
from cactus_ray.bounds.graph import Params, forward
from cactus_ray.config import RunConfig
from cactus_ray.data import DataSet
from cactus_ray.training.layout import channels_last
from cactus_ray.training.loop import update
from cactus_ray.training.passes import FULL, Phase, ideal_units, phases
from cactus_ray.training.run import Run, start
from cactus_ray.training.schedule import epsilon_at, standard_weight_at
from cactus_ray.training.state import generator_for
from cactus_ray.training.step import Step
from cactus_ray.training.workers import Alone

WARM_UP = 3
LONGEST_PERIOD = 20


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of repeated measurements."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step costs. ``case``: the configuration's name, ``name`` with the phase behind it; ``share``: of all
    steps of a training, those of this phase. ``turns``: seconds per step in each repeat, and ``seconds`` their spread;
    ``forwards``: seconds / F within each repeat.

    ``ideal`` counts the passes, ``efficiency`` = ideal / forwards; both None for a method whose passes are not counted.
    ``peak_bytes``: largest sum of the tensors alive at once within a step, weights and optimiser state included;
    None for compiled passes on a CPU, which show none of them.
    """

    name: str
    case: str
    share: float
    attack_steps: int | None
    turns: tuple[float, ...]
    forwards: Spread
    ideal: float | None
    efficiency: float | None
    peak_bytes: int | None

    @property
    def seconds(self) -> Spread:
        return Spread.of(self.turns)

    def over(self, other: StepCost) -> Spread:
        """How many steps of ``other`` one takes, turn by turn of the same measurement."""
        return Spread.of([mine / theirs for mine, theirs in zip(self.turns, other.turns, strict=True)])


@dataclass(frozen=True, slots=True)
class Costs:
    """``forward_seconds``: F, of the layout named ``layout``; then the steps in the order asked."""

    forward_seconds: Spread
    layout: str
    steps: tuple[StepCost, ...]

    def of_training(self, case: str) -> Spread:
        """Seconds of the mean step of a training, by the shares of its phases; of a measurement of all (``whole``)."""
        mine = [step for step in self.steps if step.case == case]
        return Spread.of([sum(s.share * t for s, t in zip(mine, turn, strict=True))
                          for turn in zip(*(s.turns for s in mine), strict=True)])  # fmt: skip


def measure(
    cases: Sequence[tuple[str, RunConfig]],
    data: DataSet,
    *,
    repeats: int = 9,
    steps: int = 4,
    device: str = "cpu",
    trust_code: bool = False,
    whole: bool = False,
    progress: Callable[[str], object] = lambda text: None,
) -> Costs:
    """Time the steps of all cases in turns, ``repeats`` times ``steps`` steps each, next to a plain forward.

    All cases must share model and batch size; one whose method has stages is measured in each. A step is everything
    that the loop does for a batch: losses, gradients, clipping, optimiser and batch-norm statistics, at the final
    epsilon and standard weight; with ``whole`` also in the warm-up and in the middle of the ramp, and only in phases
    that the training has. ``data`` needs the splits
    train (at least one batch) and selection. The thread count is the caller's. On one CPU thread seconds are the
    processor's, which other work on the machine disturbs less; otherwise the clock's. What is done once in some steps
    (masks that are kept, codebooks) counts with its share: then a turn is as many steps, and their mean.
    """
    with exact_arithmetic(torch.device(device)):
        return _measured(cases, data, repeats, steps, device, trust_code, whole, progress)


def _measured(
    cases: Sequence[tuple[str, RunConfig]], data: DataSet, repeats: int, steps: int, device: str, trust_code: bool,
    whole: bool, progress: Callable[[str], object],
) -> Costs:  # fmt: skip
    benches = [
        _Bench.of(name, config, data, device, phase, trust_code)
        for name, config in cases
        for phase in phases(config)
        if (phase.epochs > 0.0 if whole else phase.part == FULL)
    ]
    layouts = _layouts(benches[0].run)
    for bench in benches:
        progress(f"warming up {bench.title}")
        for _ in range(WARM_UP):
            bench.step()
        if device.startswith("cuda") or bench.run.config.train.compile is None:
            bench.peak = _peak_bytes(bench.step, device)
    trials = {name: _timed(call, 10 * steps, device) for name, call in layouts.items()}
    layout = min(trials, key=lambda name: trials[name])
    for turn in range(repeats):
        progress(f"turn {turn + 1} of {repeats}")
        for bench in benches:
            # next to its own plain forward, so that what else the machine does slows down both
            bench.forwards.append(_timed(layouts[layout], 4 * steps, device))
            bench.times.append(_timed(bench.step, steps, device, period=_period(bench.run.config, bench.phase)))
    plain = Spread.of([f for bench in benches for f in bench.forwards])
    return Costs(plain, layout, tuple(bench.cost() for bench in benches))


@dataclass(slots=True)
class _Bench:
    """One case between its steps."""

    name: str
    phase: Phase
    run: Run
    noise: torch.Generator
    draws: torch.Generator
    latent: torch.Generator
    memory: dict[str, Any] = field(default_factory=dict)
    seen: Tensor = field(default_factory=lambda: torch.empty(2))
    index: int = 0
    times: list[float] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)
    peak: int | None = None

    @staticmethod
    def of(name: str, config: RunConfig, data: DataSet, device: str, phase: Phase, trust_code: bool) -> _Bench:
        run = start(config, data, None, None, Alone(), trust_code, device)
        for _ in range(phase.number):
            run.enter_next_stage()
        noise = generator_for(config.seed, 0, "attack", device)
        latent = generator_for(config.seed, 0, "latent attack", device)
        bench = _Bench(name, phase, run, noise, generator_for(config.seed, 0, "members"), latent)
        bench.seen = torch.empty(2, device=device)
        return bench

    def step(self) -> None:
        run, config = self.run, self.run.config
        size = run.batch_size
        noise = torch.rand((size, *run.graph.input_shape), generator=self.noise, device=run.images.device)
        ramped, final = self.phase.fraction, 1.0 if config.standard_weight is None else config.standard_weight
        step = Step(
            config, run.graph, run.network(), run.images[:size], run.labels[:size], noise=noise,
            epsilon=epsilon_at(ramped, config.train, config.training_epsilon),
            standard_weight=standard_weight_at(ramped, config.train, final), progress=min(ramped, 0.999),
            index=self.index, generator=self.draws, memory=self.memory, workers=run.workers,
            latent_generator=self.latent, stage=run.stage.name, auxiliary=run.auxiliary,
            passes=run.passes,
        )  # fmt: skip
        update(run, step, config.learning_rate, self.seen)
        self.index += 1

    @property
    def title(self) -> str:
        return " ".join(part for part in (self.name, self.phase.stage, self.phase.part) if part)

    def cost(self) -> StepCost:
        ratios = Spread.of([mine / plain for mine, plain in zip(self.times, self.forwards, strict=True)])
        config, graph, params = self.run.config, self.run.graph, self.run.params
        ideal = ideal_units(config, graph, params, self.phase)
        return StepCost(
            self.title, self.name, self.phase.epochs / config.train.epochs, config.attack_steps, tuple(self.times),
            ratios, ideal, None if ideal is None else ideal / ratios.median, self.peak,
        )  # fmt: skip


def _layouts(run: Run) -> dict[str, Callable[[], None]]:
    """The plain forward in inference mode, in every memory layout."""

    plain = {name: tensor.detach() for name, tensor in run.params.items()}
    images = run.images[: run.batch_size]

    def laid(params: Params, layout: torch.memory_format) -> Callable[[], None]:
        seen = images.contiguous(memory_format=layout)

        def call() -> None:
            with torch.inference_mode():
                forward(run.graph, params, seen, in_place=True)

        return call

    found = {"contiguous": laid(plain, torch.contiguous_format)}
    if len(run.graph.input_shape) == 3:
        found["channels_last"] = laid(channels_last(plain), torch.channels_last)
    return found


def _period(config: RunConfig, phase: Phase) -> int:
    """After how many steps of a phase the same work comes round again; 1 also where it hardly ever does."""
    period = 1
    if config.compression_set is not None:
        period = config.compression_set.refresh_every
    elif config.admm_every is not None and phase.stage == "quantised":
        period = config.admm_every
    return period if period <= LONGEST_PERIOD else 1


def _timed(call: Callable[[], None], times: int, device: str, *, period: int = 1) -> float:
    """Median seconds of a call: a scheduler's hiccup within a turn must not count. The mean of whole periods, where
    the calls of one are unlike: their dear ones must count.
    """
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds = []
    for _ in range(-(-times // period) * period):
        _synchronise(device)
        begin = clock()
        call()
        _synchronise(device)
        seconds.append(clock() - begin)
    return statistics.median(seconds) if period == 1 else statistics.fmean(seconds)


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _peak_bytes(step: Callable[[], None], device: str) -> int:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return int(torch.cuda.max_memory_allocated(device))
    alive = _Alive()
    with alive:
        step()
    return alive.peak


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the storages that operators returned and that are still referenced, and those that they read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size
