"""Bounds and verdicts against the exact smallest margin."""

import numpy as np
import pytest
import torch
from oracle import evaluate, smallest_margin
from torch import Tensor, nn

from cactus_ray.bounds import interval, linear
from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.bounds.trace import trace
from cactus_ray.config import ThreatConfig
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.verdict import Verdict, VerificationSettings

THOROUGH = VerificationSettings(restarts=5)


def case(seed: int) -> tuple[Graph, Params, Tensor, Tensor, float]:
    """A random network 8-10-8-3 with float32 weights, an image, its predicted label and a radius."""
    generator = torch.Generator().manual_seed(seed)
    graph, params = trace(
        nn.Sequential(nn.Flatten(), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)),
        (2, 2, 2),
    )
    params = {
        k: torch.randn(v.shape, generator=generator) * (1.5 / v[0].numel() ** 0.5 if v.dim() > 1 else 0.3)
        for k, v in params.items()
    }
    image = torch.rand(1, 2, 2, 2, generator=generator)
    layers = layers_of(graph, params)
    logits = evaluate(layers, image.double().flatten().numpy())
    return graph, params, image, torch.tensor([int(logits.argmax())]), 0.05 + 0.2 * (seed % 5) / 4


def layers_of(graph: Graph, params: Params) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (params[f"{n.name}.weight"].double().numpy(), params[f"{n.name}.bias"].double().numpy())
        for n in graph.weighted()
    ]


@pytest.mark.parametrize("block", range(4))
def test_never_above_the_exact_margin_and_never_a_wrong_verdict(block: int) -> None:
    unstable, tightness = [], []
    for seed in range(block * 8, block * 8 + 8):
        graph, params, image, label, epsilon = case(seed)
        wide = image.double().flatten().numpy()
        low, high, count = smallest_margin(
            layers_of(graph, params), np.clip(wide - epsilon, 0, 1), np.clip(wide + epsilon, 0, 1), int(label)
        )
        assert low - 1e-5 <= high <= low + 1e-3  # the bracket itself is tight
        unstable.append(count)
        double = {k: v.double() for k, v in params.items()}
        box = interval.ball(image.double(), epsilon, (0.0, 1.0))
        ibp = interval.margins(graph, double, box, label)
        crown = linear.crown_margins(graph, double, box, label)
        others = torch.arange(3) != label
        assert float(ibp[0, others].min()) <= float(crown[0, others].min()) <= high + 1e-9
        tightness.append((high - float(crown[0, others].min())) / (high - float(ibp[0, others].min())))
        (verdict,) = verify(graph, params, image, label, [seed], ThreatConfig(epsilon=epsilon), THOROUGH)
        if verdict.verdict is Verdict.CERTIFIED:
            assert low > -1e-6
        if verdict.verdict is Verdict.FALSIFIED:
            assert high < 1e-6
        if high < -0.01:  # the attack finds what is there to be found in eight dimensions
            assert verdict.verdict is Verdict.FALSIFIED
    assert np.median(unstable) >= 5
    assert np.mean(tightness) < 0.75


def test_the_oracle_finds_the_minimum_that_a_grid_finds() -> None:
    generator = np.random.default_rng(0)
    layers = [(generator.normal(size=(6, 2)), generator.normal(size=6)), (generator.normal(size=(2, 6)), np.zeros(2))]
    low, high, count = smallest_margin(layers, np.zeros(2), np.ones(2), 0)
    axis = np.linspace(0, 1, 201)
    margins = [(lambda z: z[0] - z[1])(evaluate(layers, np.array([a, b]))) for a in axis for b in axis]
    assert count > 0
    assert low <= min(margins) + 1e-6
    assert high <= min(margins) + 1e-6
    assert min(margins) - high < 0.05
