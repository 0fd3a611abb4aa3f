"""Auto-PGD: its schedule, its limits, and that a sample's attack does not depend on its neighbours."""

from dataclasses import replace

import pytest
import torch
from digits_subject import EPSILON, Subject
from torch import Tensor, nn

from cactus_ray.bounds.graph import forward
from cactus_ray.bounds.trace import trace
from cactus_ray.config import ThreatConfig
from cactus_ray.verification import stages
from cactus_ray.verification.attack import _Walk, attack, checkpoints, fell, targeted_attack
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.soundness import Batch, Model, margins_at, replays
from cactus_ray.verification.verdict import Verdict, VerificationSettings

SHARE = 0.7
"""Of the radius at which the subject was trained: few samples fall to a weak attack."""


@pytest.fixture(scope="module")
def model(subject: Subject) -> Model:
    return Model.of(subject.graph, subject.params)


@pytest.fixture(scope="module")
def batch(subject: Subject, model: Model) -> Batch:
    """Rightly classified images."""
    right = (forward(model.graph, model.single, subject.images).argmax(1) == subject.labels).nonzero()[:, 0]
    return Batch.of(subject.images, subject.labels, range(60), SHARE * EPSILON, (0.0, 1.0)).select(right.tolist())


def pursue(model: Model, batch: Batch, undecided: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    undecided = torch.ones(len(batch), 10, dtype=torch.bool) if undecided is None else undecided
    return targeted_attack(model, batch, batch.images, undecided, steps=10, runs=6, seed=seed)


def test_checkpoints_are_the_papers() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(10) == [3, 5, 6, 7, 8, 9, 10, 10]
    assert checkpoints(1)[0] == 1


def test_a_walk_that_is_stuck_goes_back_with_half_the_step() -> None:
    inputs = torch.zeros(2, 1, 1, 1)
    wide = Batch.of(inputs, torch.zeros(2, dtype=torch.int64), [0, 1], 1.0, (-100.0, 100.0))
    wide = replace(wide, lower=inputs - 100, upper=inputs + 100)
    walk = _Walk.at(inputs, 2.0)
    for step, losses in enumerate(([5.0, 5.0], [4.0, 6.0], [3.0, 7.0])):
        walk.see(torch.tensor(losses), -torch.ones_like(inputs))
        walk.move(wide, 0.75 if step else 1.0)
    walk.see(torch.tensor([2.0, 8.0]), -torch.ones_like(inputs))
    first = walk.x.clone()
    walk.look_back()
    assert walk.size.tolist() == [2.0, 1.0]  # the first sample's loss fell all the way
    assert walk.x[0] == first[0]
    assert (walk.x[1], walk.loss[1]) == (0.0, 5.0)
    assert walk.best.tolist() == [2.0, 5.0]


def test_points_are_admissible_replay_and_are_repeated(model: Model, batch: Batch) -> None:
    points, margins = pursue(model, batch)
    again, _ = pursue(model, batch)
    assert torch.equal(points, again)
    assert bool(((points >= batch.lower) & (points <= batch.upper)).all())
    start = margins_at(forward(model.graph, model.single, batch.images), batch.labels).amin(1)
    assert bool((margins <= start).all())
    assert torch.equal(replays(model, batch, points), fell(margins))
    other, _ = pursue(model, batch, seed=1)
    assert not torch.equal(points, other)


def test_it_finds_what_restarts_miss(model: Model, batch: Batch) -> None:
    """At equal steps, beside one run from the image that both have."""
    points, margins = attack(model, batch, steps=20, restarts=1, seed=0)
    _, restarted = attack(model, batch, steps=20, restarts=4, seed=0)
    undecided = torch.ones(len(batch), 10, dtype=torch.bool)
    _, pursued = targeted_attack(model, batch, points, undecided, steps=10, runs=6, seed=0)
    assert int(fell(pursued).sum()) >= int(fell(restarted).sum())
    assert bool((pursued <= margins).all())
    assert float(pursued.mean()) < float(margins.mean())


@pytest.mark.parametrize("size", [1, 7])
def test_a_sample_does_not_depend_on_its_neighbours(model: Model, batch: Batch, size: int) -> None:
    """Not even on when they fall: the first point that is clearly beyond 0 is kept."""
    points, margins = pursue(model, batch)
    for part in torch.split(torch.arange(len(batch)), size)[:: 8 if size == 1 else 1]:
        alone, alone_margins = pursue(model, batch.select(part.tolist()))
        assert torch.equal(fell(alone_margins), fell(margins[part]))
        assert float((alone_margins - margins[part]).abs().max()) < 1e-3
        assert float((alone - points[part]).abs().flatten(1).amax(1).median()) < 1e-6


def test_only_classes_that_bounds_leave_open_are_pursued(model: Model, batch: Batch) -> None:
    nothing = torch.zeros(len(batch), 10, dtype=torch.bool).scatter(1, batch.labels[:, None], True)
    points, margins = pursue(model, batch, nothing)
    assert torch.equal(points, batch.images)
    target = torch.full_like(batch.labels, 3)
    one = nothing.scatter(1, target[:, None], True)
    _, pushed = pursue(model, batch, one)
    moved = batch.labels != 3
    assert bool((pushed <= margins).all())
    assert bool((pushed < margins)[moved].any())
    assert torch.equal(pushed[~moved], margins[~moved])


@pytest.mark.parametrize("classes", [2, 3])
def test_networks_of_few_classes_are_attacked(classes: int) -> None:
    """The ratio of differences is constant there, so the margin itself is the loss."""
    generator = torch.Generator().manual_seed(4)
    graph, params = trace(nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes)), (1, 2, 2))
    params = {k: torch.randn(v.shape, generator=generator) for k, v in params.items()}
    few = Model.of(graph, params)
    images = torch.rand(6, 1, 2, 2, generator=generator)
    labels = forward(graph, few.single, images).argmax(1)
    batch = Batch.of(images, labels, range(6), 0.4, (0.0, 1.0))
    undecided = torch.ones(6, classes, dtype=torch.bool)
    start = margins_at(forward(graph, few.single, images), labels).amin(1)
    _, margins = targeted_attack(few, batch, images, undecided, steps=10, runs=2, seed=0)
    assert bool((margins < start - 0.1).all())


# --- in the cascade --------------------------------------------------------------------------------------------------


def test_the_cascade_pursues_what_bounds_leave_open(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = subject.graph, subject.params, subject.images, subject.labels, range(60), ThreatConfig(epsilon=EPSILON)
    weak = VerificationSettings(attack_steps=2, targeted_runs=0)
    before = verify(*inputs, weak)
    after = verify(*inputs, replace(weak, targeted_runs=40))
    for one, other in zip(before, after, strict=True):
        assert one.verdict is other.verdict or (one.verdict, other.verdict) == (Verdict.UNKNOWN, Verdict.FALSIFIED)
    assert sum(v.verdict is Verdict.FALSIFIED for v in after) > sum(v.verdict is Verdict.FALSIFIED for v in before)

    def astray(model: Model, batch: Batch, points: Tensor, *arguments: Tensor, **options: int) -> tuple[Tensor, Tensor]:
        wild = replace(batch, lower=batch.images - 1, upper=batch.images + 1)
        return attack(model, wild, steps=20, restarts=1, seed=0)

    monkeypatch.setattr(stages, "targeted_attack", astray)
    assert [v.verdict for v in verify(*inputs, replace(weak, targeted_runs=1))] == [v.verdict for v in before]
