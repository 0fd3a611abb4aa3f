"""Levels of one network verified together and one by one: time side by side, and verdicts.

    python tests/benchmarks/bench_siblings.py runs/NAME/checkpoints/t0001.safetensors --root ../shared/data

Both ways verify the same samples at the same levels, in turns in one process on one thread; a ratio is together / apart
within one turn. A verdict that only one way reaches is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import materialize
from cactus_ray.data import load
from cactus_ray.models.network import load as load_network
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.siblings import LevelModel, verify_levels
from cactus_ray.verification.verdict import SampleVerdict, VerificationSettings

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LEVELS = ("dense", "int8", "int4", "prune:gu-l1:0.9", "prune:gu-l1:0.95")
Found = dict[str, list[SampleVerdict]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path)
    parser.add_argument("--root", type=Path, default=None, help="folder of the data set the network was trained on")
    parser.add_argument("--levels", nargs="+", default=list(LEVELS))
    parser.add_argument("--bounds", nargs="+", default=["crown", "alpha", "branch"])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seconds-per-sample", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for bound in options.bounds:
        print(json.dumps(measure(options, bound)), flush=True)


def measure(options: argparse.Namespace, bound: str) -> dict[str, Any]:
    """Seconds and ratios of all turns, and how the verdicts of the two ways differ."""
    network = load_network(options.network)
    assert network.config is not None, "a network trained by cactus-ray"
    data = replace(network.config.data, root=options.root and str(options.root))
    images, labels = load(data, ("test",)).split("test")
    levels = {}
    for name in options.levels:
        compressed = materialize(network.graph, network.params, parse_level(name))
        levels[name] = LevelModel(compressed.graph, compressed.params)
    settings = VerificationSettings(bound=bound, seconds_per_sample=options.seconds_per_sample)
    count = min(options.samples, len(labels))
    inputs = images[:count], labels[:count], range(count), network.config.threat, settings

    def apart() -> Found:
        return {name: verify(level.graph, level.params, *inputs) for name, level in levels.items()}

    def together() -> Found:
        return verify_levels(levels, *inputs)

    turns = [(timed(options.clock, apart), timed(options.clock, together)) for _ in range(options.repeats)]
    seconds = [[way[0] for way in turn] for turn in turns]
    ratios = [second / first for first, second in seconds]
    (_, one), (_, other) = turns[-1]
    return {
        "bound": bound,
        "samples": count,
        "seconds apart": round(statistics.median(first for first, _ in seconds), 2),
        "seconds together": round(statistics.median(second for _, second in seconds), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(r, 3) for r in sorted(ratios)],
        "apart": counts(one),
        "together": counts(other),
        "differing": [
            [name, a.index, a.verdict.value, b.verdict.value]
            for name in levels
            for a, b in zip(one[name], other[name], strict=True)
            if a.verdict is not b.verdict
        ],
    }


def timed(clock: str, function: Callable[[], Found]) -> tuple[float, Found]:
    begin = CLOCKS[clock]()
    found = function()
    return CLOCKS[clock]() - begin, found


def counts(found: Found) -> dict[str, int]:
    """How many samples of all levels each stage decided."""
    return dict(sorted(Counter(f"{v.verdict.value} {v.decided_by}" for some in found.values() for v in some).items()))


if __name__ == "__main__":
    main()
