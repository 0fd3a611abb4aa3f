"""Balls that are exact in float32, exact arithmetic, memory errors, attacks."""

import pytest
import torch
from conftest import EPSILON, Subject
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_ray.verification.attack import attack, sample_generators
from cactus_ray.verification.soundness import (
    Batch,
    Model,
    ball_points,
    exact_arithmetic,
    halving,
    is_out_of_memory,
    margins_at,
    proved,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(pixel=st.floats(0, 1, width=32), epsilon=st.floats(0, 1), share=st.floats(0, 1))
def test_every_point_between_the_limits_is_admissible(pixel: float, epsilon: float, share: float) -> None:
    images = torch.full((1, 1, 1, 1), pixel)
    batch = Batch.of(images, torch.zeros(1, dtype=torch.int64), [0], epsilon, (0.0, 1.0))
    assert float(batch.lower) <= pixel <= float(batch.upper)
    for point in (batch.lower, batch.upper):
        assert abs(float(point) - pixel) <= epsilon
        assert 0 <= float(point) <= 1
    outward = torch.nextafter(batch.upper, torch.tensor(torch.inf))
    assert float(outward) > 1 or float(outward) - pixel > epsilon * (1 - 1e-12)  # nothing is given away


def test_sampled_points_lie_in_the_ball() -> None:
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    batch = Batch.of(images, torch.zeros(3, dtype=torch.int64), [5, 6, 7], 0.1, (0.0, 1.0))
    points = list(ball_points(batch, sample_generators(0, batch.indices, "x"), 3))
    assert len(points) == 6
    for point in points:
        assert bool(((point >= batch.lower) & (point <= batch.upper)).all())
    alone = list(ball_points(batch.select([1]), sample_generators(0, [6], "x"), 3))
    assert all(torch.equal(a[0], p[1]) for a, p in zip(alone, points, strict=True))


def test_margins_leave_out_the_label() -> None:
    logits, labels = torch.tensor([[1.0, 3.0, 2.0], [1.0, 0.0, 0.0]]), torch.tensor([1, 0])
    assert margins_at(logits, labels).amin(1).tolist() == [1.0, 1.0]
    lower = torch.tensor([[0.5, 0.0, 0.1], [0.0, 0.1, torch.nan], [0.0, 1.0, 0.0], [0.0, torch.inf, 1.0]])
    assert proved(lower, torch.tensor([1, 0, 0, 0])).tolist() == [True, False, False, False]


def test_exact_arithmetic_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    a = torch.rand(4, 4)

    def fails() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16), exact_arithmetic(torch.device("cpu")):
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.backends.cuda.matmul.allow_tf32
            assert (a @ a).dtype is torch.float32
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fails()
    assert torch.backends.cudnn.allow_tf32


def test_halving_visits_every_position_once() -> None:
    done: list[int] = []

    def work(positions: list[int]) -> None:
        if len(positions) > 2 or 5 in positions:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(positions)

    assert halving(work, list(range(9))) == [5]
    assert sorted(done) == [0, 1, 2, 3, 4, 6, 7, 8]
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))


def test_attacks_are_deterministic_and_stay_inside(subject: Subject) -> None:
    model = Model.of(subject.graph, subject.params)
    batch = Batch.of(subject.images[:12], subject.labels[:12], range(12), EPSILON, (0.0, 1.0))
    points, margins = attack(model, batch, steps=10, restarts=3, seed=1)
    again, _ = attack(model, batch, steps=10, restarts=3, seed=1)
    assert torch.equal(points, again)
    assert bool(((points >= batch.lower) & (points <= batch.upper)).all())
    clean = margins_at(subject_logits(subject, batch), batch.labels).amin(1)
    assert bool((margins <= clean).all())
    more = attack(model, batch, steps=40, restarts=5, seed=1)[1]
    assert float(more.mean()) < float(margins.clamp(min=-1).mean()) + 0.2


def subject_logits(subject: Subject, batch: Batch) -> torch.Tensor:
    from cactus_ray.bounds.graph import forward

    return forward(subject.graph, subject.params, batch.images)


def test_random_numbers_depend_on_the_sample_only() -> None:
    first, second = (sample_generators(3, indices, "attack") for indices in ([4, 9], [9]))
    assert torch.equal(torch.rand(5, generator=first[1]), torch.rand(5, generator=second[0]))
    other = [torch.rand(5, generator=g).tolist() for g in sample_generators(4, [4, 9], "attack")]
    assert other[0] != other[1]
