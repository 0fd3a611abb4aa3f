"""The losses of one network on one batch: one file per published loss, one entry in ``CERTIFIED_LOSSES``.

All are means over the batch and differentiable in every tensor.
"""

from __future__ import annotations

from cactus_ray.training.losses.base import CertifiedLoss, LossOptions, Region, Visitor, worst_case
from cactus_ray.training.losses.cc_ibp import cc_ibp
from cactus_ray.training.losses.crown_ibp import crown_ibp
from cactus_ray.training.losses.exp_ibp import exp_ibp
from cactus_ray.training.losses.ibp import ibp
from cactus_ray.training.losses.mtl_ibp import mtl_ibp
from cactus_ray.training.losses.pgd import pgd
from cactus_ray.training.losses.regularizer import RampRegularizer
from cactus_ray.training.losses.sabr import sabr
from cactus_ray.training.losses.standard import standard
from cactus_ray.training.losses.staps import staps
from cactus_ray.training.losses.taps import taps

CERTIFIED_LOSSES: dict[str, CertifiedLoss] = {
    "ibp": ibp, "sabr": sabr, "mtl_ibp": mtl_ibp, "cc_ibp": cc_ibp, "exp_ibp": exp_ibp, "taps": taps, "staps": staps,
    "crown_ibp": crown_ibp, "pgd": pgd,
}  # fmt: skip
EXPRESSIVE = frozenset({"mtl_ibp", "cc_ibp", "exp_ibp"})
"""The losses that normalise with the statistics of their adversarial batch."""
TAIL_ATTACKED = frozenset({"taps", "staps"})
"""The losses that attack the box in front of the last layers."""
ATTACKED = EXPRESSIVE | {"sabr", "staps", "pgd"}
"""The losses that need ``Region.point``."""
UNBOUNDED = frozenset({"pgd"})
"""The losses without a bound pass."""
DURING_RAMP = {"taps": "ibp", "staps": "sabr"}
"""What stands for a loss until epsilon has reached its end, as its authors train."""

__all__ = [
    "ATTACKED", "CERTIFIED_LOSSES", "DURING_RAMP", "EXPRESSIVE", "TAIL_ATTACKED", "UNBOUNDED", "CertifiedLoss",
    "LossOptions", "RampRegularizer", "Region", "Visitor", "standard", "worst_case",
]  # fmt: skip
