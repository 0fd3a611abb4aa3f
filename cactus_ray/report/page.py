"""``report.html``: one file that shows a run without any network connection, from its records and its space alone."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from cactus_ray.errors import UserError
from cactus_ray.report import again, figures, insight, ledger, parallel, tables
from cactus_ray.search.document import dump_yaml
from cactus_ray.search.importance import evaluator_name, importances
from cactus_ray.search.pareto import relative_hypervolume
from cactus_ray.search.replicates import seen_again
from cactus_ray.search.samplers import MODEL_TRIALS
from cactus_ray.search.space import Space, load_space
from cactus_ray.search.store import Records, read_records, with_front

FEW_TRIALS = 30
PROXIES = {
    "loss": "loss",
    "standard_accuracy": "standard accuracy",
    "ibp_certified_accuracy": "certified accuracy (IBP)",
}


def write_page(run: Path) -> Path:
    """Write ``run/report.html`` and return its path; works for a run in any state, also while it goes on.

    Everything is inside the file, plotly.js too, and a content security policy forbids every request. All texts are
    escaped. Raises UserError where ``run`` holds no space or no records.
    """
    text = render(run, load_space(run / "space.yaml"), read_records(run, verdicts=False))
    path = run / "report.html"
    temporary = run / ".report.html.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def render(run: Path, space: Space, records: Records) -> str:
    """The page as text. ``run`` is only named, in the commands that the page proposes."""
    points = seen_again(records, with_front(records, space.front), space.front)
    importances_, importance_note = _importances(space, records)
    charts = _charts(space, records, points, importances_)
    lines = _lines(space, records, points)
    seconds = tables.seconds_by_trial(records)
    ledger_columns, ledger_rows = ledger.ledger_table(space, records)
    context = {
        "name": space.name,
        "status": _status(records),
        "numbers": _numbers(space, records, points),
        "facts": _facts(space, records, points),
        "warnings": _warnings(records, points),
        "front_words": _and([_words(column) for column in space.front]),
        "many_curves": len({p["trial"] for p in points}) > figures.SHOWN_CURVES,
        "rows": tables.point_rows(points),
        "columns": tables.POINT_COLUMNS,
        "again_notes": [f"{note[0].upper()}{note[1:]}." for note in again.again_notes(records, points)],
        "again_rows": again.again_rows(points),
        "again_columns": again.COLUMNS,
        "example": tables.example_command(run, points, space.front),
        "front_trials": tables.front_trials(run, records, points),
        "importance_note": importance_note,
        "cost_words": _cost_words(space, records, seconds),
        "training": [{"id": f"training-{m}", "title": t} for m, t in PROXIES.items() if f"training-{m}" in charts],
        "ledger_columns": ledger_columns,
        "ledger_rows": ledger_rows,
        "losses": tables.lost_trials(records),
        "trials": tables.trial_rows(space, records),
        "trial_columns": tables.trial_columns(space),
        "space": dump_yaml(space.to_dict()),
        "footer": _footer(records),
        "ids": list(charts),
        "constrained": bool(space.constraints),
        "figures": script_json({name: json.loads(chart.to_json()) for name, chart in charts.items()}),
        "plotly": Markup(get_plotlyjs()),
        "css": Markup(_asset("page.css")),
        "parallel": script_json(lines) if lines else None,
        "objectives": [_words(o.metric) for o in space.objectives],
        "cut": lines is not None and len(lines["lines"]) < lines["complete"],
        "shown_lines": parallel.SHOWN_LINES,
        "js": Markup(_asset("parallel.js") + _asset("page.js")),
    }
    return _template().render(context)


def script_json(value: Any) -> Markup:
    """JSON that can stand inside a <script> element whatever its texts hold."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _asset(name: str) -> str:
    return files("cactus_ray.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False)
    return environment.from_string(_asset("page.html.jinja"))


def _charts(
    space: Space, records: Records, points: Sequence[figures.Point], importances: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """The figures by the id of their place on the page; one that has nothing to show is absent."""
    charts: dict[str, Any] = {}
    if points:
        charts["front"] = figures.front_figure(points, space.threat.epsilon, broken_trials(space, records))
        charts["curves"] = figures.curves_figure(points)
    if again.of_front(points):
        charts["again"] = again.again_figure(points, space.threat.epsilon)
    if any(importances.values()):
        charts["importances"] = figures.importances_figure({k: v for k, v in importances.items() if v})
    complete = insight.complete_trials(space, records)
    if len(complete) > 1 and insight.varied(space, complete):
        for number, objective in enumerate(space.objectives):
            charts[f"slices-{number}"] = insight.slices_figure(space, complete, objective.metric)
    if seconds := tables.seconds_by_trial(records):
        charts["cost"] = figures.cost_figure(seconds)
        leading = {p["trial"] for p in points if p["on_front"]}
        charts["compute"] = insight.compute_figure(insight.compute(records, leading))
    histories = {trial.id: trial.epochs for trial in records.trials.values() if trial.epochs}
    for metric in PROXIES:
        if (figure := figures.training_figure(histories, metric)).data:
            charts[f"training-{metric}"] = figure
    return charts


def _lines(space: Space, records: Records, points: Sequence[figures.Point]) -> dict[str, Any] | None:
    """The parallel coordinates; None where there is nothing to compare."""
    complete = insight.complete_trials(space, records)
    if len(complete) < 2 or not insight.varied(space, complete):
        return None
    return parallel.parallel_data(space, complete, {p["trial"] for p in points if p["on_front"]})


def _importances(space: Space, records: Records) -> tuple[dict[str, dict[str, float]], str]:
    """Importances by objective, and what may be read from them."""
    complete = sum(t.status == "completed" for t in records.drawn())
    try:
        found = importances(space, records)
    except UserError as error:
        return {}, f"Not computed: {error}"
    if not any(found.values()):
        return {}, f"Too few trials to say: {complete} complete, and at least 4 with different results are needed."
    method = f"{evaluator_name(complete)}, {complete} complete trials"
    note = f"Share of each parameter in the variation of each objective ({method})."
    if complete < FEW_TRIALS:
        note += f" With fewer than {FEW_TRIALS} trials this is a hint at most: another seed may order them differently."
    return found, note


def _status(records: Records) -> dict[str, str]:
    if records.finished is None:
        return {"kind": "open", "text": "running, or ended without a last word"}
    status = str(records.finished.get("status"))
    if reason := records.finished.get("reason"):
        status += f" ({reason})"
    return {"kind": {"completed": "good", "failed": "bad"}.get(status.split(" ")[0], "open"), "text": status}


def _numbers(space: Space, records: Records, points: Sequence[figures.Point]) -> list[tuple[str, str]]:
    front = [p for p in points if p["on_front"]]
    complete = sum(t.status == "completed" for t in records.drawn())
    numbers = [("trials complete", f"{complete} of {space.search.trials}"), ("points", str(len(points)))]
    if front:
        numbers += [
            ("points on the front", str(len(front))),
            ("best certified accuracy", f"{max(p['certified_accuracy'] for p in front):.1%}"),
            ("kB on the front", " - ".join(f"{f(p['bytes'] for p in front) / 1000:.3g}" for f in (min, max))),
            ("hypervolume", _hypervolume(space, records, points)),
        ]
    return numbers


def _hypervolume(space: Space, records: Records, points: Sequence[figures.Point]) -> str:
    try:
        return f"{relative_hypervolume(points, space.front, records.study.get('reference_point', {})):.4f}"
    except ValueError:  # the run's first record is damaged
        return "no reference"


def _facts(space: Space, records: Records, points: Sequence[figures.Point]) -> list[tuple[str, str]]:
    """What was asked and how it was measured, one line each."""
    drawn, others = records.drawn(), records.replicates()
    states = {s: sum(t.status == s for t in drawn) for s in ("completed", "failed", "stopped", "waiting")}
    open_ = len(drawn) - sum(states.values())
    again_ = f"; {sum(t.status == 'completed' for t in others)} of {len(others)} replicates" if others else ""
    low, high = space.threat.domain
    verifier = space.to_dict()["verification"]
    model = space.base["model"]
    samples = sorted({p["samples"] for p in points})
    return [
        ("network", f"{model.get('factory') or model.get('name')} on {space.data.name}"),
        ("threat", f"{space.threat.norm} ball of radius {space.threat.epsilon:g}, pixels in [{low:g}, {high:g}]"),
        ("searched", ", ".join(p.name for p in space.parameters) or "nothing: one configuration"),
        ("objectives", "; ".join(f"{o.goal} {o.metric}" for o in space.objectives)),
        ("constraints", "; ".join(c.name for c in space.constraints) or "none"),
        ("levels", ", ".join(space.levels)),
        (
            "trials",
            ", ".join([*(f"{n} {s}" for s, n in states.items() if n or s != "waiting"), f"{open_} running"])
            + f" ({_sampler(space, records)}){again_}",
        ),
        (
            "samples",
            f"{_and([str(n) for n in samples]) or 'none yet'} of the selection split ({space.samples!s} asked)",
        ),
        ("verifier", ", ".join(f"{_words(k)} {v}" for k, v in verifier.items() if k != "samples")),
    ]


def _sampler(space: Space, records: Records) -> str:
    """The sampler, what it was told of other studies, and of how much of a long study its model is made."""
    words, limit = f"drawn by {space.search.sampler}", MODEL_TRIALS.get(space.search.sampler)
    past = sum(len(event["trials"]) for event in records.past)
    if past:
        words += f"; {past} past trials of {_and([str(event['source']) for event in records.past])}"
    if limit is not None and past + len(records.drawn()) > limit:
        words += f"; its model: the newest and the non-dominated {limit:,} trials"
    return words


def _warnings(records: Records, points: Sequence[figures.Point]) -> list[str]:
    found = []
    if records.damaged_lines:
        found.append(f"{records.damaged_lines} lines of trials.jsonl could not be read and are ignored.")
    if any(p["n_unknown"] for p in points):
        share = sum(p["n_unknown"] for p in points) / sum(p["samples"] for p in points)
        found.append(f"{share:.1%} of all verdicts are unknown; a stronger verifier may settle them either way.")
    return found


def broken_trials(space: Space, records: Records) -> frozenset[str]:
    """Complete trials that do not meet a constraint."""
    return frozenset(t.trial for t in insight.complete_trials(space, records) if not t.met)


def _cost_words(space: Space, records: Records, seconds: Mapping[str, tuple[float, float]]) -> str:
    train, verify = (sum(pair[i] for pair in seconds.values()) for i in (0, 1))
    words = (
        f"{figures.duration_text(train)} of training and {figures.duration_text(verify)} of verification, "
        f"summed over {len(seconds)} trials, failed and stopped ones included."
    )
    hours = [f"{value:.3g} hours {kind}" for kind, value in tables.spent_hours(space, records).items() if value > 0]
    words += f" In all {_and(hours)}." if hours else ""
    stages = tables.ledger_text(records.ledger())
    return f"{words} Verifiers by stage: {stages}." if stages else words


def _footer(records: Records) -> str:
    study = records.study
    versions = ", ".join(f"{name} {version}" for name, version in dict(study.get("versions", {})).items())
    parts = [f"seed {study['seed']}"] if "seed" in study else []
    if _number(study.get("time")):
        parts.append(time.strftime("begun %Y-%m-%d %H:%M UTC", time.gmtime(study["time"])))
    if records.finished and _number(records.finished.get("seconds")):
        parts.append(f"last driver ran {figures.duration_text(records.finished['seconds'])}")
    parts += [f"commit {study['commit']}"] if study.get("commit") else []
    return " · ".join([*parts, versions] if versions else parts)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _words(column: str) -> str:
    return column.replace("_", " ")


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
