"""Reading YAML strictly: what a human could have meant in two ways is an error with its place; and writing it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from cactus_ray.errors import ConfigError, UserError


class _Loader(yaml.SafeLoader):
    """Safe loading, with numbers as YAML 1.2 and editors read them: ``3e-4`` is a number and not text."""


class _Dumper(yaml.SafeDumper):
    """Safe dumping, with text that ``_Loader`` would read as a number in quotes."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def dump_yaml(plain: Any) -> str:
    """Text that ``read_yaml`` reads back to the same plain data; keys stay in order."""
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(text: str, source: str) -> Any:
    """The plain data of one YAML document.

    Raises UserError with line and column for a syntax error, and ConfigError with the key's path for a key that stands
    twice in one mapping (YAML itself would silently keep the last).
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_repeated_keys(node, "", source, set())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise UserError(_syntax(error, source)) from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not YAML: {error}") from None


def read_yaml_file(path: Path) -> Any:
    """As ``read_yaml``; a file that is missing, unreadable or not UTF-8 is a UserError too."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; a search space is a UTF-8 text file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; expected a search space in YAML") from None
    return read_yaml(text, str(path))


def _syntax(error: yaml.MarkedYAMLError, source: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
    line = ""
    if mark is not None and (snippet := mark.get_snippet()):
        line = f"\n{snippet}"
    return f"{source}:{place} {error.problem or error.context}; expected valid YAML{line}"


def _refuse_repeated_keys(node: yaml.Node, path: str, source: str, seen: set[int]) -> None:
    if id(node) in seen:  # an alias: checked where its anchor stands
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _refuse_repeated_keys(item, f"{path}[{i}]", source, seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            here = f"{path}.{key.value}" if path else str(key.value)
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if (name := (key.tag, key.value)) in first:
                    expected = f"each key once; line {first[name]} has it already"
                    raise ConfigError(here, f"a second time in line {line}", expected, source)
                first[name] = line
            _refuse_repeated_keys(value, here, source, seen)
