"""A head and two workers that share no folder but those that all see: what is refused, what works, where keys are."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from chaos import below
from nodes import Nodes, can_hide_folders, nodes
from tiny_study import SPACE

from cactus_ray.search.store import read_records

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(1200)]

KEY = "f00d" * 10


@dataclass(frozen=True, slots=True)
class Cluster:
    """``hidden``: a folder that the head alone sees."""

    nodes: Nodes
    hidden: Path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if not can_hide_folders():
        pytest.skip("no mount namespaces here, so all nodes of one machine see the same folders")
    with tempfile.TemporaryDirectory() as hidden, nodes(1, (2, 2), Path(hidden)) as found:
        yield Cluster(found, Path(hidden))


def begun(cluster: Cluster, folder: Path, *options: str, resources: dict[str, Any]) -> subprocess.Popen[str]:
    """A search on the head, with a key of W&B."""
    space = {
        **SPACE,
        "resources": {**SPACE["resources"], **resources},
        "verification": {"samples": 20, "attack_steps": 2},
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(space))
    main = "from cactus_ray.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", main, "search", str(file), "--runs", str(folder), "--address", cluster.nodes.address,
         *options],
        env=cluster.nodes.environment | {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_ray_train_without_a_shared_folder_is_refused_before_anything_is_launched(
    cluster: Cluster, tmp_path: Path
) -> None:
    search = begun(cluster, tmp_path, "--storage", str(cluster.hidden), resources={"execution": "train"})
    output, _ = search.communicate()
    assert search.returncode == 2, output
    assert f"error: --storage: got '{cluster.hidden}', which 2 of 3 nodes do not share: " in output
    assert output.count("does not see it") == 2
    assert "expected --storage FOLDER" in output
    assert "Traceback" not in output
    assert read_records(tmp_path / "tiny").trials == {}
    assert list(cluster.hidden.iterdir()) == []


def test_data_that_a_node_does_not_see_is_refused_and_a_shared_folder_is_not(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    program = """
import sys
from cactus_ray.cluster.connect import connected, node_shapes
from cactus_ray.cluster.shared import refuse_unseen_data
from cactus_ray.errors import UserError
with connected(sys.argv[1]):
    refuse_unseen_data(sys.argv[2], node_shapes())
    for root in sys.argv[3:]:
        try:
            refuse_unseen_data(root, node_shapes())
        except UserError as error:
            print(error)
"""
    missing = cluster.hidden / "images"
    missing.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program, cluster.nodes.address, str(tmp_path), str(missing), str(tmp_path / "images")],
        env=cluster.nodes.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    missing.rmdir()
    assert done.returncode == 0, done.stderr
    unseen, empty = done.stdout.splitlines()
    assert unseen.startswith(f"data.root: got '{missing}', which 2 of 3 nodes do not share: ")
    assert unseen.count("does not see it (No such file or directory)") == 2
    assert empty.count("finds it empty") == 2


def test_two_nodes_train_one_network_and_the_key_of_wandb_stays_with_the_driver(
    cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Each of two Ray Train workers has a node of its own; the mailbox is on the driver's node."""
    storage = tmp_path / "storage"
    search = begun(cluster, tmp_path, "--storage", str(storage), resources={"workers": 2, "cpus_per_worker": 2})
    request.addfinalizer(search.kill)  # where an assertion fails before its end
    titles: list[set[str]] = [set() for _ in cluster.nodes.roots]
    while search.poll() is None:
        for seen, root in zip(titles, cluster.nodes.roots, strict=True):
            for pid, title in below(root).items():
                seen.add(title.strip())
                assert KEY not in environment(pid), title
        time.sleep(0.2)
    assert search.stdout is not None
    with search.stdout as stream:
        output = stream.read()
    assert search.returncode == 0, output
    assert [shown("ray::Mailbox", seen) for seen in titles] == [True, False, False]
    assert [shown("ray::RayTrainWorker", seen) for seen in titles] == [False, True, True]
    (trial,) = read_records(tmp_path / "tiny").trials.values()
    assert [epoch["epoch"] for epoch in trial.epochs] == [1, 2]
    assert trial.status == "completed", trial.error
    assert list(storage.iterdir()) == []
    assert output.count("W&B: offline (as WANDB_MODE=offline asks); upload with: ") == 2
    assert len(list((tmp_path / "tiny" / "wandb").glob("offline-run-*-t0001/*.wandb"))) == 1
    logs = [path.read_text(errors="replace") for path in cluster.nodes.folder.glob("*/session_2*/logs/*.log")]
    assert any("TUNE_DISABLE_SIGINT_HANDLER" in log for log in logs)  # here stands what a runtime_env holds
    assert not any(KEY in log for log in logs)


def shown(start: str, titles: set[str]) -> bool:
    return any(title.startswith(start) for title in titles)


def environment(pid: int) -> str:
    """The environment that a process was started with; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""
