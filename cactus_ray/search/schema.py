"""The JSON Schema of a search space, for completion and checks in editors.

Made from the same metadata as the parser: ``python -m cactus_ray.search.schema > search_spaces/schema.json``. It
accepts whatever the parser accepts; what only shows when keys are seen together (levels of metrics, conditions) is left
to the parser.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from cactus_ray.compression.levels import FACTOR_FORMATS, FORMATS
from cactus_ray.config import PRUNE_FAMILIES
from cactus_ray.parsing import FRACTION
from cactus_ray.search.domains import DISTRIBUTIONS, Key, leaf_keys, run_keys
from cactus_ray.search.objectives import FRONT_COLUMNS, LEVEL_METRICS, TRIAL_METRICS
from cactus_ray.search.parameters import FIXED_SECTIONS
from cactus_ray.search.pareto import GOALS
from cactus_ray.search.settings import KEYS, SECTIONS
from cactus_ray.search.space import NAME, REQUIRED

Schema = dict[str, Any]
_LIMITS = {
    "minimum": "minimum", "maximum": "maximum", "exclusive_minimum": "exclusiveMinimum",
    "exclusive_maximum": "exclusiveMaximum",
}  # fmt: skip
_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}
_DOCS = {
    "name": "name of the study and of its folder of records",
    "levels": "compression levels at which every network is measured",
    "parameters": "what is searched: W&B's sweep grammar, and when: for conditional parameters",
    "objectives": "metrics of a trial that the search drives",
    "constraints": "metrics of a trial that have to lie in a range",
    "front": "columns of points.csv that span the front",
}


def schema() -> Schema:
    """JSON Schema (draft 2020-12) of a search space."""
    properties: Schema = {key: _section(kind) for key, kind in SECTIONS.items()}
    samples = {"oneOf": [{"const": "selection"}, {"type": "integer", "minimum": 1}], "description": "samples per point"}
    properties["verification"]["properties"]["samples"] = samples
    point = {"type": "object", "minProperties": 1, "description": "values by parameter; what is left out is drawn"}
    points = {"type": ["array", "null"], "items": point, "description": "configurations that are tried first"}
    properties["search"]["properties"]["points"] = points
    properties["name"] = {"type": "string", "pattern": f"^{NAME}$"}
    properties["levels"] = {"type": "array", "minItems": 1, "uniqueItems": True, "items": _level()}
    properties["parameters"] = _parameters("")
    goal = {"enum": list(GOALS)}
    objective = _object({"metric": {"$ref": "#/$defs/metric"}, "goal": goal}, ["metric"])
    properties["objectives"] = {"type": "array", "minItems": 1, "items": objective}
    ends = {"min": {"type": "number"}, "max": {"type": "number"}}
    constraint = _object({"metric": {"$ref": "#/$defs/metric"}, **ends}, ["metric"])
    constraint["anyOf"] = [{"required": ["min"]}, {"required": ["max"]}]
    properties["constraints"] = {"type": "array", "items": constraint}
    properties["front"] = {**_object(dict.fromkeys(FRONT_COLUMNS, goal)), "minProperties": 1}
    for key, text in _DOCS.items():
        properties[key]["description"] = text
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A search space of cactus_ray",
        **_object({key: properties[key] for key in KEYS}, list(REQUIRED)),
        "$defs": {"metric": _metric(), "when": _when(), **{f"parameter.{n}": _parameter(k) for n, k in _searchable()}},
    }


def _object(properties: Mapping[str, Any], required: list[str] | None = None) -> Schema:
    found: Schema = {"type": "object", "additionalProperties": False, "properties": dict(properties)}
    return found | ({"required": required} if required else {})


def _section(kind: type) -> Schema:
    # What is required may also come from --set or parameters; the parser says if it is still missing.
    keys: Schema = {}
    for spec in fields(kind):
        if is_dataclass(inner := typing.get_type_hints(kind)[spec.name]):
            keys[spec.name] = _section(typing.cast(type, inner))
    plain = ((name, key) for name, key in leaf_keys(kind) if "." not in name)
    keys |= {name: _open(key) | {"description": key.metadata["doc"]} for name, key in plain}
    return _object(keys) | {"description": (kind.__doc__ or "").split("\n")[0]}


def _open(key: Key) -> Schema:
    """A value of a key, null, or a text that stands for null or for a number."""
    value, texts = _or_null(_value(key)), []
    if "word" in key.metadata:
        texts.append({"const": key.metadata["word"]})
    if "fraction" in key.metadata:
        texts.append({"type": "string", "pattern": f"^{FRACTION}$"})
    return {"anyOf": [*texts, value]} if texts else value


def _or_null(value: Schema) -> Schema:
    return {"enum": [*value["enum"], None]} if "enum" in value else value | {"type": [value["type"], "null"]}


def _value(key: Key) -> Schema:
    """One value of a key."""
    if typing.get_origin(key.hint) is tuple:
        arguments = typing.get_args(key.hint)
        found: Schema = {"type": "array", "items": _value(Key(arguments[0], key.metadata))}
        if arguments[-1] is not Ellipsis:
            found |= {"minItems": len(arguments), "maxItems": len(arguments)}
        return found
    if key.metadata.get("choices"):
        return {"enum": list(key.metadata["choices"])}
    return {"type": _TYPES[key.hint]} | {_LIMITS[k]: v for k, v in key.metadata.items() if k in _LIMITS}


def _level() -> Schema:
    number = r"(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?"
    prune, formats = f"prune:({'|'.join(PRUNE_FAMILIES)}):{number}", "|".join(FORMATS)
    factors = rf"lr *\+ *sparse:{number}( *\+ *rebn)?( *\+ *({'|'.join(FACTOR_FORMATS)}))?"
    steps = rf"{prune}( *\+ *rebn)?( *\+ *({formats}))?|{factors}|rebn( *\+ *({formats}))?|{formats}"
    return {"type": "string", "pattern": f"^ *(dense|{steps}) *$", "examples": ["dense", "int8", "prune:gu-l1:0.9"]}


def _metric() -> Schema:
    at_level = {"type": "string", "pattern": f"^({'|'.join(LEVEL_METRICS)})@.+$"}
    return {"anyOf": [{"enum": list(TRIAL_METRICS)}, at_level]}


def _when() -> Schema:
    text = "active only while each named parameter has one of the values"
    return {"type": "object", "additionalProperties": {"type": "array", "minItems": 1}, "description": text}


def _searchable() -> list[tuple[str, Key]]:
    return [(name, key) for name, key in run_keys().items() if name.split(".")[0] not in FIXED_SECTIONS]


def _parameters(prefix: str) -> Schema:
    """The mapping under ``parameters:``, for the keys that begin with ``prefix``; groups are nested or dotted."""
    properties: Schema = {}
    for name, _ in _searchable():
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            properties[rest] = {"$ref": f"#/$defs/parameter.{name}"}
            if "." in rest:
                group = rest.split(".")[0]
                inner = {"when": {"$ref": "#/$defs/when"}, "parameters": _parameters(f"{prefix}{group}.")}
                properties[group] = _object(inner, ["parameters"])
    return _object(properties)


def _parameter(key: Key) -> Schema:
    value = _value(key)
    properties: Schema = {
        "value": value,
        "values": {"type": "array", "minItems": 1, "uniqueItems": True, "items": value},
        "when": {"$ref": "#/$defs/when"},
    }
    forms: list[Schema] = [{"required": ["value"]}, {"required": ["values"]}]
    if key.hint in (int, float) and "enum" not in value:
        properties |= {
            "min": value, "max": value, "q": {"type": value.get("type", "number"), "exclusiveMinimum": 0},
            "distribution": {"enum": [d for d in DISTRIBUTIONS if key.hint is float or d[0] in "qi"]},
        }  # fmt: skip
        forms.append({"required": ["min", "max"]})
    return {**_object(properties), "description": key.metadata["doc"], "oneOf": forms}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
