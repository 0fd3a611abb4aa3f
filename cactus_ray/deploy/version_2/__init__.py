"""What certificates of schema_version 2 say: as version 1, but the card escapes every name that a user chose.

The newest version; see ``version_1`` for when it may be changed.
"""

from __future__ import annotations

from cactus_ray.deploy.document import Document
from cactus_ray.deploy.version_1.statements import SCHEMES, assumptions, exceeds, words
from cactus_ray.deploy.version_2.card import render

__all__ = ["EARLIER", "SCHEMES", "assumptions", "exceeds", "render", "unshowable", "words"]

EARLIER: dict[str, str] = {}
"""Earlier words of this version: none."""


def unshowable(document: Document) -> list[str]:
    """None: the card shows any name as text."""
    return []
