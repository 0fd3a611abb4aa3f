"""What ``cactus-ray verify`` looks at: the deployed files of a network, and the data and the threat that they name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cactus_ray.compression.levels import parse_levels
from cactus_ray.config import DataConfig, ThreatConfig, parse
from cactus_ray.data import SPLITS
from cactus_ray.errors import ConfigError, UserError
from cactus_ray.interchange.read import read_onnx
from cactus_ray.models.network import Network
from cactus_ray.models.network import load as load_network
from cactus_ray.search.evaluate import at_level
from cactus_ray.texts import visible

LONGEST_LEVEL = 100
"""Characters of a level that an ONNX file names and that are shown."""
Files = Iterable[tuple[str, bytes]]
"""Levels and their ONNX files."""


@dataclass(frozen=True, slots=True)
class Deployed:
    """The files of a network at some levels, in order, and what they are about.

    ``epsilon``: radius of training, None where the file does not say. ``domain``: smallest and largest pixel value.
    """

    data: DataConfig
    epsilon: float | None
    domain: tuple[float, float]
    files: Files


def deployed_files(network: Path, levels: str | None, data: str | None, root: Path | None, split: str) -> Deployed:
    """What is to be verified.

    Raises UserError for a file that cannot be read, a level or a split that is none, and data that nobody names.
    """
    if split not in SPLITS:
        raise ConfigError("--split", split, f"one of {', '.join(SPLITS)}")
    if network.suffix == ".onnx":
        if levels is not None:
            raise ConfigError("--levels", levels, "nothing: an ONNX file is one level already")
        return _of_onnx(network, data, root)
    return _of_network(load_network(network), levels, data, root)


def _of_onnx(path: Path, data: str | None, root: Path | None) -> Deployed:
    _, _, metadata = read_onnx(path)
    name = data or metadata.get("cactus_ray.data")
    if name is None:
        raise UserError("--data: this file does not say what it was trained on; name it, such as --data mnist")
    # a stranger's text, of any length, which is shown in tables
    level = visible(metadata.get("cactus_ray.level", "as stored"))[:LONGEST_LEVEL]
    domain = _domain(path, metadata.get("cactus_ray.domain"))
    return Deployed(_data(name, root, None), None, domain, [(level, path.read_bytes())])


def _domain(path: Path, stated: str | None) -> tuple[float, float]:
    """What the file says of its pixels: balls are clipped to it, and a smaller one would certify more."""
    if stated is None:
        return 0.0, 1.0
    try:
        low, high = parse(ThreatConfig, {"epsilon": 0.0, "domain": json.loads(stated)}).domain
    except (ValueError, UserError):
        low = high = 0.0
    if not low < high:
        raise UserError(f"{path}: metadata cactus_ray.domain: got {stated!r}; expected two increasing numbers")
    return low, high


def _of_network(trained: Network, levels: str | None, data: str | None, root: Path | None) -> Deployed:
    config = trained.config
    name = data or (config.data.name if config else None)
    if name is None:
        raise UserError("--data: this file does not say what it was trained on; name it, such as --data mnist")
    source = _data(name, root, config.data if config else None)
    threat = config.threat if config else None
    domain = threat.domain if threat else (0.0, 1.0)
    chosen = parse_levels(("dense" if levels is None else levels).split(","), "--levels")
    files = ((str(level), at_level(trained, str(level), source, domain).file) for level in chosen)
    return Deployed(source, threat.epsilon if threat else None, domain, files)


def _data(name: str, root: Path | None, trained_on: DataConfig | None) -> DataConfig:
    if trained_on is not None and trained_on.name == name:
        return trained_on if root is None else replace(trained_on, root=str(root))
    return parse(DataConfig, {"name": name} | ({"root": str(root)} if root is not None else {}), "--data")
