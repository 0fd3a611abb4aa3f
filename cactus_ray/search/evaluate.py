"""From a trained network to the network of one level, with the figures that do not depend on samples."""

from __future__ import annotations

from dataclasses import dataclass

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import Compressed, materialize
from cactus_ray.compression.size import ideal_bits, macs
from cactus_ray.config import DataConfig
from cactus_ray.data import calibration, load
from cactus_ray.interchange.write import FileInfo, onnx_bytes
from cactus_ray.models.network import Network


@dataclass(frozen=True, slots=True)
class LevelNetwork:
    """The network that would be deployed at a level: what is verified, its file, and its size."""

    compressed: Compressed
    file: bytes
    measures: dict[str, int]

    @property
    def graph(self) -> Graph:
        return self.compressed.graph

    @property
    def params(self) -> Params:
        return self.compressed.params


def at_level(network: Network, level: str, data: DataConfig, domain: tuple[float, float]) -> LevelNetwork:
    """The network at a level. Deterministic: calibration images are a fixed choice of the training split.

    Raises ConfigError for text that is no level, UserError where the level does not fit the network (an fp16 overflow).
    """
    parsed = parse_level(level)
    images = calibration(load(data, ("train",))) if parsed.needs_calibration else None
    compressed = materialize(network.graph, network.params, parsed, images, domain)
    file = onnx_bytes(compressed, FileInfo(data.name, network.class_names, domain))
    measures = {
        "bytes": len(file),
        "ideal_bits": ideal_bits(compressed),
        "macs": macs(compressed.graph, compressed.params),
    }
    return LevelNetwork(compressed, file, measures)
