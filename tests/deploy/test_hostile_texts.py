"""Nobody gets words of his own into a certificate, its card, its files or the terminal of whoever checks them."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from deploy_support import QUICK
from markdown_it import MarkdownIt
from markdown_it.token import Token
from onnx import helper, numpy_helper
from PIL import Image
from torch import nn

from cactus_ray import cli
from cactus_ray.bounds.trace import trace
from cactus_ray.config import RunConfig, parse
from cactus_ray.deploy.card import render
from cactus_ray.deploy.document import Document, from_json, read, to_json
from cactus_ray.deploy.export import USES, pick, pick_file
from cactus_ray.deploy.labels import network_labels, onnx_labels
from cactus_ray.deploy.patterns import MOST, NAMED
from cactus_ray.deploy.recheck import check
from cactus_ray.deploy.requirements import Requirements
from cactus_ray.errors import ConfigError, UserError
from cactus_ray.interchange.read import read_onnx
from cactus_ray.models.network import Network, pack, save, unpack
from cactus_ray.search.space import NAME
from cactus_ray.texts import markdown, visible

EARLIER = Path(__file__).with_name("earlier")
HOSTILE = {
    "lines": "tiny\n\n# Certified for every input\n",
    "markup": "**certified** [here](http://evil.example)",
    "html": "<img src=x onerror=alert(1)>",
    "escape codes": "\x1b[2J\x1b[32mholds\x1b[0m",
    "one-byte escape codes": "\x9b2Jholds",
    "writing direction": "\u202eholds\u202c",
    "length": "a" * 5000,
}
FIELDS: dict[str, Callable[[dict[str, Any], str], object]] = {
    "provenance.study": lambda p, text: p["provenance"].update(study=text),
    "provenance.trial": lambda p, text: p["provenance"].update(trial=text),
    "provenance.commit": lambda p, text: p["provenance"].update(commit=text),
    "provenance.config_hash": lambda p, text: p["provenance"].update(config_hash=text),
    "provenance.not_met": lambda p, text: p["provenance"].update(not_met=[text]),
    "provenance.requirements": lambda p, text: p["provenance"].update(requirements={"trial": text}),
    "versions.torch": lambda p, text: p["versions"].update(torch=text),
    "versions": lambda p, text: p["versions"].update({text: "1.0"}),
    "engine.name": lambda p, text: p["engine"].update(name=text),
    "engine.version": lambda p, text: p["engine"].update(version=text),
    "file.name": lambda p, text: p["file"].update(name=text),
    "file.sha256": lambda p, text: p["file"].update(sha256=text),
    "network.model": lambda p, text: p["network"].update(model=text),
    "network.level": lambda p, text: p["network"].update(level=text),
    "network.inputs.name": lambda p, text: p["network"]["inputs"].update(name=text),
    "data.name": lambda p, text: p["data"].update(name=text),
    "data.digest": lambda p, text: p["data"].update(digest=text),
    "threat.norm": lambda p, text: p["threat"].update(norm=text),
    "verdicts[3].decided_by": lambda p, text: p["verdicts"][3].update(decided_by=text),
}
SENTENCES: dict[str, Callable[[dict[str, Any], str], object]] = {
    "engine.self_test": lambda p, text: p["engine"].update(self_test=text),
    "soundness.scheme": lambda p, text: p["soundness"].update(scheme=text),
    "soundness.assumptions[1]": lambda p, text: p["soundness"]["assumptions"].__setitem__(1, text),
}


@pytest.fixture(params=[1, 2])
def plain(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A certificate that holds, as plain data, of either version."""
    found: dict[str, Any] = json.loads((EARLIER / "certificate.json").read_text())
    return {**found, "schema_version": request.param}


def refusal(plain: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        from_json(json.dumps(plain))
    return str(error.value)


@pytest.mark.parametrize("kind", list(HOSTILE))
@pytest.mark.parametrize("field", list(FIELDS))
def test_a_text_of_a_stranger_is_refused_with_its_place(plain: dict[str, Any], field: str, kind: str) -> None:
    FIELDS[field](plain, HOSTILE[kind])
    message = refusal(plain)
    assert field in message
    assert message.isprintable()


@pytest.mark.parametrize("kind", ["lines", "escape codes", "one-byte escape codes", "writing direction", "length"])
@pytest.mark.parametrize("field", list(SENTENCES))
def test_a_sentence_is_one_line(plain: dict[str, Any], field: str, kind: str) -> None:
    """Of other words ``check`` finds that they are not ours."""
    SENTENCES[field](plain, HOSTILE[kind])
    assert field in refusal(plain)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("provenance.commit", "HEAD"),
        ("provenance.commit", "12"),
        ("provenance.study", ""),
        ("provenance.study", ".hidden"),
        ("versions.torch", "newest"),
        ("versions.torch", "2.0 and certified"),
        ("versions", "openssl"),
        ("file.sha256", "AB" * 32),
        ("network.level", "int8 certified"),
    ],
)
def test_what_is_near_is_refused_as_well(plain: dict[str, Any], field: str, text: str) -> None:
    FIELDS[field](plain, text)
    assert field in refusal(plain)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("provenance.commit", "b02dd45d1f0b6a1e0b9b5e8a4c3d2e1f00112233"),
        ("provenance.commit", "abc123"),
        ("provenance.study", "Digits-2026.v2_final"),
        ("provenance.trial", "t0007"),
        ("versions.torch", "2.9.0a0+git1234abc.cu130"),
        ("versions.torch", "2.5.0.dev20240601+cpu"),
        ("versions.python", "3.13.0rc1+"),
        ("network.model", "my_package.models:make_net"),
        ("network.model", "größen.netze:baue"),
        ("network.level", "prune:gs-l2:0.5+rebn+int4:tensor:affine"),
        ("network.level", "lr+sparse:1e-05+codebook:4"),
    ],
)
def test_what_a_pick_may_say_passes(plain: dict[str, Any], field: str, text: str) -> None:
    fields = FIELDS | {"versions.python": lambda p, text: p["versions"].update(python=text)}
    fields[field](plain, text)
    from_json(json.dumps(plain))


def test_every_name_of_a_study_passes() -> None:
    assert NAMED["pattern"] == NAME.removesuffix("*") + "{0,254}"  # 255: the length of a folder's name


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("summary.samples", lambda p: p["summary"].update(samples=MOST + 1)),
        ("file.bytes", lambda p: p["file"].update(bytes=10**30)),
        ("verdicts[0].label", lambda p: p["verdicts"][0].update(label=10**20)),
        ("engine.settings.max_nodes", lambda p: p["engine"]["settings"].update(max_nodes=10**30)),
        ("engine.settings.bound", lambda p: p["engine"]["settings"].update(bound=["crown"])),
        ("--max-bytes", lambda p: p["provenance"].update(requirements={"max_bytes": 10**30})),
    ],
)
def test_numbers_have_a_range(
    plain: dict[str, Any], field: str, change: Callable[[dict[str, Any]], object]
) -> None:  # fmt: skip
    change(plain)
    assert field in refusal(plain)


def test_numbers_are_finite(plain: dict[str, Any]) -> None:
    text = json.dumps(plain).replace('"epsilon": 0.05', '"epsilon": 1e999')
    with pytest.raises(ConfigError, match=r"threat\.epsilon: got inf"):
        from_json(text)


def test_no_level_but_as_pick_writes_it(tmp_path: Path) -> None:
    for stated, words in (("int9", "got 'int9'"), ("prune:gu-l1:0.50", "expected it written as 'prune:gu-l1:0.5'")):
        folder = copied(tmp_path / stated.replace(":", "_"), lambda p, s=stated: p["network"].update(level=s))
        assert any(words in finding for finding in check(folder).findings), stated


def copied(to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The earlier pick with a changed certificate."""
    folder = Path(shutil.copytree(EARLIER, to))
    path = folder / "certificate.json"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    return folder


# --- the card --------------------------------------------------------------------------------------------------------

NAMES = (
    *(text for kind, text in HOSTILE.items() if kind != "length"), "`code`", "*a* _b_ ~~c~~ $d$", "http://evil.example",
    "a|b", "![x](y)", "&lt;b&gt;", "\\", "\u2028line", "\udc80", "hot_dog", "t-shirt/top", "猫",
)  # fmt: skip


def of_version(version: int, names: tuple[str, ...]) -> Document:
    found = read(EARLIER / "certificate.json")
    return dataclasses.replace(
        found, schema_version=version, network=dataclasses.replace(found.network, classes=names)
    )  # fmt: skip


def tokens(text: str) -> Iterator[Token]:
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        yield token
        yield from token.children or ()


@pytest.mark.parametrize("name", NAMES)
def test_the_card_shows_any_name_as_text(name: str) -> None:
    card, usual = render(of_version(2, ("cat", name, "dog"))), render(of_version(2, ("cat", "bird", "dog")))
    card.encode()
    assert all(c.isprintable() or c == "\n" for c in card)
    ours, theirs = list(tokens(card)), list(tokens(usual))
    kinds = [t.type for t in ours if t.type != "text_special"]  # an escaped character, joined with its neighbours below
    assert [k for i, k in enumerate(kinds) if k != "text" or kinds[i - 1] != "text"] == [t.type for t in theirs]
    shown = "".join(t.content for t in ours if t.type in ("text", "text_special"))
    assert f"Classes: cat, {visible(name)}, dog." in shown
    assert "<img" not in card
    assert "](http" not in card


def test_ordinary_names_stay_as_they_are() -> None:
    assert markdown("t-shirt/top") == "t-shirt/top"
    assert markdown("großer Hund, 2") == "großer Hund, 2"
    assert markdown("hot_dog") == "hot\\_dog"
    assert visible("a\tb\u200d\U000e0041") == "a\\tb\\u200d\\U000e0041"
    assert visible("one\ntwo", keep="\n") == "one\ntwo"


@pytest.mark.parametrize(
    "name", [HOSTILE["html"], HOSTILE["escape codes"], "a\nb", "[x](y)", "www.evil.example", "`x`"]
)
def test_cards_of_version_1_escape_nothing_and_so_show_only_plain_names(tmp_path: Path, name: str) -> None:
    folder = copied(tmp_path / "pick", lambda p: p["network"]["classes"].__setitem__(0, name))
    assert any(
        f.startswith(f"network.classes: certificates of version 1 cannot show {name!r}") for f in check(folder).findings
    )


def test_image_folders_with_any_names(tmp_path: Path) -> None:
    """Names of class folders are the user's: whatever they are, the pick holds and its card is safe."""
    names = sorted(("a<b>c", "two\nlines", "*d* [e](http:)", "\u202eevil", "\x1b[31mred"))
    generator = np.random.default_rng(0)
    for split in ("train", "selection", "test"):
        for label, name in enumerate(names):
            folder = tmp_path / "images" / split / name.replace("/", "")
            folder.mkdir(parents=True)
            for i in range(2):
                pixels = generator.integers(40 * label, 40 * label + 40, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    found = sorted(p.name for p in (tmp_path / "images" / "train").iterdir())
    config = parse(RunConfig, {
        "data": {"name": "image_folder", "root": str(tmp_path / "images"), "image_size": 8},
        "model": {"name": "mlp", "hidden": [4]}, "threat": {"epsilon": 0.001}, "method": "ibp",
    })  # fmt: skip
    torch.manual_seed(0)
    graph, params = trace(nn.Sequential(nn.Flatten(), nn.Linear(192, len(found))), (3, 8, 8))
    save(Network(graph, params, config, tuple(found)), tmp_path / "network.safetensors")
    result = pick_file(tmp_path / "network.safetensors", "int8", tmp_path / "picked", settings=QUICK)
    assert result.document.network.classes == tuple(found)
    report = check(result.folder, root=str(tmp_path / "images"))
    assert report.findings == ()
    card = (result.folder / "card.md").read_text()
    assert all(c.isprintable() or c == "\n" for c in card)
    assert "two\\\\nlines" in card
    assert "<b>" not in card


@pytest.mark.parametrize("key", ["name", "commit"])
def test_pick_refuses_what_no_certificate_may_say_before_the_test_split_is_read(
    run_folder: Path, tmp_path: Path, key: str
) -> None:
    """A study's records are a file like any other; nothing is certified for a certificate that would not hold."""
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    (run / USES).unlink(missing_ok=True)
    lines = (run / "trials.jsonl").read_text().splitlines()
    study = json.loads(lines[0]) | {key: HOSTILE["lines"]}
    (run / "trials.jsonl").write_text("\n".join([json.dumps(study), *lines[1:]]) + "\n")
    with pytest.raises(ConfigError, match=rf"provenance\.{'study' if key == 'name' else key}: got "):
        pick(run, Requirements(level="int8"), tmp_path / "out", samples=5)
    assert not (run / USES).exists()


# --- what the files say of themselves --------------------------------------------------------------------------------


def added_metadata(model: onnx.ModelProto, key: str, value: str) -> None:
    model.metadata_props.add(key=key, value=value)


def changed_metadata(model: onnx.ModelProto, key: str, value: str) -> None:
    next(entry for entry in model.metadata_props if entry.key == key).value = value


def unread_tensor(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.frombuffer(b"certified", np.uint8), "note"))


FORGED: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "a radius": (lambda m: added_metadata(m, "cactus_ray.epsilon", "0.5"), "hold 'cactus_ray.epsilon', which pick"),
    "other metadata": (lambda m: added_metadata(m, "author", "us"), "hold 'author', which pick"),
    "metadata twice": (lambda m: added_metadata(m, "cactus_ray.data", "digits"), "hold cactus_ray.data twice"),
    "class names": (
        lambda m: changed_metadata(m, "cactus_ray.class_names", '["cat"]'), "cactus_ray.class_names is ['cat']"
    ),
    "normalization": (
        lambda m: changed_metadata(m, "cactus_ray.normalization", "inside"), "cactus_ray.normalization is 'inside'"
    ),
    "doc_string": (lambda m: setattr(m, "doc_string", "certified"), "its doc_string is 'certified'"),
    "of the graph": (lambda m: setattr(m.graph, "doc_string", "certified"), "its graph's doc_string is 'certified'"),
    "of a node": (lambda m: setattr(m.graph.node[-1], "doc_string", "x"), "the doc_string of 'Gemm' is 'x'"),
    "of a tensor": (lambda m: setattr(m.graph.initializer[0], "doc_string", "x"), "the doc_string of tensor"),
    "of an attribute": (lambda m: setattr(m.graph.node[-1].attribute[0], "doc_string", "x"), "of attribute 'transB'"),
    "of the input": (lambda m: setattr(m.graph.input[0], "doc_string", "x"), "its input is not described"),
    "a name of the output's size": (
        lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[0], "dim_param", "x"), "its output is not"
    ),
    "producer": (lambda m: setattr(m, "producer_name", "lab of trust"), "its producer_name is 'lab of trust'"),
    "producer's version": (lambda m: setattr(m, "producer_version", "9"), "its producer_version is '9'"),
    "domain": (lambda m: setattr(m, "domain", "evil.example"), "its domain is 'evil.example'"),
    "name of the graph": (lambda m: setattr(m.graph, "name", "robust"), "its graph's name is 'robust'"),
    "name of a node": (lambda m: setattr(m.graph.node[-1], "name", "\x1b[2J"), "the node name '\\x1b[2J' is no"),
    "long name": (lambda m: setattr(m.graph.node[-1], "name", "a" * 300), "the node name 'aaa"),
    "metadata of a node": (lambda m: m.graph.node[0].metadata_props.add(key="a", value="b"), "metadata of a node"),
    "metadata of the graph": (lambda m: m.graph.metadata_props.add(key="a", value="b"), "metadata of its graph"),
    "value_info": (
        lambda m: m.graph.value_info.append(helper.make_tensor_value_info("certified", 1, [1])), "value_info is there"
    ),
    "training": (lambda m: m.training_info.add(), "training_info is there"),
    "operators": (lambda m: m.opset_import.add(domain="certified", version=1), "a domain of operators is there"),
    "a tensor that nothing reads": (unread_tensor, "tensor 'note', which nothing reads"),
    "a node that nothing reads": (
        lambda m: m.graph.node.insert(0, helper.make_node("Identity", ["image"], ["certified"])),
        "operator 'Identity', whose result nothing reads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("forgery", list(FORGED))
def test_words_inside_the_onnx_file_are_findings(forgery: str) -> None:
    content = (EARLIER / "model.onnx").read_bytes()
    document, (graph, _, _) = read(EARLIER / "certificate.json"), read_onnx(content)
    assert onnx_labels(content, document, graph) == []
    model = onnx.load_model_from_string(content)
    change, words = FORGED[forgery]
    change(model)
    found = onnx_labels(model.SerializeToString(deterministic=True), document, graph)
    assert any(words in finding for finding in found), found


@pytest.mark.parametrize(
    ("where", "words"), [("end", "bytes that ONNX does not know"), ("twice", "no part of the network")]
)
def test_bytes_beside_the_network_are_findings(where: str, words: str) -> None:
    content = (EARLIER / "model.onnx").read_bytes()
    document, (graph, _, _) = read(EARLIER / "certificate.json"), read_onnx(content)
    # a field that ONNX does not have; a field that stands twice, of which the last counts
    forged = content + b"\xfa\x07\x09certified" if where == "end" else b"\x12\x09certified" + content
    found = onnx_labels(forged, document, graph)
    assert len(found) == 1
    assert words in found[0]


def test_check_finds_what_verify_lets_pass(tmp_path: Path) -> None:
    model = onnx.load_model_from_string((EARLIER / "model.onnx").read_bytes())
    added_metadata(model, "cactus_ray.epsilon", "0.5")
    folder = copied(tmp_path / "pick", lambda p: None)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    read_onnx(folder / "model.onnx")
    findings = check(folder).findings
    assert any("hold 'cactus_ray.epsilon', which pick does not write" in finding for finding in findings)


def of_safetensors() -> tuple[Network, Document, bytes]:
    content = (EARLIER / "model.safetensors").read_bytes()
    return unpack(content), read(EARLIER / "certificate.json"), content


def test_words_inside_the_safetensors_file_are_findings() -> None:
    network, document, content = of_safetensors()
    assert network_labels(network, content, document) == []
    for change, words in (
        ({"class_names": ("cat", "dog")}, "its class names are ['cat', 'dog']; the certificate says ['0',"),
        ({"provenance": {"level": "dense", "trial": "t0001"}}, "its provenance.level is 'dense'; the certificate says"),
        ({"provenance": {**network.provenance, "certified": "all"}}, "its provenance holds 'certified'"),
    ):
        other = dataclasses.replace(network, **change)  # type: ignore[arg-type]
        assert any(words in finding for finding in network_labels(other, pack(other), document)), words
    nowhere = Network(network.graph, network.params)
    assert network_labels(nowhere, pack(nowhere), document) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"format":', b'"certified":"all","format":', "its header holds 'certified'"),
        (b'"format":', b'"format":"certified","format":', "no part of the network"),
        (b'"format":', b' "format":', "no part of the network"),
        (b'{\\"level\\"', b'{\\"level\\":\\"certified\\",\\"level\\"', "its header's provenance holds more"),
    ],
)
def test_words_in_the_header_of_the_safetensors_file_are_findings(old: bytes, new: bytes, words: str) -> None:
    network, document, content = of_safetensors()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip(b" ")
    assert header.count(old) == 1
    header = header.replace(old, new)
    header += b" " * (-len(header) % 8)
    forged = len(header).to_bytes(8, "little") + header + content[8 + length :]
    again = unpack(forged)
    assert again.graph == network.graph
    assert any(words in finding for finding in network_labels(again, forged, document))


def test_a_header_that_is_nested_without_end_is_no_network_file() -> None:
    network, _, _ = of_safetensors()
    content = pack(dataclasses.replace(network, provenance={"level": "@"}))
    deep = content.replace(b'{\\"level\\": \\"@\\"}', b"[" * 100_000)
    length = int.from_bytes(deep[:8], "little") + len(deep) - len(content)
    with pytest.raises(UserError, match="not a network file"):
        unpack(length.to_bytes(8, "little") + deep[8:])


# --- the terminal ----------------------------------------------------------------------------------------------------

CONTROLS = ("\x1b", "\x9b", "\u202e", "\x07", "\r")


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("field", ["classes", "keys", "study", "onnx"])
def test_check_prints_no_control_character(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, as_json: bool
) -> None:
    text = "".join(CONTROLS)
    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        "classes": lambda p: p["network"]["classes"].__setitem__(0, text),
        "keys": lambda p: p["network"].update({text: 1}),
        "study": lambda p: p["provenance"].update(study=text),
        "onnx": lambda p: None,
    }
    folder = copied(tmp_path / "pick", changes[field])
    if field == "onnx":
        model = onnx.load_model_from_string((folder / "model.onnx").read_bytes())
        model.graph.node[-1].op_type = text
        (folder / "model.onnx").write_bytes(model.SerializeToString())
    assert cli.run(["check", str(folder), *(["--json"] if as_json else [])]) == 1
    shown = "".join(capsys.readouterr())
    assert len(shown) > 100
    assert not set(shown) & set(CONTROLS)


@pytest.mark.parametrize("where", ["level", "node", "domain"])
def test_verify_prints_no_control_character(tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str) -> None:
    text = "".join(CONTROLS)
    model = onnx.load_model_from_string((EARLIER / "model.onnx").read_bytes())
    if where == "level":
        changed_metadata(model, "cactus_ray.level", text)
    elif where == "node":
        model.graph.node[-1].op_type = text
    else:
        changed_metadata(model, "cactus_ray.domain", text)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    status = cli.run(["verify", str(tmp_path / "model.onnx"), "--epsilon", "0.01", "--samples", "2"])
    assert status == (0 if where == "level" else 2)
    shown = "".join(capsys.readouterr())
    assert shown
    assert not set(shown) & set(CONTROLS)


def test_a_written_certificate_reads_back(plain: dict[str, Any]) -> None:
    document = from_json(json.dumps(plain))
    assert from_json(to_json(document)) == document
