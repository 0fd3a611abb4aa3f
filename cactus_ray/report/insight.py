"""Figures that say what a search learnt: objectives over each parameter, where compute went.

Trials whose constraints are not met are drawn apart: they do not count, but they show where the limits lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from cactus_ray.report.figures import COLOURS, MUTED, dressed, safe
from cactus_ray.report.tables import value_text
from cactus_ray.report.ticks import is_share, metric_text, tick_text, tick_values
from cactus_ray.search.budget import train_seconds
from cactus_ray.search.domains import Choices
from cactus_ray.search.objectives import feasible
from cactus_ray.search.parameters import Parameter
from cactus_ray.search.space import Space
from cactus_ray.search.store import Records

# Pixels of the slices: a row with its axis, the part of it for ticks and title, the legend above all, the last axis.
ROW_HEIGHT, ROW_GAP, LEGEND, BELOW = 160, 62, 36, 56


@dataclass(frozen=True, slots=True)
class Complete:
    """A complete trial: active values, objectives by name, and whether every constraint is met."""

    trial: str
    values: Mapping[str, Any]
    objectives: Mapping[str, float]
    met: bool


def complete_trials(space: Space, records: Records) -> list[Complete]:
    """The complete trials of a run, in the order in which they began."""
    return [
        Complete(
            t.id, t.parameters, {o.metric: t.metrics[o.metric] for o in space.objectives},
            all(violation <= 0 for violation in feasible(t.metrics, space.constraints).values()),
        )
        for t in records.drawn()
        if t.status == "completed" and all(o.metric in t.metrics for o in space.objectives)
    ]  # fmt: skip


def varied(space: Space, trials: Sequence[Complete]) -> list[Parameter]:
    """Parameters with at least two values among the trials."""
    return [p for p in space.parameters if len({str(t.values[p.name]) for t in trials if p.name in t.values}) > 1]


def slices_figure(space: Space, trials: Sequence[Complete], objective: str) -> go.Figure:
    """One objective over every parameter that varied, a row each, with a mark per trial in which it is active."""
    parameters = varied(space, trials)
    above = LEGEND if space.constraints else 8
    rows = ROW_HEIGHT * len(parameters)
    figure = make_subplots(len(parameters), 1, vertical_spacing=ROW_GAP / rows)
    for met, name, colour, symbol in (
        (True, "constraints met" if space.constraints else "trial", COLOURS[0], "circle"),
        (False, "constraints not met", MUTED, "x-thin-open"),
    ):
        shown = False
        for row, parameter in enumerate(parameters, 1):
            active = [t for t in trials if parameter.name in t.values and t.met == met]
            if not active:
                continue
            figure.add_trace(
                go.Scatter(
                    x=[_shown(parameter, t.values[parameter.name]) for t in active],
                    y=[t.objectives[objective] for t in active], mode="markers", name=name, legendgroup=name,
                    showlegend=bool(space.constraints) and not shown,
                    marker={"color": colour, "symbol": symbol, "size": 7},
                    text=[f"{safe(t.trial)}: {safe(metric_text(objective, t.objectives[objective]))}" for t in active],
                    hovertemplate="%{text} at %{x}<extra></extra>",
                ),
                row=row, col=1,
            )  # fmt: skip
            shown = True
    dressed(figure, above + rows + BELOW, top=above, legend="above").update_layout(margin_b=BELOW)
    for row, parameter in enumerate(parameters, 1):
        axis = _axis(parameter, [t.values[parameter.name] for t in trials if parameter.name in t.values])
        figure.update_xaxes(title_text=safe(parameter.name), title_standoff=4, **axis, row=row, col=1)
    return figure.update_yaxes(tickformat=".0%" if is_share(objective) else "~s", nticks=5)


def compute_figure(seconds: Mapping[str, float]) -> go.Figure:
    """Seconds by what they were spent on, as bars; the largest on top."""
    order = sorted(seconds, key=lambda name: seconds[name])
    figure = go.Figure(
        go.Bar(
            x=[seconds[name] for name in order], y=[safe(name) for name in order], orientation="h",
            marker={"color": [COLOURS[0] if name.startswith("training") else COLOURS[5] for name in order]},
            hovertemplate="%{y}: %{x:.1f} s<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title_text="seconds", rangemode="tozero")
    figure.update_yaxes(type="category", automargin=True)
    return dressed(figure, 90 + 26 * len(order), legend="none")


def compute(records: Records, leading: set[str]) -> dict[str, float]:
    """Seconds of training by what became of the trial (``leading``: those with a point on the front), and seconds of
    verification by stage."""
    found: dict[str, float] = {}
    for trial in records.trials.values():
        outcome = {"completed": "dominated trials", "stopped": "stopped trials", "failed": "failed trials"}
        outcome["waiting"] = "waiting trials"
        name = "trials on the front" if trial.id in leading else outcome.get(trial.status, "trials under way")
        name = "replicates" if trial.of is not None else name
        found[f"training: {name}"] = found.get(f"training: {name}", 0.0) + train_seconds(trial)
    found |= {f"verification: {stage}": seconds for stage, seconds in records.ledger().items()}
    return {name: seconds for name, seconds in found.items() if seconds > 0}


def in_order(domain: Choices) -> Sequence[Any]:
    """Choices as an axis shows them: numbers by size, everything else as written."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in domain.values)
    return sorted(domain.values) if numbers else domain.values


def _axis(parameter: Parameter, values: Sequence[Any]) -> dict[str, Any]:
    """Layout of a parameter's axis: choices in their order, ranges with round values, also on a logarithmic scale."""
    domain = parameter.domain
    if isinstance(domain, Choices):
        order = [_shown(parameter, value) for value in in_order(domain)]
        return {"type": "category", "categoryorder": "array", "categoryarray": order}
    ticks = tick_values(float(min(values)), float(max(values)), log=domain.log, whole=domain.integer)
    axis = {"tickmode": "array", "tickvals": ticks, "ticktext": [tick_text(v) for v in ticks]}
    return axis | ({"type": "log"} if domain.log else {})


def _shown(parameter: Parameter, value: Any) -> Any:
    return safe(value_text(value)) if isinstance(parameter.domain, Choices) else value
