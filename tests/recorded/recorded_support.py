"""What tests of the recorded files share beside fixtures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent
DATA = ("studies", "optuna", "picks")


@dataclass(frozen=True)
class Answer:
    """How a verb ended, and what it printed."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What a verb with --json printed. Fails where it did not end with 0."""
        assert self.status == 0, self.err
        return json.loads(self.out)


CactusRay = Callable[..., Answer]
Copied = Callable[[str], Path]
