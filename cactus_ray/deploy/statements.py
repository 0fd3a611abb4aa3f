"""Whether a certificate says of its own meaning, and of who computed it, what this tool says, word by word.

So nobody reads more into a certificate than was proved. The words themselves are those of its version (``wording``).
"""

from __future__ import annotations

import re

from cactus_ray.bounds.graph import Graph
from cactus_ray.deploy import wording
from cactus_ray.deploy.document import Document
from cactus_ray.deploy.version_1.statements import EARLIER, INTEGERS
from cactus_ray.deploy.version_2 import SCHEMES, assumptions

__all__ = ["EARLIER", "ENGINES", "INTEGERS", "SCHEMES", "assumptions", "misstatements"]

ENGINES = {"cactus": "cactus-ray", "auto_lirpa": "auto_LiRPA"}
"""``engine.name`` by the engine of the settings."""
_FIGURE = r"(-?\d{1,9}\.\d{4}|nan|-?inf)"
SELF_TEST = rf"alpha (moves|frozen): mean margin {_FIGURE} by CROWN, {_FIGURE} by CROWN-Optimized"
"""What the self-test of an engine that is not our own says."""


def misstatements(document: Document, graph: Graph) -> list[str]:
    """Where a certificate says of its meaning, or of who computed it, what this tool never says of such a file."""
    found, about, engine, said = [], document.soundness, document.engine, wording.of(document)
    name = str(engine.settings.get("engine", "cactus"))
    if name not in ENGINES:  # that the settings are wrong is found where they are read
        return []
    if about.scheme != said.SCHEMES[name]:
        found.append(f"soundness.scheme: {about.scheme!r}; with engine {name} it is {said.SCHEMES[name]!r}")
    stated = tuple(said.EARLIER.get(text, text) for text in about.assumptions)
    meant = said.assumptions(graph, about.arithmetic)
    found += [f"soundness.assumptions: {text!r} is missing" for text in meant if text not in stated]
    found += [f"soundness.assumptions: {text!r} is none of this file" for text in stated if text not in meant]
    if not found and stated != meant:
        found.append("soundness.assumptions: in another order, or one stands twice")
    if engine.name != ENGINES[name]:
        found.append(f"engine.name: {engine.name!r}, but engine.settings.engine {name!r} is {ENGINES[name]!r}")
    if name == "cactus":
        if engine.version != (version := document.versions.get("cactus-ray")):
            found.append(f"engine.version: {engine.version!r}, but versions.cactus-ray is {version!r}")
        if engine.self_test is not None:
            found.append(f"engine.self_test: {engine.self_test!r}; expected null: our own engine has none")
    elif not re.fullmatch(SELF_TEST, engine.self_test or ""):
        found.append(f"engine.self_test: {engine.self_test!r}; expected 'alpha moves: ...' or 'alpha frozen: ...'")
    return found
