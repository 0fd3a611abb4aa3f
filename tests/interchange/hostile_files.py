"""ONNX files that could end or stall a process, and a script that gives each to the command line in a child of its own.

``python hostile_files.py FOLDER`` prints, by case, the exit status (negative: ended by that signal) and what was shown.
"""

import json
import os
import resource
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cactus_ray import cli

EARLIER = Path(__file__).parents[1] / "deploy" / "earlier"
SECONDS = 60
"""Of processor time, after which a child counts as stalled and is killed; what is refused takes milliseconds."""
WEIGHT = np.full((10, 64), 0.01, np.float32)
LEAST = -(2**63)


def node(op: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), list(outputs), name=f"the {op}", **attributes)


def layers(image: str = "x", weight: str = "W") -> list[onnx.NodeProto]:
    return [node("Flatten", [image], "flat"), node("Gemm", ["flat", weight], "y", transB=1)]


def added(name: str) -> list[onnx.NodeProto]:
    """The layers, with an integer constant added to their weight."""
    cast = node("Cast", [name], "number", to=TensorProto.FLOAT)
    return [cast, node("Add", ["W", "number"], "V"), *layers(weight="V")]


def model(nodes: Sequence[onnx.NodeProto], constants: dict[str, Any]) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes), "hostile",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in ({"W": WEIGHT} | constants).items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def divided(op: str, dividend: Any, divisor: Any, **attributes: Any) -> onnx.ModelProto:
    return model([node(op, ["a", "b"], "c", **attributes), *added("c")], {"a": dividend, "b": divisor})


def computed_divisor() -> onnx.ModelProto:
    nodes = [node("Neg", ["one"], "b"), node("Div", ["a", "b"], "c"), *added("c")]
    return model(nodes, {"a": np.array([LEAST]), "one": np.array([1])})


def divisor_in_a_node() -> onnx.ModelProto:
    value = numpy_helper.from_array(np.array([-1]))
    nodes = [node("Constant", [], "b", value=value), node("Mod", ["a", "b"], "c"), *added("c")]
    return model(nodes, {"a": np.array([LEAST])})


def reduced(nodes: Sequence[onnx.NodeProto], last: str, **constants: Any) -> onnx.ModelProto:
    """The sum of a constant that these nodes compute, added to the weight."""
    return model([*nodes, node("ReduceSum", [last], "c", keepdims=0), *added("c")], constants)


def with_branches() -> onnx.ModelProto:
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Identity", ["W"], [name])], name, [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [10, 64])],
        )
        for name in ("then", "else")
    }  # fmt: skip
    return model([node("If", ["yes"], "V", **branches), *layers(weight="V")], {"yes": np.array(True)})


def nested(depth: int) -> bytes:
    """Branches within branches, deeper than a parser goes; joined by hand, because no library builds such a file."""

    def field(number: int, content: bytes) -> bytes:
        length, size = len(content), b""
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + content

    body = b""
    for _ in range(depth):  # a graph of one node with one attribute, which is the graph before
        attribute = (
            field(1, b"then_branch") + field(6, body) + bytes([20 << 3 & 127 | 128, 1, onnx.AttributeProto.GRAPH])
        )
        body = field(1, field(2, b"o") + field(4, b"If") + field(5, attribute))
    return model(layers(), {}).SerializeToString() + field(7, body)


def stored_outside() -> onnx.ModelProto:
    found = model(layers(), {})
    tensor = found.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../etc/passwd")
    return found


def large_maps() -> onnx.ModelProto:
    """Maps of 1,600 numbers each, one after the other."""
    conv = node("Conv", ["x", "K"], "m", pads=[17] * 4)
    nodes = [conv, *chain(40, "m"), node("GlobalAveragePool", ["r39"], "g")]
    return model([*nodes, node("Flatten", ["g"], "flat"), node("Gemm", ["flat", "U"], "y", transB=1)], {
        "K": np.ones((1, 1, 3, 3), np.float32), "U": np.ones((10, 1), np.float32),
    })  # fmt: skip


def chain(length: int, first: str = "x") -> list[onnx.NodeProto]:
    return [node("Relu", [first if i == 0 else f"r{i - 1}"], f"r{i}") for i in range(length)]


NO_STRIDE = node("MaxPool", ["x"], "p", kernel_shape=[2, 2], strides=[0, 0], auto_pad="SAME_UPPER")
SQUARE = np.array([2**14, 2**14])
_CASES: dict[str, tuple[onnx.ModelProto | bytes, str]] = {
    "the least integer by -1": (divided("Div", np.array([LEAST]), np.array([-1])), "'the Div'"),
    "the least int32 by -1": (divided("Div", np.array([-(2**31)], np.int32), np.array([-1], np.int32)), "'the Div'"),
    "division by zero": (divided("Div", np.arange(64), np.arange(64)), "'the Div'"),
    "bytes by zero": (divided("Div", np.array([1], np.uint8), np.array([0], np.uint8)), "'the Div'"),
    "the least integer modulo -1": (divided("Mod", np.array([LEAST]), np.array([-1])), "'the Mod'"),
    "fmod": (divided("Mod", np.array([LEAST]), np.array([0]), fmod=1), "'the Mod'"),
    "a divisor that is computed": (computed_divisor(), "'the Div'"),
    "a divisor in a node": (divisor_in_a_node(), "'the Mod'"),
    "too many elements": (
        reduced([node("ConstantOfShape", ["s"], "A")], "A", s=np.array([2**20, 2**20])), "'the ConstantOfShape'"
    ),
    "too many bytes together": (
        reduced(
            [node("ConstantOfShape", ["s"], "A0"), *(node("Neg", [f"A{i}"], f"A{i + 1}") for i in range(9))], "A9",
            s=np.array([2**27]),
        ),
        "'the Neg'",
    ),
    "products without end": (
        reduced([node("ConstantOfShape", ["s"], "A"), node("MatMul", ["A", "A"], "B")], "B", s=SQUARE), "'the MatMul'"
    ),
    "a size that is computed": (
        reduced([node("Neg", ["s"], "t"), node("ConstantOfShape", ["t"], "A")], "A", s=-SQUARE), "'the ConstantOfShape'"
    ),
    "copies": (reduced([node("Tile", ["W", "s"], "A")], "A", s=np.array([2**20, 2**20])), "'the Tile'"),
    "a broadcast": (reduced([node("Expand", ["one", "s"], "A")], "A", s=np.array([2**40]), one=np.float32(1)),
                    "'the Expand'"),
    "branches": (with_branches(), "'the If'"),
    "branches within branches": (nested(60), ""),
    "a file outside": (stored_outside(), "'W'"),
    "stride 0": (model([NO_STRIDE, *layers("p")], {}), "'the MaxPool'"),
    "too many nodes": (model([*chain(30_000), *layers("r29999")], {}), "30002 nodes"),
}  # fmt: skip
CASES = {k: (v if isinstance(v, bytes) else v.SerializeToString(), named) for k, (v, named) in _CASES.items()}
"""By name: the file, and what the message must name."""
_HARMLESS = {
    "positive divisors": divided("Div", -np.arange(64), np.arange(1, 65)),
    "floating-point numbers": divided("Div", np.float32([1.0]), np.float32([-1.0])),
    "a division that nothing reads": model(
        [node("Div", ["a", "b"], "c"), *layers()], {"a": np.array([LEAST]), "b": np.array([-1])}
    ),
    "a large constant that nothing reads": model(
        [node("ConstantOfShape", ["s"], "A"), *layers()], {"s": np.array([2**20, 2**20])}
    ),
}
HARMLESS = {k: v.SerializeToString() for k, v in _HARMLESS.items()}


def in_a_child(arguments: list[str], shown: Path) -> tuple[int, str]:
    """Exit status of the command line, and what it wrote to stderr and stdout."""
    child = os.fork()
    if child == 0:
        status = 70  # a traceback
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            with shown.open("w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            status = cli.run(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), shown.read_text()


def main(folder: Path) -> None:
    # loaded once, before the children; torch starts no threads by that
    import torch

    import cactus_ray.commands.single
    import cactus_ray.deploy.recheck  # noqa: F401
    from cactus_ray.config import DataConfig
    from cactus_ray.data import load

    torch.set_num_threads(1)
    load(DataConfig(name="digits"), ("test",))
    found: dict[str, tuple[int, str]] = {}
    path, shown = folder / "model.onnx", folder / "shown.txt"
    path.write_bytes(b"nothing")
    cli.run(["verify", str(path)])  # is refused; loads what the children need
    verify = ["verify", str(path), "--data", "digits", "--epsilon", "0.01", "--samples", "1"]
    for name, data in ({k: v for k, (v, _) in CASES.items()} | HARMLESS).items():
        path.write_bytes(data)
        found[name] = in_a_child(verify, shown)
    picked = Path(shutil.copytree(EARLIER, folder / "picked"))
    (picked / "model.onnx").write_bytes(CASES["the least integer by -1"][0])
    found["check"] = in_a_child(["check", str(picked)], shown)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
