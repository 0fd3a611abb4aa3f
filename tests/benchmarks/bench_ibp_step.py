"""A training step with interval bounds, ours and auto_LiRPA's, side by side in one process on one thread.

    python tests/benchmarks/bench_ibp_step.py --model cnn_small
    python tests/benchmarks/bench_ibp_step.py --model cnn7 --width 0.25

Both make the same step on the same images: clean pass, interval bounds of the margins with the last layer elided, batch
norm of the clean batch for both, half of each cross-entropy, backward, clipped gradient, fused Adam. They start from
the same weights, and the losses of the first step must agree. In turns; a ratio is ours / theirs within one turn, and
the processor's time is counted. Images are random: times do not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cactus_ray.config import RunConfig, parse
from cactus_ray.data import DataSet
from cactus_ray.errors import UserError
from cactus_ray.models import build
from cactus_ray.training.loop import update
from cactus_ray.training.run import Run, start
from cactus_ray.training.step import Step
from cactus_ray.training.workers import Alone
from cactus_ray.verification import lirpa

SHAPE, CLASSES, EPSILON, TARGET = (1, 28, 28), 10, 0.1, 0.9
WARM_UP = 3


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    try:
        about = lirpa.info()
    except UserError as error:
        raise SystemExit(f"nothing to compare with: {error}") from None
    print(f"{about.name} {about.version}; torch {torch.__version__}")
    config = parse(RunConfig, {
        "data": {"name": "mnist", "root": "."},  # only its normalisation is used: no file is read
        "model": {"name": arguments.model, "width": arguments.width}, "threat": {"epsilon": EPSILON},
        "train": {"batch_size": arguments.batch_size}, "method": "ibp", "standard_weight": 0.5,
    })  # fmt: skip
    run = start(config, _random(arguments.batch_size), None, None, Alone(), False, "cpu")
    theirs, ours = their_step(run), our_step(run)
    losses = ours(), theirs()
    print(f"loss of the first step: ours {losses[0]:.6f}, theirs {losses[1]:.6f}")
    if abs(losses[0] - losses[1]) > 1e-4 * abs(losses[1]):
        raise SystemExit("the steps differ; expected the same loss")
    for _ in range(WARM_UP):
        ours()
        theirs()
    pairs = [(timed(ours, arguments.steps), timed(theirs, arguments.steps)) for _ in range(arguments.repeats)]
    mine, other = [a for a, _ in pairs], [b for _, b in pairs]
    print(f"{arguments.model} (width {arguments.width:g}), batch {arguments.batch_size}, {len(pairs)} turns")
    print(f"ours    {_spread(mine)} ms\ntheirs  {_spread(other)} ms")
    print(f"ratio   {_spread([a / b for a, b in pairs])}   target at most {TARGET}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cnn_small", choices=("cnn_small", "cnn7"))
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="per turn, of which the median counts")
    return parser.parse_args()


def _random(count: int) -> DataSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((count, *SHAPE), generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    splits = ("train", "selection")
    return DataSet(
        "random", tuple("0123456789"), dict.fromkeys(splits, images), dict.fromkeys(splits, labels), {}
    )  # fmt: skip


def our_step(run: Run) -> Callable[[], float]:
    """Everything that the training loop does for a batch, at the final epsilon."""
    config, seen = run.config, torch.empty(2)
    generator = torch.Generator().manual_seed(0)

    def call() -> float:
        step = Step(
            config, run.graph, run.network(), run.images, run.labels, noise=run.images[:0], epsilon=EPSILON,
            standard_weight=0.5, progress=0.999, index=0, generator=generator,
        )  # fmt: skip
        update(run, step, config.learning_rate, seen)
        return float(seen[0])

    return call


def their_step(run: Run) -> Callable[[], float]:
    """The same step of auto_LiRPA's, as its training examples write it."""
    from auto_LiRPA import BoundedModule, BoundedTensor
    from auto_LiRPA.perturbations import PerturbationLpNorm

    config, images, labels = run.config, run.images, run.labels
    plain = build(config.model, SHAPE, CLASSES, generator=torch.Generator())
    plain.load_state_dict({k: v.detach().clone() for k, v in run.params.items()}, strict=False)
    model = BoundedModule(plain.train(), images, bound_opts={"bn": {"mode": "forward"}})
    model.train()  # the conversion of a one-dimensional batch norm leaves evaluation mode behind
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    ball = PerturbationLpNorm(
        norm=float("inf"), x_L=(images - EPSILON).clamp(0, 1), x_U=(images + EPSILON).clamp(0, 1)
    )  # fmt: skip
    differences = _differences(labels)

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        clean = F.cross_entropy(model(BoundedTensor(images, ball)), labels)
        options: dict[str, Any] = {"IBP": True, "C": differences, "method": None, "bound_upper": False}
        lower, _ = model.compute_bounds(**options)
        worst = torch.cat([lower.new_zeros(len(lower), 1), -lower], dim=1)  # the label first
        loss = 0.5 * clean + 0.5 * F.cross_entropy(worst, torch.zeros_like(labels))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
        optimizer.step()
        return loss.item()

    return call


def _differences(labels: Tensor) -> Tensor:
    """[N, CLASSES - 1, CLASSES]: logit[label] minus that of every other class."""
    unit = torch.eye(CLASSES)
    others = torch.arange(CLASSES)[None].expand(len(labels), -1)[~F.one_hot(labels, CLASSES).bool()]
    return unit[labels][:, None] - unit[others.view(len(labels), -1)]


def timed(call: Callable[[], float], steps: int) -> float:
    """Milliseconds of a call: the median of some."""
    found = []
    for _ in range(steps):
        began = time.thread_time()
        call()
        found.append(1e3 * (time.thread_time() - began))
    return statistics.median(found)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


if __name__ == "__main__":
    main()
