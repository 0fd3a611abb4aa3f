"""Ray Train with fewer processes: what is not public in Ray Train is touched here and in ``kept_workers`` alone.

A run of Ray Train starts a controller, a cleaner of placement groups, a manager of data sets, a queue for Ray Tune and
a synchroniser beside its workers, each a process that imports for seconds. Here the controller works in the trial's own
actor, which Ray Tune uses again for the next trial; epochs go to the driver through the mailbox alone; the driver frees
what a dead trial held; and workers and synchroniser stay for the next trial (``kept_workers``). A Ray whose insides are
others runs its own way, slower to begin.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from cactus_ray.cluster import kept_workers

try:
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback
    from ray.train.v2._internal.execution.controller import TrainController
except ImportError:
    WorkerGroupCallback = TrainController = None

_OVERRIDDEN = ("_create_default_callbacks", "_initialize_and_run_controller")


def trainer(worker: Callable[[dict[str, Any]], None], *, sender: str, mailbox: Any, **options: Any) -> Any:
    """A TorchTrainer for use inside the actor of one trial of Ray Tune; ``options`` are TorchTrainer's."""
    if TrainController is None or not all(hasattr(TorchTrainer, name) for name in _OVERRIDDEN):
        return TorchTrainer(worker, **options)
    return _Lean(worker, sender=sender, mailbox=mailbox, **options)


class _Held(WorkerGroupCallback or object):  # type: ignore[misc]
    """Tells the driver which placement group a trial holds: nobody else knows once the trial's actor is dead."""

    def __init__(self, sender: str, mailbox: Any) -> None:
        self.sender, self.mailbox = sender, mailbox

    def after_worker_group_start(self, worker_group: Any) -> None:
        held = worker_group.get_worker_group_state().placement_group_handle.placement_group
        self.mailbox.put.remote(("holds", self.sender, {"group": held.id.hex()}))


class _Controller(TrainController or object):  # type: ignore[misc]
    """With workers that are kept for the next trial, where that works."""

    if kept_workers.USABLE:
        worker_group_cls = kept_workers.KeepingGroup


class _Lean(TorchTrainer):  # type: ignore[misc]
    """With its controller in this process."""

    def __init__(self, *arguments: Any, sender: str, mailbox: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.held = _Held(sender, mailbox)

    def _create_default_callbacks(self) -> list[Any]:
        found = super()._create_default_callbacks()
        needless = (PlacementGroupCleanerCallback, DatasetsCallback)  # a process each; our data sets are not Ray's
        return [c for c in found if not isinstance(c, needless)] + [self.held]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        async def run() -> Any:
            controller = _Controller(**options)
            await controller.run()
            return controller.get_result()

        found = asyncio.run(run())
        return asyncio.run(found) if asyncio.iscoroutine(found) else found


def free(group: str) -> None:
    """Remove a placement group by its id; nothing happens if it is gone."""
    if placement_group_table().get(group, {}).get("state") not in (None, "REMOVED"):
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))
