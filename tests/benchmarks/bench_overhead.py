"""What a trial costs beside its training: from the decision to its first step, and from its last step to the record.

    python tests/benchmarks/bench_overhead.py --execution direct --trials 10
    python tests/benchmarks/bench_overhead.py --execution train --trials 8

Runs ``cactus-ray search`` with trials of a second. The network comes from ``model.factory``, so every process that
trains imports this module, which then writes down when each step began and ended. The decision, the first word of the
process that trains and the record are the events ``started``, ``begun`` and ``trained`` of ``trials.jsonl``; all clocks
are those of one machine. On a machine with other work the seconds of a processor say more: those that the process which
trains spent since its last step of the trial before, or since it began.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

COMMAND = [sys.executable, "-c", "from cactus_ray.cli import main; main()"]
LOG, SLEEP = "CACTUS_BENCH_STEPS", "CACTUS_BENCH_SLEEP"
PARTS = {
    "begun": "the process that trains is in its function",
    "before": "the first step begins",
    "after": "from the last step to the record of the network",
    "overhead": "before and after",
    "cpu": "seconds of a processor that the process which trains spent before its first step",
    "between": "from the last step of the trial before to the first step: all that a trial costs beside its steps",
}
"""Seconds of a trial, the first two after the decision."""


def network(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A network that trains in no time."""
    size = input_shape[0] * input_shape[1] * input_shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 16), nn.ReLU(), nn.Linear(16, classes))


def _write_steps(file: Path) -> None:
    """Note begin and end of every training step of this process, on the clock and in seconds of a processor."""
    from cactus_ray.training import loop

    update = loop.update

    def noted(run: Any, *rest: Any) -> None:
        begin, used = time.time(), time.process_time()
        update(run, *rest)
        row = {"seed": run.config.seed, "pid": os.getpid(), "begin": begin, "used": used}
        with file.open("a") as out:
            out.write(json.dumps(row | {"end": time.time(), "spent": time.process_time()}) + "\n")

    loop.update = noted


def _sleep(seconds: float) -> None:
    """Sleep in the place of every training step of this process."""
    from cactus_ray.training import loop

    def slept(run: Any, step: Any, rate: float, seen: torch.Tensor) -> None:
        time.sleep(seconds)
        seen.zero_()

    loop.update = slept


if SLEEP in os.environ:  # in a process that trains, for bench_driver.py
    _sleep(float(os.environ[SLEEP]))
if LOG in os.environ:
    _write_steps(Path(os.environ[LOG]))


def measure(execution: str, trials: int, workers: int, folder: Path) -> list[dict[str, Any]]:
    """One row per trial: seconds before its first step and after its last one."""
    space = {
        "name": "overhead", "data": {"name": "digits", "train_samples": 256},
        "model": {"factory": "bench_overhead:network"}, "threat": {"epsilon": 0.02}, "levels": ["dense"],
        "train": {"epochs": 2, "batch_size": 64},
        "parameters": {"method": {"value": "sabr"}, "learning_rate": {"min": 0.001, "max": 0.01}},
        "search": {"trials": trials, "sampler": "random"}, "verification": {"samples": 20, "attack_steps": 1},
        "resources": {"execution": execution, "workers": workers, "cpus_per_worker": 1 / workers},
        "wandb": {"mode": "disabled"},
    }  # fmt: skip
    file, log = folder / "overhead.yaml", folder / "steps.jsonl"
    file.write_text(json.dumps(space))  # JSON is YAML
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    begin = time.time()
    subprocess.run(
        [*COMMAND, "search", str(file), "--runs", str(folder), "--trust-code"], check=True,
        env={**os.environ, LOG: str(log), "PYTHONPATH": path},
    )  # fmt: skip
    print(f"{execution}: the whole study took {time.time() - begin:.1f} s")
    events = [json.loads(line) for line in (folder / "overhead" / "trials.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    return [_row(event, events, steps) for event in events if event["event"] == "started"]


def _row(started: dict[str, Any], events: list[dict[str, Any]], steps: list[dict[str, Any]]) -> dict[str, Any]:
    mine = [step for step in steps if step["seed"] == started["seed"]]
    first, last = min(mine, key=lambda s: s["begin"]), max(mine, key=lambda s: s["end"])
    times = {e["event"]: e["time"] for e in events if e.get("trial") == started["trial"]}
    earlier = [step["spent"] for step in steps if step["pid"] == first["pid"] and step["end"] <= first["begin"]]
    before = [step["end"] for step in steps if step["end"] <= first["begin"]]
    decided = started["time"]
    row = {
        "begun": times["begun"] - decided, "before": first["begin"] - decided, "after": times["trained"] - last["end"],
        "cpu": first["used"] - max(earlier, default=0.0),
        "between": first["begin"] - max(before, default=float("nan")),
    }  # fmt: skip
    return {"trial": started["trial"], "pid": first["pid"], **row, "overhead": row["before"] + row["after"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--execution", choices=("direct", "train"), default="direct")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.execution, options.trials, options.workers, Path(folder))
    print("\n".join(f"{name}: {words}" for name, words in PARTS.items()))
    for row in rows:
        print(f"{row['trial']}  pid {row['pid']}  " + "  ".join(f"{name} {row[name]:6.2f}" for name in PARTS))
    for what, some in (("first trial", rows[:1]), ("others", rows[1:])):
        for name in PARTS:
            found = [row[name] for row in some if not math.isnan(row[name])]
            if found:
                print(f"{what}: {name} median {statistics.median(found):.2f} s, {min(found):.2f} to {max(found):.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
