"""The state of a run between two epochs as one safetensors file, from which training goes on bit by bit the same.

No generator states are kept, because none lives longer than an epoch: each is derived from (seed, epoch, purpose).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.errors import UserError

FORMAT = "cactus-ray-training-1"

Moments = dict[str, dict[str, Tensor]]
"""State of the optimiser: parameter name -> key -> tensor."""


@dataclass(frozen=True, slots=True)
class State:
    """Everything that the next epoch depends on.

    ``epoch``: epochs done. ``best``/``best_score``: the best network so far, None before the ramp has ended.
    ``history``: the metrics of every epoch. ``config_hash``: of the run that wrote it. ``average``: of the weights of
    ``averages`` networks, empty where nothing is averaged (yet). ``stage``: of the method, in which the last epoch was;
    ``auxiliary``: the method's own tensors (``stages.Stage``). ``frozen``: names of tensors that are not trained.
    """

    config_hash: str
    graph: Graph
    epoch: int
    params: Params
    moments: Moments
    best: Params | None
    best_score: tuple[float, float] | None
    history: list[dict[str, float]]
    average: Params = field(default_factory=dict)
    averages: int = 0
    stage: str = ""
    auxiliary: Params = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()


def pack_state(state: State) -> bytes:
    """The state as the bytes of a safetensors file. Deterministic."""
    import safetensors.torch

    tensors = {f"params/{k}": v for k, v in state.params.items()}
    tensors |= {f"best/{k}": v for k, v in (state.best or {}).items()}
    tensors |= {f"average/{k}": v for k, v in state.average.items()}
    tensors |= {f"auxiliary/{k}": v for k, v in state.auxiliary.items()}
    tensors |= {f"optimizer/{k}/{key}": v for k, values in state.moments.items() for key, v in values.items()}
    header = {
        "format": FORMAT,
        "config_hash": state.config_hash,
        "graph": json.dumps(state.graph.to_json(), sort_keys=True),
        "epoch": str(state.epoch),
        "best_score": json.dumps(state.best_score),
        "history": json.dumps(state.history),
        "averages": str(state.averages),
        "stage": state.stage,
        "frozen": json.dumps(sorted(state.frozen)),
    }
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in sorted(tensors.items())}
    data: bytes = safetensors.torch.save(plain, metadata=header)
    return data


def unpack_state(data: bytes, source: str = "training state") -> State:
    """Inverse of ``pack_state``. Raises UserError, naming ``source``, for anything that is not such a file."""
    import safetensors
    import safetensors.torch

    try:
        length = int.from_bytes(data[:8], "little")
        header: dict[str, Any] = json.loads(data[8 : 8 + length])["__metadata__"]
        if header["format"] != FORMAT:
            raise UserError(f"{source}: format {header['format']!r}; expected {FORMAT!r}")
        tensors = safetensors.torch.load(data)
        moments: Moments = {}
        for name in sorted(k for k in tensors if k.startswith("optimizer/")):
            parameter, _, key = name.removeprefix("optimizer/").rpartition("/")
            moments.setdefault(parameter, {})[key] = tensors[name]
        score = json.loads(header["best_score"])
        return State(
            config_hash=header["config_hash"],
            graph=Graph.from_json(json.loads(header["graph"])),
            epoch=int(header["epoch"]),
            params=_under("params/", tensors),
            moments=moments,
            best=_under("best/", tensors) or None,
            best_score=None if score is None else (score[0], score[1]),
            history=json.loads(header["history"]),
            average=_under("average/", tensors),
            averages=int(header.get("averages", "0")),
            stage=header.get("stage", ""),
            auxiliary=_under("auxiliary/", tensors),
            frozen=frozenset(json.loads(header.get("frozen", "[]"))),
        )
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{source}: not a training state written by cactus-ray ({error})") from error


def generator_for(seed: int, epoch: int, purpose: str, device: str = "cpu") -> torch.Generator:
    """A generator that depends on its arguments only; different purposes and epochs are independent."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _under(prefix: str, tensors: dict[str, Tensor]) -> Params:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
