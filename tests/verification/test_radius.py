"""Radii: consistent with the verdicts at them."""

import torch
from torch import Tensor, nn

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.bounds.trace import trace
from cactus_ray.config import ThreatConfig
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.radius import largest_radii
from cactus_ray.verification.verdict import Verdict, VerificationSettings

SETTINGS = VerificationSettings()


def problem(count: int = 12) -> tuple[Graph, Params, Tensor, Tensor]:
    graph, params = trace(nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)), (1, 4, 4))
    generator = torch.Generator().manual_seed(0)
    params = {k: torch.randn(v.shape, generator=generator) / 3 for k, v in params.items()}
    images = torch.rand(count, 1, 4, 4, generator=generator)
    labels = torch.randint(3, (count,), generator=generator)
    return graph, params, images, labels


def test_verdicts_at_the_radii_and_one_step_further() -> None:
    graph, params, images, labels = problem()
    threat, tolerance = ThreatConfig(epsilon=0.5), 0.01
    indices = list(range(100, 112))
    found = largest_radii(graph, params, images, labels, indices, threat, SETTINGS, tolerance=tolerance)
    assert [r.index for r in found] == indices
    assert [r.label for r in found] == labels.tolist()
    assert any(r.certified is None for r in found)
    assert any((r.certified or 0) > 0 for r in found)
    for i, radius in enumerate(found):

        def at(epsilon: float, i: int = i) -> Verdict:
            ball = ThreatConfig(epsilon=epsilon)
            (verdict,) = verify(graph, params, images[i : i + 1], labels[i : i + 1], [indices[i]], ball, SETTINGS)
            return verdict.verdict

        if radius.certified is None:
            assert radius.falsified == 0  # misclassified
            assert at(0.0) is Verdict.FALSIFIED
            continue
        assert at(radius.certified) is Verdict.CERTIFIED
        assert at(radius.certified + tolerance) is not Verdict.CERTIFIED
        for share in (0.0, 0.3, 0.9):  # monotone
            assert at(share * radius.certified) is Verdict.CERTIFIED
        if radius.falsified is not None:
            assert radius.falsified > radius.certified
            assert at(radius.falsified + 1e-3) is not Verdict.CERTIFIED


def test_radii_do_not_depend_on_the_company() -> None:
    graph, params, images, labels = problem(6)
    threat = ThreatConfig(epsilon=0.25)
    both = largest_radii(graph, params, images, labels, range(6), threat, SETTINGS, tolerance=0.01)
    for i in range(6):
        (alone,) = largest_radii(
            graph, params, images[i : i + 1], labels[i : i + 1], [i], threat, SETTINGS, tolerance=0.01
        )
        assert alone.certified == both[i].certified


def test_a_radius_that_is_certified_to_the_end() -> None:
    graph, params, images, _ = problem(1)
    weak = {k: v * (1e-3 if k.endswith("weight") else 1) for k, v in params.items()}
    bias = next(v for k, v in reversed(weak.items()) if k.endswith("bias"))
    (found,) = largest_radii(
        graph, weak, images, bias.argmax()[None], [0], ThreatConfig(epsilon=0.3), SETTINGS, tolerance=0.07
    )
    assert found.certified == 0.3
    assert found.falsified is None


def test_a_counterexample_that_the_file_does_not_share_counts_for_nothing() -> None:
    graph, params, images, labels = problem()
    threat = ThreatConfig(epsilon=0.5)
    usual = largest_radii(graph, params, images, labels, range(12), threat, SETTINGS, tolerance=0.05)
    found = largest_radii(
        graph, params, images, labels, range(12), threat, SETTINGS, tolerance=0.05, confirm=lambda *a: False
    )
    assert all(r.falsified is None for r in found)
    assert [r.certified for r in found] == [r.certified for r in usual]
