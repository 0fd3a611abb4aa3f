"""What a training step costs, in plain forward passes: the unit in which methods are compared across machines.

F is the fastest plain forward of the same network and batch. A step's *ideal* counts its passes (a forward, a backward
to the input and one to the weights cost F each; an interval pass twice that); efficiency = ideal x F / step.
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

from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.compression.sets import members
from cactus_ray.config import RunConfig
from cactus_ray.data import DataSet
from cactus_ray.training.layout import channels_last
from cactus_ray.training.loop import update
from cactus_ray.training.losses import ATTACKED, EXPRESSIVE, TAIL_ATTACKED, UNBOUNDED
from cactus_ray.training.methods import STAGES
from cactus_ray.training.run import Run, start
from cactus_ray.training.stages import WHOLE
from cactus_ray.training.state import generator_for
from cactus_ray.training.step import Step
from cactus_ray.training.workers import Alone

WARM_UP = 3
_BOX, _CLEAN, _POINT, _BACKWARD_BOUND, _ATTACK_STEP = 6.0, 3.0, 3.0, 3.0, 2.0


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
    """What one configuration's step costs. ``turns``: seconds per step in each repeat, and ``seconds`` their spread;
    ``forwards``: seconds / F within each repeat.

    ``ideal`` counts the passes, ``efficiency`` = ideal / forwards; both None for a method whose passes are not counted.
    ``peak_bytes``: largest sum of the tensors alive at once within a step, weights and optimiser state included;
    None for compiled passes on a CPU, which show none of them.
    """

    name: str
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


def ideal_units(config: RunConfig, graph: Graph) -> float | None:
    """The passes of a step in F: 9 + 2k for SABR with k attack steps, 18 + 2k for a pair with a shared attack.

    A member that sees a share of the batch counts as that share. None where a method's passes have no simple count:
    those of taps and staps depend on the size of the tail and on the number of classes.
    """
    loss = config.loss
    if loss in TAIL_ATTACKED:
        return None
    if loss == "standard":
        return _CLEAN
    normalised = any(node.op == "batch_norm" for node in graph.nodes)
    clean = _CLEAN if config.standard_weight or (normalised and loss not in EXPRESSIVE) else 0.0
    attack = _ATTACK_STEP * (config.attack_steps or 0) if loss in ATTACKED else 0.0
    if normalised and clean == 0.0:
        attack += 1.0  # the full network's clean forward, for its running statistics
    one = clean + (0.0 if loss in UNBOUNDED else _BOX)
    if loss in EXPRESSIVE or loss in UNBOUNDED:
        one += _POINT
    if config.crown_weight:
        one += _BACKWARD_BOUND
    if config.awp_gamma:
        one *= 2.0  # the same once more at the perturbed weights
    if config.method == "nrsloss" and loss in UNBOUNDED:
        one += _BOX
    chosen = config.compression_set
    if chosen is None:
        return attack + one
    drawn = members(chosen) - 1
    eta, steps = config.awp_radius or 0.0, config.awp_steps or 1
    beside = float(drawn)
    if eta > 0.0:
        separate = config.awp_member == "separate" or drawn == 0
        # one step of a copy of the full network is free: its gradient is there already
        beside += (1 + (steps if steps > 1 else 0)) if separate else drawn * steps
    return attack + one * (1.0 + chosen.member_fraction * beside)


def measure(
    cases: Sequence[tuple[str, RunConfig]],
    data: DataSet,
    *,
    repeats: int = 9,
    steps: int = 4,
    device: str = "cpu",
    trust_code: bool = False,
    progress: Callable[[str], object] = lambda text: None,
) -> Costs:
    """Time the steps of all cases in turns, ``repeats`` times ``steps`` steps each, next to a plain forward.

    All cases must share model and batch size; one whose method has stages is measured in each. A step is everything
    that the loop does for a batch: losses, gradients, clipping, optimiser and batch-norm statistics, at the final
    epsilon and standard weight. ``data`` needs the splits
    train (at least one batch) and selection. The thread count is the caller's. On one CPU thread seconds are the
    processor's, which other work on the machine disturbs less; otherwise the clock's.
    """
    benches = [
        _Bench.of(name, config, data, device, number, trust_code)
        for name, config in cases
        for number in range(len(STAGES.get(config.method, WHOLE)))
    ]
    layouts = _layouts(benches[0].run)
    for bench in benches:
        progress(f"warming up {bench.name}")
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
            bench.times.append(_timed(bench.step, steps, device))
    plain = Spread.of([f for bench in benches for f in bench.forwards])
    return Costs(plain, layout, tuple(bench.cost() for bench in benches))


@dataclass(slots=True)
class _Bench:
    """One case between its steps."""

    name: str
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
    def of(name: str, config: RunConfig, data: DataSet, device: str, stage: int, trust_code: bool) -> _Bench:
        run = start(config, data, None, None, Alone(), trust_code, device)
        for _ in range(stage):
            run.enter_next_stage()
        name = f"{name} {run.stage.name}".rstrip()
        noise = generator_for(config.seed, 0, "attack", device)
        latent = generator_for(config.seed, 0, "latent attack", device)
        bench = _Bench(name, run, noise, generator_for(config.seed, 0, "members"), latent)
        bench.seen = torch.empty(2, device=device)
        return bench

    def step(self) -> None:
        run, config = self.run, self.run.config
        size = run.batch_size
        noise = torch.rand((size, *run.graph.input_shape), generator=self.noise, device=run.images.device)
        weight = config.standard_weight
        step = Step(
            config, run.graph, run.network(), run.images[:size], run.labels[:size], noise=noise,
            epsilon=config.training_epsilon, standard_weight=1.0 if weight is None else weight, progress=0.999,
            index=self.index, generator=self.draws, memory=self.memory, workers=run.workers,
            latent_generator=self.latent, stage=run.stage.name, auxiliary=run.auxiliary,
            passes=run.passes,
        )  # fmt: skip
        update(run, step, config.learning_rate, self.seen)
        self.index += 1

    def cost(self) -> StepCost:
        ratios = Spread.of([mine / plain for mine, plain in zip(self.times, self.forwards, strict=True)])
        config = self.run.config
        ideal = ideal_units(config, self.run.graph)
        efficiency = None if ideal is None else ideal / ratios.median
        return StepCost(self.name, config.attack_steps, tuple(self.times), ratios, ideal, efficiency, self.peak)


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


def _timed(call: Callable[[], None], times: int, device: str) -> float:
    """Median seconds of a call: a scheduler's hiccup within a turn must not count."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds = []
    for _ in range(times):
        _synchronise(device)
        begin = clock()
        call()
        _synchronise(device)
        seconds.append(clock() - begin)
    return statistics.median(seconds)


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
