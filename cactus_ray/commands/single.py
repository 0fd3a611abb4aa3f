"""``cactus-ray train`` and ``cactus-ray verify``: one network, without a search and without Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.compression.levels import parse_level
from cactus_ray.config import DataConfig, ThreatConfig, parse
from cactus_ray.data import SPLITS, load, subset
from cactus_ray.errors import ConfigError, RunFailedError, UserError
from cactus_ray.interchange.read import read_onnx
from cactus_ray.models.network import Network, save
from cactus_ray.models.network import load as load_network
from cactus_ray.search.evaluate import at_level
from cactus_ray.search.space import load_space
from cactus_ray.training.loop import EpochReport, NonFiniteLossError
from cactus_ray.training.loop import train as run_loop
from cactus_ray.verification.cascade import VerificationSettings
from cactus_ray.verification.cascade import verify as run_cascade
from cactus_ray.verification.verdict import summary, wilson


def train(
    console: Console, space_file: Path, overrides: Mapping[str, str], to: Path, *,
    init: Path | None, trust_code: bool, as_json: bool,
) -> None:  # fmt: skip
    """Train the one configuration that a space with every parameter fixed describes, and write its network file.

    Raises UserError naming the parameters that have no value yet, RunFailedError where the loss is not finite.
    """
    space = load_space(space_file, overrides)
    if to.suffix != ".safetensors":
        raise UserError(f"--out: got {str(to)!r}; expected a file name that ends in .safetensors")
    if space.parameters:
        names = ", ".join(parameter.name for parameter in space.parameters)
        raise UserError(f"{space_file}: no value for {names}; give each one with --set NAME=VALUE")
    config = space.configuration({}, 0)
    start = load_network(init) if init else None
    data = load(config.data, ("train", "selection"))
    torch.set_num_threads(space.resources.threads)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=as_json) as progress:
        task = progress.add_task("epochs", total=config.train.epochs)

        def report(epoch: EpochReport) -> bool:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in epoch.metrics.items())
            progress.update(task, completed=epoch.epoch, description=f"epoch  {figures}")
            return True

        try:
            result = run_loop(config, data, report=report, init=start, trust_code=trust_code)
        except NonFiniteLossError as error:
            raise RunFailedError(f"training: {error}") from error
    to.parent.mkdir(parents=True, exist_ok=True)
    save(result.network, to)
    summary_ = {"network": str(to), "config_hash": config.config_hash, "seconds": result.seconds, **result.history[-1]}
    if as_json:
        console.print_json(json.dumps(summary_))
    else:
        console.print(f"wrote {to} ({config.config_hash}) after {result.seconds:.1f} s", highlight=False)


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is verified: one network at one level."""

    level: str
    graph: Graph
    params: Params


def verify(
    console: Console, network: Path, *, data: str | None, root: Path | None, split: str, epsilon: str | None,
    levels: str | None, samples: int | None, seconds_per_sample: float, as_json: bool,
) -> None:  # fmt: skip
    """Verdict counts for every level and radius. Raises UserError for bad input."""
    if split not in SPLITS:
        raise ConfigError("--split", split, f"one of {', '.join(SPLITS)}")
    onnx = network.suffix == ".onnx"
    trained = None if onnx else load_network(network)
    source = _data(data, root, trained)
    threat = trained.config.threat if trained is not None and trained.config is not None else ThreatConfig(epsilon=0.0)
    radii = _radii(epsilon, None if onnx else threat.epsilon)
    subjects = _subjects(network, trained, levels, source, threat)
    settings = VerificationSettings(seconds_per_sample=seconds_per_sample)
    images, labels = load(source, (split,)).split(split)
    indices = subset(len(labels), samples)
    rows = []
    for subject in subjects:
        for radius in radii:
            ball = ThreatConfig(epsilon=radius, domain=threat.domain)
            verdicts = run_cascade(
                subject.graph, subject.params, images[indices], labels[indices], indices.tolist(), ball, settings
            )
            rows.append({"level": subject.level, "epsilon": radius, "split": split, **summary(verdicts)})
    _print(console, rows, as_json)


def _data(name: str | None, root: Path | None, trained: Network | None) -> DataConfig:
    known = trained.config.data if trained is not None and trained.config is not None else None
    if name is None and known is None:
        raise UserError(
            "--data: this file does not say what it was trained on; name the data set, such as --data mnist"
        )
    plain = {"name": name or (known.name if known else "")}
    if root is not None or (known is not None and known.root is not None):
        plain["root"] = str(root or (known.root if known else ""))
    return parse(DataConfig, plain, "--data")


def _radii(text: str | None, default: float | None) -> list[float]:
    if text is None:
        if default is None:
            raise UserError(
                "--epsilon: an ONNX file does not say against which radius; give one, such as --epsilon 0.1"
            )
        return [default]
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError("--epsilon", text, "a number or several separated by commas, such as 0.05,0.1") from None
    return [parse(ThreatConfig, {"epsilon": value}, "--epsilon").epsilon for value in values]


def _subjects(
    path: Path, trained: Network | None, levels: str | None, source: DataConfig, threat: ThreatConfig
) -> Iterator[_Subject]:
    if trained is None:
        if levels is not None:
            raise ConfigError("--levels", levels, "nothing: an ONNX file is one level already")
        graph, params, metadata = read_onnx(path)
        yield _Subject(metadata.get("cactus_ray.level", "as stored"), graph, params)
        return
    for text in (levels or "dense").split(","):
        level = str(parse_level(text.strip(), "--levels"))
        deployed = at_level(trained, level, source, threat.domain)
        yield _Subject(level, deployed.graph, deployed.params)


def _print(console: Console, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        console.print_json(json.dumps(rows))
        return
    table = Table(title=None)
    for heading in (
        "level",
        "epsilon",
        "samples",
        "standard",
        "certified",
        "falsified",
        "unknown",
        "certified accuracy (95 %)",
    ):
        table.add_column(heading, justify="left" if heading == "level" else "right")
    for row in rows:
        low, high = wilson(row["n_certified"], row["samples"])
        table.add_row(
            row["level"], f"{row['epsilon']:g}", str(row["samples"]), f"{row['standard_accuracy']:.2%}",
            str(row["n_certified"]), str(row["n_falsified"]), str(row["n_unknown"]),
            f"{row['certified_accuracy']:.2%} ({low:.2%} - {high:.2%})",
        )  # fmt: skip
    console.print(table)
