"""What the files of a pick say of themselves: nothing but what ``pick`` writes, and that as the certificate has it.

Texts in a file are read by people and by other tools, so a forger's would pass for ours. A file from elsewhere may
carry its own texts; a file with a certificate must not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import onnx
from onnx import TensorProto, helper

from cactus_ray.bounds.graph import Graph
from cactus_ray.deploy.document import Document
from cactus_ray.interchange.nodes import INPUT, OUTPUT
from cactus_ray.interchange.write import normalization
from cactus_ray.models.network import Network, is_plain, metadata
from cactus_ray.texts import visible

LONGEST = 255
"""Characters of a name inside a file."""
KEYS = {"format", "graph", "config", "class_names", "provenance"}
"""Of the header of a network's file."""
STRINGS = {"direction": b"RIGHT", "reduction": b"add"}
"""Attributes that are texts, in files that we write."""


def onnx_labels(content: bytes, document: Document, graph: Graph) -> list[str]:
    """Where model.onnx, which has been read as ``graph``, says anything that the certificate does not."""
    model = onnx.load_model_from_string(content)
    found = _metadata(model, document, graph)
    found += [
        f"{place} is {_short(text)}; pick writes {meant!r}" for place, text, meant in _texts(model) if text != meant
    ]
    found += [
        f"the {kind} name {_short(name)} is no printable text of at most {LONGEST} characters"
        for kind, name in _names(model)
        if visible(name) != name or len(name) > LONGEST
    ]
    found += [f"{place} is there; pick writes none" for place in _foreign(model)]
    classes = len(document.network.classes)
    ends = (
        ("input", list(model.graph.input), INPUT, [*document.network.inputs.shape]),
        ("output", list(model.graph.output), OUTPUT, [classes]),
    )
    for what, stated, name, shape in ends:
        if stated != [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape])]:
            found.append(
                f"its {what} is not described as pick does: {name!r}, float32, [N, {', '.join(map(str, shape))}]"
            )
    if not found and model.SerializeToString(deterministic=True) != content:
        found.append("holds bytes that are no part of the network")
    if not found and (known := _without_unknown(model)) != content:
        found.append(f"holds {len(content) - len(known)} bytes that ONNX does not know")
    return found


def _metadata(model: onnx.ModelProto, document: Document, graph: Graph) -> list[str]:
    """Where the file describes itself otherwise than the certificate, or with other keys than ``pick`` writes."""
    expected: dict[str, object] = {
        "cactus_ray.level": document.network.level,
        "cactus_ray.data": document.data.name,
        "cactus_ray.class_names": list(document.network.classes),
        "cactus_ray.domain": list(document.threat.domain),
        "cactus_ray.input": document.network.inputs.layout,
        "cactus_ray.normalization": normalization(graph),
    }
    stated = {entry.key: entry.value for entry in model.metadata_props}
    found = []
    for key, meant in expected.items():
        text = stated.get(key)
        value = _plain(text) if text is not None and isinstance(meant, list) else text
        if value != meant:
            found.append(f"its metadata {key} is {_short(value)}; the certificate says {_short(meant)}")
    keys = [entry.key for entry in model.metadata_props]
    found += [f"its metadata hold {_short(key)}, which pick does not write" for key in keys if key not in expected]
    found += [f"its metadata hold {key} twice" for key in expected if keys.count(key) > 1]
    return found


def _texts(model: onnx.ModelProto) -> Iterator[tuple[str, str, str]]:
    """Every free text that is not a name: where it stands, what it is, and what ``pick`` writes there."""
    yield "its producer_name", model.producer_name, "cactus_ray"
    yield "its producer_version", model.producer_version, ""
    yield "its domain", model.domain, ""
    yield "its graph's name", model.graph.name, "cactus_ray"
    yield "its doc_string", model.doc_string, ""
    yield "its graph's doc_string", model.graph.doc_string, ""
    for node in model.graph.node:
        yield f"the doc_string of {_short(node.op_type)}", node.doc_string, ""
        for attribute in node.attribute:
            yield f"the doc_string of attribute {_short(attribute.name)}", attribute.doc_string, ""
            yield f"the doc_string in attribute {_short(attribute.name)}", attribute.t.doc_string, ""
            if attribute.type == onnx.AttributeProto.STRING:
                meant = STRINGS.get(attribute.name, b"")
                yield f"attribute {_short(attribute.name)}", repr(attribute.s), repr(meant)
    for tensor in model.graph.initializer:
        yield f"the doc_string of tensor {_short(tensor.name)}", tensor.doc_string, ""


def _names(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    for node in model.graph.node:
        yield "node", node.name
        yield from (("value", name) for name in node.output)
    yield from (("tensor", tensor.name) for tensor in model.graph.initializer)


def _foreign(model: onnx.ModelProto) -> Iterator[str]:
    """Parts of a file that ``pick`` never writes."""
    graph = model.graph
    parts: dict[str, Any] = {
        "training_info": model.training_info, "functions": model.functions,
        "metadata of its graph": graph.metadata_props, "value_info": graph.value_info,
        "quantization_annotation": graph.quantization_annotation, "a sparse tensor": graph.sparse_initializer,
        "metadata of a node": [p for node in graph.node for p in node.metadata_props],
        "an attribute that refers to another": [a for n in graph.node for a in n.attribute if a.ref_attr_name],
        "an attribute of several texts or of a type": [
            a for n in graph.node for a in n.attribute if len(a.strings) or len(a.type_protos) or a.HasField("tp")
        ],
        "a domain of operators": [o for o in model.opset_import if o.domain],
        "the place of a file": [t for t in graph.initializer if len(t.external_data)],
        "metadata of a tensor": [p for tensor in graph.initializer for p in tensor.metadata_props],
    }  # fmt: skip
    yield from (name for name, entries in parts.items() if len(entries))
    read = {name for node in graph.node for name in node.input}
    yield from (f"tensor {_short(t.name)}, which nothing reads," for t in graph.initializer if t.name not in read)
    read |= {value.name for value in graph.output}
    for node in graph.node:
        if not read & set(node.output):
            yield f"operator {_short(node.op_type)}, whose result nothing reads,"


def _without_unknown(model: onnx.ModelProto) -> bytes:
    """The file without fields that ONNX's format does not have, in which anything could stand."""
    model.DiscardUnknownFields()
    return bytes(model.SerializeToString(deterministic=True))


def network_labels(network: Network, content: bytes, document: Document) -> list[str]:
    """Where model.safetensors, which has been read as ``network``, says anything that the certificate does not.

    One without class names and provenance is a network of nowhere, which is no contradiction.
    """
    found = []
    if network.class_names not in ((), document.network.classes):
        stated = _short(list(network.class_names))
        found.append(f"its class names are {stated}; the certificate says {_short(list(document.network.classes))}")
    expected = {"level": document.network.level, "trial": document.provenance.trial}
    for key, value in network.provenance.items():
        if key not in expected:
            found.append(f"its provenance holds {_short(key)}, which pick does not write")
        elif value != expected[key]:
            found.append(f"its provenance.{key} is {_short(value)}; the certificate says {expected[key]!r}")
    header = metadata(content)
    found += [f"its header holds {_short(key)}, which pick does not write" for key in sorted(header.keys() - KEYS)]
    for key in sorted(header.keys() & KEYS - {"format"}):
        if json.dumps(_plain(header[key]), sort_keys=True) != header[key]:
            found.append(f"its header's {key} holds more than its value")
    if not found and not is_plain(content):
        found.append("holds bytes that are no part of the network")
    return found


def _plain(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + "..."
