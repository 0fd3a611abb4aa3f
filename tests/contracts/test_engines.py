"""One contract for every bound engine that is installed: sound, consistent, and of one opinion where they must be."""

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from containment import DOMAIN, points_of, steered_points
from small_networks import KINDS, SHAPE, network
from torch import Tensor, nn

from cactus_ray.bounds import interval, linear
from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.linear import Effort
from cactus_ray.bounds.trace import trace
from cactus_ray.config import ThreatConfig, parse
from cactus_ray.errors import ConfigError, UnsupportedGraphError, UserError
from cactus_ray.verification import engine, lirpa
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.engine import CactusEngine, Engine
from cactus_ray.verification.module import GraphModule
from cactus_ray.verification.verdict import ENGINES, Verdict, VerificationSettings

SLACK = 1e-9
REFUSED = {("auto_lirpa", "overlapping max pool")}
OTHER_SLOPES = {"max pool", "overlapping max pool", "leaky"}
"""Kinds whose relaxations of one node differ between engines by design; all other slopes are CROWN's."""


def installed(name: str) -> str:
    """The name, or a skip with the reason."""
    try:
        engine.info(name)
    except UserError as error:
        pytest.skip(f"engine {name} is not installed: {error}")
    return name


@pytest.fixture(params=ENGINES)
def name(request: pytest.FixtureRequest) -> str:
    return installed(request.param)


@pytest.fixture
def upstream() -> Any:
    installed("auto_lirpa")
    return lirpa.upstream()


def case(kind: str, seed: int = 0, epsilon: float = 0.1, count: int = 3) -> tuple[Graph, Params, Tensor, Box, Tensor]:
    graph, params = network(kind, seed)
    images = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return graph, params, images, interval.ball(images, epsilon, DOMAIN), torch.arange(count) % 3


def bound(name: str, graph: Graph, params: Params, kind: str) -> Engine:
    if (name, kind) not in REFUSED:
        return engine.bind(name, graph, params)
    with pytest.raises(UnsupportedGraphError, match=r"max pooling '_2'.*stride"):
        engine.bind(name, graph, params)
    pytest.skip(f"{name} refuses {kind}, by name")


def nothing(labels: Tensor, classes: int = 3) -> Tensor:
    return torch.full((len(labels), classes), -torch.inf, dtype=torch.float64).scatter(1, labels[:, None], 0.0)


def answers(bounds: Engine, box: Box, labels: Tensor) -> dict[str, Tensor]:
    """Every kind of margins that an engine gives, each without the help of another."""
    known = nothing(labels)
    return {
        "interval": bounds.interval_margins(box, labels),
        "linear": bounds.linear_margins(box, labels, known=known),
        "linear over ibp": bounds.linear_margins(box, labels, known=known, effort=Effort(intermediate="ibp")),
        "alpha": bounds.alpha_margins(box, labels, known=known, iterations=5),
    }


def above(margins: dict[str, Tensor], graph: Graph, params: Params, images: Tensor, labels: Tensor) -> list[str]:
    """Margins that are above the true ones at a point of the ball."""
    points = points_of(images, 0.1, 10, 0) + steered_points(graph, params, images, 0.1, 2, 0)
    found = []
    for point in points:
        logits = forward(graph, params, point)
        true = logits.gather(1, labels[:, None]) - logits
        found += [key for key, lower in margins.items() if not bool((lower - true <= SLACK).all())]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_margins_contain_what_is_sampled(name: str, kind: str) -> None:
    graph, params, images, box, labels = case(kind)
    margins = answers(bound(name, graph, params, kind), box, labels)
    assert above(margins, graph, params, images, labels) == []
    for lower in margins.values():
        assert lower.dtype == torch.float64
        assert lower.shape == (3, 3)
        assert bool(torch.isfinite(lower).all())
        assert bool((lower.gather(1, labels[:, None]) == 0).all())
    for key in ("linear", "linear over ibp", "alpha"):
        margins[key] += 1.0
        assert key in above(margins, graph, params, images, labels), "a planted fault is not seen"


@pytest.mark.parametrize("kind", KINDS)
def test_the_engines_agree(upstream: Any, kind: str) -> None:
    """IBP always; CROWN with equal slopes over equal boxes: interval boxes, or our CROWN's."""
    graph, params, _, box, labels = case(kind, count=5)
    ours, theirs = CactusEngine(graph, params), bound("auto_lirpa", graph, params, kind)
    close = {"rtol": 0.0, "atol": 1e-5}
    torch.testing.assert_close(theirs.interval_margins(box, labels), ours.interval_margins(box, labels), **close)
    if kind in OTHER_SLOPES:
        return
    over_ibp = Effort(intermediate="ibp")
    expected = ours.linear_margins(box, labels, known=nothing(labels), effort=over_ibp)
    torch.testing.assert_close(
        theirs.linear_margins(box, labels, known=nothing(labels), effort=over_ibp), expected, **close
    )
    boxes = linear.intermediate_boxes(graph, params, box)
    torch.testing.assert_close(theirs.margins_over(boxes, labels), ours.margins_over(boxes, labels), **close)


@pytest.mark.parametrize("kind", KINDS)
def test_margins_over_boxes_are_those_of_the_boxes(kind: str) -> None:
    """Over interval boxes they are CROWN-IBP's; over CROWN's, which lie within, they are better on the whole."""
    graph, params, _, box, labels = case(kind, count=5)
    ours, boxes = CactusEngine(graph, params), {}
    interval.propagate(graph, params, box, visit=lambda node, found: boxes.__setitem__(node.name, found))
    over_ibp = ours.linear_margins(box, labels, known=nothing(labels), effort=Effort(intermediate="ibp"))
    torch.testing.assert_close(ours.margins_over(boxes, labels), over_ibp, rtol=0.0, atol=1e-10)
    tighter = ours.margins_over(linear.intermediate_boxes(graph, params, box), labels)
    assert float((tighter - over_ibp).mean()) > 1e-3


@pytest.mark.parametrize("kind", ["mlp", "deep conv", "residual"])
def test_known_margins_are_kept_and_never_lowered(name: str, kind: str) -> None:
    graph, params, _, box, labels = case(kind, epsilon=0.03)
    bounds = engine.bind(name, graph, params)
    ibp = bounds.interval_margins(box, labels)
    assert bool((bounds.linear_margins(box, labels) >= ibp).all())
    assert float(bounds.linear_margins(box, labels).mean()) > float(ibp.mean())
    known = nothing(labels)
    known[0, 1], known[0, 2], known[1, 0], known[2, 0] = 7.0, 8.0, 50.0, torch.nan  # labels 0, 1, 2
    found = bounds.linear_margins(box, labels, known=known)
    assert found[0].tolist() == [0.0, 7.0, 8.0]
    assert found[1, 0] == 50.0
    assert bool(torch.isfinite(found[1, 2]))
    assert bool(torch.isnan(found[2, 0]))
    assert bool((bounds.alpha_margins(box, labels, known=found)[:2] >= found[:2]).all())


@pytest.mark.parametrize("kind", ["mlp", "conv", "residual"])
def test_a_sample_does_not_depend_on_its_neighbours(name: str, kind: str) -> None:
    graph, params, _, box, labels = case(kind, count=4)
    bounds = engine.bind(name, graph, params)
    together = answers(bounds, box, labels)
    for i in range(4):
        alone = answers(bounds, Box(box.center[i, None], box.radius[i, None]), labels[i, None])
        # upstream tightens the neurons that are unstable in any sample of the batch
        for key in ("interval", "linear over ibp", *(["linear"] if name == "cactus" else [])):
            torch.testing.assert_close(alone[key][0], together[key][i], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_broken_weights_prove_nothing(name: str, value: float) -> None:
    graph, params, _, box, labels = case("mlp")
    for key in params:
        broken = {k: v.clone() for k, v in params.items()}
        broken[key].view(-1)[0] = value
        try:
            margins = answers(engine.bind(name, graph, broken), box, labels)
        except UnsupportedGraphError:
            continue  # refused: nothing is proved
        for lower in margins.values():
            good = (torch.isfinite(lower) & (lower > 0)).scatter(1, labels[:, None], True)
            assert not bool(good.all(1).any()), key


def test_an_engine_says_what_it_is(name: str) -> None:
    found = engine.info(name)
    assert found == engine.bind(name, *network("mlp", 0)).info
    assert found.version[0].isdigit()
    assert (found.self_test is None) == (name == "cactus")


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_as_a_module(kind: str) -> None:
    graph, params, images, *_ = case(kind)
    module = GraphModule(graph, params)
    torch.testing.assert_close(module(images), forward(graph, params, images))
    assert not any(part.training for part in module.modules())


# --- what is special about auto_LiRPA ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_upstream_boxes_contain_what_is_sampled(upstream: Any, kind: str) -> None:
    graph, params, images, box, labels = case(kind)
    bounds = bound("auto_lirpa", graph, params, kind)
    bounds.linear_margins(box, labels, known=nothing(labels))
    assert outside(bounds, graph, params, images) <= SLACK


def outside(bounds: Any, graph: Graph, params: Params, images: Tensor) -> float:
    """How far values lie outside upstream's boxes of what its ReLUs read."""
    worst = -torch.inf
    names = [n.inputs[0] for n in graph.nodes if n.op in ("relu", "leaky_relu")]
    for point in points_of(images, 0.1, 10, 0) + steered_points(graph, params, images, 0.1, 2, 0):
        values: dict[str, Tensor] = {}
        forward(graph, params, point, visit=lambda n, y, values=values: values.__setitem__(n.name, y))
        for name, relu in zip(names, bounds.bounded.relus, strict=True):
            box, value = relu.inputs[0], values[name]
            if box.lower is not None:
                worst = max(worst, float((box.lower - value).max()), float((value - box.upper).max()))
    return worst


def test_the_adapter_uses_no_patches_of_dilated_and_grouped_convolutions() -> None:
    graph = case("all options")[0]
    assert any(node.op == "conv2d" and node["dilation"] != (1, 1) for node in graph.nodes)
    assert any(node.op == "conv2d" and node["groups"] != 1 for node in graph.nodes)
    assert not lirpa.fits_patches(graph)


def test_dilated_and_grouped_convolutions_need_matrices(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's windows are wrong there, and the check of boxes sees it."""
    graph, params, images, box, labels = case("all options")
    monkeypatch.setattr(lirpa, "fits_patches", lambda graph: True)
    bounds = engine.bind("auto_lirpa", graph, params)
    bounds.linear_margins(box, labels, known=nothing(labels))
    mended = f"auto_LiRPA {upstream.__version__} no longer has this fault: fits_patches may allow such convolutions"
    assert outside(bounds, graph, params, images) > SLACK, mended


def test_alpha_moves_only_with_a_gradient(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(lirpa.info().self_test).startswith("alpha moves")
    if not lirpa.clamp_is_dead_at_its_ends():
        pytest.skip("this torch's clamp has a gradient at its ends: nothing needs mending")
    monkeypatch.setattr(lirpa, "clamp_is_dead_at_its_ends", lambda: False)  # nothing is mended
    assert str(lirpa.info.__wrapped__().self_test).startswith("alpha frozen")


def test_nothing_of_the_process_is_changed(upstream: Any) -> None:
    relu = importlib.import_module("auto_LiRPA.operators.relu").BoundRelu
    before = relu._relu_mask_alpha, torch.get_default_dtype(), list(warnings.filters), logging.root.handlers[:]
    graph, params, _, box, labels = case("mlp")
    bounds = engine.bind("auto_lirpa", graph, params)
    answers(bounds, box, labels)
    with pytest.raises(AttributeError):
        bounds.interval_margins(box, None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        bounds.alpha_margins(Box(box.center[:, :1], box.radius[:, :1]), labels, known=nothing(labels))
    after = relu._relu_mask_alpha, torch.get_default_dtype(), list(warnings.filters), logging.root.handlers[:]
    assert after == before
    assert sys.getrecursionlimit() < 100_000
    assert not logging.root.handlers or "auto_LiRPA" not in str(logging.root.handlers)


def test_a_network_that_upstream_computes_differently_is_refused(
    upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, params, *_ = case("mlp")
    true = lirpa.GraphModule

    def wrong(graph: Graph, params: Params, skip: Any = None) -> nn.Module:
        return true(graph, {k: v * 1.1 for k, v in params.items()}, skip)

    monkeypatch.setattr(lirpa, "GraphModule", wrong)
    with pytest.raises(UnsupportedGraphError, match="something else"):
        engine.bind("auto_lirpa", graph, params)


@pytest.fixture
def without_upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "auto_LiRPA", None)
    lirpa.upstream.cache_clear()
    lirpa.info.cache_clear()
    yield
    lirpa.upstream.cache_clear()
    lirpa.info.cache_clear()


@pytest.mark.usefixtures("without_upstream")
def test_a_missing_upstream_is_one_error_that_says_how_to_install_it() -> None:
    graph, params = trace(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2))
    for call in (lambda: engine.info("auto_lirpa"), lambda: engine.bind("auto_lirpa", graph, params)):
        with pytest.raises(UserError, match="--no-deps git") as error:
            call()
        for needed in (
            "https://github.com/Verified-Intelligence/auto_LiRPA",
            "appdirs",
            "tqdm",
            "graphviz",
            "packaging",
            "pyyaml",
            "sortedcontainers",
            "onnx",
        ):
            assert needed in str(error.value)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="one of cactus, auto_lirpa"):
        engine.bind("z3", *network("mlp", 0))


@pytest.mark.parametrize(
    ("settings", "key"), [({}, "arithmetic"), ({"arithmetic": "real", "bound": "branch"}, "bound")]
)
def test_settings_refuse_what_upstream_cannot_do(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^verification.{key}: .*auto_lirpa"):
        parse(VerificationSettings, {"engine": "auto_lirpa", **settings}, "verification")


@pytest.mark.parametrize("strongest", ["ibp", "crown", "alpha"])
def test_verdicts_with_upstream_contradict_none_of_ours(upstream: Any, strongest: str) -> None:
    graph, params, images, _, _ = case("deep conv", count=6)
    params, images = {k: v.float() for k, v in params.items()}, images.float()
    labels = forward(graph, params, images).argmax(1)
    threat = ThreatConfig(epsilon=0.001)
    found = {
        name: verify(
            graph, params, images, labels, range(6), threat,
            VerificationSettings(engine=name, arithmetic="real", bound=strongest),
        )
        for name in ENGINES
    }  # fmt: skip
    pairs = {(ours.verdict, theirs.verdict) for ours, theirs in zip(*found.values(), strict=True)}
    assert not pairs & {(Verdict.CERTIFIED, Verdict.FALSIFIED), (Verdict.FALSIFIED, Verdict.CERTIFIED)}
    assert any(theirs is Verdict.CERTIFIED for _, theirs in pairs)
