"""Texts of strangers, made safe to show: in a terminal and in Markdown."""

from __future__ import annotations

_PLAIN = frozenset(" -,/'")
"""Marks that mean nothing in the middle of a line of Markdown."""
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def visible(text: str, *, keep: str = "") -> str:
    """``text`` with every character that does not show itself written as an escape such as ``\\x1b`` or ``\\u202e``.

    Such are control characters (terminal escape codes, line ends), the controls of writing direction, other invisible
    characters, lone surrogates, and spaces other than the plain one. Characters in ``keep`` stay as they are.
    """
    return "".join(c if c.isprintable() or c in keep else _escape(c) for c in text)


def markdown(text: str) -> str:
    """``visible(text)`` as Markdown that shows exactly these characters: no markup, HTML, link or new line in it.

    For the middle of a line; marks that would begin a list at its start are not escaped.
    """
    return "".join(_shown(c) for c in visible(text))


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def _shown(character: str) -> str:
    if character.isalnum() or character in _PLAIN or not character.isascii():
        return character
    return _ENTITIES.get(character) or f"\\{character}"
