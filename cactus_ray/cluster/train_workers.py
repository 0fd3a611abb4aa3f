"""One trial: the training loop, in the trial's own actor or in Ray Train workers. One loop, two ways to run it."""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from cactus_ray.cluster.mailbox import Message
from cactus_ray.config import RunConfig, parse
from cactus_ray.data import load
from cactus_ray.errors import UserError
from cactus_ray.models.network import pack, unpack
from cactus_ray.training.loop import EpochReport, NonFiniteLossError, TrainResult, train
from cactus_ray.training.state import unpack_state

STATE_FILE = "state.safetensors"
SAVING_SHARE = 0.05
"""Saving states for a later driver takes at most about this part of the training."""


@dataclass(frozen=True, slots=True)
class TrainJob:
    """What all trials of a study share. ``init``: bytes of a network to start from.

    ``state_seconds``: at least so long between two states of a trial that are sent to the driver.
    """

    study: str
    execution: str
    workers: int
    cpus_per_worker: float
    threads: int
    storage: str
    trust_code: bool
    init: bytes | None = None
    state_seconds: float = 0.0


class TorchWorkers:
    """The workers of a torch.distributed process group (gloo on CPU, NCCL on GPU), as the training loop sees them."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the workers, in one collective."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.size
        offset = 0
        for tensor in tensors:
            tensor.detach().copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
            offset += tensor.numel()


def train_trial(config: dict[str, Any], job: TrainJob, mailbox: Any) -> dict[str, Any]:
    """A Ray Tune trainable: trains ``config["run"]`` and mails epochs, the network or the failure to the driver.

    ``config["rungs"]``: the epochs after which the proxies are measured at ``levels`` and the driver is asked; with
    ``waits`` a trial that does not go on sends its state as it ends.

    ``config["gpus"]``: GPUs of a worker.

    A failure is mailed with its step and ends the trial normally: what a trial came to is decided by our records, and
    Ray would only add a traceback to the terminal. So is a lack of GPU memory, which the driver may answer with another
    attempt.
    """
    import ray

    try:
        if job.execution == "train":
            _train_with_ray_train(config, job, mailbox)
        else:
            _train_direct(config, job, mailbox)
    except Exception as error:  # whatever ends a trial must reach the records, with its name
        with contextlib.suppress(ray.exceptions.RayActorError):  # without a mailbox the driver ends the study by itself
            ray.get(mailbox.put.remote(_failure(error, config)))
        outcome = "failed"
    else:
        outcome = "ended"
    gc.collect()
    torch.cuda.empty_cache()  # this process may wait long for its next trial, or for none
    return {"outcome": outcome}


def _failure(error: Exception, trial: dict[str, Any]) -> Message:
    """What is mailed of an exception that ended a trial."""
    if trial["gpus"] > 0 and ran_out_of_gpu(error):
        gpu = torch.cuda.is_available()
        sizes = {"peak": torch.cuda.max_memory_allocated(), "total": torch.cuda.mem_get_info()[1]} if gpu else {}
        return "oom", trial["sender"], {"error": describe(error), "gpus": trial["gpus"], **sizes}
    step = error.step if isinstance(error, NonFiniteLossError) else None
    return "failed", trial["sender"], {"error": describe(error), "step": step}


def ran_out_of_gpu(error: BaseException) -> bool:
    """Whether an exception, or what caused it, says that a GPU's memory ran out: to torch's allocator, to CUDA itself
    or to one of its libraries."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    library = ("CUBLAS_STATUS_" in text or "CUDNN_STATUS_" in text) and "ALLOC_FAILED" in text
    if isinstance(error, RuntimeError) and (library or "CUDA error: out of memory" in text):
        return True
    return error.__cause__ is not None and ran_out_of_gpu(error.__cause__)


def describe(error: BaseException) -> str:
    """One line for the records: the message of an expected error, type and innermost line of any other."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, UserError | NonFiniteLossError):
        return str(cause)
    frames = traceback.extract_tb(cause.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(cause).__name__}: {cause}{place}"


def _train_direct(trial: dict[str, Any], job: TrainJob, mailbox: Any) -> None:
    from ray import tune

    mailbox.put.remote(("begun", trial["sender"], {"epoch": trial["epoch"]}))
    torch.set_num_threads(job.threads)
    keeper = Keeper(trial["sender"], job.state_seconds, mailbox)
    left: dict[str, Any] = {}
    device = "cuda" if trial["gpus"] > 0 and torch.cuda.is_available() else "cpu"

    def report(epoch: EpochReport) -> bool:
        content = _scored(epoch, trial)
        tune.report(dict(epoch.metrics))
        go_on = _mail_epoch(content, trial, mailbox)
        if go_on:
            keeper.keep(epoch)
        else:
            left.update(_left(epoch, trial))
        return go_on

    state = _handed_state(trial, mailbox)
    _mail_result(trial, _run_loop(trial["run"], job, report=report, device=device, state=state), left, mailbox)


class Keeper:
    """Sends the state of a trial to the driver now and then, whose disk every later driver reads."""

    def __init__(self, sender: str, seconds: float, mailbox: Any) -> None:
        self.sender, self.seconds, self.mailbox = sender, seconds, mailbox
        self.due = time.monotonic() + seconds

    def keep(self, epoch: EpochReport, data: bytes | None = None) -> None:
        """Send the state after an epoch (``data`` where it is at hand), if it is time; nothing after the last one."""
        import ray

        started = time.monotonic()
        if epoch.epoch == epoch.epochs or started < self.due:
            return
        ray.get(self.mailbox.save.remote(self.sender, epoch.epoch, epoch.save() if data is None else data))
        now = time.monotonic()
        self.due = now + max(self.seconds, (now - started) / SAVING_SHARE)


def _handed_state(trial: dict[str, Any], mailbox: Any) -> bytes | None:
    """The state from which the driver wants the trial to go on."""
    import ray

    if not trial["epoch"]:
        return None
    state: bytes | None = ray.get(mailbox.state.remote(trial["sender"]))
    return state


def _run_loop(run: dict[str, Any], job: TrainJob, **options: Any) -> TrainResult:
    config = parse(RunConfig, run)
    init = unpack(job.init, "the initial network") if job.init is not None else None
    data = load(config.data, ("train", "selection"))
    return train(config, data, init=init, trust_code=job.trust_code, **options)


def _scored(epoch: EpochReport, trial: dict[str, Any]) -> dict[str, Any]:
    """What is mailed of an epoch; on every worker, because the proxies are measured by all together."""
    rungs = trial["rungs"]
    proxies = epoch.score(rungs["levels"]) if epoch.epoch in rungs["scored"] else {}
    shared = {"gpus": trial["gpus"]} if trial["gpus"] > 0 else {}
    return {"epoch": epoch.epoch, "epochs": epoch.epochs, "metrics": {**epoch.metrics, **proxies}, **shared}


def _mail_epoch(content: dict[str, Any], trial: dict[str, Any], mailbox: Any) -> bool:
    """Mail an epoch; whether the trial goes on. At a rung that is the driver's word, which is waited for."""
    import ray

    if content["epoch"] in trial["rungs"]["asked"]:
        return bool(ray.get(mailbox.ask.remote(trial["sender"], content)))
    mailbox.put.remote(("epoch", trial["sender"], content))
    return True


def _left(epoch: EpochReport, trial: dict[str, Any]) -> dict[str, Any]:
    """What is mailed at the end of a trial that does not go on, beside its seconds: its state if it may later."""
    return {"epoch": epoch.epoch, "data": epoch.save()} if trial["rungs"]["waits"] else {}


def _mail_result(trial: dict[str, Any], result: TrainResult, left: dict[str, Any], mailbox: Any) -> None:
    import ray

    if result.stopped:
        kind = "waits" if left else "stopped"
        ray.get(mailbox.put.remote((kind, trial["sender"], {"seconds": result.seconds, **left})))
        return
    keep = parse(RunConfig, trial["run"]).train.keep
    networks = {"last": pack(result.last), "best": pack(result.best)}
    content = {"networks": networks, "chosen": keep, "epochs": result.epochs, "seconds": result.seconds}
    ray.get(mailbox.put.remote(("trained", trial["sender"], content)))


# --- Ray Train -----------------------------------------------------------------------------------------------------


def _train_with_ray_train(trial: dict[str, Any], job: TrainJob, mailbox: Any) -> None:
    import ray.train
    from ray.train.torch import TorchConfig

    from cactus_ray.cluster.ray_train import trainer
    from cactus_ray.cluster.shared import refuse_unseen_here

    refuse_unseen_here(job.storage)
    on_gpu = trial["gpus"] > 0
    resources = {"CPU": float(job.cpus_per_worker)} | ({"GPU": float(trial["gpus"])} if on_gpu else {})
    trainer(
        _worker,
        train_loop_config={"trial": trial, "job": job, "mailbox": mailbox},
        # NCCL takes memory of the GPU for every process, and one worker has nobody to talk to
        torch_config=TorchConfig(backend="nccl" if on_gpu and job.workers > 1 else "gloo", timeout_s=300),
        scaling_config=ray.train.ScalingConfig(num_workers=job.workers, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=ray.train.RunConfig(
            # Stable within an attempt: a worker that died goes on from its last checkpoint. The workers of an earlier
            # attempt, whose trial's actor died, may still be there.
            name=f"{job.study}-{trial['sender'].replace('#', '-')}",
            storage_path=job.storage,
            failure_config=ray.train.FailureConfig(max_failures=2),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
        sender=trial["sender"],
        mailbox=mailbox,
    ).fit()


def _worker(config: dict[str, Any]) -> None:
    """The loop in one Ray Train worker. Rank 0 mails; all ranks report, because reporting is a barrier."""
    import ray
    import ray.train
    import ray.train.torch

    from cactus_ray.cluster.shared import refuse_unseen_here

    job: TrainJob = config["job"]
    trial: dict[str, Any] = config["trial"]
    torch.set_num_threads(job.threads)
    workers = TorchWorkers()
    mailbox = config["mailbox"]
    keeper = Keeper(trial["sender"], job.state_seconds, mailbox)
    left: dict[str, Any] = {}
    saved = _saved_state()
    state = _handed_state(trial, mailbox) if saved is None else saved
    if workers.rank == 0:
        mailbox.put.remote(("begun", trial["sender"], {"epoch": 0 if state is None else unpack_state(state).epoch}))

    def report(epoch: EpochReport) -> bool:
        content = _scored(epoch, trial)
        if workers.rank > 0:  # the loop asks all workers, and one word suffices
            ray.train.report(dict(epoch.metrics))
            return True
        go_on = _mail_epoch(content, trial, mailbox)
        if not go_on:  # no checkpoint: a restarted worker repeats this epoch and is told the same
            ray.train.report(dict(epoch.metrics))
            left.update(_left(epoch, trial))
            return False
        data = epoch.save()
        keeper.keep(epoch, data)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, STATE_FILE).write_bytes(data)
            ray.train.report(dict(epoch.metrics), checkpoint=ray.train.Checkpoint.from_directory(folder))
        return True

    try:
        refuse_unseen_here(job.storage)
        result = _run_loop(
            trial["run"],
            job,
            report=report,
            device=str(ray.train.torch.get_device()),
            workers=workers,
            state=state,
        )
    except Exception as error:
        again = not (ran_out_of_gpu(error) or isinstance(error, UserError | NonFiniteLossError))
        if workers.size > 1 or again:  # others wait for this one: Ray Train has to end them
            raise
        ray.get(mailbox.put.remote(_failure(error, trial)))  # here, before Ray Train tries the same twice more
        return
    if workers.rank == 0:
        _mail_result(trial, result, left, mailbox)


def _saved_state() -> bytes | None:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return Path(folder, STATE_FILE).read_bytes()
