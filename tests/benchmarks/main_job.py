"""The main job against its targets: seconds of the search, and the picked file against the same network dense.

    .venv/bin/python tests/benchmarks/main_job.py [--repeats 3] [--seed 0]

Every repeat is a whole study of search_spaces/digits.yaml (12 trials, 6 levels) with its own seed, a pick with the
requirements of launch/local.sh, and a certification of the picked network's dense form on the same test split.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cactus_ray.config import RunConfig, parse
from cactus_ray.deploy.certificate import certify_file
from cactus_ray.models.network import load as load_network
from cactus_ray.search.evaluate import at_level
from cactus_ray.search.space import load_space
from cactus_ray.search.store import read_records

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from cactus_ray.cli import main; main()"]


def measure(seed: int, folder: Path) -> dict[str, Any]:
    """One study and one pick."""
    run, picked, space = folder / "digits", folder / "picked", ROOT / "search_spaces" / "digits.yaml"
    begin = time.monotonic()
    subprocess.run([*COMMAND, "search", str(space), "--runs", str(folder), "--seed", str(seed)], check=True)
    seconds = time.monotonic() - begin
    requirements = ["--max-bytes", "46k", "--min-certified", "0.8", "--min-accuracy", "0.95", "--prefer", "certified"]
    status = subprocess.run([*COMMAND, "pick", str(run), *requirements, "--out", str(picked)], check=False).returncode
    if status not in (0, 3) or not picked.exists():
        return {"seed": seed, "seconds": seconds, "status": status}
    certificate = json.loads((picked / "certificate.json").read_text())
    trial = read_records(run).trials[certificate["provenance"]["trial"]]
    config = parse(RunConfig, trial.config)
    dense = at_level(load_network(run / str(trial.checkpoint)), "dense", config.data, config.threat.domain)
    settings = load_space(run / "space.yaml").verification
    reference = certify_file(dense.file, config.data, "test", config.threat, settings).summary
    summary = certificate["summary"]
    return {
        "seed": seed, "seconds": seconds, "status": status, "trial": trial.id, "level": certificate["network"]["level"],
        "share_of_dense_bytes": certificate["file"]["bytes"] / len(dense.file),
        "standard": summary["standard_accuracy"], "certified": summary["certified_accuracy"],
        "certified_dense": reference.certified_accuracy, "samples": summary["samples"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = []
    for seed in range(options.seed, options.seed + options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(seed, Path(folder)))
    for row in rows:
        print(json.dumps(row))
    seconds = [row["seconds"] for row in rows]
    print(
        f"search: median {statistics.median(seconds):.0f} s, {min(seconds):.0f} to {max(seconds):.0f} s (target: 360)"
    )
    for row in rows:
        if "certified" in row:
            print(
                f"seed {row['seed']}: {row['share_of_dense_bytes']:.1%} of the dense file (target: at most 30 %), "
                f"standard {row['standard']:.1%} (95 %), certified {row['certified']:.1%} (80 %), "
                f"{100 * (row['certified_dense'] - row['certified']):+.1f} points lost against dense (4)"
            )


if __name__ == "__main__":
    main()
