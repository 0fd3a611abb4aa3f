"""Multi-objective successive halving for any Ray Tune experiment: the thin side of the decision core that touches Ray.

A study of cactus_ray does not need it: its trials ask the driver and end themselves (``search.scheduler`` in the YAML),
because a STOP of Tune kills a trial's actor and, nested in it, Ray Train's workers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from cactus_ray.search.halving import Decision, Halving, Rules
from cactus_ray.search.objectives import Constraint

__all__ = ["Constraint", "MultiObjectiveASHA"]

_GOALS = {"max": "maximize", "min": "minimize"}


class MultiObjectiveASHA(FIFOScheduler):  # type: ignore[misc]
    """Asynchronous successive halving over several metrics, for ``tune.TuneConfig(scheduler=...)``.

    ``metrics`` and ``goals`` ("maximize" or "max", "minimize" or "min") go together; ``time_attr``, ``max_t``,
    ``grace_period`` (the first rung) and ``reduction_factor`` mean what they mean in Ray's ASHAScheduler, whose
    arguments these are; ``max_t=None`` ends no trial. ``ranking``: hypervolume, crowding or epsilon_net, within a
    front. ``constraints``, such as ``Constraint("latency", max=20.0)``: on metrics as results have them at a rung, so
    on what training does not mend. A trial that breaks one ranks behind all that keep them, and among its like by
    the sum of what it breaks them by; where all do, the best share of these goes on. ``promote``: refused, because
    trials of others can only be stopped; those of a study wait. The rest: ``search.halving.Halving``.

    A result without ``time_attr`` is passed over; a rung that sees a metric missing or not finite ranks the trial last.
    Give no ``metric`` and no ``mode`` to TuneConfig, and set TUNE_DISABLE_STRICT_METRIC_CHECKING=1 where results may
    lack a metric. The same results in the same order give the same decisions. Raises ValueError for bad arguments.
    """

    def __init__(
        self, metrics: Sequence[str], goals: Sequence[str], *, time_attr: str = "training_iteration",
        max_t: float | None = None, grace_period: float = 1.0, reduction_factor: float = 3.0,
        ranking: str = "hypervolume", constraints: Sequence[Constraint] = (), promote: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(metrics, str) or len(metrics) != len(goals) or len(set(metrics)) != len(metrics):
            raise ValueError(f"metrics {metrics!r} and goals {goals!r}; expected a goal for each of different metrics")
        if max_t is not None and not max_t >= grace_period:
            raise ValueError(f"max_t is {max_t!r}; expected at least grace_period = {grace_period}, or None")
        if promote:
            raise ValueError(
                "promote is True; expected False: only trials of a cactus_ray study can wait and go on later"
            )
        pairs = zip(metrics, goals, strict=True)
        rules = Rules(
            goals={metric: _GOALS.get(goal, goal) for metric, goal in pairs}, constraints=tuple(constraints),
            reduction=reduction_factor, first=grace_period, ranking=ranking,
        )  # fmt: skip
        self.time_attr, self.max_t = time_attr, max_t
        self.halving = Halving(rules)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Tune's single metric has no place here; False makes Tune refuse it."""
        return metric is None and mode is None

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """STOP at ``max_t`` and for a trial that is not among the best of its rung; CONTINUE otherwise."""
        decision = self._report(trial.trial_id, result)
        over = self.max_t is not None and self._time(result) >= self.max_t
        if over or (decision is not None and not decision.go_on):
            return str(TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """The last result counts at its rung, although nothing is left to stop."""
        self._report(trial.trial_id, result or {})

    def _time(self, result: dict[str, Any]) -> float:
        return float(result.get(self.time_attr, 0.0))

    def _report(self, trial: str, result: dict[str, Any]) -> Decision | None:
        if self.time_attr not in result:
            return None
        return self.halving.report(trial, self._time(result), result)

    def debug_string(self) -> str:
        """One line for Tune's status."""
        stopped = sum(not decision.go_on for decision in self.halving.decisions)
        return f"Using MultiObjectiveASHA: {len(self.halving.decisions)} decisions at rungs, {stopped} trials stopped"

    def save(self, checkpoint_path: str) -> None:
        """Write the decisions as JSON."""
        Path(checkpoint_path).write_text(json.dumps(self.halving.state(), allow_nan=False))

    def restore(self, checkpoint_path: str) -> None:
        """Go on from the decisions that ``save`` wrote, under the rules of this scheduler."""
        self.halving = Halving(self.halving.rules)
        self.halving.take_up(map(Decision.of_event, json.loads(Path(checkpoint_path).read_text())))
