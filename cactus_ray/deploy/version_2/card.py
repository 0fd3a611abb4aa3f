"""``card.md`` of certificates of version 2: that of version 1 with every name that a user chose shown as text."""

from __future__ import annotations

from cactus_ray.deploy.document import Document
from cactus_ray.deploy.version_1.card import head_part, join, network_part, origin_part
from cactus_ray.texts import markdown


def render(document: Document) -> str:
    """The model card (Markdown) of a certificate. Deterministic."""
    classes = [markdown(name) for name in document.network.classes]
    return join(
        document, head_part(document, _code(document.network.model)), network_part(document, classes),
        origin_part(document, _code),
    )  # fmt: skip


def _code(text: str) -> str:
    """A text whose pattern knows no backtick, in which Markdown finds no link and no emphasis."""
    return f"`{text}`"
