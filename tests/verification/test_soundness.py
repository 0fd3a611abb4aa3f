"""Balls that are exact in float32, exact arithmetic, memory errors, attacks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from digits_subject import EPSILON, Subject
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_ray.verification.attack import attack, sample_generators
from cactus_ray.verification.soundness import (
    Batch,
    Model,
    ball_points,
    halving,
    is_out_of_memory,
    margins_at,
    proved,
)

ROOT = Path(__file__).parents[2]


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


SWITCHES = {
    "as torch starts": "",
    "older": "torch.backends.cuda.matmul.allow_tf32 = True",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "newer": "torch.backends.fp32_precision = 'tf32'",
    "newer, one backend": "torch.backends.mkldnn.conv.fp32_precision = 'bf16'",
}
CHECK = """
import json, os, sys, traceback, warnings
import torch
from cactus_ray.bounds.exact import exact_arithmetic
backends = torch.backends
names = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv")
def state():
    # none: torch's default, which is ieee
    return [eval(f"backends.{name}.fp32_precision").replace("none", "ieee") for name in names]
def check(change):
    warnings.simplefilter("error")
    exec(change)
    before = state()
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), exact_arithmetic(torch.device("cpu")):
            assert set(state()) == {"ieee"}, state()
            assert (torch.ones(4, 4) @ torch.ones(4, 4)).dtype is torch.float32
            raise ValueError("inside")
    except ValueError:
        pass
    assert state() == before, (before, state())
wrong = {}
for name, change in json.loads(sys.argv[1]).items():
    reads, writes = os.pipe()
    if os.fork() == 0:
        try:
            check(change)
        except BaseException:
            os.write(writes, traceback.format_exc().encode())
        os.write(writes, b"end")
        os._exit(0)
    os.close(writes)
    with open(reads) as pipe:
        wrong[name] = pipe.read()
print(json.dumps(wrong))
"""


@pytest.fixture(scope="module")
def wrong() -> dict[str, str]:
    """What is wrong after each of the switches ("end": nothing).

    Each in a process of its own, because torch does not forget that a switch was touched; they are forks of one that
    has imported torch and used nothing of it.
    """
    command = [sys.executable, "-c", CHECK, json.dumps(SWITCHES)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 has the older switches only"
)
def test_short_products_are_off_and_restored(name: str, wrong: dict[str, str]) -> None:
    assert wrong[name] == "end"


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
