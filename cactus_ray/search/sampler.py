"""Who proposes the next configuration: Optuna, asked and told, without any part of Ray.

Ray's own OptunaSearch tells stopped trials as complete and leaves those without a finite value running for ever. Here a
trial is COMPLETE only with a full, finite record; stopped is PRUNED and an error is FAIL, and neither guides the search
as a result. The records of the run are the truth, so the study lives in memory and is rebuilt by ``replay``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)  # fmt: skip
from optuna.trial import FrozenTrial, TrialState

from cactus_ray.errors import UserError
from cactus_ray.search.encoding import distributions, drawn, encoded, to_optuna
from cactus_ray.search.model import ModelStorage, Shown
from cactus_ray.search.past import PastTrial, past_trial, told
from cactus_ray.search.records import Records, TrialRecord
from cactus_ray.search.samplers import MODEL_TRIALS, grid
from cactus_ray.search.space import Space

STATES = {"completed": TrialState.COMPLETE, "failed": TrialState.FAIL, "stopped": TrialState.PRUNED}
_REDRAWS = 8  # of the sampler itself; then as many at random, for a sampler that has settled on one point
_NOTES_ASKS = ("nsga2", "nsga3", "cmaes")
"""Samplers that write down, when they are asked, to which generation a trial belongs."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """The active values of one trial, by parameter name. Numbers count from 1.

    ``origin``: sampler, point (of the space) or suggested (by hand). ``note``: what should be said of it.
    """

    number: int
    values: dict[str, Any]
    origin: str = "sampler"
    note: str | None = None


class OptunaSampler:
    """Ask/tell search over a space. The same seed and the same order of asks and tells give the same suggestions.

    Every ask draws from a generator of its own, derived from (seed, number of the trial, attempt); with the study's
    history that is all the state there is, so a study that is resumed goes on as if it had not been interrupted.
    Points of the space come first, then whatever is queued, then what the sampler proposes.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.exhausted = False
        self._number = 0
        self._trials: dict[int, optuna.Trial] = {}
        self._drawn: list[dict[str, Any]] = []
        self._seen: set[str] = set()
        self._queue = [("point", dict(point)) for point in space.points]
        self._grid = grid(space) if space.search.sampler == "grid" else None
        limit = MODEL_TRIALS.get(space.search.sampler)
        self._shown = None if limit is None else Shown(limit)
        self._storage = ModelStorage()
        with quiet():
            self._study = optuna.create_study(directions=[o.goal for o in space.objectives], storage=self._storage)

    def enqueue(self, points: Sequence[Mapping[str, Any]]) -> None:
        """Try these values next; parameters that a point leaves out are drawn. Those tried before are left out."""
        self._queue += [("suggested", dict(point)) for point in points]

    def ask(self) -> Suggestion | None:
        """The next configuration. One that was drawn before is drawn again, at most ``2 * _REDRAWS`` times, and then
        said to be a repetition. None, and ``exhausted``, when a grid is through."""
        origin, fixed = self._next_fixed()
        if fixed is None:
            return None
        self._number += 1
        note = None
        for attempt in range(2 * _REDRAWS + 1):
            trial = self._ask(attempt, fixed)
            values = self._suggest(trial)
            if _identity(values) not in self._seen or not self.space.parameters:
                break
            if attempt == 2 * _REDRAWS:
                note = f"a repetition: {attempt} redraws found nothing new"
                break
            self._study.tell(trial, state=TrialState.FAIL)
        return self._opened(Suggestion(self._number, values, origin, note), trial)

    def adopt(self, number: int, values: Mapping[str, Any]) -> Suggestion:
        """Let the trial that was just asked for run with other values of this space; the drawn ones guide nothing.

        Raises UserError for values that this space would not ask for.
        """
        try:
            recorded = encoded(self.space, values)
        except ValueError as error:
            raise UserError(f"number {number}: {error}") from None
        self._study.tell(self._trials.pop(number), state=TrialState.FAIL)
        trial = self._ask(0, recorded)
        taken = self._suggest(trial)
        return self._opened(Suggestion(number, taken), trial)

    def tell(self, number: int, metrics: Mapping[str, float] | None, status: str) -> str:
        """End a trial and return the status that counts.

        ``status``: completed, failed or stopped. A completed trial whose objectives and constrained metrics are not all
        there and finite counts as failed. Raises KeyError for a number that is not running.
        """
        if status not in STATES:
            raise ValueError(f"status {status!r}; expected one of {', '.join(STATES)}")
        trial = self._trials.pop(number)
        past = told(self.space, {}, metrics) if status == "completed" else None
        if status == "completed" and past is None:
            status = "failed"
        if past is not None:
            for name, violation in past.violations.items():
                trial.set_constraint(name, violation)
            self._study.tell(trial, past.objectives)
        else:
            self._study.tell(trial, state=STATES[status])
        self._remember(trial.number, status, past)
        return status

    def warm(self, past: Sequence[PastTrial]) -> None:
        """Take up completed trials of another study, before the first ask. What they tried is not drawn again."""
        for trial in past:
            self._add(trial.values, "completed", trial)

    def replay(self, records: Records) -> None:
        """Take up the trials of a run, after what it took from others: finished ones are told, the others stay open
        until they are told.

        Raises UserError if a trial was drawn from another space than this one.
        """
        self.warm([past_trial(row) for event in records.past for row in event["trials"]])
        for record in sorted(records.drawn(), key=lambda r: r.number):
            self._number = record.number
            try:
                recorded = encoded(self.space, record.parameters)
            except ValueError as error:
                raise UserError(
                    f"trial {record.id} was drawn from another space: {error}; search under another --name or with "
                    "--from-scratch"
                ) from None
            self._replayed(record, recorded)

    def _replayed(self, record: TrialRecord, recorded: dict[str, Any]) -> None:
        kind = self.space.search.sampler
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in record.parameters.items()}
        if record.status in STATES and kind not in _NOTES_ASKS:
            past = told(self.space, values, record.metrics) if record.status == "completed" else None
            self._add(values, "failed" if record.status == "completed" and past is None else record.status, past)
            self._drawn.append(values)
            return
        # All values are given, so a model need not be asked for any: for trials that were under way it would take long.
        attempt = 0 if kind in _NOTES_ASKS else _REDRAWS + 1
        trial = self._ask(attempt, recorded)
        self._suggest(trial)
        self._opened(Suggestion(record.number, values), trial)
        if record.status in STATES:
            self.tell(record.number, record.metrics, record.status)

    # --- Optuna's side

    def _next_fixed(self) -> tuple[str, dict[str, Any] | None]:
        """What is given of the next configuration, as Optuna holds it, and by whom; None if there is none."""
        while self._queue:
            origin, point = self._queue.pop(0)
            if not any(point.items() <= values.items() for values in self._drawn):
                return origin, self._encode(point)
        for values in self._grid or ():
            if _identity(values) not in self._seen:
                return "sampler", self._encode(values)
        self.exhausted = self._grid is not None
        return "sampler", None if self.exhausted else {}

    def _encode(self, point: Mapping[str, Any]) -> dict[str, Any]:
        return {p.name: to_optuna(p.domain, point[p.name]) for p in self.space.parameters if p.name in point}

    def _opened(self, suggestion: Suggestion, trial: optuna.Trial) -> Suggestion:
        self._trials[suggestion.number] = trial
        self._seen.add(_identity(suggestion.values))
        self._drawn.append(suggestion.values)
        return suggestion

    def _add(self, values: dict[str, Any], status: str, past: PastTrial | None) -> None:
        """A trial that has ended, without asking for it."""
        params = self._encode(values)
        attributes = {f"{name}:generation": 0 for name in ("NSGAIISampler", "NSGAIIISampler")} if past else {}
        trial = optuna.create_trial(
            state=STATES[status], params=params, distributions=distributions(self.space, params),
            values=past.objectives if past else None, constraints=past.violations if past else None,
            system_attrs=attributes,
        )  # fmt: skip
        self._study.add_trial(trial)
        self._seen.add(_identity(values))
        self._remember(self._storage.get_n_trials(self._study._study_id) - 1, status, past)

    def _remember(self, number: int, status: str, past: PastTrial | None) -> None:
        """Note an ended trial for the model; failed ones are nothing to it, nor those without values to a GP."""
        if self._shown is None or status == "failed" or (status == "stopped" and self.space.search.sampler == "gp"):
            return
        losses = None
        if past is not None and all(violation <= 0 for violation in past.violations.values()):
            signs = [-1.0 if o.goal == "maximize" else 1.0 for o in self.space.objectives]
            losses = [sign * value for sign, value in zip(signs, past.objectives, strict=True)]
        self._shown.add(number, losses)

    def _ask(self, attempt: int, fixed: Mapping[str, Any]) -> optuna.Trial:
        text = f"{self.space.search.seed}/{self._number}/{attempt}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        kind = "random" if attempt > _REDRAWS else self.space.search.sampler
        with unannounced():
            sampler = make_sampler(kind, seed, self.space.search.trials)
        self._study.sampler = _Fixed(sampler, fixed) if fixed else sampler
        with self._modelled():
            return self._study.ask()

    def _suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        values: dict[str, Any] = {}
        with self._modelled():
            for parameter in self.space.parameters:
                if self.space.is_active(parameter, values):
                    values[parameter.name] = drawn(trial, parameter)
        return values

    @contextlib.contextmanager
    def _modelled(self) -> Iterator[None]:
        """While a sampler works, it sees of a long study what its model is made of."""
        shown = self._shown
        if shown is not None and len(shown.newest) >= shown.limit:
            self._storage.shown = shown.numbers()
        try:
            yield
        finally:
            self._storage.shown = None


class _Fixed(BaseSampler):  # type: ignore[misc]  # optuna is not type-checked here
    """A sampler some of whose values (as Optuna holds them) are given.

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
        found = self._sampler.sample_relative(study, trial, search_space)
        return {name: self._values.get(name, value) for name, value in found.items()}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if param_name in self._values:
            return self._values[param_name]
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)


def make_sampler(kind: str, seed: int, trials: int) -> BaseSampler:
    """Optuna's sampler, its settling-in phase scaled to studies of a few dozen trials."""
    population, startup = min(50, max(4, trials // 5)), min(10, max(4, trials // 4))
    match kind:
        case "nsga2":
            return NSGAIISampler(population_size=population, seed=seed)
        case "nsga3":
            return NSGAIIISampler(population_size=population, seed=seed)
        case "gp":
            return GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
        case "cmaes":
            return CmaEsSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
        case "tpe":
            return TPESampler(n_startup_trials=startup, multivariate=True, group=True, constant_liar=True, seed=seed)
    return RandomSampler(seed=seed)  # also for what a grid's point leaves open, which is nothing


def _identity(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's progress lines and its notes on experimental arguments; both are as before afterwards.

    Not for every ask and tell, which say nothing: each change of a level makes all loggers forget who listens.
    """
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with unannounced():
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def unannounced() -> Iterator[None]:
    """Without Optuna's notes on experimental arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
