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
from cactus_ray.search.budget import train_seconds
from cactus_ray.search.domains import Choices
from cactus_ray.search.objectives import feasible
from cactus_ray.search.parameters import Parameter
from cactus_ray.search.space import Space
from cactus_ray.search.store import Records

ROW_HEIGHT = 170


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


def slices_figure(space: Space, trials: Sequence[Complete]) -> go.Figure:
    """Every objective (columns) over every parameter that varied (rows), a mark per trial that was asked for it."""
    parameters = varied(space, trials)
    objectives = [o.metric for o in space.objectives]
    figure = make_subplots(len(parameters), len(objectives), vertical_spacing=min(0.08, 0.3 / max(len(parameters), 1)))
    for met, name, colour, symbol in (
        (True, "constraints met" if space.constraints else "trial", COLOURS[0], "circle"),
        (False, "constraints not met", MUTED, "x-thin-open"),
    ):
        shown = False
        for row, parameter in enumerate(parameters, 1):
            asked = [t for t in trials if parameter.name in t.values and t.met == met]
            for column, objective in enumerate(objectives, 1):
                if not asked:
                    continue
                figure.add_trace(
                    go.Scatter(
                        x=[_shown(parameter, t.values[parameter.name]) for t in asked],
                        y=[t.objectives[objective] for t in asked], mode="markers", name=name, legendgroup=name,
                        showlegend=not shown, marker={"color": colour, "symbol": symbol, "size": 7},
                        text=[safe(t.trial) for t in asked], hovertemplate="%{text}: %{x}, %{y:.4g}<extra></extra>",
                    ),
                    row=row, col=column,
                )  # fmt: skip
                shown = True
    for row, parameter in enumerate(parameters, 1):
        axis: dict[str, Any] = {}
        if isinstance(parameter.domain, Choices):
            order = [_shown(parameter, value) for value in in_order(parameter.domain)]
            axis = {"type": "category", "categoryorder": "array", "categoryarray": order}
        axis |= {"type": "log"} if not isinstance(parameter.domain, Choices) and parameter.domain.log else {}
        for column, objective in enumerate(objectives, 1):
            figure.update_xaxes(title_text=safe(parameter.name), title_standoff=4, **axis, row=row, col=column)
            figure.update_yaxes(
                title_text=safe(_short(objective)).replace("@", "<br>@"), title_standoff=4, row=row, col=column
            )
    return dressed(figure, 90 + ROW_HEIGHT * len(parameters), top=50, legend="above")


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


def _shown(parameter: Parameter, value: Any) -> Any:
    return safe(value_text(value)) if isinstance(parameter.domain, Choices) else value


def _short(metric: str) -> str:
    return metric.replace("_accuracy", "").replace("_", " ")
