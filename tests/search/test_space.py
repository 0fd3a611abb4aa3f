"""A search space means what it says, and whatever is wrong in it is said at once."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cactus_ray.commands.folder import write_space
from cactus_ray.config import METHODS, RunConfig, parse
from cactus_ray.errors import ConfigError, UserError
from cactus_ray.search.document import read_yaml
from cactus_ray.search.domains import Choices
from cactus_ray.search.sampler import OptunaSampler
from cactus_ray.search.space import check_launch, load_space, parse_space

SPACES = Path(__file__).parents[2] / "search_spaces"

# As printed in the design: the block must go on working to the letter.
EXAMPLE = """
name: digits
data: {name: digits}                       # root: for data sets on disk
model: {name: cnn_small}
threat: {norm: linf, epsilon: 0.1, domain: [0, 1]}
levels: [dense, int8, int4, "prune:gu-l1:0.9", "prune:gu-l1:0.95", "prune:gs-l2:0.5+int8"]
train: {epochs: 30, batch_size: 64, optimizer: adam}
parameters:                                # the W&B sweep grammar
  method: {values: [cactus, sabr]}
  learning_rate: {distribution: log_uniform_values, min: 0.0003, max: 0.01}
  certified_loss: {values: [ibp, sabr]}
  standard_weight: {min: 0.1, max: 0.7}
  compression_set:
    when: {method: [cactus]}               # an inactive parameter is absent from the configuration and its hash
    parameters:
      strategy: {values: [single, triple, progressive]}
      high: {min: 0.75, max: 0.98}
  awp_radius: {values: [0.0, 0.25, 0.5, 1.0], when: {method: [cactus]}}
objectives:
  - {metric: mean_certified_accuracy, goal: maximize}
  - {metric: "certified_accuracy@prune:gu-l1:0.95", goal: maximize}
constraints:
  - {metric: "standard_accuracy@int8", min: 0.9}
front: {certified_accuracy: maximize, bytes: minimize, standard_accuracy: maximize}
search: {trials: 12, sampler: tpe, seed: 0}
verification: {samples: selection, attack_steps: 40, bound: crown, seconds_per_sample: 0}
resources: {workers: 1, cpus_per_worker: 1, gpus_per_worker: 0, verifiers: 1, execution: auto, threads: 1}
wandb: {mode: auto, project: cactus}
"""
MINIMAL: dict[str, Any] = {
    "name": "small", "data": {"name": "digits"}, "model": {"name": "cnn_small"}, "threat": {"epsilon": 0.1},
    "levels": ["dense", "int8"],
}  # fmt: skip


def with_parameters(**parameters: Any) -> dict[str, Any]:
    return {**copy.deepcopy(MINIMAL), "parameters": parameters}


def write(folder: Path, text: str) -> Path:
    path = folder / "space.yaml"
    path.write_text(text)
    return path


# --- what is right -------------------------------------------------------------------------------------------------


def test_the_printed_example_works(tmp_path: Path) -> None:
    space = load_space(write(tmp_path, EXAMPLE))
    assert space.levels[3:] == ("prune:gu-l1:0.9", "prune:gu-l1:0.95", "prune:gs-l2:0.5+int8")
    assert [p.name for p in space.parameters] == [
        "method", "learning_rate", "certified_loss", "standard_weight", "compression_set.strategy",
        "compression_set.high", "awp_radius",
    ]  # fmt: skip
    assert [(o.metric, o.goal) for o in space.objectives] == [
        ("mean_certified_accuracy", "maximize"), ("certified_accuracy@prune:gu-l1:0.95", "maximize"),
    ]  # fmt: skip
    assert [(c.metric, c.min, c.max) for c in space.constraints] == [("standard_accuracy@int8", 0.9, None)]
    assert (space.search.trials, space.samples, space.threat.domain) == (12, "selection", (0.0, 1.0))


def test_the_shipped_digits_space_answers_the_question_of_the_example(tmp_path: Path) -> None:
    shipped, example = load_space(SPACES / "digits.yaml"), load_space(write(tmp_path, EXAMPLE))
    for same in ("name", "levels", "objectives", "constraints", "front", "data", "threat", "search", "resources"):
        assert getattr(shipped, same) == getattr(example, same)
    assert {p.name for p in example.parameters} < {p.name for p in shipped.parameters}


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_spaces_load_and_survive_being_written_out(path: Path) -> None:
    space = load_space(path)
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    assert parse_space(space.to_dict()) == space
    assert parse_space(yaml.safe_load(yaml.safe_dump(space.to_dict(), sort_keys=False))) == space


def test_the_shipped_study_over_methods_holds_all_of_them_and_tries_each_before_it_draws() -> None:
    space = load_space(SPACES / "methods_digits.yaml")
    (method,) = (p for p in space.parameters if p.name == "method")
    assert isinstance(method.domain, Choices)
    assert sorted(method.domain.values) == sorted(METHODS)
    assert {point["method"] for point in space.points} == set(METHODS)
    assert space.search.trials >= 2 * len(space.points)
    sampler = OptunaSampler(space)
    for point in space.points:
        suggestion = sampler.ask()
        assert suggestion is not None
        assert suggestion.origin == "point"
        assert point.items() <= suggestion.values.items()
        assert space.configuration(suggestion.values, 0).method == point["method"]


def test_only_five_keys_are_needed() -> None:
    space = parse_space(MINIMAL)
    assert space.parameters == ()
    assert space.front == {"certified_accuracy": "maximize", "bytes": "minimize", "standard_accuracy": "maximize"}
    config = space.configuration({}, 3)
    assert (config.method, config.train.epochs, config.threat.epsilon) == ("cactus", 30, 0.1)


def test_levels_and_metrics_become_canonical() -> None:
    data = {
        **MINIMAL,
        "levels": ["dense", "prune:gu-l1:.50 + int8"],
        "objectives": [{"metric": "bytes@prune:gu-l1:0.5+int8"}],
    }
    space = parse_space(data)
    assert space.levels == ("dense", "prune:gu-l1:0.5+int8")
    assert (space.objectives[0].metric, space.objectives[0].goal) == ("bytes@prune:gu-l1:0.5+int8", "minimize")


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    text = (
        yaml.safe_dump(MINIMAL)
        + "parameters:\n  learning_rate: {distribution: log_uniform_values, min: 3e-4, max: 1E-2}\n"
    )
    assert load_space(write(tmp_path, text)).parameters[0].domain.ends() == (0.0003, 0.01)


@pytest.mark.parametrize("text", ["1e5", "1E5", "-2e8", ".5e-3", "2e8b2-net", "1e5x", "12e3.4", "on", "1.5", "étude"])
def test_text_that_looks_like_a_number_stays_text(text: str, tmp_path: Path) -> None:
    assert read_yaml(f"root: '{text}'", "space.yaml") == {"root": text}
    space = parse_space({**MINIMAL, "data": {"name": "mnist", "root": text}})
    write_space(space, tmp_path / "space.yaml")
    assert load_space(tmp_path / "space.yaml") == space


@pytest.mark.parametrize("text", ["2e8b2-net", "1e5x", "12e3.4"])
def test_text_that_begins_like_a_number_needs_no_quotes(text: str) -> None:
    assert read_yaml(f"root: {text}", "space.yaml") == {"root": text}


def test_a_radius_may_be_a_fraction_of_pixel_values(tmp_path: Path) -> None:
    text = EXAMPLE.replace("epsilon: 0.1", "epsilon: 8/255")
    assert load_space(write(tmp_path, text)).threat.epsilon == 8 / 255
    space = load_space(write(tmp_path, EXAMPLE), overrides={"threat.epsilon": "2/255"})
    assert (space.threat.epsilon, space.to_dict()["threat"]["epsilon"]) == (2 / 255, 2 / 255)


def test_quantised_ranges_hold_exactly_the_multiples() -> None:
    space = parse_space(
        with_parameters(
            **{
                "compression_set.high": {"distribution": "q_uniform", "min": 0.61, "max": 0.99, "q": 0.1},
                "train.batch_size": {"distribution": "q_log_uniform_values", "min": 10, "max": 300, "q": 32},
                "train.epochs": {"min": 3, "max": 5},
            }
        )
    )
    high, batch, epochs = (p.domain for p in space.parameters)
    assert (high.ends(), batch.ends(), epochs.ends()) == ((0.7, 0.9), (32, 288), (3, 5))
    assert high.contains(0.8)
    assert not high.contains(0.75)
    assert not batch.contains(33)
    assert [type(v) for v in batch.ends()] == [int, int]


# --- conditions ----------------------------------------------------------------------------------------------------


def test_an_inactive_parameter_is_absent_from_the_configuration_and_its_hash() -> None:
    space = parse_space(yaml.safe_load(EXAMPLE))
    shared = {"learning_rate": 0.001, "standard_weight": 0.5}
    sabr = space.configuration({"method": "sabr", **shared}, 1)
    carried = {"certified_loss": "ibp", "compression_set.high": 0.9, "awp_radius": 1.0}
    assert space.configuration({"method": "sabr", **shared, **carried}, 1).config_hash == sabr.config_hash
    assert not {"compression_set", "awp_radius", "certified_loss"} & set(sabr.to_dict())
    cactus = space.configuration({"method": "cactus", **shared, **carried}, 1)
    assert cactus.to_dict()["compression_set"]["high"] == 0.9
    assert parse(RunConfig, cactus.to_dict()) == cactus


def test_conditions_form_chains_in_whatever_order_they_are_written() -> None:
    space = parse_space(
        with_parameters(
            **{
                "compression_set.size": {"values": [3, 4], "when": {"compression_set.strategy": ["random"]}},
                "compression_set.strategy": {"values": ["random", "single"], "when": {"method": ["cactus"]}},
                "method": {"values": ["cactus", "ibp"]},
            }
        )
    )
    assert [p.name for p in space.parameters] == ["method", "compression_set.strategy", "compression_set.size"]
    size = space.parameters[2]
    assert space.is_active(size, {"method": "cactus", "compression_set.strategy": "random"})
    assert not space.is_active(size, {"method": "cactus", "compression_set.strategy": "single"})
    assert not space.is_active(size, {"method": "ibp"})


def test_what_a_method_does_not_read_is_inactive_without_saying_so() -> None:
    space = parse_space(
        with_parameters(
            method={"values": ["cactus", "ibp"]},
            certified_loss={"values": ["ibp", "sabr"]},
            box_ratio={"min": 0.2, "max": 0.8},
        )
    )
    loss, box = space.parameters[1:]
    assert not space.is_active(loss, {"method": "ibp"})
    assert not space.is_active(box, {"method": "cactus", "certified_loss": "ibp"})
    assert space.is_active(box, {"method": "cactus", "certified_loss": "sabr"})


def test_options_of_losses_are_drawn_only_with_them() -> None:
    options = {
        "box_ratio": ("sabr", "staps"), "ibp_weight": ("mtl_ibp", "cc_ibp", "exp_ibp"), "crown_weight": ("crown_ibp",),
        "gradient_scale": ("taps", "staps"),
    }  # fmt: skip
    losses = [loss for readers in options.values() for loss in readers] + ["ibp", "pgd"]
    space = parse_space(
        with_parameters(
            method={"values": ["cactus", "standard", *sorted(set(losses))]},
            certified_loss={"values": sorted(set(losses))},
            standard_weight={"min": 0.1, "max": 0.5},
            **{option: {"values": [0.4, 0.8]} for option in options},
        )
    )
    named = {p.name: p for p in space.parameters}
    for option, readers in options.items():
        for loss in losses:
            assert space.is_active(named[option], {"method": loss}) == (loss in readers)
            assert space.is_active(named[option], {"method": "cactus", "certified_loss": loss}) == (loss in readers)
    assert not space.is_active(named["standard_weight"], {"method": "standard"})
    plain = space.configuration({"method": "standard", "standard_weight": 0.2, "ibp_weight": 0.4}, 1).to_dict()
    assert "standard_weight" not in plain
    assert "ibp_weight" not in plain


def test_a_condition_of_a_group_and_of_its_member_both_hold() -> None:
    group = {
        "when": {"method": ["cactus"]},
        "parameters": {
            "strategy": {"values": ["random", "single"]},
            "size": {"values": [3, 4], "when": {"compression_set.strategy": ["random"]}},
        },
    }
    space = parse_space(with_parameters(method={"values": ["cactus", "sabr"]}, compression_set=group))
    assert dict(space.parameters[-1].when) == {"method": ("cactus",), "compression_set.strategy": ("random",)}


def test_conditions_on_lists_survive_being_written_out() -> None:
    widths = {"values": [[32], [64, 32]]}
    momentum = {"min": 0.1, "max": 0.9, "when": {"model.hidden": [[64, 32]]}}
    readers = {"model": {"name": "mlp"}, "train": {"optimizer": "sgd"}}
    space = parse_space(with_parameters(**{"model.hidden": widths, "train.momentum": momentum}) | readers)
    assert space.is_active(space.parameters[1], {"model.hidden": (64, 32)})
    assert parse_space(yaml.safe_load(yaml.safe_dump(space.to_dict()))) == space


def test_seeds_differ_between_trials_and_studies_and_are_stable() -> None:
    space, other = (parse_space({**MINIMAL, "search": {"seed": seed}}) for seed in (0, 1))
    seeds = [space.configuration({}, n).seed for n in range(1, 50)]
    assert len(set(seeds)) == len(seeds)
    assert seeds[0] != other.configuration({}, 1).seed
    assert seeds == [parse_space(MINIMAL).configuration({}, n).seed for n in range(1, 50)]


# --- --set ---------------------------------------------------------------------------------------------------------


def test_set_reaches_every_kind_of_key() -> None:
    data = yaml.safe_load(EXAMPLE)
    sets = {
        "train.epochs": "5", "search.trials": "3", "threat.epsilon": "0.2", "learning_rate": "3e-2", "name": "x",
        "verification.samples": "50", "levels": "[dense, int4, int8, 'prune:gu-l1:0.95']", "awp_steps": "2",
        "data.root": "some",
    }  # fmt: skip
    space = parse_space(data, overrides=sets)
    config = space.configuration({"method": "cactus"}, 1)
    assert (config.train.epochs, config.learning_rate, config.awp_steps, config.data.root) == (5, 0.03, 2, "some")
    assert (space.search.trials, space.threat.epsilon, space.samples, space.name) == (3, 0.2, 50, "x")
    assert space.levels == ("dense", "int4", "int8", "prune:gu-l1:0.95")
    assert "learning_rate" not in [p.name for p in space.parameters]
    assert parse_space(space.to_dict()) == space


def test_fixing_a_method_removes_what_it_never_reads() -> None:
    space = parse_space(yaml.safe_load(EXAMPLE), overrides={"method": "sabr"})
    assert [p.name for p in space.parameters] == ["learning_rate", "standard_weight"]
    assert space.base["method"] == "sabr"
    assert parse_space(space.to_dict()) == space


def test_fixing_a_conditional_parameter_keeps_its_condition() -> None:
    space = parse_space(yaml.safe_load(EXAMPLE), overrides={"awp_radius": "0.3"})
    shared = {"learning_rate": 0.001, "standard_weight": 0.5}
    assert space.configuration({"method": "cactus", **shared, "awp_radius": 0.3}, 1).awp_radius == 0.3
    assert space.configuration({"method": "sabr", **shared}, 1).awp_radius is None


def test_null_takes_a_key_away() -> None:
    space = parse_space(MINIMAL, overrides={"model.name": "null", "model.factory": "mine:net"})
    assert space.base["model"].get("name") is None
    assert space.configuration({}, 1).model.factory == "mine:net"


@pytest.mark.parametrize(
    ("key", "text", "parts"),
    [
        ("train.epoch", "5", ["--set train.epoch", "5", "train.epochs"]),
        ("trials", "3", ["--set trials", "3", "search.KEY"]),
        ("threat.epsilon", "-0.1", ["--set threat.epsilon", "-0.1", "[0.0, 1.0]"]),
        ("threat.epsilon", ".nan", ["--set threat.epsilon", "nan", "finite"]),
        ("learning_rate", "fast", ["--set learning_rate", "fast", "finite number"]),
        ("learning_rate", "null", ["--set learning_rate", "None", "finite number"]),
        ("verification.sample", "5", ["--set verification.sample", "verification.samples"]),
        ("parameters", "{}", ["--set parameters", "no such key"]),
        ("nrs_weight", "0.5", ["--set nrs_weight", "that a possible method reads", "nrsloss would"]),
        ("levels", "[int7]", ["levels[0]", "int7", "int8"]),
        ("name", "[", ["--set name", "line 1", "valid YAML"]),
    ],
)
def test_a_bad_set_is_named(key: str, text: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_space(MINIMAL, "file.yaml", {key: text})
    assert all(part in str(caught.value) for part in parts), str(caught.value)


# --- what is wrong -------------------------------------------------------------------------------------------------

CACTUS_OR_SABR = {"values": ["cactus", "sabr"]}
BAD_KEYS = [
    ({"levls": ["dense"]}, "levls", "['dense']", "levels"),
    ({"name": "a/b"}, "name", "'a/b'", "letters"),
    ({"name": 7}, "name", "7", "text"),
    ({"name": None}, "name", "None", "digits"),
    ({"data": {"name": "cifar"}}, "data.name", "'cifar'", "mnist"),
    ({"data": {"name": "digits", "rot": "x"}}, "data.rot", "'x'", "root"),
    ({"data": "digits"}, "data", "'digits'", "mapping"),
    ({"model": {"name": "vgg"}}, "model.name", "'vgg'", "cnn_small"),
    ({"model": {}}, "model", "width", "name or factory"),
    ({"model": {"name": "mlp", "hidden": [0]}}, "model.hidden[0]", "0", "whole number"),
    ({"threat": {"epsilon": -0.1}}, "threat.epsilon", "-0.1", "[0.0, 1.0]"),
    ({"threat": {"epsilon": float("nan")}}, "threat.epsilon", "nan", "finite"),
    ({"threat": {"epsilon": float("inf")}}, "threat.epsilon", "inf", "finite"),
    ({"threat": {"epsilon": "8/0"}}, "threat.epsilon", "'8/0'", "fraction such as 8/255"),
    ({"threat": {"epsilon": "9" * 400 + "/1"}}, "threat.epsilon", "9999", "fraction such as 8/255"),
    ({"threat": {"epsilon": "300/255"}}, "threat.epsilon", str(300 / 255), "[0.0, 1.0]"),
    ({"threat": {"epsilon": "-8/255"}}, "threat.epsilon", "'-8/255'", "finite number"),
    ({"threat": {"epsilon": True}}, "threat.epsilon", "True", "finite number"),
    ({"threat": {}}, "threat.epsilon", "None", "radius"),
    ({"threat": {"epsilon": 0.1, "norm": "l2"}}, "threat.norm", "'l2'", "linf"),
    ({"threat": {"epsilon": 0.1, "domain": [1, 0]}}, "threat.domain", "[1.0, 0.0]", "increasing"),
    ({"threat": {"epsilon": 0.1, "domain": [0]}}, "threat.domain", "[0]", "2 numbers"),
    ({"threat": {"epsilon": 0.9, "domain": [0, 0.5]}}, "threat.epsilon", "0.9", "width of the domain"),
    ({"levels": []}, "levels", "[]", "at least one level"),
    ({"levels": "dense"}, "levels", "'dense'", "a list"),
    ({"levels": ["dense", "int7"]}, "levels[1]", "'int7'", "int8"),
    ({"levels": ["int8+prune:gu-l1:0.5"]}, "levels[0]", "int8+prune", "order"),
    ({"levels": ["prune:gu-l1:1.0"]}, "levels[0]", "1.0", "below 1"),
    ({"levels": ["prune:xu-l1:0.5"]}, "levels[0]", "xu-l1", "gu-l1"),
    ({"levels": ["prune:gu-l1:0.5", "prune:gu-l1:0.50"]}, "levels[1]", "0.50", "not yet listed"),
    ({"levels": [8]}, "levels[0]", "8", "text"),
    ({"train": {"epochs": 0}}, "train.epochs", "0", "[1"),
    ({"train": {"epochs": 2.5}}, "train.epochs", "2.5", "whole number"),
    ({"train": {"optimiser": "adam"}}, "train.optimiser", "'adam'", "optimizer"),
    ({"train": [1]}, "train", "[1]", "mapping"),
    ({"search": {"trials": 0}}, "search.trials", "0", "[1"),
    ({"search": {"sampler": "cma"}}, "search.sampler", "'cma'", "nsga2"),
    ({"search": {"concurrency": 0}}, "search.concurrency", "0", "[1"),
    ({"verification": {"samples": 0}}, "verification.samples", "0", "at least 1"),
    ({"verification": {"samples": "test"}}, "verification.samples", "'test'", "selection"),
    ({"verification": {"samples": True}}, "verification.samples", "True", "whole number"),
    ({"verification": {"bounds": "ibp"}}, "verification.bounds", "'ibp'", "samples"),
    ({"verification": {"bound": "exact"}}, "verification.bound", "'exact'", "crown"),
    ({"resources": {"workers": 0}}, "resources.workers", "0", "[1"),
    ({"resources": {"gpus_per_worker": -1}}, "resources.gpus_per_worker", "-1", "[0.0"),
    ({"resources": {"gpus_per_worker": 1.5}}, "resources.gpus_per_worker", "1.5", "whole number"),
    ({"resources": {"gpus_per_verifier": 2.5}}, "resources.gpus_per_verifier", "2.5", "whole number"),
    ({"resources": {"verify_seconds_per_trial": -1}}, "resources.verify_seconds_per_trial", "-1", "[0.0"),
    ({"resources": {"execution": "direct", "workers": 2}}, "resources.execution", "'direct'", "one worker"),
    ({"resources": {"execution": "ray"}}, "resources.execution", "'ray'", "direct"),
    ({"wandb": {"mode": False}}, "wandb.mode", "False", "disabled"),
    ({"objectives": []}, "objectives", "[]", "at least one"),
    ({"objectives": {"metric": "bytes@int8"}}, "objectives", "bytes@int8", "a list"),
    ({"objectives": [{"metric": "accuracy"}]}, "objectives[0].metric", "'accuracy'", "mean_certified_accuracy"),
    ({"objectives": [{"metric": "bytes@int4"}]}, "objectives[0].metric", "'bytes@int4'", "levels dense, int8"),
    ({"objectives": [{"metric": "latency@int8"}]}, "objectives[0].metric", "nothing reports", "bytes"),
    ({"objectives": [{"metric": "bytes@int7"}]}, "objectives[0].metric", "'bytes@int7'", "after the @"),
    ({"objectives": [{"metric": "hypervolume", "goal": "max"}]}, "objectives[0].goal", "'max'", "maximize"),
    ({"objectives": [{"metrik": "hypervolume"}]}, "objectives[0].metrik", "'hypervolume'", "metric"),
    ({"objectives": [{"metric": "hypervolume"}] * 2}, "objectives[1].metric", "'hypervolume'", "once"),
    ({"constraints": [{"metric": "accuracy", "min": 1}]}, "constraints[0].metric", "'accuracy'", "is reported"),
    ({"constraints": [{"metric": "hypervolume"}]}, "constraints[0]", "hypervolume", "min, max or both"),
    ({"constraints": [{"metric": "hypervolume", "min": 2, "max": 1}]}, "constraints[0].min", "2", "at most max"),
    ({"constraints": [{"metric": "hypervolume", "min": float("nan")}]}, "constraints[0].min", "nan", "finite"),
    ({"front": {"certified": "maximize"}}, "front.certified", "'certified'", "certified_accuracy"),
    ({"front": {"bytes": "min"}}, "front.bytes", "'min'", "minimize"),
    ({"front": {}}, "front", "{}", "mapping"),
    ({"parameters": ["method"]}, "parameters", "['method']", "mapping"),
]
BAD_PARAMETERS = [
    ({"learning_rat": {"value": 1}}, "parameters.learning_rat", "learning_rat", "learning_rate"),
    ({"train": {"parameters": {"epoch": {"value": 1}}}}, "parameters.train.parameters.epoch", "epoch", "train.epochs"),
    ({"threat.epsilon": {"min": 0.1, "max": 0.2}}, "parameters.threat.epsilon", "threat.epsilon", "section"),
    ({"data.name": {"values": ["digits", "mnist"]}}, "parameters.data.name", "data.name", "section"),
    ({"method": "cactus"}, "parameters.method", "'cactus'", "{value: cactus}"),
    ({"method": {}}, "parameters.method", "{}", "exactly one of"),
    ({"method": {"value": "cactus", "values": ["ibp"]}}, "parameters.method", "cactus", "exactly one of"),
    ({"method": {"values": []}}, "parameters.method.values", "[]", "at least one"),
    ({"method": {"values": "cactus"}}, "parameters.method.values", "'cactus'", "list"),
    ({"method": {"values": ["cactus", "fgsm"]}}, "parameters.method.values[1]", "'fgsm'", "sabr"),
    ({"method": {"values": ["ibp", "ibp"]}}, "parameters.method.values[1]", "'ibp'", "once"),
    ({"method": {"values": [None]}}, "parameters.method.values[0]", "None", "cactus"),
    ({"method": {"min": 0, "max": 1}}, "parameters.method", "'max': 1", "value or values"),
    ({"method": {"vals": ["ibp"]}}, "parameters.method.vals", "['ibp']", "values"),
    ({"learning_rate": {"min": 0.01, "max": 0.001}}, "parameters.learning_rate.min", "0.01", "less than max"),
    ({"learning_rate": {"min": 0.01, "max": 0.01}}, "parameters.learning_rate.min", "0.01", "value:"),
    ({"learning_rate": {"min": 0.01}}, "parameters.learning_rate.max", "None", "stands alone"),
    ({"learning_rate": {"min": 0.0, "max": 0.1}}, "parameters.learning_rate.min", "0.0", "(0.0"),
    ({"learning_rate": {"min": "tiny", "max": 0.1}}, "parameters.learning_rate.min", "'tiny'", "finite number"),
    ({"learning_rate": {"min": float("nan"), "max": 0.1}}, "parameters.learning_rate.min", "nan", "finite"),
    ({"learning_rate": {"min": 1, "max": 2}}, "parameters.learning_rate.min", "1", "1.0 for a continuous range"),
    ({"compression_set.high": {"min": 0.5, "max": 1.0}}, "parameters.compression_set.high.max", "1.0", "1.0)"),
    (
        {"learning_rate": {"min": 0.1, "max": 0.2, "distribution": "normal"}},
        "parameters.learning_rate.distribution", "'normal'", "log_uniform_values",
    ),
    (
        {"standard_weight": {"min": 0.0, "max": 0.2, "distribution": "log_uniform_values"}},
        "parameters.standard_weight.min", "0.0", "more than 0",
    ),
    (
        {"train.epochs": {"min": 1, "max": 9, "distribution": "uniform"}},
        "parameters.train.epochs.distribution", "'uniform'", "int_uniform",
    ),
    (
        {"awp_radius": {"min": 0.5, "max": 2.0, "distribution": "int_uniform"}},
        "parameters.awp_radius.min", "0.5", "whole numbers",
    ),
    (
        {"standard_weight": {"min": 0.1, "max": 0.2, "distribution": "q_uniform"}},
        "parameters.standard_weight.q", "None", "multiples of q",
    ),
    ({"standard_weight": {"min": 0.1, "max": 0.2, "q": 0.1}}, "parameters.standard_weight.q", "0.1", "has no q"),
    (
        {"standard_weight": {"min": 0.1, "max": 0.2, "distribution": "q_uniform", "q": 0.0}},
        "parameters.standard_weight.q", "0.0", "(0.0",
    ),
    (
        {"standard_weight": {"min": 0.11, "max": 0.19, "distribution": "q_uniform", "q": 0.1}},
        "parameters.standard_weight.q", "0.1", "a multiple of q between",
    ),
    ({"method": {"value": "ibp", "q": 1}}, "parameters.method.q", "1", "belongs to min and max"),
    (
        {"train.epochs": {"value": 3}, "train": {"parameters": {"epochs": {"value": 4}}}},
        "parameters.train.parameters.epochs", "train.epochs", "once",
    ),
    ({"train": {"parameters": {}, "min": 1}}, "parameters.train.min", "1", "when, parameters"),
    ({"weight_bits": {"values": [4, 7]}}, "parameters.weight_bits.values[1]", "7", "one of 2, 3, 4, 5, 6, 8"),
    (
        {"codebook_bits": {"min": 2, "max": 8}},
        "parameters.codebook_bits", "{'min': 2, 'max': 8}", "value or values: this key is one of 2, 3, 4, 5, 6, 8",
    ),
    (
        {"method": CACTUS_OR_SABR, "awp_radius": {"value": 1, "when": {"metod": ["cactus"]}}},
        "parameters.awp_radius.when.metod", "'metod'", "method",
    ),
    (
        {"method": CACTUS_OR_SABR, "awp_radius": {"value": 1, "when": {"method": ["ibp"]}}},
        "parameters.awp_radius.when.method", "'ibp'", "cactus, sabr",
    ),
    (
        {"method": CACTUS_OR_SABR, "awp_radius": {"value": 1, "when": {"method": "cactus"}}},
        "parameters.awp_radius.when.method", "'cactus'", "a list",
    ),
    (
        {"method": CACTUS_OR_SABR, "awp_radius": {"value": 1, "when": ["method"]}},
        "parameters.awp_radius.when", "['method']", "mapping",
    ),
    (
        {"method": CACTUS_OR_SABR, "awp_radius": {"value": 1, "when": {"method": ["sabr"]}}},
        "parameters.awp_radius", "awp_radius", "cactus would",
    ),
    (
        {"method": {"value": "ibp"}, "box_ratio": {"value": 0.5}},
        "parameters.box_ratio", "box_ratio", "c_sam, sabr, staps would",
    ),
    (
        {"learning_rate": {"min": 0.1, "max": 0.2}, "awp_radius": {"value": 1, "when": {"learning_rate": [0.1]}}},
        "parameters.awp_radius.when.learning_rate", "[0.1]", "continuous",
    ),
    (
        {
            "awp_steps": {"values": [1, 2], "when": {"awp_unit": ["std"]}},
            "awp_unit": {"values": ["step", "std"], "when": {"awp_steps": [1]}},
        },
        "parameters.awp_steps.when", "awp_steps -> awp_unit -> awp_steps", "lead back",
    ),
    (
        {
            "method": CACTUS_OR_SABR,
            "compression_set": {
                "when": {"method": ["cactus"]},
                "parameters": {"high": {"value": 0.8, "when": {"method": ["sabr"]}}},
            },
        },
        "parameters.compression_set.parameters.high.when.method", "['sabr']", "outer condition",
    ),
    (
        {"compression_set.low": {"min": 0.1, "max": 0.8}}, "parameters.compression_set.low", "0.8", "low at most high",
    ),
    (
        {"compression_set.low": {"value": 0.6}, "compression_set.high": {"min": 0.5, "max": 0.9}},
        "parameters.compression_set.high", "0.5", "low at most high",
    ),
    (
        {"compression_set.low": {"value": 0.6}, "compression_set.high": {"value": 0.5}},
        "compression_set.low", "0.6", "at most compression_set.high",
    ),
    (
        {"compression_set.family": {"values": ["gu-l1", "gs-l2"]}, "compression_set.channels": {"values": [0.0, 0.5]}},
        "parameters.compression_set.family", "gs-l2", "families of single weights",
    ),
    (
        {"compression_set.family": {"value": "ls-l1"}, "compression_set.channels": {"min": 0.1, "max": 0.5}},
        "parameters.compression_set.channels", "ls-l1", "families of single weights",
    ),
    (
        {"compression_set.family": {"value": "ls-l1"}, "compression_set.channels": {"value": 0.5}},
        "compression_set.channels", "0.5", "every member of family ls-l1 loses channels",
    ),
    (
        {"method": {"values": ["taps", "ibp"]}, "train.ramp": {"values": [0.98, 0.3]}},
        "train.ramp", "0.98", "taps begins where the ramp ends",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "path", "value", "hint"), BAD_KEYS)
def test_a_bad_key_is_refused(change: dict[str, Any], path: str, value: str, hint: str) -> None:
    assert_refused({**copy.deepcopy(MINIMAL), **change}, path, value, hint)


@pytest.mark.parametrize(("parameters", "path", "value", "hint"), BAD_PARAMETERS)
def test_a_bad_parameter_is_refused(parameters: dict[str, Any], path: str, value: str, hint: str) -> None:
    assert_refused(with_parameters(**parameters), path, value, hint)


UNREAD = [
    (
        {"train.momentum": {"min": 0.5, "max": 0.9}},
        "parameters.train.momentum", "train.momentum", "without train.optimizer: sgd",
    ),
    ({"model.hidden": {"values": [[8], [16]]}}, "parameters.model.hidden", "model.hidden", "without model.name: mlp"),
    (
        {"compression_set.strategy": {"value": "none"}, "compression_set.high": {"min": 0.5, "max": 0.9}},
        "parameters.compression_set.high", "compression_set.high", "compression_set.strategy: single or triple",
    ),
    (
        {"compression_set.size": {"values": [3, 4]}},
        "parameters.compression_set.size", "compression_set.size", "random or fixed",
    ),
    (
        {"awp_unit": {"values": ["step", "std"]}}, "parameters.awp_unit", "awp_unit", "without awp_radius above 0",
    ),
    ({"awp_unit": {"value": "int4"}}, "parameters.awp_unit", "awp_unit", "without awp_radius above 0"),
    ({"train.precision": {"values": ["bf16", "float32"]}}, "parameters.train.precision", "bf16", "gpus_per_worker"),
]  # fmt: skip


@pytest.mark.parametrize(("parameters", "path", "value", "hint"), UNREAD)
def test_what_nothing_would_read_is_refused_at_launch(
    parameters: dict[str, Any], path: str, value: str, hint: str
) -> None:
    space = parse_space(with_parameters(**parameters))  # of an earlier study it stays readable
    with pytest.raises(ConfigError) as caught:
        check_launch(space, "dir/file.yaml")
    assert str(caught.value).startswith(f"dir/file.yaml: {path}: got '{value}'"), str(caught.value)
    assert hint in str(caught.value)


def test_a_perturbation_may_be_turned_off_by_its_radius() -> None:
    space = with_parameters(awp_unit={"value": "int4"}, awp_radius={"value": 0.5})
    check_launch(parse_space(space, overrides={"awp_radius": "0"}), "f.yaml")


def test_what_the_workers_cannot_do_is_refused_at_launch() -> None:
    for override, message in (
        ({"resources.workers": "3"}, "f.yaml: train.batch_size: got 64; expected a multiple of resources.workers = 3"),
        ({"train.precision": "bf16"}, "f.yaml: train.precision: got 'bf16'; expected float32 without a GPU"),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
            check_launch(parse_space(MINIMAL, overrides=override), "f.yaml")
    check_launch(parse_space(MINIMAL, overrides={"resources.workers": "2"}), "f.yaml")


def assert_refused(data: dict[str, Any], path: str, value: str, hint: str) -> None:
    parse_space(MINIMAL)  # the change alone is at fault
    with pytest.raises(ConfigError) as caught:
        parse_space(data, "dir/file.yaml")
    message = str(caught.value)
    place, _, rest = message.partition(": got ")
    assert place == f"dir/file.yaml: {path}", message
    got, _, expected = rest.partition("; expected ")
    assert value in got or value in expected, message
    assert hint in expected, message


@pytest.mark.parametrize("key", ["name", "data", "model", "threat", "levels"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^f.yaml: {key}: got None; expected "):
        parse_space({k: v for k, v in MINIMAL.items() if k != key}, "f.yaml")


@pytest.mark.parametrize("data", [None, [], "digits", 3])
def test_a_space_is_a_mapping(data: Any) -> None:
    with pytest.raises(ConfigError, match=r"\(top\).*a mapping with keys name, data"):
        parse_space(data, "f.yaml")


def test_a_value_that_is_not_of_this_space_is_refused_at_the_draw() -> None:
    space = parse_space(with_parameters(standard_weight={"min": 0.1, "max": 0.2}))
    with pytest.raises(ConfigError, match=r"^learning_rate: got 0.1; expected a parameter of this space"):
        space.configuration({"learning_rate": 0.1}, 1)
    with pytest.raises(ConfigError, match=r"^standard_weight: got 7"):
        space.configuration({"standard_weight": 7.0}, 1)


def test_low_above_high_under_different_conditions_is_refused_at_the_draw() -> None:
    both = {
        "compression_set.strategy": {"values": ["fixed", "dense"]},
        "compression_set.low": {"values": [0.3, 0.8], "when": {"compression_set.strategy": ["fixed"]}},
        "compression_set.high": {"min": 0.5, "max": 0.9},
    }
    space = parse_space(with_parameters(**both))
    drawn = {"compression_set.strategy": "fixed", "compression_set.low": 0.8, "compression_set.high": 0.6}
    with pytest.raises(ConfigError, match=r"compression_set.low: got 0.8; expected at most compression_set.high = 0.6"):
        space.configuration(drawn, 1)


# --- the file itself -----------------------------------------------------------------------------------------------


def test_a_syntax_error_names_line_and_column(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\nlevels: [dense, int8\ntrain: {}\n")
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: line 3, column 6: .*valid YAML"):
        load_space(path)


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        ("name: a\nname: b\n", "name", "line 1"),
        ("train:\n  epochs: 1\n  epochs: 2\n", "train.epochs", "line 2"),
        ("objectives:\n- {metric: a, metric: b}\n", "objectives[0].metric", "line 2"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, path: str, line: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_space(file)
    assert str(caught.value).startswith(f"{file}: {path}: ")
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (None, "No such file"),
        (b"name: \xff\xfe", "not UTF-8"),
        (b"name: !!python/object/apply:os.system [ls]", "python/object"),
        (b"--- {name: a}\n--- {name: b}\n", "document"),
        (b"", "a mapping with keys"),
        (b"name: \x00", "YAML"),
    ],
)
def test_a_file_that_is_no_search_space_is_refused(tmp_path: Path, content: bytes | None, hint: str) -> None:
    path = tmp_path / "space.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        load_space(path)
    assert hint in str(caught.value)
