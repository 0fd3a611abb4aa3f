import pytest

from cactus_ray.compression.levels import FORMATS, Level, parse_level, parse_levels
from cactus_ray.config import PRUNE_FAMILIES
from cactus_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("dense", "dense"),
        ("int8", "int8"),
        ("rebn", "rebn"),
        ("prune:gs-l2:0.50+rebn+int8", "prune:gs-l2:0.5+rebn+int8"),
        (" prune:gu-l1:.7 + bf16 ", "prune:gu-l1:0.7+bf16"),
        ("prune:lu-grad:9.5e-1", "prune:lu-grad:0.95"),
        ("prune:gu-l1:1e-5", "prune:gu-l1:0.00001"),
        ("prune:gu-l1:0", "prune:gu-l1:0"),
        ("prune:gu-l1:0.0", "prune:gu-l1:0"),
        ("prune:gu-l1:.90 + int4:tensor:affine ", "prune:gu-l1:0.9+int4:tensor:affine"),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    level = parse_level(text)
    assert str(level) == canonical
    assert parse_level(canonical) == level


@pytest.mark.parametrize("family", PRUNE_FAMILIES)
@pytest.mark.parametrize("quantise", FORMATS)
def test_every_combination_reads_back(family: str, quantise: str) -> None:
    level = Level(family, 0.37, True, quantise)
    assert parse_level(str(level)) == level


def test_what_a_level_tells() -> None:
    level = parse_level("prune:gs-grad:0.5+ternary")
    assert (level.bits, level.structured, level.needs_calibration) == (2, True, True)
    assert (parse_level("fp16").bits, parse_level("prune:gu-l1:0.5").structured) == (None, False)
    assert parse_level("rebn").needs_calibration
    level = parse_level("int2:tensor:affine")
    assert (level.bits, level.per_tensor, level.affine) == (2, True, True)
    level = parse_level("int5")
    assert (level.bits, level.per_tensor, level.affine) == (5, False, False)
    assert not parse_level("prune:gs-l2:0.5").needs_calibration


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "text like"),
        (8, "text like"),
        (None, "text like"),
        ("int9", "int8, int6, int5, int4"),
        ("int2", "2 bits as one of ternary, ternary:tensor, int2:affine"),
        ("int4:affine:tensor", "int4:tensor:affine"),
        ("ternary:affine", "int2:affine"),
        ("int4:channel", "4 bits as one of int4, int4:tensor, int4:affine, int4:tensor:affine"),
        ("fp16:tensor", "int8, int6"),
        ("INT8", "int8, int6, int5, int4"),
        ("dense+int8", "'dense' to stand alone"),
        ("int8+prune:gu-l1:0.5", "in this order"),
        ("int8+rebn", "in this order"),
        ("int8+int4", "in this order"),
        ("prune:gu-l1:0.5+prune:gs-l1:0.5", "in this order"),
        ("int8+", "joined by '+'"),
        ("prune", "prune:FAMILY:SPARSITY"),
        ("prune:gu-l1", "prune:FAMILY:SPARSITY"),
        ("prune:0.5", "prune:FAMILY:SPARSITY"),
        ("prune:gu:0.5", "gu-l1, gu-l2, gu-grad"),
        ("prune:xu-l1:0.5", "gu-l1"),
        ("prune:gu-l1:1", "below 1"),
        ("prune:gu-l1:1.5", "below 1"),
        ("prune:gu-l1:-0.1", "at least 0"),
        ("prune:gu-l1:nan", "at least 0"),
        ("prune:gu-l1:inf", "at least 0"),
        ("prune:gu-l1:50%", "at least 0"),
        ("prune:gu-l1:1_0e-2", "at least 0"),
        ("prune:gu-l1:0.99999999999999999999", "below 1"),
    ],
)
def test_bad_levels_say_what_would_be_right(text: object, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_level(text, "levels[3]")
    assert "levels[3]" in str(error.value)
    assert repr(text) in str(error.value)
    assert hint in str(error.value)


def test_a_list_of_levels() -> None:
    assert [str(level) for level in parse_levels(["dense", "int8"])] == ["dense", "int8"]
    with pytest.raises(ConfigError, match=r"levels\[1\].*not yet listed"):
        parse_levels(["prune:gu-l1:0.5", "prune:gu-l1:0.50"])
    with pytest.raises(ConfigError, match="at least one"):
        parse_levels([])
