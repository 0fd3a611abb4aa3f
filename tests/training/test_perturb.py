import pytest
import torch

from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.compression.levels import FORMATS, INTEGER_INFERENCE, Level
from cactus_ray.compression.materialize import materialize
from cactus_ray.compression.quantize import dequantize, quantize
from cactus_ray.config import AWP_UNITS
from cactus_ray.training.perturb import apply, ascend, jump, noise, radii, rounding

OF_FORMATS = tuple(unit for unit in AWP_UNITS if unit not in ("std", "absolute", "relative"))
IMAGES, LABELS = torch.rand(32, 2, generator=torch.Generator().manual_seed(3)), torch.arange(32) % 2


def _loss(graph: Graph, params: Params) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(forward(graph, params, IMAGES), LABELS)


@pytest.mark.parametrize("unit", AWP_UNITS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_perturbation_stays_inside_its_radius_and_raises_the_loss(
    unit: str, steps: int, tiny: tuple[Graph, Params]
) -> None:
    graph, params = tiny
    limits = radii(graph, params, 0.02, unit)
    deltas = ascend(lambda p: _loss(graph, p), params, limits, steps)
    assert set(deltas) == {"fc1.weight", "fc2.weight"}  # no biases
    for name, delta in deltas.items():
        assert (delta.abs() <= limits[name].expand_as(delta) + 1e-9).all()
        assert not delta.requires_grad
    assert _loss(graph, apply(params, deltas)) > _loss(graph, params)


def test_units_by_hand(tiny: tuple[Graph, Params]) -> None:
    graph, params = tiny  # fc1.weight = [[1, -1], [2, 1]]
    assert radii(graph, params, 0.5, "step")["fc1.weight"].flatten().tolist() == pytest.approx([0.5 / 127, 1 / 127])
    assert radii(graph, params, 0.5, "absolute")["fc1.weight"].item() == 0.5
    torch.testing.assert_close(radii(graph, params, 0.5, "relative")["fc1.weight"], 0.5 * params["fc1.weight"].abs())
    assert radii(graph, params, 2.0, "std")["fc1.weight"].item() == pytest.approx(
        2 * params["fc1.weight"].std(correction=0).item()
    )


def test_half_a_step_covers_the_rounding_to_int8(tiny: tuple[Graph, Params], generator: torch.Generator) -> None:
    graph, params = tiny
    params = params | {"fc1.weight": torch.randn(2, 2, generator=generator)}
    limit = radii(graph, params, 0.5, "step")["fc1.weight"]
    error = dequantize(*quantize(params["fc1.weight"], 8)) - params["fc1.weight"]
    assert (error.abs() <= limit + 1e-7).all()


@pytest.mark.parametrize("unit", OF_FORMATS)
def test_rounding_by_half_a_step_is_the_level(
    unit: str, tiny: tuple[Graph, Params], generator: torch.Generator
) -> None:
    graph, params = tiny
    params = params | {f"fc{i}.weight": torch.randn(2, 2, generator=generator) for i in (1, 2)}
    found = apply(params, rounding(params, radii(graph, params, 0.5, unit)))
    level = Level(quantise="int8" if unit == "step" else unit)
    deployed = materialize(graph, params, level).params
    for name in ("fc1.weight", "fc2.weight"):
        torch.testing.assert_close(found[name], deployed[name], rtol=1e-6, atol=1e-7)
    assert torch.equal(found["fc1.bias"], params["fc1.bias"])


def test_every_format_of_integers_and_floats_is_a_unit() -> None:
    formats = {"int8" if unit == "step" else unit for unit in OF_FORMATS}
    assert formats == {f for f in FORMATS if not f.startswith("codebook") and f != INTEGER_INFERENCE}
    assert len(OF_FORMATS) == len(formats)


def test_steps_of_formats_by_hand(tiny: tuple[Graph, Params]) -> None:
    graph, params = tiny
    params = params | {"fc1.weight": torch.tensor([[1.0, -2.0], [0.75, 0.0]])}
    expected = {
        "int4:tensor": [[2 / 7]], "int4:affine": [[3 / 15], [0.75 / 15]], "int4:tensor:affine": [[3 / 15]],
        "fp16": [[2.0**-10, 2.0**-9], [2.0**-11, 2.0**-24]], "bf16": [[2.0**-7, 2.0**-6], [2.0**-8, 2.0**-133]],
    }  # fmt: skip
    for unit, steps in expected.items():
        torch.testing.assert_close(radii(graph, params, 1.0, unit)["fc1.weight"], torch.tensor(steps))


def test_rounding_lets_gradients_straight_through(tiny: tuple[Graph, Params]) -> None:
    graph, params = tiny
    leaves = {k: (v * 0.93).requires_grad_() for k, v in params.items()}
    deltas = rounding(leaves, radii(graph, leaves, 0.5, "ternary"))
    assert not any(d.requires_grad for d in deltas.values())
    _loss(graph, apply(leaves, deltas)).backward()
    rounded = {k: (v + deltas.get(k, 0.0)).detach().requires_grad_() for k, v in leaves.items()}
    _loss(graph, rounded).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, rounded[name].grad)


def test_rounding_keeps_what_may_not_move(tiny: tuple[Graph, Params]) -> None:
    _, params = tiny
    limits = {"fc1.weight": torch.tensor([[0.0, 0.4], [0.0, 0.4]])}
    found = apply(params, rounding(params, limits))["fc1.weight"]
    assert found[:, 0].tolist() == params["fc1.weight"][:, 0].tolist()
    assert found[:, 1].tolist() == pytest.approx([-0.8, 0.8])


def test_noise_fills_its_radius_evenly(tiny: tuple[Graph, Params], generator: torch.Generator) -> None:
    weight, limit = torch.zeros(100, 100), torch.full((100, 1), 0.3)
    delta = noise({"fc1.weight": weight}, {"fc1.weight": limit}, generator)["fc1.weight"]
    assert delta.abs().max() <= 0.3
    assert delta.abs().mean() == pytest.approx(0.15, rel=0.05)
    assert abs(float(delta.mean())) < 0.01
    again = noise({"fc1.weight": weight}, {"fc1.weight": limit}, torch.Generator().manual_seed(1))["fc1.weight"]
    assert not torch.equal(delta, again)


def test_one_step_is_the_whole_jump(tiny: tuple[Graph, Params]) -> None:
    graph, params = tiny
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    _loss(graph, leaves).backward()
    limits = radii(graph, params, 0.1, "std")
    jumped = jump({k: v.grad for k, v in leaves.items() if v.grad is not None}, limits)
    ascended = ascend(lambda p: _loss(graph, p), params, limits, 1)
    for name, delta in ascended.items():
        torch.testing.assert_close(delta, jumped[name])


def test_unknown_unit_is_refused(tiny: tuple[Graph, Params]) -> None:
    with pytest.raises(ValueError, match="furlong"):
        radii(*tiny, 1.0, "furlong")
