"""CROWN: tightness, exactness, independence of chunks and windows, behaviour on NaN."""

import pytest
import torch
from containment import DOMAIN
from small_networks import KINDS, SHAPE, network, randomize
from torch import Tensor, nn

from cactus_ray.bounds import interval, linear
from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.linear import Effort, crown_margins, intermediate_boxes
from cactus_ray.bounds.rows import Rows, unit_rows
from cactus_ray.bounds.trace import trace


def case(kind: str, seed: int = 0, epsilon: float = 0.1, count: int = 4) -> tuple[Graph, Params, Box, Tensor]:
    structure, params = network(kind, seed)
    images = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return structure, params, interval.ball(images, epsilon, DOMAIN), torch.arange(count) % 3


def alone(structure: Graph, params: Params, box: Box, labels: Tensor, effort: Effort = linear.FULL_EFFORT) -> Tensor:
    """CROWN's margins without interval's."""
    nothing = torch.full((len(labels), 3), -torch.inf, dtype=box.center.dtype).scatter(1, labels[:, None], 0.0)
    return crown_margins(structure, params, box, labels, known=nothing, effort=effort)


@pytest.mark.parametrize("kind", KINDS)
def test_never_looser_than_ibp_and_tighter_on_average(kind: str) -> None:
    structure, params, box, labels = case(kind, epsilon=0.05)
    ibp = interval.margins(structure, params, box, labels)
    crown = crown_margins(structure, params, box, labels)
    assert bool((crown >= ibp).all())
    assert float(crown.mean()) > float(ibp.mean())
    over_ibp = crown_margins(structure, params, box, labels, effort=Effort(intermediate="ibp"))
    assert float(crown.mean()) >= float(over_ibp.mean()) - 1e-12


def test_exact_on_a_linear_network() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 3))
    structure, params = trace(module, SHAPE)
    params = randomize(params, 0)
    box = interval.ball(torch.full((1, *SHAPE), 0.4, dtype=torch.float64), 0.1, DOMAIN)
    labels = torch.tensor([1])
    basis = torch.eye(72, dtype=torch.float64).view(72, *SHAPE)
    offset = forward(structure, params, torch.zeros(1, *SHAPE, dtype=torch.float64))
    matrix = forward(structure, params, basis) - offset  # the network as a matrix [inputs, classes]
    difference = matrix[:, 1:2] - matrix
    center = box.center.flatten() @ difference + offset[0, 1] - offset[0]
    exact = center - box.radius.flatten() @ difference.abs()
    torch.testing.assert_close(alone(structure, params, box, labels)[0], exact)


@pytest.mark.parametrize("kind", ["deep conv", "conv on conv", "all options", "residual", "overlapping max pool"])
def test_windows_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    structure, params, box, labels = case(kind)
    windows = intermediate_boxes(structure, params, box)
    bounds = alone(structure, params, box, labels)
    monkeypatch.setattr(linear, "unit_rows", lambda index, shape, dtype: unit_rows(index, shape, dtype).dense(shape))
    dense = intermediate_boxes(structure, params, box)
    for name, expected in dense.items():
        torch.testing.assert_close(windows[name].lower, expected.lower, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(windows[name].upper, expected.upper, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(bounds, alone(structure, params, box, labels), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["deep conv", "residual", "mlp"])
def test_a_sample_does_not_depend_on_its_neighbours_or_on_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    structure, params, box, labels = case(kind, count=5)
    together = alone(structure, params, box, labels)
    single = [
        alone(structure, params, Box(box.center[i, None], box.radius[i, None]), labels[i, None]) for i in range(5)
    ]
    torch.testing.assert_close(torch.cat(single), together, rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(linear, "LEAST_ROWS", 3)
    chunked = alone(structure, params, box, labels, Effort(memory=1))
    torch.testing.assert_close(chunked, together, rtol=1e-10, atol=1e-10)


def test_a_row_budget_loosens_only() -> None:
    structure, params, box, labels = case("deep conv")
    means = [float(alone(structure, params, box, labels, Effort(rows=rows)).mean()) for rows in (0, 10, 10_000)]
    assert means[0] < means[1] < means[2]
    over_ibp = alone(structure, params, box, labels, Effort(intermediate="ibp"))
    torch.testing.assert_close(alone(structure, params, box, labels, Effort(rows=0)), over_ibp)
    late = alone(structure, params, box, labels, Effort(deadline=0.0))
    torch.testing.assert_close(late, over_ibp)


def test_only_open_classes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    structure, params, box, labels = case("mlp", count=2)
    seen: list[tuple[int, ...]] = []
    true = linear.Relaxed.lower_bounds

    def watch(relaxed: linear.Relaxed, rows: Rows) -> Tensor:
        if relaxed.last == structure.output.name:
            seen.append(tuple(rows.coefficients.shape))
        return true(relaxed, rows)

    monkeypatch.setattr(linear.Relaxed, "lower_bounds", watch)
    known = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 3.0]], dtype=torch.float64)  # labels 0 and 1
    found = crown_margins(structure, params, box, labels, known=known)
    assert seen == [(1, 1, 3)]
    assert found[0, 1] == 1.0
    assert found[1].tolist() == [2.0, 0.0, 3.0]
    assert found[0, 2] >= -1.0


def test_nan_and_infinite_weights_prove_nothing() -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        for kind in ("mlp", "conv", "max pool"):
            structure, params, box, labels = case(kind)
            for name in params:
                broken = {k: v.clone() for k, v in params.items()}
                broken[name].view(-1)[0] = value
                lower = alone(structure, broken, box, labels)
                good = torch.isfinite(lower) & (lower > 0)
                assert not bool(good.scatter(1, labels[:, None], True).all(1).any()), (kind, name, value)


def test_an_empty_intersection_keeps_the_interval_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    structure, params, box, _ = case("mlp")
    monkeypatch.setattr(
        linear.Relaxed, "lower_bounds", lambda relaxed, rows: torch.full(rows.coefficients.shape[:2], 50.0).double()
    )
    found = intermediate_boxes(structure, params, box)
    ibp = intermediate_boxes(structure, params, box, Effort(intermediate="ibp"))
    for name in found:
        torch.testing.assert_close(found[name].lower, ibp[name].lower)
        torch.testing.assert_close(found[name].upper, ibp[name].upper)


class Broadcast(nn.Module):
    """A sum whose second term is one number per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Linear(72, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(torch.relu(x + self.pool(x)).flatten(1))


def test_sums_that_broadcast_and_linear_layers_on_maps() -> None:
    from containment import violations

    linear_on_maps = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(60, 3)
    )
    for module in (Broadcast(), linear_on_maps):
        structure, params = trace(module, SHAPE)
        params = randomize(params, 3)
        images = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert violations(structure, params, images, 0.1) == []
