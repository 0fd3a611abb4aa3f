"""Level w8a8 from a run to certified files that are checked again."""

import dataclasses
import shutil
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from deploy_support import DIGITS, EPSILON

from cactus_ray.config import ThreatConfig
from cactus_ray.data import load
from cactus_ray.deploy import certificate, replay
from cactus_ray.deploy.certificate import check
from cactus_ray.deploy.export import PickResult, pick
from cactus_ray.deploy.pick import Requirements
from cactus_ray.deploy.statements import INTEGERS
from cactus_ray.errors import RunFailedError
from cactus_ray.interchange.read import read_onnx
from cactus_ray.models.network import Network
from cactus_ray.search.evaluate import at_level
from cactus_ray.search.store import RunStore, read_records
from cactus_ray.verification.verdict import Verdict, VerificationSettings

SETTINGS = VerificationSettings(attack_steps=10, restarts=1)


@pytest.fixture(scope="module")
def folder(network: Network, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with a point at w8a8 as well."""
    copy = Path(shutil.copytree(run_folder, tmp_path_factory.mktemp("integers") / "run"))
    deployed = at_level(network, "w8a8", DIGITS, (0.0, 1.0))
    threat = ThreatConfig(epsilon=EPSILON)
    s = certificate.certify_file(deployed.file, DIGITS, "selection", threat, SETTINGS, samples=40).summary
    records = read_records(copy)
    old = records.points()
    point = {**old[0], **dataclasses.asdict(s), **deployed.measures, "level": "w8a8"}
    point = {k: v for k, v in point.items() if k in old[0]}
    metrics = {"mean_certified_accuracy": point["certified_accuracy"]}
    event = {"event": "completed", "trial": "t0001", "points": [*old, point], "metrics": metrics, "time": 1.0}
    RunStore(copy).append(event)
    return copy


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PickResult:
    out = tmp_path_factory.mktemp("integers") / "picked"
    return pick(folder, Requirements(level="w8a8", min_certified=0.4), out, settings=SETTINGS)


def test_the_certificate_is_about_integer_inference(found: PickResult) -> None:
    document = found.document
    assert document.network.level == "w8a8"
    assert set(INTEGERS) <= set(document.soundness.assumptions)
    assert document.soundness.arithmetic == "float32"
    assert document.summary.n_certified > 0.4 * document.data.samples
    assert "rounded to 8-bit codes" in (found.folder / "card.md").read_text()


def test_the_file_holds_integers_and_is_small(found: PickResult, picked: PickResult) -> None:
    model = onnx.load(found.folder / "model.onnx")
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("QuantizeLinear") == 2
    assert {node.domain for node in model.graph.node} == {""}
    assert picked.document.file.bytes < found.document.file.bytes < picked.document.file.bytes + 1500


def test_it_is_checked_again(found: PickResult) -> None:
    report = check(found.folder)
    assert report.ok, report.findings
    assert report.certified_again == found.document.summary.n_certified
    assert report.replayed == found.document.summary.n_falsified


def test_certified_samples_hold_in_integers_and_in_float32(found: PickResult) -> None:
    images, _ = load(DIGITS, ("test",)).split("test")
    rows = [row for row in found.document.verdicts if row.verdict == Verdict.CERTIFIED]
    chosen = torch.tensor([row.index for row in rows])
    generator = torch.Generator().manual_seed(0)
    for level in (
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(
            (found.folder / "model.onnx").read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        for _ in range(5):
            signs = torch.randint(0, 2, images[chosen].shape, generator=generator) * 2 - 1
            points = (images[chosen] + 0.999 * EPSILON * signs).clamp(0, 1)
            (logits,) = session.run(None, {"image": points.numpy()})
            assert torch.from_numpy(logits).argmax(1).tolist() == [row.label for row in rows]


def test_another_scale_in_the_file_is_found(found: PickResult, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(found.folder, tmp_path / "copy"))
    model = onnx.load(copy / "model.onnx")
    graph, _, _ = read_onnx(copy / "model.onnx")
    scale = torch.tensor(next(n for n in graph.nodes if n.op == "quantize")["scale"]).numpy().tobytes()
    (tensor,) = [t for t in model.graph.initializer if t.raw_data == scale]
    tensor.raw_data = torch.tensor(0.002).numpy().tobytes()
    onnx.save(model, copy / "model.onnx")
    findings = check(copy).findings
    assert any("SHA-256" in text for text in findings)
    assert any("another graph" in text for text in findings)


def test_a_reading_that_onnxruntime_contradicts_is_not_certified(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = at_level(network, "w8a8", DIGITS, (0.0, 1.0)).file
    graph, params, _ = read_onnx(file)
    images, _ = load(DIGITS, ("test",)).split("test")
    logits = replay.answers(replay.runner(file), images[:50])
    assert replay.parity(graph, params, images[:50], logits).class_disagreements == 0
    nudged = {k: v + (1e-3 if k.endswith("bias") else 0) for k, v in params.items()}
    with pytest.raises(RunFailedError, match="our reading of the file differ"):
        replay.parity(graph, nudged, images[:50], logits)
