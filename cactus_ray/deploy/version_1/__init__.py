"""What certificates of schema_version 1 say: their texts, their card, how their bounds compare. Frozen.

Nothing in this folder is edited, moved or made anew: certificates of version 1 are out there, and ``check`` must go on
to find that they hold. A test compares the hashes of all that is said here.

Whoever changes a text, the card or the comparison of bounds

- before a version is released: changes the folder of the newest version;
- after that: adds ``version_N`` beside it, which imports from the earlier ones what it says like them and holds itself
  only what differs, and enters it in ``wording.VERSIONS``. ``pick`` writes the newest version, ``check`` takes that of
  the certificate.

Checks of input (``document``: patterns, lengths, ranges) are not part of a version: they hold for all of them.
"""

from __future__ import annotations

import re

from cactus_ray.deploy.document import Document
from cactus_ray.deploy.version_1.card import render
from cactus_ray.deploy.version_1.statements import EARLIER, SCHEMES, assumptions, exceeds, words
from cactus_ray.texts import visible

__all__ = ["EARLIER", "SCHEMES", "assumptions", "exceeds", "render", "unshowable", "words"]

_MARKUP = re.compile(r"<[A-Za-z/!?]|\]\(|\]\[|!\[|`|://|www\.", re.IGNORECASE)


def unshowable(document: Document) -> list[str]:
    """Names of classes that the card of this version must not show: it escapes nothing."""
    return [name for name in document.network.classes if visible(name) != name or _MARKUP.search(name)]
