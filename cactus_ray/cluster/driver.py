"""The driver of a study: Ray Tune trains trials, verifier actors judge them, and this process alone keeps the records.

Tune's event loop has the main thread. A second thread, the desk, takes the mail of the trainers and the verdicts of the
verifiers. A trial of Tune ends with its training, so a network that waits for verdicts holds no training resources.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from cactus_ray import interrupts
from cactus_ray.cluster.broker import Broker, Limits
from cactus_ray.cluster.connect import connected, node_shapes
from cactus_ray.cluster.desk import Desk
from cactus_ray.cluster.mailbox import open_mailbox
from cactus_ray.cluster.packing import decided, loosened, packed, profile
from cactus_ray.cluster.resources import Plan, plan
from cactus_ray.cluster.shared import SCRATCH, driver_node, refuse_unseen_data, refuse_unshared
from cactus_ray.cluster.train_workers import TrainJob, train_trial
from cactus_ray.cluster.verifier import VerifierContext
from cactus_ray.cluster.verifier_pool import VerifierPool
from cactus_ray.search.space import Space
from cactus_ray.search.study import Listener, Study
from cactus_ray.verification.branch import DEFAULT_SECONDS
from cactus_ray.verification.cost import pace

PREFIX = "cactus-ray-"
Attach = Callable[[], AbstractContextManager[Listener | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverOptions:
    """Where a study runs.

    ``storage``: folder for Ray's scratch files, shared on a cluster of several nodes; ``init``: bytes of a network that
    every training starts from; ``cpus``, ``gpus``: logical ones of a local Ray (default: those of the machine).
    """

    address: str | None = None
    storage: str | None = None
    trust_code: bool = False
    init: bytes | None = None
    cpus: int | None = None
    gpus: int | None = None


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
        # A trial still has its actor for a moment when its network is recorded. Tune would begin another one for the
        # next trial, which imports for seconds and is thrown away as soon as this one is free.
        if len(self.trials) >= self.desk.shares.training:
            return None
        # Tune sleeps for a second between two of its questions while it has nothing to run; so it waits here instead,
        # where what happens wakes it. While it still has trials to end it must not wait at all.
        found = self.desk.next_configuration(wait=0.0)
        while found is None and not self.trials:
            found = self.desk.next_configuration(wait=0.5)
        if found == "finished":
            return str(Searcher.FINISHED)
        if isinstance(found, dict):
            # of a trial that is tried again, the last attempt counts
            before = {tune_id: trial for tune_id, trial in self.trials.items() if trial != found["trial"]}
            self.trials = {**before, trial_id: found["trial"]}
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

    ``attach`` is entered once the study is known to fit the cluster, and may yield one more listener (tracking).
    Raises UserError for an impossible request or a folder that a node does not see, RunFailedError where a certified
    sample was falsified or the mailbox was lost, and KeyboardInterrupt as it comes.
    """
    space = study.space
    with contextlib.ExitStack() as stack:
        available = stack.enter_context(connected(options.address, cpus=options.cpus, gpus=options.gpus))
        nodes = node_shapes()
        shapes = list(nodes.values())
        refuse_unseen_data(space.data.root, nodes)
        packing = decided(space, study.lowered, lambda: profile(space, options.trust_code, available, shapes))
        shares = plan(packed(space, packing.per_gpu) if packing else space, available, shapes)
        folder = stack.enter_context(scratch(study.store.path, options.storage))
        refuse_unshared(folder, options.storage, shares, nodes)
        listener = stack.enter_context(attach()) if attach else None
        with _recorded_end(study, listener):
            if packing is not None:
                study.packed(packing.to_dict())
            pool = _pool(study, shares, list(nodes))
            mailbox = open_mailbox(driver_node())
            desk = Desk(study, shares, pool, mailbox, lambda gpus: loosened(space, gpus, available, shapes))
            stack.callback(gc.unfreeze)
            gc.freeze()  # what is there now stays; to look through it again and again would hold up reports
            desk.start()
            try:
                with _heard(desk):
                    _tune(desk, _job(space, shares, folder, options), shares, folder)
            except KeyboardInterrupt:
                if desk.error is None and not desk.over:
                    raise
            finally:
                desk.close()
                pool.close()
            if desk.error is not None:
                raise desk.error


def _pool(study: Study, shares: Plan, nodes: Sequence[str]) -> VerifierPool:
    """The verifiers, and a broker that goes on where the records of an earlier driver end."""
    space, r = study.space, study.space.resources
    default = DEFAULT_SECONDS if space.verification.bound == "branch" else 0.0
    limits = Limits(
        hang_seconds=r.hang_seconds,
        pace=pace(shares.verifier_resources["GPU"] > 0),
        sample_seconds=space.verification.seconds_per_sample or default,
        trial_seconds=r.verify_seconds_per_trial,
        study_seconds=r.verify_seconds_per_study,
    )
    broker = Broker(limits, [f"verifier-{i}" for i in range(shares.verifiers)], study.spent, study.losses)
    context = VerifierContext(
        space.data, space.threat, space.verification, r.threads, shares.verifier_resources["GPU"] > 0
    )
    return VerifierPool(
        context, broker, shares.verifier_resources, lambda trial: study.checkpoint(trial).read_bytes(),
        [nodes[place] for place in shares.verifier_nodes],
    )  # fmt: skip


@contextlib.contextmanager
def _recorded_end(study: Study, listener: Listener | None) -> Iterator[None]:
    """Let ``listener`` follow the study inside the block, and record how the block ended."""
    if listener is not None:
        study.listeners.append(listener)
    begin, status = time.monotonic(), "failed"
    study.work()
    try:
        yield
        status = "limit" if study.budget.over() else "completed"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        study.end(status, time.monotonic() - begin)
        if listener is not None:
            study.listeners.remove(listener)


@contextlib.contextmanager
def _heard(desk: Desk) -> Iterator[None]:
    """Remember Ctrl-C and SIGTERM: one that meets Ray inside a callback is lost, and the desk repeats it."""

    def remember() -> None:
        desk.interrupted = time.monotonic()

    with interrupts.handled(remember):
        yield


def _job(space: Space, shares: Plan, folder: Path, options: DriverOptions) -> TrainJob:
    r = space.resources
    return TrainJob(
        study=folder.name,
        execution=shares.execution,
        workers=r.workers,
        cpus_per_worker=r.cpus_per_worker,
        threads=r.threads,
        storage=str(folder),
        trust_code=options.trust_code,
        init=options.init,
        state_seconds=r.state_seconds,
    )


def _tune(desk: Desk, job: TrainJob, shares: Plan, folder: Path) -> None:
    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        asked = dict(shares.trial_resources)
        if asked.get("GPU"):  # what a trial gets when it starts: a lack of memory may have changed it since
            asked["GPU"] = config.get("gpus", asked["GPU"])
        return tune.PlacementGroupFactory([asked])

    trainable = tune.with_resources(tune.with_parameters(train_trial, job=job, mailbox=desk.mailbox), resources)
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
def scratch(run: Path, storage: str | None) -> Iterator[Path]:
    """Ray's own pickled state lives here, outside the run; it is never read back and ends with the driver, or with the
    next one of the run where the driver is killed."""
    note, mine = run / SCRATCH, str(run.resolve())
    if note.is_file():
        left = Path(note.read_text())
        if left.name.startswith(PREFIX) and (left / SCRATCH).is_file() and (left / SCRATCH).read_text() == mine:
            shutil.rmtree(left, ignore_errors=True)
    base = Path(storage).resolve() if storage else None
    if base is not None:
        base.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    (folder / SCRATCH).write_text(mine)  # says whose it is, so that no path in a run's folder can name another
    note.write_text(str(folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        note.unlink(missing_ok=True)
