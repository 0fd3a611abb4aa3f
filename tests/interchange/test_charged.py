"""What onnxruntime computes from the written file stays inside the bounds that are charged for float32."""

import pytest
import torch
from deployable import INFO, KINDS, compressed, images
from torch import Tensor

from cactus_ray.bounds import interval, linear
from cactus_ray.bounds.rounding import Rounding
from cactus_ray.interchange.read import read_onnx
from cactus_ray.interchange.run import logits
from cactus_ray.interchange.write import onnx_bytes


def excess(file: bytes, arithmetic: str) -> float:
    """How far margin bounds on single points are above the margins that onnxruntime computes there, at most."""
    graph, params, _ = read_onnx(file)
    points = images(64)
    answers = logits(file, points).double()
    wide = {k: v.double() for k, v in params.items()}
    labels = answers.argmax(1)
    charged, box = Rounding.of(graph, wide, arithmetic), interval.ball(points.double(), 0.0, (0.0, 1.0))
    true = answers.gather(1, labels[:, None]) - answers
    nothing = torch.full_like(true, -torch.inf).scatter(1, labels[:, None], 0.0)
    found: list[Tensor] = [
        interval.margins(graph, wide, box, labels, rounding=charged),
        linear.crown_margins(graph, wide, box, labels, known=nothing, rounding=charged),
    ]
    return max(float((lower - true).max()) for lower in found)


@pytest.mark.parametrize(
    "level",
    ["dense", "fp16", "bf16", "int8", "int4", "int4:affine", "int5:tensor", "codebook:4", "lr+sparse:0.3",
     "lr+sparse:0.3+int8"],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_stays_inside(kind: str, level: str) -> None:
    file = onnx_bytes(compressed(kind, level), INFO)
    assert excess(file, "float32") <= 0
    assert excess(file, "real") > 0
