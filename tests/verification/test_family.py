"""Verdicts on all roundings of a network at once: what they imply, and faults that show."""

import dataclasses
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from digits_subject import Subject as Digits
from torch import Tensor

from cactus_ray.bounds.graph import Params, forward
from cactus_ray.compression.family import Family, nearest, neighbours, outside, radii
from cactus_ray.config import ThreatConfig
from cactus_ray.errors import UserError
from cactus_ray.verification import cascade, family
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.family import FamilyVerdict, verify_family
from cactus_ray.verification.member import Member, Subject
from cactus_ray.verification.soundness import Batch, Model, SoundnessError, margins_at, replays
from cactus_ray.verification.verdict import SampleVerdict, Verdict, VerificationSettings

THREAT = ThreatConfig(epsilon=0.04)
QUICK = VerificationSettings(attack_steps=8, restarts=1)
HALF, ONE = Family(format="int8"), Family(format="int8", radius="one")
COARSE = Family(format="int4")
FIELDS = tuple(f.name for f in dataclasses.fields(SampleVerdict) if f.name != "seconds")


def run(subject: Digits, of: Family, settings: VerificationSettings = QUICK, threat: ThreatConfig = THREAT):  # type: ignore[no-untyped-def]
    indices = range(len(subject.labels))
    return verify_family(subject.graph, subject.params, subject.images, subject.labels, indices, threat, settings, of)


def alone(subject: Digits, params: Params, settings: VerificationSettings = QUICK) -> list[SampleVerdict]:
    indices = range(len(subject.labels))
    return verify(subject.graph, params, subject.images, subject.labels, indices, THREAT, settings)


@pytest.fixture(scope="module")
def found(subject: Digits) -> dict[Family, list[FamilyVerdict]]:
    return {of: run(subject, of) for of in (HALF, ONE, COARSE)}


def certified(verdicts: list[FamilyVerdict]) -> set[int]:
    return {v.sample.index for v in verdicts if v.sample.verdict is Verdict.CERTIFIED}


def test_all_three_verdicts_occur_and_agree_with_each_other(found: dict[Family, list[FamilyVerdict]]) -> None:
    assert {v.sample.verdict for v in found[HALF]} == set(Verdict)
    kinds = Counter(v.member.kind for vs in found.values() for v in vs if v.member is not None)
    assert set(kinds) == {"centre", "nearest", "grid", "corner"}
    assert certified(found[ONE]) < certified(found[HALF])
    for verdicts in found.values():
        for v in verdicts:
            assert (v.member is not None) == (v.sample.verdict is Verdict.FALSIFIED)
            assert (v.sample.counterexample is not None) == (v.sample.verdict is Verdict.FALSIFIED)
            if v.sample.verdict is Verdict.CERTIFIED:
                assert v.sample.lower_bound is not None
                assert v.sample.lower_bound > 0


def members(subject: Digits, of: Family) -> dict[str, Params]:
    """Networks that the family must hold, whatever the rule of rounding."""
    generator = torch.Generator().manual_seed(0)
    found = {"centre": subject.params, "nearest": nearest(subject.graph, subject.params, of)}
    wide = radii(subject.graph, subject.params, of)
    if of.radius == "one":
        down, up = neighbours(subject.graph, subject.params, of)
        found |= {"floor": {**subject.params, **down}, "ceil": {**subject.params, **up}}
        for i in range(2):
            chosen = {k: torch.where(torch.rand(v.shape, generator=generator) < 0.5, v, up[k]) for k, v in down.items()}
            found[f"random {i}"] = {**subject.params, **chosen}
    else:
        for i in range(3):
            noise = {k: (torch.rand(r.shape, generator=generator).double() * 2 - 1) * r for k, r in wide.items()}
            moved = {k: (subject.params[k].double() + 0.999 * n).float() for k, n in noise.items()}
            found[f"noise {i}"] = {**subject.params, **moved}
    for name, member in found.items():
        assert outside(subject.params, member, wide) == [], name
    return found


@pytest.mark.parametrize("of", [HALF, ONE], ids=str)
def test_a_family_implies_its_members(subject: Digits, found: dict[Family, list[FamilyVerdict]], of: Family) -> None:
    """The ordinary verifier certifies every one of them on every sample on which the family is certified."""
    whole = certified(found[of])
    assert len(whole) >= 5
    for name, params in members(subject, of).items():
        own = {v.index for v in alone(subject, params) if v.verdict is Verdict.CERTIFIED}
        assert own >= whole, name
        assert len(own) > len(whole)


def test_counterexamples_are_of_the_members_that_are_named(
    subject: Digits, found: dict[Family, list[FamilyVerdict]]
) -> None:
    for of, verdicts in found.items():
        around = Subject.of(subject.graph, subject.params, of)
        batch = Batch.of(subject.images, subject.labels, range(len(subject.labels)), THREAT.epsilon, THREAT.domain)
        grid = {k: {*v.unique().tolist()} for k, v in nearest(subject.graph, subject.params, of).items()}
        for i, v in enumerate(verdicts):
            if v.member is None or v.sample.decided_by == "clean":
                continue
            point = torch.tensor(v.sample.counterexample).view(subject.images[0].shape)
            weights = around.weights_of(v.member, point, v.sample.label)
            assert outside(subject.params, weights, around.radii) == []
            assert bool(replays(Model.of(subject.graph, weights), batch.select([i]), point[None])[0])
            if v.member.kind == "nearest":
                assert all({*weights[k].unique().tolist()} == grid[k] for k in around.radii)


def test_a_member_that_cannot_be_is_refused(subject: Digits) -> None:
    around, point = Subject.of(subject.graph, subject.params, HALF), subject.images[0]
    for wrong in (Member(kind="corner"), Member(kind="corner", other=3), Member(kind="grid", other=1)):
        with pytest.raises(ValueError, match="no member"):
            around.weights_of(wrong, point, 3)


def test_the_search_for_members_is_a_function_of_the_sample(subject: Digits, found: Any) -> None:
    again = run(subject, HALF, replace(QUICK, batch_size=7))
    for first, second in zip(found[HALF], again, strict=True):
        assert first.sample.verdict is second.sample.verdict
        assert first.member == second.member
    twice = run(subject, HALF)
    for first, second in zip(found[HALF], twice, strict=True):
        assert all(getattr(first.sample, f) == getattr(second.sample, f) for f in FIELDS)


def test_dearer_bounds_certify_more_and_no_member_contradicts(subject: Digits) -> None:
    threat = replace(THREAT, epsilon=0.06)
    counts, attacked = [], set()
    for bound in ("ibp", "crown", "alpha", "branch"):
        settings = replace(QUICK, bound=bound, max_nodes=60)
        verdicts = run(subject, HALF, settings, threat)
        counts.append(len(certified(verdicts)))
        attacked.update(certified(verdicts))
    assert counts == sorted(counts)
    assert counts[0] < counts[1] < counts[2]
    for index in sorted(attacked):
        _attack_members(subject, HALF, index, threat)


def _attack_members(subject: Digits, of: Family, index: int, threat: ThreatConfig) -> None:
    """Corners of weights against corners of the ball do not lower the margin below 0."""
    around = Subject.of(subject.graph, subject.params, of)
    batch = Batch.of(subject.images, subject.labels, range(60), threat.epsilon, threat.domain).select([index])
    label = int(batch.labels)
    for other in (o for o in range(10) if o != label):
        x = batch.images[0]
        for _ in range(3):
            weights = around.weights_of(Member(kind="corner", other=other), x, label)
            x = x.detach().requires_grad_()
            logits = forward(subject.graph, weights, x[None])[0]
            (slope,) = torch.autograd.grad(logits[label] - logits[other], x)
            x = torch.where(slope > 0, batch.lower[0], batch.upper[0])
        with torch.no_grad():
            assert float(margins_at(forward(subject.graph, weights, x[None]), batch.labels).min()) > 0


# --- faults, and what is not understood ------------------------------------------------------------------------------


def scaled(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """The cascade gets other radii than members have."""
    true = cascade.verify

    def wrong(*arguments: Any, radii: Params) -> list[SampleVerdict]:
        return true(*arguments, radii={k: share * r for k, r in radii.items()})

    monkeypatch.setattr(family, "verify", wrong)


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_radii_that_are_too_small_are_contradicted(
    subject: Digits, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    scaled(monkeypatch, share)
    with pytest.raises(SoundnessError, match=r"int4 \+- half step, (nearest|corner)"):
        run(subject, COARSE)


def test_bounds_that_are_too_good_are_contradicted(subject: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    def proved(*arguments: Any, radii: Params) -> list[SampleVerdict]:
        found = cascade.verify(*arguments, radii=radii)
        return [v if v.verdict is not Verdict.UNKNOWN else replace(v, verdict=Verdict.CERTIFIED) for v in found]

    monkeypatch.setattr(family, "verify", proved)
    with pytest.raises(SoundnessError):
        run(subject, HALF)


def test_nothing_is_proved_of_weights_that_are_not_numbers(subject: Digits) -> None:
    for value in (math.nan, math.inf):
        params = {k: v.clone() for k, v in subject.params.items()}
        next(iter(params.values())).view(-1)[0] = value
        broken = replace(subject, params=params)
        assert {v.sample.verdict for v in run(broken, HALF)} == {Verdict.UNKNOWN}


def test_out_of_memory_in_an_attack_on_members_decides_nothing(
    subject: Digits, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(*arguments: Any) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(family, "steer", hungry)
    verdicts = run(subject, HALF)
    assert certified(verdicts) == certified(found[HALF])
    assert {v.member.kind for v in verdicts if v.member is not None} == {"centre"}


def test_without_attacks_only_bounds_speak(subject: Digits, found: Any) -> None:
    verdicts = run(subject, HALF, replace(QUICK, attack_steps=0))
    assert certified(verdicts) == certified(found[HALF])
    assert {v.sample.decided_by for v in verdicts if v.sample.verdict is Verdict.FALSIFIED} == {"clean"}


def test_an_engine_that_does_not_know_families_is_refused(subject: Digits) -> None:
    with pytest.raises(UserError, match="engine cactus"):
        run(subject, HALF, replace(QUICK, engine="auto_lirpa", arithmetic="real"))


def test_fixed_zeros_certify_more_of_a_pruned_network(subject: Digits) -> None:
    params = {k: v * (v.abs() > 0.05) if k.endswith("weight") else v for k, v in subject.params.items()}
    pruned = replace(subject, params=params)
    free, fixed = (run(pruned, replace(HALF, zeros=z), replace(QUICK, attack_steps=2)) for z in ("free", "fixed"))
    assert certified(free) < certified(fixed)
