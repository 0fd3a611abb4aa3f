"""``cactus-ray verify --threat semantic``: how often random transformations change what deployed files answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from cactus_ray.commands.pick import stages
from cactus_ray.commands.results import Results, open_results, recorded
from cactus_ray.commands.sources import Deployed, deployed_files
from cactus_ray.config import DataConfig, parse
from cactus_ray.data import load, subset
from cactus_ray.deploy.certificate import fitted, refuse_misfit
from cactus_ray.deploy.document import versions
from cactus_ray.deploy.replay import answers, runner
from cactus_ray.errors import ConfigError
from cactus_ray.interchange.read import read_onnx
from cactus_ray.verification.semantic import (
    MOST_DRAWS,
    SampleFlips,
    SemanticSettings,
    count_flips,
    least_draws,
    summary,
)
from cactus_ray.verification.transforms import Domain, Transform, parse_transforms


@dataclass(frozen=True, slots=True)
class SemanticOptions:
    """The options of the command line; None: its default. ``draws``: the least with which all samples can hold."""

    transform: str | None
    confidence: float | None = None
    flip: float | None = None
    draws: int | None = None

    def settings(self, samples: int) -> SemanticSettings:
        """Checked. Raises ConfigError naming the option, also for so few draws that no sample could hold."""
        given = {k: v for k in ("confidence", "flip", "draws") if (v := getattr(self, k)) is not None}
        try:
            wanted = parse(SemanticSettings, {"draws": 1} | given)
        except ConfigError as error:
            raise ConfigError(f"--{error.path}", error.value, error.expected) from None
        risk = 1.0 - wanted.confidence
        if self.draws is None:
            draws = least_draws(wanted.flip, risk / samples)
            if draws > MOST_DRAWS:
                expected = f"one that at most {MOST_DRAWS:,} draws a sample can show; this one takes {draws:,}"
                raise ConfigError("--flip", wanted.flip, expected)
            return parse(SemanticSettings, given | {"draws": draws})
        if wanted.draws < (least := least_draws(wanted.flip, risk)):
            wish = f"at least {least}: with fewer no sample can hold at --flip {wanted.flip:g}"
            raise ConfigError("--draws", wanted.draws, f"{wish} with confidence {wanted.confidence:g}")
        return wanted


@dataclass(frozen=True, slots=True)
class _Job:
    """One file on a subset of a split; ``record``: results so far, or None."""

    level: str
    file: bytes
    data: DataConfig
    split: str
    domain: Domain
    samples: int | None
    settings: SemanticSettings
    record: Results | None

    def row(self, transform: Transform, show: Callable[[str, int, int], None]) -> dict[str, Any]:
        """Counts of one transformation. Raises UserError where file and data do not fit each other."""
        graph, params, _ = read_onnx(self.file)
        run = runner(self.file)
        loaded = load(self.data, (self.split,))
        refuse_misfit(graph, params, loaded)
        images, labels = loaded.split(self.split)
        key = {"level": self.level, "transform": str(transform)}
        rows = self.record.rows if self.record is not None else []
        known = [r["result"] for r in rows if all(r.get(k) == v for k, v in key.items())]
        done = {row.index: row for row in (recorded(SampleFlips, result, self.record) for result in known)}
        chosen = subset(len(labels), self.samples).tolist()
        for position, index in enumerate(chosen, 1):
            if index not in done:
                done[index] = count_flips(
                    lambda batch: answers(run, fitted(batch, graph)), images[index], int(labels[index]), index,
                    transform, self.settings, self.domain,
                )  # fmt: skip
                if self.record is not None:
                    self.record.append({**key, "result": asdict(done[index])})
            show(f"{self.level}, {transform}: samples of the {self.split} split", position, len(chosen))
        found = summary([done[index] for index in chosen], self.settings)
        return {
            "threat": "semantic", **key, "split": self.split, "semantic_distribution": transform.words, **found,
        }  # fmt: skip


def verify_semantic(
    console: Console, network: Path, options: SemanticOptions, *, data: str | None, root: Path | None, split: str,
    levels: str | None, samples: int | None, to: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """For every level and transformation, of how many samples the flip probability is bounded; of the deployed file.

    ``to``: a file of counts per sample that are appended as they come; a second run with the same settings goes on
    where it ends. Raises UserError for bad input.
    """
    if options.transform is None:
        raise ConfigError("--transform", None, "NAME:AMOUNT such as rotation:15, or several separated by commas")
    transforms = parse_transforms(options.transform, "--transform")
    deployed = deployed_files(network, levels, data, root, split)
    source, files = deployed.data, deployed.files
    total = len(load(source, (split,)).split(split)[1])
    settings = options.settings(min(total, samples or total))
    rows = []
    with ExitStack() as stack:
        show = stack.enter_context(stages(console, not as_json))
        if to is not None:
            files = list(files)
        record = stack.enter_context(_record(to, files, deployed, split, settings))
        for level, file in files:
            job = _Job(level, file, source, split, deployed.domain, samples, settings, record)
            rows += [job.row(transform, show) for transform in transforms]
    _print(console, rows, transforms, as_json)


def _record(
    to: Path | None, files: Iterable[tuple[str, bytes]], deployed: Deployed, split: str, settings: SemanticSettings
) -> AbstractContextManager[Results | None]:
    """The file of counts. Confidence and limit are not among its settings: counts do not depend on them."""
    if to is None:
        return nullcontext()
    hashes = {level: hashlib.sha256(file).hexdigest() for level, file in files}
    data = deployed.data
    where = {"files": hashes, "data": data.name, "split": split, "digest": load(data, (split,)).digests[split]}
    counted = {"semantic_draws": settings.draws, "semantic_seed": settings.seed}
    made = {"domain": deployed.domain, "versions": versions()}
    return open_results(to, {"threat": "semantic"} | where | counted | made)


def _print(console: Console, rows: list[dict[str, Any]], transforms: tuple[Transform, ...], as_json: bool) -> None:
    if as_json:
        console.print_json(json.dumps(rows))
        return
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("level", "transform", "holds", "jointly", "open", "misclassified", "Chernoff"):
        table.add_column(heading, justify="left" if heading in ("level", "transform") else "right", no_wrap=True)
    for row in rows:
        counts = ("hold", "hold_jointly", "open", "misclassified", "chernoff")
        table.add_row(row["level"], row["transform"], *(str(row[f"semantic_n_{name}"]) for name in counts))
    console.print(table)
    first = rows[0]
    limit, sure = f"{first['semantic_flip']:g}", f"{100 * first['semantic_confidence']:g} %"
    lines = [
        f"{first['semantic_samples']} samples of the {first['split']} split, {first['semantic_draws']:,} independent"
        " draws each",
        *(f"{transform}: {transform.words}" for transform in transforms),
        f"holds: classified rightly, and changed by a draw with probability at most {limit}, each with {sure}"
        f" confidence by itself (Clopper-Pearson); jointly: all samples of a row at once"
        f" with {sure} confidence (Bonferroni over them, not over rows)",
        f"Chernoff: estimates below {limit} as C-SAM counts them, with no stated confidence",
        "this is a probability under random transformations and says nothing about linf",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
