"""What keeps verdicts true: exact balls, replay of counterexamples, checks of bounds at points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params, forward


class SoundnessError(Exception):
    """A claimed lower bound is above the margin at a point of the ball: a bound engine is wrong.

    Holds what is needed to reproduce it. Never caught: no verdict of the run can be trusted.
    """

    def __init__(self, engine: str, index: int, label: int, other: int, bound: float, margin: float, point: Tensor):
        self.engine, self.index, self.label, self.other = engine, index, label, other
        self.bound, self.margin, self.point = bound, margin, point
        super().__init__(
            f"unsound {engine} bound of sample {index}: logit[{label}] - logit[{other}] >= {bound!r} is claimed, "
            f"but it is {margin!r} at a point of the ball (error.point)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its fields, so that it reaches the driver from another process."""
        return SoundnessError, (
            self.engine, self.index, self.label, self.other, self.bound, self.margin, self.point,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Model:
    """The network of one level in the precision of deployment and in that of decisions."""

    graph: Graph
    single: Params
    double: Params

    @staticmethod
    def of(graph: Graph, params: Params) -> Model:
        """Detached copies of the tensors in float32 and float64; float32 values are kept exactly."""
        return Model(
            graph,
            {k: v.detach().float() for k, v in params.items()},
            {k: v.detach().double() for k, v in params.items()},
        )

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return next(iter(self.single.values())).device

    @property
    def finite(self) -> bool:
        """Whether no tensor holds a NaN or an infinity."""
        return all(bool(torch.isfinite(v).all()) for v in self.single.values())


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples with the float32 inputs around them that surely lie in the ball and in the domain.

    images [N, C, H, W] float32; labels [N] int64; indices: their numbers in the split; epsilon, domain: the threat;
    lower, upper: smallest and largest admissible float32 value per pixel.
    """

    images: Tensor
    labels: Tensor
    indices: tuple[int, ...]
    epsilon: float
    domain: tuple[float, float]
    lower: Tensor
    upper: Tensor

    @staticmethod
    def of(
        images: Tensor, labels: Tensor, indices: Sequence[int], epsilon: float, domain: tuple[float, float]
    ) -> Batch:
        """The batch with its limits, rounded inward so that every float32 input between them is admissible."""
        wide = images.double()
        low = (wide - epsilon).clamp(*domain)
        high = (wide + epsilon).clamp(*domain)
        lower, upper = low.float(), high.float()
        lower = torch.where(lower.double() < low, torch.nextafter(lower, torch.full_like(lower, torch.inf)), lower)
        upper = torch.where(upper.double() > high, torch.nextafter(upper, torch.full_like(upper, -torch.inf)), upper)
        return Batch(images, labels, tuple(int(i) for i in indices), epsilon, domain, lower, upper)

    def __len__(self) -> int:
        return len(self.indices)

    def clip(self, points: Tensor) -> Tensor:
        """The admissible points that are nearest to points [N, C, H, W]."""
        return torch.minimum(torch.maximum(points, self.lower), self.upper)

    def select(self, positions: Sequence[int]) -> Batch:
        """Some of the samples, by their position in the batch."""
        chosen = torch.tensor(positions, dtype=torch.int64, device=self.images.device)
        return Batch(
            self.images[chosen],
            self.labels[chosen],
            tuple(self.indices[p] for p in positions),
            self.epsilon,
            self.domain,
            self.lower[chosen],
            self.upper[chosen],
        )


def margins_at(logits: Tensor, labels: Tensor) -> Tensor:
    """``logit[label] - logit[j]`` [N, classes]; infinity at j = label, so that the minimum is over the others."""
    return (logits.gather(1, labels[:, None]) - logits).scatter(1, labels[:, None], torch.inf)


def replays(model: Model, batch: Batch, points: Tensor) -> Tensor:
    """Which float32 points [N, C, H, W] are counterexamples [N].

    Inside the ball and the domain, both evaluated in float64, and with a negative margin in float32 and in float64.
    """
    wide = points.double()
    low, high = batch.domain
    inside = ((wide - batch.images.double()).abs() <= batch.epsilon) & (wide >= low) & (wide <= high)
    with torch.no_grad():
        single = margins_at(forward(model.graph, model.single, points), batch.labels).amin(1)
        double = margins_at(forward(model.graph, model.double, wide), batch.labels).amin(1)
    return inside.flatten(1).all(1) & (single < 0) & (double < 0)  # a NaN margin is not below 0


def proved(lower: Tensor, labels: Tensor) -> Tensor:
    """Whether margin bounds [N, classes] prove the label [N]: finite and above 0 for every other class."""
    good = torch.isfinite(lower) & (lower > 0)
    return good.scatter(1, labels[:, None], True).all(1)


def ball_points(batch: Batch, generators: Sequence[torch.Generator], count: int) -> Iterator[Tensor]:
    """``count`` random points and as many corners of every sample's ball, float32 [N, C, H, W] each."""
    for _ in range(count):
        share = random_like(batch.images, generators)
        yield torch.minimum(torch.maximum(torch.lerp(batch.lower, batch.upper, share), batch.lower), batch.upper)
        yield torch.where(share < 0.5, batch.lower, batch.upper)


def random_like(images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Uniform numbers in [0, 1), each sample's from its own (CPU) generator: independent of its neighbours."""
    drawn = [torch.rand(images.shape[1:], generator=g) for g in generators]
    return torch.stack(drawn).to(images.device)


def check_bounds(engine: str, model: Model, batch: Batch, lower: Tensor, points: Tensor) -> None:
    """Raise SoundnessError where finite margin bounds [N, classes] are above the margins at points of the balls.

    Both in float64; the slack covers rounding only.
    """
    with torch.no_grad():
        logits = forward(model.graph, model.double, points.double())
    true = margins_at(logits, batch.labels)
    slack = 1e-9 * (1 + logits.abs().amax(1, keepdim=True))
    wrong = torch.isfinite(lower) & ~(true >= lower - slack)
    wrong = wrong.scatter(1, batch.labels[:, None], False)
    if bool(wrong.any()):
        sample, other = (int(i) for i in wrong.nonzero()[0])
        raise SoundnessError(
            engine,
            batch.indices[sample],
            int(batch.labels[sample]),
            other,
            float(lower[sample, other]),
            float(true[sample, other]),
            points[sample].detach().cpu(),
        )


def halving(function: Callable[[list[int]], None], positions: list[int]) -> list[int]:
    """Call ``function`` on all positions, or on ever smaller halves when memory runs out.

    Returns the positions that do not fit even alone. Any other error is raised.
    """
    waiting, failed = [positions], []
    while waiting:
        part = waiting.pop()
        if not part or _fits(function, part):
            continue
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(part) // 2
        if middle == 0:
            failed += part
        else:
            waiting += [part[middle:], part[:middle]]
    return failed


def _fits(function: Callable[[list[int]], None], part: list[int]) -> bool:
    # returns before the halves are tried, so that the error's frames no longer hold their tensors
    try:
        function(part)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on an accelerator or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        words in text for words in ("not enough memory", "can't allocate memory", "out of memory")
    )
