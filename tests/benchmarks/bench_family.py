"""Samples that a family certificate covers, against those of the single network that is rounded to nearest.

For every network file (.safetensors), format and bound: certified / falsified / unknown of the network rounded to
nearest, and of the families of radius half and one around the network before rounding; CPU seconds. Results are
appended to ``--out`` as they come, and a second run goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cactus_ray.compression.family import RADII, Family
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import Compressed, materialize
from cactus_ray.data import load_split, subset
from cactus_ray.models.network import Network
from cactus_ray.models.network import load as load_network
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.family import verify_family
from cactus_ray.verification.verdict import SampleVerdict, Verdict, VerificationSettings

Batch = tuple[Tensor, Tensor, list[int]]


def judged(network: Network, batch: Batch, kind: str, name: str, settings: VerificationSettings) -> list[SampleVerdict]:
    """Verdicts on the network rounded to nearest, or on its family of radius ``kind``."""
    assert network.config is not None
    threat = network.config.threat
    if kind == "nearest":
        rounded = materialize(network.graph, network.params, parse_level(name))
        return verify(rounded.graph, rounded.params, *batch, threat, settings)
    centre: Compressed = materialize(network.graph, network.params, parse_level("dense"))
    family = Family(format=name, radius=kind)
    return [f.sample for f in verify_family(centre.graph, centre.params, *batch, threat, settings, family)]


def measure(
    path: Path, batch: Batch, formats: Sequence[str], bounds: Sequence[str], seconds: float,
    done: list[dict[str, Any]], keep: Callable[[dict[str, Any]], None],
) -> None:  # fmt: skip
    """All rows of one network file that are not done yet."""
    network = load_network(path)
    for bound in bounds:
        settings = VerificationSettings(bound=bound, seconds_per_sample=seconds if bound == "branch" else 0.0)
        for name in formats:
            for kind in ("nearest", *RADII):
                key = {"file": path.name, "format": name, "bound": bound, "kind": kind, "samples": len(batch[1])}
                if any(all(row[k] == v for k, v in key.items()) for row in done):
                    continue
                begun = time.process_time()
                count = Counter(v.verdict for v in judged(network, batch, kind, name, settings))
                counts = {v.name.lower(): count[v] for v in Verdict}
                keep({**key, **counts, "cpu_seconds": round(time.process_time() - begun, 1)})


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per file, format and bound; certified / falsified / unknown."""
    lines = ["| network | format | bound | nearest | half a step | one step |", "|---|---|---|---|---|---|"]
    for key in dict.fromkeys((r["file"], r["format"], r["bound"], r["samples"]) for r in rows):
        cells = []
        for kind in ("nearest", *RADII):
            same = [r for r in rows if (r["file"], r["format"], r["bound"], r["samples"], r["kind"]) == (*key, kind)]
            cells.append(" / ".join(str(same[-1][k]) for k in ("certified", "falsified", "unknown")) if same else "")
        lines.append(f"| {key[0]} | {key[1]} | {key[2]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="+", type=Path, help="network files of one data set")
    parser.add_argument("--root", help="folder of the data set, where it is not inside a package")
    parser.add_argument("--samples", type=int, default=200, help="fixed random subset of the test split")
    parser.add_argument("--formats", default="int8,int6,int4")
    parser.add_argument("--bounds", default="ibp,crown,alpha")
    parser.add_argument("--seconds", type=float, default=5.0, help="per sample, for branch")
    parser.add_argument("--out", type=Path, default=Path("family.jsonl"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = load_network(given.networks[0]).config
    assert config is not None
    images, labels = load_split(config.data.name, "test", given.root)
    chosen = subset(len(labels), given.samples)
    batch = images[chosen], labels[chosen], chosen.tolist()
    rows = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        with given.out.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    for path in given.networks:
        measure(path, batch, given.formats.split(","), given.bounds.split(","), given.seconds, rows, keep)
    names = {path.name for path in given.networks}
    print(table([row for row in rows if row["file"] in names]))


if __name__ == "__main__":
    main()
