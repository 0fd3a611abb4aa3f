"""The patterns and ranges of what may stand in ``certificate.json``, for certificates of every version."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cactus_ray.errors import ConfigError

SOFTWARE = ("cactus-ray", "python", "torch", "onnx", "onnxruntime", "numpy")
"""On whose versions the figures depend."""
MOST = 2**53
"""Largest count: beyond it, not all whole numbers are JSON numbers everywhere."""
VERSION = re.compile(
    r"(?=.{1,64}\Z)([0-9]+!)?[0-9]+(\.[0-9]+)*((a|b|rc)[0-9]+)?(\.post[0-9]+)?(\.dev[0-9]+)?"
    r"(\+([A-Za-z0-9]+([-_.][A-Za-z0-9]+)*)?)?"
)
"""As PEP 440 has it, at most 64 characters; Python's own may end in +."""
NAMED: dict[str, Any] = {
    "pattern": r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}",
    "expected": "a name of letters, digits, '.', '_' and '-'",
}
"""Names of studies and trials: ``search.space.NAME``, no longer than the name of a folder."""
SHA256: dict[str, Any] = {"pattern": r"[0-9a-f]{64}", "expected": "64 hexadecimal digits"}
SENTENCE: dict[str, Any] = {"pattern": r"[ -~]{1,2000}", "expected": "one line of at most 2,000 ASCII characters"}
WORD: dict[str, Any] = {"pattern": r"[a-z_]{1,40}", "expected": "one word of lower-case letters and '_'"}


def refuse_versions(found: Mapping[Any, Any]) -> None:
    """Raises ConfigError for a key that is none of ``SOFTWARE``, and for what is no version (PEP 440)."""
    for key, value in found.items():
        if key not in SOFTWARE:
            raise ConfigError("versions", key, f"the names {', '.join(SOFTWARE)}")
        if not isinstance(value, str) or not VERSION.fullmatch(value):
            raise ConfigError(f"versions.{key}", value, "a version such as 1.2.3 or 2.9.0+cpu")
