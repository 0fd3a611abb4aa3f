import pytest

from cactus_ray.compression.levels import FACTOR_FORMATS, FORMATS, Level, parse_level, parse_levels
from cactus_ray.config import PRUNE_FAMILIES, STORED_BITS
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
        ("prune:gu-l1:.90 + codebook:4 ", "prune:gu-l1:0.9+codebook:4"),
        ("lr+sparse:0.10", "lr+sparse:0.1"),
        ("lr + sparse:1 + rebn + int8", "lr+sparse:1+rebn+int8"),
        ("lr+sparse:1e-2+codebook:3", "lr+sparse:0.01+codebook:3"),
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


@pytest.mark.parametrize("quantise", [None, *FACTOR_FORMATS])
def test_factored_levels_read_back(quantise: str | None) -> None:
    level = Level(None, None, True, quantise, 0.037)
    assert parse_level(str(level)) == level


def test_integers_and_codebooks_have_the_widths_that_training_may_ask_for() -> None:
    symmetric = [f for f in FORMATS if f.startswith("int") and ":" not in f] + ["ternary"]
    codebooks = [f for f in FORMATS if f.startswith("codebook")]
    for formats in (symmetric, codebooks):
        assert sorted(parse_level(f).bits or 0 for f in formats) == list(STORED_BITS)


def test_what_a_level_tells() -> None:
    level = parse_level("prune:gs-grad:0.5+ternary")
    assert (level.bits, level.structured, level.needs_calibration) == (2, True, True)
    assert (parse_level("fp16").bits, parse_level("prune:gu-l1:0.5").structured) == (None, False)
    assert parse_level("rebn").needs_calibration
    level = parse_level("int2:tensor:affine")
    assert (level.bits, level.per_tensor, level.affine) == (2, True, True)
    level = parse_level("codebook:3")
    assert (level.bits, level.codebook, level.affine, level.needs_calibration) == (3, True, False, False)
    assert (parse_level("lr+sparse:0.1").bits, parse_level("lr+sparse:0.1").kept) == (None, 0.1)
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
        ("codebook", "codebook:8, codebook:6"),
        ("codebook:7", "codebook:8, codebook:6"),
        ("codebook4", "codebook:8, codebook:6"),
        ("int8+lr+sparse:0.1", "in this order"),
        ("prune:gu-l1:0.5+lr+sparse:0.1", "in this order"),
        ("rebn+lr+sparse:0.1", "in this order"),
        ("lr", "lr+sparse:0.1"),
        ("lr+sparse", "lr+sparse:0.1"),
        ("lr+int8", "lr+sparse:KEPT"),
        ("lr:0.1", "lr+sparse:0.1"),
        ("lr+sparse:0", "above 0 and at most 1; got '0'"),
        ("lr+sparse:1.1", "above 0 and at most 1"),
        ("lr+sparse:nan", "above 0 and at most 1"),
        ("lr+sparse:0.1:0.2", "above 0 and at most 1"),
        ("sparse:0.1", "lr+sparse:KEPT"),
        ("lr+sparse:0.1+fp16", "12 bits"),
        ("lr+sparse:0.1+int8:affine", "int8:tensor"),
        ("lr+sparse:0.1+w8a8", "alone (12 bits) or with one of int8"),
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
