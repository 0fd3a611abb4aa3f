"""Starting a Ray of our own, or joining one that runs."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import ray

from cactus_ray.errors import RunFailedError, UserError

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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own start-up warns about its defaults of tomorrow
        if address is None:
            _begin(cpus, gpus)
        else:
            _join(address)
    try:
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
        ray.init(address="local", num_cpus=cpus or _enough_cpus(), num_gpus=gpus, include_dashboard=False,
                 log_to_driver=False, logging_level="ERROR", namespace=NAMESPACE)  # fmt: skip
    except Exception as error:  # Ray has no class of its own for this
        if "timed out during startup" not in str(error):
            raise
        raise RunFailedError(
            "Ray did not start within half a minute, as on a machine that is busy with other work or out of memory; "
            f"expected it up. What is finished is kept: the same command goes on ({error})"
        ) from error
    _close_token_file()


def _enough_cpus() -> int | None:
    """What Ray finds itself, but two logical CPUs at least: a trial and a verifier can share one core."""
    return None if (os.cpu_count() or 1) > 1 else 2


def _close_token_file() -> None:
    """Ray writes the token of a local cluster readable by all; whoever reads it may run code as this user."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    with contextlib.suppress(OSError):  # not there, or not ours
        path.chmod(0o600)


def _join(address: str) -> None:
    if address.startswith("ray://"):  # Ray Tune would run in a process of the cluster, away from the records
        raise UserError(
            f"--address: got {address!r}; expected auto or HOST:6379, on a machine of the cluster: a search runs where "
            "its records are, and not through Ray's client"
        )
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", namespace=NAMESPACE,
                 runtime_env={"env_vars": dict(ENVIRONMENT)})  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--address: got {address!r}; expected a running Ray that accepts our token, such as auto or HOST:6379 "
            f"({error})"
        ) from error
