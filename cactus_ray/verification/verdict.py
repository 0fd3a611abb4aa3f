"""What is said of a sample, and of many: three-valued verdicts, their settings and their summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cactus_ray.bounds.arithmetic import ARITHMETICS
from cactus_ray.config import setting
from cactus_ray.errors import ConfigError, UserError

ENGINES = ("cactus", "auto_lirpa")
BOUNDS = ("ibp", "crown", "alpha", "branch")
"""Bounds by what they cost; each is tried only where those before it leave something open."""
DECIDED_BY = {
    "CERTIFIED": BOUNDS,
    "FALSIFIED": ("clean", "known", "attack", "branch"),
    "UNKNOWN": ("bounds", "time", "nodes", "out_of_memory", "non_finite"),
}
"""What decides, or stands in the way, by verdict."""


class Verdict(StrEnum):
    """CERTIFIED: no input of the ball changes the right prediction. FALSIFIED: one is known. UNKNOWN: neither."""

    CERTIFIED = "CERTIFIED"
    FALSIFIED = "FALSIFIED"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class SampleVerdict:
    """One sample's verdict and how it was reached.

    ``lower_bound``: proved lower bound of the smallest margin ``logit[label] - logit[j]``; None where there is none.
    ``decided_by``: clean, known, attack, ibp, crown, alpha, branch; for UNKNOWN what stood in the way: bounds, time,
    nodes, out_of_memory, non_finite. ``seconds``: this sample's share of its batches. ``correct``: the unperturbed
    prediction is right. ``counterexample``: flattened float32 image, for FALSIFIED only.
    """

    index: int
    label: int
    verdict: Verdict
    lower_bound: float | None
    decided_by: str
    seconds: float
    correct: bool
    counterexample: tuple[float, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dict; the key ``counterexample`` is absent unless there is one."""
        plain: dict[str, Any] = {
            "index": self.index,
            "label": self.label,
            "verdict": str(self.verdict),
            "lower_bound": self.lower_bound,
            "decided_by": self.decided_by,
            "seconds": self.seconds,
            "correct": self.correct,
        }
        if self.counterexample is not None:
            plain["counterexample"] = list(self.counterexample)
        return plain

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> SampleVerdict:
        """Inverse of ``to_json``. Raises UserError for a missing key or an impossible value."""
        try:
            lower, points = data["lower_bound"], data.get("counterexample")
            return SampleVerdict(
                index=int(data["index"]),
                label=int(data["label"]),
                verdict=Verdict(data["verdict"]),
                lower_bound=None if lower is None else float(lower),
                decided_by=str(data["decided_by"]),
                seconds=float(data["seconds"]),
                correct=bool(data["correct"]),
                counterexample=None if points is None else tuple(float(p) for p in points),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a sample's verdict ({type(error).__name__}: {error}): {str(data)[:200]}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationSettings:
    """How hard the cascade tries. None of these can make a verdict wrong, only UNKNOWN."""

    attack_steps: int = setting(40, doc="gradient steps of each attack; 0: no attack", minimum=0, maximum=10_000)
    restarts: int = setting(1, doc="attacks on a sample that interval bounds leave open", minimum=1, maximum=1000)
    targeted_runs: int = setting(
        8,
        doc="Auto-PGD runs, of a quarter of attack_steps each, against the classes that IBP or CROWN leave open",
        minimum=0,
        maximum=1000,
    )
    bound: str = setting(
        "crown",
        doc="strongest bound that is tried; branch: branch and bound",
        choices=BOUNDS,
    )
    engine: str = setting(
        "cactus", doc="what computes bounds; auto_lirpa must be installed, and charges no rounding", choices=ENGINES
    )
    intermediate_rows: int = setting(
        2048, doc="neurons of a layer and sample that CROWN bounds; the others keep IBP's bounds", minimum=0
    )
    arithmetic: str = setting(
        "float32",
        doc="arithmetic of the deployed network whose rounding CERTIFIED covers; real: only that of the bounds",
        choices=tuple(ARITHMETICS),
    )
    batch_size: int = setting(100, doc="samples at once; halved when memory runs out", minimum=1)
    alpha_iterations: int = setting(
        20, doc="alpha, branch: steps of the search for slopes; a sub-problem gets half", minimum=1, maximum=10_000
    )
    max_nodes: int = setting(10_000, doc="branch: sub-problems of a sample after which it is left UNKNOWN", minimum=1)
    seconds_per_sample: float = setting(
        0.0,
        doc="soft limit after which a sample is left UNKNOWN; 0: none, but 10 s for branch and bound",
        minimum=0.0,
    )
    seed: int = setting(0, doc="seed of the attack's random starts", minimum=0, maximum=2**31 - 1)

    def __post_init__(self) -> None:
        if self.engine == "auto_lirpa" and self.arithmetic != "real":
            raise ConfigError("arithmetic", self.arithmetic, "real: engine auto_lirpa charges no rounding")
        if self.engine == "auto_lirpa" and self.bound == "branch":
            raise ConfigError("bound", self.bound, "ibp, crown or alpha: engine auto_lirpa does not branch")


def summary(verdicts: Sequence[SampleVerdict]) -> dict[str, Any]:
    """Counts and accuracies (fractions of ``samples``) of at least one verdict.

    The share of samples that are robust lies between ``certified_accuracy`` and ``1 - n_falsified / samples``.
    """
    if not verdicts:
        raise ValueError("no verdicts to summarise")
    count = {v: sum(s.verdict is v for s in verdicts) for v in Verdict}
    return {
        "samples": len(verdicts),
        "standard_accuracy": sum(s.correct for s in verdicts) / len(verdicts),
        "n_certified": count[Verdict.CERTIFIED],
        "n_falsified": count[Verdict.FALSIFIED],
        "n_unknown": count[Verdict.UNKNOWN],
        "certified_accuracy": count[Verdict.CERTIFIED] / len(verdicts),
    }


def wilson(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval (low, high) of a share of which ``k`` of ``n`` were seen; ``z`` = 1.96: 95 %.

    Wilson 1927. Raises ValueError unless 0 <= k <= n and n > 0.
    """
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"wilson({k}, {n}): expected 0 <= k <= n and n > 0")
    share, spread = k / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    # at the ends the formula is exactly 0 or 1, up to rounding
    return (0.0 if k == 0 else max(0.0, middle - half)), (1.0 if k == n else min(1.0, middle + half))
