"""Verifier actors beside training: the thin side of the broker that touches Ray.

A verifier that dies or hangs loses nothing but its chunk. Networks are put into Ray's object store when a chunk of
theirs starts, and leave it with their last chunk; the file in ``checkpoints/`` outlives both.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cactus_ray.cluster.broker import Broker, Cut, Job, Lost, Start
from cactus_ray.cluster.verifier import ChunkFailure, Verifier, VerifierContext
from cactus_ray.search.chunks import Chunk, ChunkResult

Outcome = ChunkResult | ChunkFailure | Lost | Cut
SPARED = "spared"
"""Why a chunk was cut that nobody needs any more."""


class VerifierPool:
    """One verifier actor for every slot of the broker. Made and used by the driver alone.

    ``read``: the bytes of a trial's network. ``nodes``: the id of each slot's node, as it was planned; where that node
    is gone, another one is taken. ``still_worth``: the levels of a chunk that are to be verified as it is handed out.
    ``poll`` belongs to one thread; any may submit and drop.
    """

    def __init__(
        self, context: VerifierContext, broker: Broker, resources: Mapping[str, float], read: Callable[[str], bytes],
        nodes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.context, self.broker, self.resources, self.read = context, broker, dict(resources), read
        self.still_worth: Callable[[Chunk], tuple[str, ...]] = lambda chunk: chunk.levels
        self.nodes = dict(zip(broker.slots, nodes, strict=False))
        self.lock = threading.Lock()
        self.networks: dict[str, ray.ObjectRef] = {}
        self.futures: dict[ray.ObjectRef, str] = {}
        self.actors = {slot: self._start(slot) for slot in broker.slots}

    def _start(self, slot: str) -> Any:
        options: dict[str, Any] = {
            "num_cpus": self.resources.get("CPU", 1.0),
            "num_gpus": self.resources.get("GPU", 0.0),
        }
        if node := self.nodes.get(slot):
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
        return ray.remote(Verifier).options(**options).remote(self.context)

    def submit(self, job: Job) -> None:
        """Queue the chunks of one trained network."""
        with self.lock:
            self.broker.offer(job)

    def drop(self, trial: str) -> None:
        """Forget the chunks of a trial that still wait."""
        with self.lock:
            self.broker.drop(trial)

    def poll(self, timeout: float) -> list[Outcome]:
        """Hand out what waits, wait at most ``timeout`` seconds, and return what has happened."""
        starts, cuts = self._assign()
        with self.lock:
            needed = self.broker.networks
        for start in starts:
            self._send(start)
        self.networks = {trial: reference for trial, reference in self.networks.items() if trial in needed}
        if not self.futures:
            if not cuts:
                time.sleep(timeout)
            return [*cuts]
        ready, _ = ray.wait(list(self.futures), num_returns=1, timeout=0.0 if cuts else timeout)
        found: list[Outcome] = [*cuts, *(self._collect(future) for future in ready)]
        found += [self._lost(slot, "verifier_hung") for slot in self.broker.hung(time.monotonic())]
        return found

    def _assign(self) -> tuple[list[Start], list[Cut]]:
        """What is to be started now, and what nobody will do: each chunk is asked for again before it is handed out."""
        starts: list[Start] = []
        cuts: list[Cut] = []
        while True:
            with self.lock:
                found, over = self.broker.assign(time.monotonic())
            cuts += over
            kept = {start: self.still_worth(start.chunk) for start in found}  # not under the lock: it has its own
            starts += [
                replace(start, chunk=replace(start.chunk, levels=levels)) for start, levels in kept.items() if levels
            ]
            idle = [start for start, levels in kept.items() if not levels]
            if not idle:
                return starts, cuts
            with self.lock:
                for start in idle:
                    self.broker.done(start.slot, 0.0)
                    cuts.append(Cut(start.chunk, SPARED))

    def _send(self, start: Start) -> None:
        trial = start.chunk.trial
        if trial not in self.networks:
            self.networks[trial] = ray.put(self.read(trial))
        self.futures[self.actors[start.slot].verify.remote(start.chunk, self.networks[trial])] = start.slot

    def _collect(self, future: ray.ObjectRef) -> Outcome:
        try:
            result: ChunkResult | ChunkFailure = ray.get(future)
        except ray.exceptions.RayError:  # a dead actor, a lost node, an object that is gone
            return self._lost(self.futures[future], "verifier_died")
        slot = self.futures.pop(future)
        with self.lock:
            self.broker.done(slot, result.seconds)
        return result

    def _lost(self, slot: str, reason: str) -> Lost:
        self.futures = {future: other for future, other in self.futures.items() if other != slot}
        with self.lock:
            lost = self.broker.lost(slot, reason, time.monotonic())
        self.networks.pop(lost.chunk.trial, None)  # it may have been on the lost node
        ray.kill(self.actors[slot])
        self.actors[slot] = self._start(slot)
        return lost

    def close(self) -> None:
        """End the actors."""
        for actor in self.actors.values():
            ray.kill(actor)
        self.actors, self.futures, self.networks = {}, {}, {}
