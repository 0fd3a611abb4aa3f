"""The front, seen again: on samples that the search did not use, and with other seeds, beside what the search saw.

Points are rows of ``points.csv`` with the columns of ``search.replicates.seen_again``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go

from cactus_ray.report.figures import COLOURS, INK, MUTED, Point, dressed, safe
from cactus_ray.report.tables import Cell, Column
from cactus_ray.search.replicates import AHEAD, BEHIND, OPEN
from cactus_ray.search.store import Records
from cactus_ray.verification.verdict import wilson

SHOWN_POINTS = 40
OFFSET = 0.22
"""Between the marks of one point, which has one unit of height."""


def of_front(points: Sequence[Point]) -> list[Point]:
    """The points of the front that were seen again, smallest first."""
    found = [p for p in points if p["on_front"] and ("seeds" in p or "fresh_samples" in p)]
    return sorted(found, key=lambda p: (p["bytes"], -p["certified_accuracy"]))


def again_notes(records: Records, points: Sequence[Point]) -> list[str]:
    """What it comes to, in a sentence each; also that there were no fresh samples. Nothing without a front."""
    front = [p for p in points if p["on_front"]]
    notes = [str(records.study["none_fresh"])] if front and records.study.get("none_fresh") else []
    if fresh := [p for p in front if "fresh_samples" in p]:
        mean = sum(p["fresh_certified_accuracy"] - p["certified_accuracy"] for p in fresh) / len(fresh)
        counts = sorted({p["fresh_samples"] for p in fresh})
        notes.append(
            f"on {' or '.join(map(str, counts))} fresh samples, {len(fresh)} of {len(front)} points of the front are "
            f"certified {_points(mean)} on average than on those that they were chosen by"
        )
    if failed := [p for p in front if "fresh_error" in p]:
        reasons = "; ".join(dict.fromkeys(f"{p['trial']}: {p['fresh_error']}" for p in failed))
        share = f"{len(failed)} of {len(front)} points of the front"
        notes.append(f"{share} have no verdicts on fresh samples ({reasons})")
    if again := [p for p in front if "seeds" in p]:
        states = Counter(p["over_seeds"] for p in again)
        words = ", ".join(f"{states[s]} {s}" for s in (AHEAD, BEHIND, OPEN) if s in states)
        most = max(p["seeds"] for p in again)
        notes.append(f"over up to {most} seeds, of {len(again)} points of the front: {words} (each at 95 %)")
    return notes


def _points(difference: float) -> str:
    """A difference of shares in percentage points: ``1.2 points lower``."""
    return f"{100 * abs(difference):.1f} points {'lower' if difference < 0 else 'higher'}"


def again_lines(point: Point) -> list[str]:
    """What is known of one point beyond the search, in words."""
    lines = []
    if "fresh_samples" in point:
        low, high = _fresh(point)
        lines.append(
            f"on {point['fresh_samples']} fresh samples: {point['fresh_certified_accuracy']:.1%} certified "
            f"[{low:.1%}, {high:.1%}], {point['fresh_standard_accuracy']:.1%} standard accuracy"
        )
    if "fresh_error" in point:
        lines.append(f"not verified on fresh samples: {point['fresh_error']}")
    if "seeds" in point:
        names = [column.removesuffix("_mean") for column in point if column.endswith("_mean")]
        spread = ", ".join(
            f"{n} {point[f'{n}_mean']:.6g} ({point[f'{n}_min']:.6g} to {point[f'{n}_max']:.6g})" for n in names
        )
        standing = f"; {point['over_seeds']}" if "over_seeds" in point else ""
        lines.append(f"over {point['seeds']} seeds: {spread}{standing}")
    return lines


def _fresh(point: Point) -> tuple[float, float]:
    return wilson(point["fresh_n_certified"], point["fresh_samples"])


# --- the figure ----------------------------------------------------------------------------------------------------


def again_figure(points: Sequence[Point], epsilon: float) -> go.Figure:
    """A line per point of the front: certified accuracy on the search's samples and on fresh ones, each with its Wilson
    95 % interval and joined by a line, and over seeds the mean from least to largest. At most ``SHOWN_POINTS``, the
    smallest."""
    shown = of_front(points)[:SHOWN_POINTS]
    fresh = [i for i, p in enumerate(shown) if "fresh_samples" in p]
    again = [i for i, p in enumerate(shown) if "seeds" in p]
    figure = go.Figure()
    if fresh:
        ends = [(shown[i]["certified_accuracy"], shown[i]["fresh_certified_accuracy"]) for i in fresh]
        figure.add_trace(
            go.Scatter(
                x=[x for pair in ends for x in (*pair, None)],
                y=[y for i in fresh for y in (i - OFFSET, i, None)],
                mode="lines", line={"color": MUTED, "width": 2}, hoverinfo="skip", showlegend=False,
                name="the same network",
            )
        )  # fmt: skip
    bounds = [wilson(p["n_certified"], p["samples"]) for p in shown]
    values = [p["certified_accuracy"] for p in shown]
    places = [i - OFFSET for i in range(len(shown))]
    figure.add_trace(_marks("the search's samples, 95 %", INK, "circle", places, values, bounds))
    if fresh:
        values = [shown[i]["fresh_certified_accuracy"] for i in fresh]
        bounds = [_fresh(shown[i]) for i in fresh]
        figure.add_trace(_marks("fresh samples, 95 %", COLOURS[1], "square", [float(i) for i in fresh], values, bounds))
    if again:
        values = [shown[i]["certified_accuracy_mean"] for i in again]
        bounds = [(shown[i]["certified_accuracy_min"], shown[i]["certified_accuracy_max"]) for i in again]
        places = [i + OFFSET for i in again]
        name = "mean over seeds, least to largest"
        figure.add_trace(_marks(name, COLOURS[0], "diamond", places, values, bounds))
    names = [f"{safe(p['trial'])} · {safe(p['level'])}" for p in shown]
    figure.update_yaxes(tickvals=list(range(len(shown))), ticktext=names, range=[len(shown) - 0.5, -0.5])
    figure.update_xaxes(title_text=f"certified accuracy at epsilon {epsilon:g}", tickformat=".0%")
    return dressed(figure, 160 + 46 * len(shown), top=50, legend="above")


def _marks(
    name: str, colour: str, symbol: str, places: Sequence[float], values: Sequence[float],
    bounds: Sequence[tuple[float, float]],
) -> go.Scatter:  # fmt: skip
    texts = [f"{name}: {v:.1%} ({low:.1%} to {high:.1%})" for v, (low, high) in zip(values, bounds, strict=True)]
    return go.Scatter(
        x=list(values), y=list(places), mode="markers", name=name,
        marker={"size": 9, "color": colour, "symbol": symbol},
        error_x={
            "type": "data", "symmetric": False, "color": colour, "thickness": 1.4, "width": 4,
            "array": [high - v for v, (_, high) in zip(values, bounds, strict=True)],
            "arrayminus": [v - low for v, (low, _) in zip(values, bounds, strict=True)],
        },
        text=texts, hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip


# --- the table -----------------------------------------------------------------------------------------------------


def _share(column: str) -> Callable[[Point], tuple[Any, str]]:
    return lambda p: (p[column], f"{p[column]:.1%}") if column in p else ("", "-")


def _gap(point: Point) -> tuple[Any, str]:
    if "fresh_samples" not in point:
        return "", "-"
    gap = point["fresh_certified_accuracy"] - point["certified_accuracy"]
    return gap, f"{100 * gap:+.1f}"


def _between(low: float, high: float) -> tuple[Any, str]:
    return low, f"{low:.1%} - {high:.1%}"


def _spread(point: Point) -> tuple[Any, str]:
    ends = ("certified_accuracy_min", "certified_accuracy_max")
    return _between(*(point[end] for end in ends)) if "seeds" in point else ("", "-")


_CELLS: tuple[tuple[Column, Callable[[Point], tuple[Any, str]]], ...] = (
    (Column("trial", True, "ascending"), lambda p: (p["trial"], str(p["trial"]))),
    (Column("level", True, "ascending"), lambda p: (p["level"], str(p["level"]))),
    (Column("bytes", first="ascending"), lambda p: (p["bytes"], f"{p['bytes']:,}")),
    (Column("certified"), _share("certified_accuracy")),
    (Column("95 %"), lambda p: _between(*wilson(p["n_certified"], p["samples"]))),
    (Column("certified, fresh"), _share("fresh_certified_accuracy")),
    (Column("95 %, fresh"), lambda p: _between(*_fresh(p)) if "fresh_samples" in p else ("", "-")),
    (Column("fresh - search, points", first="ascending"), _gap),
    (Column("seeds"), lambda p: (p["seeds"], str(p["seeds"])) if "seeds" in p else ("", "-")),
    (Column("over seeds", True, "ascending"), lambda p: (p.get("over_seeds", ""), p.get("over_seeds", "-"))),
    (Column("mean over seeds"), _share("certified_accuracy_mean")),
    (Column("least to largest"), _spread),
)
COLUMNS = tuple(column for column, _ in _CELLS)


def again_rows(points: Sequence[Point]) -> list[tuple[Cell, ...]]:
    """The points of the front that were seen again, smallest first."""
    rows = []
    for point in of_front(points):
        shown = [(column.text, *show(point)) for column, show in _CELLS]
        rows.append(tuple(Cell(str(value), read, text) for text, value, read in shown))
    return rows
