"""What ``cactus-ray verify`` looks at: the deployed files of a network, and the data and the threat that they name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from cactus_ray.compression.levels import parse_levels
from cactus_ray.config import DataConfig, ThreatConfig, parse
from cactus_ray.data import SPLITS
from cactus_ray.errors import ConfigError, UserError
from cactus_ray.interchange.read import read_onnx
from cactus_ray.models.network import Network
from cactus_ray.models.network import load as load_network
from cactus_ray.search.evaluate import at_level

Files = Iterable[tuple[str, bytes]]
"""Levels and their ONNX files."""


def deployed_files(
    network: Path, levels: str | None, data: str | None, root: Path | None, split: str
) -> tuple[DataConfig, ThreatConfig | None, Files]:
    """The data, the threat of training (None for an ONNX file) and the files of a network at some levels, in order.

    Raises UserError for a file that cannot be read, a level or a split that is none, and data that nobody names.
    """
    if split not in SPLITS:
        raise ConfigError("--split", split, f"one of {', '.join(SPLITS)}")
    if network.suffix == ".onnx":
        if levels is not None:
            raise ConfigError("--levels", levels, "nothing: an ONNX file is one level already")
        return _of_onnx(network, data, root)
    return _of_network(load_network(network), levels, data, root)


def _of_onnx(path: Path, data: str | None, root: Path | None) -> tuple[DataConfig, ThreatConfig | None, Files]:
    _, _, metadata = read_onnx(path)
    name = data or metadata.get("cactus_ray.data")
    if name is None:
        raise UserError("--data: this file does not say what it was trained on; name it, such as --data mnist")
    return _data(name, root, None), None, [(metadata.get("cactus_ray.level", "as stored"), path.read_bytes())]


def _of_network(
    trained: Network, levels: str | None, data: str | None, root: Path | None
) -> tuple[DataConfig, ThreatConfig | None, Files]:
    config = trained.config
    name = data or (config.data.name if config else None)
    if name is None:
        raise UserError("--data: this file does not say what it was trained on; name it, such as --data mnist")
    source = _data(name, root, config.data if config else None)
    threat = config.threat if config else None
    domain = threat.domain if threat else (0.0, 1.0)
    chosen = parse_levels((levels or "dense").split(","), "--levels")
    return source, threat, ((str(level), at_level(trained, str(level), source, domain).file) for level in chosen)


def _data(name: str, root: Path | None, trained_on: DataConfig | None) -> DataConfig:
    if trained_on is not None and trained_on.name == name:
        return trained_on if root is None else replace(trained_on, root=str(root))
    return parse(DataConfig, {"name": name} | ({"root": str(root)} if root is not None else {}), "--data")
