"""``cactus-ray search --dry-run``: what a study would cost, from one step of every method, before it is launched."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import rich.box
import torch
from rich.console import Console
from rich.table import Table

from cactus_ray.cluster.connect import connected, node_shapes
from cactus_ray.cluster.driver import DriverOptions
from cactus_ray.cluster.packing import Packing, dearest, decided, measured, packed, profile
from cactus_ray.cluster.resources import Plan, plan
from cactus_ray.cluster.verifier import ChunkFailure, Verifier, VerifierContext
from cactus_ray.config import RunConfig
from cactus_ray.data import DataSet, load, subset
from cactus_ray.errors import UserError
from cactus_ray.models.network import Network, pack
from cactus_ray.report.figures import duration_text, size_text
from cactus_ray.report.tables import packing_text
from cactus_ray.search.chunks import CHEAP, DEAR_BOUNDS, Chunk
from cactus_ray.search.sampler import OptunaSampler
from cactus_ray.search.space import Space, parse_space
from cactus_ray.training.bench import Spread, measure
from cactus_ray.training.evaluate import proxy_accuracies
from cactus_ray.training.run import start
from cactus_ray.training.workers import Alone

DRAWS, TURNS, STEPS = 3, 3, 2
FEW, ENOUGH_SECONDS = 8, 20.0
"""Samples that are verified first; a whole task of a verifier only if by these it takes no longer than this."""
START_SECONDS, TRIAL_SECONDS = 8.0, {"direct": 0.5, "train": 8.0}
"""Of Ray and the first actors, and between trials: two quiet cores, as ``bench_estimate.py`` and a first use found."""
ROW_BYTES, EPOCH_BYTES, EVENT_BYTES, PAGE_BYTES = 64, 320, 2_000, 5_000_000
"""Bytes of a verdict's row, of an epoch's line and of a trial's other lines in ``trials.jsonl``; of ``report.html``."""
ON_FRONT = 20
"""Networks that are taken to be on the front at once; the others are not kept."""
STATE_NETWORKS = 5
"""Networks that a state takes; a trial in flight has two of them while one replaces the other."""

EARLY = (
    "the study's time is an upper end: every trial is counted as trained to its last epoch, and search.scheduler may "
    "end many of them earlier"
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds and bytes. ``training``: of one trial, by method; ``verification``: of one trial by one verifier, as an
    untrained network takes and without dear bounds; ``study``: of all trials at the planned concurrency.
    ``upper_end``: all are counted as trained to their last epoch, though the space has a scheduler that ends trials
    early."""

    trials: int
    training: dict[str, Spread]
    verification: float
    dear: bool
    at_once: int
    verifiers: int
    study: Spread
    disk_bytes: int
    free_bytes: int
    packing: Packing | None
    seeds: int = 1
    upper_end: bool = False


def estimate(space: Space, data: DataSet, untrained: Network, run: Path, driver: DriverOptions) -> Estimate:
    """Profile the space on this machine. UserError where not even one trial fits the cluster."""
    shares, packing = _shares(space, driver)
    torch.set_num_threads(space.resources.threads)
    training = {method: _training(configs, data, space, driver.trust_code) for method, configs in _drawn(space).items()}
    verification = _verification(space, untrained)
    trials = min(space.search.trials, space.search.max_trials or space.search.trials)
    return Estimate(
        trials, training, verification, space.verification.bound in DEAR_BOUNDS, shares.training, shares.verifiers,
        _study(list(training.values()), verification, trials, shares),
        disk_bytes(space, data, untrained), free_bytes(run), packing, space.search.seeds,
        space.search.scheduler.name != "none",
    )  # fmt: skip


def disk_bytes(space: Space, data: DataSet, untrained: Network) -> int:
    """About how much a run of the space writes: networks (the chosen one and the other of last and best), states
    of trials under way and, as far as any, of all that wait to be promoted, records, tables and the page."""
    samples = len(data.labels["selection"])
    if isinstance(space.samples, int):
        samples = min(samples, space.samples)
    lines = samples * len(space.levels) * ROW_BYTES + EVENT_BYTES
    lines += EPOCH_BYTES * int(space.base["train"]["epochs"])
    kept = space.search.trials if space.search.keep == "all" else min(space.search.trials, ON_FRONT)
    waits = space.search.scheduler.name != "none" and space.search.scheduler.promote
    states = 2 * (space.search.concurrency or 1) + (space.search.trials if waits else 0)
    networks = 2 * kept + STATE_NETWORKS * states
    again = space.search.seeds * min(space.search.trials, ON_FRONT)  # replicates, and front points on fresh samples
    return (space.search.trials + again) * lines + networks * len(pack(untrained)) + PAGE_BYTES


def free_bytes(run: Path) -> int:
    """Free bytes where the run's folder is or will be."""
    existing = next(folder for folder in (run.absolute(), *run.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def refuse_full_disk(space: Space, data: DataSet, untrained: Network, run: Path) -> None:
    """UserError, with the numbers, where the run would not fit on the disk."""
    wanted, free = disk_bytes(space, data, untrained), free_bytes(run)
    if wanted > free:
        raise UserError(
            f"{run}: a study of {space.search.trials} trials writes about {size_text(wanted)}B, and "
            f"{size_text(free)}B are free; choose another --runs, fewer trials, levels or samples, or "
            "search.keep: front"
        )


def print_estimate(console: Console, found: Estimate, *, as_json: bool) -> None:
    """Print the estimate with its spread, and what is not in it."""
    if as_json:
        console.print_json(json.dumps(asdict(found)))
        return
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("method", "training of a trial", "from", "to"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for method, spread in found.training.items():
        table.add_row(method, *(duration_text(s) for s in (spread.median, spread.low, spread.high)))
    console.print(table)
    study = found.study
    if found.packing is not None:
        text = packing_text({"event": "packing", **found.packing.to_dict()})
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    dear = "; alpha and branch come on top" if found.dear else ""
    more = f"; search.seeds: up to {found.seeds - 1} more trainings of every front member on top"
    for line in (
        f"verification of a trial: about {duration_text(found.verification)} of a verifier (as an untrained network "
        f"takes{dear})",
        f"study: {found.trials} trials, {found.at_once} training at once beside {found.verifiers} verifier(s): about "
        f"{duration_text(study.median)} ({duration_text(study.low)} to {duration_text(study.high)})"
        + (more if found.seeds > 1 else ""),
        *([EARLY] if found.upper_end else []),
        f"disk: about {size_text(found.disk_bytes)}B of {size_text(found.free_bytes)}B free",
        f"from {DRAWS} drawn configurations per method, {TURNS * STEPS} steps each of every stage, the warm-up and the "
        "ramp, by their shares of the epochs; as if trials and verifiers did not slow each other down",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


# --- what is measured ----------------------------------------------------------------------------------------------


def _shares(space: Space, driver: DriverOptions) -> tuple[Plan, Packing | None]:
    if driver.address is not None:
        with connected(driver.address) as available:
            nodes = list(node_shapes().values())
            packing = decided(space, None, lambda: profile(space, driver.trust_code, available, nodes))
            return plan(_packed(space, packing), available, nodes), packing
    packing = decided(space, None, lambda: measured(dearest(space), space.data, driver.trust_code))
    available = {"CPU": float(max(os.cpu_count() or 1, 2)), "GPU": float(torch.cuda.device_count())}
    return plan(_packed(space, packing), available), packing


def _packed(space: Space, packing: Packing | None) -> Space:
    return space if packing is None else packed(space, packing.per_gpu)


def _drawn(space: Space) -> dict[str, list[RunConfig]]:
    """Some configurations of every method that can be drawn, from the whole of the space."""
    choice = next((p for p in space.parameters if p.name == "method"), None)
    methods = choice.domain.ends() if choice else [space.base.get("method", "cactus")]
    found = {}
    for method in methods:
        mine = parse_space(space.to_dict(), overrides={"method": method} if choice else {})
        mine = replace(mine, points=(), search=replace(mine.search, sampler="random"))
        sampler = OptunaSampler(mine)
        drawn = [sampler.ask() for _ in range(DRAWS if mine.parameters else 1)]
        found[str(method)] = [mine.configuration(s.values, s.number) for s in drawn if s is not None]
    return found


def _training(configs: Sequence[RunConfig], data: DataSet, space: Space, trust_code: bool) -> Spread:
    """Seconds of a trial: the steps of all its phases by their shares, and the scores after each epoch."""
    r = space.resources
    device = "cuda" if r.gpus_per_worker > 0 and torch.cuda.is_available() else "cpu"
    seconds: list[Spread] = []
    for config in configs:
        costs = measure(
            [("step", config)], data, repeats=TURNS, steps=STEPS, device=device, trust_code=trust_code, whole=True
        )
        step = costs.of_training("step")
        run = start(config, data, None, None, Alone(), trust_code, device)
        begin = time.perf_counter()
        proxy_accuracies(run.graph, run.kept(), *run.selection, config.threat, Alone())
        score = time.perf_counter() - begin
        steps, epochs = run.steps_per_epoch / r.workers, config.train.epochs
        times = [epochs * (steps * s + score) for s in (step.median, step.low, step.high)]
        seconds.append(Spread(*times))
    medians = Spread.of([s.median for s in seconds])
    return Spread(medians.median, min(s.low for s in seconds), max(s.high for s in seconds))


def _verification(space: Space, untrained: Network) -> float:
    """Seconds of a verifier for the cheap stage of a trial, all levels, from a few samples of an untrained network."""
    indices = subset(len(load(space.data, ("selection",)).labels["selection"]), None).tolist()
    wanted = len(indices) if not isinstance(space.samples, int) else min(space.samples, len(indices))
    on_gpu = space.resources.verifier_gpus > 0
    verifier = Verifier(VerifierContext(space.data, space.threat, space.verification, space.resources.threads, on_gpu))
    network = pack(untrained)

    def seconds(size: int) -> float:
        chosen = tuple(indices[:: max(len(indices) // size, 1)][:size])
        found = verifier.verify(Chunk("dry", "dry", CHEAP, tuple(space.levels), chosen), network)
        if isinstance(found, ChunkFailure):
            raise UserError(f"the dry run could not verify an untrained network: {found.error}")
        made = found.ledger.get("overhead", 0.0)  # the levels' networks are made once per trial
        return made + (found.seconds - made) * wanted / len(chosen)

    few = seconds(min(FEW, wanted))
    task = min(space.resources.cheap_samples, wanted)  # samples of a task share their passes: a few are dearer each
    return seconds(task) if few * task / wanted <= ENOUGH_SECONDS else few


def _study(training: Sequence[Spread], verification: float, trials: int, shares: Plan) -> Spread:
    """Seconds of a study that draws every method alike: trials train and are verified side by side."""

    def total(train: float) -> float:
        train += TRIAL_SECONDS[shares.execution]
        rounds = max(trials / shares.training, 1.0)
        checks = max(trials / shares.verifiers, 1.0)
        return START_SECONDS + max(rounds * train + verification, train + checks * verification)

    return Spread(
        total(sum(s.median for s in training) / len(training)),
        total(min(s.low for s in training)),
        total(max(s.high for s in training)),
    )
