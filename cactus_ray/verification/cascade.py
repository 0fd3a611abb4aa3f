"""The verdict cascade: clean prediction, attacks, interval bounds, linear bounds, branch and bound, else UNKNOWN.

Cheap stages see all samples before dear ones see any, and only samples that are still open go on. Every sample is
attacked, or tried at what came nearest at another level, before anything is proved of it; every bound is compared with
the margins at the points that are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cactus_ray.bounds.exact import exact_arithmetic
from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.bounds.rounding import Rounding
from cactus_ray.config import ThreatConfig
from cactus_ray.errors import UserError
from cactus_ray.verification import stages
from cactus_ray.verification.engine import bind
from cactus_ray.verification.hints import Hints
from cactus_ray.verification.soundness import Batch, Model, SoundnessError
from cactus_ray.verification.verdict import SampleVerdict, VerificationSettings
from cactus_ray.verification.work import Work

__all__ = ["SoundnessError", "VerificationSettings", "verify"]


def verify(
    graph: Graph,
    params: Params,
    images: Tensor,
    labels: Tensor,
    indices: Sequence[int],
    threat: ThreatConfig,
    settings: VerificationSettings,
    *,
    known: Mapping[int, Sequence[Tensor]] | None = None,
    radii: Params | None = None,
    hints: Hints | None = None,
) -> list[SampleVerdict]:
    """Verdicts on images [N, C, H, W] (float32, inside the domain) in their order.

    ``params`` are the float32 tensors that are deployed, on the device that does the work. ``indices`` number the
    samples in their split; random numbers depend on (settings.seed, index) only, so verdicts do not depend on how
    samples are divided into calls or batches (but for time limits, and rounding of batched float32 attacks).
    ``known``: images by index that may be counterexamples, e.g. of another level of the same network; tried first.
    ``radii`` (float64, see ``Rounding.of``): CERTIFIED holds for every network whose weights are that close.
    ``hints``: what another level left, by index; brought up to date, for the next one.

    CERTIFIED in ``settings.arithmetic``, by bounds in float64 whose own rounding our own engine charges; a
    misclassified sample is FALSIFIED by itself; other counterexamples replay in float32 and float64. Time-out, lack of
    memory and NaN are UNKNOWN. Raises UserError for images that do not fit the network or the domain and for an engine
    that is not installed, SoundnessError where a bound is contradicted.
    """
    _check_input(graph, images, labels, indices, threat)
    model = Model.of(graph, params)
    rounding = Rounding.of(graph, model.double, settings.arithmetic, radii)
    engine = bind(settings.engine, graph, model.double, rounding)
    verdicts: list[SampleVerdict] = []
    with exact_arithmetic(model.device):
        for start in range(0, len(indices), settings.batch_size):
            stop = min(start + settings.batch_size, len(indices))
            part = images[start:stop].to(model.device), labels[start:stop].to(model.device), indices[start:stop]
            batch = Batch.of(*part, threat.epsilon, threat.domain)
            work = Work(model, rounding, engine, batch, settings, known or {}, hints or {})
            _run(work)
            verdicts += [work.verdict(p) for p in range(len(batch))]
            if hints is not None:
                hints.update((batch.indices[p], work.hint(p)) for p in range(len(batch)))
    return verdicts


def _check_input(graph: Graph, images: Tensor, labels: Tensor, indices: Sequence[int], threat: ThreatConfig) -> None:
    if images.dtype != torch.float32 or tuple(images.shape[1:]) != graph.input_shape:
        raise UserError(
            f"images: got {images.dtype} {tuple(images.shape)}; expected float32 (N, *{graph.input_shape}), the "
            "network's input"
        )
    if not len(images) == len(labels) == len(indices):
        raise ValueError(
            f"{len(images)} images, {len(labels)} labels, {len(indices)} indices; expected as many of each"
        )
    low, high = threat.domain
    outside = ~((images.double() >= low) & (images.double() <= high)).flatten(1).all(1)
    if bool(outside.any()):
        first = int(outside.nonzero()[0])
        raise UserError(
            f"image {indices[first]}: pixels from {float(images[first].min())!r} to {float(images[first].max())!r}; "
            f"expected numbers inside threat.domain {list(threat.domain)}"
        )


def _run(work: Work) -> None:
    """All stages on one batch: cheap ones see all samples before dear ones see any.

    What another level attacked is only replayed here before interval bounds, and what it certified is bounded by CROWN
    before it is attacked at length; whatever stays open goes through all stages.
    """
    bound, everyone = work.settings.bound, range(len(work.batch))
    linear = bound in ("crown", "alpha", "branch")
    work.stage(stages.clean)
    work.stage(stages.known_points)
    work.stage(stages.nearest_points, work.chosen(lambda p: work.hinted(p).nearest is not None))
    work.stage(stages.quick_attack, work.chosen(lambda p: p not in work.attacked))
    # also samples that an attack falsified: a bound that "proves" one of them must not stay unseen
    work.stage(stages.interval_bounds, [p for p in everyone if work.open(p) or p in work.fallen])
    promising = set(work.chosen(lambda p: linear and work.hinted(p).certified))
    work.stage(stages.linear_bounds, sorted(promising))
    work.stage(stages.quick_attack, work.chosen(lambda p: work.hinted(p).nearest is not None))
    work.stage(stages.full_attack)
    work.stage(stages.linear_bounds, work.chosen(lambda p: linear and p not in promising))
    work.stage(stages.hunt)
    if bound in ("alpha", "branch"):
        work.stage(stages.alpha_bounds)
    if bound == "branch":
        work.stage(stages.branch_and_bound)
