"""VNN-LIB files: what they mean, and what is refused with its line."""

import gzip
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from cactus_ray.errors import UserError
from cactus_ray.verification.unsafe import Unsafe
from cactus_ray.verification.vnnlib import Constraint, parse_vnnlib, read_vnnlib

DECLARED = "".join(f"(declare-const {v} Real)\n" for v in ("X_0", "X_1", "Y_0", "Y_1", "Y_2"))
BOX = "(assert (<= X_0 1)) (assert (>= X_0 -1))\n(assert (<= X_1 0.1)) (assert (>= X_1 1e-1))\n"


def holds(text: str, outputs: list[float]) -> bool:
    """Whether outputs are unsafe in the first box of a specification."""
    (case, *_) = parse_vnnlib(DECLARED + BOX + text).cases
    return any(all(c.holds(outputs) for c in disjunct) for disjunct in case.unsafe)


def test_boxes_are_exact() -> None:
    found = parse_vnnlib("; comment (\n" + DECLARED + BOX + "(assert (>= Y_0 Y_1)) ; (")
    assert (found.inputs, found.outputs) == (2, 3)
    (case,) = found.cases
    assert case.lower == (-1, Fraction(1, 10))
    assert case.upper == (1, Fraction(1, 10))
    assert case.unsafe == ((Constraint(((0, Fraction(-1)), (1, Fraction(1))), Fraction(0)),),)


@pytest.mark.parametrize(
    ("text", "unsafe", "safe"),
    [
        ("(assert (<= Y_0 Y_1))", [1, 1, 0], [1, 0.999, 0]),
        ("(assert (>= Y_0 3.5))", [3.5, 0, 0], [3.25, 0, 0]),
        ("(assert (<= 3.5 Y_0))", [3.5, 0, 0], [3.25, 0, 0]),
        ("(assert (<= Y_0 Y_1)) (assert (<= Y_0 Y_2))", [0, 1, 1], [0, 1, -1]),
        ("(assert (and (<= Y_0 Y_1) (<= Y_0 Y_2)))", [0, 1, 1], [0, -1, 1]),
        ("(assert (or (<= Y_0 Y_1) (<= Y_0 Y_2)))", [0, 1, -1], [0, -1, -1]),
        ("(assert (or (and (<= Y_0 Y_1) (<= Y_0 Y_2)) (and (>= Y_0 9))))", [9, 0, 0], [8, 9, 0]),
        ("(assert (and (or (<= Y_0 0) (>= Y_0 9)) (or (<= Y_1 0) (>= Y_1 9))))", [9, 0, 0], [9, 1, 0]),
        ("(assert (>= (+ Y_0 (* 2.0 Y_1) (* Y_2 -1)) (- 1)))", [0, 0, 1], [0, 0, 1.5]),
        ("(assert (<= (- Y_0 Y_1 1) 0))", [2, 1, 0], [2.5, 1, 0]),
        ("(assert (or (<= 1 0) (<= Y_0 0)))", [0, 0, 0], [1, 0, 0]),
        ("(assert (or (<= 0 1) (<= Y_0 0)))", [1, 0, 0], None),
        ("(assert (<= Y_0 Y_1))", [0, 1, float("nan")], [0, float("nan"), 1]),
    ],
)
def test_what_is_unsafe(text: str, unsafe: list[float], safe: list[float] | None) -> None:
    assert holds(text, unsafe)
    assert safe is None or not holds(text, safe)


def test_boxes_in_a_choice_become_cases_of_their_own() -> None:
    boxes = "(assert (or (and (>= X_0 0) (<= X_0 1)) (and (>= X_0 3) (<= X_0 4)) (and (>= X_0 2) (<= X_0 1))))"
    rest = "(assert (>= X_1 0)) (assert (<= X_1 1)) (assert (or (>= Y_0 Y_1) (>= Y_0 Y_2)))"
    cases = parse_vnnlib(DECLARED + boxes + rest).cases
    assert [(c.lower[0], c.upper[0], len(c.unsafe)) for c in cases] == [(0, 1, 2), (3, 4, 2)]  # the third is empty
    paired = "(assert (or (and (>= X_0 0) (<= X_0 1) (<= Y_0 0)) (and (>= X_0 3) (<= X_0 4) (<= Y_1 0))))"
    cases = parse_vnnlib(DECLARED + paired + "(assert (>= X_1 0)) (assert (<= X_1 1))").cases
    assert [c.unsafe[0][0].coefficients[0][0] for c in cases] == [0, 1]


def test_what_is_never_true_leaves_no_case() -> None:
    assert parse_vnnlib(DECLARED + BOX + "(assert (<= 1 0))").cases == ()
    (case,) = parse_vnnlib(DECLARED + BOX).cases
    assert case.unsafe == ((),)  # nothing is asked of the outputs: all are unsafe


MALFORMED = {
    "(assert (< Y_0 1))": "line 8: '<' with 2 parts",
    "(assert (= Y_0 1))": "'=' with 2 parts",
    "(assert (not (<= Y_0 1)))": "'not'",
    "(assert (=> (<= Y_0 1) (<= Y_1 1)))": "'=>'",
    "(assert (<= Y_0))": "'<=' with 1 parts",
    "(assert (<= Y_0 Y_1 Y_2))": "'<=' with 3 parts",
    "(assert (<= Y_0 X_0))": "a constraint over X_0, Y_0",
    "(assert (<= X_0 X_1))": "a constraint over X_0, X_1",
    "(assert (<= (* Y_0 Y_1) 1))": "the term '*'",
    "(assert (<= (abs Y_0) 1))": "the term 'abs'",
    "(assert (<= Y_7 1))": "Y_7 is not declared",
    "(assert (<= Y_00 1))": "'Y_00' is neither a number",
    "(assert (<= Y_0 1/3))": "'1/3' is neither a number",
    "(assert (<= Y_0 nan))": "'nan' is neither a number",
    "(assert (<= Y_0 1e999999999))": "neither a number",
    "(assert)": "'assert' is not understood",
    "(assert (or))": "'or' with 0 parts",
    "(assert Y_0)": "'Y_0' with 0 parts",
    "()": r"'\(\)' is not understood",
    "(check-sat)": "'check-sat' is not understood",
    "(declare-const Y_0 Real)": "Y_0 is declared twice",
    "(declare-const Z_0 Real)": "'Z_0' of type 'Real'",
    "(declare-const Y_3 Int)": "'Y_3' of type 'Int'",
    "(declare-const Y_4 Real)": "without a gap",
    "(vnnlib-version <2.0>)": "'vnnlib-version'",
    "(assert (<= Y_0 1)": "line 8: the parenthesis is not closed",
    "(assert (<= Y_0 1)))": "line 8: '\\)' outside",
    "Y_0": "line 8: 'Y_0' outside",
    "(assert " + "(or " * 60 + "(<= Y_0 1)" + ")" * 61: "inside of each other",
    "(" * 100_000: "not closed",
    "(" * 100_000 + ")" * 100_000: "is not understood",
    "".join("(assert (or (<= Y_0 1) (<= Y_1 1)))" for _ in range(20)): "more than 100000 combinations",
    "(assert (and" + "(or (<= Y_0 1) (<= Y_1 1))" * 20 + "))": "more than 100000 combinations",
}


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: text[:40])
def test_what_is_not_understood_is_named_with_its_line(text: str) -> None:
    with pytest.raises(UserError, match=MALFORMED[text]):
        parse_vnnlib(DECLARED + BOX + text)


def test_incomplete_specifications() -> None:
    with pytest.raises(UserError, match="X_1 has no lower bound"):
        parse_vnnlib(DECLARED + "(assert (<= X_0 1)) (assert (>= X_0 0)) (assert (<= X_1 0)) (assert (<= Y_0 0))")
    with pytest.raises(UserError, match="declared X"):
        parse_vnnlib("(declare-const Y_0 Real)")
    with pytest.raises(UserError, match="declared X"):
        parse_vnnlib("")


def test_packed_files_and_broken_ones(tmp_path: Path) -> None:
    text = DECLARED + BOX + "(assert (<= Y_0 0))"
    plain, packed = tmp_path / "a.vnnlib", tmp_path / "a.vnnlib.gz"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    assert read_vnnlib(plain) == read_vnnlib(packed) == parse_vnnlib(text)
    for name, content in (
        ("cut.vnnlib.gz", packed.read_bytes()[:-12]), ("plain.vnnlib.gz", text.encode()),
        ("damaged.vnnlib.gz", packed.read_bytes()[:30] + b"\xff" * 30), ("latin.vnnlib", b"; \xe4"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            read_vnnlib(tmp_path / name)
    with pytest.raises(UserError, match=r"nowhere\.vnnlib: cannot be read"):
        read_vnnlib(tmp_path / "nowhere.vnnlib")


def test_boxes_as_tensors_are_rounded_outward_and_their_float32_numbers_lie_inside() -> None:
    text = "(assert (>= X_0 0.1)) (assert (<= X_0 0.7)) (assert (>= X_1 0.1)) (assert (<= X_1 0.1))"
    (case,) = parse_vnnlib(DECLARED + text + "(assert (<= (* 0.1 Y_0) 0.3)) (assert (<= Y_1 0.1))").cases
    unsafe = Unsafe.of(case, 3, torch.tensor([1, 0]), (2,))
    low, high = (t.tolist() for t in (unsafe.lower, unsafe.upper))
    assert Fraction(low[1]) <= Fraction(1, 10)
    assert Fraction(high[1]) >= Fraction(7, 10)
    assert Fraction(unsafe.first[1].item()) >= Fraction(1, 10)
    assert Fraction(unsafe.last[1].item()) <= Fraction(7, 10)
    # no float32 number is exactly 0.1: the nearest one stands for it, and the box contains it
    assert unsafe.first[0] == unsafe.last[0] == torch.tensor(0.1)
    assert low[0] <= unsafe.first[0].item() <= high[0]
    assert low[0] <= 0.1 <= high[0]
    assert unsafe.rows.tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]  # 0.1 Y_0 <= 0.3, in whole numbers
    assert unsafe.bounds[0] == 3
    assert Fraction(unsafe.bounds[1].item()) >= Fraction(1, 10)
    assert unsafe.free == 2
    assert unsafe.members.tolist() == [[0, 1]]
