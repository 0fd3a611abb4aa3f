"""Which point is chosen, how the choice is explained, and how sizes and fractions are read."""

from typing import Any

import pytest

from cactus_ray.deploy.pick import NothingFits, Requirements, choose
from cactus_ray.deploy.requirements import parse_fraction, parse_size, show, unmet
from cactus_ray.errors import ConfigError, UserError


def point(trial: str, level: str, certified: float, standard: float, size: int, **more: Any) -> dict[str, Any]:
    figures = {"certified_accuracy": certified, "standard_accuracy": standard, "bytes": size}
    return {"trial": trial, "level": level, "split": "selection", **figures, **more}


POINTS = [
    point("t0001", "dense", 0.90, 0.97, 100_000),
    point("t0001", "int8", 0.88, 0.96, 30_000),
    point("t0001", "int4", 0.70, 0.90, 16_000),
    point("t0002", "dense", 0.92, 0.94, 100_000),
    point("t0002", "int8", 0.86, 0.93, 30_000),
    point("t0002", "int4", 0.84, 0.91, 16_000),
]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("40k", 40_000), ("40kB", 40_000), ("40 kB", 40_000), ("40K", 40_000), ("1.5M", 1_500_000), ("40000", 40_000),
        ("0.3k", 300), (".5M", 500_000), ("2GB", 2_000_000_000), ("17b", 17), (40_000, 40_000), ("1.2345k", 1_234),
    ],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "-40k", "40KiB", "40q", "1e5", "nan", "0", "0.0001k", "4 0k", "inf", True])
def test_bad_sizes_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--max-bytes: got .*k = 1,000 bytes"):
        parse_size(text)


@pytest.mark.parametrize(("text", "value"), [("0.8", 0.8), ("80%", 0.8), ("1", 1.0), (0, 0.0), ("97.5 %", 0.975)])
def test_fractions(text: str | float, value: float) -> None:
    assert parse_fraction(text, "--min-certified") == value


@pytest.mark.parametrize("text", ["80", "-0.1", "nan", "inf", "", "%", "120%", "x", "nan%", True])
def test_bad_fractions_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--min-accuracy: got .* expected a fraction in \[0, 1\]"):
        parse_fraction(text, "--min-accuracy")


def test_requirements_are_checked_and_canonical() -> None:
    assert Requirements(level="prune:gu-l1:0.50+int8").level == "prune:gu-l1:0.5+int8"
    with pytest.raises(ConfigError, match="--prefer: got 'speed'; expected one of certified, accuracy, bytes"):
        Requirements(prefer="speed")
    with pytest.raises(ConfigError, match="--min-certified"):
        Requirements(min_certified=1.5)
    with pytest.raises(ConfigError, match="level: got 'int7'"):
        Requirements(level="int7")


@pytest.mark.parametrize(
    ("prefer", "trial", "level"),
    [("certified", "t0001", "int8"), ("accuracy", "t0001", "int8"), ("bytes", "t0002", "int4")],
)
def test_preferences(prefer: str, trial: str, level: str) -> None:
    requirements = Requirements.parse(max_bytes="40k", min_certified="0.8", min_accuracy="90%", prefer=prefer)
    choice = choose(POINTS, requirements)
    assert (choice.point["trial"], choice.point["level"]) == (trial, level)
    assert (choice.considered, choice.feasible) == (6, 3)


def test_limits_are_inclusive() -> None:
    requirements = Requirements(max_bytes=30_000, min_certified=0.88, min_accuracy=0.96)
    assert choose(POINTS, requirements).point is POINTS[1]


def test_ties_go_to_the_next_column_then_to_trial_and_level() -> None:
    tied = [
        point("t0003", "int8", 0.9, 0.95, 30_000), point("t0002", "int8", 0.9, 0.96, 30_000),
        point("t0001", "int8", 0.9, 0.97, 31_000), point("t0004", "int8", 0.9, 0.96, 30_000),
    ]  # fmt: skip
    assert choose(tied, Requirements()).point["trial"] == "t0002"
    assert choose(reversed(tied), Requirements()).point["trial"] == "t0002"
    assert choose(tied, Requirements(prefer="accuracy")).point["trial"] == "t0001"


def test_the_binding_requirement_is_the_one_that_limits_the_preferred_figure() -> None:
    choice = choose(POINTS, Requirements(max_bytes=40_000, min_certified=0.8, min_accuracy=0.95))
    # Without --max-bytes: 0.90 (dense of t0001); without --min-accuracy nothing better of at most 40k.
    assert choice.binding == "max_bytes"
    (relaxation,) = choice.relaxations
    assert (relaxation.key, relaxation.value, relaxation.point["level"]) == ("max_bytes", 100_000, "dense")
    assert relaxation.gain == pytest.approx(0.02)
    text = "\n".join(choice.lines())
    assert "binding requirement: --max-bytes 40000 (here 30000, slack 25.0%)" in text
    assert "--max-bytes 100000 would buy certified accuracy 0.9000 instead of 0.8800 (t0001, dense)" in text


def test_relaxation_takes_the_smallest_step() -> None:
    ladder = [point("t0001", f"int{b}", 0.5 + b / 20, 0.9, 10_000 * b) for b in (3, 4, 6, 8)]
    choice = choose(ladder, Requirements(max_bytes=45_000))
    assert choice.point["level"] == "int4"
    assert choice.relaxations[0].value == 60_000


def test_no_requirement_binds_the_best_of_all() -> None:
    choice = choose(POINTS, Requirements(max_bytes=200_000, min_certified=0.5))
    assert choice.point is POINTS[3]
    assert choice.binding is None
    assert choice.relaxations == ()
    assert "no requirement is binding" in "\n".join(choice.lines())


def test_nearest_miss_and_blocking_requirement() -> None:
    with pytest.raises(NothingFits) as caught:
        choose(POINTS, Requirements(max_bytes=20_000, min_certified=0.80, min_accuracy=0.93))
    error = caught.value
    assert error.exit_status == 3
    assert error.nearest is POINTS[5]  # misses accuracy by 0.02 of 0.93
    assert error.violations == {"min_accuracy": pytest.approx(0.02 / 0.93)}
    assert error.blocking == ("max_bytes", "min_accuracy")
    assert error.impossible == ()
    assert "nearest miss: t0002 at int4" in str(error)
    assert "standard accuracy 0.91 where --min-accuracy asks for 0.93" in str(error)


def test_a_requirement_that_no_point_meets_is_named() -> None:
    with pytest.raises(NothingFits) as caught:
        choose(POINTS, Requirements(max_bytes=40_000, min_certified=0.99))
    assert caught.value.impossible == ("min_certified",)
    assert caught.value.blocking == ("min_certified",)
    assert "--min-certified 0.99 is met by no point, even alone" in str(caught.value)


def test_two_requirements_that_block_together() -> None:
    with pytest.raises(NothingFits) as caught:
        choose(POINTS, Requirements(max_bytes=10_000, min_certified=0.99))
    assert caught.value.blocking == ()
    assert caught.value.impossible == ("max_bytes", "min_certified")


def test_no_points_at_all() -> None:
    with pytest.raises(NothingFits, match="no point of a complete trial") as caught:
        choose([], Requirements())
    assert caught.value.nearest is None


def test_trial_and_level_restrict_the_choice() -> None:
    assert choose(POINTS, Requirements(trial="t0002", level="int4")).point is POINTS[5]
    with pytest.raises(UserError, match="--trial t0009: no complete trial has it; one of t0001, t0002"):
        choose(POINTS, Requirements(trial="t0009"))
    with pytest.raises(UserError, match=r"--level int3: .*one of dense, int4, int8"):
        choose(POINTS, Requirements(level="int3"))


def test_only_the_selection_split_counts() -> None:
    other = point("t0003", "dense", 1.0, 1.0, 10, split="test")
    assert choose([*POINTS, other], Requirements()).point is POINTS[3]


def test_nan_meets_nothing() -> None:
    broken = point("t0000", "dense", float("nan"), 0.99, 10)
    assert choose([broken, *POINTS], Requirements(min_certified=0.8)).point is POINTS[3]
    assert unmet(broken, Requirements(min_certified=0.8, min_accuracy=0.9)) == ["min_certified"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.95, "0.95"), (0.8123, "0.8123"), (2 / 3, "0.6666"), (1.0, "1"), (0, "0")]
)
def test_a_shown_fraction_is_never_more_than_the_figure(value: float, text: str) -> None:
    assert show("min_certified", value) == text


def test_choice_as_json_is_plain() -> None:
    import json

    plain = choose(POINTS, Requirements(max_bytes=40_000)).to_json()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["requirements"] == {"max_bytes": 40_000, "prefer": "certified"}


def test_points_without_a_network_are_counted_apart() -> None:
    gone = [{**POINTS[0], "trial": "t0009"}, {**POINTS[1], "trial": "t0009"}]
    requirements = Requirements(max_bytes=POINTS[1]["bytes"], min_certified=0.5)
    choice = choose(POINTS, requirements, gone)
    assert choice.point is choose(POINTS, requirements).point
    assert (choice.considered, choice.gone, choice.gone_feasible) == (6, 2, 1)
    assert (
        f"{choice.feasible} of 6 points whose network was kept meet every requirement (1 of the 2 others would);"
        in (choice.lines()[1])
    )
    assert choose(POINTS, Requirements(level=POINTS[1]["level"]), gone).gone == 1
