"""Parallel coordinates of the complete trials, as plain data that ``parallel.js`` draws as SVG.

Plotly's own chart of this kind is not used: it compiles its shaders' bindings with ``Function()``, which the page's
content security policy forbids. Texts are not escaped here; the script sets them as text and never as HTML.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence, Set
from typing import Any

from cactus_ray.report.figures import size_text
from cactus_ray.report.insight import Complete, in_order, varied
from cactus_ray.report.tables import value_text
from cactus_ray.search.domains import Choices
from cactus_ray.search.parameters import Parameter
from cactus_ray.search.space import Space

SHOWN_LINES = 1_000
"""More lines than this cannot be told apart, and the browser slows down."""
LABEL_WIDTH = 15  # characters in a line of an axis's name
TICKS = 6  # about as many on an axis of numbers


def parallel_data(space: Space, trials: Sequence[Complete], leading: Set[str]) -> dict[str, Any]:
    """Axes, and a line per trial: JSON without NaN.

    ``leading``: trials with a point on the front. An axis has ``ticks``, pairs of a place and a text. A line has, axis by
    axis, a place from 0 (bottom) to 1 (top) and the value as text; both are None where the parameter is inactive in that
    trial. ``colours`` names the axes of the objectives, by any of which the lines can be coloured. At most
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


def _shown(space: Space, trials: Sequence[Complete], leading: Set[str]) -> list[Complete]:
    first = space.objectives[0]
    sign = -1.0 if first.goal == "maximize" else 1.0
    best = sorted(trials, key=lambda t: (t.trial not in leading, sign * t.objectives[first.metric]))
    kept = {t.trial for t in best[:SHOWN_LINES]}
    return [t for t in trials if t.trial in kept]


# --- axes: what is written on one, where each line crosses it, and the value there as text ------------------------------

_Column = tuple[dict[str, Any], list[float | None], list[str | None]]


def _parameter(parameter: Parameter, values: Sequence[Any]) -> _Column:
    """The axis of a parameter. A range is drawn whole, so that values at its ends are seen to be there."""
    domain = parameter.domain
    if isinstance(domain, Choices):
        names = [value_text(list(v) if isinstance(v, tuple) else v) for v in in_order(domain)]
        words = [None if v is None else value_text(list(v) if isinstance(v, tuple) else v) for v in values]
        return _categories(parameter.name, names, words)
    active = [float(v) for v in values if v is not None]
    low, high = min([float(domain.low), *active]), max([float(domain.high), *active])
    log = domain.log and low > 0
    axis = {"label": label(parameter.name), "name": parameter.name, "note": "log scale" if log else ""}
    axis["ticks"] = ticks(low, high, log=log, whole=domain.integer)
    places = [None if v is None else place(float(v), low, high, log=log) for v in values]
    return axis, places, [None if v is None else value_text(v) for v in values]


def _objective(metric: str, goal: str, values: Sequence[float]) -> _Column:
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    share = "accuracy" in metric
    axis = {"label": label(metric), "name": metric, "ticks": ticks(low, high, share=share)}
    axis["note"] = "higher is better" if goal == "maximize" else "lower is better"
    axis["ends"] = [_exact(low, share), _exact(high, share)]
    places = [place(v, low, high) if math.isfinite(v) else None for v in values]
    return axis, places, [_exact(v, share) for v in values]


def _categories(name: str, names: Sequence[str], words: Sequence[str | None]) -> _Column:
    """An axis of words in this order, the first on top; numbers the other way round, the smallest at the bottom."""
    known = [*names, *dict.fromkeys(w for w in words if w is not None and w not in names)]
    upwards = known if all(_is_number(w) for w in known) else known[::-1]
    places = {word: i / (len(upwards) - 1) if len(upwards) > 1 else 0.5 for i, word in enumerate(upwards)}
    axis = {"label": label(name), "name": name, "note": "", "ticks": [(places[word], word) for word in upwards]}
    return axis, [None if w is None else places[w] for w in words], list(words)


def place(value: float, low: float, high: float, *, log: bool = False) -> float:
    """Where ``value`` lies between ``low`` (0) and ``high`` (1); 0.5 where both are the same."""
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low) if high > low else 0.5


def ticks(
    low: float, high: float, *, log: bool = False, whole: bool = False, share: bool = False
) -> list[tuple[float, str]]:
    """Round values within the axis, at most about ``TICKS``, as (place, text). ``whole``: integers only; ``share``: as %."""
    if high <= low:
        return [(0.5, _short(low, share))]
    values = _round_powers(low, high) if log else []
    if len(values) < 2:  # a logarithmic axis of less than a decade may hold but one round power
        values = _round_steps(low, high, whole)
    return [(place(v, low, high, log=log), _short(v, share)) for v in values]


def _round_powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between both ends; only the powers, or some of them, where there are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits, every in (((1, 2, 5), 1), ((1, 3), 1), *(((1,), n) for n in range(1, len(decades) + 1))):
        found = [d * 10.0**k for k in decades if k % every == 0 for d in digits]
        found = [v for v in found if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
        if len(found) <= TICKS + 1:
            break
    return found


def _round_steps(low: float, high: float, whole: bool) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between both ends."""
    power = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    step = next(d * power for d in (1, 2, 5, 10) if (high - low) / (d * power) <= TICKS)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def label(name: str) -> list[str]:
    """A name in lines of at most ``LABEL_WIDTH`` characters: broken before a dot or a sign, else behind an underscore."""
    lines: list[str] = []
    for section in re.findall(r"[.@:+-]?[^.@:+-]+|[.@:+-]", name):
        pieces = [section] if len(section) <= LABEL_WIDTH else re.findall(r"[^_]{1,14}_?|_", section)
        for piece in pieces:
            if lines and len(lines[-1]) + len(piece) <= LABEL_WIDTH:
                lines[-1] += piece
            else:
                lines.append(piece)
    return lines


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _short(value: float, share: bool) -> str:
    """The text of a tick."""
    value = 0.0 if abs(value) < 1e-12 else value
    if share:
        return f"{100 * value:.4g}%"
    return size_text(value).replace(" ", "") if value >= 10_000 else f"{value:.4g}"


def _exact(value: float, share: bool) -> str:
    if share:
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"
