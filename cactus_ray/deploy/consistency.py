"""Whether a certificate agrees with itself. Needs neither its files nor the data; that is ``recheck``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cactus_ray.compression.levels import parse_level
from cactus_ray.deploy import wording
from cactus_ray.deploy.document import CLEAN, REPLAY, SEARCHED, Document, Row, Summary, figures, measured, summarise
from cactus_ray.deploy.requirements import unmet
from cactus_ray.errors import ConfigError
from cactus_ray.verification.member import KINDS
from cactus_ray.verification.verdict import BOUNDS, DECIDED_BY, Verdict


def inconsistencies(document: Document) -> list[str]:
    """What a certificate says against itself; empty where nothing. Needs neither files nor data."""
    found = _table_problems(document, document.verdicts, document.summary, "")
    found += [f"verdicts: index {r.index}: a member of a family" for r in document.verdicts if r.member is not None]
    found += _family_problems(document)
    found += _selection_problems(document.provenance.selection)
    found += _requirement_problems(document)
    found += _name_problems(document)
    low, high = document.threat.domain
    if not low < high:
        found.append(f"threat.domain: [{low}, {high}] is not increasing")
    return found


def _name_problems(document: Document) -> list[str]:
    """A level that is none or is written otherwise than ``pick`` does, and names that the card must not show."""
    found = [
        f"network.classes: certificates of version {document.schema_version} cannot show {name!r} in their card;"
        " expected a plain name (pick it again: later versions show any name)"
        for name in wording.of(document).unshowable(document)
    ]
    level = document.network.level
    try:
        meant = str(parse_level(level, "network.level"))
    except ConfigError as error:
        return [*found, str(error)]
    return found if meant == level else [*found, f"network.level: {level!r}; expected it written as {meant!r}"]


def _family_problems(document: Document) -> list[str]:
    """What the part about a family says against itself, and against what is said of the file, which is a member."""
    section = document.family
    if section is None:
        return []
    found = _table_problems(document, section.verdicts, section.summary, "family.")
    fallen = {row.index for row in document.verdicts if row.verdict == Verdict.FALSIFIED}
    for row in section.verdicts:
        if (row.verdict == Verdict.FALSIFIED) != (row.member is not None):
            found.append(f"family.verdicts: index {row.index}: {row.verdict}, and the member is {row.member}")
        if row.verdict == Verdict.CERTIFIED and row.index in fallen:
            found.append(f"family.verdicts: index {row.index}: CERTIFIED, but the file itself is FALSIFIED there")
    return found


def _table_problems(document: Document, rows: Sequence[Row], summary: Summary, part: str) -> list[str]:
    """Problems of one table of verdicts, ``part`` + "verdicts"."""
    found = [f"{part}{problem}" for row in rows for problem in _row_problems(row, document)]
    data = document.data
    listed = [r.index for r in rows]
    if repeated := sorted(i for i, count in Counter(listed).items() if count > 1):
        found.append(f"{part}verdicts: index {_list(repeated)} stands more than once")
    if len(set(data.indices)) < len(data.indices):
        found.append("data.indices: an index stands more than once")
    if missing := sorted(set(data.indices) - set(listed)):
        found.append(f"{part}verdicts: index {_list(missing)} of data.indices has no verdict")
    if extra := sorted(set(listed) - set(data.indices)):
        found.append(f"{part}verdicts: index {_list(extra)} is not in data.indices")
    if outside := sorted(i for i in set(listed) | set(data.indices) if i >= data.total):
        found.append(f"{part}verdicts: index {_list(outside)} is outside of the split of {data.total} samples")
    for name, count in (("data.indices", len(data.indices)), (f"{part}verdicts", len(rows))):
        if count != data.samples:
            found.append(f"data.samples: {data.samples}, but {name} has {count}")
    if not rows:
        return [*found, f"{part}verdicts: none"]
    return found + _differences(f"{part}summary", summary, summarise(rows))


def _differences(place: str, stated: Summary, recomputed: Summary) -> list[str]:
    plain = asdict(stated)
    return [
        f"{place}.{key}: {plain[key]}, but the verdicts give {value}"
        for key, value in asdict(recomputed).items()
        if not _same(plain[key], value)
    ]


def _selection_problems(stated: Summary | None) -> list[str]:
    """Figures of the selection split whose verdicts are not here: at least they belong together."""
    place = "provenance.selection"
    if stated is None:
        return []
    if stated.n_certified + stated.n_falsified > stated.samples:
        return [f"{place}: {stated.n_certified} certified and {stated.n_falsified} falsified of {stated.samples}"]
    correct = round(stated.standard_accuracy * stated.samples)
    return _differences(place, stated, figures(stated.samples, correct, stated.n_certified, stated.n_falsified))


def _requirement_problems(document: Document) -> list[str]:
    stated, required = document.provenance.not_met, document.provenance.requirements
    if required is None or sorted(stated or ()) == sorted(missed := unmet(measured(document), required)):
        return []
    return [f"provenance.not_met: {list(stated or ())}, but the figures miss {missed}"]


def _row_problems(row: Row, document: Document) -> list[str]:
    place, problems = f"verdicts: index {row.index}", []
    if row.label >= len(document.network.classes):
        problems.append(f"label {row.label} is no class")
    if row.verdict == Verdict.CERTIFIED and not _states_its_bound(row):
        problems.append(f"CERTIFIED with the lower bound {row.lower_bound} (decided by {row.decided_by})")
    if row.verdict != Verdict.CERTIFIED and row.lower_bound is not None and row.lower_bound > 0:
        problems.append(f"{row.verdict} with the lower bound {row.lower_bound}, which would be a proof")
    if row.verdict == Verdict.FALSIFIED:
        pixels = math.prod(document.network.inputs.shape)
        if row.counterexample is None:
            problems.append("FALSIFIED without a counterexample")
        elif len(row.counterexample) != pixels:
            problems.append(f"counterexample of {len(row.counterexample)} values; the input has {pixels}")
    elif row.counterexample is not None:
        problems.append(f"{row.verdict} with a counterexample")
    if row.decided_by == CLEAN and row.verdict != Verdict.FALSIFIED:
        problems.append(f"{row.verdict}, but decided by being misclassified")
    elif row.decided_by not in (expected := _deciders(row, document)):
        problems.append(f"{row.verdict}, decided by {row.decided_by!r}; expected one of {', '.join(expected)}")
    return [f"{place}: {p}" for p in problems]


def _same(stated: Any, value: Any) -> bool:
    if isinstance(value, tuple):
        return all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(stated, value, strict=True))
    if isinstance(value, float):
        return math.isclose(stated, value, abs_tol=1e-9)
    return bool(stated == value)


def _list(values: Sequence[int], show: int = 8) -> str:
    more = f" and {len(values) - show} more" if len(values) > show else ""
    return ", ".join(map(str, values[:show])) + more


def _deciders(row: Row, document: Document) -> tuple[str, ...]:
    """What can decide such a row: no bound above the settings', members only where there is a family."""
    known = DECIDED_BY[row.verdict]
    if row.verdict == Verdict.UNKNOWN:
        return (*known, REPLAY)
    if row.verdict == Verdict.FALSIFIED:
        return known if row.member is None else (*known, *KINDS)
    strongest = document.engine.settings.get("bound")
    return known[: BOUNDS.index(strongest) + 1] if strongest in BOUNDS else known


def _states_its_bound(row: Row) -> bool:
    """A positive bound; none where the proof was searched for."""
    if row.decided_by in SEARCHED:
        return row.lower_bound is None
    return row.lower_bound is not None and row.lower_bound > 0
