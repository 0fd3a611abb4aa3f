"""Which options a method reads, and their defaults. What it does not read is absent from a run and its hash."""

from __future__ import annotations

from typing import Any

CERTIFIED_LOSSES = ("ibp", "sabr", "mtl_ibp", "cc_ibp", "exp_ibp", "taps", "staps", "crown_ibp", "pgd")
"""Losses of a network on regions; ``pgd`` is the adversarial loss, as a reference."""
METHOD_OPTIONS: dict[str, tuple[str, ...]] = {
    "cactus": ("compression_set", "awp_radius", "awp_unit", "awp_steps", "awp_member", "awp_kind"),
    "hydra": ("stage_shares", "target_sparsity"),
    "nrsloss": ("nrs_weight",),
    "qa_ibp": ("stage_shares", "weight_bits"),
    "awp": ("awp_gamma",),
    "atmc": ("stage_shares", "target_sparsity", "codebook_bits", "admm_weight", "admm_every"),
    "c_sam": ("stage_shares", "target_sparsity", "mask_noise", "mask_saturated"),
}
"""The methods that take one of the losses (``certified_loss``), and their own options."""
METHODS = (*METHOD_OPTIONS, *CERTIFIED_LOSSES, "standard")
"""Those, and plain training with the loss of their name."""
STAGE_SHARES: dict[str, dict[str, float]] = {
    "hydra": {"pretrain": 100.0, "mask": 20.0, "finetune": 100.0},
    "qa_ibp": {"pretrain": 40.0, "quantised": 60.0},
    "atmc": {"dense": 200.0, "sparse": 150.0, "factorised": 150.0, "quantised": 150.0},
    "c_sam": {"pretrain": 50.0, "mask": 100.0, "finetune": 50.0},
}
"""The stages of a method in order, and in what proportion they share the epochs."""

_ATTACK = ("attack_steps", "attack_step_size")
_EXPRESSIVE = ("ibp_weight", "attack_radius_factor", *_ATTACK)
_SABR = ("box_ratio", "relu_shrinkage", *_ATTACK)
_TAIL = ("tail_layers", "latent_steps", "latent_restarts", "latent_targets", "gradient_scale")
LOSS_OPTIONS: dict[str, tuple[str, ...]] = {
    "standard": (), "pgd": _ATTACK, "ibp": (), "sabr": _SABR, "mtl_ibp": _EXPRESSIVE, "cc_ibp": _EXPRESSIVE,
    "exp_ibp": _EXPRESSIVE, "taps": ("relu_shrinkage", *_TAIL), "staps": (*_SABR, *_TAIL),
    "crown_ibp": ("crown_weight",),
}  # fmt: skip
"""Options of each loss."""

DEFAULTS: dict[str, Any] = {
    "certified_loss": "sabr", "standard_weight": 0.3, "box_ratio": 0.8, "relu_shrinkage": 1.0,
    "attack_steps": 1, "attack_step_size": 1.0, "attack_radius_factor": 1.0, "ibp_weight": 0.5,
    "tail_layers": 2, "latent_steps": 10, "latent_restarts": 1, "latent_targets": 10, "gradient_scale": 4.0,
    "crown_weight": 0.0, "awp_radius": 0.0, "awp_unit": "step", "awp_steps": 1, "awp_member": "separate",
    "awp_kind": "ascent", "target_sparsity": 0.9, "nrs_weight": 0.01, "weight_bits": 8,
    "awp_gamma": 0.01, "codebook_bits": 4, "admm_weight": 0.1, "admm_every": 10,
    "mask_noise": 0.5, "mask_saturated": 0.3,
}  # fmt: skip
_ONE_STEP_TO_THE_BOUNDARY = {"attack_step_size": 10.0}  # as De Palma et al. 2024 attack
_DEFAULTS_OF: dict[str, dict[str, Any]] = {
    "pgd": {"attack_steps": 10, "attack_step_size": 0.25},
    "mtl_ibp": _ONE_STEP_TO_THE_BOUNDARY,
    "cc_ibp": _ONE_STEP_TO_THE_BOUNDARY,
    "exp_ibp": _ONE_STEP_TO_THE_BOUNDARY,
}


def loss_of(method: str, certified_loss: str | None = None) -> str:
    """The loss that a method trains with: its own, or the one that it was given."""
    return method if method in LOSS_OPTIONS else certified_loss or str(DEFAULTS["certified_loss"])


def options_of(method: str, certified_loss: str | None = None) -> tuple[str, ...]:
    """The method-dependent keys of ``RunConfig`` that this method reads; all others are inactive."""
    weighs = () if method == "standard" else ("standard_weight",)
    own = ("certified_loss", *METHOD_OPTIONS[method]) if method in METHOD_OPTIONS else ()
    return (*weighs, *own, *LOSS_OPTIONS[loss_of(method, certified_loss)])


def default_of(key: str, method: str, certified_loss: str | None = None) -> Any:
    """Default of an option, which may depend on the method and on its loss."""
    if key == "stage_shares":
        return tuple(STAGE_SHARES[method].values())
    return _DEFAULTS_OF.get(loss_of(method, certified_loss), {}).get(key, DEFAULTS.get(key))


METHOD_KEYS = frozenset(key for method in METHODS for loss in CERTIFIED_LOSSES for key in options_of(method, loss))
"""All keys that only some methods read."""
LOSS_KEYS = frozenset(key for options in LOSS_OPTIONS.values() for key in options)
"""Those that depend on the loss."""
