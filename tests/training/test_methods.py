"""Every method through one contract, and what is particular to CACTUS."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cactus_ray.bounds.graph import Params, is_buffer
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import materialize, remove_channels
from cactus_ray.compression.prune import masks
from cactus_ray.config import AWP_UNITS, CERTIFIED_LOSSES, PRUNE_FAMILIES, STRATEGIES, RunConfig
from cactus_ray.config import METHODS as NAMES
from cactus_ray.data import DataSet
from cactus_ray.errors import ConfigError
from cactus_ray.models import create
from cactus_ray.options import STAGE_SHARES
from cactus_ray.training import perturb
from cactus_ray.training.compiled import AS_WRITTEN
from cactus_ray.training.init import ibp_initialization
from cactus_ray.training.methods import METHODS, STAGES
from cactus_ray.training.stages import WHOLE, begin
from cactus_ray.training.step import Step, full_loss, member_loss

CACTUS_MODULE = sys.modules["cactus_ray.training.methods.cactus"]  # the package gives the function of that name
CACTUS = {"method": "cactus", "certified_loss": "sabr"}


def make_step(config: RunConfig, data: DataSet, **changes: Any) -> Step:
    """A step of the first stage."""
    network = create(config, data.input_shape, data.classes)
    params = ibp_initialization(network.graph, network.params, torch.Generator().manual_seed(1))
    first = STAGES.get(config.method, WHOLE)[0]
    params, auxiliary = begin(first, config, network.graph, params, {})
    images, labels = data.split("train")
    noise = torch.rand(images[:64].shape, generator=torch.Generator().manual_seed(2))
    step = Step(
        config, network.graph, params, images[:64], labels[:64], noise, epsilon=config.threat.epsilon,
        standard_weight=1.0 if config.standard_weight is None else config.standard_weight, progress=0.5, index=0,
        generator=torch.Generator().manual_seed(3),
        latent_generator=torch.Generator().manual_seed(4), stage=first.name, auxiliary=auxiliary,
    )  # fmt: skip
    return replace(step, **changes)


def take(step: Step) -> tuple[list[float], Params]:
    """The losses a method gives and the summed gradient, as the loop takes them."""
    losses = []
    for loss in METHODS[step.config.method](step):
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
    return losses, step.gradients()


def test_the_tables_have_the_names_of_the_configuration() -> None:
    assert set(METHODS) == set(NAMES)
    assert {m: [s.name for s in stages] for m, stages in STAGES.items()} == {m: [*s] for m, s in STAGE_SHARES.items()}


@pytest.mark.parametrize(
    "model", [{"name": "mlp", "hidden": [16]}, {"name": "mlp", "hidden": [16], "batch_norm": True}]
)
@pytest.mark.parametrize("method", NAMES)
def test_contract(method: str, model: dict[str, Any], run_config: Any, few_digits: DataSet) -> None:
    config = run_config(method=method, model=model)
    step = make_step(config, few_digits)
    params, auxiliary = step.params, step.auxiliary
    for number, stage in enumerate(STAGES.get(method, WHOLE)):
        params, auxiliary = begin(stage, config, step.graph, params, auxiliary)
        course = []
        leaves = {k: v for k, v in (params | auxiliary).items() if v.requires_grad}
        assert set(leaves) == {k for k in params | auxiliary if stage.trains(step.graph, k) and not is_buffer(k)}
        optimizer = torch.optim.Adam(leaves.values(), lr=0.02 if number == 0 else 0.003)
        for index in range(30):
            optimizer.zero_grad()
            network = stage.network(config, step.graph, params, auxiliary)
            now = replace(step, params=network, auxiliary=auxiliary, stage=stage.name, statistics={})
            found, _ = take(now)
            assert all(torch.tensor(found).isfinite())
            if index == 0:
                gradients = [v.grad for v in leaves.values()]
                assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients)
            course.append(sum(found))
            optimizer.step()
            if stage.after is not None:
                with torch.no_grad():
                    stage.after(now)
        assert sum(course[-5:]) < (0.8 if number == 0 else 1.0) * sum(course[:5])


@pytest.mark.parametrize("method", NAMES)
def test_during_warm_up_no_bounds_are_computed(
    method: str, run_config: Any, few_digits: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cactus_ray.bounds.interval.propagate", _forbidden)
    config = run_config(method=method, **({"awp_radius": 1.0} if method == "cactus" else {}))
    passes = replace(AS_WRITTEN, attack=_forbidden)
    losses, _ = take(make_step(config, few_digits, standard_weight=1.0, epsilon=0.0, passes=passes))
    assert len(losses) == (2 if method == "cactus" else 1)  # and no perturbed member yet


def _forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("this pass has no weight")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_members_of_the_drawn_sparsity(
    strategy: str, run_config: Any, few_digits: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(**CACTUS, compression_set={"strategy": strategy, "low": 0.4, "high": 0.9, "size": 4})
    step = make_step(config, few_digits)
    members = _record_members(monkeypatch)
    losses, _ = take(step)
    expected = {"none": 0, "single": 1, "progressive": 1, "dense": 5}.get(strategy, 3)
    assert len(members) == expected == len(losses) - 1
    for member, sparsity in zip(members, step.memory["sparsities"], strict=True):
        weights = torch.cat([member[f"{n.name}.weight"].flatten() for n in step.graph.weighted()])
        assert int((weights == 0).sum()) == round(sparsity * weights.numel())


def _record_members(monkeypatch: pytest.MonkeyPatch) -> list[Params]:
    seen: list[Params] = []

    def recorded(step: Step, params: Params, *rest: Any) -> Tensor:
        seen.append({k: v.detach().clone() for k, v in params.items()})
        return member_loss(step, params, *rest)

    monkeypatch.setattr(CACTUS_MODULE, "member_loss", recorded)
    return seen


@pytest.mark.parametrize("family", PRUNE_FAMILIES)
def test_members_of_every_family(
    family: str, run_config: Any, few_digits: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(**CACTUS, compression_set={"family": family, "low": 0.6, "high": 0.6})
    other = make_step(config, few_digits)
    full_loss(other, "sabr")[0].backward()  # type: ignore[no-untyped-call]
    mask = masks(other.graph, other.params, family, 0.6, other.gradients())
    step = make_step(config, few_digits)
    members = _record_members(monkeypatch)
    losses, gradients = take(step)
    assert len(losses) == 2
    assert all(g.isfinite().all() for g in gradients.values())
    for name, tensor in members[0].items():
        assert torch.equal(tensor, step.params[name] * mask.get(name, 1.0)), name


@pytest.mark.parametrize(("unit", "level"), [("step", "int8"), ("int4", "int4")])
@pytest.mark.parametrize("chosen", [{"family": "gs-l2"}, {"strategy": "fixed", "size": 3, "channels": 0.5}])
def test_a_rounded_member_without_channels_is_the_level(
    chosen: dict[str, Any], unit: str, level: str, run_config: Any, few_digits: DataSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = run_config(
        **CACTUS, awp_radius=0.5, awp_unit=unit, awp_kind="rounding", awp_member="pruned",
        compression_set={"low": 0.5, "high": 0.5} | chosen, model={"name": "cnn_small", "batch_norm": False},
    )  # fmt: skip
    step = make_step(config, few_digits)
    members = _record_members(monkeypatch)
    take(step)
    (place,) = (i for i, family in enumerate(step.memory["families"]) if family == "gs-l2")
    mask = step.memory["masks"][place]
    _, found = remove_channels(step.graph, members[place], mask)
    deployed = materialize(step.graph, step.params, parse_level(f"prune:gs-l2:0.5+{level}")).params
    for name in (n for n in found if n.endswith("weight")):
        torch.testing.assert_close(found[name], deployed[name], rtol=1e-5, atol=1e-6)


def test_members_lose_weights_and_channels_in_turns(
    run_config: Any, few_digits: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"strategy": "fixed", "size": 3, "low": 0.9, "high": 0.9, "channels": 0.5}
    step = make_step(run_config(**CACTUS, compression_set=chosen), few_digits)
    members = _record_members(monkeypatch)
    expected = [
        {k: v * mask.get(k, 1.0) for k, v in step.params.items()}
        for mask in (masks(step.graph, step.params, family, s) for family, s in (("gu-l1", 0.9), ("gs-l2", 0.5)))
    ]
    losses, gradients = take(step)
    assert len(losses) == 3
    assert all(g.isfinite().all() for g in gradients.values())
    in_order = members if torch.equal(members[0]["fc1.weight"], expected[0]["fc1.weight"]) else members[::-1]
    for member, wanted in zip(in_order, expected, strict=True):
        assert all(torch.equal(member[k], wanted[k]) for k in wanted)


def test_loss_is_the_mean_over_the_members(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(**CACTUS, compression_set={"strategy": "fixed", "size": 2, "low": 0.5, "high": 0.5})
    step = make_step(config, few_digits)
    full, region = full_loss(step, "sabr")
    mask = masks(step.graph, step.params, "gu-l1", 0.5)
    pruned = member_loss(step, {k: v * mask.get(k, 1.0) for k, v in step.params.items()}, region, "sabr")
    losses, gradients = take(make_step(config, few_digits))
    assert losses == pytest.approx([full.item() / 2, pruned.item() / 2])
    ((full + pruned) / 2).backward()  # type: ignore[no-untyped-call]
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, step.params[name].grad)


@pytest.mark.parametrize("unit", AWP_UNITS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("strategy", "where", "members"), [("single", "separate", 2), ("single", "pruned", 1), ("none", "pruned", 1)]
)
def test_perturbed_members_stay_inside_the_radius(
    unit: str, steps: int, strategy: str, where: str, members: int, run_config: Any, few_digits: DataSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = run_config(
        **CACTUS,
        awp_radius=0.5,
        awp_unit=unit,
        awp_steps=steps,
        awp_member=where,
        compression_set={"strategy": strategy},
    )
    step = make_step(config, few_digits)
    seen = _record_members(monkeypatch)
    losses, _ = take(step)
    assert len(seen) == members == len(losses) - 1
    pruned = where == "pruned" and strategy != "none"
    mask = step.memory["masks"][0] if pruned else {}
    base = {k: v.detach() * mask.get(k, 1.0) for k, v in step.params.items()}
    limits = perturb.radii(step.graph, base, 0.5, unit)
    moved = 0.0
    for name, tensor in seen[0].items():  # the perturbed member comes first
        delta = tensor - base[name]
        moved += float(delta.abs().sum())
        limit = limits[name].expand_as(delta) if name in limits else torch.zeros_like(delta)
        assert (delta.abs() <= limit * (1 + 1e-5) + 1e-6).all()
        assert (tensor[mask[name] == 0] == 0).all() if name in mask else True
    assert moved > 0


@pytest.mark.parametrize("unit", ["step", "std", "absolute", "int4"])
@pytest.mark.parametrize("kind", ["noise", "rounding"])
@pytest.mark.parametrize(("strategy", "where", "members"), [("single", "separate", 2), ("single", "pruned", 1)])
def test_cheap_members_stay_inside_the_radius_and_cost_no_pass(
    unit: str, kind: str, strategy: str, where: str, members: int, run_config: Any, few_digits: DataSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(perturb, "ascend", _forbidden)
    monkeypatch.setattr(perturb, "jump", _forbidden)
    config = run_config(
        **CACTUS, awp_radius=0.5, awp_unit=unit, awp_kind=kind, awp_member=where, compression_set={"strategy": strategy}
    )
    step = make_step(config, few_digits)
    seen = _record_members(monkeypatch)
    losses, gradients = take(step)
    assert len(seen) == members == len(losses) - 1
    assert all(g.isfinite().all() for g in gradients.values())
    mask = step.memory["masks"][0] if where == "pruned" else {}
    base = {k: v.detach() * mask.get(k, 1.0) for k, v in step.params.items()}
    limits = perturb.radii(step.graph, base, 0.5, unit)
    for name, limit in limits.items():
        delta = seen[0][name] - base[name]
        assert (delta.abs() <= limit * (1 + 1e-5) + 1e-6).all()
        assert delta.abs().sum() > 0
        assert (seen[0][name][mask[name] == 0] == 0).all() if name in mask else True
    again = make_step(config, few_digits)
    losses_again, _ = take(again)
    assert losses == losses_again


def test_kinds_that_do_not_ascend_refuse_its_options(run_config: Any) -> None:
    with pytest.raises(ConfigError, match="awp_steps: got 3; expected nothing, or 1: noise does not ascend"):
        run_config(**CACTUS, awp_radius=0.5, awp_kind="noise", awp_steps=3)
    with pytest.raises(ConfigError, match="awp_unit: got 'relative'; expected a unit that makes a grid"):
        run_config(**CACTUS, awp_radius=0.5, awp_kind="rounding", awp_unit="relative")
    with pytest.raises(ConfigError, match="awp_kind"):
        run_config(method="sabr", awp_kind="noise")


def test_member_sees_the_first_fraction_of_the_batch(
    run_config: Any, few_digits: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def recorded(step: Step, params: Params, region: Any, kind: str) -> Tensor:
        sizes.append(len(region.labels))
        assert torch.equal(region.labels, step.labels[: len(region.labels)])
        return member_loss(step, params, region, kind)

    monkeypatch.setattr(CACTUS_MODULE, "member_loss", recorded)
    take(make_step(run_config(**CACTUS, compression_set={"member_fraction": 0.25}), few_digits))
    assert sizes == [16]


def test_masks_are_kept_for_refresh_every_steps(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(**CACTUS, compression_set={"refresh_every": 3})
    step = make_step(config, few_digits)
    drawn, kept = [], []
    for index in range(7):
        take(replace(step, index=index))
        drawn.append(step.memory["sparsities"])
        kept.append(step.memory["masks"])
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[3] == drawn[4] == drawn[5]
    assert len({drawn[0], drawn[3], drawn[6]}) == 3
    assert kept[0] is kept[2] is not kept[3]


def test_the_attack_is_shared(run_config: Any, few_digits: DataSet) -> None:
    calls: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Tensor:
        calls.append(1)
        return AS_WRITTEN.attack(*arguments, **options)

    config = run_config(**CACTUS, compression_set={"strategy": "triple"}, awp_radius=0.5)
    take(make_step(config, few_digits, passes=replace(AS_WRITTEN, attack=counted)))
    assert len(calls) == 1


def test_members_do_not_touch_the_statistics_of_the_full_network(run_config: Any, few_digits: DataSet) -> None:
    model = {"name": "mlp", "hidden": [8], "batch_norm": True}
    alone = make_step(run_config(method="sabr", model=model), few_digits)
    together = make_step(run_config(**CACTUS, model=model, compression_set={"strategy": "triple"}), few_digits)
    take(alone)
    take(together)
    assert alone.statistics.keys() == together.statistics.keys() != set()
    for name, pair in alone.statistics.items():
        for ours, theirs in zip(pair, together.statistics[name], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_without_weight_the_clean_pass_is_not_made(run_config: Any, few_digits: DataSet) -> None:
    passes = replace(AS_WRITTEN, standard=_forbidden)
    losses, _ = take(make_step(run_config(method="ibp", standard_weight=0.0), few_digits, passes=passes))
    assert losses[0] > 0


@pytest.mark.parametrize("epsilon", [0.0, 0.02])
def test_regularizer_adds_to_the_loss_during_the_ramp_only(
    epsilon: float, run_config: Any, few_digits: DataSet
) -> None:
    def loss(strength: float, at: float) -> float:
        config = run_config(method="ibp", train__regularizer=strength, train__initialization="default")
        weight = 1.0 if at == 0.0 else 0.7
        (value,), gradients = take(make_step(config, few_digits, epsilon=at, standard_weight=weight))
        assert all(g.isfinite().all() for g in gradients.values())
        return value

    assert loss(0.5, epsilon) > loss(0.0, epsilon)
    assert loss(0.5, 0.05) == loss(0.0, 0.05)  # at the final epsilon


def test_a_method_is_lazy(run_config: Any, few_digits: DataSet) -> None:
    terms = METHODS["cactus"](make_step(run_config(**CACTUS), few_digits))
    assert isinstance(terms, Iterator)
    assert next(terms).requires_grad


# --- the losses inside a step --------------------------------------------------------------------------------------

BATCH_NORM = {"name": "mlp", "hidden": [8], "batch_norm": True}


@pytest.mark.parametrize("loss", CERTIFIED_LOSSES)
def test_members_of_cactus_take_every_loss(loss: str, run_config: Any, few_digits: DataSet) -> None:
    config = run_config(method="cactus", certified_loss=loss, model=BATCH_NORM, awp_radius=0.5, awp_steps=2)
    losses, gradients = take(make_step(config, few_digits))
    assert len(losses) == 3
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients.values())


@pytest.mark.parametrize(("method", "stand_in"), [("taps", "ibp"), ("staps", "sabr")])
def test_latent_attacks_wait_for_the_end_of_the_ramp(
    method: str, stand_in: str, run_config: Any, few_digits: DataSet
) -> None:
    ramp = {"epsilon": 0.04}
    (during,), _ = take(make_step(run_config(method=method), few_digits, **ramp))
    (expected,), _ = take(make_step(run_config(method=stand_in), few_digits, **ramp))
    assert during == expected
    (after,), _ = take(make_step(run_config(method=method), few_digits))
    (other,), _ = take(make_step(run_config(method=stand_in), few_digits))
    assert after != other


def test_weight_of_crown_falls_as_epsilon_rises(run_config: Any, few_digits: DataSet) -> None:
    config = run_config(method="crown_ibp", crown_weight=0.2)
    weights = [make_step(config, few_digits, epsilon=e).options.crown_weight for e in (0.0, 0.025, 0.05)]
    assert weights == pytest.approx([1.0, 0.6, 0.2])
    interval = take(make_step(run_config(method="ibp"), few_digits))[0]
    assert take(make_step(run_config(method="crown_ibp"), few_digits))[0] == pytest.approx(interval)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_expressive_losses_leave_the_statistics_of_both_batches(
    weight: float, run_config: Any, few_digits: DataSet
) -> None:
    """The clean ones for the running statistics, made without a gradient where the clean loss has no weight."""
    step = make_step(run_config(method="mtl_ibp", model=BATCH_NORM, standard_weight=weight), few_digits)
    take(step)
    reference = make_step(run_config(method="sabr", model=BATCH_NORM), few_digits)
    take(reference)
    (mean, _), (other, _) = step.statistics["bn1"], step.adversarial_statistics["bn1"]
    torch.testing.assert_close(mean, reference.statistics["bn1"][0])
    assert not torch.allclose(mean, other)
    assert mean.requires_grad == (weight > 0)
    assert not reference.adversarial_statistics


def test_attack_of_expressive_losses_searches_its_own_radius(
    run_config: Any, few_digits: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    points: dict[float, Tensor] = {}
    for factor in (1.0, 2.1):
        step = make_step(run_config(method="cc_ibp", attack_radius_factor=factor), few_digits)
        _, region = full_loss(step, "cc_ibp")
        assert region.point is not None
        points[factor] = (region.point - step.images).abs().amax()
        torch.testing.assert_close(2 * region.ball.radius.max(), torch.tensor(0.1))
    assert points[1.0].item() == pytest.approx(0.05, abs=1e-6)
    assert points[2.1].item() == pytest.approx(0.105, abs=1e-6)


def test_the_regularizer_leaves_losses_without_bounds_alone(
    run_config: Any, few_digits: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cactus_ray.bounds.interval.propagate", _forbidden)
    for method in ("pgd", "standard"):
        losses, _ = take(make_step(run_config(method=method, train__regularizer=0.5), few_digits, epsilon=0.01))
        assert len(losses) == 1
