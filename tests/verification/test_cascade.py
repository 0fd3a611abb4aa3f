"""The cascade: right verdicts whatever happens to its parts."""

import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from digits_subject import EPSILON, Subject
from torch import Tensor, nn

from cactus_ray.bounds import interval, linear
from cactus_ray.bounds.graph import forward
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.trace import trace
from cactus_ray.config import ThreatConfig
from cactus_ray.errors import UserError
from cactus_ray.verification import soundness, stages, work
from cactus_ray.verification.attack import attack
from cactus_ray.verification.cascade import SoundnessError, VerificationSettings, verify
from cactus_ray.verification.soundness import Batch, Model
from cactus_ray.verification.verdict import SampleVerdict, Verdict

THREAT = ThreatConfig(epsilon=EPSILON)
QUICK = VerificationSettings(attack_steps=8, restarts=1)
true_margins, true_crown, true_attack = interval.margins, linear.crown_margins, stages.attack


def run(subject: Subject, settings: VerificationSettings = QUICK, **options: Any) -> list[SampleVerdict]:
    return verify(
        subject.graph,
        subject.params,
        subject.images,
        subject.labels,
        range(len(subject.labels)),
        THREAT,
        settings,
        **options,
    )


def kinds(verdicts: Iterable[SampleVerdict]) -> list[tuple[int, str, str]]:
    return [(v.index, v.verdict.value, v.decided_by) for v in verdicts]


@pytest.fixture(scope="module")
def verdicts(subject: Subject) -> list[SampleVerdict]:
    return run(subject, VerificationSettings())


def test_every_stage_decides_something(verdicts: list[SampleVerdict]) -> None:
    assert {v.decided_by for v in verdicts} >= {"clean", "attack", "ibp", "crown"}
    for v in verdicts:
        if v.verdict is Verdict.CERTIFIED:
            assert v.lower_bound is not None
            assert v.lower_bound > 0
            assert v.correct
        elif v.verdict is Verdict.UNKNOWN:
            assert v.decided_by == "bounds"
            assert v.lower_bound is not None
            assert v.lower_bound <= 0
        assert (v.counterexample is None) == (v.verdict is not Verdict.FALSIFIED)
        assert v.correct == (v.decided_by != "clean")
        assert v.seconds > 0


def test_no_certified_sample_falls_to_a_strong_attack(subject: Subject, verdicts: list[SampleVerdict]) -> None:
    chosen = [v.index for v in verdicts if v.verdict is Verdict.CERTIFIED]
    model = Model.of(subject.graph, subject.params)
    batch = Batch.of(subject.images, subject.labels, range(60), EPSILON, (0.0, 1.0)).select(chosen)
    _, margins = attack(model, batch, steps=100, restarts=6, seed=99)
    assert bool((margins > 0).all())
    bounds = torch.tensor([verdicts[i].lower_bound for i in chosen])
    assert bool((margins.double() >= bounds - 1e-4).all())


def test_counterexamples_replay(subject: Subject, verdicts: list[SampleVerdict]) -> None:
    falsified = [v for v in verdicts if v.verdict is Verdict.FALSIFIED]
    for v in falsified:
        assert v.counterexample is not None
        point = torch.tensor(v.counterexample, dtype=torch.float32).view(1, 1, 8, 8)
        distance = (point.double() - subject.images[v.index].double()).abs().max()
        assert float(distance) <= EPSILON
        assert 0 <= float(point.min()) <= float(point.max()) <= 1
        assert int(forward(subject.graph, subject.params, point).argmax()) != v.label


@pytest.mark.parametrize("size", [1, 7, 60])
def test_verdicts_do_not_depend_on_batches(subject: Subject, verdicts: list[SampleVerdict], size: int) -> None:
    settings = VerificationSettings(batch_size=size)
    order = list(range(0, 60, 2 if size == 1 else 1))[::-1]
    other = verify(subject.graph, subject.params, subject.images[order], subject.labels[order], order, THREAT, settings)
    assert sorted(kinds(other)) == sorted(kinds(verdicts[i] for i in order))
    for v in other:
        if v.lower_bound is not None:
            assert v.lower_bound == pytest.approx(verdicts[v.index].lower_bound, abs=1e-9)


def test_interval_bounds_alone(subject: Subject, verdicts: list[SampleVerdict]) -> None:
    weaker = run(subject, VerificationSettings(bound="ibp"))
    expected = {v.index for v in verdicts if v.decided_by == "ibp"}
    assert {v.index for v in weaker if v.verdict is Verdict.CERTIFIED} == expected


def test_without_an_attack(subject: Subject, verdicts: list[SampleVerdict]) -> None:
    blind = run(subject, VerificationSettings(attack_steps=0))
    certified = [v.index for v in verdicts if v.verdict is Verdict.CERTIFIED]
    assert [v.index for v in blind if v.verdict is Verdict.CERTIFIED] == certified
    assert {v.decided_by for v in blind if v.verdict is Verdict.FALSIFIED} == {"clean"}


def test_radius_zero_certifies_what_is_right(subject: Subject) -> None:
    found = verify(
        subject.graph, subject.params, subject.images, subject.labels, range(60), ThreatConfig(epsilon=0.0), QUICK
    )
    assert all((v.verdict is Verdict.CERTIFIED) == v.correct for v in found)


def test_known_counterexamples_are_tried_first(subject: Subject, verdicts: list[SampleVerdict]) -> None:
    fallen = [v for v in verdicts if v.decided_by == "attack"]
    known = {v.index: [torch.zeros(1, 8, 8), torch.tensor(v.counterexample).view(1, 8, 8)] for v in fallen}
    found = run(subject, VerificationSettings(attack_steps=0), known=known)
    assert {v.index for v in found if v.decided_by == "known"} == {v.index for v in fallen}


def test_a_time_limit_leaves_samples_unknown(subject: Subject) -> None:
    found = run(subject, replace(QUICK, seconds_per_sample=1e-9))
    assert {(v.verdict, v.decided_by) for v in found} == {
        (Verdict.FALSIFIED, "clean"),
        (Verdict.UNKNOWN, "time"),
    }
    assert kinds(run(subject, replace(QUICK, seconds_per_sample=1e6))) == kinds(run(subject))


def test_a_tie_is_neither_certified_nor_falsified() -> None:
    graph, params = trace(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2))
    params = {k: torch.zeros_like(v) for k, v in params.items()}
    images, labels = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 1])
    tie, wrong = verify(graph, params, images, labels, [0, 1], THREAT, QUICK)
    assert (tie.verdict, tie.correct) == (Verdict.UNKNOWN, True)
    assert (wrong.verdict, wrong.decided_by, wrong.correct) == (Verdict.FALSIFIED, "clean", False)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_batches_halve_until_they_fit(subject: Subject, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = kinds(run(subject))
    sizes: list[int] = []

    def small(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(graph: Any, params: Any, box: Box, labels: Tensor, **options: Any) -> Tensor:
            sizes.append(len(labels))
            if len(labels) > 3:
                raise error
            return function(graph, params, box, labels, **options)

        return call

    monkeypatch.setattr(interval, "margins", small(true_margins))
    monkeypatch.setattr(linear, "crown_margins", small(true_crown))
    assert kinds(run(subject)) == expected
    assert max(sizes) > 3


def test_a_sample_that_never_fits_is_unknown(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(QUICK, targeted_runs=0)  # these runs come after CROWN
    expected = run(subject, settings)

    def never(*arguments: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(linear, "crown_margins", never)
    for before, after in zip(expected, run(subject, settings), strict=True):
        if before.decided_by in ("crown", "bounds"):
            assert (after.verdict, after.decided_by) == (Verdict.UNKNOWN, "out_of_memory")
        else:
            assert kinds([after]) == kinds([before])


def test_other_errors_are_not_swallowed(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(interval, "margins", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(subject)


# --- NaN -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "3.weight", "5.bias"])
def test_weights_that_are_not_finite_certify_nothing(subject: Subject, name: str, value: float) -> None:
    params = {k: v.clone() for k, v in subject.params.items()}
    params[name].view(-1)[0] = value
    for v in run(replace(subject, params=params)):
        assert (v.verdict, v.decided_by) == (Verdict.UNKNOWN, "non_finite")
        assert v.lower_bound is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_margins_that_are_not_finite_prove_nothing(
    subject: Subject, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        interval, "margins", lambda g, p, box, labels, **o: torch.full((len(labels), 10), value).double()
    )
    found = run(subject, replace(QUICK, bound="ibp"))
    assert Verdict.CERTIFIED not in {v.verdict for v in found}
    assert all(v.lower_bound is None for v in found)


def test_a_cascade_that_reads_nan_as_proved_would_be_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault of the test above: the wrong comparison does certify."""
    monkeypatch.setattr(work, "proved", lambda lower, labels: ~(lower < 0).any(1))
    monkeypatch.setattr(
        interval, "margins", lambda g, p, box, labels, **o: torch.full((len(labels), 10), math.nan).double()
    )
    assert Verdict.CERTIFIED in {v.verdict for v in run(subject)}


# --- unsound parts ---------------------------------------------------------------------------------------------------


def test_a_bound_that_certifies_wrongly_is_an_error(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interval, "margins", lambda g, p, box, labels, **o: torch.ones(len(labels), 10).double())
    with pytest.raises(SoundnessError, match="unsound ibp bound") as caught:
        run(subject)
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error) == str(caught.value)
    assert error.bound == 1.0
    assert error.margin < 1.0
    logits = forward(subject.graph, subject.params, error.point[None])[0]
    assert float(logits[error.label] - logits[error.other]) == pytest.approx(error.margin, abs=1e-4)


def test_a_crown_that_certifies_wrongly_is_an_error(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        linear, "crown_margins", lambda g, p, box, labels, **o: true_crown(g, p, box, labels, **o) + 9.0
    )
    with pytest.raises(SoundnessError, match="unsound crown bound"):
        run(subject)


def test_a_bound_above_an_attacked_margin_is_an_error_even_if_nothing_falls(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only robust samples: the claimed margin is wrong although the verdict would be right."""
    robust = [v.index for v in run(subject) if v.decided_by == "ibp"]
    part = replace(subject, images=subject.images[robust], labels=subject.labels[robust])

    def optimistic(graph: Any, params: Any, box: Box, labels: Tensor, **options: Any) -> Tensor:
        return true_margins(graph, params, Box(box.center, box.radius * 0.2), labels, **options)

    monkeypatch.setattr(interval, "margins", optimistic)
    with pytest.raises(SoundnessError, match="unsound ibp bound"):
        run(part)


def test_a_certificate_of_a_falsified_sample_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that an attack falsified are still bounded by intervals, and the bound is held against the attack."""
    fallen = [v.index for v in run(subject) if v.decided_by == "attack"]
    part = replace(subject, images=subject.images[fallen], labels=subject.labels[fallen])
    monkeypatch.setattr(
        interval, "margins", lambda g, p, box, labels, **o: torch.full((len(labels), 10), 1e-3).double()
    )
    with pytest.raises(SoundnessError):
        run(part)


def test_an_attack_that_leaves_the_ball_or_the_domain_falsifies_nothing(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(QUICK, bound="ibp")
    monkeypatch.setattr(
        interval, "margins", lambda g, p, box, labels, **o: torch.full((len(labels), 10), -1e3).double()
    )

    def astray(model: Model, batch: Batch, **options: Any) -> tuple[Tensor, Tensor]:
        wild = replace(batch, lower=batch.images - 0.5, upper=batch.images + 0.5, epsilon=0.5)
        points, margins = true_attack(model, wild, **options)
        assert bool((margins < 0).any())
        return points, margins

    monkeypatch.setattr(stages, "attack", astray)
    assert {v.decided_by for v in run(subject, settings)} == {"clean", "bounds"}
    monkeypatch.setattr(
        work, "replays", lambda model, batch, points: soundness.replays(model, replace(batch, epsilon=9.0), points)
    )
    inside_domain_only = Counter(v.decided_by for v in run(subject, settings))
    monkeypatch.setattr(
        work,
        "replays",
        lambda model, batch, points: soundness.replays(model, replace(batch, epsilon=9.0, domain=(-9.0, 9.0)), points),
    )
    assert Counter(v.decided_by for v in run(subject, settings))["attack"] > inside_domain_only["attack"]


# --- input -----------------------------------------------------------------------------------------------------------


def test_images_that_do_not_fit_are_refused(subject: Subject) -> None:
    def check(images: Tensor, labels: Tensor = subject.labels[:2], threat: ThreatConfig = THREAT) -> None:
        verify(subject.graph, subject.params, images, labels, [0, 1], threat, QUICK)

    with pytest.raises(UserError, match="float64"):
        check(subject.images[:2].double())
    with pytest.raises(UserError, match="network's input"):
        check(torch.zeros(2, 1, 9, 9))
    with pytest.raises(UserError, match=r"threat.domain \[0.0, 0.5\]"):
        check(subject.images[:2], threat=ThreatConfig(epsilon=0.1, domain=(0.0, 0.5)))
    with pytest.raises(UserError, match="image 0"):
        check(torch.full((2, 1, 8, 8), math.nan))
    with pytest.raises(ValueError, match="as many of each"):
        check(subject.images[:2], subject.labels[:1])


def test_no_samples_no_verdicts(subject: Subject) -> None:
    assert verify(subject.graph, subject.params, subject.images[:0], subject.labels[:0], [], THREAT, QUICK) == []
