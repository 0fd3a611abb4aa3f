"""Bounds and verdicts against the exact smallest margin."""

from collections.abc import Callable

import numpy as np
import oracle
import pytest
import torch
from oracle import dense, evaluate, margin, smallest_margin, unroll
from oracle_campaign import KINDS
from oracle_radius import attacked_radius, robust_radius
from torch import Tensor, nn

from cactus_ray.bounds import interval, linear
from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.bounds.trace import trace
from cactus_ray.config import ThreatConfig
from cactus_ray.models.fold import fold_batch_norm
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
    logits = evaluate(unroll(graph, params), image.double().flatten().numpy())
    return graph, params, image, torch.tensor([int(logits.argmax())]), 0.05 + 0.2 * (seed % 5) / 4


@pytest.mark.parametrize("block", range(4))
def test_never_above_the_exact_margin_and_never_a_wrong_verdict(block: int) -> None:
    unstable, tightness = [], []
    for seed in range(block * 8, block * 8 + 8):
        graph, params, image, label, epsilon = case(seed)
        wide = image.double().flatten().numpy()
        exact = smallest_margin(
            unroll(graph, params), np.clip(wide - epsilon, 0, 1), np.clip(wide + epsilon, 0, 1), int(label)
        )
        low, high = exact.low, exact.high
        assert low - 1e-5 <= high <= low + 1e-3  # the bracket itself is tight
        unstable.append(exact.unstable)
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
    program = dense(
        [
            (generator.normal(size=(6, 2)), generator.normal(size=6)),
            (generator.normal(size=(5, 6)), generator.normal(size=5)),
            (generator.normal(size=(3, 5)), np.zeros(3)),
        ]
    )
    found = smallest_margin(program, np.zeros(2), np.ones(2), 0)
    axis = np.linspace(0, 1, 201)
    margins = [margin(program, np.array([a, b]), 0) for a in axis for b in axis]
    assert found.unstable >= 5
    assert found.low <= min(margins) + 1e-6
    assert found.high <= min(margins) + 1e-6
    assert min(margins) - found.high < 0.05
    assert found.high == margin(program, found.witness, 0)


def test_a_solver_that_fails_makes_the_bracket_wide_and_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, params, image, label, _ = case(4)
    program, wide = unroll(graph, params), image.double().flatten().numpy()
    lower, upper = np.clip(wide - 0.2, 0, 1), np.clip(wide + 0.2, 0, 1)
    right = smallest_margin(program, lower, upper, int(label))
    monkeypatch.setattr(oracle._Encoding, "solve", lambda *arguments: (-np.inf, np.array([])))
    found = smallest_margin(program, lower, upper, int(label))
    assert found.low <= right.low
    assert found.high >= right.high - 1e-9
    assert found.high == margin(program, found.witness, int(label))


class AllOptions(nn.Module):
    """Every option of a convolution, and a scale that cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.again = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(4 * 3 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.head(torch.relu(self.again(x) + self.norm(x)).flatten(1))


@pytest.mark.parametrize("make", [AllOptions, *KINDS.values()], ids=["all options", *KINDS])
def test_the_unrolled_program_computes_what_the_graph_computes(make: Callable[[], nn.Module]) -> None:
    shape = (2, 6, 6) if make is AllOptions else (1, 8, 8)
    graph, params = trace(make().eval(), shape)
    generator = torch.Generator().manual_seed(0)
    noise = {k: torch.rand(v.shape, generator=generator, dtype=torch.float64) for k, v in params.items()}
    params = {k: v + 0.5 if k.endswith("running_var") else v - 0.5 for k, v in noise.items()}
    graph, params = fold_batch_norm(graph, params)
    program = unroll(graph, params)
    images = torch.rand(5, *shape, generator=generator, dtype=torch.float64)
    ours = np.array([evaluate(program, x.flatten().numpy()) for x in images])
    np.testing.assert_allclose(ours, forward(graph, params, images).numpy(), atol=1e-12)


def test_an_operator_that_the_oracle_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="max_pool2d"):
        unroll(*trace(nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9, 2)), (1, 6, 6)))


def test_the_radius_of_a_network_on_a_line_is_its_distance_to_the_boundary() -> None:
    one = np.array([[1.0]])
    program = dense([(one, np.zeros(1)), (np.array([[1.0], [0.0]]), np.array([-0.25, 0.0]))])  # 0 wins below 1 / 4
    image = np.array([0.6])
    start = attacked_radius(program, image, 0)
    assert start == pytest.approx(0.35, rel=0.02)
    for guess in (start, 0.02, 0.5):
        radius = robust_radius(program, image, 0, guess)
        assert radius is not None
        safe, falls = radius
        assert safe <= 0.35 <= falls
        assert safe >= 0.97 * falls
