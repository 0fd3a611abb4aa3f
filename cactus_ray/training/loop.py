"""The training loop that all methods, models and ways of running share."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cactus_ray.bounds.exact import exact_arithmetic
from cactus_ray.bounds.graph import Params, Statistics
from cactus_ray.compression.levels import parse_level
from cactus_ray.config import RunConfig
from cactus_ray.data import DataSet, calibration
from cactus_ray.models.network import Network
from cactus_ray.training import augment
from cactus_ray.training.average import include
from cactus_ray.training.evaluate import level_scores, proxy_accuracies
from cactus_ray.training.losses import ATTACKED
from cactus_ray.training.methods import METHODS
from cactus_ray.training.run import Run, network, save, start
from cactus_ray.training.schedule import epsilon_at, learning_rate_at, standard_weight_at
from cactus_ray.training.state import generator_for
from cactus_ray.training.step import Step
from cactus_ray.training.workers import Alone, Workers


class NonFiniteLossError(Exception):
    """The loss or its gradient is NaN or infinite. ``step`` and ``epoch`` count from 1 over the whole run."""

    def __init__(self, step: int, epoch: int, what: str) -> None:
        self.step, self.epoch, self.what = step, epoch, what
        super().__init__(f"the {what} is not finite at step {step} (epoch {epoch})")

    def __reduce__(self) -> tuple[type[NonFiniteLossError], tuple[int, int, str]]:
        return type(self), (self.step, self.epoch, self.what)


@dataclass(frozen=True, slots=True)
class EpochReport:
    """What the caller learns after every epoch. ``epoch`` counts from 1.

    ``metrics``: loss (mean over the epoch), standard_accuracy and ibp_certified_accuracy (of the full network, on at
    most ``train.proxy_samples`` selection images), epsilon, standard_weight, learning_rate (of the last step), seconds.
    ``save()`` gives the whole training state as bytes; ``score(levels)`` standard_accuracy@LEVEL,
    ibp_certified_accuracy@LEVEL (on the same images) and ideal_bits@LEVEL of the networks that would be deployed at
    these levels, and adds its time to ``seconds``. Call them before returning, ``score`` on every worker and before
    ``save``.
    """

    epoch: int
    epochs: int
    metrics: dict[str, float]
    save: Callable[[], bytes]
    score: Callable[[Sequence[str]], dict[str, float]]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """``network`` is ``last`` or ``best``, as ``train.keep`` says; ``seconds`` and ``history`` include resumed epochs.

    ``best`` is the epoch of highest (IBP-certified, standard) accuracy among those of the last stage that end after the
    ramp, and ``last`` where there is none.
    """

    network: Network
    last: Network
    best: Network
    epochs: int
    seconds: float
    history: list[dict[str, float]]
    stopped: bool


def train(
    config: RunConfig,
    data: DataSet,
    *,
    report: Callable[[EpochReport], bool],
    state: bytes | None = None,
    init: Network | None = None,
    workers: Workers | None = None,
    trust_code: bool = False,
    device: str = "cpu",
) -> TrainResult:
    """Train one network; ``data`` needs the splits train and selection.

    ``report`` is called after every epoch, on every worker; False ends the run early (``stopped``) on all of them.
    ``state``: bytes of ``EpochReport.save`` of the same configuration; the result is bit by bit that of a run which was
    never stopped. ``init``: a network to start from. ``workers``: every worker calls this with the same arguments.

    Deterministic for one machine type, thread count and number of workers. Raises NonFiniteLossError at the end of the
    epoch in which it happens, before anything of it is reported; UserError for a state or ``init`` that does not fit;
    ConfigError for a batch that cannot be split over the workers.
    """
    with exact_arithmetic(torch.device(device)):  # the attack may ask for shorter products
        run = start(config, data, state, init, workers or Alone(), trust_code, device)
        stopped = False
        while run.epoch < config.train.epochs and not stopped:
            metrics = _epoch(run)
            score = functools.partial(_score, run, data, metrics)
            go_on = report(EpochReport(run.epoch, config.train.epochs, metrics, lambda: save(run), score))
            stopped = _any_stops(run, not go_on)
        last = network(run, run.kept())
    best = network(run, run.best) if run.best is not None else last
    seconds = math.fsum(m["seconds"] for m in run.history)
    return TrainResult(
        best if config.train.keep == "best" else last, last, best, run.epoch, seconds, run.history, stopped
    )


def _score(run: Run, data: DataSet, metrics: dict[str, float], levels: Sequence[str]) -> dict[str, float]:
    """What ``EpochReport.score`` promises; its time is a cost of the epoch with these ``metrics``."""
    started, kept = time.perf_counter(), run.kept()
    found: dict[str, float] = {}
    for level in levels:
        images = calibration(data) if parse_level(level).needs_calibration else None
        standard, certified, bits = level_scores(
            run.graph, kept, level, run.selection, run.config.threat, workers=run.workers, calibration=images
        )
        found |= {f"standard_accuracy@{level}": standard, f"ibp_certified_accuracy@{level}": certified}
        found[f"ideal_bits@{level}"] = bits
    metrics["seconds"] += time.perf_counter() - started
    return found


def _epoch(run: Run) -> dict[str, float]:
    """One pass over the training split, or over a part of it; returns, and appends to the history, its metrics."""
    started = time.perf_counter()
    while run.epoch >= run.spans[run.number].end:
        run.enter_next_stage()
    config, batch, steps, span = run.config, run.batch_size, run.steps_per_epoch, run.spans[run.number]
    device = run.device
    permutation = torch.randperm(len(run.labels), generator=generator_for(config.seed, run.epoch, "order"))
    permutation = permutation.to(run.images.device)
    draws = generator_for(config.seed, run.epoch, "members")
    noise = generator_for(config.seed, run.epoch, "attack", str(device))
    moves = generator_for(config.seed, run.epoch, "augmentation", str(device))
    latent = generator_for(config.seed, run.epoch, f"latent attack {run.workers.rank}", str(device))
    memory: dict[str, Any] = {}
    final_weight = 1.0 if config.standard_weight is None else config.standard_weight
    seen = torch.empty(steps, 2, device=device)  # loss and gradient norm of every step, read once at the end
    share = batch // run.workers.size
    mine = slice(run.workers.rank * share, (run.workers.rank + 1) * share)
    for index in range(steps):
        fraction = ((run.epoch - span.first) * steps + index) / ((span.end - span.first) * steps)
        ramped = fraction if run.number == 0 else 1.0  # full epsilon after the first stage
        chosen = permutation[index * batch : (index + 1) * batch][mine]
        images, labels = run.batch(chosen)
        images = augment.augment(images, augment.draw(config.train, batch, moves)[mine], config.train)
        weight = standard_weight_at(ramped, config.train, final_weight)
        step = Step(
            config, run.graph, run.network(), images, labels,
            noise=_noise(run, weight, noise)[mine], epsilon=epsilon_at(ramped, config.train, config.training_epsilon),
            standard_weight=weight, progress=fraction, index=index, generator=draws, memory=memory,
            workers=run.workers, latent_generator=latent, stage=run.stage.name, auxiliary=run.auxiliary,
            passes=run.passes,
        )  # fmt: skip
        rate = learning_rate_at(fraction, config.train, config.learning_rate)
        update(run, step, rate, seen[index])
    run.workers.mean_([v for k, v in run.params.items() if k.rsplit(".", 1)[-1].startswith("running_")] + [seen])
    _check_finite(run, seen)
    run.epoch += 1
    if config.train.average == "swa":
        _average(run, (run.epoch - span.first) / (span.end - span.first))
    kept = run.kept()
    accuracies = proxy_accuracies(run.graph, kept, *run.selection, config.threat, run.workers)
    metrics = {
        "loss": float(seen[:, 0].mean()), "standard_accuracy": accuracies[0], "ibp_certified_accuracy": accuracies[1],
        "epsilon": step.epsilon, "standard_weight": step.standard_weight, "learning_rate": rate,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    _keep_best(run, kept, (accuracies[1], accuracies[0]))
    run.history.append(metrics)
    return metrics


def _noise(run: Run, standard_weight: float, generator: torch.Generator) -> Tensor:
    """Where the attack starts: of the whole batch, so that the split over workers does not change it."""
    config = run.config
    attacked = config.loss in ATTACKED and standard_weight < 1.0
    shape = (run.batch_size if attacked else 0, *run.graph.input_shape)
    return torch.rand(shape, generator=generator, device=run.device)


def update(run: Run, step: Step, learning_rate: float, seen: Tensor) -> None:
    """Gradient of the step's loss, clipped, and one move of the optimiser. Writes loss and norm into ``seen`` [2]."""
    train = run.config.train
    leaves = run.leaves()
    run.clear_gradients()
    step.passes.begin()
    total = torch.zeros((), device=seen.device)
    for loss in METHODS[run.config.method](step):
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    weights = [leaves[name] for n in run.graph.weighted() if (name := f"{n.name}.weight") in leaves]
    if train.l1 > 0.0 and weights:
        penalty = train.l1 * torch.stack([w.abs().sum() for w in weights]).sum()
        penalty.backward()  # type: ignore[no-untyped-call]
        total += penalty.detach()
    run.workers.mean_([v.grad for v in leaves.values() if v.grad is not None])
    norm = nn.utils.clip_grad_norm_(leaves.values(), train.clip_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    run.optimizer.step()
    if run.stage.after is not None:
        with torch.no_grad():
            run.stage.after(step)
    _update_running(run, step.statistics, len(step.labels))
    _update_running(run, step.adversarial_statistics, len(step.labels))
    if train.average == "ema":
        _average(run, step.progress)
    torch.stack([total, norm], out=seen)


def _average(run: Run, done: float) -> None:
    """The current leaves into the average, once the last stage's share ``done`` reaches ``train.average_from``."""
    start = run.config.train.average_from
    if run.in_last_stage and start is not None and done >= start:
        run.averages = include(run.average, run.averages, run.leaves(), run.config.train.average_decay)


def _update_running(run: Run, statistics: Statistics, samples: int) -> None:
    """Running statistics move towards those of a batch of the full network; variance unbiased, as torch does it."""
    with torch.no_grad():
        for name, (mean, var) in statistics.items():
            momentum, count = run.graph[name]["momentum"], samples * run.sites[name]
            run.params[f"{name}.running_mean"].lerp_(mean, momentum)
            run.params[f"{name}.running_var"].lerp_(var * (count / max(count - 1, 1)), momentum)


def _check_finite(run: Run, seen: Tensor) -> None:
    finite = seen.isfinite()
    bad = (~finite.all(1)).nonzero()
    if len(bad):
        first = int(bad[0])
        what = "gradient" if bool(finite[first, 0]) else "loss"
        raise NonFiniteLossError(run.epoch * run.steps_per_epoch + first + 1, run.epoch + 1, what)


def _keep_best(run: Run, params: Params, score: tuple[float, float]) -> None:
    train = run.config.train
    ramping = run.number == 0 and run.epoch / run.spans[0].end < min(1.0, train.warmup + train.ramp)
    if ramping or not run.in_last_stage:
        return  # at a smaller epsilon, or not yet compressed, accuracies are higher for a wrong reason
    if run.best_score is None or score > run.best_score:
        run.best_score = score
        run.best = {k: v.detach().clone() for k, v in params.items()}


def _any_stops(run: Run, stop: bool) -> bool:
    """Whether any worker wants to stop: all must leave the loop together."""
    if run.workers.size == 1:
        return stop
    votes = torch.tensor([float(stop)], device=run.device)
    run.workers.mean_([votes])
    return bool(votes > 0)
