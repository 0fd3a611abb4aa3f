"""Verdicts as JSON, their summary, Wilson's interval, strict settings."""

import json

import pytest

from cactus_ray.config import parse, to_dict
from cactus_ray.errors import ConfigError, UserError
from cactus_ray.verification.verdict import SampleVerdict, Verdict, VerificationSettings, summary, wilson

CERTIFIED = SampleVerdict(3, 1, Verdict.CERTIFIED, 0.25, "ibp", 0.001, True)
FALSIFIED = SampleVerdict(4, 2, Verdict.FALSIFIED, None, "clean", 0.001, False, (0.1, 0.5))
UNKNOWN = SampleVerdict(5, 2, Verdict.UNKNOWN, -0.1, "bounds", 0.002, True)


@pytest.mark.parametrize("verdict", [CERTIFIED, FALSIFIED, UNKNOWN], ids=lambda v: v.verdict.value)
def test_verdicts_survive_json(verdict: SampleVerdict) -> None:
    plain = json.loads(json.dumps(verdict.to_json()))
    assert SampleVerdict.from_json(plain) == verdict
    assert ("counterexample" in plain) == (verdict is FALSIFIED)
    assert plain["verdict"] == verdict.verdict.name


@pytest.mark.parametrize(
    "change", [{"verdict": "PROBABLY"}, {"index": None}, {"lower_bound": "high"}, {"counterexample": 3}]
)
def test_broken_verdicts_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(UserError, match="not a sample's verdict"):
        SampleVerdict.from_json(CERTIFIED.to_json() | change)
    with pytest.raises(UserError, match="decided_by"):
        SampleVerdict.from_json({k: v for k, v in CERTIFIED.to_json().items() if k != "decided_by"})


def test_summary_counts_each_verdict_once() -> None:
    assert summary([CERTIFIED, FALSIFIED, UNKNOWN, CERTIFIED]) == {
        "samples": 4, "standard_accuracy": 0.75, "n_certified": 2, "n_falsified": 1, "n_unknown": 1,
        "certified_accuracy": 0.5,
    }  # fmt: skip
    with pytest.raises(ValueError, match="no verdicts"):
        summary([])


def test_wilson_against_published_values() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    low, high = wilson(500, 1000)
    assert (low, high) == pytest.approx((0.4691, 0.5309), abs=1e-4)
    for k, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="expected 0 <= k <= n"):
            wilson(k, n)


def test_settings_are_parsed_strictly() -> None:
    settings = parse(VerificationSettings, {"attack_steps": 10, "bound": "ibp", "seconds_per_sample": 2})
    assert (settings.attack_steps, settings.bound, settings.seconds_per_sample) == (10, "ibp", 2.0)
    assert parse(VerificationSettings, to_dict(settings)) == settings
    for bad in ({"bound": "exact"}, {"attack_steps": -1}, {"batch_size": 0}, {"seconds_per_sample": -1.0}, {"step": 1}):
        with pytest.raises(ConfigError):
            parse(VerificationSettings, bad)
