"""The deployed file in onnxruntime, always in the same way: CPU, one thread, deterministic."""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from cactus_ray.errors import UserError
from cactus_ray.interchange.guard import runnable


def deployed_session(data: bytes, source: str = "model.onnx") -> onnxruntime.InferenceSession:
    """A session of a file from anywhere, as ``session``, but of what the guard lets through: see ``guard.runnable``.

    Its layers are not looked at: whoever opens a stranger's file reads it first (``read_onnx``).
    """
    return session(runnable(data, source), source)


def session(data: bytes, source: str = "model.onnx") -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU with one thread, of bytes that the guard has seen.

    Raises UserError, naming ``source``, for a broken file.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = 4  # what goes wrong is raised; onnxruntime would print it as well
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # onnxruntime's errors share no base class but this
        raise UserError(
            f"{source}: onnxruntime cannot load it ({_first_line(error)}); expected an ONNX file"
        ) from error


def run(
    running: onnxruntime.InferenceSession, inputs: dict[str, NDArray[np.float32]], source: str = "model.onnx"
) -> list[NDArray[np.float32]]:
    """All outputs for some inputs. Raises UserError where onnxruntime fails."""
    try:
        outputs: list[NDArray[np.float32]] = running.run(None, inputs)
    except Exception as error:  # as above
        raise UserError(f"{source}: onnxruntime cannot run it ({_first_line(error)})") from error
    return outputs


def logits(data: bytes, images: Tensor, *, batch: int = 256, source: str = "model.onnx") -> Tensor:
    """Logits float32 [N, classes] of images [N, C, H, W], computed by onnxruntime. Deterministic."""
    running = session(data, source)
    name = running.get_inputs()[0].name
    parts = [
        torch.from_numpy(run(running, {name: np.ascontiguousarray(images[i : i + batch].float().numpy())}, source)[0])
        for i in range(0, len(images), batch)
    ]
    return torch.cat(parts)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
