"""Branch and bound against the exact smallest margin and sampled points, its budgets, and planted faults."""

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits_subject import EPSILON, Subject
from oracle import Exact, smallest_margin, unroll
from torch import Tensor, nn

from cactus_ray.bounds import interval, splits
from cactus_ray.bounds.alpha import MarginForms, alpha_margins, form_problems
from cactus_ray.bounds.ascent import Search, decide
from cactus_ray.bounds.graph import forward
from cactus_ray.bounds.leaves import leaf_multipliers
from cactus_ray.bounds.splits import Network, Region, Root
from cactus_ray.bounds.trace import trace
from cactus_ray.config import ThreatConfig
from cactus_ray.verification import branch as module
from cactus_ray.verification import branching
from cactus_ray.verification.attack import attack, descend
from cactus_ray.verification.branch import Budget, Outcome, branch
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.soundness import Batch, Model, replays
from cactus_ray.verification.tree import Node, Tree
from cactus_ray.verification.verdict import SampleVerdict, Verdict, VerificationSettings

sys.path.append(str(Path(__file__).parents[1] / "bounds"))
from containment import points_of, steered_points
from small_networks import KINDS, SHAPE, network

PATIENT = Budget(seconds=math.inf)
true_split, true_halves, true_at = branching.split, splits.halves, Region.at


@cache
def case(seed: int, hidden: tuple[int, ...] = (10, 8)) -> tuple[Model, Batch]:
    """A random fully connected network, an image with its predicted label, and a radius near the robust one."""
    generator = torch.Generator().manual_seed(seed)
    widths = [8, *hidden, 3]
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    graph, params = trace(nn.Sequential(*layers[:-1]), (2, 2, 2))
    params = {
        k: torch.randn(v.shape, generator=generator) * (1.5 / v[0].numel() ** 0.5 if v.dim() > 1 else 0.3)
        for k, v in params.items()
    }
    image = torch.rand(1, 2, 2, 2, generator=generator)
    model = Model.of(graph, params)
    label = forward(graph, params, image).argmax(1)
    low, high = 0.0, 1.0  # of the radius, by attack: most cases then need branching
    for _ in range(7):
        middle = (low + high) / 2
        _, margin = attack(model, Batch.of(image, label, [seed], middle, (0.0, 1.0)), steps=20, restarts=3, seed=0)
        low, high = (low, middle) if bool(margin < 0) else (middle, high)
    epsilon = low * (0.97 if seed % 3 else 1.03)
    return model, Batch.of(image, label, [seed], epsilon, (0.0, 1.0))


def outcomes(model: Model, batch: Batch, budget: Budget = PATIENT) -> list[Outcome]:
    box = interval.ball(batch.images.double(), batch.epsilon, batch.domain)
    nothing = torch.full((len(batch), 3), -torch.inf, dtype=torch.float64).scatter(1, batch.labels[:, None], 0.0)
    margins = alpha_margins(model.graph, model.double, box, batch.labels, known=nothing, how=Search(iterations=5))
    return branch(model, batch, margins, budget)


@cache
def exact_margin(seed: int, hidden: tuple[int, ...]) -> Exact:
    model, batch = case(seed, hidden)
    image, epsilon = batch.images.double().flatten().numpy(), batch.epsilon
    low, high = np.clip(image - epsilon, 0, 1), np.clip(image + epsilon, 0, 1)
    return smallest_margin(unroll(model.graph, model.double), low, high, int(batch.labels))


def faults(seeds: range, hidden: tuple[int, ...] = (10, 8)) -> Iterator[str]:
    """What branch and bound gets wrong, and what it leaves open, by the exact smallest margin."""
    for seed in seeds:
        model, batch = case(seed, hidden)
        exact, label = exact_margin(seed, hidden), int(batch.labels)
        (outcome,) = outcomes(model, batch)
        others = torch.arange(3) != label
        lower = float(outcome.lower[others].min())
        if not lower <= exact.high + 1e-9:
            yield f"{seed}: bound {lower} above {exact.high}"
        if outcome.point is not None and exact.low > 1e-6:
            yield f"{seed}: falsified at a margin of at least {exact.low}"
        if outcome.point is None and not lower > 0:
            yield f"{seed}: open ({outcome.reason}), exact margin {exact.low} to {exact.high}"


def test_small_networks_are_decided_as_the_oracle_decides() -> None:
    assert list(faults(range(14))) == []
    assert list(faults(range(14, 18), (12, 10, 8))) == []


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_hold_at_sampled_points_of_every_kind_of_network(kind: str) -> None:
    graph, params = network(kind, 2)
    model = Model.of(graph, params)
    images = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    labels = forward(graph, model.single, images).argmax(1)
    for epsilon in (0.02, 0.08):
        batch = Batch.of(images, labels, [0, 1], epsilon, (0.0, 1.0))
        found = outcomes(model, batch, Budget(nodes=120, seconds=math.inf, iterations=5))
        lower = torch.stack([o.lower for o in found])
        wide = images.double()
        points = [*points_of(wide, epsilon, 10, 0), *steered_points(graph, model.double, wide, epsilon, 2, 0)]
        for point in points:
            logits = forward(graph, model.double, point)
            above = lower - (logits.gather(1, labels[:, None]) - logits)
            assert bool((above.scatter(1, labels[:, None], 0.0) <= 1e-9).all())
        for i, outcome in enumerate(found):
            if outcome.point is not None:
                assert bool(replays(model, batch.select([i]), outcome.point[None])[0])


def test_the_same_settings_give_the_same_trees() -> None:
    for seed in (1, 2):
        model, batch = case(seed)
        first, second = (outcomes(model, batch)[0] for _ in range(2))
        assert first.nodes == second.nodes
        assert bool((first.lower == second.lower).all())


def test_budgets_leave_a_sample_open() -> None:
    model, batch = case(11, (12, 10, 8))
    (whole,) = outcomes(model, batch)
    assert whole.nodes > 10
    (few,) = outcomes(model, batch, Budget(nodes=5, seconds=math.inf))
    assert (few.reason, few.point) == ("nodes", None)
    assert few.nodes <= 7
    (late,) = outcomes(model, batch, Budget(seconds=0.0))
    assert late.reason == "time"
    assert bool((late.lower <= few.lower).all())
    assert bool((few.lower <= whole.lower + 1e-9).all())


def test_a_sub_problem_that_contradicts_itself_is_closed() -> None:
    """relu(x) and relu(-x - 1) over x in [-2, 2]: both active is impossible, although each alone is not."""
    graph, params = trace(nn.Sequential(nn.Flatten(), nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)), (1, 1, 1))
    params = {
        "1.weight": torch.tensor([[1.0], [-1.0]]), "1.bias": torch.tensor([0.0, -1.0]),
        "3.weight": torch.tensor([[-1.0, -1.0], [0.0, 0.0]]), "3.bias": torch.tensor([-5.0, 0.0]),
    }  # fmt: skip
    double = {k: v.double() for k, v in params.items()}
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    boxes: dict[str, interval.Box] = {}
    interval.propagate(graph, double, interval.Box(zero, zero + 2), visit=lambda n, b: boxes.__setitem__(n.name, b))
    boxes.pop(graph.output.name)
    root = Root.on(Network(graph, double, params), boxes, graph.output.name)
    index = root.unstable()
    problems = form_problems(MarginForms(torch.tensor([0]), 2), torch.tensor([0]), torch.tensor([1]), index)
    for signs, feasible in (([1, 1], False), ([1, -1], True), ([-1, -1], True)):
        region = Region.of(root, replace(problems, sign=torch.tensor([signs], dtype=torch.int8)))
        multipliers, _, points = leaf_multipliers(region)
        lower = float(decide(region, region.start().float(), multipliers).lower)
        assert (lower > 0) != feasible
        if feasible:
            assert lower == pytest.approx({1: -7.0, -1: -5.0}[signs[0]], abs=1e-6)
            assert float(points) == pytest.approx(2.0, abs=1e-6) or signs[0] == -1


# --- in the cascade --------------------------------------------------------------------------------------------------


WIDE = 0.13
"""A radius at which some samples of the subject need branching."""


def run(subject: Subject, bound: str, epsilon: float = EPSILON, **options: Any) -> list[SampleVerdict]:
    settings = VerificationSettings(bound=bound, attack_steps=20, **options)
    everything = subject.graph, subject.params, subject.images, subject.labels, range(len(subject.labels))
    return verify(*everything, ThreatConfig(epsilon=epsilon), settings)


@pytest.fixture(scope="module")
def wide(subject: Subject) -> dict[str, list[SampleVerdict]]:
    """Verdicts at the wide radius by bound."""
    return {bound: run(subject, bound, WIDE) for bound in ("crown", "alpha", "branch")}


def test_each_bound_decides_what_the_weaker_decides_and_more(wide: dict[str, list[SampleVerdict]]) -> None:
    unknown = {b: {v.index for v in wide[b] if v.verdict is Verdict.UNKNOWN} for b in wide}
    assert unknown["branch"] < unknown["alpha"] < unknown["crown"]
    assert unknown["branch"] == set()
    by = {v.decided_by for v in wide["branch"]}
    assert by >= {"ibp", "crown", "alpha", "branch"}
    for weak, strong in zip(wide["crown"], wide["branch"], strict=True):
        if weak.verdict is not Verdict.UNKNOWN:
            assert (weak.verdict, weak.decided_by) == (strong.verdict, strong.decided_by)
        if strong.verdict is Verdict.CERTIFIED:
            assert strong.lower_bound is not None
            assert strong.lower_bound > 0


def test_what_is_certified_does_not_fall_to_a_strong_attack(
    subject: Subject, wide: dict[str, list[SampleVerdict]]
) -> None:
    chosen = [v.index for v in wide["branch"] if v.decided_by in ("alpha", "branch") and v.lower_bound]
    model = Model.of(subject.graph, subject.params)
    batch = Batch.of(subject.images, subject.labels, range(60), WIDE, (0.0, 1.0)).select(chosen)
    _, margins = attack(model, batch, steps=100, restarts=6, seed=99)
    assert bool((margins > 0).all())


def test_a_node_limit_leaves_a_sample_unknown() -> None:
    model, batch = case(11, (12, 10, 8))
    settings = VerificationSettings(bound="branch", attack_steps=0, max_nodes=3)
    threat = ThreatConfig(epsilon=batch.epsilon)
    (found,) = verify(model.graph, model.single, batch.images, batch.labels, [0], threat, settings)
    assert (found.verdict, found.decided_by) == (Verdict.UNKNOWN, "nodes")
    assert found.lower_bound is not None
    assert found.lower_bound <= 0


def test_no_attack_is_needed_to_falsify(subject: Subject) -> None:
    found = run(subject, "branch")
    blind = verify(
        subject.graph, subject.params, subject.images, subject.labels, range(60), ThreatConfig(epsilon=EPSILON),
        VerificationSettings(bound="branch", attack_steps=0),
    )  # fmt: skip
    assert [v.verdict for v in blind] == [v.verdict for v in found]


# --- planted faults --------------------------------------------------------------------------------------------------


def _wrong_sign(sign: Tensor, beta: Tensor) -> Tensor:
    return sign * beta


def _wild_slopes(region: Region, alpha: Tensor, beta: Tensor, *rest: Any) -> Any:
    return true_at(region, 2 * alpha - 0.5, beta, *rest)


def _one_half(signs: Tensor, picked: Tensor) -> Tensor:
    return true_split(signs, picked)[: len(signs)].repeat(2, 1)


def _of_sibling(root: Root, problems: Any) -> tuple[Tensor, Tensor]:
    return true_halves(root, replace(problems, sign=problems.sign.abs()))


@pytest.mark.parametrize(
    ("place", "name", "fault"),
    [
        (Region, "multiplier", staticmethod(_wrong_sign)),
        (Region, "at", _wild_slopes),
        (module, "split", _one_half),
        (splits, "halves", _of_sibling),
    ],
    ids=["wrong sign of beta", "slopes outside [0, 1]", "a forgotten half", "boxes of the sibling"],
)
def test_planted_faults_are_seen(place: Any, name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, name, fault)
    assert any("above" in line for line in faults(range(14)))  # up to the first


def above_attacked() -> bool:
    """Whether a bound of several samples' trees, which grow together, is above a margin that an attack finds."""
    model, batch = case(3)
    images = torch.rand(8, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = forward(model.graph, model.single, images).argmax(1)
    batch = Batch.of(images, labels, range(8), 0.2, (0.0, 1.0))
    found = outcomes(model, batch, Budget(nodes=40, seconds=math.inf))
    for other in range(3):
        target = torch.full_like(labels, other)
        points, _ = descend(model, batch, images, target, 40)
        logits = forward(model.graph, model.double, points.double())
        margins = logits.gather(1, labels[:, None]) - logits
        if bool((torch.stack([o.lower for o in found]) > margins + 1e-9).any()):
            return True
    return False


def test_another_parents_bounds_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # trees of falsified samples grow on, so that those of different margins grow side by side
    monkeypatch.setattr(module, "replays", lambda model, batch, points: torch.zeros(len(points), dtype=torch.bool))
    assert not above_attacked()
    monkeypatch.setattr(module, "inherited", lambda whole, lower: torch.maximum(whole.roll(1), lower))
    assert above_attacked()


@pytest.mark.parametrize("bounds", [(math.nan, 0.5), (0.5, math.nan), (math.nan, -0.5), (0.7, math.nan, 0.5)])
def test_a_half_without_a_bound_leaves_its_goal_unproved(bounds: tuple[float, ...]) -> None:
    tree = Tree(0, 0.0)
    for bound in bounds:
        tree.settle(0, bound)
    tree.settle(1, 0.25)
    assert math.isnan(tree.bounds()[0])
    assert tree.bounds()[1] == 0.25
    tree.keep(Node(-0.1, 1, 0, *[torch.zeros(1)] * 4, ()))
    assert math.isnan(tree.bounds()[0])  # nor does an open one beside it
