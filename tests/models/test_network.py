"""A network as bytes: the same network is the same file."""

from __future__ import annotations

import torch

from cactus_ray.config import RunConfig, parse
from cactus_ray.models import create
from cactus_ray.models.network import pack, unpack


def test_the_same_network_is_the_same_file() -> None:
    plain = {"data": {"name": "digits"}, "model": {"name": "mlp", "hidden": [4]}, "threat": {"epsilon": 0.1}}
    config = parse(RunConfig, {**plain, "method": "ibp"})
    network = create(config, (1, 8, 8), 10, tuple("0123456789é"[:10]))
    files = {pack(network) for _ in range(12)}  # the library alone orders its metadata anew in every call
    assert len(files) == 1
    (file,) = files
    back = unpack(file)
    assert pack(back) == file
    assert back.config == config
    assert all(torch.equal(back.params[name], tensor) for name, tensor in network.params.items())
