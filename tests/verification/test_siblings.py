"""Levels of one network verified together: as good as apart, and never fooled by what they share."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from digits_subject import EPSILON, Subject
from torch import Tensor

from cactus_ray.bounds import interval
from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import materialize
from cactus_ray.config import ThreatConfig
from cactus_ray.verification import stages
from cactus_ray.verification import work as work_module
from cactus_ray.verification.attack import attack
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.hints import Hint, Hints
from cactus_ray.verification.siblings import LevelModel, verify_levels
from cactus_ray.verification.soundness import Batch, Model, SoundnessError, replays
from cactus_ray.verification.verdict import SampleVerdict, Verdict, VerificationSettings
from cactus_ray.verification.work import Work

THREAT = ThreatConfig(epsilon=EPSILON)
NAMES = ("dense", "int4", "prune:gu-l1:0.7", "prune:gs-l2:0.5+int8")


@pytest.fixture(scope="module")
def levels(subject: Subject) -> dict[str, LevelModel]:
    """Quantised, pruned, and with channels removed, so that the shapes inside differ."""
    found = {}
    for name in NAMES:
        compressed = materialize(subject.graph, subject.params, parse_level(name))
        found[name] = LevelModel(compressed.graph, compressed.params)
    return found


def apart(
    levels: dict[str, LevelModel], subject: Subject, settings: VerificationSettings
) -> dict[str, list[SampleVerdict]]:
    inputs = subject.images, subject.labels, range(len(subject.labels)), THREAT, settings
    return {name: verify(level.graph, level.params, *inputs) for name, level in levels.items()}


@pytest.mark.parametrize("bound", ["ibp", "crown", "branch"])
def test_together_is_as_good_as_apart(subject: Subject, levels: dict[str, LevelModel], bound: str) -> None:
    settings = VerificationSettings(bound=bound, attack_steps=8, alpha_iterations=5)
    inputs = subject.images, subject.labels, range(len(subject.labels)), THREAT, settings
    together = verify_levels(levels, *inputs)
    assert list(together) == list(levels)
    for name, separate in apart(levels, subject, settings).items():
        for one, other in zip(together[name], separate, strict=True):
            assert (one.index, one.label, one.correct) == (other.index, other.label, other.correct)
            assert one.verdict is other.verdict or other.verdict is Verdict.UNKNOWN
    assert any(v.decided_by == "known" for name in NAMES[1:] for v in together[name])


def test_false_counterexamples_change_nothing(subject: Subject, levels: dict[str, LevelModel]) -> None:
    settings = VerificationSettings(attack_steps=8)
    inputs = subject.images, subject.labels, range(len(subject.labels)), THREAT, settings
    wild = {i: [torch.full((1, 8, 8), torch.nan), torch.zeros(64), subject.images[i] + 9.0] for i in range(60)}
    assert [[v.verdict for v in some] for some in verify_levels(levels, *inputs, known=wild).values()] == [
        [v.verdict for v in some] for some in verify_levels(levels, *inputs).values()
    ]


# --- hints that are wrong --------------------------------------------------------------------------------------------


def wild_hints(subject: Subject) -> dict[str, Hints]:
    """What no level would leave, for every sample."""
    generator = torch.Generator().manual_seed(1)
    nearest = {
        "nan": torch.full((1, 8, 8), torch.nan),
        "infinite": torch.full((1, 8, 8), -torch.inf),
        "far outside": torch.full((1, 8, 8), 1e30),
        "another sample": subject.images[7],
        "noise": torch.rand(1, 8, 8, generator=generator),
        "nothing": None,
    }
    return {name: {i: Hint(point, certified=True) for i in range(60)} for name, point in nearest.items()}


def faults(subject: Subject, level: LevelModel, verdicts: list[SampleVerdict]) -> list[str]:
    """What is wrong about verdicts, by a strong attack and by evaluating counterexamples anew."""
    model = Model.of(level.graph, level.params)
    batch = Batch.of(subject.images, subject.labels, range(60), EPSILON, (0.0, 1.0))
    points, _ = attack(model, batch, steps=60, restarts=4, seed=5)
    falls = replays(model, batch, points)
    found = [f"{v.index}: certified, but falls" for v in verdicts if v.verdict is Verdict.CERTIFIED and falls[v.index]]
    for v in verdicts:
        if v.verdict is Verdict.FALSIFIED:
            point = torch.tensor(v.counterexample, dtype=torch.float32).view(1, 1, 8, 8)
            right = int(forward(level.graph, level.params, point).argmax()) == v.label
            far = float((point.double() - subject.images[v.index].double()).abs().max()) > EPSILON
            found += [f"{v.index}: its counterexample is none"] if right or far else []
    return found


@pytest.mark.parametrize("name", ["nan", "infinite", "far outside", "another sample", "noise", "nothing"])
def test_wrong_hints_turn_no_verdict_wrong(subject: Subject, levels: dict[str, LevelModel], name: str) -> None:
    """Points that are nowhere near, and every sample called certified."""
    level, settings = levels["int4"], VerificationSettings(bound="alpha", attack_steps=20, alpha_iterations=5)
    inputs = level.graph, level.params, subject.images, subject.labels, range(60), THREAT, settings
    misled, alone = verify(*inputs, hints=wild_hints(subject)[name]), verify(*inputs)
    assert faults(subject, level, misled) == []
    assert [v.verdict for v in misled] == [v.verdict for v in alone]


@pytest.mark.parametrize("fault", ["hints are believed", "points are believed"])
def test_a_cascade_that_believes_hints_would_be_seen(
    subject: Subject, levels: dict[str, LevelModel], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted faults of the test above."""

    def believe(work: Work, positions: list[int]) -> None:
        for position in positions:
            if work.hinted(position).certified:
                work.decide(position, Verdict.CERTIFIED, "hint")

    if fault == "hints are believed":
        monkeypatch.setattr(stages, "nearest_points", believe)
    else:
        monkeypatch.setattr(work_module, "replays", lambda m, b, points: torch.ones(len(points), dtype=torch.bool))
    level, settings = levels["int4"], VerificationSettings(bound="crown", attack_steps=4)
    inputs = level.graph, level.params, subject.images, subject.labels, range(60), THREAT, settings
    assert faults(subject, level, verify(*inputs, hints=wild_hints(subject)["another sample"])) != []


def test_an_unsound_bound_is_seen_although_another_level_was_attacked(
    subject: Subject, levels: dict[str, LevelModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first level's points stand for the second one's first attack; its bounds are held against them."""
    true = interval.margins

    def unsound(graph: Graph, params: Params, *inputs: Any, **options: Any) -> Tensor:
        lower = true(graph, params, *inputs, **options)
        quantised = torch.equal(params["0.weight"].float(), levels["int4"].params["0.weight"])
        return lower + 9.0 if quantised else lower

    monkeypatch.setattr(interval, "margins", unsound)
    settings = VerificationSettings(attack_steps=8)
    some = {name: levels[name] for name in ("dense", "int4")}
    with pytest.raises(SoundnessError):
        verify_levels(some, subject.images, subject.labels, range(60), THREAT, settings)


def test_the_order_of_levels_and_batches_is_the_same_every_time(
    subject: Subject, levels: dict[str, LevelModel]
) -> None:
    settings = VerificationSettings(attack_steps=8)
    inputs = subject.images, subject.labels, range(60), THREAT
    first, second = (verify_levels(levels, *inputs, settings) for _ in range(2))
    small = verify_levels(levels, *inputs, replace(settings, batch_size=17))
    for name in levels:
        for one, other, third in zip(first[name], second[name], small[name], strict=True):
            assert replace(one, seconds=0.0) == replace(other, seconds=0.0)
            assert (one.verdict, one.decided_by) == (third.verdict, third.decided_by)
