"""Starting a Ray of our own, or joining one that runs."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray._private import services

from cactus_ray.cluster.token import close_token, secure_token
from cactus_ray.errors import RunFailedError, UserError
from cactus_ray.interrupts import deferred, handled

# Faster starts, cooperative ends and a quiet terminal.
NAMESPACE = "cactus_ray"
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # Tune's own snapshots grow with every trial, and nobody reads them
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "OMP_NUM_THREADS": "1",
}
START_SECONDS = 180.0
"""How long the node of a local Ray may take to be up. Ray's own half a minute is too short for a busy machine."""
LONGEST = 600
"""Characters of an error of Ray's that are passed on."""


@contextlib.contextmanager
def connected(
    address: str | None, *, cpus: int | None = None, gpus: int | None = None
) -> Iterator[Mapping[str, float]]:
    """A Ray for the time of the block: the one at ``address``, or a local one that ends with the block.

    Yields the cluster's resources. Raises UserError where nothing answers at ``address``, RunFailedError where a local
    one does not start.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address is None:
        secure_token()
    else:
        close_token()
    try:
        # In the middle of its start Ray cannot be ended in an orderly way, and it puts a SIGTERM handler of its own.
        with handled(), deferred(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own start-up warns about its defaults of tomorrow
            if address is None:
                _begin(cpus, gpus)
            else:
                _join(address)
        yield dict(ray.cluster_resources())
    finally:
        ray.shutdown()


def node_shapes() -> dict[str, dict[str, float]]:
    """CPUs and GPUs of every node that is alive, by its id."""
    alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    return {name: {kind: float(has.get(kind, 0.0)) for kind in ("CPU", "GPU")} for name, has in alive.items()}


def _begin(cpus: int | None, gpus: int | None) -> None:
    try:
        # "local": a RAY_ADDRESS or a forgotten `ray start` must not be joined without being asked for.
        with patient(START_SECONDS):
            ray.init(address="local", num_cpus=cpus or _enough_cpus(), num_gpus=gpus, include_dashboard=False,
                     log_to_driver=False, logging_level="ERROR", namespace=NAMESPACE)  # fmt: skip
    except Exception as error:  # Ray has no class of its own for this
        reason = _line(error)
        if "timed out during startup" in reason:
            reason = (
                f"it was not up within {START_SECONDS / 60:g} minutes, as where other work or a lack of memory holds "
                f"it up: {reason}"
            )
        raise RunFailedError(
            f"Ray did not start; what is finished is kept, the same command goes on ({reason})"
        ) from error


@contextlib.contextmanager
def patient(seconds: float) -> Iterator[None]:
    """Let Ray's start inside the block wait so long for its node, which Ray asks for through one private function.

    A start that Ray gives up leaves its processes behind until this process ends, so trying again would be worse.
    """
    asked = services.get_node

    def get_node(*arguments: Any, **options: Any) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            try:
                return asked(*arguments, **options)
            except RuntimeError:  # the node is not known yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = asked


def _line(error: Exception) -> str:
    """An error of Ray's, of whatever class and however many lines, as a part of one line."""
    words = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {words[:LONGEST]}{' ...' if len(words) > LONGEST else ''}"


def _enough_cpus() -> int | None:
    """What Ray finds itself, but two logical CPUs at least: a trial and a verifier can share one core."""
    return None if (os.cpu_count() or 1) > 1 else 2


def _join(address: str) -> None:
    if address.startswith("ray://"):  # Ray Tune would run in a process of the cluster, away from the records
        raise UserError(
            f"--address: got {address!r}; expected auto or HOST:6379, on a machine of the cluster: a search runs where "
            "its records are, and not through Ray's client"
        )
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", namespace=NAMESPACE,
                 runtime_env={"env_vars": dict(ENVIRONMENT)})  # fmt: skip
    except Exception as error:  # Ray's own, gRPC's, Python's
        raise UserError(
            f"--address: got {address!r}; expected a running Ray that accepts our token, such as auto or HOST:6379 "
            f"({_line(error)})"
        ) from error
