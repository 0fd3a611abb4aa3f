"""``cactus-ray verify MODEL.onnx --vnnlib SPEC``: one ONNX file and one specification, as VNN-COMP asks."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from cactus_ray.bounds.answers import possible_answers
from cactus_ray.bounds.graph import forward
from cactus_ray.bounds.quantizer import has_quantisers
from cactus_ray.errors import ConfigError, RunFailedError, UserError
from cactus_ray.interchange import run as runtime
from cactus_ray.interchange.read import OnnxNetwork, read_network
from cactus_ray.outputs import try_files, unwritable
from cactus_ray.verification.decide import Answer, decide
from cactus_ray.verification.vnnlib import read_vnnlib
from cactus_ray.verification.witness import ContradictionError

PARITY_TOLERANCE = 1e-3
"""As for deployed files: largest difference of an output between onnxruntime and our reading, relative to the largest
output (at least 1)."""


def verify_vnnlib(
    console: Console, model: Path, specification: Path, *, timeout: float, to: Path | None, as_json: bool
) -> None:
    """Decide and write the VNN-COMP result: sat (with the witness), unsat, unknown or timeout, also in ``to``.

    Raises UserError for bad input, RunFailedError where onnxruntime and our reading of the file differ or a bound is
    contradicted.
    """
    if model.suffix != ".onnx":
        raise UserError(f"{model}: --vnnlib reads an ONNX file; expected a name that ends in .onnx")
    if not timeout > 0:
        raise ConfigError("--timeout", timeout, "a number of seconds above 0")
    if to is not None:
        try_files(to, to)
    stated = read_vnnlib(specification)
    network = read_network(model)
    replay = Replayer(model, network)
    replay.agree()
    try:
        answer = decide(network.graph, network.params, stated, network.order, replay, timeout=timeout)
    except ContradictionError as error:
        raise RunFailedError(f"{model}: {error}") from error
    text = result_text(answer, network)
    if as_json:
        row = {"result": str(answer.result), "seconds": answer.seconds, "parts": answer.parts, "reason": answer.reason}
        console.print_json(json.dumps(row))
    else:
        console.print(text, highlight=False, markup=False, soft_wrap=True, end="")
    if to is not None:  # after the answer is shown: it is not lost with the file
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(text)
        except OSError as error:
            raise unwritable(to, error) from error


class Replayer:
    """The file in one onnxruntime session, one sample at a time, whatever its input's shape."""

    def __init__(self, model: Path, network: OnnxNetwork) -> None:
        self.session = runtime.deployed_session(model.read_bytes(), str(model))
        self.name = self.session.get_inputs()[0].name
        self.source, self.network = str(model), network

    def __call__(self, points: Tensor) -> Tensor:
        """Outputs float32 [N, K] of points [N, *graph.input_shape]."""
        values = self.network.to_file(points.float())
        outputs = [
            runtime.run(self.session, {self.name: one.reshape(self.network.shape).numpy()}, self.source)[0]
            for one in values
        ]
        return torch.stack([torch.from_numpy(output).flatten() for output in outputs])

    def agree(self) -> None:
        """Raises RunFailedError where onnxruntime answers otherwise than our reading of the file."""
        generator = torch.Generator().manual_seed(0)
        points = torch.rand(4, *self.network.graph.input_shape, generator=generator) * 2 - 0.5
        ours = forward(self.network.graph, self.network.params, points.double())
        theirs = self(points).double()
        difference = float((ours - theirs).abs().max())
        largest = max(1.0, float(ours.abs().max()))
        agreed = difference <= PARITY_TOLERANCE * largest
        if has_quantisers(self.network.graph):  # rounding may turn a code into its neighbour
            box = possible_answers(self.network.graph, self.network.params, points)
            agreed = bool(((theirs >= box.lower) & (theirs <= box.upper)).all())
        # outputs that are not finite prove nothing, but are no sign of a wrong reading
        if bool(torch.isfinite(theirs).all()) and not agreed:
            raise RunFailedError(
                f"{self.source}: onnxruntime and our reading of the file differ by {difference} in an output; expected"
                " at most rounding"
            )


def result_text(answer: Answer, network: OnnxNetwork) -> str:
    """The VNN-COMP result: the answer, and for sat on further lines ((X_0 value) ... (Y_0 value) ...)."""
    if answer.witness is None:
        return f"{answer.result}\n"
    inputs = network.to_file(answer.witness.inputs[None])[0].tolist()
    outputs = answer.witness.outputs.tolist()
    pairs = [f"(X_{i} {v!r})" for i, v in enumerate(inputs)] + [f"(Y_{j} {v!r})" for j, v in enumerate(outputs)]
    return f"{answer.result}\n(" + "\n".join(pairs) + ")\n"
