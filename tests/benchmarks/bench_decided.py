"""How many samples stay undecided: SABR networks on MNIST, three levels, branch and bound on 2,000 test images.

    .venv/bin/python tests/benchmarks/bench_decided.py --mnist ../shared/data --out decided [--epsilons 0.1 0.3]

Trains one cnn_small per radius through ``cactus-ray train`` (one thread, seed 0), verifies it through ``cactus-ray
verify --bound branch`` and prints the table. Everything is kept in ``--out``: a second run goes on where it ended.
Branch and bound counts wall seconds, so on a busy machine more samples stay undecided.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

LEVELS = ("dense", "int4", "prune:gu-l1:0.95")
COMMAND = [sys.executable, "-c", "from cactus_ray.cli import main; main()"]
# The larger radius needs the longer ramp and a larger share of the ball in the box.
RECIPES: dict[float, dict[str, Any]] = {
    0.1: {"epochs": 20, "ramp": 0.3, "box_ratio": 0.6, "standard_weight": 0.3},
    0.3: {"epochs": 30, "ramp": 0.5, "box_ratio": 0.8, "standard_weight": 0.1},
}


def space(epsilon: float, root: Path) -> dict[str, Any]:
    """A search space in which everything is fixed: one run."""
    recipe = RECIPES[epsilon]
    fixed = {
        "method": "sabr", "learning_rate": 0.001, "box_ratio": recipe["box_ratio"],
        "standard_weight": recipe["standard_weight"], "seed": 0,
    }  # fmt: skip
    return {
        "name": "decided", "data": {"name": "mnist", "root": str(root)}, "model": {"name": "cnn_small"},
        "threat": {"epsilon": epsilon}, "levels": list(LEVELS),
        "train": {"epochs": recipe["epochs"], "batch_size": 128, "ramp": recipe["ramp"], "regularizer": 0.5},
        "parameters": {key: {"value": value} for key, value in fixed.items()},
    }  # fmt: skip


def run(*arguments: str) -> str:
    """What the command prints. One thread, so that a second of a sample is a second of one core."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*COMMAND, *arguments], check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout


def train(epsilon: float, root: Path, folder: Path) -> Path:
    """The network of a radius; trained unless it is there."""
    network = folder / f"sabr-{epsilon:g}.safetensors"
    if not network.exists():
        description = folder / f"sabr-{epsilon:g}.yaml"
        description.write_text(yaml.safe_dump(space(epsilon, root)))
        print(run("train", str(description), "--out", str(network), "--json"), flush=True)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, required=True, help="folder that holds MNIST/raw")
    parser.add_argument("--out", type=Path, required=True, help="folder of networks and verdicts")
    parser.add_argument("--epsilons", type=float, nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--levels", nargs="+", default=list(LEVELS))
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one core, for every sample")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for epsilon in asked.epsilons:
        network = train(epsilon, asked.mnist, asked.out)
        for level in asked.levels:
            results = asked.out / f"sabr-{epsilon:g}-{level.replace(':', '_')}-{asked.samples}.jsonl"
            printed = run(
                "verify", str(network), "--levels", level, "--split", "test", "--samples", str(asked.samples),
                "--bound", "branch", "--seconds-per-sample", str(asked.seconds), "--out", str(results), "--json",
            )  # fmt: skip
            rows += json.loads(printed)
            show(rows[-1], asked.seconds)


def show(row: dict[str, Any], seconds: float) -> None:
    """One line of the table, as Markdown."""
    n = row["samples"]
    print(
        f"| {row['epsilon']:g} | {row['level']} | {n} | {row['standard_accuracy']:.1%} | {row['n_certified'] / n:.1%}"
        f" | {row['n_falsified'] / n:.1%} | {row['n_unknown']} ({row['n_unknown'] / n:.2%}) | {seconds:g} s |",
        flush=True,
    )


if __name__ == "__main__":
    main()
