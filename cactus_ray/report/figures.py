"""The figures of a study as Plotly figures, for the page and for W&B alike.

Points are rows of ``points.csv`` with ``on_front`` (``search.store.with_front``); only complete trials have any.
Accuracies are fractions of the samples, sizes bytes (k = 1,000). Every text that a user can choose is escaped, because
Plotly reads a subset of HTML in its texts. Numbers are plain lists: older viewers do not read Plotly's binary arrays.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import plotly.graph_objects as go

from cactus_ray.verification.verdict import wilson

Point = Mapping[str, Any]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, GRID, MUTED = "#1f2933", "#e4e7eb", "#9aa5b1"
# Okabe and Ito's colours without yellow, which cannot be read on white; dashes tell repeated colours apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES = ("solid", "dash", "dot", "dashdot")
SHOWN_CURVES = 24


def upper_end(point: Point) -> float:
    """The largest certified accuracy that the verdicts allow: (all - falsified) / all."""
    return float((point["samples"] - point["n_falsified"]) / point["samples"])


def size_text(size: float) -> str:
    """ "37.2 k" for 37,190 bytes; k = 1,000."""
    for limit, unit, factor in ((1e3, "", 1.0), (1e6, " k", 1e3), (1e9, " M", 1e6)):
        if size < limit:
            return f"{size / factor:.3g}{unit}" if unit else f"{size:.0f}"
    return f"{size / 1e9:.3g} G"


def duration_text(seconds: float) -> str:
    """ "48 s", "12 min 5 s" or "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def hover(point: Point) -> str:
    """Everything that is known of a point, as Plotly text."""
    low, high = wilson(point["n_certified"], point["samples"])
    lines = [
        f"<b>{safe(point['trial'])} · {safe(point['level'])}</b> ({safe(point['method'])})",
        f"certified {point['certified_accuracy']:.1%} (95 %: {low:.1%} to {high:.1%})",
        f"unknown {point['n_unknown']}, falsified {point['n_falsified']} of {point['samples']};"
        f" upper end {upper_end(point):.1%}",
        f"standard accuracy {point['standard_accuracy']:.1%}",
        f"file {point['bytes']:,} bytes; ideal {point['ideal_bits'] / 8:,.0f}; {size_text(point['macs'])} MACs",
        f"training {point['train_seconds']:.1f} s, verification {point['verify_seconds']:.1f} s",
    ]
    return "<br>".join(lines)


def front_figure(points: Sequence[Point], epsilon: float, broken: Set[str] = frozenset()) -> go.Figure:
    """Certified accuracy against file size; standard accuracy is colour, unknown samples are intervals.

    The step line joins the front's best certified accuracies for a size; points of the front below it are there for
    another objective. ``broken``: trials that do not meet a constraint, marked by a cross.
    """
    figure = go.Figure()
    rest = [p for p in points if not p["on_front"]]
    best = sorted((p for p in points if p["on_front"]), key=lambda p: p["bytes"])
    shades = [p["standard_accuracy"] for p in points] or [0.0, 1.0]
    scale = {
        "cmin": min(shades),
        "cmax": max(max(shades), min(shades) + 0.01),
        "colorscale": "Viridis",
        "reversescale": True,
    }
    if rest:
        marker = {"size": 8, "opacity": 0.5, "line": {"width": 0}, "symbol": _symbols(rest, broken)}
        figure.add_trace(_scatter(rest, "dominated", marker, scale, MUTED))
    if best:
        steps = _staircase(best)
        right = max(p["bytes"] for p in points)
        line = {"shape": "hv", "width": 2, "color": INK}
        figure.add_trace(
            go.Scatter(
                x=[*(p["bytes"] for p in steps), right], y=[p["certified_accuracy"] for p in (*steps, steps[-1])],
                mode="lines", line=line,
                name="best certified accuracy up to a size", hoverinfo="skip",
            )
        )  # fmt: skip
        bar = {
            "title": {"text": "standard accuracy", "side": "top"}, "tickformat": ".0%", "nticks": 4,
            "tickangle": 0, "orientation": "h", "thickness": 10, "len": 0.55, "outlinewidth": 0,
            "x": 1.0, "xanchor": "right", "y": 1.02, "yanchor": "bottom",
        }  # fmt: skip
        marker = {"size": 12, "line": {"width": 1.5, "color": INK}, "showscale": True, "colorbar": bar}
        marker |= {"symbol": _symbols(best, broken)}
        figure.add_trace(_scatter(best, "on the front", marker, scale, INK))
    figure.update_xaxes(type="log", title_text="bytes of model.onnx (k = 1,000)", tickformat="~s", **_decades(points))
    figure.update_yaxes(title_text=f"certified accuracy at epsilon {epsilon:g}", tickformat=".0%")
    return dressed(figure, 560, top=70)


def curves_figure(points: Sequence[Point]) -> go.Figure:
    """One line per trial through its levels, by size. With more than ``SHOWN_CURVES`` trials, those without a point on
    the front start hidden and have no entry in the legend, which could not hold them."""
    figure = go.Figure()
    trials: dict[str, list[Point]] = {}
    for point in points:
        trials.setdefault(str(point["trial"]), []).append(point)
    leading = {str(p["trial"]) for p in points if p["on_front"]}
    for number, (trial, levels) in enumerate(trials.items()):
        levels.sort(key=lambda p: (p["bytes"], p["certified_accuracy"]))
        hidden = len(trials) > SHOWN_CURVES and trial not in leading
        colour, dash = _style(number)
        figure.add_trace(
            go.Scatter(
                x=[p["bytes"] for p in levels], y=[p["certified_accuracy"] for p in levels], mode="lines+markers",
                line={"color": colour, "dash": dash, "width": 2}, marker={"size": 6},
                visible="legendonly" if hidden else True, showlegend=not hidden,
                name=f"{safe(trial)}{' ★' if trial in leading else ''}",
                meta="front" if trial in leading else None,
                text=[hover(p) for p in levels], hovertemplate="%{text}<extra></extra>",
            )
        )  # fmt: skip
    figure.update_xaxes(type="log", title_text="bytes of model.onnx (k = 1,000)", tickformat="~s", **_decades(points))
    figure.update_yaxes(title_text="certified accuracy", tickformat=".0%")
    return dressed(figure, 460 + 10 * (sum(bool(t.showlegend) for t in figure.data) // 6))


def importances_figure(importances: Mapping[str, Mapping[str, float]]) -> go.Figure:
    """Share of each parameter in the variation of each objective, as grouped bars; most important on top."""
    figure = go.Figure()
    names = {name for shares in importances.values() for name in shares}
    order = sorted(names, key=lambda name: sum(shares.get(name, 0.0) for shares in importances.values()))
    for number, (objective, shares) in enumerate(importances.items()):
        figure.add_trace(
            go.Bar(
                x=[shares.get(name, 0.0) for name in order], y=[safe(name) for name in order], orientation="h",
                name=safe(objective), marker={"color": COLOURS[number % len(COLOURS)]},
                hovertemplate="%{y}: %{x:.0%}<extra>%{fullData.name}</extra>",
            )
        )  # fmt: skip
    figure.update_xaxes(title_text="importance", tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(type="category", automargin=True)
    return dressed(figure, 140 + len(order) * (16 + 12 * len(importances)), top=56, legend="above")


def cost_figure(seconds: Mapping[str, tuple[float, float]]) -> go.Figure:
    """Seconds of training and of verification per trial, stacked."""
    figure = go.Figure()
    for column, (name, colour) in enumerate((("training", COLOURS[0]), ("verification", COLOURS[5]))):
        figure.add_trace(
            go.Bar(
                x=[safe(trial) for trial in seconds], y=[pair[column] for pair in seconds.values()], name=name,
                marker={"color": colour}, hovertemplate="%{x}: %{y:.1f} s<extra>" + name + "</extra>",
            )
        )  # fmt: skip
    figure.update_layout(barmode="stack")
    figure.update_xaxes(type="category")
    figure.update_yaxes(title_text="seconds", rangemode="tozero")
    return dressed(figure, 340, top=40, legend="above")


def training_figure(histories: Mapping[str, Sequence[Mapping[str, Any]]], metric: str) -> go.Figure:
    """One metric of training over the epochs, a line per trial. Epochs without a finite value leave a gap."""
    figure = go.Figure()
    for number, (trial, epochs) in enumerate(histories.items()):
        colour, dash = _style(number)
        values = [_finite(e["metrics"].get(metric)) for e in epochs]
        if any(v is not None for v in values):
            figure.add_trace(
                go.Scatter(
                    x=[e["epoch"] for e in epochs], y=values, mode="lines" if len(epochs) > 1 else "markers",
                    name=safe(trial), line={"color": colour, "dash": dash, "width": 1.5},
                    hovertemplate="epoch %{x}: %{y:.4g}<extra>" + safe(trial) + "</extra>",
                )
            )  # fmt: skip
    last = max((e["epoch"] for epochs in histories.values() for e in epochs), default=0)
    figure.update_xaxes(title_text="epoch", **({"dtick": 1} if last <= 8 else {}))
    if metric.endswith("accuracy"):
        figure.update_yaxes(tickformat=".0%")
    return dressed(figure, 260, legend="none")


def _symbols(points: Sequence[Point], broken: Set[str]) -> list[str]:
    return ["x" if p["trial"] in broken else "circle" for p in points]


def _scatter(points: Sequence[Point], name: str, marker: dict[str, Any], scale: dict[str, Any], bar: str) -> go.Scatter:
    lower = [p["certified_accuracy"] for p in points]
    unknown = [upper_end(p) - p["certified_accuracy"] for p in points]
    return go.Scatter(
        x=[p["bytes"] for p in points], y=lower, mode="markers", name=name,
        marker={**marker, **scale, "color": [p["standard_accuracy"] for p in points]},
        error_y={
            "type": "data", "symmetric": False, "array": unknown, "arrayminus": [0.0] * len(points), "color": bar,
            "thickness": 1.2, "width": 3,
        },
        text=[hover(p) for p in points], hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip


def _staircase(front: Sequence[Point]) -> list[Point]:
    """The points (sorted by size) whose certified accuracy exceeds that of all smaller ones."""
    steps: list[Point] = []
    for point in sorted(front, key=lambda p: (p["bytes"], -p["certified_accuracy"])):
        if not steps or point["certified_accuracy"] > steps[-1]["certified_accuracy"]:
            steps.append(point)
    return steps


def _decades(points: Sequence[Point]) -> dict[str, Any]:
    """Tick marks of a logarithmic axis that leave a few labels also where the sizes span less than a decade."""
    sizes = [p["bytes"] for p in points]
    if not sizes:
        return {}
    span = math.log10(max(sizes) / min(sizes))
    return {"dtick": "D1" if span < 0.7 else "D2" if span < 2.5 else 1}


def _style(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def safe(text: Any) -> str:
    return html.escape(str(text))


def dressed(figure: go.Figure, height: int, *, top: int = 20, legend: str = "below") -> go.Figure:
    axis = {
        "gridcolor": GRID,
        "linecolor": MUTED,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": MUTED,
        "automargin": True,
    }
    place = {"yanchor": "bottom", "y": 1.02} if legend == "above" else {"yanchor": "top", "y": -0.2}
    figure.update_layout(
        template="none", height=height, paper_bgcolor="white", plot_bgcolor="white", showlegend=legend != "none",
        font={"family": FONT, "size": 13, "color": INK}, margin={"l": 60, "r": 20, "t": top, "b": 60},
        legend={"orientation": "h", "x": 0, "xanchor": "left", **place},
        hoverlabel={
            "bgcolor": "white", "bordercolor": MUTED, "align": "left",
            "font": {"family": FONT, "size": 12, "color": INK},
        },
    )  # fmt: skip
    figure.update_xaxes(title_standoff=8, **axis)
    figure.update_yaxes(**axis)
    return figure
