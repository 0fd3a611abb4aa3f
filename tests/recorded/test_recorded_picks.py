"""Certificates of an earlier version hold, and networks and studies of then can be picked and verified now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recorded_support import RECORDED, CactusRay, Copied

PICKS = ("crown", "branch", "family", "w8a8", "factored")
FILES = {"model.onnx", "model.safetensors", "certificate.json", "card.md"}


def certificate(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "certificate.json").read_text()))


@pytest.fixture(params=PICKS)
def pick(request: pytest.FixtureRequest, copied: Copied) -> Path:
    """A copy of each pick."""
    return copied(f"picks/{request.param}")


def counts(verdicts: list[dict[str, Any]]) -> tuple[int, int, int]:
    kinds = [row["verdict"] for row in verdicts]
    return kinds.count("CERTIFIED"), kinds.count("FALSIFIED"), kinds.count("UNKNOWN")


def test_what_is_recorded() -> None:
    """The certificates differ in what their checks need."""
    found = {name: certificate(RECORDED / "picks" / name) for name in PICKS}
    for name, document in found.items():
        assert {file.name for file in (RECORDED / "picks" / name).iterdir()} == FILES
        samples = 40 if name == "branch" else 24
        assert (document["schema_version"], document["data"]["samples"]) == (1, samples)
        assert document["engine"]["settings"]["bound"] == ("branch" if name == "branch" else "crown")
        certified, falsified, _ = counts(document["verdicts"])
        assert min(certified, falsified) > 0
    assert {name: document["network"]["level"] for name, document in found.items()} == {
        "crown": "int8", "branch": "prune:gu-l1:0.5+int8", "family": "dense", "w8a8": "w8a8",
        "factored": "lr+sparse:0.3",
    }  # fmt: skip
    assert {name for name, document in found.items() if document.get("family")} == {"family"}
    assert {name for name, document in found.items() if document["provenance"].get("trial")} == {"crown"}
    assert any(row["decided_by"] == "branch" for row in found["branch"]["verdicts"])


def test_check_holds(pick: Path, cactus_ray: CactusRay) -> None:
    document = certificate(pick)
    tables = [document["verdicts"], *([document["family"]["verdicts"]] if document.get("family") else [])]
    found = cactus_ray("check", pick, "--json").json
    assert (found["ok"], found["findings"]) == (True, [])
    assert found["certified_again"] == sum(counts(table)[0] for table in tables)
    assert found["replayed"] == sum(counts(table)[1] for table in tables)
    assert found["standard_accuracy"] == document["summary"]["standard_accuracy"]


def test_check_finds_a_changed_byte(pick: Path, cactus_ray: CactusRay) -> None:
    content = bytearray((pick / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (pick / "model.onnx").write_bytes(content)
    found = cactus_ray("check", pick, "--json")
    assert found.status == 1
    assert "model.onnx" in " ".join(json.loads(found.out)["findings"])


def test_check_finds_a_changed_card(cactus_ray: CactusRay, copied: Copied) -> None:
    folder = copied("picks/crown")
    card = folder / "card.md"
    changed = card.read_text().replace("24", "25", 1)
    assert changed != card.read_text()
    card.write_text(changed)
    assert cactus_ray("check", folder).status == 1


@pytest.mark.parametrize("name", PICKS)
def test_the_file_of_a_pick_is_verified(name: str, cactus_ray: CactusRay, copied: Copied) -> None:
    """Intervals certify no more than the certificate does, and standard accuracy is the same."""
    folder = copied(f"picks/{name}")
    document = certificate(folder)
    summary, samples = document["summary"], document["data"]["samples"]
    asked = ["verify", folder / "model.onnx", "--epsilon", document["threat"]["epsilon"], "--samples", samples]
    found = cactus_ray(*asked, "--data", "digits", "--bound", "ibp", "--json").json
    (row,) = found
    assert row["standard_accuracy"] == summary["standard_accuracy"]
    assert 0 < row["n_certified"] <= summary["n_certified"]


def test_a_network_file_is_picked_again(cactus_ray: CactusRay, copied: Copied, tmp_path: Path) -> None:
    network = copied("picks/network.safetensors")
    asked = ["pick", network, "--level", "w8a8", "--samples", "24", "--out", tmp_path / "w8a8", "--json"]
    assert cactus_ray(*asked).status == 0
    now, then = certificate(tmp_path / "w8a8"), certificate(RECORDED / "picks" / "w8a8")
    assert now["file"]["bytes"] == then["file"]["bytes"]
    assert now["data"] == then["data"]
    # attacks may end otherwise on another machine, proofs do not: no lower bound is within 0.01 of 0
    proved = [[row["index"] for row in d["verdicts"] if row["verdict"] == "CERTIFIED"] for d in (now, then)]
    assert proved[0] == proved[1]
    assert cactus_ray("check", tmp_path / "w8a8").status == 0


def test_a_study_is_picked_from(cactus_ray: CactusRay, copied: Copied, tmp_path: Path) -> None:
    run, out = copied("studies/killed"), tmp_path / "picked"
    asked = ["pick", run, "--max-bytes", "20k", "--min-certified", "0.2", "--prefer", "bytes"]
    found = cactus_ray(*asked, "--bound", "crown", "--samples", "24", "--out", out, "--json")
    assert found.status == 0, found.err
    now, then = certificate(out), certificate(RECORDED / "picks" / "crown")
    for key in ("study", "trial", "config_hash"):
        assert now["provenance"][key] == then["provenance"][key]
    assert now["network"]["level"] == then["network"]["level"]
    assert cactus_ray("check", out).status == 0
    missed = cactus_ray("pick", run, "--max-bytes", "100", "--out", tmp_path / "none", "--json")
    assert missed.status == 3
    assert not (tmp_path / "none").exists()
