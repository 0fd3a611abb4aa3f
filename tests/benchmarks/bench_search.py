"""What a search costs until it has found what random search over whole trials finds, on recorded learning curves.

    .venv/bin/python tests/benchmarks/bench_search.py tests/benchmarks/curves/digits.jsonl --trials 100 --seeds 10

Replays the curves of ``record_curves.py`` (``cactus_ray.search.simulate``), so a sampler can only get a recorded
configuration: random search any unused one with equal chance, another sampler the nearest unused one to its proposal.
The hypervolume is that of verified points of trials that were trained to the end, over the reference point in the
file's header; the cost is training, of stopped trials too, scoring at rungs and verification. A search may use all that
was recorded; one that never gets as far as random search counts as infinite. ``promoting``: trials that fall behind
wait and may go on later, from where they were. The last lines compare searches with successive halving by one metric,
whichever of these metrics is best.

Sizes at rungs may lie in a file of their own (``NAME.sizes.jsonl``); rungs beyond its epochs see those of its last one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cactus_ray.search.objectives import trial_metrics
from cactus_ray.search.rungs import PROXIES, extreme_levels, sized_level
from cactus_ray.search.settings import SchedulerSettings
from cactus_ray.search.simulate import Curve, Setup, Simulated, simulate
from cactus_ray.search.space import Space, parse_space

COUNTS = ("n_certified", "n_falsified", "n_unknown")
NEARLY = (0.97, 0.98, 0.99, 0.995)
WEIGHTS = (0.25, 0.5, 0.75)
"""Of IBP-certified accuracy in the weighted sums with plain accuracy."""
SIZES = (0.5, 0.9)
"""Of the size saved at the smallest level in its weighted sums with both accuracies."""
FINAL = {"standard_accuracy": "standard_accuracy", "ibp_certified_accuracy": "certified_accuracy"}


@dataclass(frozen=True, slots=True)
class Search:
    """One way to search. ``by``: the metric that rungs compare, all proxies without one."""

    sampler: str = "random"
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    by: str | None = None


def read_curves(file: Path) -> tuple[Space, list[Curve], dict[str, float]]:
    """Space, whole curves and reference point of a recording; configurations that failed are left out."""
    head, *rows = map(json.loads, file.read_text().splitlines())
    space, beside = parse_space(head["space"], str(file)), file.with_suffix(".sizes.jsonl")
    sizes = (
        {row["number"]: row for row in map(json.loads, beside.read_text().splitlines()[1:])} if beside.exists() else {}
    )
    whole = {row["number"]: row for row in rows if "points" in row and (not sizes or row["number"] in sizes)}
    curves = [curve(space, head, row | sizes.get(number, {})) for number, row in sorted(whole.items())]
    return space, curves, head["reference_point"]


def curve(space: Space, head: Mapping[str, Any], row: Mapping[str, Any]) -> Curve:
    """One line as a curve; seconds are of a processor."""
    levels, epochs = space.levels, len(row["train"])
    seconds = tuple(ms / 1000 for ms in row["train"])
    points = tuple(point(level, found, sum(seconds)) for level, found in zip(levels, row["points"], strict=True))
    metrics = [proxies(levels, seen, head["scored"]) for seen in row["seen"]]
    scoring = {level: ms / 1000 / epochs for level, ms in zip(levels, row["proxy"], strict=True)}
    if "sizes" in row:
        whole = 8 * head["reference_point"]["bytes"]
        for epoch, found in enumerate(metrics):
            at = row["sizes"][min(epoch, len(row["sizes"]) - 1)]
            found |= {f"ideal_bits@{level}": float(size[1]) for level, size in zip(levels, at, strict=True)}
            smallest = min(size[1] for size in at) / whole
            found |= {summed(w): w * (1 - smallest) + (1 - w) * found[weighted(0.5)] for w in SIZES}
        for level, ms in zip(levels, row["sizing"], strict=True):
            scoring[level] += ms / 1000 / len(row["sizes"])
    outcome = trial_metrics(points, sum(seconds), space.front, head["reference_point"])
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in row["values"].items()}
    verifying = sum(row["verify"]) / 1000
    return Curve(values, seconds, tuple(metrics), verifying, points, outcome, row["epoch_cost"], scoring)


def point(level: str, found: Sequence[int], seconds: float) -> dict[str, Any]:
    """A row of ``points.csv`` out of right, certified, falsified, unknown, bytes, ideal_bits and macs."""
    right, *counts = found[:4]
    samples = sum(counts)
    return {
        "level": level, "samples": samples, "standard_accuracy": right / samples,
        "certified_accuracy": counts[0] / samples, **dict(zip(COUNTS, counts, strict=True)),
        "bytes": found[4], "ideal_bits": found[5], "macs": found[6],
        "train_seconds": seconds,
    }  # fmt: skip


def proxies(levels: Sequence[str], seen: Sequence[Sequence[int | None]], scored: int) -> dict[str, float]:
    """What rungs may compare after an epoch: both accuracies by level, their means, and weighted sums of the means."""
    shares = [[math.nan if count is None else count / scored for count in level] for level in seen]
    found = {
        f"{name}@{level}": share
        for level, both in zip(levels, shares, strict=True)
        for name, share in zip(PROXIES, both, strict=True)
    }
    means = [statistics.fmean(column) for column in zip(*shares, strict=True)]
    found |= {f"mean_{name}": mean for name, mean in zip(PROXIES, means, strict=True)}
    return found | {weighted(w): w * means[1] + (1 - w) * means[0] for w in WEIGHTS}


def weighted(weight: float) -> str:
    return f"{weight:g} mean IBP-certified + {1 - weight:g} mean plain accuracy"


def summed(weight: float) -> str:
    return f"{weight:g} saved size + {1 - weight:g} mean accuracy"


def single_metrics(space: Space, curves: Sequence[Curve]) -> list[str]:
    """The metrics that plain successive halving is tried with, as far as they were recorded.

    Each proxy, those of the space's objectives at one level, the means, the weighted sums.
    """
    wanted = [f"{name}@{level}" for level in extreme_levels(space.levels) for name in PROXIES]
    for objective in space.objectives:
        kind, at, level = objective.metric.partition("@")
        wanted += [f"{name}@{level}" for name, final in FINAL.items() if at and kind == final]
    wanted += [f"ideal_bits@{level}" for level in [sized_level(space.levels)] if level]
    wanted += [f"mean_{name}" for name in PROXIES] + [weighted(w) for w in WEIGHTS] + [summed(w) for w in SIZES]
    return [name for name in dict.fromkeys(wanted) if all(name in c.metrics[0] for c in curves)]


@dataclass(frozen=True, slots=True)
class Recording:
    """What was recorded, and the space and reference point that it belongs to."""

    space: Space
    curves: Sequence[Curve]
    reference: Mapping[str, float]

    def run(self, search: Search, seed: int, workers: int, trials: int | None = None) -> Simulated:
        """One search for a number of trials, or among all that was recorded."""
        goals = (
            None if search.by is None else {search.by: "minimize" if search.by.startswith("ideal_bits") else "maximize"}
        )
        setup = Setup(
            sampler=search.sampler, scheduler=search.scheduler, workers=workers, trials=trials or len(self.curves),
            seed=seed, goals=goals,
        )  # fmt: skip
        return simulate(self.space, self.curves, self.reference, setup)


def shares(recording: Recording, search: Search, bases: Sequence[Simulated], workers: int) -> list[float]:
    """By seed: the cost of what random search over whole trials finds in the end, over the cost of random search."""
    found = (recording.run(search, seed, workers) for seed in range(len(bases)))
    return [one.cost_of(base.hypervolume) / base.cost for one, base in zip(found, bases, strict=True)]


def promoting(scheduler: SchedulerSettings) -> SchedulerSettings:
    """Trials wait, and at the end those that are left go on, best first, until all are trained."""
    return replace(scheduler, promote=True, rest="promote")


def stopping(scheduler: SchedulerSettings) -> SchedulerSettings:
    """Trials that are not among the best end for good."""
    return replace(scheduler, promote=False, rest="stop")


def searches(scheduler: SchedulerSettings, sampler: str) -> dict[str, Search]:
    """Several metrics at once: with both samplers, stopping and promoting; and whole trials."""
    return {
        f"several metrics, {sampler}, promoting": Search(sampler, promoting(scheduler)),
        f"several metrics, {sampler}, stopping": Search(sampler, stopping(scheduler)),
        "several metrics, random, promoting": Search("random", promoting(scheduler)),
        "several metrics, random, stopping": Search("random", stopping(scheduler)),
        f"whole trials, {sampler}": Search(sampler),
    }


def whole_studies(recording: Recording, scheduler: SchedulerSettings, trials: int, seeds: int) -> Iterator[str]:
    """Studies of so many random trials, waiting (with the rest stopped) and stopping, against all trials trained whole:
    shares of their cost and of their hypervolume, a line each."""
    bases = [recording.run(Search(), seed, 1, trials) for seed in range(seeds)]
    for name, how in (("waiting", replace(scheduler, promote=True)), ("stopping", stopping(scheduler))):
        found = [recording.run(Search("random", how), seed, 1, trials) for seed in range(seeds)]
        costs = [one.cost / base.cost for one, base in zip(found, bases, strict=True)]
        volumes = [one.hypervolume / base.hypervolume for one, base in zip(found, bases, strict=True)]
        whole = statistics.median(len(one.steps) for one in found)
        yield (
            f"{trials:4} trials, {name:8}: {statistics.median(costs):.2f} of the cost, "
            f"{statistics.median(volumes):.3f} of the hypervolume (worst {min(volumes):.3f}), {whole:g} trained whole"
        )


def near(recording: Recording, search: Search, bases: Sequence[Simulated], workers: int) -> Iterator[str]:
    """What nearly all of random search's hypervolume costs, by this search and by random search itself."""
    found = [recording.run(search, seed, workers) for seed in range(len(bases))]
    for share in NEARLY:
        for name, runs in (("waiting, random order", found), ("random search itself", bases)):
            costs = [r.cost_of(share * b.hypervolume) / b.cost for r, b in zip(runs, bases, strict=True)]
            yield line(f"{share:g} of the hypervolume, {name}", costs)


def line(name: str, found: Sequence[float]) -> str:
    each = " ".join(f"{share:5.2f}" if math.isfinite(share) else "never" for share in found)
    median = statistics.median(found)
    return f"{name:52} {median:6.2f} | {each}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path)
    parser.add_argument("--trials", type=int, default=100, help="of random search over whole trials")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--reduction", type=float, default=3.0)
    parser.add_argument("--min-epochs", type=int, default=1)
    parser.add_argument("--ranking", default="hypervolume")
    parser.add_argument("--studies", type=int, nargs="+", help="instead: what studies of so many trials keep")
    asked = parser.parse_args()
    scheduler = SchedulerSettings(
        name="asha", reduction=asked.reduction, min_epochs=asked.min_epochs, ranking=asked.ranking
    )  # fmt: skip
    recording = Recording(*read_curves(asked.curves))
    for trials in asked.studies or ():
        print(*whole_studies(recording, scheduler, trials, asked.seeds), sep="\n", flush=True)
    if asked.studies:
        return
    if asked.trials > len(recording.curves):
        raise SystemExit(f"--trials: got {asked.trials}; expected at most the {len(recording.curves)} recorded ones")
    bases = [recording.run(Search(), seed, asked.workers, asked.trials) for seed in range(asked.seeds)]
    print(
        f"{len(recording.curves)} curves; random search over {asked.trials} whole trials, seeds 0 to {asked.seeds - 1}"
    )
    print("cost in s: " + " ".join(f"{base.cost:.0f}" for base in bases))
    print("hypervolume: " + " ".join(f"{base.hypervolume:.4f}" for base in bases))
    print(f"{'cost of that hypervolume, as a share':52} median | by seed")
    table: dict[str, list[float]] = {}
    for name, search in searches(scheduler, asked.sampler).items():
        table[name] = shares(recording, search, bases, asked.workers)
        print(line(name, table[name]), flush=True)
    print(*near(recording, Search("random", promoting(scheduler)), bases, asked.workers), sep="\n", flush=True)
    metrics = single_metrics(recording.space, recording.curves)
    for metric in metrics:
        for how in (promoting, stopping):
            search = Search("random", how(scheduler), metric)
            name = f"{metric}, {how.__name__}"
            table[name] = shares(recording, search, bases, asked.workers)
            print(line(name, table[name]), flush=True)
    medians = {name: statistics.median(found) for name, found in table.items()}
    best = min((name for name in medians if name.startswith(tuple(metrics))), key=medians.get)
    for name in searches(scheduler, asked.sampler):
        ratio = medians[name] / medians[best]
        print(f"{name}: {medians[name]:.2f} of random search, {ratio:.2f} of the best by one metric ({best})")


if __name__ == "__main__":
    main()
