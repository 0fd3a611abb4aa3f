"""What a constraint that is broken at a rung says of the end of a trial, on recorded learning curves.

    .venv/bin/python tests/benchmarks/bench_constraints.py tests/benchmarks/curves/digits.jsonl --min-epochs 2

One row per metric that rungs measure: a lower limit that so many of all configurations (``--met``: half) meet once
they are trained and verified, and of these, rung by rung, the share whose metric at the rung is still below the limit;
beside it, in brackets, of those that do not meet it in the end. Plain accuracy is held against itself, certified
accuracy against its IBP-certified proxy.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from bench_search import FINAL, read_curves

from cactus_ray.search.rungs import extreme_levels, rules_of, rung_epochs, steady
from cactus_ray.search.settings import SchedulerSettings
from cactus_ray.search.simulate import Curve

RULES = {"any": "maximize"}


def broken(
    curves: Sequence[Curve], scheduler: SchedulerSettings, proxy: str, final: str, met: float
) -> Iterator[tuple[float, list[float]]]:
    """Of the curves that meet the limit in the end, then of the others: the limit, and the shares broken at rungs."""
    outcomes = np.array([curve.outcome[final] for curve in curves])
    limit = float(np.quantile(outcomes, 1 - met))
    rules = rules_of(scheduler, RULES)
    for keeps in (True, False):
        below: list[list[bool]] = []
        for curve, outcome in zip(curves, outcomes, strict=True):
            if bool(outcome >= limit) is not keeps:
                continue
            at = rung_epochs(rules, scheduler.min_epochs, len(curve.seconds), steady(curve.epoch_cost))
            for place, epoch in enumerate(at):
                below += [[]] if place == len(below) else []
                below[place].append(not curve.metrics[epoch - 1][proxy] >= limit)
        yield limit, [sum(found) / len(found) for found in below]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path)
    parser.add_argument("--met", type=float, default=0.5, help="share of the configurations that meet a limit")
    parser.add_argument("--reduction", type=float, default=3.0)
    parser.add_argument("--min-epochs", type=int, default=1)
    asked = parser.parse_args()
    space, curves, _ = read_curves(asked.curves)
    scheduler = SchedulerSettings(name="asha", reduction=asked.reduction, min_epochs=asked.min_epochs)
    print(f"{asked.curves}: {len(curves)} configurations; broken at each rung by those that keep it (by the others)")
    for level in extreme_levels(space.levels):
        for proxy, final in FINAL.items():
            (limit, kept), (_, lost) = broken(
                curves, scheduler, f"{proxy}@{level}", f"{final}@{level}", asked.met
            )  # fmt: skip
            shares = ", ".join(f"{mine:.0%} ({theirs:.0%})" for mine, theirs in zip(kept, lost, strict=False))
            print(f"{final}@{level} >= {limit:.3f}: {shares}")


if __name__ == "__main__":
    main()
