"""The estimate of a verification's work grows with what makes it longer, and comes from the header of a file alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cactus_ray.compression.size import macs, macs_of
from cactus_ray.config import RunConfig, parse
from cactus_ray.errors import UserError
from cactus_ray.models import create
from cactus_ray.models.network import Network, outline, save
from cactus_ray.verification.cost import CPU_PACE, GPU_PACE, UNKNOWN, cost_of, cost_of_file, pace
from cactus_ray.verification.verdict import VerificationSettings

CROWN = VerificationSettings(bound="crown")


def network(name: str, shape: tuple[int, int, int]) -> Network:
    config = parse(
        RunConfig,
        {"data": {"name": "digits"}, "model": {"name": name}, "threat": {"epsilon": 0.1}, "method": "ibp"},
    )
    return create(config, shape, 10, tuple(map(str, range(10))), False)


@pytest.fixture(scope="module")
def small() -> Network:
    return network("cnn_small", (1, 8, 8))


def test_without_bounds_and_attacks_only_interval_passes_are_left(small: Network) -> None:
    bare = VerificationSettings(bound="ibp", attack_steps=0)
    assert cost_of(small.graph, small.params, bare).cheap == 4.0 * macs(small.graph, small.params)


def test_crown_counts_unstable_neurons_times_the_layers_below(small: Network) -> None:
    settings = replace(CROWN, attack_steps=0)
    forward = macs_of(small.graph, small.params)
    first, second, third = list(forward.values())[:3]
    shapes = small.graph.shapes(small.params)
    neurons = [torch.Size(shapes[name]).numel() for name in forward]
    # the first layer's interval bounds are exact; the last one is the output, of 10 classes
    rows = 0.2 * neurons[1] * (first + second) + 0.2 * neurons[2] * (first + second + third)
    total = sum(forward.values())
    assert cost_of(small.graph, small.params, settings).cheap == pytest.approx(4.0 * total + 2.0 * (rows + 10 * total))
    few = replace(settings, intermediate_rows=1)
    assert cost_of(small.graph, small.params, few).cheap < cost_of(small.graph, small.params, settings).cheap


def test_more_work_costs_more(small: Network) -> None:
    def cost(**changes: object) -> tuple[float, float]:
        found = cost_of(small.graph, small.params, replace(CROWN, **changes))
        return found.cheap, found.dear

    assert cost(bound="ibp")[0] < cost()[0] < cost(attack_steps=80)[0] < cost(attack_steps=80, restarts=2)[0]
    assert cost(targeted_runs=0)[0] < cost()[0]
    assert cost(bound="alpha")[0] == cost()[0]  # alpha is of the dear stage
    assert cost()[1] < cost(bound="alpha")[1] < cost(bound="alpha", alpha_iterations=40)[1]
    large = network("cnn_small", (3, 32, 32))
    assert cost_of(large.graph, large.params, CROWN).cheap > 10 * cost()[0]


def test_the_header_of_a_file_is_enough(small: Network, tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    save(small, path)
    expected = cost_of(small.graph, small.params, CROWN)
    assert cost_of_file(path, CROWN) == expected
    graph, params = outline(path)
    assert graph == small.graph
    assert {name: tuple(p.shape) for name, p in params.items()} == {n: tuple(p.shape) for n, p in small.params.items()}
    assert {p.device.type for p in params.values()} == {"meta"}
    length = int.from_bytes(path.read_bytes()[:8], "little")
    path.write_bytes(path.read_bytes()[: 8 + length])
    assert cost_of_file(path, CROWN) == expected


@pytest.mark.parametrize(
    "content", [None, b"", b"12345678", (1 << 40).to_bytes(8, "little"), b"\x02" + bytes(7) + b"{}"]
)
def test_what_is_no_network_file_costs_nothing_that_is_known(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "network.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"network.safetensors: not a network file"):
        outline(path)
    assert cost_of_file(path, CROWN) == UNKNOWN


def test_a_gpu_is_taken_to_be_faster() -> None:
    assert (pace(True), pace(False)) == (GPU_PACE, CPU_PACE)
    assert GPU_PACE > CPU_PACE
