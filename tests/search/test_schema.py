"""The editor's schema is up to date, accepts what the parser accepts, and marks what is clearly wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cactus_ray.search.schema import schema
from cactus_ray.search.space import load_space, parse_space

SPACES = Path(__file__).parents[2] / "search_spaces"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    written = json.loads((SPACES / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(written)
    return jsonschema.Draft202012Validator(written)


def test_the_committed_schema_is_the_one_that_is_generated() -> None:
    text = (SPACES / "schema.json").read_text()
    assert text == json.dumps(schema(), indent=2) + "\n", (
        "run python -m cactus_ray.search.schema > search_spaces/schema.json"
    )


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_spaces_validate(path: Path, validator: jsonschema.Draft202012Validator) -> None:
    validator.validate(yaml.safe_load(path.read_text()))
    space = load_space(path)
    validator.validate(space.to_dict())
    assert space.parameters


def test_nested_and_dotted_parameters_both_validate(validator: jsonschema.Draft202012Validator) -> None:
    parameters = {
        "model.width": {"min": 0.5, "max": 2.0},
        "model.hidden": {"values": [[64, 64], [128]]},
        "train": {"parameters": {"epochs": {"distribution": "q_log_uniform_values", "min": 2, "max": 64, "q": 2}}},
    }
    data = {**minimal(), "parameters": parameters}
    validator.validate(data)
    assert {p.name for p in parse_space(data).parameters} == {"model.width", "model.hidden", "train.epochs"}


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"levls": []}, []),
        ({"name": "a/b"}, ["name"]),
        ({"threat": {"epsilon": -0.1}}, ["threat", "epsilon"]),
        ({"levels": ["int7"]}, ["levels", 0]),
        ({"levels": ["int8+prune:gu-l1:0.5"]}, ["levels", 0]),
        ({"train": {"epochs": "many"}}, ["train", "epochs"]),
        ({"train": {"epoch": 3}}, ["train"]),
        ({"search": {"sampler": "cma"}}, ["search", "sampler"]),
        ({"verification": {"samples": 0}}, ["verification", "samples"]),
        ({"objectives": [{"metric": "accuracy"}]}, ["objectives", 0, "metric"]),
        ({"constraints": [{"metric": "hypervolume"}]}, ["constraints", 0]),
        ({"front": {"size": "minimize"}}, ["front"]),
        ({"parameters": {"learning_rat": {"value": 1}}}, ["parameters"]),
        ({"parameters": {"threat.epsilon": {"value": 0.1}}}, ["parameters"]),
        ({"parameters": {"method": {"values": ["fgsm"]}}}, ["parameters", "method", "values", 0]),
        ({"parameters": {"method": {}}}, ["parameters", "method"]),
        ({"parameters": {"method": {"min": 0, "max": 1}}}, ["parameters", "method"]),
        ({"parameters": {"weight_bits": {"values": [4, 7]}}}, ["parameters", "weight_bits", "values", 1]),
        ({"parameters": {"weight_bits": {"min": 2, "max": 8}}}, ["parameters", "weight_bits"]),
        ({"parameters": {"learning_rate": {"min": 0.1}}}, ["parameters", "learning_rate"]),
        ({"parameters": {"compression_set": {"when": {"method": "ibp"}, "parameters": {}}}},
         ["parameters", "compression_set", "when", "method"]),
    ],
)  # fmt: skip
def test_what_is_clearly_wrong_is_marked_where_it_stands(
    change: dict[str, Any], place: list[str | int], validator: jsonschema.Draft202012Validator
) -> None:
    validator.validate(minimal())
    errors = [list(error.absolute_path) for error in validator.iter_errors({**minimal(), **change})]
    assert place in errors, errors


def minimal() -> dict[str, Any]:
    return {
        "name": "x", "data": {"name": "digits"}, "model": {"name": "mlp"}, "threat": {"epsilon": 0.1},
        "levels": ["dense"],
    }  # fmt: skip
