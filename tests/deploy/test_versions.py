"""What certificates of an earlier version say never changes, and each is checked as its own version has it."""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from cactus_ray.compression.family import INTEGERS, RADII, ZEROS, Family
from cactus_ray.deploy import version_1, wording
from cactus_ray.deploy.card import render
from cactus_ray.deploy.document import SCHEMA_VERSION, UNDERSTOOD, Document, FamilySection, figures, from_json, read
from cactus_ray.deploy.requirements import Requirements
from cactus_ray.deploy.version_1 import statements
from cactus_ray.errors import ConfigError

EARLIER = Path(__file__).with_name("earlier")


def digest(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def families() -> list[Family]:
    return [Family(format=f, radius=r, zeros=z) for f, r, z in itertools.product(INTEGERS, RADII, ZEROS)]


def documents() -> dict[str, Document]:
    """One certificate of version 1 for every branch of the card."""
    base = read(EARLIER / "certificate.json")
    selection = figures(50, 45, 30, 10)
    required = Requirements(max_bytes=1000, min_certified=0.875, level="int8")
    whole = FamilySection(
        family=families()[0], members=version_1.words(families()[0]), summary=figures(24, 20, 9, 8), verdicts=()
    )

    def of(**changes: Any) -> Document:
        return dataclasses.replace(base, **changes)

    def origin(**changes: Any) -> Document:
        return of(provenance=dataclasses.replace(base.provenance, **changes))

    return {
        "as it is": base,
        "every split, no parity": of(
            data=dataclasses.replace(base.data, total=24), file=dataclasses.replace(base.file, parity=None)
        ),
        "not met": origin(selection=selection, requirements=required, not_met=("max_bytes", "min_certified")),
        "of a file": origin(study=None, trial=None, config_hash=None, commit="abc123", test_split_uses=3),
        "sizes unknown": of(network=dataclasses.replace(base.network, macs=None, dense_bytes=None)),
        "real arithmetic": of(soundness=dataclasses.replace(base.soundness, arithmetic="real")),
        "family": of(family=whole),
    }


CARDS_OF_VERSION_1 = {
    "as it is": "dfe9470b2f23625a",
    "every split, no parity": "c46068cd0671c27d",
    "not met": "a4e73db3cd91c1c5",
    "of a file": "8255f28c8cc3496f",
    "sizes unknown": "ad9ef71b6c5d2bde",
    "real arithmetic": "cf86c298714499ab",
    "family": "f775029d2538fec5",
}
TEXTS_OF_VERSION_1 = {
    "schemes": (statements.SCHEMES, "41f9c679760f7f2f"),
    "arithmetic": (statements.IN_ARITHMETIC, "9642a0c6ba8580c2"),
    "integers": (statements.INTEGERS, "e3a600f032795835"),
    "assumptions": (statements.ASSUMPTIONS, "32e43de13d56e20e"),
    "earlier": (statements.EARLIER, "84ee56199b060b7e"),
    "families": ({repr(family): version_1.words(family) for family in families()}, "11c8afd881577511"),
}


def test_the_card_of_version_1_is_frozen() -> None:
    """Red where somebody edits what version 1 says: add a version instead (the docstring of ``version_1``)."""
    assert {name: digest(render(found)) for name, found in documents().items()} == CARDS_OF_VERSION_1
    assert render(documents()["as it is"]) == (EARLIER / "card.md").read_text()


@pytest.mark.parametrize("what", list(TEXTS_OF_VERSION_1))
def test_the_texts_of_version_1_are_frozen(what: str) -> None:
    text, meant = TEXTS_OF_VERSION_1[what]
    assert digest(text) == meant


def test_the_comparison_of_bounds_of_version_1_is_frozen() -> None:
    values = [-3.0, -1e-7, 0.0, 1e-7, 0.5, 1.0, 1.0 + 5e-7, 1.0 + 2e-6, 100.0, 100.0 + 5e-5, 100.0 + 2e-4, 1e6]
    table = [version_1.exceeds(stated, found) for stated in values for found in values]
    assert digest("".join(map(str, map(int, table)))) == "6a6da570243e48a8"


def test_each_certificate_is_rendered_as_its_version_has_it() -> None:
    first = documents()["as it is"]
    second = dataclasses.replace(first, schema_version=2)
    assert set(wording.VERSIONS) == set(UNDERSTOOD)
    assert max(UNDERSTOOD) == SCHEMA_VERSION
    assert "- study: tiny\n" in render(first)
    assert "- study: `tiny`\n" in render(second)


@pytest.mark.parametrize("version", [0, 3, 99, -1, True, "1", 1.0, None])
def test_another_version_is_refused_before_anything_else(version: object) -> None:
    """A later version may have keys that this one does not know; those are not what is wrong."""
    plain = json.loads((EARLIER / "certificate.json").read_text()) | {"schema_version": version, "later": 1}
    with pytest.raises(ConfigError, match=r"schema_version: got .*; expected one of 1, 2, which cactus-ray "):
        from_json(json.dumps(plain))
