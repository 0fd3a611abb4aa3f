"""Running the deployed file itself: what it answers, and whether a counterexample is one for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cactus_ray.bounds.answers import possible_answers
from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.bounds.quantizer import has_quantisers
from cactus_ray.config import ThreatConfig
from cactus_ray.deploy.document import Parity
from cactus_ray.errors import RunFailedError
from cactus_ray.interchange import run as runtime

Logits = Callable[[Tensor], Tensor]
"""Logits [N, classes] of images [N, C, H, W], as onnxruntime computes them from the file."""

BATCH = 256
PARITY_TOLERANCE = 1e-3
"""Largest difference of a logit between onnxruntime and our reading of a file, relative to the largest logit (at least
1): float32 rounding stays far below it, a graph that was read wrongly does not."""


def runner(file: bytes) -> Logits:
    """The file in one onnxruntime session. Raises UserError, at once or when called, where it cannot run.

    Read a stranger's file first: the reader refuses layers that onnxruntime should not see.

    A file whose batch size is fixed to 1 gets its images one by one.
    """
    session = runtime.deployed_session(file)
    name = session.get_inputs()[0].name
    single = session.get_inputs()[0].shape[:1] == [1]

    def run(images: Tensor) -> Tensor:
        parts = torch.split(images, 1) if single else [images]
        found = [runtime.run(session, {name: np.ascontiguousarray(part.numpy())})[0] for part in parts]
        return torch.from_numpy(np.concatenate(found))

    return run


def answers(run: Logits, images: Tensor) -> Tensor:
    """Logits [N, classes] of all images, in batches."""
    return torch.cat([run(images[i : i + BATCH]) for i in range(0, len(images), BATCH)])


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label minus the largest other one, float64 [N]. A sample is classified rightly where it is > 0."""
    exact = logits.double()
    own = exact.gather(1, labels[:, None])[:, 0]
    return own - exact.scatter(1, labels[:, None], -torch.inf).amax(1)


def parity(graph: Graph, params: Params, images: Tensor, logits: Tensor) -> Parity:
    """Our float32 forward pass against onnxruntime's ``logits`` [N, classes] of the same images.

    Raises RunFailedError where they differ by more than rounding: then what would be certified is not what runs. Where
    activations are quantised, rounding may turn a code into its neighbour; then each of onnxruntime's logits must lie
    between the smallest and the largest that rounding can give.
    """
    with torch.no_grad():
        ours = answers(lambda part: forward(graph, params, part), images)
    difference = float((ours.double() - logits.double()).abs().max())
    if has_quantisers(graph):
        parts = zip(torch.split(images, BATCH), torch.split(logits, BATCH), strict=True)
        agreed = all(_possible(graph, params, *part) for part in parts)
    else:
        agreed = difference <= PARITY_TOLERANCE * max(1.0, float(logits.abs().max()))
    if not agreed:
        raise RunFailedError(
            f"model.onnx: onnxruntime and our reading of the file differ by {difference} in a logit; "
            f"expected at most rounding, so this file cannot be certified"
        )
    disagreements = int((ours.argmax(1) != logits.argmax(1)).sum())
    return Parity(samples=len(images), max_abs_difference=difference, class_disagreements=disagreements)


def _possible(graph: Graph, params: Params, images: Tensor, logits: Tensor) -> bool:
    box = possible_answers(graph, params, images)
    return bool(((logits >= box.lower) & (logits <= box.upper)).all())  # false for NaN


def objection(run: Logits, image: Tensor, label: int, values: Sequence[float], threat: ThreatConfig) -> str | None:
    """Why ``values`` (flattened) is no counterexample for the file, or None where it is one.

    A counterexample lies in the linf ball around ``image`` [C, H, W] and in the domain, both compared exactly in
    float64, is representable in float32, and another class has at least the logit of the label.
    """
    if len(values) != image.numel():
        return f"has {len(values)} values; the input has {image.numel()}"
    exact = torch.tensor(values, dtype=torch.float64).view(image.shape)
    single = exact.float()
    if not torch.equal(single.double(), exact):
        return "is not representable in float32, the type of the network's input"
    distance = float((exact - image.double()).abs().max())
    if not distance <= threat.epsilon:
        return f"lies {distance} from the sample, outside of the ball of radius {threat.epsilon}"
    low, high = threat.domain
    if not low <= float(exact.min()) <= float(exact.max()) <= high:
        return f"leaves the domain [{low}, {high}]"
    margin = float(margins(run(single[None]), torch.tensor([label])))
    if not margin <= 0:
        return f"is classified as its label by the file (margin {margin})"
    return None
