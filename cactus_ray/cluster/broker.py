"""Which verifier gets which chunk when, and what becomes of it: a core that decides, without Ray and without a clock.

Chunks wait in a heap: cheap ones of all trials before dear ones of any, then higher priority, then earlier trials. The
heap and the networks in memory are bounded; trials beyond that are parked (their networks are on disk) and change
places with worse ones inside, so that waiting room never overrides priority.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from cactus_ray.search.chunks import CHEAP, DEAR, Chunk
from cactus_ray.verification.cost import CPU_PACE

MARGIN = 3.0
"""A verifier that takes so many times longer than expected for the cost of its chunk may have hung."""
SHORT = 0.1
Key = tuple[int, float, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the broker keeps to. 0 seconds of a trial or study: no limit.

    ``tasks``: chunks in the heap; ``network_bytes``: networks whose chunks are in it; ``attempts``: verifiers that a
    chunk may be lost with; ``hang_seconds``: beyond ``sample_seconds`` for each sample and level of a chunk, and what
    its cost takes at ``pace``, multiply-adds per second that a verifier does at least.
    """

    tasks: int = 4096
    network_bytes: int = 1 << 30
    attempts: int = 3
    hang_seconds: float = 1800.0
    sample_seconds: float = 0.0
    pace: float = CPU_PACE
    trial_seconds: float = 0.0
    study_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Job:
    """Chunks of one stage of one trial. ``size``: bytes of its network; at equal ``priority`` lower numbers first."""

    trial: str
    number: int
    size: int
    chunks: Sequence[Chunk]
    priority: float = 0.0


@dataclass(frozen=True, slots=True)
class Start:
    """Give this chunk to the verifier in this slot."""

    slot: str
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Cut:
    """This chunk will not be verified: a budget is spent."""

    chunk: Chunk
    reason: str = "budget"


@dataclass(frozen=True, slots=True)
class Lost:
    """A verifier was lost with this chunk after ``seconds``. ``over``: it will not be tried again."""

    chunk: Chunk
    reason: str
    seconds: float
    over: bool


class Broker:
    """Chunks in, decisions out. ``now`` is any clock in seconds that never goes back.

    ``spent``: seconds that verifiers have worked for each trial before; ``losses``: how many verifiers a chunk was lost
    with before. Both come from the records, from which a new driver's broker goes on where a dead one ended.
    """

    def __init__(
        self,
        limits: Limits,
        slots: Sequence[str],
        spent: Mapping[str, float] | None = None,
        losses: Mapping[str, int] | None = None,
    ) -> None:
        self.limits, self.slots = limits, tuple(slots)
        self.spent = dict(spent or {})
        self.spent_in_all = sum(self.spent.values())
        self.losses = Counter(losses or {})
        self.tried: dict[str, set[str]] = {}
        self.heap: list[tuple[Key, Job, Chunk]] = []
        self.parked: list[tuple[Key, Job]] = []
        self.running: dict[str, tuple[Job, Chunk, float]] = {}
        self.inside: Counter[str] = Counter()
        self.sizes: dict[str, int] = {}
        self.dropped: set[str] = set()
        self.slowest: dict[str, float] = {}
        self._order = count()

    # --- what comes in

    def offer(self, job: Job) -> None:
        """Take up a trial's chunks of one stage; they wait outside where there is no room."""
        if job.chunks:
            heapq.heappush(self.parked, (self._key(job), job))
            self._admit()

    def drop(self, trial: str) -> None:
        """Forget what waits of a trial, for good. What runs runs on, is not tried again, and nobody will ask for it."""
        self.dropped.add(trial)
        self._leave(trial, sum(job.trial == trial for _, job, _ in self.heap))
        self.heap = [entry for entry in self.heap if entry[1].trial != trial]
        self.parked = [entry for entry in self.parked if entry[1].trial != trial]
        heapq.heapify(self.heap)
        heapq.heapify(self.parked)
        self._admit()

    def assign(self, now: float) -> tuple[list[Start], list[Cut]]:
        """Chunks for the verifiers that are free, and those that a spent budget ends."""
        starts: list[Start] = []
        cuts: list[Cut] = []
        aside: list[tuple[Key, Job, Chunk]] = []
        idle = [slot for slot in self.slots if slot not in self.running]
        while idle and self.heap:
            entry = heapq.heappop(self.heap)
            _, job, chunk = entry
            if chunk.stage == DEAR and self._over_budget(chunk.trial, now):
                cuts.append(Cut(chunk))
                self._leave(chunk.trial)
            elif (slot := self._slot(chunk, idle)) is None:
                aside.append(entry)
            else:
                idle.remove(slot)
                self.running[slot] = (job, chunk, now)
                starts.append(Start(slot, chunk))
            self._admit()
        for entry in aside:
            heapq.heappush(self.heap, entry)
        return starts, cuts

    def done(self, slot: str, seconds: float) -> Chunk:
        """The verifier in ``slot`` has answered after so many seconds of work, and is free again."""
        _, chunk, _ = self.running.pop(slot)
        self.tried.pop(chunk.id, None)
        self._learn(chunk, seconds)
        self._spend(chunk.trial, seconds)
        return chunk

    def lost(self, slot: str, reason: str, now: float) -> Lost:
        """The verifier in ``slot`` died or was ended; a new one is in its place."""
        job, chunk, since = self.running.pop(slot)
        self.losses[chunk.id] += 1
        over = self.losses[chunk.id] >= self.limits.attempts or chunk.trial in self.dropped
        if not over:
            self.tried.setdefault(chunk.id, set()).add(slot)
            self._enter(job, chunk)
        self._spend(chunk.trial, now - since)
        return Lost(chunk, reason, now - since, over)

    # --- what is asked

    @property
    def full(self) -> bool:
        """Whether trials wait outside, so that no further one should be trained now."""
        return bool(self.parked)

    @property
    def networks(self) -> frozenset[str]:
        """Trials whose networks are to be kept in memory."""
        return frozenset(self.sizes)

    def hung(self, now: float) -> list[str]:
        """Slots whose verifiers have worked for too long."""
        return [slot for slot, (_, chunk, since) in self.running.items() if now - since > self._patience(chunk)]

    def _patience(self, chunk: Chunk) -> float:
        """Seconds after which the verifier of a chunk is taken for hung; twice as many each time that it was lost, so
        that one that was only slow is done in the end."""
        limits, pairs = self.limits, len(chunk.levels) * len(chunk.indices)
        expected = chunk.cost * self.slowest.get(chunk.stage, 1.0 / limits.pace)
        patience = limits.hang_seconds + 2.0 * limits.sample_seconds * pairs + MARGIN * expected
        return patience * 2.0 ** self.losses[chunk.id]

    def _learn(self, chunk: Chunk, seconds: float) -> None:
        """Take a chunk as an example of how slow its stage may be, on this machine and for these networks.

        What is short beside ``hang_seconds`` is none: there, overheads count more than multiply-adds.
        """
        if chunk.cost > 0 and seconds > SHORT * self.limits.hang_seconds:
            known = self.slowest.get(chunk.stage, 1.0 / self.limits.pace)
            self.slowest[chunk.stage] = max(known, seconds / chunk.cost)

    # --- inside

    def _key(self, job: Job) -> Key:
        return (0 if job.chunks[0].stage == CHEAP else 1, -job.priority, job.number, next(self._order))

    def _slot(self, chunk: Chunk, idle: Sequence[str]) -> str | None:
        """A free slot that has not lost this chunk yet, as long as there are others; None: wait for one."""
        tried = self.tried.get(chunk.id, set())
        fresh = [slot for slot in idle if slot not in tried]
        if fresh:
            return fresh[0]
        return None if set(self.slots) - tried else idle[0]

    def _over_budget(self, trial: str, now: float) -> bool:
        """Whether no further dear chunk of a trial may start; what runs counts as far as it has run."""
        own, study = self.spent.get(trial, 0.0), self.spent_in_all
        for _, chunk, since in self.running.values():
            study += now - since
            own += now - since if chunk.trial == trial else 0.0
        return 0 < self.limits.trial_seconds <= own or 0 < self.limits.study_seconds <= study

    def _spend(self, trial: str, seconds: float) -> None:
        self.spent[trial] = self.spent.get(trial, 0.0) + seconds
        self.spent_in_all += seconds
        self._leave(trial)
        self._admit()

    def _enter(self, job: Job, chunk: Chunk) -> None:
        heapq.heappush(self.heap, (self._key(job), job, chunk))
        self.inside[job.trial] += 1
        self.sizes[job.trial] = job.size

    def _leave(self, trial: str, chunks: int = 1) -> None:
        """Chunks of a trial are over; the last one inside lets go of its network."""
        self.inside[trial] -= chunks
        if self.inside[trial] <= 0:
            del self.inside[trial]
            self.sizes.pop(trial, None)

    def _admit(self) -> None:
        """Bring parked jobs inside, best first, while there is room or worse ones can make some."""
        while self.parked:
            key, job = self.parked[0]
            if self._fits(job):
                heapq.heappop(self.parked)
                for chunk in job.chunks:
                    self._enter(job, chunk)
            elif not self._park_worse(key):
                return

    def _fits(self, job: Job) -> bool:
        if not self.heap:  # whatever its size, something has to be done next
            return True
        others = sum(size for trial, size in self.sizes.items() if trial != job.trial)
        few = len(self.heap) + len(job.chunks) <= self.limits.tasks
        return few and others + job.size <= self.limits.network_bytes

    def _park_worse(self, key: Key) -> bool:
        """Put the worst job of the heap outside if it is worse than ``key``."""
        worst, job, _ = max(self.heap, key=lambda entry: entry[0])
        if worst[:3] <= key[:3]:
            return False
        mine = [chunk for _, other, chunk in sorted(self.heap, key=lambda entry: entry[0]) if other is job]
        self.heap = [entry for entry in self.heap if entry[1] is not job]
        heapq.heapify(self.heap)
        heapq.heappush(self.parked, (self._key(job), replace(job, chunks=mine)))
        self._leave(job.trial, len(mine))
        return True
