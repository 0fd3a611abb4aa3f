"""What certificates say, by ``schema_version``: one module per version, all with the same names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from cactus_ray.bounds.graph import Graph
from cactus_ray.compression.family import Family
from cactus_ray.deploy import version_1, version_2
from cactus_ray.deploy.document import Document


class Wording(Protocol):
    """The texts, the card and the comparison of bounds of one version."""

    @property
    def SCHEMES(self) -> Mapping[str, str]:  # noqa: N802 - a constant of a module
        """How a sample is decided, by engine."""

    @property
    def EARLIER(self) -> Mapping[str, str]:  # noqa: N802
        """Earlier words of this version, and the words that stand for them."""

    def assumptions(self, graph: Graph, arithmetic: str) -> tuple[str, ...]:
        """What is taken for granted of this network in this arithmetic."""

    def words(self, family: Family) -> str:
        """What the members of a family are."""

    def render(self, document: Document) -> str:
        """The card."""

    def exceeds(self, stated: float, found: float) -> bool:
        """Whether a stated lower bound is more than what was found again allows."""

    def unshowable(self, document: Document) -> list[str]:
        """Names of classes that the card must not show."""


VERSIONS: dict[int, Wording] = {1: version_1, 2: version_2}


def of(document: Document) -> Wording:
    """What a certificate of this version says."""
    return VERSIONS[document.schema_version]
