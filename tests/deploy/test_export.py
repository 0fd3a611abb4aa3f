"""What a pick writes, what it counts, and what it refuses."""

import dataclasses
import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from deploy_support import DIGITS, QUICK

from cactus_ray.bounds.graph import forward
from cactus_ray.data import load
from cactus_ray.deploy import certificate, document, export
from cactus_ray.deploy.export import FILES, USES, PickResult, pick, pick_file, refuse_foreign
from cactus_ray.deploy.pick import NothingFits, Requirements
from cactus_ray.deploy.recheck import check
from cactus_ray.errors import RunFailedError, UserError
from cactus_ray.interchange.read import read_onnx
from cactus_ray.models.network import Network, save
from cactus_ray.models.network import load as load_network
from cactus_ray.search.store import read_records


def test_files_and_document(picked: PickResult, run_folder: Path) -> None:
    assert sorted(p.name for p in picked.folder.iterdir()) == sorted(FILES)
    plain = json.loads((picked.folder / "certificate.json").read_text())
    assert list(plain) == [
        "schema_version", "file", "network", "data", "threat", "soundness", "engine", "versions", "summary", "verdicts",
        "provenance",
    ]  # fmt: skip
    assert plain["schema_version"] == 2
    assert plain["soundness"]["arithmetic"] == plain["engine"]["settings"]["arithmetic"] == "float32"
    assert plain["provenance"]["study"] == "tiny"
    assert plain["provenance"]["commit"] == "abc123"
    assert plain["data"]["split"] == "test"
    assert plain["data"]["indices"] == [v["index"] for v in plain["verdicts"]] == list(range(plain["data"]["total"]))
    assert plain["summary"]["n_certified"] > 0.4 * plain["data"]["samples"]
    assert document.read(picked.folder / "certificate.json") == picked.document
    for verdict in plain["verdicts"]:
        assert ("counterexample" in verdict) == (verdict["verdict"] == "FALSIFIED")
        assert "lower_bound" in verdict


def test_bytes_are_those_of_the_point(picked: PickResult, run_folder: Path) -> None:
    (point,) = [p for p in read_records(run_folder).points() if p["level"] == "int8"]
    assert (picked.folder / "model.onnx").stat().st_size == point["bytes"] == picked.document.file.bytes
    assert picked.document.network.dense_bytes is not None
    assert picked.document.network.dense_bytes > point["bytes"]


def test_the_safetensors_file_is_the_network_of_the_onnx_file(picked: PickResult) -> None:
    network = load_network(picked.folder / "model.safetensors")
    images, _ = load(DIGITS, ("test",)).split("test")
    session = onnxruntime.InferenceSession(picked.folder / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": images.numpy()})
    assert np.abs(forward(network.graph, network.params, images).numpy() - logits).max() < 1e-5
    graph, params, _ = read_onnx(picked.folder / "model.onnx")
    assert graph == network.graph
    assert all(torch.equal(v, network.params[k]) for k, v in params.items())


def test_every_counterexample_is_one(picked: PickResult) -> None:
    images, labels = load(DIGITS, ("test",)).split("test")
    session = onnxruntime.InferenceSession(picked.folder / "model.onnx", providers=["CPUExecutionProvider"])
    falsified = [row for row in picked.document.verdicts if row.verdict == "FALSIFIED"]
    assert falsified
    for row in falsified:
        x = np.array(row.counterexample).reshape(1, 1, 8, 8)
        assert np.abs(x - images[row.index].double().numpy()).max() <= picked.document.threat.epsilon
        assert x.min() >= 0
        assert x.max() <= 1
        assert session.run(None, {"image": x.astype(np.float32)})[0].argmax() != labels[row.index]


def test_both_splits_are_shown_with_intervals(picked: PickResult) -> None:
    text = "\n".join(picked.lines())
    assert "selection split: standard accuracy" in text
    assert "test split: standard accuracy" in text
    assert f"and at most {picked.document.summary.certified_accuracy_upper:.4f}" in text
    low, high = picked.document.summary.certified_interval
    assert low < picked.document.summary.certified_accuracy < high
    assert picked.met
    json.dumps(picked.to_json())


def test_uses_of_the_test_split_are_recorded_and_counted(run_folder: Path, tmp_path: Path) -> None:
    before = (run_folder / USES).read_text().splitlines() if (run_folder / USES).exists() else []
    first = pick(run_folder, Requirements(level="int4"), tmp_path / "out", samples=20, settings=QUICK)
    again = pick(run_folder, Requirements(level="dense"), tmp_path / "out", samples=20, settings=QUICK)
    lines = [json.loads(line) for line in (run_folder / USES).read_text().splitlines()]
    assert first.document.provenance.test_split_uses == len(before) + 1
    assert again.document.provenance.test_split_uses == len(before) + 2 == len(lines)
    assert [(u["trial"], u["level"], u["samples"]) for u in lines[-2:]] == [
        ("t0001", "int4", 20),
        ("t0001", "dense", 20),
    ]
    assert "Estimate" in (tmp_path / "out" / "card.md").read_text()
    assert again.document.data.samples == 20 < again.document.data.total


def test_a_network_file_is_picked_at_a_level_and_counts_its_own_uses(
    network: Network, picked: PickResult, tmp_path: Path
) -> None:
    """The file that the run's pick wrote, certified like it, without a choice and without figures of selection."""
    file = tmp_path / "own.safetensors"
    save(network, file)
    found = [pick_file(file, level, tmp_path / "out", samples=20, settings=QUICK) for level in ("int4", "int8")]
    result = found[1]
    assert result.document.file.sha256 == picked.document.file.sha256
    assert result.document.network == picked.document.network
    rows = {row.index: row.verdict for row in picked.document.verdicts}
    assert [row.verdict for row in result.document.verdicts] == [rows[i] for i in result.document.data.indices]
    assert [f.document.provenance.test_split_uses for f in found] == [1, 2]
    uses = (tmp_path / "own.test_split_uses.jsonl").read_text().splitlines()
    assert [(u["trial"], u["level"], u["samples"]) for u in map(json.loads, uses)] == [
        (None, "int4", 20), (None, "int8", 20),
    ]  # fmt: skip
    assert (result.choice, result.selection, result.met) == (None, None, True)
    assert result.document.provenance.config_hash == picked.document.provenance.config_hash
    assert "use 2 of the test split of that network file" in (tmp_path / "out" / "card.md").read_text()
    json.dumps(result.to_json())
    assert result.lines()[0].startswith("mlp at int8: ")
    report = check(tmp_path / "out")
    assert (report.findings, report.certified_again) == ((), result.document.summary.n_certified)


def test_a_network_file_that_does_not_name_its_data_is_refused(network: Network, tmp_path: Path) -> None:
    save(dataclasses.replace(network, config=None), tmp_path / "own.safetensors")
    with pytest.raises(UserError, match="does not say on what and against what it was trained"):
        pick_file(tmp_path / "own.safetensors", "int8", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["own.safetensors"]


def test_nothing_fits_neither_reads_the_test_split_nor_writes(run_folder: Path, tmp_path: Path) -> None:
    before = (run_folder / USES).read_text() if (run_folder / USES).exists() else ""
    with pytest.raises(NothingFits):
        pick(run_folder, Requirements(max_bytes=10), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert ((run_folder / USES).read_text() if (run_folder / USES).exists() else "") == before


def test_not_met_on_the_test_split_is_written_and_labelled(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = certificate.certify_file

    def worse(*arguments: Any, **options: Any) -> certificate.Certification:
        calls.append(arguments[2])
        found = real(*arguments, **options)
        return dataclasses.replace(found, summary=document.figures(20, 20, 1, 0))

    monkeypatch.setattr(certificate, "certify_file", worse)
    result = pick(run_folder, Requirements(min_certified=0.3), tmp_path / "out", samples=20, settings=QUICK)
    assert calls == ["test"]  # once: no other network is tried
    assert result.not_met == ("min_certified",)
    assert not result.met
    assert "not met on the test split: --min-certified 0.3 (here 0.05)" in result.lines()
    assert "**Not met on the test split: `--min-certified 0.3`.**" in (tmp_path / "out" / "card.md").read_text()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(FILES)


def test_another_size_than_recorded_is_an_error(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export.at_level

    def longer(*arguments: Any) -> Any:
        found = real(*arguments)
        return dataclasses.replace(found, file=found.file + b"\0")

    monkeypatch.setattr(export, "at_level", longer)
    with pytest.raises(RunFailedError, match=r"model.onnx has \d+ bytes, but the run recorded"):
        pick(run_folder, Requirements(level="int8"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_calibrated_level_is_not_written_from_other_images_than_the_search_saw(
    run_folder: Path, network: Network, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    (run / USES).unlink(missing_ok=True)  # of other tests
    lines = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    (study,) = (line for line in lines if line["event"] == "study")
    (completed,) = (line for line in lines if line["event"] == "completed")
    (int8,) = (point for point in completed["points"] if point["level"] == "int8")
    size = len(export.at_level(network, "rebn+int8", DIGITS, (0.0, 1.0)).file)
    completed["points"].append(int8 | {"level": "rebn+int8", "bytes": size})  # without batch norm the same network
    right = load(DIGITS, ("train",)).digests["train"]
    for digest, level, refused in (
        ("0" * 64, "rebn+int8", True),
        (right, "rebn+int8", False),
        ("0" * 64, "int8", False),
    ):
        study["digests"] = {"train": digest}
        (run / "trials.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        if refused:
            with pytest.raises(UserError, match=r"begun with other images: the train split had SHA-256 0{16}, digits"):
                pick(run, Requirements(level=level), tmp_path / "out", samples=5, settings=QUICK)
            assert not (tmp_path / "out").exists()
            assert not (run / USES).exists()
        else:
            pick(run, Requirements(level=level), tmp_path / "out", samples=5, settings=QUICK)
            assert certified_level(tmp_path / "out") == level


def certified_level(folder: Path) -> str:
    return str(json.loads((folder / document.NAME).read_text())["network"]["level"])


def test_a_changed_or_missing_checkpoint_is_named(run_folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    path = run / "checkpoints" / "t0001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunFailedError, match="is not the file that was recorded"):
        pick(run, Requirements(), tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match="only networks on the front are kept"):
        pick(run, Requirements(), tmp_path / "out")


def test_a_folder_that_is_not_a_pick_is_refused(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes.txt; expected a new or empty folder"):
        pick(run_folder, Requirements(), tmp_path)
    with pytest.raises(UserError, match="is a file"):
        pick(run_folder, Requirements(), tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_earlier_or_broken_off_pick_may_be_replaced(copy: Path) -> None:
    refuse_foreign(copy)
    (copy / "certificate.json").unlink()
    (copy / "card.md.part").write_text("")
    refuse_foreign(copy)
    assert (copy / "model.onnx").is_file()  # asked only: nothing is replaced yet


NEW = dict.fromkeys(FILES, b"new")


def test_a_crash_leaves_no_certificate_beside_other_files(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.replace

    def crash(self: Path, target: Path) -> Path:
        if target.name == "card.md":
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):  # breaks off in the middle
        export.write_folder(copy, NEW)
    assert (copy / "model.onnx").read_bytes() == b"new"
    assert sorted(p.name for p in copy.iterdir()) == ["card.md", "model.onnx", "model.safetensors"]


@pytest.mark.parametrize("written", range(len(FILES)))
def test_a_full_disk_leaves_the_earlier_pick_as_it_was(
    copy: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    left = iter([None] * written)

    def full(descriptor: int) -> None:
        if next(left, "full") == "full":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export.os, "fsync", full)
    with pytest.raises(UserError, match=r"copy: cannot be written \(No space left on device\); expected a place"):
        export.write_folder(copy, NEW)
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before
    monkeypatch.undo()
    export.write_folder(copy, NEW)
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == NEW


def test_a_folder_that_cannot_be_written_is_refused_before_the_test_split_is_used(
    network: Network, run_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "own.safetensors"
    save(network, file)
    before = (run_folder / USES).read_text() if (run_folder / USES).exists() else ""
    with pytest.raises(UserError, match=r"--out .*own.safetensors/x: cannot be written .*expected a place"):
        pick_file(file, "int8", file / "x")
    with pytest.raises(UserError, match=r"--out .*own.safetensors/x/y: cannot be written"):
        pick(run_folder, Requirements(level="int8"), file / "x" / "y")
    (tmp_path / "out" / "model.onnx").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--out .*out: .*model.onnx is a folder"):
        pick_file(file, "int8", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "own.safetensors"]  # no use is recorded
    assert ((run_folder / USES).read_text() if (run_folder / USES).exists() else "") == before


def test_the_card_tells_what_a_user_must_know(picked: PickResult) -> None:
    card, summary = (picked.folder / "card.md").read_text(), picked.document.summary
    for words in (
        f"{summary.certified_accuracy:.2%} (certified) and {summary.certified_accuracy_upper:.2%} (not falsified)",
        f"{summary.standard_accuracy:.2%} [{summary.standard_interval[0]:.2%}, {summary.standard_interval[1]:.2%}]",
        "at most 0.08 per pixel (linf norm), clipped to the domain [0, 1]", "level `int8`", "N x 1 x 8 x 8",
        "onnxruntime.InferenceSession", "cactus-ray check", "Classes: 0, 1, 2, 3", "rounding to nearest",
        f"{picked.document.file.bytes:,} bytes", "dense float32 file", "Multiply-accumulate operations",
        picked.document.file.sha256, "selection (the choice was made here)", "test (after the choice)",
        "of the test split of that run",
    ):  # fmt: skip
        assert words in card, words


def test_the_code_on_the_card_runs(picked: PickResult, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    card = (picked.folder / "card.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(picked.folder)
    exec(compile(code, "card.md", "exec"), {})
    assert '["0", "1"' in capsys.readouterr().out
