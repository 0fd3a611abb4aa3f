"""The desk: a thread of the driver that takes the mail of trainers and the verdicts of verifiers into the records."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from cactus_ray import interrupts
from cactus_ray.cluster.broker import Cut, Job, Lost
from cactus_ray.cluster.mailbox import LOST, Message, sender_of, trial_of
from cactus_ray.cluster.packing import per_gpu
from cactus_ray.cluster.resources import Plan, missing
from cactus_ray.cluster.verifier import ChunkFailure, labels_of
from cactus_ray.cluster.verifier_pool import SPARED, Outcome, VerifierPool
from cactus_ray.errors import RunFailedError
from cactus_ray.search.chunks import Chunk
from cactus_ray.search.study import Study

POLL_SECONDS = 0.05
INTERRUPT_SECONDS = 20.0
"""So long an interrupt has until the next one: Tune ends its trials in an orderly way within it."""
PENDING_SECONDS = 60.0
"""After this long a trial whose training has not begun is said to wait, and for what."""

logger = logging.getLogger(__name__)


class Desk:
    """Keeps the study's state in step with what trainers and verifiers send. All access is under one lock.

    ``loosen``: the plan after a trial with this part of a GPU ran out of its memory, or None (``packing.loosened``).
    """

    def __init__(
        self, study: Study, shares: Plan, pool: VerifierPool, mailbox: Any,
        loosen: Callable[[float], Plan | None] = lambda gpus: None,
    ) -> None:  # fmt: skip
        self.study, self.shares, self.pool, self.mailbox, self.loosen = study, shares, pool, mailbox, loosen
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.error: BaseException | None = None
        self.over: str | None = None
        self.pending: dict[str, float] = {}
        self.senders: dict[str, str] = {}
        self.groups: dict[str, str] = {}
        self.closing = threading.Event()
        self.interrupted: float | None = None
        self.thread = threading.Thread(target=self._run, name="desk", daemon=True)

    def start(self) -> None:
        self.pool.still_worth = self._still_worth
        self._offer(self.study.resume())
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
                with self.lock:
                    self._offer(self.study.afterwards())
                self.name_pending()
                self.stay_alive()
                self.over = self.study.budget.over()
                if self.over and (self.study.in_flight or self.study.after.verifying):
                    self._end_tune()  # trials in flight stay as they are in the records, for a later driver
                    return
                if self.interrupted is not None and time.monotonic() - self.interrupted > INTERRUPT_SECONDS:
                    self._end_tune()
                    return
        except BaseException as error:  # the main thread must learn of it, whatever it is
            self._fail(error)
            self._end_tune()

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def _ask_mailbox(self, answer: Any) -> Any:
        """What the mailbox answers. Raises RunFailedError where it is dead: what it held came from trials in flight."""
        try:
            return ray.get(answer)
        except ray.exceptions.RayActorError as error:
            raise RunFailedError(LOST) from error

    def _end_tune(self) -> None:
        """Interrupt Tune, which would wait for the trials that train, for hours perhaps.

        Again until the driver closes this desk: an interrupt that meets Ray inside a callback is lost.
        """
        while not self.closing.is_set():
            interrupts.repeat()
            self.closing.wait(INTERRUPT_SECONDS)

    def take_mail(self) -> None:
        """Handle every message that the trainers have sent so far."""
        with self.changed:
            messages: list[Message] = self._ask_mailbox(self.mailbox.take.remote())
            for kind, sender, content in messages:
                trial = trial_of(sender)
                # Ray restarted its workers after their last word, or they are of an attempt that was given up.
                late = trial not in self.study.training or self.senders.get(trial) != sender
                if kind == "holds":  # its workers are still to be started
                    self._held(trial, content["group"], late)
                    continue
                if late:
                    if kind == "rung":
                        self.mailbox.answer.remote(sender, content["epoch"], False)
                    continue
                self.pending.pop(trial, None)
                if kind == "begun":
                    self.study.begun(trial, **content)
                elif kind == "saved":
                    self.study.saved(trial, **content)
                elif kind == "epoch":
                    self.study.epoch(trial, **content)
                elif kind == "rung":
                    self.mailbox.answer.remote(sender, content["epoch"], self.study.epoch(trial, **content))
                elif kind == "stopped":
                    self.study.stopped(trial, **content)
                elif kind == "waits":
                    self.study.waits(trial, **content)
                elif kind == "trained":
                    self._offer(self.study.trained(trial, **content))
                elif kind == "oom":
                    self._out_of_memory(trial, **content)
                else:
                    self.study.failed(trial, **content)
            if messages:
                self.changed.notify_all()

    def stay_alive(self) -> None:
        with self.lock:
            self.study.alive()

    def _out_of_memory(self, trial: str, error: str, gpus: float, peak: int = 0, total: int = 0) -> None:
        """Queue a trial again that shared a GPU, with fewer to a GPU from here on; one that had it all has failed."""
        sizes = {"peak": peak, "total": total} if total else {}
        if (looser := self.loosen(gpus)) is None:
            r = self.shares.resources
            beside = f" beside {r.verifiers} verifier(s) of {r.verifier_gpus:g}" if r.verifier_gpus else ""
            used = f" after {peak / 1e9:.3g} of {total / 1e9:.3g} GB" if total else ""
            self.study.failed(
                trial,
                f"out of memory{used} with {gpus:g} GPU and no other trial on it{beside}; a smaller model or "
                f"train.batch_size would need less ({error})",
            )
            return
        if per_gpu(looser.resources) < per_gpu(self.shares.resources):  # the first of those that shared it that way
            self.shares = looser
        number = per_gpu(self.shares.resources)
        self.study.out_of_memory(trial, {"trials_per_gpu": number, "error": error, "had": gpus, **sizes})

    def name_pending(self) -> None:
        """Say once of every trial that waits too long for its resources what it waits for."""
        with self.lock:
            late = [t for t, since in self.pending.items() if time.monotonic() - since > PENDING_SECONDS]
            for trial in late:
                del self.pending[trial]
        if late:
            words = missing(self.shares.resources, ray.available_resources())
            logger.warning("%s: not begun after %g s: %s", ", ".join(late), PENDING_SECONDS, words)

    def _offer(self, chunks: list[Chunk]) -> None:
        """Queue chunks, each trial's for itself."""
        for trial in dict.fromkeys(chunk.trial for chunk in chunks):
            mine = [chunk for chunk in chunks if chunk.trial == trial]
            size = self.study.checkpoint(trial).stat().st_size
            self.pool.submit(Job(trial, self.study.numbers[trial], size, mine))

    def _judge(self, found: Outcome) -> None:
        with self.changed:
            if isinstance(found, ChunkFailure):
                self._refuse(found)
            elif isinstance(found, Lost):
                self.study.lost(found.chunk, found.reason, found.seconds)
                if found.over:
                    self._give_up(found.chunk, found.reason)
            elif isinstance(found, Cut) and found.reason == SPARED:
                self._offer(self.study.withdrawn(found.chunk))
            elif isinstance(found, Cut):
                self._give_up(found.chunk, found.reason)
            else:
                self._offer(self.study.verified(found))
            self.changed.notify_all()

    def _still_worth(self, chunk: Chunk) -> tuple[str, ...]:
        with self.lock:
            return self.study.still_worth(chunk)

    def _give_up(self, chunk: Chunk, reason: str) -> None:
        labels = labels_of(self.study.space.data, chunk.indices)
        self._offer(self.study.given_up(chunk, reason, labels))

    def _refuse(self, found: ChunkFailure) -> None:
        chunk = found.chunk
        if found.unsound:
            raise RunFailedError(
                f"trial {chunk.trial}, levels {', '.join(chunk.levels)}: {found.error}; no verdict of this study can "
                "be trusted"
            )
        self.pool.drop(chunk.trial)
        self.study.refused(chunk.trial, found.error)

    def _held(self, trial: str, group: str, late: bool) -> None:
        """A trial holds the resources of its workers; what an attempt holds that was given up is freed at once."""
        if late:
            self._free(group)
        else:
            self.groups[trial] = group

    def _free(self, group: str) -> None:
        """Take the workers' resources from a trial whose actor is dead; one that ends by itself gives them back."""
        from cactus_ray.cluster.ray_train import free

        free(group)

    # --- what Tune's thread asks

    def next_configuration(self, wait: float) -> dict[str, Any] | str | None:
        """A configuration for Tune, "finished", or None if there is none now (after waiting for one for ``wait`` s)."""
        deadline = time.monotonic() + wait
        with self.changed:
            while True:
                if self.error is not None or self.over or self.study.done:
                    return "finished"
                shares = self.shares
                free = len(self.study.training) < shares.training and self.study.in_flight < shares.in_flight
                free = free and not self.pool.broker.full
                start = self.study.next_trial() if free else None
                if start is not None:
                    self.pending[start.id] = time.monotonic()
                    sender = self.senders[start.id] = sender_of(start.id, start.attempt)
                    if start.state is not None:
                        try:
                            self._ask_mailbox(self.mailbox.hand.remote(sender, start.state))
                        except RunFailedError as lost:  # here it would reach Tune, which knows no way with it
                            self._fail(lost)
                            return "finished"
                    rungs = {
                        "asked": start.asked, "scored": start.scored, "levels": self.study.rungs.levels,
                        "waits": self.study.rungs.halving.rules.promote,
                    }  # fmt: skip
                    return {
                        "trial": start.id, "run": start.config.to_dict(), "rungs": rungs, "epoch": start.epoch,
                        "sender": sender, "gpus": shares.resources.worker_gpus,
                    }  # fmt: skip
                left = deadline - time.monotonic()
                if left <= 0 or self.study.training:
                    return None
                self.changed.wait(left)

    def trainer_ended(self, trial: str, error: bool) -> None:
        """Tune says that a trial's function ended; one that died without mail is trained on."""
        if error:
            try:
                self.take_mail()
            except RunFailedError as lost:
                self._fail(lost)
                return
        with self.changed:
            self.pending.pop(trial, None)
            group = self.groups.pop(trial, None)
            if not error:
                return
            if group is not None:
                self._free(group)
            if trial in self.study.training:
                self.study.died(trial, "the training process died (killed, or out of memory)")
                self.changed.notify_all()
