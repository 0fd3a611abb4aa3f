"""Low rank plus sparse, and codebooks, from a run to certified files that are checked again."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from deploy_support import DIGITS, EPSILON

from cactus_ray.compression.stored import Factored
from cactus_ray.config import ThreatConfig
from cactus_ray.deploy import certificate
from cactus_ray.deploy.certificate import check
from cactus_ray.deploy.export import PickResult, pick
from cactus_ray.deploy.pick import Requirements
from cactus_ray.interchange.read import read_onnx
from cactus_ray.models.network import Network, load, pack, save
from cactus_ray.search.evaluate import at_level
from cactus_ray.search.store import RunStore, read_records
from cactus_ray.verification.verdict import VerificationSettings

LEVELS = ("lr+sparse:0.65", "lr+sparse:0.65+codebook:5", "prune:gu-l1:0.5+codebook:3")
SETTINGS = VerificationSettings(attack_steps=5, restarts=1)


@pytest.fixture(scope="module")
def factored(network: Network) -> Network:
    """The network with weights of low rank plus sparse, and these factors beside them, as training leaves them."""
    params = dict(network.params)
    for node in network.graph.weighted():
        weight = params[f"{node.name}.weight"].double()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        left, right = left[:, :2] * values[:2], right[:2]
        rest = weight - left @ right
        sparse = torch.where(rest.abs() > rest.abs().median(), rest, 0.0)
        params[f"{node.name}.weight"] = (left @ right + sparse).float()
        parts = {"left": left, "right": right, "sparse": sparse}
        params |= {f"{node.name}.{part}": tensor.float() for part, tensor in parts.items()}
    return dataclasses.replace(network, params=params)


@pytest.fixture(scope="module")
def folder(factored: Network, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of that network, with points at these levels as well."""
    copy = Path(shutil.copytree(run_folder, tmp_path_factory.mktemp("factored") / "run"))
    old = read_records(copy).points()
    content, store = pack(factored), RunStore(copy)
    path = store.save_checkpoint("t0001", content).relative_to(copy).as_posix()
    trained = {"event": "trained", "trial": "t0001", "epochs": 12, "train_seconds": 1.0, "time": 1.0}
    store.append({**trained, "sha256": hashlib.sha256(content).hexdigest(), "checkpoint": path})
    points = list(old)
    for level in LEVELS:
        deployed = at_level(factored, level, DIGITS, (0.0, 1.0))
        threat = ThreatConfig(epsilon=EPSILON)
        s = certificate.certify_file(deployed.file, DIGITS, "selection", threat, SETTINGS, samples=40).summary
        point = {**old[0], **dataclasses.asdict(s), **deployed.measures, "level": level}
        points.append({k: v for k, v in point.items() if k in old[0]})
    metrics = {"mean_certified_accuracy": points[-1]["certified_accuracy"]}
    event = {"event": "completed", "trial": "t0001", "points": points, "metrics": metrics, "time": 1.0}
    store.append(event)
    return copy


def picked(folder: Path, level: str, out: Path) -> PickResult:
    return pick(folder, Requirements(level=level), out, settings=SETTINGS, samples=60)


@pytest.mark.parametrize("level", LEVELS)
def test_picked_files_hold_when_checked_again(folder: Path, level: str, tmp_path: Path) -> None:
    found = picked(folder, level, tmp_path / "out")
    assert found.document.network.level == level
    assert found.document.summary.n_certified > 0
    report = check(found.folder)
    assert (report.findings, report.certified_again) == ((), found.document.summary.n_certified)


def test_a_file_without_its_sparse_part_is_found(folder: Path, factored: Network, tmp_path: Path) -> None:
    """Hash, size and tensors are those of the changed file, so only the verdicts can tell."""
    level = LEVELS[0]
    weights = at_level(factored, level, DIGITS, (0.0, 1.0)).compressed.stored.values()
    assert any(isinstance(w, Factored) and w.left is not None and w.sparse is not None for w in weights)
    out = picked(folder, level, tmp_path / "out").folder
    model = onnx.load(out / "model.onnx")
    products = {node.output[0] for node in model.graph.node if node.op_type == "MatMul"}
    sums = [n for n in model.graph.node if n.op_type == "Add" and n.input[0] in products]
    assert sums
    for node in sums:
        node.op_type = "Identity"
        del node.input[1:]
    data = model.SerializeToString(deterministic=True)
    (out / "model.onnx").write_bytes(data)
    _, params, _ = read_onnx(data)
    save(dataclasses.replace(load(out / "model.safetensors"), params=params), out / "model.safetensors")
    path = out / "certificate.json"
    plain = json.loads(path.read_text())
    plain["file"] |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    path.write_text(json.dumps(plain))
    assert any("verdicts" in finding for finding in check(out).findings)
