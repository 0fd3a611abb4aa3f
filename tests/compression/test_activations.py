"""Level w8a8: where quantisers stand, what they cover, and the integers of a layer."""

import compressible
import pytest
import torch
from torch import Tensor, nn

from cactus_ray.bounds.graph import Graph, Node, Params, forward
from cactus_ray.bounds.quantizer import input_scales
from cactus_ray.bounds.trace import trace
from cactus_ray.compression.activations import COVERED, place_quantisers
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import Compressed, materialize
from cactus_ray.compression.size import ideal_bits
from cactus_ray.errors import UnsupportedGraphError, UserError
from cactus_ray.models.fold import fold_batch_norm
from cactus_ray.models.normalize import Normalize

KINDS = list(compressible.KINDS)
LEVEL = parse_level("w8a8")


def made(kind: str, level: str = "w8a8", domain: tuple[float, float] = (0.0, 1.0)) -> Compressed:
    graph, params = compressible.network(kind, dtype=torch.float32)
    data = compressible.images(60, dtype=torch.float32), torch.arange(60) % 3
    return materialize(graph, params, parse_level(level), data, domain)


def quantisers(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op == "quantize"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_reads_codes_and_the_logits_are_not_rounded(kind: str) -> None:
    found = made(kind)
    assert set(input_scales(found.graph)) == {n.name for n in found.graph.weighted()}
    assert found.graph.output.op != "quantize"
    assert len({n.name for n in found.graph.nodes}) == len(found.graph.nodes)


@pytest.mark.parametrize("kind", KINDS)
def test_close_to_the_network_that_was_trained_and_deterministic(kind: str) -> None:
    graph, params = compressible.network(kind, dtype=torch.float32)
    images = compressible.images(60, dtype=torch.float32)
    found, again = made(kind), made(kind)
    expected = forward(graph, params, images)
    difference = (forward(found.graph, found.params, images) - expected).abs()
    assert 0 < float(difference.mean()) < 0.06 * float(expected.std())
    assert found.graph == again.graph
    assert all(torch.equal(a, again.params[k]) for k, a in found.params.items())


def test_where_quantisers_stand() -> None:
    graph, _ = fold_batch_norm(*compressible.network("residual", dtype=torch.float32))
    placed = place_quantisers(graph)
    assert {graph[n.inputs[0]].op for n in quantisers(placed)} >= {"input", "relu"}
    for node in placed.nodes:
        if node.op == "add":
            assert all(placed[i].op == "quantize" for i in node.inputs)
        if node.op in ("relu", "batch_norm"):
            assert placed[node.inputs[0]].op != "quantize"


def test_the_image_is_covered_over_its_domain_behind_its_normalisation() -> None:
    module = nn.Sequential(
        Normalize.standard((0.5, 0.25), (0.5, 0.125)), nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(48, 3),
    )  # fmt: skip
    graph, params = trace(module, (2, 4, 4))
    data = torch.rand(20, 2, 4, 4, generator=torch.Generator().manual_seed(0)) / 4, torch.zeros(20, dtype=torch.long)
    first = quantisers(materialize(graph, params, LEVEL, data).graph)[0]
    # channel 0 is -1 to 1, channel 1 -2 to 6
    assert first["scale"] == pytest.approx(8 / 255)
    assert first["zero_point"] == round(2 / (8 / 255))
    wider = quantisers(materialize(graph, params, LEVEL, data, (-1.0, 1.0)).graph)[0]
    assert wider["scale"] == pytest.approx(16 / 255)


def test_codes_cover_nearly_all_values_and_zero_exactly() -> None:
    found = made(KINDS[0])
    values: dict[str, Tensor] = {}
    images = compressible.images(60, dtype=torch.float32)
    forward(found.graph, found.params, images, visit=lambda n, y: values.__setitem__(n.name, y))
    for node in quantisers(found.graph):
        assert 0 <= node["zero_point"] <= 255
        if found.graph[node.inputs[0]].op == "relu":
            assert node["zero_point"] == 0
        before = values[node.inputs[0]]
        top = (255 - node["zero_point"]) * node["scale"]
        assert float((before > top + node["scale"]).float().mean()) <= 1 - COVERED + 1e-3
        assert torch.float32 == torch.tensor(node["scale"]).dtype
        assert float(torch.tensor(node["scale"])) == node["scale"]  # as a file holds it


def one_layer(weight: list[list[float]], bias: list[float]) -> tuple[Graph, Params]:
    graph, _ = trace(nn.Sequential(nn.Flatten(), nn.Linear(len(weight[0]), len(weight))), (1, 1, len(weight[0])))
    (node,) = graph.weighted()
    return graph, {f"{node.name}.weight": torch.tensor(weight), f"{node.name}.bias": torch.tensor(bias)}


def test_integers_of_a_layer_by_hand() -> None:
    graph, params = one_layer([[1.27, -0.64], [0.0, 0.0]], [0.5, -3.0])
    data = torch.rand(10, 1, 1, 2), torch.zeros(10, dtype=torch.long)
    found = materialize(graph, params, LEVEL, data)
    weight, bias = (found.stored[f"{graph.weighted()[0].name}.{k}"] for k in ("weight", "bias"))
    assert weight.scale is not None
    assert bias.scale is not None
    assert weight.values.tolist() == [[127, -64], [0, 0]]
    assert float(weight.scale[0]) == pytest.approx(0.01)
    assert bias.values.dtype == torch.int32
    assert int(bias.values[0]) == round(0.5 / (0.01 / 255))
    # a channel without weights still has its bias, to 31 bits
    assert bias.tensor.tolist() == pytest.approx([0.5, -3.0], rel=1e-4)
    assert int(bias.values[1].abs()) <= 2**30 + 128
    assert ideal_bits(found) == 40 + min(4 * 8, 2 * 8 + 4, 2 * 9) + 2 * 32 + 2 * 32


def test_a_sum_that_does_not_fit_is_refused() -> None:
    graph, params = one_layer([[1.0] * 70_000], [0.0])
    data = torch.rand(2, 1, 1, 70_000), torch.zeros(2, dtype=torch.long)
    with pytest.raises(UserError, match=r"w8a8: a sum of layer .* reaches .* 32 bits"):
        materialize(graph, params, LEVEL, data)


def test_values_that_are_always_zero_have_a_scale() -> None:
    graph, params = trace(nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), (1, 1, 2))
    first, _ = graph.weighted()
    params[f"{first.name}.weight"], params[f"{first.name}.bias"] = torch.zeros(2, 2), torch.tensor([-1.0, -2.0])
    found = materialize(graph, params, LEVEL, (torch.rand(9, 1, 1, 2), torch.zeros(9, dtype=torch.long)))
    assert quantisers(found.graph)[1]["scale"] == 1.0
    logits = forward(found.graph, found.params, torch.rand(4, 1, 1, 2))
    assert bool(torch.isfinite(logits).all())


def test_pruned_weights_stay_zero() -> None:
    found = made(KINDS[0], "prune:gu-l1:0.7+w8a8")
    codes = torch.cat([found.stored[f"{n.name}.weight"].values.flatten() for n in found.graph.weighted()])
    assert float((codes == 0).float().mean()) >= 0.69
    assert str(found.level) == "prune:gu-l1:0.7+w8a8"
    assert found.level.needs_calibration
    assert found.level.bits == 8


def test_what_is_quantised_already_is_refused() -> None:
    found = made(KINDS[0])
    with pytest.raises(UserError, match="quantised already"):
        materialize(found.graph, found.params, parse_level("int8"))


def test_rounding_twice_without_a_layer_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.pool, self.one, self.two = (
                nn.Conv2d(1, 2, 3),
                nn.MaxPool2d(2),
                nn.Linear(8, 2),
                nn.Linear(8, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            pooled = self.pool(self.first(x))
            return self.one(pooled.flatten(1)) + self.two(torch.relu(pooled).flatten(1))

    module = Twice()
    with torch.no_grad():  # one channel below zero, one above: the ReLU's range is not that of the pooling
        module.first.weight.fill_(0.1)
        module.first.bias.copy_(torch.tensor([-2.0, 1.0]))
    graph, params = trace(module, (1, 6, 6))
    with pytest.raises(UnsupportedGraphError, match="rounded already"):
        materialize(graph, params, LEVEL, (torch.rand(20, 1, 6, 6), torch.zeros(20, dtype=torch.long)))


def test_calibration_images_are_needed() -> None:
    graph, params = compressible.network(KINDS[0], dtype=torch.float32)
    with pytest.raises(ValueError, match="needs calibration"):
        materialize(graph, params, LEVEL)
