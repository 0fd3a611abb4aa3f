"""The driver of a study: Ray Tune trains trials, verifier actors judge them, and this process alone keeps the records.

Tune's event loop has the main thread. A second thread, the desk, takes the mail of the trainers and the verdicts of the
verifiers. A trial of Tune ends with its training, so a network that waits for verdicts holds no training resources.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from cactus_ray.cluster.connect import connected
from cactus_ray.cluster.mailbox import Mailbox, Message
from cactus_ray.cluster.resources import Plan, execution_of, plan
from cactus_ray.cluster.train_workers import TrainJob, train_trial
from cactus_ray.cluster.verifier_pool import ChunkFailure, VerifierContext, VerifierPool
from cactus_ray.errors import RunFailedError
from cactus_ray.search.space import Space
from cactus_ray.search.study import Listener, Study

POLL_SECONDS = 0.05
Attach = Callable[[], AbstractContextManager[Listener | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverOptions:
    """Where a study runs.

    ``storage``: folder for Ray's scratch files, shared on a cluster of several nodes; ``init``: bytes of a network that
    every training starts from; ``cpus``: logical CPUs of a local Ray (default: those of the machine).
    """

    address: str | None = None
    storage: str | None = None
    trust_code: bool = False
    init: bytes | None = None
    cpus: int | None = None


class Desk:
    """Keeps the study's state in step with what trainers and verifiers send. All access is under one lock."""

    def __init__(self, study: Study, shares: Plan, pool: VerifierPool, mailbox: Any) -> None:
        self.study, self.shares, self.pool, self.mailbox = study, shares, pool, mailbox
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.error: BaseException | None = None
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._run, name="desk", daemon=True)

    def start(self) -> None:
        for _, path, chunks in self.study.resumed:
            self.pool.submit(chunks, path.read_bytes())
        self.thread.start()

    def close(self) -> None:
        self.closing.set()
        self.thread.join(timeout=30)

    def _run(self) -> None:
        try:
            while not self.closing.is_set():
                self.take_mail()
                for found in self.pool.poll(POLL_SECONDS):
                    self._judge(found)
        except BaseException as error:  # the main thread must learn of it, whatever it is
            with self.changed:
                self.error = error
                self.changed.notify_all()
            _thread.interrupt_main()  # Tune would wait for the trials that train, for hours perhaps

    def take_mail(self) -> None:
        """Handle every message that the trainers have sent so far."""
        with self.changed:
            messages: list[Message] = ray.get(self.mailbox.take.remote())
            for kind, trial, content in messages:
                if kind == "epoch":
                    self.study.epoch(trial, **content)
                elif kind == "trained":
                    chunks = self.study.trained(trial, **content)
                    self.pool.submit(chunks, content["networks"][content["chosen"]])
                else:
                    self.study.failed(trial, **content)
            if messages:
                self.changed.notify_all()

    def _judge(self, found: Any) -> None:
        with self.changed:
            if isinstance(found, ChunkFailure):
                if found.unsound:
                    raise RunFailedError(
                        f"trial {found.chunk.trial}, level {found.chunk.level}: {found.error}; no verdict of this "
                        "study can be trusted"
                    )
                self.pool.drop(found.chunk.trial)
                if found.chunk.trial in self.study.verifying:
                    self.study.failed(found.chunk.trial, f"level {found.chunk.level}: {found.error}")
            else:
                self.study.verified(found)
            self.changed.notify_all()

    # --- what Tune's thread asks

    def next_configuration(self, wait: float) -> dict[str, Any] | str | None:
        """A configuration for Tune, "finished", or None if there is none now (after waiting for one for ``wait`` s)."""
        deadline = time.monotonic() + wait
        with self.changed:
            while True:
                if self.error is not None or self.study.done:
                    return "finished"
                free = len(self.study.training) < self.shares.training and self.study.in_flight < self.shares.in_flight
                start = self.study.next_trial() if free else None
                if start is not None:
                    return {"trial": start.id, "run": start.config.to_dict()}
                left = deadline - time.monotonic()
                if left <= 0 or self.study.training:
                    return None
                self.changed.wait(left)

    def trainer_ended(self, trial: str, error: bool) -> None:
        """Tune says that a trial's function ended; one that died without mail has failed."""
        if not error:
            return
        self.take_mail()
        with self.changed:
            if trial in self.study.training:
                self.study.failed(trial, "the training process died (killed, or out of memory)")
                self.changed.notify_all()


class DeskSearcher(Searcher):  # type: ignore[misc]
    """Ray Tune's view of the study. It holds no state of its own: Tune may pickle it, and nothing is lost with it."""

    def __init__(self, desk: Desk | None = None) -> None:
        super().__init__()
        self.desk = desk
        self.trials: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        assert self.desk is not None
        found = self.desk.next_configuration(wait=0.5)
        if found == "finished":
            return str(Searcher.FINISHED)
        if isinstance(found, dict):
            self.trials[trial_id] = found["trial"]
        return found

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        if self.desk is not None and trial_id in self.trials:
            self.desk.trainer_ended(self.trials.pop(trial_id), error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: ``trials.jsonl`` is the only truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: a resumed study starts a new Tuner from the records."""


def run_study(study: Study, options: DriverOptions, attach: Attach | None = None) -> None:
    """Run a study to its end on a cluster. Whatever ends it early, what is finished stays in the records.

    ``attach`` is entered once Ray is up and may yield one more listener (tracking lives in an actor).
    Raises UserError for an impossible request, RunFailedError where a certified sample was falsified, and
    KeyboardInterrupt as it comes.
    """
    space = study.space
    with contextlib.ExitStack() as stack:
        nested = execution_of(space.resources) == "train"
        available = stack.enter_context(connected(options.address, needs_dashboard=nested, cpus=options.cpus))
        shares = plan(space, available)
        folder = stack.enter_context(_scratch(options.storage))
        listener = stack.enter_context(attach()) if attach else None
        with _recorded_end(study, listener):
            context = VerifierContext(space.data, space.threat, space.verification, space.resources.threads)
            pool = VerifierPool(context, shares.verifiers, shares.verifier_resources)
            desk = Desk(study, shares, pool, ray.remote(num_cpus=0)(Mailbox).remote())
            desk.start()
            try:
                _tune(desk, _job(space, shares, folder, options), shares, folder)
            except KeyboardInterrupt:
                if desk.error is None:
                    raise
            finally:
                desk.close()
                pool.close()
            if desk.error is not None:
                raise desk.error


@contextlib.contextmanager
def _recorded_end(study: Study, listener: Listener | None) -> Iterator[None]:
    """Let ``listener`` follow the study inside the block, and record how the block ended."""
    if listener is not None:
        study.listeners.append(listener)
    begin, status = time.monotonic(), "failed"
    try:
        yield
        status = "completed"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        study.end(status, time.monotonic() - begin)
        if listener is not None:
            study.listeners.remove(listener)


def _job(space: Space, shares: Plan, folder: Path, options: DriverOptions) -> TrainJob:
    r = space.resources
    return TrainJob(
        study=folder.name,
        execution=shares.execution,
        workers=r.workers,
        cpus_per_worker=r.cpus_per_worker,
        gpus_per_worker=r.gpus_per_worker,
        threads=r.threads,
        storage=str(folder),
        trust_code=options.trust_code,
        init=options.init,
    )


def _tune(desk: Desk, job: TrainJob, shares: Plan, folder: Path) -> None:
    trainable = tune.with_resources(
        tune.with_parameters(train_trial, job=job, mailbox=desk.mailbox), shares.trial_resources
    )
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(search_alg=DeskSearcher(desk), num_samples=-1, reuse_actors=True),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(folder), verbose=0, failure_config=tune.FailureConfig(max_failures=0)
        ),
    )
    tuner.fit()


@contextlib.contextmanager
def _scratch(storage: str | None) -> Iterator[Path]:
    """Ray's own pickled state lives here, outside the run; it is never read back and ends with the driver."""
    base = Path(storage).resolve() if storage else None
    if base is not None:
        base.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="cactus-ray-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
