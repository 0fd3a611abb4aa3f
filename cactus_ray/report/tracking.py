"""W&B: one group per study, one run per trial, and a study run with the points table and the interactive front.

Made for use inside one process of its own (``tracking_process``). Tracking is a copy: the records of the run are the
truth, so nothing here may fail or hold up a search. Every call into W&B runs on one daemon thread, behind a catch and a
time limit; what goes wrong is written to ``RUN/wandb/tracking.log``, and after a call that did not come back nothing
more is sent.
"""

from __future__ import annotations

import hashlib
import logging
import math
import netrc
import os
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cactus_ray.report.figures import front_figure, upper_end
from cactus_ray.search.objectives import Constraint, feasible
from cactus_ray.search.pareto import non_dominated, relative_hypervolume
from cactus_ray.search.store import read_records

CALL_SECONDS = 60.0
INIT_SECONDS = 20.0
REACH_SECONDS = 3.0
TABLE_SECONDS = 30.0
LOG = Path("wandb", "tracking.log")
"""Where a run's folder says what went wrong."""
ENDS = ("completed", "failed", "stopped", "waiting")
COLUMNS = (
    "trial", "level", "method", "samples", "standard_accuracy", "certified_accuracy", "certified_accuracy_upper",
    "n_certified", "n_falsified", "n_unknown", "bytes", "ideal_bits", "macs", "train_seconds", "verify_seconds",
    "on_front", "config_hash",
)  # fmt: skip


def has_key(host: str) -> bool:
    """Whether a W&B key is set in the environment or in the netrc file, for this host."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def is_reachable(url: str, seconds: float) -> bool:
    """Whether a server answers over HTTP within a few seconds, whatever it answers."""
    try:
        with urllib.request.urlopen(url, timeout=seconds):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


@dataclass(frozen=True, slots=True)
class State:
    """Where tracking goes: ``mode`` is "online", "offline" or "disabled"; ``why`` it is not online, or not any more;
    ``page`` of the study, where it is online."""

    mode: str
    why: str = ""
    page: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def choose_mode(mode: str) -> State:
    """Whether W&B can be online for a requested mode, and if not why.

    ``auto`` follows WANDB_MODE if set. It and ``online`` need a key and a server that answers; else files are offline.
    """
    wanted, by = (mode, f"wandb.mode: {mode}")
    if mode == "auto" and (set_to := os.environ.get("WANDB_MODE")):
        wanted, by = (set_to, f"WANDB_MODE={set_to}")
    if wanted in ("offline", "dryrun"):
        return State("offline", f"as {by} asks")
    if wanted == "disabled":
        return State("disabled", f"as {by} asks")
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = urllib.parse.urlsplit(url).hostname or ""
    if not has_key(host):
        return State("offline", f"no key for {host or url}: set WANDB_API_KEY, or run wandb login")
    if not is_reachable(url, REACH_SECONDS):
        return State("offline", f"{url} did not answer within {REACH_SECONDS:g} s")
    return State("online")


def shown(event: Mapping[str, Any]) -> bool:
    """Whether ``Tracker`` does anything with an event."""
    return hasattr(Tracker, f"_on_{event.get('event')}")


class Tracker:
    """Follows a study by its events (the lines of ``trials.jsonl``). No method raises, none blocks for ever.

    ``space``: the resolved space as plain data; ``run``: the run's folder. A resumed study goes on in the same W&B
    runs. For use in one process of its own: closing it ends W&B there.
    """

    def __init__(self, space: Mapping[str, Any], run: str) -> None:
        # W&B's own telemetry would hold up the end of the process where there is no network
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.space, self.run = dict(space), Path(run)
        self.log = _log(self.run)
        self.calls = _Calls(self.log)
        self.points: list[dict[str, Any]] = []
        self.constraints = [Constraint(**c) for c in self.space.get("constraints", [])]
        self.broken: set[str] = set()
        self.ended: dict[str, str] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.reference: dict[str, float] = {}
        self.runs: dict[str, Any] = {}
        self.mode: Any = "disabled"
        self.why, self.page = "", ""
        self.group, self.suffix, self.shown = "", "", -math.inf
        self.calls.do("start", self._start)

    @property
    def state(self) -> State:
        """Where the study is tracked by now."""
        if self.calls.lost:
            return State("disabled", f"W&B did not answer in time; {self.run / LOG} says when")
        return State(self.mode, self.why, self.page)

    @property
    def failures(self) -> int:
        """How many calls went wrong so far; each is in the log."""
        return self.calls.failures

    def event(self, event: Mapping[str, Any]) -> None:
        """Pass one event on to W&B. Events that it does not show are ignored."""
        handler = getattr(self, f"_on_{event.get('event')}", None)
        if handler is not None and self.mode != "disabled":
            self.calls.do(f"{event.get('event')} {event.get('trial', '')}", lambda: handler(event))

    def close(self, seconds: float = 40.0) -> None:
        """Show the last table, finish every run and stop W&B's own process, all within ``seconds``."""
        deadline = time.monotonic() + seconds
        if self.mode != "disabled":
            for name, call in (("last table", self._show), ("finish", self._finish), ("stop", _teardown)):
                self.calls.do(name, call, max(deadline - time.monotonic(), 0.1))
        self.mode = "disabled"
        for handler in self.log.handlers[:]:
            handler.close()
            self.log.removeHandler(handler)

    # --- each of these runs on the thread of the calls

    def _start(self) -> None:
        wandb = self.space.get("wandb", {})
        records = read_records(self.run, verdicts=False)
        self.reference = dict(records.study.get("reference_point", {}))
        self.points = list(records.points())
        for trial in records.trials.values():
            if trial.status == "completed":
                self._check(trial.id, trial.metrics)
        self.configs = {trial.id: trial.config for trial in records.trials.values()}
        self.ended = {trial.id: trial.status for trial in records.trials.values() if trial.status in ENDS}
        begun = f"{self.space.get('name')} {records.study.get('time')}"
        self.group = f"{self.space.get('name')}-{hashlib.sha256(begun.encode()).hexdigest()[:8]}"
        chosen = choose_mode(str(wandb.get("mode", "auto")))
        self.why = chosen.why
        if chosen.mode == "disabled":
            return
        self.mode = chosen.mode
        try:
            run = self._open("study", "study", self.space)
        except Exception as error:
            self.mode, self.why = "disabled", f"W&B did not begin: {_first_line(error)}"
            raise
        if self.mode == "online":
            self.page = str(run.url or "")

    def _open(self, name: str, job: str, config: Mapping[str, Any]) -> Any:
        """A new run of W&B; where that fails online, this one and all later ones are kept offline."""
        try:
            return self._init(name, job, config)
        except Exception as error:
            if self.mode != "online":
                raise
            self.log.exception("W&B could not go online; files are kept offline from here on")
            self.why = f"W&B could not begin a run online: {_first_line(error)}"
            self.mode, self.suffix = "offline", "-offline"  # W&B holds the id of a run that failed to begin
            return self._init(name, job, config)

    def _init(self, name: str, job: str, config: Mapping[str, Any]) -> Any:
        import wandb

        space = self.space.get("name")
        settings = self.space.get("wandb", {})
        limits = wandb.Settings(
            init_timeout=INIT_SECONDS, login_timeout=10, finish_timeout=15, x_service_wait=20,
            console="off", silent=True, x_disable_stats=True, disable_git=True, disable_code=True,
        )  # fmt: skip
        self.runs[name] = wandb.init(
            project=settings.get("project") or "cactus", entity=settings.get("entity"), group=self.group, job_type=job,
            name=f"{space} {name}", id=f"{self.group[-8:]}-{name}{self.suffix}", dir=str(self.run),
            mode=self.mode, reinit="create_new", resume="allow" if self.mode == "online" else None, settings=limits,
            config=dict(config),
        )  # fmt: skip
        return self.runs[name]

    def _trial(self, event: Mapping[str, Any]) -> Any:
        trial = str(event["trial"])
        config = event.get("config") or self.configs.get(trial, {})
        return self.runs.get(trial) or self._open(trial, "trial", config)

    def _on_started(self, event: Mapping[str, Any]) -> None:
        self.configs[str(event["trial"])] = dict(event.get("config", {}))
        self._trial(event).config.update(
            {"parameters": event.get("parameters", {}), "config_hash": event.get("config_hash")}, allow_val_change=True
        )

    def _on_epoch(self, event: Mapping[str, Any]) -> None:
        self._trial(event).log({"epoch": event["epoch"], **_finite(event["metrics"])})

    def _on_trained(self, event: Mapping[str, Any]) -> None:
        self._trial(event).summary.update({"train_seconds": event["train_seconds"], "epochs": event["epochs"]})

    def _on_completed(self, event: Mapping[str, Any]) -> None:
        if "of" not in event and not any(
            p["trial"] == event["trial"] for p in self.points
        ):  # the records may have had them already
            self.points += [dict(point) for point in event["points"]]
        self._check(str(event["trial"]), event["metrics"])
        self._end(event, {**_finite(event["metrics"]), "status": "completed"}, 0)
        volume = relative_hypervolume(self.points, self.space["front"], self.reference)
        self.runs["study"].log({"hypervolume": volume, **self._figures(), **self._numbers()})

    def _check(self, trial: str, metrics: Mapping[str, float]) -> None:
        """Mark a complete trial that does not meet every constraint."""
        if any(violation > 0 for violation in feasible(metrics, self.constraints).values()):
            self.broken.add(trial)

    def _on_failed(self, event: Mapping[str, Any]) -> None:
        self._end(event, {"status": "failed", "error": str(event["error"]), "step": event.get("step")}, 1)
        self.runs["study"].log(self._numbers())

    def _on_stopped(self, event: Mapping[str, Any]) -> None:
        if self.ended.get(str(event["trial"])) == "waiting":  # its run says so, and is not opened again for a word
            self.ended[str(event["trial"])] = "stopped"
        else:
            self._end(event, {"status": "stopped", "reason": str(event["reason"])}, 1)
        self.runs["study"].log(self._numbers())

    def _on_waiting(self, event: Mapping[str, Any]) -> None:
        self._end(event, {"status": "waiting", "reason": str(event["reason"])}, 0)
        self.runs["study"].log(self._numbers())

    def _on_rung(self, event: Mapping[str, Any]) -> None:
        if event.get("promoted"):  # its run is opened again by the next epoch
            self.ended.pop(str(event["trial"]), None)

    def _on_finished(self, event: Mapping[str, Any]) -> None:
        self.runs["study"].summary.update({"status": event["status"], "seconds": event["seconds"]})

    def _end(self, event: Mapping[str, Any], summary: Mapping[str, Any], status: int) -> None:
        self.ended[str(event["trial"])] = str(event["event"])
        run = self._trial(event)
        run.summary.update({key: value for key, value in summary.items() if value is not None})
        run.finish(exit_code=status)
        self.runs.pop(str(event["trial"]))

    def _numbers(self) -> dict[str, int]:
        return {f"trials_{status}": list(self.ended.values()).count(status) for status in ENDS}

    def _figures(self, now: bool = False) -> dict[str, Any]:
        """Table and front, at most every ``TABLE_SECONDS``: they hold all points, and so grow with the study."""
        import wandb

        if not now and time.monotonic() - self.shown < TABLE_SECONDS:
            return {}
        self.shown = time.monotonic()
        front = non_dominated(self.points, self.space["front"])
        points = [{**p, "on_front": on} for p, on in zip(self.points, front, strict=True)]
        rows = [{**p, "certified_accuracy_upper": upper_end(p)} for p in points]
        figure = front_figure(points, self.space["threat"]["epsilon"], self.broken)
        table = wandb.Table(columns=list(COLUMNS), data=[[row.get(column) for column in COLUMNS] for row in rows])
        return {"points": table, "front": wandb.Plotly(figure)}

    def _show(self) -> None:
        if self.points:
            self.runs["study"].log({**self._figures(now=True), **self._numbers()})

    def _finish(self) -> None:
        for run in self.runs.values():
            run.finish()
        self.runs.clear()


class _Calls:
    """Runs calls one after the other on a daemon thread; each has a time limit, and none raises."""

    def __init__(self, log: logging.Logger) -> None:
        self.log, self.failures, self.lost = log, 0, False
        self.waiting: queue.SimpleQueue[tuple[str, Callable[[], Any], threading.Event]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="wandb", daemon=True).start()

    def do(self, name: str, call: Callable[[], Any], seconds: float | None = None) -> None:
        if self.lost:
            return
        done = threading.Event()
        self.waiting.put((name, call, done))
        limit = CALL_SECONDS if seconds is None else seconds
        if not done.wait(limit):
            self.lost = True
            self.failures += 1
            self.log.error("%s: no answer within %.0f s; tracking ends here", name, limit)

    def _run(self) -> None:
        while True:
            name, call, done = self.waiting.get()
            try:
                call()
            except Exception:  # whatever W&B or the network does, it must not reach the search
                self.failures += 1
                self.log.exception("%s failed", name)
            done.set()


def _finite(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in metrics.items() if not isinstance(v, float) or math.isfinite(v)}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _teardown() -> None:
    import wandb

    wandb.teardown()


def _log(run: Path) -> logging.Logger:
    """A log file of this run alone; the terminal stays quiet."""
    log = logging.getLogger(f"{__name__}.{run}")
    log.propagate = False
    log.setLevel(logging.INFO)
    try:
        (run / LOG).parent.mkdir(parents=True, exist_ok=True)
        log.addHandler(logging.FileHandler(run / LOG, delay=True))
    except OSError:
        log.addHandler(logging.NullHandler())
    return log
