"""How often a random transformation changes a prediction: confidence bounds from independent draws.

The threat ``semantic``. It has nothing to do with linf certificates: nothing is proved about any single input, a
statement is about a probability under a stated distribution, and it holds with a stated confidence only. So no word and
no key is shared with verdicts: all are ``semantic_*``.

The default is the exact upper bound of Clopper and Pearson 1934: right with at least the stated confidence whatever
the network does, because flips of independent draws are binomial. Beside it stands the Chernoff-Cramer value of CC-Cert
(Pautov et al. 2022), by which C-SAM (arXiv 2601.20301) counts its "probabilistically certified accuracy". It sees by
how much probabilities move and so can be far below what a count can say, but it puts sample means of exp(t Z) where the
theorem has expectations: their error depends on the coefficient of variation of exp(t Z), which is unknown (its worst
case, sinh(t / 2), would need more draws than anybody makes). It is therefore an estimate, and decides nothing here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import special
from torch import Tensor

from cactus_ray.config import setting
from cactus_ray.verification.transforms import Domain, Transform, draw

Logits = Callable[[Tensor], Tensor]
"""Logits [N, classes] of images [N, C, H, W]."""

MOST_DRAWS = 10**7
AT_ONCE = 500
"""Transformed images of one sample at once; fixed, because a runtime's last bits may depend on the batch."""
GROUPS = 5
"""Sample means of the Chernoff-Cramer value, of which the largest counts (k of CC-Cert)."""
TEMPERATURES = tuple(10.0 ** (i / 10) for i in range(41))
"""Values of t over which the Chernoff-Cramer value is minimised: 1 to 10,000."""
_UP = 1.0 + 1e-9  # more than the error of the incomplete beta function's inverse


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticSettings:
    """What is claimed, how surely, and by how many draws per sample."""

    confidence: float = setting(0.99, doc="probability with which a bound is right", minimum=1e-6, maximum=1.0 - 1e-12)
    flip: float = setting(
        0.001, doc="largest flip probability at which a sample holds", minimum=1e-6, exclusive_maximum=1.0
    )
    draws: int = setting(doc="independent transformations per sample", minimum=1, maximum=MOST_DRAWS)
    seed: int = setting(0, doc="seed of the transformations", minimum=0, maximum=2**31 - 1)


@dataclass(frozen=True, slots=True)
class SampleFlips:
    """What was counted for one sample.

    A flip: the label's logit is not the only largest one, or a logit is not finite. Where the sample itself is not
    classified rightly (``semantic_correct``), nothing is drawn. ``semantic_chernoff``: the Chernoff-Cramer value in
    [0, 1], an estimate; None where nothing is drawn.
    """

    index: int
    label: int
    semantic_correct: bool
    semantic_draws: int
    semantic_flips: int
    semantic_chernoff: float | None


def flip_bound(flips: int, draws: int, risk: float) -> float:
    """Upper bound of a probability of which ``flips`` of ``draws`` independent trials were hits; wrong with probability
    at most ``risk``.

    Clopper and Pearson 1934, one-sided: the largest p at which at most ``flips`` hits still have probability ``risk``.
    ``draws`` must be chosen without looking at the flips. Raises ValueError for counts or a risk that cannot be.
    """
    if not 0 <= flips <= draws or draws == 0 or not 0.0 < risk < 1.0:
        raise ValueError(f"flip_bound({flips}, {draws}, {risk}): expected 0 <= flips <= draws > 0 and 0 < risk < 1")
    if flips == draws:
        return 1.0
    return min(1.0, float(special.betainccinv(flips + 1, draws - flips, risk)) * _UP)


def least_draws(flip: float, risk: float) -> int:
    """The least draws with which a sample without any flip is bounded by ``flip``; both in (0, 1)."""
    draws = max(1, math.floor(math.log(risk) / math.log1p(-flip)))
    while flip_bound(0, draws, risk) > flip:
        draws += 1
    return draws


def chernoff_estimate(distances: Tensor, gap: float) -> float:
    """The Chernoff-Cramer value of CC-Cert: min over t of exp(-t gap) max over groups of mean exp(t Z), at most 1.

    ``distances`` Z [draws]: largest change of a class probability, NaN counting as 1; ``gap``: half the difference of
    the two largest probabilities, which a flip must reach. An estimate of a bound (see above).
    """
    exact = distances.double().nan_to_num(nan=1.0)
    groups = [group for group in exact.chunk(GROUPS) if len(group)]
    t = torch.tensor(TEMPERATURES, dtype=torch.float64)
    means = torch.stack([torch.logsumexp(t[:, None] * group, 1) - math.log(len(group)) for group in groups])
    return math.exp(min(0.0, float((means.amax(0) - t * gap).min())))


def generator_of(seed: int, transform: Transform, index: int) -> torch.Generator:
    """The draws of one sample, the same whatever other samples are looked at."""
    digest = hashlib.sha256(f"{seed}/{transform}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def count_flips(
    logits: Logits,
    image: Tensor,
    label: int,
    index: int,
    transform: Transform,
    settings: SemanticSettings,
    domain: Domain = (0.0, 1.0),
) -> SampleFlips:
    """How many of ``settings.draws`` random transformations of an image [C, H, W] change its right prediction.

    Deterministic for the same arguments, as far as ``logits`` is.
    """
    clean = logits(image[None])
    if not bool(_right(clean, label)[0]):
        return SampleFlips(index, label, False, 0, 0, None)
    before = clean.double().softmax(1)
    generator = generator_of(settings.seed, transform, index)
    flips, distances = 0, []
    for start in range(0, settings.draws, AT_ONCE):
        images = draw(transform, image, min(AT_ONCE, settings.draws - start), generator, domain)
        found = logits(images)
        flips += int((~_right(found, label)).sum())
        distances.append((found.double().softmax(1) - before).abs().amax(1))
    others = before[0].clone()
    others[label] = -1.0
    gap = 0.5 * float(before[0, label] - others.max())
    return SampleFlips(index, label, True, settings.draws, flips, chernoff_estimate(torch.cat(distances), gap))


def _right(logits: Tensor, label: int) -> Tensor:
    """Bool [N]: the label's logit is larger than every other, and all are finite."""
    others = logits.clone()
    others[:, label] = -torch.inf
    return (logits[:, label] > others.amax(1)) & logits.isfinite().all(1)


def summary(rows: Sequence[SampleFlips], settings: SemanticSettings) -> dict[str, Any]:
    """Counts over at least one sample; every key begins with ``semantic_``.

    A sample holds where it is classified rightly and the bound of its flip probability is at most ``settings.flip``.
    ``semantic_n_hold``: each statement by itself is wrong with probability at most 1 - confidence, so among many some
    may be wrong. ``semantic_n_hold_jointly``: all of them are right at once with the stated confidence (Bonferroni over
    the samples that were tested). ``semantic_n_open``: tested, and does not hold. ``semantic_n_chernoff``: the count
    that C-SAM reports, by estimates.
    """
    if not rows:
        raise ValueError("no samples to summarise")
    tested = [row for row in rows if row.semantic_correct]
    risk = 1.0 - settings.confidence
    each, jointly = (
        sum(flip_bound(row.semantic_flips, row.semantic_draws, r) <= settings.flip for row in tested)
        for r in (risk, risk / max(1, len(tested)))
    )
    estimates = [row.semantic_chernoff for row in tested]
    return {
        "semantic_confidence": settings.confidence,
        "semantic_flip": settings.flip,
        "semantic_draws": settings.draws,
        "semantic_seed": settings.seed,
        "semantic_samples": len(rows),
        "semantic_n_misclassified": len(rows) - len(tested),
        "semantic_n_hold": each,
        "semantic_n_hold_jointly": jointly,
        "semantic_n_open": len(tested) - each,
        "semantic_n_chernoff": sum(e is not None and e < settings.flip for e in estimates),
        "semantic_hold_share": each / len(rows),
    }
