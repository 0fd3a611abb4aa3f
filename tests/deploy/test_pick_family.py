"""A pick that certifies every rounding of its file at once: what it writes, and what a check finds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deploy_support import DIGITS, EPSILON, QUICK

from cactus_ray.compression.family import Family
from cactus_ray.config import ThreatConfig
from cactus_ray.deploy import certificate, document
from cactus_ray.deploy.certificate import certify_file
from cactus_ray.deploy.export import PickResult, pick
from cactus_ray.deploy.members import member_file, refuse_integers
from cactus_ray.deploy.recheck import check
from cactus_ray.deploy.requirements import Requirements
from cactus_ray.errors import ConfigError
from cactus_ray.interchange.read import read_onnx
from cactus_ray.models.network import Network
from cactus_ray.search.evaluate import at_level
from cactus_ray.verification.member import Member, Subject

FAMILY = Family(format="int8", radius="one")
THREAT = ThreatConfig(epsilon=EPSILON)
Edit = Callable[[Callable[[dict[str, Any]], object]], tuple[str, ...]]


@pytest.fixture(scope="module")
def whole(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PickResult:
    """The dense network of the run, and every rounding of it to int8, up or down."""
    out = tmp_path_factory.mktemp("family") / "digits"
    return pick(run_folder, Requirements(level="dense"), out, samples=60, family=lambda level: FAMILY)


@pytest.fixture
def found(whole: PickResult, tmp_path: Path) -> Edit:
    """What a check finds in a copy whose certificate was changed."""
    copy = Path(shutil.copytree(whole.folder, tmp_path / "copy"))

    def change(function: Callable[[dict[str, Any]], object]) -> tuple[str, ...]:
        plain = json.loads((whole.folder / "certificate.json").read_text())
        function(plain)
        (copy / "certificate.json").write_text(json.dumps(plain))
        return check(copy).findings

    return change


def test_the_certificate_says_what_holds_for_all_members(whole: PickResult) -> None:
    section = whole.document.family
    assert section is not None
    assert section.family == FAMILY
    assert "max|w| / 127" in section.members
    assert "do not change from member to member" in section.members
    assert section.summary.samples == 60
    assert 0 < section.summary.n_certified < whole.document.summary.n_certified
    assert {r.member.kind for r in section.verdicts if r.member is not None} >= {"centre", "grid"}
    assert document.from_json((whole.folder / "certificate.json").read_text()) == whole.document
    card = (whole.folder / "card.md").read_text()
    assert "## Every rounding to int8" in card
    assert f"For {section.summary.n_certified} of 60 images" in card
    assert any("one quantisation step of int8" in line for line in whole.lines())
    assert whole.to_json()["family"]["n_certified"] == section.summary.n_certified


def test_a_check_recomputes_it(whole: PickResult) -> None:
    report, section = check(whole.folder), whole.document.family
    assert report.findings == ()
    assert section is not None
    assert report.certified_again == whole.document.summary.n_certified + section.summary.n_certified
    assert report.replayed == whole.document.summary.n_falsified + section.summary.n_falsified


def index_of(plain: dict[str, Any], **wanted: Any) -> int:
    rows = plain["family"]["verdicts"]
    return next(i for i, row in enumerate(rows) if all(row.get(k) == v for k, v in wanted.items()))


def test_edited_verdicts_are_found(found: Edit) -> None:
    def certify(plain: dict[str, Any]) -> None:
        row = plain["family"]["verdicts"][index_of(plain, verdict="UNKNOWN")]
        row.update(verdict="CERTIFIED", lower_bound=0.5, decided_by="crown")

    findings = found(certify)
    assert any("CERTIFIED, but the file's weights give UNKNOWN" in f for f in findings)
    assert any(f.startswith("family.summary.n_certified") for f in findings)

    def larger(plain: dict[str, Any]) -> None:
        plain["family"]["verdicts"][index_of(plain, verdict="CERTIFIED")].update(lower_bound=99.0)

    assert any("lower bound 99.0, but" in f for f in found(larger))


def test_an_edited_member_is_found(found: Edit) -> None:
    def other(member: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
        def change(plain: dict[str, Any]) -> None:
            place = next(i for i, r in enumerate(plain["family"]["verdicts"]) if r["decided_by"] in ("grid", "corner"))
            plain["family"]["verdicts"][place]["member"] = member

        return change

    for member in ({"kind": "centre", "rounds": 1}, {"kind": "nearest", "rounds": 1}):
        assert any("family.verdicts" in f and "is classified as its label" in f for f in found(other(member)))
    assert any("no member of" in f for f in found(other({"kind": "grid", "rounds": 1})))
    assert any("family.verdicts" in f for f in found(other({"kind": "grid", "other": 77, "rounds": 1})))
    assert any("member.rounds" in f for f in found(other({"kind": "grid", "other": 1, "rounds": 99})))


def test_another_family_than_was_certified_is_found(found: Edit) -> None:
    def wider(plain: dict[str, Any]) -> None:
        plain["family"]["family"]["format"] = "int4"

    findings = found(wider)
    assert any("family.members" in f for f in findings)
    assert any("CERTIFIED, but the file's weights give" in f for f in findings)
    assert any("network.level" in f for f in found(lambda p: p["network"].update(level="int8")))


def test_what_contradicts_itself_is_found(found: Edit) -> None:
    def not_the_file(plain: dict[str, Any]) -> None:
        place = next(i for i, r in enumerate(plain["verdicts"]) if r["verdict"] == "FALSIFIED")
        plain["family"]["verdicts"][place] = {
            **plain["verdicts"][place], "verdict": "CERTIFIED", "decided_by": "ibp", "lower_bound": 1.0,
        }  # fmt: skip
        del plain["family"]["verdicts"][place]["counterexample"]

    assert any("CERTIFIED, but the file itself is FALSIFIED" in f for f in found(not_the_file))

    def nobody(plain: dict[str, Any]) -> None:
        del plain["family"]["verdicts"][index_of(plain, verdict="FALSIFIED")]["member"]

    assert any("FALSIFIED, and the member is None" in f for f in found(nobody))
    assert any("a member of a family" in f for f in found(lambda p: p["verdicts"][0].update(member={"kind": "centre"})))
    assert any("has no verdict" in f for f in found(lambda p: p["family"]["verdicts"].pop()))


def test_levels_of_integers_are_no_centre(run_folder: Path, tmp_path: Path) -> None:
    from cactus_ray.compression.levels import parse_level

    def family(level: str) -> Family:
        refuse_integers(parse_level(level), FAMILY, "--level")
        return FAMILY

    uses = (run_folder / "test_split_uses.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="--level: got 'int8'"):
        pick(run_folder, Requirements(level="int8"), tmp_path / "out", samples=5, family=family)
    assert not (tmp_path / "out").exists()
    assert (run_folder / "test_split_uses.jsonl").read_bytes() == uses  # the test split was not read


def test_a_member_is_a_file_that_runs(network: Network) -> None:
    deployed = at_level(network, "dense", DIGITS, (0.0, 1.0))
    around = Subject.of(deployed.graph, deployed.params, FAMILY)
    weights = around.weights_of(Member(kind="grid", other=2), torch.zeros(1, 8, 8), 1)
    _, read, _ = read_onnx(member_file(around.graph, weights))
    assert all(torch.equal(read[k], v) for k, v in weights.items())


def test_a_counterexample_of_a_member_that_does_not_replay_is_unknown(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = at_level(network, "dense", DIGITS, (0.0, 1.0)).file
    honest = certify_file(file, DIGITS, "test", THREAT, QUICK, samples=40, family=FAMILY)
    fallen = {r.index for r in honest.rows if r.decided_by in ("nearest", "grid", "corner")}
    assert fallen
    monkeypatch.setattr(certificate, "member_objection", lambda *given: "does not")
    rows = certify_file(file, DIGITS, "test", THREAT, QUICK, samples=40, family=FAMILY).rows
    assert {r.index for r in rows if r.decided_by == "replay"} == fallen
    assert all(r.verdict == "UNKNOWN" and r.member is None for r in rows if r.index in fallen)
