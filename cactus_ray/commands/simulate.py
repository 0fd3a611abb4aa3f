"""``cactus-ray simulate``: a searcher and a scheduler on curves that are known, beside random search without one."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cactus_ray.errors import UserError
from cactus_ray.search.settings import SchedulerSettings
from cactus_ray.search.simulate import Curve, Setup, Simulated, comparable, recorded_curves, simulate
from cactus_ray.search.space import Space, load_space
from cactus_ray.search.store import read_records
from cactus_ray.search.surface import REFERENCE, synthetic_curves


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    """What is simulated. ``trials``: of the random search to compare with; ``by``: a single metric for the rungs;
    ``promote`` and ``rest`` of the scheduler: as the space says where they are None.
    """

    sampler: str = "tpe"
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    workers: int = 1
    trials: int | None = None
    seeds: int = 10
    by: str | None = None
    synthetic: int | None = None
    promote: bool | None = None
    rest: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One seed: random search over whole trials, and the search in question with all curves at its disposal."""

    seed: int
    baseline: Simulated
    found: Simulated

    @property
    def share(self) -> float:
        """Cost of the baseline's final hypervolume, over the baseline's cost; infinite where it was never reached."""
        return self.found.cost_of(self.baseline.hypervolume) / self.baseline.cost if self.baseline.cost else math.inf


def run_simulations(
    space: Space, curves: Sequence[Curve], reference: Mapping[str, float], options: SimulateOptions
) -> list[Outcome]:
    """One outcome per seed 0, 1, ... Raises UserError for a metric that the curves lack."""
    goals = None
    if options.by is not None:
        everywhere = set.intersection(*(set(m) for curve in curves for m in curve.metrics))
        known = sorted(name for name in everywhere if "accuracy" in name)  # more of them is better
        if options.by not in known:
            raise UserError(f"--by: got {options.by!r}; expected an accuracy of every epoch: {', '.join(known)}")
        goals = {options.by: "maximize"}
    said = space.search.scheduler
    promote = said.promote if options.promote is None else options.promote
    rest = options.rest or (said.rest if promote else "stop")
    scheduler = replace(options.scheduler, promote=promote, rest=rest)
    outcomes = []
    for seed in range(options.seeds):
        trials = min(options.trials or len(curves), len(curves))
        plain = Setup(sampler="random", workers=options.workers, trials=trials, seed=seed)
        asked = Setup(
            sampler=options.sampler, scheduler=scheduler, workers=options.workers, trials=len(curves),
            seed=seed, goals=goals,
        )  # fmt: skip
        outcomes.append(
            Outcome(seed, simulate(space, curves, reference, plain), simulate(space, curves, reference, asked))
        )
    return outcomes


def simulate_run(console: Console, path: Path, options: SimulateOptions, *, as_json: bool = False) -> None:
    """Replay the curves of the run at ``path``, or made-up ones of the space there, and print what came of it."""
    space, curves, reference = _curves(path, options.synthetic)
    outcomes = run_simulations(space, curves, reference, options)
    if as_json:
        rows = [_row(outcome) for outcome in outcomes]
        plain = {"curves": len(curves), "compared": comparable(space, curves), "median_share": _median(outcomes)}
        console.print(
            json.dumps(_finite({**plain, "seeds": rows}), allow_nan=False, indent=2), markup=False, highlight=False,
            soft_wrap=True,
        )  # fmt: skip
        return
    console.print(_table(outcomes))
    trials = len(outcomes[0].baseline.started)
    median = _median(outcomes)
    told = f"{median:.2f} of its cost (median)" if math.isfinite(median) else "its cost and more (median: not reached)"
    console.print(
        f"{len(curves)} curves; the final hypervolume of random search over {trials} whole trials for {told}",
        markup=False, highlight=False,
    )  # fmt: skip


def _curves(path: Path, synthetic: int | None) -> tuple[Space, list[Curve], dict[str, float]]:
    if synthetic is not None:
        space = load_space(path / "space.yaml" if path.is_dir() else path)
        if other := set(space.front) - set(REFERENCE):
            raise UserError(f"front: {sorted(other)[0]!r} has no synthetic values; expected {', '.join(REFERENCE)}")
        return space, synthetic_curves(space, synthetic, space.search.seed), REFERENCE
    records = read_records(path)
    curves = recorded_curves(records)
    if not curves:
        raise UserError(f"{path}: no trial here is complete with all its epochs recorded; expected at least one")
    return load_space(path / "space.yaml"), curves, dict(records.study["reference_point"])


def _median(outcomes: Sequence[Outcome]) -> float:
    return statistics.median(outcome.share for outcome in outcomes)


def _row(outcome: Outcome) -> dict[str, Any]:
    base, found = outcome.baseline, outcome.found
    return {
        "seed": outcome.seed, "random_cost": base.cost, "random_hypervolume": base.hypervolume,
        "random_time": base.time, "cost": found.cost, "time": found.time, "hypervolume": found.hypervolume,
        "started": len(found.started), "stopped": found.stopped,
        "cost_of_random_hypervolume": found.cost_of(base.hypervolume), "share": outcome.share,
        "steps": [[step.cost, step.time, step.hypervolume] for step in found.steps],
    }  # fmt: skip


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    headings = (
        "seed", "random: cost s", "hypervolume", "cost s of that", "share", "all: cost s", "hypervolume", "stopped",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for o in outcomes:
        reached = o.found.cost_of(o.baseline.hypervolume)
        table.add_row(
            str(o.seed), f"{o.baseline.cost:,.1f}", f"{o.baseline.hypervolume:.4f}",
            f"{reached:,.1f}" if math.isfinite(reached) else "never",
            f"{o.share:.2f}" if math.isfinite(o.share) else "-",
            f"{o.found.cost:,.1f}", f"{o.found.hypervolume:.4f}", f"{o.found.stopped} of {len(o.found.started)}",
        )  # fmt: skip
    return table


def _finite(value: Any) -> Any:
    """Plain data with null for what is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
