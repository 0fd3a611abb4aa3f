"""Who proposes the next configuration: Optuna, asked and told, without any part of Ray.

Ray's own OptunaSearch tells stopped trials as complete and leaves those without a finite value running for ever. Here a
trial is COMPLETE only with a full, finite record; stopped is PRUNED and an error is FAIL, and neither guides the search
as a result. The records of the run are the truth, so the study lives in memory and is rebuilt by ``replay``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from cactus_ray.errors import UserError
from cactus_ray.search.domains import Choices, Range
from cactus_ray.search.objectives import feasible
from cactus_ray.search.parameters import Parameter
from cactus_ray.search.records import Records
from cactus_ray.search.space import Space

_STATES = {"completed": TrialState.COMPLETE, "failed": TrialState.FAIL, "stopped": TrialState.PRUNED}
_REDRAWS = 8  # of the sampler itself; then as many at random, for a sampler that has settled on one point
_INACTIVE = "(inactive)"


@dataclass(frozen=True, slots=True)
class Suggestion:
    """The active values of one trial, by parameter name. Numbers count from 1."""

    number: int
    values: dict[str, Any]


class OptunaSampler:
    """Ask/tell search over a space. The same seed and the same order of asks and tells give the same suggestions.

    Every ask draws from a generator of its own, derived from (seed, number of the trial, attempt); with the study's
    history that is all the state there is, so a study that is resumed goes on as if it had not been interrupted.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self._number = 0
        self._trials: dict[int, optuna.Trial] = {}
        self._values: dict[int, dict[str, Any]] = {}
        self._seen: set[str] = set()
        with _quiet():
            self._study = optuna.create_study(directions=[o.goal for o in space.objectives])

    def ask(self) -> Suggestion:
        """The next configuration. One that was drawn before is drawn again, at most ``2 * _REDRAWS`` times."""
        self._number += 1
        with _quiet():
            for attempt in range(2 * _REDRAWS + 1):
                trial = self._ask(attempt)
                values = self._suggest(trial)
                last = attempt == 2 * _REDRAWS or not self.space.parameters
                if last or _identity(values) not in self._seen:
                    break
                self._study.tell(trial, state=TrialState.FAIL)
        return self._opened(self._number, trial, values)

    def adopt(self, number: int, values: Mapping[str, Any]) -> Suggestion:
        """Let the trial that was just asked for run with other values of this space; the drawn ones guide nothing.

        Raises UserError for values that this space would not ask for.
        """
        recorded = self._encoded(f"number {number}", values)
        with _quiet():
            self._study.tell(self._trials.pop(number), state=TrialState.FAIL)
            trial = self._ask(attempt=0, recorded=recorded)
            return self._opened(number, trial, self._suggest(trial))

    def tell(self, number: int, metrics: Mapping[str, float] | None, status: str) -> str:
        """End a trial and return the status that counts.

        ``status``: completed, failed or stopped. A completed trial whose objectives and constrained metrics are not all
        there and finite counts as failed. Raises KeyError for a number that is not running.
        """
        if status not in _STATES:
            raise ValueError(f"status {status!r}; expected one of {', '.join(_STATES)}")
        trial = self._trials.pop(number)
        needed = [o.metric for o in self.space.objectives] + [c.metric for c in self.space.constraints]
        if status == "completed" and not all(_is_finite((metrics or {}).get(name)) for name in needed):
            status = "failed"
        with _quiet():
            if status == "completed" and metrics is not None:
                for name, violation in feasible(metrics, self.space.constraints).items():
                    trial.set_constraint(name, violation)
                self._study.tell(trial, [metrics[o.metric] for o in self.space.objectives])
            else:
                self._study.tell(trial, state=_STATES[status])
        return status

    def replay(self, records: Records) -> None:
        """Take up the trials of a run: finished ones are told, the others stay open until they are told.

        Raises UserError if a trial was drawn from another space than this one.
        """
        for record in sorted(records.trials.values(), key=lambda r: r.number):
            self._number = record.number
            recorded = self._encoded(record.id, record.parameters)
            with _quiet():
                trial = self._ask(attempt=0, recorded=recorded)
                values = self._suggest(trial)
            self._opened(record.number, trial, values)
            if record.status in _STATES:
                self.tell(record.number, record.metrics, record.status)

    def importances(self) -> dict[str, dict[str, float]]:
        """Share of each parameter in the variation of each objective (fANOVA), largest first.

        Empty for an objective where too few trials, or none that differ, say anything.
        """
        with _quiet():
            return {o.metric: self._importance(i) for i, o in enumerate(self.space.objectives)}

    # --- Optuna's side

    def _opened(self, number: int, trial: optuna.Trial, values: dict[str, Any]) -> Suggestion:
        self._trials[number], self._values[trial.number] = trial, values
        self._seen.add(_identity(values))
        return Suggestion(number, values)

    def _ask(self, attempt: int, recorded: Mapping[str, Any] | None = None) -> optuna.Trial:
        text = f"{self.space.search.seed}/{self._number}/{attempt}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        kind = "random" if attempt > _REDRAWS else self.space.search.sampler
        sampler = _sampler(kind, seed, self.space.search.trials)
        self._study.sampler = sampler if recorded is None else _Recorded(sampler, recorded)
        return self._study.ask()

    def _suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for parameter in self.space.parameters:
            if self.space.is_active(parameter, values):
                values[parameter.name] = _drawn(trial, parameter)
        return values

    def _encoded(self, trial: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Recorded values as Optuna holds them; UserError unless they are just what this space would ask for."""
        encoded: dict[str, Any] = {}
        active: dict[str, Any] = {}
        for parameter in self.space.parameters:
            if self.space.is_active(parameter, active):
                value = values.get(parameter.name)
                plain = tuple(value) if isinstance(value, list) else value
                if not parameter.domain.contains(plain):
                    raise _other_space(trial, f"{parameter.name} = {value!r} is not in this one")
                active[parameter.name], encoded[parameter.name] = plain, _to_optuna(parameter.domain, plain)
        if unasked := set(values) - set(active):
            raise _other_space(trial, f"this one would not ask for {', '.join(sorted(unasked))}")
        return encoded

    def _importance(self, objective: int) -> dict[str, float]:
        complete = [t for t in self._study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
        targets = [t.values[objective] for t in complete]
        values = [self._values[t.number] for t in complete]
        # fANOVA wants every parameter in every trial: an inactive one gets a place of its own or the middle.
        varied = [p for p in self.space.parameters if len({str(v[p.name]) for v in values if p.name in v}) > 1]
        if len(complete) < 4 or len(set(targets)) < 2 or not varied:
            return {}
        flat = optuna.create_study()
        distributions = {p.name: _with_inactive(p.domain) for p in varied}
        for target, drawn in zip(targets, values, strict=True):
            params = {p.name: _filled(p, drawn) for p in varied}
            flat.add_trial(optuna.create_trial(value=target, params=params, distributions=distributions))
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(flat, evaluator=evaluator)
        return {name: float(share) for name, share in found.items()}


class _Recorded(BaseSampler):  # type: ignore[misc]  # optuna is not type-checked here
    """A sampler that repeats recorded values (as Optuna holds them).

    The sampler of the search is still asked, because evolution notes the generation of a trial when it is; trials that
    Optuna takes from its queue skip that and would never become parents.
    """

    def __init__(self, sampler: BaseSampler, values: Mapping[str, Any]) -> None:
        self._sampler, self._values = sampler, values

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)  # type: ignore[no-any-return]

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._sampler.sample_relative(study, trial, search_space)
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._values[param_name]


def _other_space(trial: str, why: str) -> UserError:
    return UserError(
        f"trial {trial} was drawn from another space: {why}; search under another --name or with --from-scratch"
    )


def _sampler(kind: str, seed: int, trials: int) -> BaseSampler:
    """Optuna's sampler, its settling-in phase scaled to studies of a few dozen trials."""
    if kind == "random":
        return RandomSampler(seed=seed)
    if kind == "nsga2":
        return NSGAIISampler(population_size=min(50, max(4, trials // 5)), seed=seed)
    startup = min(10, max(4, trials // 4))
    return TPESampler(n_startup_trials=startup, multivariate=True, group=True, constant_liar=True, seed=seed)


def _drawn(trial: optuna.Trial, parameter: Parameter) -> Any:
    domain, name = parameter.domain, parameter.name
    if isinstance(domain, Choices):
        plain = trial.suggest_categorical(name, [_label(v) for v in domain.values])
        return next(v for v in domain.values if _label(v) == plain)
    if domain.q is None:
        return trial.suggest_float(name, domain.low, domain.high, log=domain.log)
    # Optuna has no quantised logarithmic range; the multiples themselves are whole numbers, which it does draw.
    return domain.value(trial.suggest_int(name, *domain.multiples, log=domain.log))


def _to_optuna(domain: Choices | Range, value: Any) -> Any:
    if isinstance(domain, Choices):
        return _label(value)
    return value if domain.q is None else round(value / domain.q)


def _label(value: Any) -> Any:
    """Optuna's categories are scalars; a list (hidden widths) is written as JSON."""
    return json.dumps(value) if isinstance(value, tuple) else value


def _with_inactive(domain: Choices | Range) -> BaseDistribution:
    if isinstance(domain, Choices):
        return CategoricalDistribution([*(_label(v) for v in domain.values), _INACTIVE])
    if domain.q is None:
        return FloatDistribution(domain.low, domain.high, log=domain.log)
    return IntDistribution(*domain.multiples, log=domain.log)


def _filled(parameter: Parameter, values: Mapping[str, Any]) -> Any:
    domain = parameter.domain
    if parameter.name in values:
        return _to_optuna(domain, values[parameter.name])
    if isinstance(domain, Choices):
        return _INACTIVE
    low, high = (domain.low, domain.high) if domain.q is None else domain.multiples
    middle = math.sqrt(low * high) if domain.log else (low + high) / 2
    return middle if domain.q is None else round(middle)


def _identity(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's progress lines and its notes on experimental arguments; both are as before afterwards."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
