"""Which parameters matter for which objective, from the complete trials of a run."""

from __future__ import annotations

from typing import Any

import optuna

from cactus_ray.errors import UserError
from cactus_ray.search.encoding import encoded, filled, with_inactive
from cactus_ray.search.past import told
from cactus_ray.search.records import Records
from cactus_ray.search.sampler import quiet
from cactus_ray.search.space import Space

LEAST_TRIALS = 4
MANY_TRIALS = 500
"""From here on PED-ANOVA takes the place of fANOVA, whose forest would take minutes."""


def importances(space: Space, records: Records) -> dict[str, dict[str, float]]:
    """Share of each parameter in the variation of each objective, largest first.

    fANOVA (Hutter et al. 2014), or PED-ANOVA (Watanabe et al. 2023: what leads into the best tenth) from
    ``MANY_TRIALS`` trials on. Empty for an objective where too few trials, or none that differ, say anything. Raises
    UserError if a trial was drawn from another space.
    """
    complete: list[tuple[dict[str, Any], tuple[float, ...]]] = []
    for trial in records.drawn():
        found = told(space, trial.parameters, trial.metrics) if trial.status == "completed" else None
        if found is None:
            continue
        try:
            encoded(space, found.values)
        except ValueError as error:
            raise UserError(f"trial {trial.id} was drawn from another space: {error}") from None
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in found.values.items()}
        complete.append((values, found.objectives))
    with quiet():
        return {o.metric: _importance(space, complete, i) for i, o in enumerate(space.objectives)}


def evaluator_name(complete: int) -> str:
    """The name of the method for so many complete trials."""
    return "PED-ANOVA" if complete >= MANY_TRIALS else "fANOVA"


def _importance(
    space: Space, complete: list[tuple[dict[str, Any], tuple[float, ...]]], objective: int
) -> dict[str, float]:
    targets = [objectives[objective] for _, objectives in complete]
    # Every parameter has to be in every trial: an inactive one gets a place of its own or the middle.
    varied = [p for p in space.parameters if len({str(v[p.name]) for v, _ in complete if p.name in v}) > 1]
    if len(complete) < LEAST_TRIALS or len(set(targets)) < 2 or not varied:
        return {}
    flat = optuna.create_study(direction=space.objectives[objective].goal)
    distributions = {p.name: with_inactive(p.domain) for p in varied}
    for target, (values, _) in zip(targets, complete, strict=True):
        params = {p.name: filled(p, values) for p in varied}
        flat.add_trial(optuna.create_trial(value=target, params=params, distributions=distributions))
    many = len(complete) >= MANY_TRIALS
    evaluator = (
        optuna.importance.PedAnovaImportanceEvaluator() if many else optuna.importance.FanovaImportanceEvaluator(seed=0)
    )
    found = optuna.importance.get_param_importances(flat, evaluator=evaluator)
    return {name: float(share) for name, share in found.items()}
