"""Folders that all nodes of a cluster must see: looked for from every node before anything is launched."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cactus_ray.cluster.resources import Plan
from cactus_ray.errors import UserError

PROBE_SECONDS = 120.0
"""So long a node has to answer; a first process on it starts for seconds."""
PATIENCE_SECONDS = 5.0
"""So long a file that the driver wrote may take to appear elsewhere, on network disks that cache."""
SCRATCH = ".scratch"
"""File in a scratch folder that says whose it is."""


def refuse_unshared(folder: Path, storage: str | None, shares: Plan, nodes: Collection[str]) -> None:
    """Raise UserError where Ray Train will keep checkpoints in a scratch folder that one of ``nodes`` does not share.

    ``storage``: what ``--storage`` said. ``nodes``: ids of those that are alive. Trials that train directly keep
    nothing there, and what is on the driver's own node is seen anyway.
    """
    if shares.execution != "train" or not (others := _others(nodes)):
        return
    token = secrets.token_hex(16)
    (folder / "probe").write_text(token)
    found = _answers(others, lambda node: (_look, str(folder), token, node))
    found |= {node: "cannot write there" for node, why in found.items() if not why and not _answered(folder, node)}
    if unseen := {node: why for node, why in found.items() if why}:
        r = shares.resources
        got = f"got {storage!r}" if storage else f"not given, so Ray's scratch folder is {folder}"
        raise UserError(
            f"--storage: {got}, which {_listed(unseen, len(nodes))}. Ray Train keeps checkpoints there "
            f"(resources.workers: {r.workers}, gpus_per_worker: {r.gpus_per_worker:g}, execution: {r.execution}); "
            "expected --storage FOLDER, a folder that all nodes see under this path, such as one on NFS"
        )


def refuse_unseen_data(root: str | None, nodes: Mapping[str, Mapping[str, float]]) -> None:
    """Raise UserError where a node that trains or verifies does not see the folder of data sets.

    ``nodes``: resources by id of those that are alive.
    """
    working = _others([node for node, has in nodes.items() if has["CPU"] > 0])
    if root is None or not working:
        return
    found = _answers(working, lambda node: (_look_at_data, root))
    if unseen := {node: why for node, why in found.items() if why}:
        raise UserError(
            f"data.root: got {root!r}, which {_listed(unseen, len(nodes))}. Every node reads the images itself; "
            "expected a folder that all nodes see under this path: a shared one, or a copy on each"
        )


def refuse_unseen_here(storage: str) -> None:
    """Raise UserError on a node that does not see the scratch folder: one that joined after the probe."""
    if not Path(storage, SCRATCH).is_file():
        raise UserError(
            f"node {ray.util.get_node_ip_address()} does not see Ray's scratch folder {storage}; expected --storage "
            "FOLDER, a folder that all nodes see under this path"
        )


def driver_node() -> str:
    """Id of the driver's node."""
    return str(ray.get_runtime_context().get_node_id())


def _others(nodes: Collection[str]) -> list[str]:
    here = driver_node()
    return [node for node in nodes if node != here]


def _answers(nodes: Collection[str], task: Callable[[str], tuple[Any, ...]]) -> dict[str, str]:
    """What a function says on each node: "" where all is well. ``task`` gives the function and its arguments.

    Nodes that are gone meanwhile are left out.
    """
    asked = {}
    for node in nodes:
        function, *arguments = task(node)
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        remote = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(function)
        asked[node] = remote.remote(*arguments)
    deadline = time.monotonic() + PROBE_SECONDS
    found = {}
    for node, answer in asked.items():
        try:
            found[node] = str(ray.get(answer, timeout=max(deadline - time.monotonic(), 0.1)))
        except ray.exceptions.GetTimeoutError:
            found[node] = f"gave no answer within {PROBE_SECONDS:g} s"
        except ray.exceptions.RayError as error:
            found[node] = f"cannot run this package ({str(error).strip().splitlines()[-1]})"
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return {node: why for node, why in found.items() if node in alive}


def _look(folder: str, token: str, node: str) -> str:
    """On a node: whether the driver's file is there, and an answer beside it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (file := Path(folder, "probe")).is_file():
        if time.monotonic() > deadline:
            return "does not see it"
        time.sleep(0.1)
    if file.read_text() != token:
        return "has another folder of that name"
    try:
        Path(folder, f"probe-{node}").write_text(token)
    except OSError as error:
        return f"cannot write there ({error.strerror})"
    return ""


def _answered(folder: Path, node: str) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (there := (folder / f"probe-{node}").is_file()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return there


def _look_at_data(root: str) -> str:
    try:
        return "" if os.listdir(root) else "finds it empty"
    except OSError as error:
        return f"does not see it ({error.strerror})"


def _listed(unseen: Mapping[str, str], of: int) -> str:
    """ "2 of 3 nodes do not share: 10.0.0.2 (does not see it), ..."; ids tell nodes of one machine apart."""
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    named = [f"{addresses.get(node, '?')} ({node[:8]}: {why})" for node, why in unseen.items()]
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    return f"{len(unseen)} of {of} nodes do not share: {', '.join(named[:5])}{more}"
