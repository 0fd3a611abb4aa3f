"""A certificate is verified again from its files; every way of tampering is found."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deploy_support import DIGITS, EPSILON, QUICK

from cactus_ray import cli
from cactus_ray.config import ThreatConfig
from cactus_ray.data import load
from cactus_ray.deploy import again, certificate, recheck, replay
from cactus_ray.deploy.card import render
from cactus_ray.deploy.certificate import certify_file, check
from cactus_ray.deploy.document import read, summarise
from cactus_ray.deploy.export import PickResult, pick
from cactus_ray.deploy.pick import Requirements
from cactus_ray.deploy.statements import EARLIER, SCHEMES
from cactus_ray.errors import RunFailedError, UserError
from cactus_ray.models.network import Network, pack
from cactus_ray.search.evaluate import at_level
from cactus_ray.verification.verdict import SampleVerdict, Verdict, VerificationSettings

Edit = Callable[[Callable[[dict[str, Any]], object]], Path]


def rows(plain: dict[str, Any], verdict: str) -> list[dict[str, Any]]:
    return [row for row in plain["verdicts"] if row["verdict"] == verdict]


def recount(plain: dict[str, Any]) -> None:
    """Make the summary agree with the verdicts again, as a careful forger would."""
    from cactus_ray.deploy.document import Row

    known = [Row(**{"counterexample": None, **row}) for row in plain["verdicts"]]
    plain["summary"] = dataclasses.asdict(summarise(known))
    plain["data"]["samples"], plain["data"]["indices"] = len(known), [r.index for r in known]


def found(folder: Path) -> str:
    report = check(folder)
    assert not report.ok
    return "\n".join(report.findings)


def test_an_honest_pick_passes(picked: PickResult) -> None:
    told = []
    report = check(picked.folder, progress=lambda *step: told.append(step))
    assert report.findings == ()
    assert report.ok
    summary = picked.document.summary
    assert report.certified_again == summary.n_certified > 0
    assert report.replayed == summary.n_falsified > 0
    assert report.standard_accuracy == summary.standard_accuracy
    assert told[-1] == ("certifying again", summary.n_certified, summary.n_certified)
    json.dumps(report.to_json())


def test_any_changed_byte_of_the_file(copy: Path) -> None:
    original = (copy / "model.onnx").read_bytes()
    for position in (0, 40, len(original) // 2, len(original) - 1):
        changed = bytearray(original)
        changed[position] ^= 0x10
        (copy / "model.onnx").write_bytes(changed)
        assert "model.onnx: its SHA-256 is" in found(copy), position


def test_a_file_that_is_cut_off_or_missing(copy: Path) -> None:
    content = (copy / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(content[:100])
    assert f"has 100 bytes, the certificate says {len(content)}" in found(copy)
    (copy / "model.onnx").unlink()
    assert "model.onnx: cannot be read" in found(copy)


@pytest.mark.parametrize("consistent", [False, True])
@pytest.mark.parametrize("verdict", ["FALSIFIED", "UNKNOWN"])
def test_a_verdict_made_certified(edit: Edit, verdict: str, consistent: bool) -> None:
    def forge(plain: dict[str, Any]) -> None:
        candidates = [row for row in rows(plain, verdict) if row["decided_by"] != "clean"]
        assert candidates, f"the fixture should have a sample that is {verdict}"
        candidates[0].update(verdict="CERTIFIED", lower_bound=0.5, decided_by="crown")
        candidates[0].pop("counterexample", None)
        if consistent:
            recount(plain)

    text = found(edit(forge))
    assert "CERTIFIED, but the file's weights give" in text
    assert ("summary.n_certified" in text) != consistent


def test_a_misclassified_sample_made_certified(edit: Edit) -> None:
    def forge(plain: dict[str, Any]) -> None:
        row = next(row for row in plain["verdicts"] if row["decided_by"] == "clean")
        row.update(verdict="CERTIFIED", lower_bound=0.5, decided_by="ibp")
        row.pop("counterexample")
        recount(plain)

    text = found(edit(forge))
    assert "but the file classifies it wrongly" in text
    assert "summary.standard_accuracy" in text


def swap(folder: Path, content: bytes) -> None:
    """Another model, with its size and hash in the certificate."""
    path = folder / "certificate.json"
    plain = json.loads(path.read_text())
    plain["file"].update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    path.write_text(json.dumps(plain))
    (folder / "model.onnx").write_bytes(content)


def test_a_model_swapped_together_with_its_hash(copy: Path, network: Network) -> None:
    weaker = {name: tensor * 0.5 if name.endswith("bias") else tensor for name, tensor in network.params.items()}
    other = at_level(dataclasses.replace(network, params=weaker), "int8", DIGITS, (0.0, 1.0))
    swap(copy, other.file)
    text = found(copy)
    assert "SHA-256" not in text
    assert "model.safetensors: " in text
    # Also where the other file of the pick is swapped as well, the verdicts are those of another network.
    graph, params, _ = recheck.read_onnx(other.file)
    (copy / "model.safetensors").write_bytes(pack(Network(graph, params)))
    text = found(copy)
    assert "model.safetensors" not in text
    assert "verdicts: index" in text


def test_a_model_of_another_level(copy: Path, network: Network) -> None:
    swap(copy, at_level(network, "dense", DIGITS, (0.0, 1.0)).file)
    assert "its metadata cactus_ray.level is 'dense'; the certificate says 'int8'" in found(copy)


def test_safetensors_that_do_not_match(copy: Path, network: Network) -> None:
    graph, params, _ = recheck.read_onnx(copy / "model.onnx")
    name = next(iter(params))
    params[name] = params[name].clone()
    params[name].view(-1)[0] += 1e-6
    (copy / "model.safetensors").write_bytes(pack(Network(graph, params)))
    assert f"model.safetensors: {name} differ from model.onnx" in found(copy)
    (copy / "model.safetensors").write_bytes(pack(network))  # before rounding
    assert "differ from model.onnx" in found(copy)
    shorter = dataclasses.replace(graph, nodes=graph.nodes[:-1])
    (copy / "model.safetensors").write_bytes(pack(Network(shorter, params)))
    assert "model.safetensors: holds another graph" in found(copy)
    (copy / "model.safetensors").write_bytes(b"\0" * 100)
    assert "not a network file" in found(copy)
    (copy / "model.safetensors").unlink()
    assert "model.safetensors: cannot be read" in found(copy)


@pytest.mark.parametrize("factor", [1.02, 1.5])
def test_a_raised_epsilon(edit: Edit, factor: float) -> None:
    text = found(edit(lambda plain: plain["threat"].update(epsilon=EPSILON * factor)))
    assert "lower bound" in text or "CERTIFIED, but" in text


def test_a_lowered_epsilon_leaves_counterexamples_outside(edit: Edit) -> None:
    assert "outside of the ball of radius 0.05" in found(edit(lambda plain: plain["threat"].update(epsilon=0.05)))


def test_a_wider_or_narrower_domain(edit: Edit) -> None:
    assert "cactus_ray.domain" in found(edit(lambda plain: plain["threat"].update(domain=[0.0, 0.9])))


def test_a_repeated_index(edit: Edit) -> None:
    text = found(edit(lambda plain: plain["verdicts"].append(plain["verdicts"][0])))
    assert "index 0 stands more than once" in text


def test_a_missing_verdict(edit: Edit) -> None:
    text = found(edit(lambda plain: plain["verdicts"].pop(3)))
    assert "index 3 of data.indices has no verdict" in text


def test_samples_left_out_on_purpose(edit: Edit) -> None:
    """The forger drops all that was not certified, and makes everything else agree."""

    def forge(plain: dict[str, Any]) -> None:
        plain["verdicts"] = rows(plain, "CERTIFIED")
        recount(plain)

    assert "neither the whole split nor its fixed random subset" in found(edit(forge))


def test_an_index_outside_of_the_split(edit: Edit) -> None:
    assert "index 5000 is outside of the split" in found(edit(lambda plain: plain["verdicts"][0].update(index=5000)))


def test_a_wrong_label(edit: Edit) -> None:
    def forge(plain: dict[str, Any]) -> None:
        plain["verdicts"][0]["label"] = (plain["verdicts"][0]["label"] + 1) % 10

    assert "index 0: label" in found(edit(forge))


@pytest.mark.parametrize("bound", [None, 0.0, -1.0])
def test_a_certified_sample_without_a_positive_bound(edit: Edit, bound: float | None) -> None:
    text = found(edit(lambda plain: rows(plain, "CERTIFIED")[0].update(lower_bound=bound)))
    assert f"CERTIFIED with the lower bound {bound}" in text


def test_a_bound_that_claims_more(edit: Edit) -> None:
    text = found(edit(lambda plain: rows(plain, "CERTIFIED")[0].update(lower_bound=1e6)))
    assert "lower bound 1000000.0, but the file's weights give only" in text


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(copy: Path, token: str) -> None:
    path = copy / "certificate.json"
    plain = json.loads(path.read_text())
    rows(plain, "CERTIFIED")[0]["lower_bound"] = 12345.5
    path.write_text(json.dumps(plain).replace("12345.5", token))
    assert "certificate.json" in found(copy)


def test_a_counterexample_that_is_none(edit: Edit, picked: PickResult) -> None:
    index = next(r.index for r in picked.document.verdicts if r.verdict == "FALSIFIED" and r.decided_by != "clean")
    image = load(DIGITS, ("test",)).images["test"][index].flatten().tolist()
    text = found(edit(lambda plain: plain["verdicts"][index].update(counterexample=image)))
    assert f"index {index}: the counterexample is classified as its label by the file" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row.pop("counterexample"), "FALSIFIED without a counterexample"),
        (lambda row: row.update(counterexample=[0.5]), "counterexample of 1 values; the input has 64"),
        (lambda row: row.update(counterexample=[2.0] * 64), "outside of the ball"),
        (lambda row: row.update(counterexample=[0.1] * 64), "not representable in float32"),
    ],
)
def test_damaged_counterexamples(edit: Edit, change: Callable[[dict[str, Any]], object], words: str) -> None:
    assert words in found(edit(lambda plain: change(rows(plain, "FALSIFIED")[0])))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p["data"].update(digest="0" * 64), "data.digest"),
        (lambda p: p["data"].update(total=361), "data.total"),
        (lambda p: p["data"].update(split="selection"), "data.digest"),
        (lambda p: p["network"].update(level="int4"), "cactus_ray.level"),
        (lambda p: p["network"]["classes"].reverse(), "network.classes"),
        (lambda p: p["network"]["inputs"].update(shape=[1, 4, 16]), "network.inputs.shape"),
        (lambda p: p["network"].update(macs=1), "network.macs"),
        (lambda p: p["summary"].update(standard_accuracy=1.0), "summary.standard_accuracy"),
        (lambda p: p["summary"].update(certified_accuracy_upper=1.0), "summary.certified_accuracy_upper"),
        (lambda p: p["summary"].update(certified_interval=[0.9, 1.0]), "summary.certified_interval"),
        (lambda p: p["file"].update(bytes=1), "bytes, the certificate says 1"),
        (lambda p: p["file"].update(name="../model.onnx"), "file.name"),
        (lambda p: p["provenance"].update(config_hash="0" * 16), "provenance.config_hash"),
        (lambda p: p["provenance"]["selection"].update(certified_accuracy=0.99), "provenance.selection"),
        (lambda p: p["provenance"]["selection"].update(n_falsified=10**30), "provenance.selection"),
        (lambda p: rows(p, "FALSIFIED")[0].update(lower_bound=1.0), "which would be a proof"),
        (lambda p: rows(p, "UNKNOWN")[0].update(counterexample=[0.0] * 64), "UNKNOWN with a counterexample"),
        (lambda p: p["provenance"].update(not_met=["max_bytes"]), "provenance.not_met"),
        (lambda p: p["provenance"]["requirements"].update(min_certified=0.99), "provenance.not_met"),
        (lambda p: p["engine"]["settings"].update(bound="magic"), "engine.settings.bound"),
        (
            lambda p: p["soundness"].update(scheme="everything is certified"),
            "soundness.scheme: 'everything is certified'",
        ),
        (lambda p: p["soundness"].update(scheme=SCHEMES["auto_lirpa"]), "soundness.scheme"),
        (lambda p: p["soundness"].update(assumptions=[]), "soundness.assumptions: 'inputs are float32"),
        (lambda p: p["soundness"]["assumptions"].pop(1), 'soundness.assumptions: "weights that are stored'),
        (lambda p: p["soundness"]["assumptions"].append("TF32 is covered"), "'TF32 is covered' is none of this file"),
        (lambda p: p["soundness"]["assumptions"].reverse(), "soundness.assumptions: in another order"),
        (lambda p: p["engine"].update(name="alpha-beta-CROWN"), "engine.name: 'alpha-beta-CROWN'"),
        (lambda p: p["engine"].update(version="99"), "engine.version: '99'"),
        (lambda p: p["engine"].update(self_test="passed everything"), "engine.self_test: 'passed everything'"),
        (lambda p: p["file"].update(parity=None), "file.parity: missing"),
        (lambda p: p["file"]["parity"].update(max_abs_difference=0.0), "file.parity.max_abs_difference: 0.0, but here"),
        (lambda p: p["file"]["parity"].update(max_abs_difference=0.5), "file.parity.max_abs_difference: 0.5, but here"),
        (lambda p: p["file"]["parity"].update(samples=10**6), "file.parity.samples: 1000000"),
        (lambda p: p["file"]["parity"].update(class_disagreements=200), "file.parity.class_disagreements: 200"),
        (lambda p: p["network"].update(model="resnet18"), "network.model: 'resnet18'"),
        (lambda p: p["network"]["inputs"].update(name="pixels"), "network.inputs.name: 'pixels'"),
        (
            lambda p: rows(p, "CERTIFIED")[0].update(decided_by="mixed-integer programming"),
            "'mixed-integer programming'",
        ),
        (
            lambda p: rows(p, "CERTIFIED")[0].update(decided_by="branch", lower_bound=None),
            "CERTIFIED, decided by 'branch'",
        ),
        (lambda p: rows(p, "CERTIFIED")[0].update(decided_by="attack"), "CERTIFIED, decided by 'attack'"),
        (lambda p: rows(p, "FALSIFIED")[0].update(decided_by="corner"), "FALSIFIED, decided by 'corner'"),
        (lambda p: rows(p, "UNKNOWN")[0].update(decided_by="crown"), "UNKNOWN, decided by 'crown'"),
    ],
)
def test_wrong_statements(edit: Edit, change: Callable[[dict[str, Any]], object], words: str) -> None:
    assert words in found(edit(change))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.update(verdicts=None),
        lambda p: p.update(verdicts=[]),
        lambda p: p.update(verdicts={"index": 0}),
        lambda p: p.update(verdicts=[[]]),
        lambda p: p.pop("summary"),
        lambda p: p.update(summary=[]),
        lambda p: p.update(schema_version=99),
        lambda p: p.update(schema_version="1"),
        lambda p: p.update(extra=1),
        lambda p: p["threat"].update(epsilon=-0.1),
        lambda p: p["threat"].update(epsilon="0.1"),
        lambda p: p["threat"].update(epsilon=True),
        lambda p: p["threat"].update(epsilon=10**400),
        lambda p: p["threat"].update(domain=[1.0, 0.0]),
        lambda p: p["threat"].update(norm="l2"),
        lambda p: p["verdicts"][0].update(index=-1),
        lambda p: p["verdicts"][0].update(index=1.5),
        lambda p: p["verdicts"][0].update(label="3"),
        lambda p: p["verdicts"][0].update(verdict="certified"),
        lambda p: p["verdicts"][0].update(verdict=True),
        lambda p: p["verdicts"][0].update(seconds=None),
        lambda p: p["data"].update(name="imagenet"),
        lambda p: p["data"].update(indices="all"),
        lambda p: p["network"]["inputs"].update(shape=[1, 8]),
        lambda p: p["network"].update(classes=[]),
        lambda p: p["engine"].update(settings=[]),
        lambda p: p["soundness"].update(arithmetic="real"),
        lambda p: p["soundness"].update(arithmetic="float16"),
        lambda p: p["soundness"].pop("arithmetic"),
        lambda p: p["engine"]["settings"].update(arithmetic="real"),
        lambda p: p["engine"]["settings"].update(arithmetic="exact"),
        lambda p: p["file"].update(sha256=None),
        lambda p: p["summary"].update(samples=0),
    ],
)
def test_hostile_certificates_fail_clearly(edit: Edit, change: Callable[[dict[str, Any]], object]) -> None:
    assert found(edit(change))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b'{"file": 1, "file": 2}', b'"text"'],
)
def test_what_is_no_json_object(copy: Path, content: bytes) -> None:
    (copy / "certificate.json").write_bytes(content)
    assert "certificate.json" in found(copy)


def test_no_certificate_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no certificate.json in it"):
        check(tmp_path)
    with pytest.raises(UserError, match=r"no certificate.json in it"):
        check(tmp_path / "nowhere")


def test_a_sample_that_cannot_be_certified_again(picked: PickResult, monkeypatch: pytest.MonkeyPatch) -> None:
    real = again.verify

    def forgetful(*arguments: Any) -> list[SampleVerdict]:
        first, *rest = real(*arguments)
        lost = dataclasses.replace(first, verdict=Verdict.UNKNOWN, lower_bound=None, decided_by="out_of_memory")
        return [lost, *rest]

    monkeypatch.setattr(again, "verify", forgetful)
    assert "CERTIFIED, but the file's weights give UNKNOWN (decided by out_of_memory)" in found(picked.folder)


def test_a_counterexample_that_does_not_replay_is_unknown(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime, and not our own forward pass, has the last word about the file."""
    file = at_level(network, "int8", DIGITS, (0.0, 1.0)).file
    threat = ThreatConfig(epsilon=EPSILON)
    honest = certify_file(file, DIGITS, "test", threat, QUICK)
    attacked = {r.index for r in honest.rows if r.verdict == "FALSIFIED" and r.decided_by != "clean"}
    assert attacked
    real = certificate.verify

    def harmless(graph: Any, params: Any, images: Any, *rest: Any) -> list[SampleVerdict]:
        """Counterexamples of another network: here, the unperturbed images."""
        found = real(graph, params, images, *rest)
        return [
            dataclasses.replace(v, counterexample=tuple(x.flatten().tolist())) if v.counterexample is not None else v
            for v, x in zip(found, images, strict=True)
        ]

    monkeypatch.setattr(certificate, "verify", harmless)
    rows = certify_file(file, DIGITS, "test", threat, QUICK).rows
    for row in rows:
        if row.index in attacked:
            assert (row.verdict, row.decided_by, row.counterexample) == ("UNKNOWN", "replay", None)
    assert summarise(rows).n_falsified == honest.summary.n_falsified - len(attacked)
    assert summarise(rows).standard_accuracy == honest.summary.standard_accuracy


def test_a_reading_that_answers_differently_is_refused(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    file = at_level(network, "int8", DIGITS, (0.0, 1.0)).file
    real = certificate.read_onnx

    def misread(content: bytes) -> Any:
        graph, params, metadata = real(content)
        return graph, {k: v + 0.01 for k, v in params.items()}, metadata

    monkeypatch.setattr(certificate, "read_onnx", misread)
    with pytest.raises(RunFailedError, match="onnxruntime and our reading of the file differ"):
        certify_file(file, DIGITS, "test", ThreatConfig(epsilon=EPSILON), QUICK, samples=20)


def test_certify_file_names_what_does_not_fit(network: Network) -> None:
    threat = ThreatConfig(epsilon=EPSILON)
    with pytest.raises(UserError):
        certify_file(b"nonsense", DIGITS, "test", threat, QUICK)
    file = at_level(network, "int8", DIGITS, (0.0, 1.0)).file
    found = certify_file(file, DIGITS, "selection", threat, QUICK, samples=10)
    assert found.data.samples == len(found.rows) == 10
    assert found.parity.max_abs_difference < 1e-5
    assert found.parity.class_disagreements == 0


def test_margins_of_ties_and_nan_do_not_count_as_right() -> None:
    import torch

    logits = torch.tensor([[1.0, 1.0], [2.0, 1.0], [float("nan"), 1.0]])
    right = replay.margins(logits, torch.tensor([0, 0, 0])) > 0
    assert right.tolist() == [False, True, False]


# --- the words -------------------------------------------------------------------------------------------------------


def test_a_rewritten_card(copy: Path) -> None:
    path = copy / "card.md"
    honest = path.read_text()
    number = next(i for i, line in enumerate(honest.splitlines(), 1) if line.startswith("A compressed image"))
    path.write_text(honest.replace("A compressed image classifier", "A robust image classifier"))
    assert f"card.md: line {number} is 'A robust image classifier" in found(copy)
    path.write_text(honest + "100 % certified\n")
    assert "is '100 % certified'; the certificate gives None" in found(copy)
    path.write_bytes(honest.replace("\n", "\r\n").encode())
    assert "card.md: differs from what the certificate gives in its line ends" in found(copy)
    path.unlink()
    assert "card.md: cannot be read" in found(copy)


def test_rewritten_together_with_its_card(edit: Edit) -> None:
    """The card follows from the certificate, so that whoever rewrites both is found by the certificate."""

    def forge(plain: dict[str, Any]) -> None:
        plain["soundness"]["assumptions"] = ["everything is certified"]

    folder = edit(forge)
    (folder / "card.md").write_text(render(read(folder / "certificate.json")))
    assert "soundness.assumptions: 'everything is certified' is none of this file" in found(folder)


def test_what_is_not_checked_is_said(picked: PickResult, edit: Edit, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check", str(picked.folder)]) == 0
    shown = capsys.readouterr().out
    assert "the certificate holds" in shown
    for what in recheck.NOT_CHECKED:
        assert f"- {what}" in shown
    assert check(picked.folder).to_json()["not_checked"] == list(recheck.NOT_CHECKED)

    def unfounded(plain: dict[str, Any]) -> None:
        """All that these lines name: nothing here can show that it is wrong."""
        plain["network"]["dense_bytes"] += 1
        plain["provenance"].update(study="another", commit="123abc", test_split_uses=1)
        plain["engine"]["version"] = plain["versions"]["cactus-ray"] = "99"
        plain["verdicts"][0]["seconds"] = 0.0

    folder = edit(unfounded)
    (folder / "card.md").write_text(render(read(folder / "certificate.json")))
    assert check(folder).ok


def test_a_certificate_with_earlier_words_holds(tmp_path: Path) -> None:
    """A pick as it was written before the words about stored weights changed."""
    earlier = Path(__file__).with_name("earlier")
    assert set(json.loads((earlier / "certificate.json").read_text())["soundness"]["assumptions"]) & set(EARLIER)
    report = check(earlier)
    assert (report.findings, report.certified_again, report.replayed) == ((), 16, 8)


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_parity_of_another_machine_holds(edit: Edit, factor: float) -> None:
    """Other orders of sums change it severalfold."""

    def change(plain: dict[str, Any]) -> None:
        plain["file"]["parity"]["max_abs_difference"] *= factor

    folder = edit(change)
    (folder / "card.md").write_text(render(read(folder / "certificate.json")))
    assert check(folder).findings == ()


# --- the arithmetic that a certificate claims ------------------------------------------------------------------------


def test_bounds_in_real_arithmetic_do_not_pass_for_float32(run_folder: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, arithmetic="real")
    real = pick(run_folder, Requirements(level="int8"), tmp_path / "real", samples=60, settings=settings).folder
    path = real / "certificate.json"
    plain = json.loads(path.read_text())
    assert plain["soundness"]["arithmetic"] == "real"
    assert "not charged" in " ".join(plain["soundness"]["assumptions"])
    assert "in real arithmetic" in (real / "card.md").read_text()
    assert check(real).ok
    plain["soundness"]["arithmetic"] = plain["engine"]["settings"]["arithmetic"] = "float32"
    path.write_text(json.dumps(plain))
    assert "but the file's weights give only" in found(real)


def test_it_is_verified_again_in_the_arithmetic_that_it_claims(
    picked: PickResult, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, seen = again.verify, set()

    def watch(*arguments: Any) -> list[SampleVerdict]:
        seen.add(arguments[-1].arithmetic)
        return true(*arguments)

    monkeypatch.setattr(again, "verify", watch)
    assert check(picked.folder).ok
    assert seen == {"float32"}
    assert "decided in another one" in found(edit(lambda p: p["soundness"].update(arithmetic="real")))
    assert seen == {"float32", "real"}


def test_what_branch_and_bound_proved_is_proved_again(run_folder: Path, tmp_path: Path) -> None:
    settings = VerificationSettings(
        attack_steps=10, restarts=1, bound="branch", arithmetic="real", seconds_per_sample=100.0
    )
    result = pick(run_folder, Requirements(level="int8"), tmp_path / "branch", settings=settings)
    searched = [row for row in result.document.verdicts if row.decided_by in ("alpha", "branch")]
    assert any(row.verdict == "CERTIFIED" and row.lower_bound is None for row in searched)
    assert result.document.summary.n_unknown == 0
    assert check(result.folder).findings == ()
    edited = json.loads((result.folder / "certificate.json").read_text())
    row = next(r for r in edited["verdicts"] if r["verdict"] == "CERTIFIED" and r["decided_by"] in ("alpha", "branch"))
    row["lower_bound"] = 3.0  # a margin that nothing proved
    (result.folder / "certificate.json").write_text(json.dumps(edited))
    assert any("lower bound 3.0" in finding for finding in check(result.folder).findings)
