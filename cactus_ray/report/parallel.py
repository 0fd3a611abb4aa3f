"""Parallel coordinates of the complete trials, as plain data that ``parallel.js`` draws as SVG.

Plotly's own chart of this kind is not used: its WebGL library builds code with ``Function()``, which the page's content
security policy forbids. Texts are not escaped here; the script sets them as text and never as HTML.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence, Set
from typing import Any

from cactus_ray.report.insight import Complete, in_order, varied
from cactus_ray.report.tables import value_text
from cactus_ray.report.ticks import is_share, metric_text, tick_text, tick_values
from cactus_ray.search.domains import Choices
from cactus_ray.search.parameters import Parameter
from cactus_ray.search.space import Space

SHOWN_LINES = 1_000
"""More lines than this cannot be told apart, and the browser slows down."""
LABEL_WIDTH = 15
"""Characters in a line of an axis's name; ``SPACING`` in ``parallel.js`` leaves as much room."""


def parallel_data(space: Space, trials: Sequence[Complete], leading: Set[str]) -> dict[str, Any]:
    """Axes, and a line per trial: JSON without NaN.

    ``leading``: trials with a point on the front. An axis has ``ticks``, pairs of a place and a text. A line has, axis
    by axis, a place from 0 (bottom) to 1 (top) and the value as text; both are None where the parameter is inactive in
    that trial. ``colours`` names the axes of the objectives, by any of which the lines can be coloured. At most
    ``SHOWN_LINES`` lines: those of ``leading`` first, then the best by the first objective.
    """
    shown = _shown(space, trials, leading)
    columns = [_parameter(p, [t.values.get(p.name) for t in shown]) for p in varied(space, trials)]
    colours = []
    for objective in space.objectives:
        colours.append({"axis": len(columns), "goal": objective.goal})
        columns.append(_objective(objective.metric, objective.goal, [t.objectives[objective.metric] for t in shown]))
    if space.constraints:
        met = ["met" if t.met else "not met" for t in shown]
        columns.append(_categories("constraints", ["met", "not met"], met))
    axes, places, texts = zip(*columns, strict=True)
    lines = [
        {"trial": t.trial, "met": t.met, "front": t.trial in leading, "places": row, "texts": words}
        for t, row, words in zip(shown, zip(*places, strict=True), zip(*texts, strict=True), strict=True)
    ]
    return {"axes": axes, "lines": lines, "colours": colours, "complete": len(trials)}


def label(name: str) -> list[str]:
    """A name in lines of at most ``LABEL_WIDTH`` characters: broken before a sign, else behind an underscore."""
    lines: list[str] = []
    for section in re.findall(r"[.@:+-]?[^.@:+-]+|[.@:+-]", name):
        pieces = [section] if len(section) <= LABEL_WIDTH else re.findall(r"[^_]{1,14}_?|_", section)
        for piece in pieces:
            if lines and len(lines[-1]) + len(piece) <= LABEL_WIDTH:
                lines[-1] += piece
            else:
                lines.append(piece)
    return lines


def _shown(space: Space, trials: Sequence[Complete], leading: Set[str]) -> list[Complete]:
    first = space.objectives[0]
    sign = -1.0 if first.goal == "maximize" else 1.0
    best = sorted(trials, key=lambda t: (t.trial not in leading, sign * t.objectives[first.metric]))
    kept = {t.trial for t in best[:SHOWN_LINES]}
    return [t for t in trials if t.trial in kept]


# --- axes: what is written on one, where each line crosses it, and the value there as text -------------------------

_Column = tuple[dict[str, Any], list[float | None], list[str | None]]


def _parameter(parameter: Parameter, values: Sequence[Any]) -> _Column:
    """The axis of a parameter. A range is drawn whole, so that values at its ends are seen to be there."""
    domain = parameter.domain
    if isinstance(domain, Choices):
        words = [None if v is None else value_text(v) for v in values]
        return _categories(parameter.name, [value_text(v) for v in in_order(domain)], words)
    active = [float(v) for v in values if v is not None]
    low, high = min([float(domain.low), *active]), max([float(domain.high), *active])
    round_values = tick_values(low, high, log=domain.log, whole=domain.integer)
    marks = [(_place(v, low, high, domain.log), tick_text(v)) for v in round_values]
    axis = _axis(parameter.name, "log scale" if domain.log else "", marks)
    places = [None if v is None else _place(float(v), low, high, domain.log) for v in values]
    return axis, places, [None if v is None else value_text(v) for v in values]


def _objective(metric: str, goal: str, values: Sequence[float]) -> _Column:
    """The axis of an objective, as long as what was reached. ``ends``: its least and largest value as texts."""
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    marks = [(_place(v, low, high), tick_text(v, share=is_share(metric))) for v in tick_values(low, high)]
    axis = _axis(metric, "↑ better" if goal == "maximize" else "↓ better", marks)
    axis["ends"] = [metric_text(metric, low), metric_text(metric, high)]
    places = [_place(v, low, high) if math.isfinite(v) else None for v in values]
    return axis, places, [metric_text(metric, v) for v in values]


def _categories(name: str, names: Sequence[str], words: Sequence[str | None]) -> _Column:
    """An axis of words in this order, the first on top; numbers the other way round, the smallest at the bottom."""
    known = [*names, *dict.fromkeys(w for w in words if w is not None and w not in names)]
    upwards = known if all(_is_number(w) for w in known) else known[::-1]
    places = {word: _place(i, 0, len(upwards) - 1) for i, word in enumerate(upwards)}
    axis = _axis(name, "", [(places[word], word) for word in upwards])
    return axis, [None if w is None else places[w] for w in words], list(words)


def _axis(name: str, hint: str, marks: Sequence[tuple[float, str]]) -> dict[str, Any]:
    return {"name": name, "label": label(name), "hint": hint, "ticks": marks}


def _place(value: float, low: float, high: float, log: bool = False) -> float:
    """Where ``value`` lies between ``low`` (0) and ``high`` (1); 0.5 where both are the same."""
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low) if high > low else 0.5


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
