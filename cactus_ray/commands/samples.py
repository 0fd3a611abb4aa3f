"""Verdicts and radii of one file on one split, recorded sample by sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table

from cactus_ray.commands.results import Results, recorded
from cactus_ray.compression.family import Family
from cactus_ray.config import DataConfig, ThreatConfig, parse, to_dict
from cactus_ray.data import load, subset
from cactus_ray.deploy.certificate import certify_file, fitted, refuse_misfit
from cactus_ray.deploy.document import Row
from cactus_ray.deploy.replay import answers, margins, objection, parity, runner
from cactus_ray.interchange.read import read_onnx
from cactus_ray.verification.radius import SampleRadius, largest_radii
from cactus_ray.verification.verdict import SampleVerdict, VerificationSettings

TOLERANCE = 1 / 1024
"""Steps of the search for radii, as a share of the domain."""
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)

Show = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Job:
    """One file, at one level, on a subset of a split; ``record``: results so far, or None.

    ``family``: what is asked of is every network around the file's.
    """

    level: str
    file: bytes
    data: DataConfig
    split: str
    domain: tuple[float, float]
    settings: VerificationSettings
    samples: int | None
    record: Results | None
    family: Family | None = None

    def recorded(self, **key: Any) -> list[dict[str, Any]]:
        """Recorded results of this level with the given values."""
        rows = self.record.rows if self.record is not None else []
        return [row["result"] for row in rows if all(row.get(k) == v for k, v in {"level": self.level, **key}.items())]

    def keep(self, result: dict[str, Any], **key: Any) -> None:
        """Append one result."""
        if self.record is not None:
            self.record.append({"level": self.level, **key, "result": result})


def summary_row(job: Job, epsilon: float, show: Show) -> dict[str, Any]:
    """Counts of the verdicts at one radius."""
    known = {row.index: row for row in (parse(Row, plain, "--out") for plain in job.recorded(epsilon=epsilon))}

    def keep(rows: Sequence[Row]) -> None:
        for row in rows:
            job.keep(to_dict(row), epsilon=epsilon)

    found = certify_file(
        job.file, job.data, job.split, ThreatConfig(epsilon=epsilon, domain=job.domain), job.settings,
        samples=job.samples, progress=show, known=known, keep=keep, family=job.family,
    )  # fmt: skip
    family = {} if job.family is None else {"family": to_dict(job.family)}
    settings = {"domain": job.domain, "bound": job.settings.bound, "arithmetic": job.settings.arithmetic}
    return {
        "level": job.level, **family, "epsilon": epsilon, **settings, "split": job.split, **asdict(found.summary)
    }  # fmt: skip


def radius_rows(job: Job, largest: float, show: Show) -> list[dict[str, Any]]:
    """The largest certified radius of every sample: level, split and the fields of ``SampleRadius``.

    Misclassified samples, by the file itself, have none. Counterexamples count where they replay in onnxruntime.
    """
    graph, params, _ = read_onnx(job.file)
    run = runner(job.file)
    loaded = load(job.data, (job.split,))
    refuse_misfit(graph, params, loaded)
    images, labels = loaded.split(job.split)
    chosen = subset(len(labels), job.samples)
    images, labels, indices = fitted(images[chosen], graph), labels[chosen], chosen.tolist()
    logits = answers(run, images)
    parity(graph, params, images, logits)
    right = margins(logits, labels) > 0
    threat = ThreatConfig(epsilon=largest, domain=job.domain)
    tolerance = TOLERANCE * (job.domain[1] - job.domain[0])
    done = {row.index: row for row in (recorded(SampleRadius, plain, job.record) for plain in job.recorded())}
    for position, index in enumerate(indices):
        if index not in done and not bool(right[position]):
            done[index] = SampleRadius(index, int(labels[position]), None, 0.0, 0.0)
            job.keep(asdict(done[index]))
    waiting = [p for p, index in enumerate(indices) if index not in done]
    for start in range(0, len(waiting), job.settings.batch_size):
        part = waiting[start : start + job.settings.batch_size]

        def confirm(position: int, found: SampleVerdict, part: Sequence[int] = part) -> bool:
            place, point = part[position], found.counterexample
            whole = ThreatConfig(epsilon=job.domain[1] - job.domain[0], domain=job.domain)
            return point is not None and objection(run, images[place], found.label, point, whole) is None

        found = largest_radii(
            graph, params, images[part], labels[part], [indices[p] for p in part], threat, job.settings,
            tolerance=tolerance, confirm=confirm,
        )  # fmt: skip
        for radius in found:
            done[radius.index] = radius
            job.keep(asdict(radius))
        show(f"radii of the {job.split} split", len(done), len(indices))
    return [{"level": job.level, "split": job.split, **asdict(done[index])} for index in indices]


def print_radii(console: Console, rows: list[dict[str, Any]], largest: float, *, as_json: bool) -> None:
    """Quantiles of the certified radii by level; as JSON also every sample's. A sample that has none counts as -1."""
    levels = list(dict.fromkeys(row["level"] for row in rows))
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("level")
    for q in QUANTILES:
        table.add_column({0.0: "least", 0.5: "median", 1.0: "most"}.get(q, f"{q:.0%}"), justify="right", no_wrap=True)
    summaries = []
    for level in levels:
        values = [-1.0 if r["certified"] is None else r["certified"] for r in rows if r["level"] == level]
        # lower: a quantile is a radius that a sample has, never one between two
        quantiles = np.quantile(values, QUANTILES, method="lower").tolist()
        table.add_row(level, *("none" if v < 0 else f"{v:.4g}" for v in quantiles))
        found = {str(q): None if v < 0 else v for q, v in zip(QUANTILES, quantiles, strict=True)}
        summaries.append({"level": level, "samples": len(values), "largest": largest, "quantiles": found})
    if as_json:
        console.print_json(json.dumps({"levels": summaries, "samples": rows}))
        return
    console.print(table)
    console.print(
        f"largest certified radius, up to {largest:g}, of {len(rows) // len(levels)} samples of the"
        f" {rows[0]['split']} split; none: not certified at any radius",
        highlight=False,
    )
