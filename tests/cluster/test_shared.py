"""Which nodes are asked for shared folders, and what is said of those that do not see them. Without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
from tiny_study import space

from cactus_ray.cluster import shared
from cactus_ray.cluster.connect import connected
from cactus_ray.cluster.resources import plan
from cactus_ray.errors import UserError

NODES = {"head": {"CPU": 0.0, "GPU": 0.0}, "one": {"CPU": 4.0, "GPU": 0.0}, "two": {"CPU": 4.0, "GPU": 0.0}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Which nodes were asked; "two" sees nothing, and the driver is on "head"."""
    found: list[list[str]] = []

    def answers(nodes: list[str], task: Any) -> dict[str, str]:
        found.append(list(nodes))
        for node in nodes:
            function, folder, *rest = task(node)
            if node != "two" and rest:
                assert function(folder, *rest) == ""  # on the node: finds the file and answers
        return {node: "does not see it" if node == "two" else "" for node in nodes}

    monkeypatch.setattr(shared, "_answers", answers)
    monkeypatch.setattr(shared, "driver_node", lambda: "head")
    monkeypatch.setattr(shared, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(
        ray, "nodes", lambda: [{"NodeID": node, "NodeManagerAddress": f"10.0.0.{i}"} for i, node in enumerate(NODES)]
    )
    return found


def test_ray_train_asks_every_other_node_and_names_the_option(asked: list[list[str]], tmp_path: Path) -> None:
    shares = plan(space(resources={"execution": "train"}), {"CPU": 8.0}, list(NODES.values()))
    with pytest.raises(UserError) as found:
        shared.refuse_unshared(tmp_path, None, shares, NODES)
    assert asked == [["one", "two"]]
    assert str(found.value).startswith(
        f"--storage: not given, so Ray's scratch folder is {tmp_path}, which 1 of 3 nodes do not share: 10.0.0.2 (two: "
        "does not see it). "
    )
    assert "expected --storage FOLDER" in str(found.value)
    with pytest.raises(UserError, match="--storage: got '/somewhere', which"):
        shared.refuse_unshared(tmp_path, "/somewhere", shares, NODES)


def test_a_node_whose_answer_does_not_arrive_cannot_write(
    asked: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = plan(space(resources={"execution": "train"}), {"CPU": 8.0}, list(NODES.values()))
    monkeypatch.setattr(shared, "_answers", lambda nodes, task: dict.fromkeys(nodes, ""))
    with pytest.raises(UserError, match=r"2 of 3 nodes do not share: 10\.0\.0\.1 \(one: cannot write there\)"):
        shared.refuse_unshared(tmp_path, None, shares, NODES)


def test_direct_trials_and_a_single_node_ask_nobody(asked: list[list[str]], tmp_path: Path) -> None:
    direct = plan(space(resources={"execution": "direct"}), {"CPU": 8.0}, list(NODES.values()))
    train = plan(space(resources={"execution": "train"}), {"CPU": 8.0})
    shared.refuse_unshared(tmp_path, None, direct, NODES)
    shared.refuse_unshared(tmp_path, None, train, ["head"])
    shared.refuse_unseen_data(None, NODES)
    assert asked == []


def test_data_must_be_seen_by_the_nodes_that_work(asked: list[list[str]]) -> None:
    with pytest.raises(UserError, match=r"data\.root: got '/data', which 1 of 3 nodes do not share: 10\.0\.0\.2 "):
        shared.refuse_unseen_data("/data", NODES)
    shared.refuse_unseen_data("/data", {**NODES, "two": {"CPU": 0.0, "GPU": 0.0}})
    assert asked == [["one", "two"], ["one"]]


def test_a_node_tells_another_folder_and_one_that_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "probe").write_text("mine")
    assert shared._look(str(tmp_path), "another", "node") == "has another folder of that name"
    (tmp_path / "probe-node").mkdir()
    assert shared._look(str(tmp_path), "mine", "node") == "cannot write there (Is a directory)"
    assert shared._look_at_data(str(tmp_path / "none")) == "does not see it (No such file or directory)"


def test_a_node_that_joined_later_and_sees_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.9")
    with pytest.raises(UserError, match=r"node 10\.0\.0\.9 does not see Ray's scratch folder .*--storage FOLDER"):
        shared.refuse_unseen_here(str(tmp_path))
    (tmp_path / shared.SCRATCH).touch()
    shared.refuse_unseen_here(str(tmp_path))


def test_rays_client_is_refused_before_anything_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("joined"))
    refusal = r"--address: got 'ray://head:10001'; expected auto or HOST:6379"
    with pytest.raises(UserError, match=refusal), connected("ray://head:10001"):
        pass
