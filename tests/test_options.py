"""Options appear in a run exactly where they are used."""

from typing import Any

import pytest

from cactus_ray.config import CERTIFIED_LOSSES, METHODS, STORED_BITS, RunConfig, parse
from cactus_ray.errors import ConfigError
from cactus_ray.options import LOSS_OPTIONS, METHOD_KEYS, METHOD_OPTIONS, STAGE_SHARES, options_of

BASE: dict[str, Any] = {"data": {"name": "digits"}, "model": {"name": "mlp"}, "threat": {"epsilon": 0.1}}
SECTIONS = {"data", "model", "threat", "train", "method", "learning_rate", "seed"}
KINDS = [(m, None) for m in METHODS] + [(m, loss) for m in METHOD_OPTIONS for loss in CERTIFIED_LOSSES]


def config(method: str, loss: str | None, **changes: Any) -> RunConfig:
    chosen = {"certified_loss": loss} if loss else {}
    return parse(RunConfig, BASE | {"method": method} | chosen | changes)


@pytest.mark.parametrize(("method", "loss"), KINDS)
def test_a_run_holds_what_its_method_reads_and_nothing_else(method: str, loss: str | None) -> None:
    run = config(method, loss)
    assert set(run.to_dict()) == SECTIONS | set(options_of(method, loss))
    assert parse(RunConfig, run.to_dict()) == run
    assert run.loss == (loss or ("sabr" if method in METHOD_OPTIONS else method))


@pytest.mark.parametrize(("method", "loss"), KINDS)
def test_an_option_that_is_not_read_is_refused_and_one_that_is_changes_the_run(method: str, loss: str | None) -> None:
    run = config(method, loss)
    values = {
        "standard_weight": 0.5, "box_ratio": 0.5, "relu_shrinkage": 0.5, "attack_steps": 7, "attack_step_size": 0.5,
        "attack_radius_factor": 2.0, "ibp_weight": 0.1, "tail_layers": 3, "latent_steps": 3, "latent_restarts": 3,
        "latent_targets": 3, "gradient_scale": 2.0, "crown_weight": 0.7, "awp_radius": 0.5, "awp_unit": "std",
        "awp_steps": 2, "awp_member": "pruned", "awp_kind": "noise", "compression_set": {"strategy": "dense"},
        "target_sparsity": 0.5, "nrs_weight": 0.5, "weight_bits": 4, "awp_gamma": 0.5,
        "codebook_bits": 3, "admm_weight": 0.5, "admm_every": 5,
        "mask_noise": 0.2, "mask_saturated": 0.1,
        "stage_shares": [*range(1, 1 + len(STAGE_SHARES.get(method, "1")))],
    }  # fmt: skip
    assert values.keys() | {"certified_loss"} == METHOD_KEYS
    for key, value in values.items():
        if key in options_of(method, loss):
            assert config(method, loss, **{key: value}).config_hash != run.config_hash
        else:
            with pytest.raises(ConfigError, match=rf"{key}: got .*method '{method}' does not use it"):
                config(method, loss, **{key: value})


def test_every_loss_has_options() -> None:
    assert set(LOSS_OPTIONS) == {*CERTIFIED_LOSSES, "standard"}
    assert set(METHODS) == {*CERTIFIED_LOSSES, "standard", *METHOD_OPTIONS}


def test_stages_are_options_of_their_methods() -> None:
    assert set(STAGE_SHARES) == {m for m in METHODS if "stage_shares" in options_of(m)}
    run = config("hydra", None, train={"epochs": 3})
    assert run.stage_shares == (100.0, 20.0, 100.0)
    stages = "3 numbers, one for each stage of hydra: pretrain, mask, finetune"
    with pytest.raises(ConfigError, match=rf"stage_shares: got \[1.0, 2.0\]; expected {stages}"):
        config("hydra", None, stage_shares=[1, 2])
    with pytest.raises(ConfigError, match=r"stage_shares\[1\]: got 0"):
        config("hydra", None, stage_shares=[1, 0, 1])
    with pytest.raises(ConfigError, match=r"train.epochs: got 2; expected at least 3, one for each stage of hydra"):
        config("hydra", None, train={"epochs": 2})


@pytest.mark.parametrize(("method", "key"), [("qa_ibp", "weight_bits"), ("atmc", "codebook_bits")])
def test_widths_without_a_level_are_refused(method: str, key: str) -> None:
    assert [getattr(config(method, None, **{key: bits}), key) for bits in STORED_BITS] == list(STORED_BITS)
    for bits in (1, 7, 9):
        with pytest.raises(ConfigError, match=rf"{key}: got {bits}; expected one of 2, 3, 4, 5, 6, 8"):
            config(method, None, **{key: bits})


def test_defaults_depend_on_the_loss_also_inside_cactus() -> None:
    assert config("sabr", None).attack_step_size == config("cactus", "sabr").attack_step_size == 1.0
    assert config("mtl_ibp", None).attack_step_size == config("cactus", "mtl_ibp").attack_step_size == 10.0
    assert config("pgd", None).attack_steps == 10


def test_training_radius() -> None:
    assert config("ibp", None).training_epsilon == 0.1
    assert config("ibp", None, train={"epsilon_factor": 2.0}).training_epsilon == pytest.approx(0.2)
