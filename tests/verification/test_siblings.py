"""Levels of one network verified together: as good as apart, and never fooled by what they share."""

import pytest
import torch
from digits_subject import EPSILON, Subject

from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import materialize
from cactus_ray.config import ThreatConfig
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.siblings import LevelModel, verify_levels
from cactus_ray.verification.verdict import SampleVerdict, Verdict, VerificationSettings

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


@pytest.mark.parametrize("bound", ["ibp", "crown"])
def test_together_is_as_good_as_apart(subject: Subject, levels: dict[str, LevelModel], bound: str) -> None:
    settings = VerificationSettings(bound=bound, attack_steps=8, restarts=1)
    inputs = subject.images, subject.labels, range(len(subject.labels)), THREAT, settings
    together = verify_levels(levels, *inputs)
    assert list(together) == list(levels)
    for name, separate in apart(levels, subject, settings).items():
        for one, other in zip(together[name], separate, strict=True):
            assert (one.index, one.label, one.correct) == (other.index, other.label, other.correct)
            assert one.verdict is other.verdict or other.verdict is Verdict.UNKNOWN
    assert any(v.decided_by == "known" for name in NAMES[1:] for v in together[name])


def test_false_counterexamples_change_nothing(subject: Subject, levels: dict[str, LevelModel]) -> None:
    settings = VerificationSettings(attack_steps=8, restarts=1)
    inputs = subject.images, subject.labels, range(len(subject.labels)), THREAT, settings
    wild = {i: [torch.full((1, 8, 8), torch.nan), torch.zeros(64), subject.images[i] + 9.0] for i in range(60)}
    assert [[v.verdict for v in some] for some in verify_levels(levels, *inputs, known=wild).values()] == [
        [v.verdict for v in some] for some in verify_levels(levels, *inputs).values()
    ]
