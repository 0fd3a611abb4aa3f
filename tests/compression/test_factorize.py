"""Low rank plus sparse: the factors, and the whole numbers that a file holds of them."""

from dataclasses import replace

import compressible
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cactus_ray.bounds.graph import forward
from cactus_ray.compression.factorize import Factors, factorize, largest_entries, store
from cactus_ray.compression.levels import FACTOR_FORMATS, Level, parse_level
from cactus_ray.compression.materialize import materialize
from cactus_ray.compression.size import ideal_bits, macs
from cactus_ray.compression.stored import Factored, Stored


def planted(seed: int, rows: int = 20, columns: int = 30, rank: int = 2, spikes: int = 15) -> Tensor:
    """A matrix of the given rank with a few large entries added."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    sparse = torch.zeros(rows * columns)
    sparse[torch.randperm(rows * columns, generator=generator)[:spikes]] = 12.0
    return low + sparse.view(rows, columns)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_planted_split_is_found(transposed: bool) -> None:
    matrix = planted(0).T if transposed else planted(0)
    found = factorize({"w": matrix}, (2 * 50 + 15) / 600)["w"]
    assert found.left.shape[1] == 2
    assert int((found.sparse != 0).sum()) == 15
    assert float((found.matrix - matrix).abs().max()) < 0.05
    assert torch.equal(found.sparse != 0, (matrix - found.left @ found.right).abs() > 3)


@given(seed=st.integers(0, 1000), kept=st.floats(0.001, 1.0))
@settings(max_examples=25, deadline=None)
def test_the_budget_is_used_and_never_exceeded(seed: int, kept: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {"a": planted(seed), "b": 0.2 * torch.randn(6, 5, 3, 3, generator=generator)}
    found = factorize(weights, kept)
    budget = int(kept * (600 + 270) + 1e-9)
    count = sum(f.nonzeros for f in found.values())
    assert count <= budget
    error = sum(float((found[k].matrix - w.double().flatten(1)).square().sum()) for k, w in weights.items())
    total = sum(float(w.double().square().sum()) for w in weights.values())
    assert count == budget or error <= 1e-20 * total  # all residuals may be 0 before the budget is
    flat = torch.cat([w.double().flatten() for w in weights.values()]).abs().sort().values
    assert error <= float(flat[: len(flat) - budget].square().sum()) * (1 + 1e-9)  # no worse than pruning


def test_the_projection_keeps_the_largest() -> None:
    factors = {
        "w": Factors(torch.tensor([[3.0], [1.0]]), torch.tensor([[5.0, -2.0]]), torch.tensor([[0.0, 4.0], [0.5, 0.0]]))
    }
    found = largest_entries(factors, 3)["w"]
    assert (found.left.tolist(), found.right.tolist()) == ([[3.0], [0.0]], [[5.0, 0.0]])
    assert found.sparse.tolist() == [[0.0, 4.0], [0.0, 0.0]]
    assert largest_entries(factors, 99)["w"].nonzeros == factors["w"].nonzeros


@pytest.mark.parametrize("quantise", [None, *FACTOR_FORMATS])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_sum_of_a_weight_is_exact_in_any_order(seed: int, quantise: str | None) -> None:
    """A runtime forms the weight in float32 from products that it adds up as it likes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.logspace(-5, 1, 24, dtype=torch.float64)[:, None]
    left, right = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((24, 6), (6, 40)))
    sparse = torch.randn(24, 40, generator=generator, dtype=torch.float64)
    factors = Factors(rows * left, right, rows * sparse * (sparse.abs() > 1.5))
    stored = store(factors, (24, 40), Level(quantise=quantise))
    assert stored.left is not None
    assert stored.right is not None
    assert stored.sparse is not None
    multiples = stored.multiple.float()[:, None] * stored.sparse.tensor
    terms = stored.left.tensor[:, :, None] * stored.right.tensor[None]
    terms = torch.cat([terms, multiples[:, None]], 1)
    for _ in range(8):
        total = torch.zeros(24, 40)
        for index in torch.randperm(terms.shape[1], generator=generator).tolist():
            total = total + terms[:, index]
        assert torch.equal(total * stored.scale[:, None], stored.tensor)


def test_parts_whose_sums_would_round_are_refused() -> None:
    """The planted fault: with codes this wide, two orders of the sum give two weights."""
    left, right = torch.tensor([[8191.0, 1.0, -8191.0]]), torch.tensor([[4097.0], [1.0], [4097.0]])
    terms = left[0] * right[:, 0]
    assert (terms[0] + terms[1]) + terms[2] != (terms[0] + terms[2]) + terms[1]
    one = torch.ones(1, dtype=torch.float16)
    with pytest.raises(ValueError, match="expected whole numbers whose sums stay below"):
        Factored((1, 1), torch.ones(1), one, Stored("float32", left), Stored("float32", right), None)
    with pytest.raises(ValueError, match="whole numbers"):
        Factored((1, 1), torch.ones(1), one, None, None, Stored("float32", torch.tensor([[0.5]])))


@pytest.mark.parametrize(("quantise", "error"), [(None, 2e-3), ("int8", 2e-2), ("int4", 0.3), ("codebook:6", 0.1)])
def test_rounding_keeps_weights_close(quantise: str | None, error: float) -> None:
    weight = planted(3, 24, 40, 3, 60)
    factors = factorize({"w": weight}, 0.4)["w"]
    stored = store(factors, (24, 40), Level(quantise=quantise))
    assert float((stored.tensor - factors.matrix).norm() / factors.matrix.norm()) < error


@pytest.mark.parametrize("kind", list(compressible.KINDS))
def test_all_kept_is_the_network(kind: str) -> None:
    graph, params = compressible.network(kind, dtype=torch.float32)
    found = materialize(graph, params, parse_level("lr+sparse:1"))
    x = compressible.images(20, dtype=torch.float32)
    difference = (forward(found.graph, found.params, x) - forward(graph, params, x)).abs().max()
    assert difference < 0.01 * forward(graph, params, x).abs().max()


@pytest.mark.parametrize("text", ["lr+sparse:0.3", "lr+sparse:0.3+rebn+int8", "lr+sparse:0.3+codebook:4"])
def test_the_level_counts_its_parts(text: str) -> None:
    graph, params = compressible.network("batch norm", dtype=torch.float32)
    x = compressible.images(30, dtype=torch.float32)
    level = parse_level(text)
    found, again = (materialize(graph, params, level, (x, torch.arange(30) % 3)) for _ in range(2))
    total = sum(found.params[f"{n.name}.weight"].numel() for n in found.graph.weighted())
    stored = [found.stored[f"{n.name}.weight"] for n in found.graph.weighted()]
    assert all(isinstance(s, Factored) for s in stored)
    parts = [part for s in stored if isinstance(s, Factored) for part in s.parts.values()]
    assert sum(int((part.values != 0).sum()) for part in parts) <= 0.3 * total
    assert all(torch.equal(again.params[k], v) for k, v in found.params.items())
    assert ideal_bits(found) < 0.65 * ideal_bits(materialize(graph, params, parse_level("fp16")))
    assert macs(found.graph, found.params) == macs(graph, params)


def test_bits_by_hand() -> None:
    graph, params = compressible.network("mlp", dtype=torch.float32)
    found = materialize(graph, params, parse_level("lr+sparse:0.1"))
    name = f"{found.graph.weighted()[0].name}.weight"
    ones = torch.ones(9, 1, dtype=torch.float16), torch.ones(1, 72, dtype=torch.float16)
    left, right = (Stored("float16", values) for values in ones)
    weight = Factored((9, 72), torch.ones(9), torch.ones(9, dtype=torch.float16), left, right, None)
    without = replace(found, stored={k: v for k, v in found.stored.items() if k != name})
    difference = ideal_bits(replace(found, stored={**found.stored, name: weight})) - ideal_bits(without)
    assert difference == 16 * (9 + 72) + 32 * 9
