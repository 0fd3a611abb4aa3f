"""A trained network and its file: one safetensors file whose header holds the graph and the run as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.config import RunConfig, parse
from cactus_ray.errors import ConfigError, UserError

FORMAT = "cactus-ray-network-1"


@dataclass(frozen=True, slots=True)
class Network:
    """Graph, tensors (float32, CPU) and where they come from.

    ``config`` is None for a network that we did not train.
    """

    graph: Graph
    params: Params
    config: RunConfig | None = None
    class_names: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)


def pack(network: Network) -> bytes:
    """The network as the bytes of a safetensors file. Deterministic."""
    import safetensors.torch

    header = {
        "format": FORMAT,
        "graph": json.dumps(network.graph.to_json(), sort_keys=True),
        "config": json.dumps(network.config.to_dict() if network.config else None, sort_keys=True),
        "class_names": json.dumps(list(network.class_names)),
        "provenance": json.dumps(network.provenance, sort_keys=True),
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in sorted(network.params.items())}
    return _in_order(safetensors.torch.save(tensors, metadata=header))


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the library writes them in another order every time."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def unpack(data: bytes, source: str = "network") -> Network:
    """Inverse of ``pack``. Raises UserError, naming ``source``, for anything that is not such a file."""
    import safetensors
    import safetensors.torch

    try:
        header = metadata(data)
        tensors = safetensors.torch.load(data)
        if header["format"] != FORMAT:
            raise UserError(f"{source}: format {header['format']!r}; expected {FORMAT!r}")
        config = json.loads(header["config"])
        return Network(
            Graph.from_json(json.loads(header["graph"])),
            tensors,
            parse(RunConfig, config) if config is not None else None,
            tuple(json.loads(header["class_names"])),
            json.loads(header["provenance"]),
        )
    except (
        safetensors.SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError, ConfigError
    ) as error:  # fmt: skip
        raise UserError(f"{source}: not a network file written by cactus-ray ({error})") from error


def metadata(data: bytes) -> dict[str, str]:
    """The texts in the header of a network's file, by key. Raises KeyError or ValueError for another file."""
    length = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return found


def is_plain(data: bytes) -> bool:
    """Whether the header of a network's file holds nothing but its metadata and tensors, each once.

    Of the rest safetensors sees that it is tensors without a gap.
    """
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length]
    plain = json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False).encode()
    return text.startswith(plain) and text[len(plain) :] == b" " * (-len(plain) % 8)


def save(network: Network, path: Path) -> None:
    """Write the network's file; a crash leaves the old file or the new one, never a part."""
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(pack(network))
    partial.replace(path)


def load(path: Path) -> Network:
    """Read a network's file. Raises UserError where it is missing or broken."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a network file (.safetensors)") from error
    return unpack(data, str(path))


def outline(path: Path) -> tuple[Graph, Params]:
    """The graph of a network's file, and its tensors without data (device "meta"): only the header is read.

    Raises UserError where the file is missing or no network file.
    """
    import torch

    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= path.stat().st_size:
                raise ValueError("no header")
            header = json.loads(file.read(length))
        graph = Graph.from_json(json.loads(header.pop("__metadata__")["graph"]))
        return graph, {name: torch.empty(entry["shape"], device="meta") for name, entry in header.items()}
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: not a network file written by cactus-ray ({error})") from error
