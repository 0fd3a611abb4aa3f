"""``card.md``: the certificate in words, for people. It says nothing that ``certificate.json`` does not hold."""

from __future__ import annotations

from cactus_ray.deploy import wording
from cactus_ray.deploy.document import Document


def render(document: Document) -> str:
    """The model card (Markdown) of a certificate, as certificates of its version have it. Deterministic."""
    return wording.of(document).render(document)
