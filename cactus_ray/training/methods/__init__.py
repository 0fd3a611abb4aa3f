"""Training methods: one file per published method, one entry in ``METHODS``.

A method gives the losses of one step one after the other; their sum is the step's loss. The loop takes the gradient of
each before it asks for the next, so that only one member's activations are alive, and a method can use the gradient of
what it gave before (``Step.gradients``). A method that trains in stages has an entry in ``STAGES``, too; its losses
are of the network that the stage makes of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from cactus_ray.training.methods.atmc import STAGES as ATMC_STAGES
from cactus_ray.training.methods.atmc import atmc
from cactus_ray.training.methods.awp import awp
from cactus_ray.training.methods.c_sam import STAGES as C_SAM_STAGES
from cactus_ray.training.methods.c_sam import c_sam
from cactus_ray.training.methods.cactus import cactus
from cactus_ray.training.methods.cc_ibp import cc_ibp
from cactus_ray.training.methods.crown_ibp import crown_ibp
from cactus_ray.training.methods.exp_ibp import exp_ibp
from cactus_ray.training.methods.hydra import STAGES as HYDRA_STAGES
from cactus_ray.training.methods.hydra import hydra
from cactus_ray.training.methods.ibp import ibp
from cactus_ray.training.methods.mtl_ibp import mtl_ibp
from cactus_ray.training.methods.nrsloss import nrsloss
from cactus_ray.training.methods.pgd import pgd
from cactus_ray.training.methods.qa_ibp import STAGES as QA_IBP_STAGES
from cactus_ray.training.methods.qa_ibp import qa_ibp
from cactus_ray.training.methods.sabr import sabr
from cactus_ray.training.methods.standard import standard
from cactus_ray.training.methods.staps import staps
from cactus_ray.training.methods.taps import taps
from cactus_ray.training.stages import Stage
from cactus_ray.training.step import Step

Method = Callable[[Step], Iterator[Tensor]]

METHODS: dict[str, Method] = {
    "cactus": cactus, "hydra": hydra, "nrsloss": nrsloss, "qa_ibp": qa_ibp, "awp": awp, "atmc": atmc, "c_sam": c_sam,
    "ibp": ibp, "sabr": sabr, "mtl_ibp": mtl_ibp, "cc_ibp": cc_ibp, "exp_ibp": exp_ibp, "taps": taps, "staps": staps,
    "crown_ibp": crown_ibp, "pgd": pgd, "standard": standard,
}  # fmt: skip
STAGES: dict[str, tuple[Stage, ...]] = {
    "hydra": HYDRA_STAGES, "qa_ibp": QA_IBP_STAGES, "atmc": ATMC_STAGES, "c_sam": C_SAM_STAGES,
}  # fmt: skip
"""Stages by method, in the order and under the names of ``options.STAGE_SHARES``."""
