"""All losses through one contract."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Node, Params, Statistics, forward, is_buffer, trainable
from cactus_ray.bounds.interval import Box, ball, margins, propagate
from cactus_ray.bounds.trace import trace
from cactus_ray.config import CERTIFIED_LOSSES as NAMES
from cactus_ray.config import METHODS, ModelConfig
from cactus_ray.errors import ConfigError, UnsupportedGraphError
from cactus_ray.models.build import build
from cactus_ray.training.losses import (
    ATTACKED,
    CERTIFIED_LOSSES,
    DURING_RAMP,
    EXPRESSIVE,
    TAIL_ATTACKED,
    UNBOUNDED,
    LossOptions,
    Region,
    standard,
)
from cactus_ray.training.losses.tail import Aim, attacked_margins, lowest, tail_of

CLASSES = 4
ALL = (*NAMES, "standard")
BOUNDS = [("ibp", 1.0), ("crown_ibp", 1.0), ("crown_ibp", 0.5), ("crown_ibp", 0.0)]
RESIDUAL = (
    Node("input", "input"),
    Node("conv1", "conv2d", ("input",), {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}),
    Node("bn1", "batch_norm", ("conv1",), {"eps": 1e-5, "momentum": 0.1}),
    Node("relu1", "relu", ("bn1",)),
    Node("conv2", "conv2d", ("relu1",), {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}),
    Node("relu2", "leaky_relu", ("conv2",), {"slope": 0.1}),
    Node("sum", "add", ("relu2", "bn1")),
    Node("pool", "max_pool2d", ("sum",), {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0)}),
    Node("flatten", "flatten", ("pool",)),
    Node("fc", "linear", ("flatten",)),
)


def network(kind: str) -> tuple[Graph, Params]:
    """A small float64 network with batch norm: "mlp", "cnn7" or "residual" (with max pooling)."""
    generator = torch.Generator().manual_seed(5)
    if kind == "residual":
        graph = Graph(RESIDUAL, (1, 6, 6))
        shapes = {
            "conv1.weight": (3, 1, 3, 3), "bn1.weight": (3,), "bn1.bias": (3,), "conv2.weight": (3, 3, 3, 3),
            "conv2.bias": (3,), "fc.weight": (CLASSES, 27), "fc.bias": (CLASSES,),
        }  # fmt: skip
        params = {k: 0.5 * torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
        params |= {"bn1.running_mean": torch.zeros(3).double(), "bn1.running_var": torch.ones(3).double()}
    else:
        config = ModelConfig(name=kind, hidden=(8, 8), width=0.05 if kind == "cnn7" else 1.0, batch_norm=True)
        graph, params = trace(build(config, (1, 6, 6), CLASSES, generator=generator), (1, 6, 6))
    return graph, {k: v.double().requires_grad_(not is_buffer(k)) for k, v in params.items()}


def batch(epsilon: float, count: int = 12) -> tuple[Tensor, Region]:
    """Images and their region, with points at random corners of the balls."""
    generator = torch.Generator().manual_seed(6)
    images = torch.rand(count, 1, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    around = ball(images, epsilon, (0.0, 1.0))
    corner = torch.rand(images.shape, generator=generator).round().double()
    point = torch.lerp(around.lower, around.upper, corner)
    return images, Region(labels, around, point, torch.Generator().manual_seed(7))


def options(**changes: Any) -> LossOptions:
    return LossOptions(**{"box_ratio": 0.5, "latent_steps": 3, "latent_restarts": 2} | changes)


def value(name: str, graph: Graph, params: Params, epsilon: float, **changes: Any) -> Tensor:
    """The loss as training takes it: with the clean batch's statistics."""
    images, region = batch(epsilon)
    return on(name, graph, params, images, region, **changes)


def on(name: str, graph: Graph, params: Params, images: Tensor, region: Region, **changes: Any) -> Tensor:
    """The same on given images and their region, which ``standard`` has no use for."""
    statistics: Statistics = {}
    clean = standard(graph, params, images, region.labels, statistics)
    if name == "standard":
        return clean
    return CERTIFIED_LOSSES[name](graph, params, region, options(**changes), statistics=statistics)


def test_the_tables_have_the_names_of_the_configuration() -> None:
    assert set(CERTIFIED_LOSSES) == set(NAMES) < set(METHODS)
    assert ATTACKED | TAIL_ATTACKED | UNBOUNDED | DURING_RAMP.keys() | EXPRESSIVE <= set(NAMES)


@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("kind", ["mlp", "cnn7", "residual"])
@pytest.mark.parametrize("name", ALL)
def test_contract(name: str, kind: str, epsilon: float) -> None:
    graph, params = network(kind)
    changes = {"tail_layers": 1} if kind == "residual" else {}
    found = value(name, graph, params, epsilon, **changes)
    assert found.shape == ()
    found.backward()  # type: ignore[no-untyped-call]
    gradients = {k: v.grad for k, v in trainable(params).items()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert all(g.abs().sum() > 0 for k, g in gradients.items() if g is not None and not k.startswith("bn"))
    assert value(name, graph, params, epsilon, **changes).item() == found.item()  # deterministic


@pytest.mark.parametrize("name", ALL)
def test_huge_balls_and_weights_give_no_nan(name: str) -> None:
    graph, params = network("cnn7")
    large = {
        k: (v if is_buffer(k) else 30.0 * v).detach().float().requires_grad_(not is_buffer(k))
        for k, v in params.items()
    }
    images, region = batch(1.0)
    assert region.point is not None
    single = Region(
        region.labels, Box(region.ball.center.float(), region.ball.radius.float()), region.point.float(),
        region.generator,
    )  # fmt: skip
    loss = on(name, graph, large, images.float(), single)
    assert loss.isfinite()
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(v.grad is not None and not v.grad.isnan().any() for v in trainable(large).values())


@pytest.mark.parametrize("name", ALL)
def test_pruned_networks_have_finite_gradients(name: str) -> None:
    graph, params = network("mlp")
    kept = torch.tensor([0.0, 1.0] * 4, dtype=torch.float64)  # every second neuron has no weights and no bias
    dead = params | {"fc1.weight": params["fc1.weight"] * kept[:, None], "bn1.bias": params["bn1.bias"] * kept}
    found = value(name, graph, dead, 0.05)
    found.backward()  # type: ignore[no-untyped-call]
    assert all(v.grad is not None and v.grad.isfinite().all() for v in trainable(params).values())


@pytest.mark.parametrize("name", NAMES)
def test_at_epsilon_zero_every_loss_is_the_cross_entropy(name: str) -> None:
    graph, params = network("mlp")
    images, region = batch(0.0)
    clean = standard(graph, params, images, region.labels, {})
    expected = clean.square() if name in TAIL_ATTACKED else clean  # of two equal factors
    torch.testing.assert_close(value(name, graph, params, 0.0), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("epsilon", [1e-7, 0.05, 0.5])
@pytest.mark.parametrize("kind", ["mlp", "cnn7", "residual"])
@pytest.mark.parametrize(("name", "weight"), BOUNDS)
def test_bounds_lie_above_the_loss_at_every_sampled_point(name: str, weight: float, kind: str, epsilon: float) -> None:
    graph, params = network(kind)
    images, region = batch(epsilon)
    generator = torch.Generator().manual_seed(8)
    for index in range(4):
        one = Region(
            region.labels[index : index + 1],
            Box(*(t[index : index + 1] for t in (region.ball.center, region.ball.radius))),
        )
        bound = CERTIFIED_LOSSES[name](graph, params, one, options(crown_weight=weight))
        shares = torch.rand(400, *images.shape[1:], generator=generator, dtype=torch.float64)
        shares[200:] = shares[200:].round()  # corners
        points = torch.lerp(one.ball.lower, one.ball.upper, shares)
        losses = torch.nn.functional.cross_entropy(
            forward(graph, params, points), one.labels.expand(400), reduction="none"
        )
        assert losses.max() <= bound + 1e-9


def test_crown_ibp_without_weight_is_ibp_and_with_weight_differs() -> None:
    graph, params = network("cnn7")
    interval = value("ibp", graph, params, 0.05)
    torch.testing.assert_close(value("crown_ibp", graph, params, 0.05, crown_weight=0.0), interval)
    assert abs(value("crown_ibp", graph, params, 0.05, crown_weight=1.0) - interval) > 1e-3


def test_expressive_losses_run_from_adversarial_to_interval() -> None:
    graph, params = network("mlp")
    _, region = batch(0.05)
    statistics: Statistics = {}
    assert region.point is not None
    adversarial = standard(graph, params, region.point, region.labels, statistics)
    interval = CERTIFIED_LOSSES["ibp"](graph, params, region, options(), statistics=statistics)
    assert adversarial < interval
    for name in sorted(EXPRESSIVE):
        course = [value(name, graph, params, 0.05, ibp_weight=a) for a in (0.0, 0.3, 0.7, 1.0)]
        torch.testing.assert_close(course[0], adversarial)
        torch.testing.assert_close(course[-1], interval)
        assert course == sorted(course)


def test_taps_margins_lie_between_bound_and_sampled_worst_case() -> None:
    graph, params = network("cnn7")
    _, region = batch(0.05)
    lower = margins(graph, params, region.ball, region.labels)
    tail = tail_of(graph, 2)
    assert [n.op for n in tail.nodes if n.op in ("conv2d", "linear")] == ["linear", "linear"]
    boxes = propagate(graph, params, region.ball, until=tail.nodes[0].name)
    targets = lowest(lower, region.labels, 99)
    assert targets.shape == (12, CLASSES - 1)
    assert not (targets == region.labels[:, None]).any()
    generator = torch.Generator().manual_seed(9)
    aim = Aim(tail, params, region.labels, targets, None)
    found = attacked_margins(aim, boxes, options(latent_steps=10), generator)
    assert (found >= lower.gather(1, targets) - 1e-9).all()
    x = torch.lerp(boxes.lower, boxes.upper, torch.rand(300, *boxes.center.shape, generator=generator).double())
    logits = forward(tail, params, x.flatten(0, 1)).view(300, 12, CLASSES)
    sampled = logits.gather(2, region.labels.expand(300, 12)[..., None]) - logits
    assert (found <= sampled.amin(0).gather(1, targets) + 1e-9).all()  # the attack beats 300 random points
    assert value("taps", graph, params, 0.05) < value("ibp", graph, params, 0.05).square()


def test_many_classes_are_attacked_only_where_bounds_are_lowest() -> None:
    graph, params = network("mlp")
    all_of_them, few = (value("taps", graph, params, 0.05, latent_targets=t) for t in (3, 1))
    assert all_of_them < few < value("ibp", graph, params, 0.05).square()  # the others keep their bounds


def test_gradient_scale_changes_the_gradient_only() -> None:
    graph, params = network("mlp")
    gradients = []
    for scale in (1.0, 3.0):
        loss = value("taps", graph, params, 0.05, gradient_scale=scale)
        gradients.append(torch.autograd.grad(loss, params["fc1.weight"])[0])
        assert loss.item() == pytest.approx(value("taps", graph, params, 0.05).item(), rel=1e-12)
    assert not torch.allclose(*gradients)


def test_connector_shares_the_gradient_between_the_ends_of_the_box() -> None:
    from cactus_ray.training.losses.tail import _connected

    center = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    radius = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    points = torch.tensor([[[-1.0, 1.0, 0.0, 0.5]]], dtype=torch.float64)
    linked = _connected(points, Box(center, radius))
    assert torch.equal(linked, points)
    (toward_center, toward_radius) = torch.autograd.grad(linked.sum(), (center, radius))
    # In [-1, 1] the reach of each end is 1. At -1: all to the lower end, d lower / d radius = -1. At 1: the upper end.
    # At 0: to neither, but for the floor. At 0.5: half to the upper end.
    torch.testing.assert_close(toward_center, torch.tensor([[1.0, 1.0, 0.0, 0.5]]).double(), atol=2e-5, rtol=0)
    torch.testing.assert_close(toward_radius, torch.tensor([[-1.0, 1.0, 0.0, 0.5]]).double(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("layers", [0, 2, 3, 4])
def test_tail_that_cannot_be_cut_off_is_refused(layers: int) -> None:
    graph, _ = network("residual")
    if layers == 3:
        assert tail_of(graph, 3).nodes[1].name == "conv1"
        return
    with pytest.raises(ConfigError, match=rf"tail_layers: got {layers}; expected one of 1, 3"):
        tail_of(graph, layers)


def test_shrinking_needs_a_linear_end_and_makes_bounds_smaller() -> None:
    graph, params = network("mlp")
    assert value("sabr", graph, params, 0.1, relu_shrinkage=0.5) < value("sabr", graph, params, 0.1)
    ends_in_relu = Graph((*graph.nodes, Node("last", "relu", (graph.output.name,))), graph.input_shape)
    with pytest.raises(UnsupportedGraphError, match=r"relu_shrinkage = 0\.5.*relu"):
        value("sabr", ends_in_relu, params, 0.1, relu_shrinkage=0.5)


@pytest.mark.parametrize("name", sorted(ATTACKED))
def test_attacked_losses_without_a_point_are_refused(name: str) -> None:
    graph, params = network("mlp")
    _, region = batch(0.1)
    with pytest.raises(ValueError, match="point"):
        CERTIFIED_LOSSES[name](graph, params, Region(region.labels, region.ball), options())


def test_taps_without_a_generator_is_refused() -> None:
    graph, params = network("mlp")
    _, region = batch(0.1)
    with pytest.raises(ValueError, match="generator"):
        CERTIFIED_LOSSES["taps"](graph, params, Region(region.labels, region.ball), options())


def test_region_first_cuts_everything() -> None:
    _, region = batch(0.1)
    part = region.first(2)
    assert part.point is not None
    assert [len(t) for t in (part.labels, part.ball.center, part.ball.radius, part.point)] == [2, 2, 2, 2]
    assert part.generator is region.generator


# --- batch norm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_statistics_of_batch_norm(name: str) -> None:
    """Clean for all, and with a gradient into them, but those of the adversarial batch for the expressive losses."""
    graph, params = network("mlp")
    images, region = batch(0.05)
    clean: Statistics = {}
    standard(graph, params, images, region.labels, clean)
    shifted = {k: (mean + 1.0, var) for k, (mean, var) in clean.items()}
    used, other = dict(clean), dict(shifted)
    losses = [
        CERTIFIED_LOSSES[name](
            graph,
            params,
            Region(region.labels, region.ball, region.point, torch.Generator().manual_seed(1)),
            options(),
            statistics=s,
        )
        for s in (used, other)
    ]
    if name not in EXPRESSIVE:
        assert all(used[k] is clean[k] for k in clean)
        assert abs(losses[0] - losses[1]) > 1e-3
        (through,) = torch.autograd.grad(losses[0], clean["bn1"][0], retain_graph=True)
        assert through.abs().sum() > 0
        return
    assert region.point is not None
    expected: Statistics = {}
    forward(graph, params, region.point, collect=expected)
    for key in clean:
        torch.testing.assert_close(used[key], expected[key])
    assert losses[0].item() == losses[1].item()


@pytest.mark.parametrize("name", NAMES)
def test_without_statistics_the_running_ones_are_used(name: str) -> None:
    graph, params = network("mlp")
    _, region = batch(0.0)
    expected = torch.nn.functional.cross_entropy(forward(graph, params, region.ball.center), region.labels)
    found = CERTIFIED_LOSSES[name](graph, params, region, options())
    torch.testing.assert_close(found, expected.square() if name in TAIL_ATTACKED else expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(NAMES) - UNBOUNDED))
def test_every_bound_pass_is_visited_once(name: str) -> None:
    graph, params = network("mlp")
    _, region = batch(0.05)
    seen: list[str] = []
    CERTIFIED_LOSSES[name](
        graph, params, region, options(relu_shrinkage=0.9), visit=lambda node, _: seen.append(node.name)
    )
    assert seen == [node.name for node in graph.nodes[:-1]]  # the last layer is merged with the margins
