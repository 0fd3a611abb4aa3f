"""Which passes the steps of a training make, in plain forwards (F), and for how many of its epochs.

A forward, a backward to the input and one to the weights cost F each; an interval pass twice that. What a step does
once whatever the size of its batch (optimiser, masks, rounding, codebooks) is not counted, but for ATMC's products U V.
"""

from __future__ import annotations

from dataclasses import dataclass

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.compression.sets import members
from cactus_ray.compression.size import macs
from cactus_ray.config import RunConfig
from cactus_ray.options import STAGE_SHARES
from cactus_ray.training.losses import ATTACKED, DURING_RAMP, EXPRESSIVE, TAIL_ATTACKED, UNBOUNDED
from cactus_ray.training.stages import spans

_BOX, _CLEAN, _POINT, _BACKWARD_BOUND, _ATTACK_STEP, _LATENT_STEP = 6.0, 3.0, 3.0, 3.0, 2.0, 2.0
_OF_MASKS = 5 * _CLEAN
"""C-SAM's losses in the space of masks: clean images twice and changed ones once under noise, soft and binary masks."""
WARM_UP, RAMP, FULL = "warm-up", "ramp", ""
"""Epsilon 0 and the standard loss alone; epsilon and the standard weight on their way; both at their ends."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Epochs ``first`` to ``end`` (from 0, not whole ones), whose steps make the same passes.

    ``stage``: its name, ``number`` its place; ``part``: ``WARM_UP``, ``RAMP`` or ``FULL``. ``fraction``: of the steps
    of the first stage, in the middle of its part; 1 at full epsilon.
    """

    stage: str = ""
    number: int = 0
    part: str = FULL
    first: float = 0.0
    end: float = 1.0
    fraction: float = 1.0

    @property
    def epochs(self) -> float:
        return self.end - self.first


def phases(config: RunConfig) -> tuple[Phase, ...]:
    """The phases of a training in order, together all its epochs; the full one of every stage even if it has none."""
    train, names = config.train, tuple(STAGE_SHARES.get(config.method, ("",)))
    ramped = min(train.warmup + train.ramp, 1.0)
    parts = ((WARM_UP, 0.0, train.warmup), (RAMP, train.warmup, ramped), (FULL, ramped, 1.0))
    found = []
    for number, (name, span) in enumerate(zip(names, spans(config.stage_shares, train.epochs), strict=True)):
        for part, begin, end in parts if number == 0 else ((FULL, 0.0, 1.0),):
            if part == FULL or end > begin:
                first, last = (span.first + share * (span.end - span.first) for share in (begin, end))
                middle = 1.0 if part == FULL else (begin + end) / 2
                found.append(Phase(name, number, part, first, last, middle))
    return tuple(found)


def ideal_units(config: RunConfig, graph: Graph, params: Params, phase: Phase = Phase()) -> float | None:
    """The passes of a step in F: 9 + 2k for SABR with k attack steps, 18 + 2k for a pair with a shared attack.

    A member that sees a share of the batch counts as that share. None where a method's passes have no simple count:
    those of taps and staps at full epsilon depend on the size of the tail and on the number of classes.
    ``params``: of the untrained network, for their shapes.
    """
    if config.loss in TAIL_ATTACKED and phase.part == FULL:
        return None
    return estimated_units(config, graph, params, phase)


def estimated_units(config: RunConfig, graph: Graph, params: Params, phase: Phase = Phase()) -> float:
    """``ideal_units``; of taps and staps as if every step of the latent attack went through the whole network once."""
    if config.loss == "standard":
        return _CLEAN
    attack, one = _of_one(config, graph, phase)
    perturbs = _certifies(config, phase)
    if config.awp_gamma and perturbs:
        one *= 2.0  # the same once more at the perturbed weights
    total = attack + one + _of_regularizer(config, phase)
    if config.method == "nrsloss" and config.loss in UNBOUNDED and perturbs:
        total += _BOX  # beside a loss with bounds, the instability is that of its own bound pass
    if config.method == "c_sam" and phase.stage == "mask":
        total += _OF_MASKS
    if config.method == "atmc" and phase.stage in ("factorised", "quantised"):
        total += _of_products(config, graph, params)
    return total + one * _members(config, perturbs)


def _certifies(config: RunConfig, phase: Phase) -> bool:
    """Whether the certified loss has a weight."""
    return phase.part != WARM_UP and config.standard_weight != 1.0


def _of_one(config: RunConfig, graph: Graph, phase: Phase) -> tuple[float, float]:
    """What is done once whatever the members, such as the attack; and the passes of one member on the whole batch."""
    if not _certifies(config, phase):
        return 0.0, _CLEAN
    loss = config.loss if phase.part == FULL else DURING_RAMP.get(config.loss, config.loss)
    normalised = any(node.op == "batch_norm" for node in graph.nodes)
    weighed = phase.part == RAMP or config.standard_weight
    clean = _CLEAN if weighed or (normalised and loss not in EXPRESSIVE) else 0.0
    attack = _ATTACK_STEP * (config.attack_steps or 0) if loss in ATTACKED else 0.0
    if normalised and clean == 0.0:
        attack += 1.0  # the full network's clean forward, for its running statistics
    one = clean + (0.0 if loss in UNBOUNDED else _BOX)
    if loss in EXPRESSIVE or loss in UNBOUNDED:
        one += _POINT
    if config.crown_weight or (config.crown_weight is not None and phase.part == RAMP):
        one += _BACKWARD_BOUND  # its weight starts at 1
    if loss in TAIL_ATTACKED:
        one += _LATENT_STEP * (config.latent_steps or 0)
    return attack, one


def _of_regularizer(config: RunConfig, phase: Phase) -> float:
    """Of the ramp regularisers: a box of their own where no loss has one yet."""
    alone = phase.part == WARM_UP and config.loss not in UNBOUNDED
    return _BOX if alone and config.train.regularizer > 0.0 else 0.0


def _members(config: RunConfig, perturbs: bool) -> float:
    """Passes beside the full network's own, in passes of one network."""
    chosen = config.compression_set
    if chosen is None:
        return 0.0
    drawn = members(chosen) - 1
    beside = float(drawn)
    if config.awp_radius and perturbs:
        steps = (config.awp_steps or 1) if config.awp_kind == "ascent" else 0
        separate = config.awp_member == "separate" or drawn == 0
        # one step of a copy of the full network is free: its gradient is there already
        beside += (1 + (steps if steps > 1 else 0)) if separate else drawn * steps
    return chosen.member_fraction * beside


def _of_products(config: RunConfig, graph: Graph, params: Params) -> float:
    """Of ATMC's ``U V``, forward and backward to both, at full rank: once per step, in F of a whole batch."""
    shapes = [params[f"{node.name}.weight"].flatten(1).shape for node in graph.weighted()]
    products = sum(rows * columns * min(rows, columns) for rows, columns in shapes)
    return 3.0 * products / (config.train.batch_size * macs(graph, params))
