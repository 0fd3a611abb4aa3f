"""Networks of levels and what is measured of them, for the benchmarks of accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.bounds.interval import ball, margins
from cactus_ray.compression.levels import parse_level
from cactus_ray.config import DataConfig, ThreatConfig
from cactus_ray.data import calibration, load
from cactus_ray.interchange.read import read_onnx
from cactus_ray.models.network import Network
from cactus_ray.search.evaluate import at_level
from cactus_ray.training.evaluate import level_scores
from cactus_ray.training.workers import Alone
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.hints import Hints
from cactus_ray.verification.verdict import SampleVerdict, Verdict, VerificationSettings

IBP_BATCH = 500
NEAR = 1e-2
"""Margins this small are bounded again in float64."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A level as it is deployed (``text``, with or without rebn): its network and the size of its file."""

    text: str
    graph: Graph
    params: Params
    bytes: int


def deployed(network: Network, level: str, data: DataConfig, threat: ThreatConfig) -> Candidate:
    """The level's network, with ``rebn`` where that has the higher IBP-certified accuracy on the selection split."""
    parsed = parse_level(level)
    texts = [level]
    if level != "dense" and any(node.op == "batch_norm" for node in network.graph.nodes):
        texts.append(str(replace(parsed, rebn=True)))
        found = load(data, ("train", "selection"))
        scores = [
            level_scores(network.graph, network.params, text, found.split("selection"), threat, workers=Alone(),
                             calibration=calibration(found))[1]
            for text in texts
        ]  # fmt: skip
        texts.sort(key=lambda text: -scores[texts.index(text)])
    file = at_level(network, texts[0], data, threat.domain)
    graph, params, _ = read_onnx(file.file)
    return Candidate(texts[0], graph, params, file.measures["bytes"])


@dataclass(slots=True)
class Sharing:
    """What the levels of one network tell each other on one split's images."""

    images: torch.Tensor
    labels: torch.Tensor
    points: dict[int, list[torch.Tensor]]
    hints: Hints

    def verdicts(
        self, level: Candidate, chosen: Sequence[int], threat: ThreatConfig, how: VerificationSettings
    ) -> list[SampleVerdict]:
        """Of the chosen images; leaves counterexamples and hints for the next level."""
        part = torch.tensor(list(chosen), dtype=torch.int64)
        found = verify(
            level.graph, level.params, self.images[part], self.labels[part], list(chosen), threat, how,
            known=self.points, hints=self.hints,
        )  # fmt: skip
        for verdict in found:
            if verdict.counterexample is not None and verdict.decided_by not in ("clean", "known"):
                self.points.setdefault(verdict.index, []).append(torch.tensor(verdict.counterexample))
        return found


def counts(verdicts: Sequence[SampleVerdict]) -> list[int]:
    """[samples, certified, falsified]."""
    certified, falsified = (sum(v.verdict is kind for v in verdicts) for kind in (Verdict.CERTIFIED, Verdict.FALSIFIED))
    return [len(verdicts), certified, falsified]


def interval_accuracies(
    level: Candidate, images: torch.Tensor, labels: torch.Tensor, threat: ThreatConfig
) -> tuple[float, float]:
    """Plain accuracy in float32 and IBP-certified accuracy in float64, roundings not charged."""
    exact = {name: tensor.double() for name, tensor in level.params.items()}
    right = proved = 0
    with torch.no_grad():
        for x, y in zip(images.split(IBP_BATCH), labels.split(IBP_BATCH), strict=True):
            right += int((forward(level.graph, level.params, x).argmax(1) == y).sum())
            margin = smallest_margin(level, level.params, x, y, threat)
            near = ~(margin.abs() > NEAR)  # float32 decides what is far from 0
            margin[near] = smallest_margin(level, exact, x[near].double(), y[near], threat).float()
            proved += int((margin > 0).sum())
    return right / len(labels), proved / len(labels)


def smallest_margin(
    level: Candidate, params: Params, x: torch.Tensor, y: torch.Tensor, threat: ThreatConfig
) -> torch.Tensor:
    """Interval bound [N] of the label's smallest margin."""
    lower = margins(level.graph, params, ball(x, threat.epsilon, threat.domain), y)
    return lower.scatter(1, y[:, None], torch.inf).amin(1)
