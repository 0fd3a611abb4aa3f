"""VNN-LIB 1.0 specifications (vnnlib.org): which inputs are looked at, and which outputs would be unsafe.

All numbers are exact fractions. What is not understood is refused by name, with its line.
"""

from __future__ import annotations

import gzip
import itertools
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial, reduce
from math import prod
from pathlib import Path

from cactus_ray.errors import UserError

LARGEST_FILE = 1 << 28
"""Bytes of a specification once it is unpacked."""
MOST_DISJUNCTS = 100_000
DEEPEST = 50

_TOKEN = re.compile(r"[()]|[^\s();]+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_VARIABLE = re.compile(r"([XY])_(0|[1-9]\d{0,8})")


@dataclass(frozen=True, slots=True)
class Constraint:
    """``sum(coefficient * Y[index]) <= bound`` over (index, coefficient) pairs, in the order of the indices."""

    coefficients: tuple[tuple[int, Fraction], ...]
    bound: Fraction

    def holds(self, outputs: list[float]) -> bool:
        """Whether it holds, exactly; not where an output that it reads is not finite."""
        values = [outputs[index] for index, _ in self.coefficients]
        if not all(abs(v) < float("inf") for v in values):
            return False
        return sum(c * Fraction(v) for (_, c), v in zip(self.coefficients, values, strict=True)) <= self.bound


Disjunct = tuple[Constraint, ...]
"""Constraints that hold together; the empty one holds everywhere."""


@dataclass(frozen=True, slots=True)
class Case:
    """One box of inputs, ``lower <= X <= upper``, and the unsafe outputs: those for which some disjunct holds."""

    lower: tuple[Fraction, ...]
    upper: tuple[Fraction, ...]
    unsafe: tuple[Disjunct, ...]


@dataclass(frozen=True, slots=True)
class Specification:
    """Numbers of inputs and outputs, and cases. An input of a case's box with an unsafe output is a counterexample."""

    inputs: int
    outputs: int
    cases: tuple[Case, ...]


@dataclass(frozen=True, slots=True)
class _Expression:
    """A word, or a list of expressions in parentheses."""

    line: int
    word: str
    items: list[_Expression] | None = None

    @property
    def head(self) -> str:
        """The word that an expression starts with."""
        return self.word if self.items is None else self.items[0].word if self.items else ""


@dataclass(frozen=True, slots=True)
class _Bound:
    """``X[index] <= value`` or, with ``upper`` False, ``>= value``."""

    index: int
    upper: bool
    value: Fraction


@dataclass(frozen=True, slots=True)
class _Linear:
    """``constant + sum(terms)``; terms by ("X" or "Y", index)."""

    terms: dict[tuple[str, int], Fraction]
    constant: Fraction

    def plus(self, other: _Linear, factor: Fraction) -> _Linear:
        terms = dict(self.terms)
        for name, value in other.terms.items():
            terms[name] = terms.get(name, Fraction(0)) + factor * value
        return _Linear({k: v for k, v in terms.items() if v}, self.constant + factor * other.constant)


_Atom = _Bound | Constraint
_Clause = list[_Atom]


def read_vnnlib(path: Path) -> Specification:
    """The specification in a ``.vnnlib`` or ``.vnnlib.gz`` file. Raises UserError with the line of what is wrong."""
    try:
        with path.open("rb") as file:
            packed = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            data: bytes = packed.read(LARGEST_FILE + 1)
        text = data.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); expected a VNN-LIB file, or one packed with gzip"
        ) from error
    if len(data) > LARGEST_FILE:
        raise UserError(f"{path}: longer than {LARGEST_FILE} bytes")
    return parse_vnnlib(text, str(path))


def parse_vnnlib(text: str, source: str = "the specification") -> Specification:
    """The specification that ``text`` states. Raises UserError, naming ``source`` and the line.

    Understood: ``declare-const`` of X_i and Y_j as Real; ``assert`` of ``<=``, ``>=``, ``and`` and ``or`` over linear
    terms (``+``, ``-``, ``*`` by numbers). A constraint reads one input, or outputs only.
    """
    return _Parser(source).specification(text)


@dataclass(slots=True)
class _Parser:
    source: str
    declared: dict[str, set[int]] = field(default_factory=lambda: {"X": set(), "Y": set()})

    def error(self, line: int, message: str) -> UserError:
        return UserError(f"{self.source}, line {line}: {message}")

    def specification(self, text: str) -> Specification:
        common: _Clause = []
        choices: list[list[_Clause]] = []
        last = 1
        for statement in self.statements(text):
            last = statement.line
            match statement.head, statement.items:
                case "declare-const", [_, name, sort]:
                    self.declare(name, sort)
                case "assert", [_, formula]:
                    clauses = self.clauses(formula, 0)
                    if len(clauses) == 1:
                        common += clauses[0]
                    else:
                        choices.append(clauses)
                case head, _:
                    raise self.error(
                        statement.line,
                        f"{head or '()'!r} is not understood; expected (declare-const X_0 Real) or (assert FORMULA)",
                    )
        for kind, indices in self.declared.items():
            if indices != set(range(len(indices))) or not indices:
                raise self.error(last, f"the declared {kind} are not {kind}_0, {kind}_1, ... without a gap")
        if prod(len(c) for c in choices) > MOST_DISJUNCTS:
            raise self.error(last, f"more than {MOST_DISJUNCTS} combinations of its (or ...)")
        return Specification(len(self.declared["X"]), len(self.declared["Y"]), self.cases(common, choices, last))

    def statements(self, text: str) -> Iterator[_Expression]:
        """Top-level expressions; iterative, so that no depth of parentheses exhausts the stack."""
        stack: list[_Expression] = []
        number = 0
        for number, line in enumerate(text.splitlines(), start=1):
            for token in _TOKEN.findall(line.split(";", 1)[0]):
                if token == "(":
                    stack.append(_Expression(number, "", []))
                    continue
                if not stack:
                    raise self.error(number, f"{token!r} outside of parentheses")
                done = stack.pop() if token == ")" else _Expression(number, token)
                if stack:
                    items = stack[-1].items
                    assert items is not None
                    items.append(done)
                elif token == ")":
                    yield done
                if token != ")" and not stack:
                    raise self.error(number, f"{token!r} outside of parentheses")
        if stack:
            raise self.error(stack[0].line, f"the parenthesis is not closed by the end of the text (line {number})")

    def declare(self, name: _Expression, sort: _Expression) -> None:
        found = _VARIABLE.fullmatch(name.word)
        if found is None or sort.word != "Real":
            raise self.error(name.line, f"a constant {name.word!r} of type {sort.word!r}; expected X_i or Y_i, Real")
        indices = self.declared[found[1]]
        if int(found[2]) in indices:
            raise self.error(name.line, f"{name.word} is declared twice")
        indices.add(int(found[2]))

    # --- formulas ---

    def clauses(self, formula: _Expression, depth: int) -> list[_Clause]:
        """The formula as a disjunction of conjunctions."""
        if depth > DEEPEST:
            raise self.error(formula.line, f"formulas inside of each other {DEEPEST} times")
        parts = formula.items[1:] if formula.items else []
        match formula.head:
            case "<=" | ">=" if len(parts) == 2:
                left, right = (self.term(p, depth + 1) for p in parts)
                return self.atom(left.plus(right, Fraction(-1)), formula.line, less=formula.head == "<=")
            case "or" if parts:
                return [clause for part in parts for clause in self.clauses(part, depth + 1)]
            case "and" if parts:
                found = [self.clauses(part, depth + 1) for part in parts]
                if prod(len(f) for f in found) > MOST_DISJUNCTS:
                    raise self.error(formula.line, f"more than {MOST_DISJUNCTS} combinations of its (or ...)")
                return [list(itertools.chain(*chosen)) for chosen in itertools.product(*found)]
        raise self.error(
            formula.line,
            f"{formula.head or '()'!r} with {len(parts)} parts is not understood; expected <=, >=, and, or",
        )

    def atom(self, linear: _Linear, line: int, *, less: bool) -> list[_Clause]:
        """``linear <= 0``, or ``>= 0``, as clauses: one, or none for what is never true."""
        sign = 1 if less else -1
        kinds = {kind for kind, _ in linear.terms}
        if kinds == {"Y"}:
            pairs = sorted((index, sign * value) for (_, index), value in linear.terms.items())
            return [[Constraint(tuple(pairs), -sign * linear.constant)]]
        if kinds == {"X"} and len(linear.terms) == 1:
            ((_, index), value) = next(iter(linear.terms.items()))
            return [[_Bound(index, upper=sign * value > 0, value=-linear.constant / value)]]
        if kinds:
            names = ", ".join(f"{kind}_{index}" for kind, index in sorted(linear.terms))
            raise self.error(line, f"a constraint over {names}; expected one input, or outputs only")
        return [[]] if sign * linear.constant <= 0 else []

    def term(self, expression: _Expression, depth: int) -> _Linear:
        if depth > DEEPEST:
            raise self.error(expression.line, f"terms inside of each other {DEEPEST} times")
        if expression.items is None:
            return self.word(expression)
        parts = [self.term(part, depth + 1) for part in expression.items[1:]]
        match expression.head, parts:
            case "+", [_, *_]:
                return reduce(partial(_Linear.plus, factor=Fraction(1)), parts)
            case "-", [only]:
                return _Linear({}, Fraction(0)).plus(only, Fraction(-1))
            case "-", [_, *_]:
                return reduce(partial(_Linear.plus, factor=Fraction(-1)), parts)
            case "*", [first, second] if not first.terms or not second.terms:
                factor, other = (first, second) if not first.terms else (second, first)
                return _Linear({}, Fraction(0)).plus(other, factor.constant)
        raise self.error(
            expression.line,
            f"the term {expression.head or '()'!r} of {len(parts)} parts is not understood; expected +, -, or * by"
            " a number",
        )

    def word(self, expression: _Expression) -> _Linear:
        if found := _VARIABLE.fullmatch(expression.word):
            if int(found[2]) not in self.declared[found[1]]:
                raise self.error(expression.line, f"{expression.word} is not declared")
            return _Linear({(found[1], int(found[2])): Fraction(1)}, Fraction(0))
        if len(expression.word) > 400 or not _NUMBER.fullmatch(expression.word):
            raise self.error(expression.line, f"{expression.word[:40]!r} is neither a number nor X_i nor Y_i")
        return _Linear({}, Fraction(expression.word))

    # --- boxes ---

    def cases(self, common: _Clause, choices: list[list[_Clause]], line: int) -> tuple[Case, ...]:
        """The combinations of the choices, those with the same box taken together; without the empty boxes."""
        shared = [a for a in common if isinstance(a, Constraint)]
        found: dict[tuple[_Bound, ...], list[Disjunct]] = {}
        for chosen in itertools.product(*choices):
            atoms = list(itertools.chain(*chosen))
            bounds = tuple(a for a in atoms if isinstance(a, _Bound))
            found.setdefault(bounds, []).append((*shared, *(a for a in atoms if isinstance(a, Constraint))))
        first = [a for a in common if isinstance(a, _Bound)]
        boxes = ((self.box([*first, *bounds], line), unsafe) for bounds, unsafe in found.items())
        return tuple(
            Case(lower, upper, tuple(unsafe))
            for (lower, upper), unsafe in boxes
            if all(low <= high for low, high in zip(lower, upper, strict=True))
        )

    def box(self, bounds: list[_Bound], line: int) -> tuple[tuple[Fraction, ...], tuple[Fraction, ...]]:
        lower: dict[int, Fraction] = {}
        upper: dict[int, Fraction] = {}
        for bound in bounds:
            if bound.upper:
                upper[bound.index] = min(upper.get(bound.index, bound.value), bound.value)
            else:
                lower[bound.index] = max(lower.get(bound.index, bound.value), bound.value)
        for index in range(len(self.declared["X"])):
            for side, name in ((lower, "lower"), (upper, "upper")):
                if index not in side:
                    raise self.error(line, f"X_{index} has no {name} bound")
        return tuple(lower[i] for i in range(len(lower))), tuple(upper[i] for i in range(len(upper)))
