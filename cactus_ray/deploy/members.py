"""Members of a family as files that run: a counterexample of a member is replayed like one of the deployed file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.compression.family import Family, outside
from cactus_ray.compression.levels import Level
from cactus_ray.compression.materialize import Compressed
from cactus_ray.compression.stored import Stored, Weight
from cactus_ray.config import ThreatConfig
from cactus_ray.deploy.replay import objection, runner
from cactus_ray.deploy.version_2 import words
from cactus_ray.errors import ConfigError, UnsupportedGraphError
from cactus_ray.interchange.write import FileInfo, onnx_bytes
from cactus_ray.models.fold import fold_batch_norm
from cactus_ray.verification.member import Member, Subject

__all__ = ["member_file", "member_objection", "refuse_integers", "words"]


def member_file(graph: Graph, weights: Params) -> bytes:
    """A member as an ONNX file of plain float32 weights, batch norm folded. UnsupportedGraphError where ONNX's
    operators that we write cannot express the graph."""
    graph, weights = fold_batch_norm(graph, {k: v.detach().cpu().float() for k, v in weights.items()})
    stored: dict[str, Weight] = {k: Stored("float32", v) for k, v in weights.items()}
    return onnx_bytes(Compressed(Level(), graph, stored), FileInfo("", (), (0.0, 1.0)))


def member_objection(
    around: Subject, member: Member, image: Tensor, label: int, values: Sequence[float], threat: ThreatConfig
) -> str | None:  # fmt: skip
    """Why ``values`` (flattened) is no counterexample for the file of a member, or None where it is one.

    As ``replay.objection``; the member's weights follow from its description and ``values``, and lie in the family.
    """
    if len(values) != image.numel():
        return f"has {len(values)} values; the input has {image.numel()}"
    point = torch.tensor(values, dtype=torch.float64).float().view(image.shape)
    try:
        weights = around.weights_of(member, point, label)
        run = runner(member_file(around.graph, weights))
    except (UnsupportedGraphError, ValueError) as error:
        return f"is of a member that cannot be written to a file ({error})"
    if names := outside(around.params, weights, around.radii):
        return f"is of a network that is no member: {', '.join(names)}"
    return objection(run, image, label, values, threat)


def refuse_integers(level: Level, family: Family, key: str) -> None:
    """Raises ConfigError where a level holds integers already: one rounding is not the centre of all."""
    if level.bits is not None:
        expected = f"a level without integers: --family {family.format} is about all roundings of its weights"
        raise ConfigError(key, str(level), expected)
