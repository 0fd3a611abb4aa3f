"""Counterexamples that attacks find at equal gradient steps, on samples that CROWN leaves open.

    python tests/benchmarks/bench_attacks.py runs/NAME/checkpoints/t000?.safetensors --root ../shared/data

All start from one run of PGD from the image, whose finds are left out; what each then finds with as many further steps
is counted over all networks and levels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cactus_ray.bounds import interval
from cactus_ray.bounds.rounding import Rounding
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import materialize
from cactus_ray.data import load
from cactus_ray.models.network import load as load_network
from cactus_ray.verification.attack import attack, fell, targeted_attack
from cactus_ray.verification.engine import CactusEngine
from cactus_ray.verification.soundness import Batch, Model, proved

STEPS = 40
Attack = Callable[[Model, Batch, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", type=Path)
    parser.add_argument("--root", type=Path, default=None, help="folder of the data set the networks were trained on")
    parser.add_argument("--levels", nargs="+", default=["dense", "int4", "prune:gu-l1:0.95"])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--further", nargs="+", type=int, default=[40, 80, 160], help="further gradient steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [case for path in options.networks for case in hard(path, options)]
    print(f"{sum(len(batch) for _, batch, _, _ in cases)} samples of {len(cases)} networks and levels are open")
    for further in options.further:
        for name, run in ways(further).items():
            found = sum(int(fell(run(*case)).sum()) for case in cases)
            print(f"{further:4d} further steps, {name:24s} {found:4d} more counterexamples", flush=True)


def ways(further: int) -> dict[str, Attack]:
    """Attacks of ``further`` steps; ``undecided``: classes that no bound excludes."""

    def restarts(model: Model, batch: Batch, points: Tensor, undecided: Tensor) -> Tensor:
        return attack(model, batch, steps=STEPS, restarts=1 + further // STEPS, seed=0)[1]

    def targeted(steps: int) -> Attack:
        def run(model: Model, batch: Batch, points: Tensor, undecided: Tensor) -> Tensor:
            return targeted_attack(model, batch, points, undecided, steps=steps, runs=further // steps, seed=0)[1]

        return run

    return {
        "restarts of PGD": restarts,
        **{f"Auto-PGD, {further // steps} runs of {steps}": targeted(steps) for steps in (40, 20, 10, 5)},
    }


def hard(path: Path, options: argparse.Namespace) -> Iterator[tuple[Model, Batch, Tensor, Tensor]]:
    """Model, samples that CROWN and a run of PGD leave open, the points it ends at, and the classes that are open."""
    network = load_network(path)
    assert network.config is not None, "a network trained by cactus-ray"
    threat, data = network.config.threat, replace(network.config.data, root=options.root and str(options.root))
    images, labels = load(data, ("test",)).split("test")
    count = min(options.samples, len(labels))
    batch = Batch.of(images[:count], labels[:count], range(count), threat.epsilon, threat.domain)
    for name in options.levels:
        compressed = materialize(network.graph, network.params, parse_level(name))
        model = Model.of(compressed.graph, compressed.params)
        points, margins = attack(model, batch, steps=STEPS, restarts=1, seed=0)
        left = (~fell(margins)).nonzero()[:, 0]
        part = batch.select(left.tolist())
        engine = CactusEngine(model.graph, model.double, Rounding.of(model.graph, model.double, "float32"))
        lower = []
        with torch.no_grad():
            for some in torch.arange(len(left)).split(100):
                box = interval.ball(part.images[some].double(), threat.epsilon, threat.domain)
                lower.append(engine.linear_margins(box, part.labels[some]))
        bounds = torch.cat(lower)
        open_ = (~proved(bounds, part.labels)).nonzero()[:, 0]
        if len(open_):
            yield model, part.select(open_.tolist()), points[left[open_]], ~(bounds[open_] > 0)


if __name__ == "__main__":
    main()
