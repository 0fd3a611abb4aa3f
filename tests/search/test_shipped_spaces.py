"""The spaces that we ship: the commands in their headers work, and ``cactus.yaml`` searches what it says."""

import shlex
from pathlib import Path

import pytest

from cactus_ray.config import AWP_KINDS, STRATEGIES
from cactus_ray.search.domains import Choices, Range
from cactus_ray.search.space import check_launch, load_space

SPACES = Path(__file__).parents[2] / "search_spaces"


def header_commands(path: Path) -> list[list[str]]:
    """The commands of the comments at the top of a space, as words; a backslash at the end of a line joins two."""
    comments = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        comments.append(line.removeprefix("#").strip())
    joined = "\n".join(comments).replace("\\\n", " ").splitlines()
    return [shlex.split(line.split("     (")[0]) for line in joined if line.startswith("cactus-ray ")]


COMMANDS = [(path, words) for path in sorted(SPACES.glob("*.yaml")) for words in header_commands(path)]


@pytest.mark.parametrize(("path", "words"), COMMANDS, ids=lambda x: x.stem if isinstance(x, Path) else "")
def test_the_commands_of_a_header_describe_a_study_that_can_begin(path: Path, words: list[str]) -> None:
    assert words[:2] == ["cactus-ray", "search"]
    assert words[2] == f"search_spaces/{path.name}"
    overrides = dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "--set")
    space = load_space(path, overrides)
    check_launch(space, str(path))
    assert overrides.keys() >= {"data.root"}


def test_the_headers_hold_commands() -> None:
    assert len([path for path, _ in COMMANDS if path.stem == "cactus"]) == 3


def test_cactus_searches_lambda_eta_strategy_and_size() -> None:
    parameters = {p.name: p.domain for p in load_space(SPACES / "cactus.yaml").parameters}
    weight, size, low = (parameters[n] for n in ("standard_weight", "compression_set.size", "compression_set.high"))
    assert isinstance(weight, Range)
    assert (weight.low, weight.high) == (0.0, 1.0)
    assert isinstance(size, Range)
    assert (size.low, size.high, size.integer) == (2, 7, True)
    assert isinstance(low, Range)
    for name, values in {"compression_set.strategy": STRATEGIES, "awp_kind": AWP_KINDS}.items():
        domain = parameters[name]
        assert isinstance(domain, Choices)
        assert set(domain.values) == set(values)
    assert {"awp_radius", "awp_unit", "compression_set.family", "compression_set.channels"} <= parameters.keys()
