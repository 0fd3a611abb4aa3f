"""What ``search --dry-run`` says beforehand, against the study itself: seconds and bytes, as real / estimated.

    python tests/benchmarks/bench_estimate.py search_spaces/digits.yaml --set search.trials=6 --set train.epochs=10

Trials of a method are compared by the median of those that trained to their end. Halving and limits would end trials
early, which no estimate knows: spaces with them are not for this script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cactus_ray.search.store import Records, read_records

COMMAND = [sys.executable, "-c", "from cactus_ray.cli import main; main()", "search"]


def estimated(options: list[str]) -> dict[str, Any]:
    """The dry run's numbers."""
    done = subprocess.run([*COMMAND, *options, "--dry-run", "--json"], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def pairs(before: dict[str, Any], records: Records, written: int) -> Iterator[tuple[str, float, float, float, float]]:
    """What is compared: estimated, its low and high end, and real."""
    complete = [t for t in records.trials.values() if t.status == "completed"]
    for method, spread in before["training"].items():
        seconds = [t.train_seconds or 0.0 for t in complete if t.points[0]["method"] == method]
        if seconds:
            real = statistics.median(seconds)
            yield f"training, {method} ({len(seconds)})", spread["median"], spread["low"], spread["high"], real
    verified = statistics.mean(sum(t.ledger.values()) for t in complete)
    yield "verification of a trial", before["verification"], before["verification"], before["verification"], verified
    study = before["study"]
    yield "study", study["median"], study["low"], study["high"], sum(records.drivers)
    yield "disk", before["disk_bytes"], before["disk_bytes"], before["disk_bytes"], float(written)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("space", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--runs", type=Path, help="keep the study here (default: a folder that is deleted)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = arguments.runs or Path(scratch)
        options = [
            str(arguments.space),
            "--runs",
            str(runs),
            *(part for text in arguments.set for part in ("--set", text)),
        ]
        before = estimated(options)
        subprocess.run([*COMMAND, *options], check=True, capture_output=True)
        (run,) = (path.parent for path in runs.glob("*/trials.jsonl"))
        records = read_records(run)
        written = sum(path.stat().st_size for path in run.rglob("*") if path.is_file() and "wandb" not in path.parts)
        print(f"{'':28} {'estimated':>12} {'from':>12} {'to':>12} {'real':>12}  real / estimated")
        for name, median, low, high, real in pairs(before, records, written):
            print(f"{name:28} {median:12.4g} {low:12.4g} {high:12.4g} {real:12.4g}  {real / median:.2f}")
        print("verifiers:", {stage: round(seconds, 2) for stage, seconds in sorted(records.ledger().items())})


if __name__ == "__main__":
    main()
