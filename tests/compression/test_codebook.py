"""Codebooks: clusters of a tensor's values around a fixed zero."""

import compressible
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cactus_ray.compression.codebook import cluster
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import materialize
from cactus_ray.compression.size import ideal_bits


def sample(seed: int, count: int, zeros: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) * torch.logspace(-3, 0, count)
    return values * (torch.rand(count, generator=generator) > zeros)


@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 300),
    bits=st.integers(1, 8),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(max_examples=80, deadline=None)
def test_every_value_has_its_nearest_centre_and_zero_is_one(seed: int, count: int, bits: int, zeros: float) -> None:
    values = sample(seed, count, zeros).view(1, -1)
    places, table = cluster(values, bits)
    assert (places.shape, places.dtype, table.shape) == (values.shape, torch.uint8, (2**bits,))
    assert table[0] == 0
    found = table[places.int()]
    assert bool((found[values == 0] == 0).all())
    assert bool((places[found == 0] == 0).all())  # so that sparse storage finds all zeros
    distances = (values.double()[..., None] - table).abs().amin(-1)
    torch.testing.assert_close((values.double() - found).abs(), distances, rtol=1e-12, atol=1e-15)


def test_lloyd_by_hand() -> None:
    values = torch.tensor([-1.0, -0.9, 0.0, 0.01, 0.4, 0.5, 2.0])
    places, table = cluster(values, 2)
    assert table.tolist() == pytest.approx([0.0, -0.95, 0.45, 2.0], abs=1e-7)
    assert places.tolist() == [1, 1, 0, 0, 2, 2, 3]


def test_few_values_stand_for_themselves() -> None:
    values = torch.tensor([[0.25, -3.0, 0.0], [1e-6, 0.25, -3.0]])
    places, table = cluster(values, 2)
    assert torch.equal(table[places.int()].float(), values)


def test_more_clusters_are_closer() -> None:
    values = sample(0, 2000, 0.0)
    errors = []
    for bits in range(1, 9):
        places, table = cluster(values, bits)
        errors.append(float((table[places.int()] - values).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.06 * errors[0]


def test_bits_out_of_range() -> None:
    with pytest.raises(ValueError, match="bits = 9"):
        cluster(torch.ones(3), 9)


@pytest.mark.parametrize("kind", ["cnn", "residual"])
def test_the_level_shares_values_and_keeps_zeros(kind: str) -> None:
    graph, params = compressible.network(kind, dtype=torch.float32)
    pruned = materialize(graph, params, parse_level("prune:gu-l1:0.6"))
    found = materialize(graph, params, parse_level("prune:gu-l1:0.6+codebook:3"))
    for node in found.graph.weighted():
        name = f"{node.name}.weight"
        weight = found.params[name]
        assert len(weight.unique()) <= 8
        assert bool((weight[pruned.params[name] == 0] == 0).all())
    assert ideal_bits(found) < ideal_bits(pruned)
