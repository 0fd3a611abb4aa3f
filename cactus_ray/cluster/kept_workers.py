"""Worker processes of Ray Train that outlive a trial: the next trial of the same actor goes on in them.

A fresh process imports torch, Ray Train and what torch's optimisers want: 7 s of a core and more, which is most of the
start of a trial. So the workers are actors that ask for nothing and run beside the placement group, not in it: the
group alone reserves what a trial uses and is given back when the trial ends, and an idle process holds memory only.

A process is kept if every worker of its run ended well; otherwise all end with their run, as Ray Train has it.
Processes that use a GPU are in the placement group and end with their run always: an idle one would keep a part of the
GPU's memory. All die with the trial's actor, which owns them.

What is used here of Ray Train's insides is looked for in ``USABLE``; ``ray_train`` does without where it is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import inspect
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

try:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
    from ray.train.v2._internal.execution.worker_group import worker_group as _module
    from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState, _shutdown_workers
    from ray.train.v2._internal.execution.worker_group.worker import Worker

    WorkerGroup: Any = _module.WorkerGroup
    _INSIDE = ("_start_impl", "_create_workers", "_assign_worker_ranks", "_get_worker_runtime_env", "_worker_cls")
    USABLE = (
        all(hasattr(WorkerGroup, name) for name in _INSIDE)
        and {"num_workers", "placement_group", "resources_per_worker"}
        < set(inspect.signature(WorkerGroup._create_workers).parameters)
        and hasattr(_module, "SynchronizationActor")
        and {field.name for field in dataclasses.fields(WorkerGroupState)}
        == {"start_time", "placement_group_handle", "workers", "sync_actor"}
    )
except (ImportError, AttributeError):
    USABLE = False
    WorkerGroup = WorkerGroupState = object

PATIENCE_SECONDS = 10.0
"""So long an idle process may take to answer, on a machine with much else to do; then it is replaced."""

_workers: dict[tuple[str, str], list[Any]] = {}
"""Idle processes, by node and runtime environment."""
_barriers: list[Any] = []
"""Idle synchronisers: nobody is at their barrier when all workers of a run have ended well."""


class KeepingGroup(WorkerGroup):  # type: ignore[misc]
    """A worker group whose processes come from an earlier run, where there is one, and are kept for a later one."""

    _worker_group_state: Any

    def _start_impl(self, worker_group_state_builder: Any) -> None:
        with _kept_barrier():
            super()._start_impl(worker_group_state_builder)
        state = self._worker_group_state
        values = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        self._worker_group_state = _KeepingState(**values, group=self)

    def _create_workers(
        self, num_workers: int, placement_group: Any, resources_per_worker: dict[str, float], **options: Any
    ) -> list[Any]:
        # options: of replica groups, which torch's own backend has not
        if set(resources_per_worker) != {"CPU"} or any(value is not None for value in options.values()):
            made: list[Any] = super()._create_workers(num_workers, placement_group, resources_per_worker, **options)
            return made
        nodes = placement_group_table(placement_group)["bundles_to_node_id"]
        try:
            found = _take([nodes[i] for i in range(num_workers)], self._environment(), self._worker_cls)
        except RayError as error:  # Ray Train begins again after this one
            raise WorkerGroupStartupFailedError(f"a worker did not start: {error}") from error
        workers = [
            Worker(actor, metadata, resources_per_worker, placement_group_bundle_index=i)
            for i, (actor, metadata) in enumerate(found)
        ]
        ranked: list[Any] = self._assign_worker_ranks(workers)
        return ranked

    def _environment(self) -> dict[str, Any]:
        found: dict[str, Any] = self._get_worker_runtime_env(self._train_run_context.run_config.worker_runtime_env)
        return found

    def keep(self, state: Any) -> bool:
        """Keep the processes of a run that is over; False if one of them did not end well."""
        status = self.get_latest_poll_status()
        if status is None or not status.finished or status.errors:
            return False
        if all(set(worker.resources) == {"CPU"} for worker in state.workers):
            if not _all_tidy([worker.actor for worker in state.workers]):
                return False
            for worker in state.workers:
                _workers.setdefault((worker.metadata.node_id, repr(self._environment())), []).append(worker.actor)
        else:
            _shutdown_workers(state.workers)
        _barriers.append(state.sync_actor)
        return True


@dataclasses.dataclass(frozen=True)
class _KeepingState(WorkerGroupState):  # type: ignore[misc]
    group: KeepingGroup

    def shutdown(self) -> None:
        if self.group.keep(self):
            self.placement_group_handle.shutdown()
        else:
            super().shutdown()


def _take(nodes: list[str], environment: dict[str, Any], worker: type) -> list[tuple[Any, Any]]:
    """A process on each of ``nodes`` with what it says of itself; a new one where no idle one answers."""
    make = ray.remote(num_cpus=0, runtime_env=environment)(worker)
    actors = [
        _idle_worker(node, environment)
        or make.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in nodes
    ]
    return list(zip(actors, ray.get([actor.get_metadata.remote() for actor in actors]), strict=True))


def _idle_worker(node: str, environment: dict[str, Any]) -> Any:
    """An idle process that answers, or None; those that do not answer are ended."""
    idle = _workers.get((node, repr(environment)), [])
    while idle:
        actor = idle.pop()
        try:
            ray.get(actor.get_metadata.remote(), timeout=PATIENCE_SECONDS)
        except RayError:
            ray.kill(actor)
        else:
            return actor
    return None


def _all_tidy(actors: list[Any]) -> bool:
    """Let processes leave their process group, which Ray Train leaves to their end; whether all have."""
    done = [actor.execute.remote(_tidy) for actor in actors]
    try:
        ray.get(done, timeout=PATIENCE_SECONDS)
    except RayError:
        return False
    return True


def _tidy() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()


@contextlib.contextmanager
def _kept_barrier() -> Iterator[None]:
    """Let Ray Train find an idle synchroniser where it would make one."""
    original = _module.SynchronizationActor

    class Known:
        @staticmethod
        def options(**options: Any) -> Any:
            return original.options(**options) if (idle := _idle_barrier()) is None else _Made(idle)

    _module.SynchronizationActor = Known
    try:
        yield
    finally:
        _module.SynchronizationActor = original


@dataclasses.dataclass(frozen=True, slots=True)
class _Made:
    actor: Any

    def remote(self, **arguments: Any) -> Any:
        """What an actor's class gives, although nothing is made: the arguments are those of the run before."""
        return self.actor


def _idle_barrier() -> Any:
    """A synchroniser that answers and at which nobody waits, or None."""
    while _barriers:
        barrier = _barriers.pop()
        with contextlib.suppress(RayError):
            if ray.get(barrier.get_counter.remote(), timeout=PATIENCE_SECONDS) == 0:
                return barrier
    return None
