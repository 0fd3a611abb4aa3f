"""What cheap CACTUS pairs cost in accuracy: against the plain pair that shares nothing, by level, seeds paired.

    .venv/bin/python tests/benchmarks/bench_pair.py --root ../shared/data --results pair.json --kinds single half

All train {full, pruned at one sparsity from U(0.5, 0.97)} with SABR (MNIST, epsilon 0.1, cnn_small, k = 1), from the
same seed, on the whole training split. ``plain``: the member sees the whole batch, attacks it itself, and has a fresh
mask in every step; that is the loss written down without any sharing. The others share the full network's adversarial
points: ``single`` shows its member a quarter of the batch and keeps a mask for ten steps, ``half`` shows it a half and
``whole`` all of it; ``fresh`` shows a quarter and keeps no mask. All have the same epochs but ``longer``, which is
``single`` for as many as take ``plain``'s seconds. Printed: IBP-certified accuracy on all 10,000 test images (float64),
and the mean difference with its 95 % interval (Student's t over paired seeds). Resumable network by network; ``--show
FILE`` only prints.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from level_figures import deployed, interval_accuracies
from scipy import stats
from torch import Tensor

from cactus_ray.bounds.graph import Statistics
from cactus_ray.compression.prune import apply_masks, masks
from cactus_ray.compression.sets import draw
from cactus_ray.config import RunConfig, parse
from cactus_ray.data import load
from cactus_ray.training import methods
from cactus_ray.training.attacks import pgd
from cactus_ray.training.loop import train
from cactus_ray.training.losses import Region
from cactus_ray.training.step import Step, full_loss, member_loss

LEVELS = (
    "dense", "prune:gu-l1:0.9", "prune:gu-l1:0.95", "prune:gu-l1:0.97", "int8", "int4", "int3", "ternary",
)  # fmt: skip
SINGLE = {"member_fraction": 0.25, "refresh_every": 10}
SHARING = {
    "plain": {},
    "single": SINGLE,
    "longer": SINGLE,
    "half": {"member_fraction": 0.5, "refresh_every": 10},
    "whole": {"refresh_every": 10},
    "fresh": {"member_fraction": 0.25},
}
LONGER = 1.5
"""Epochs of ``longer`` for each of the others': a step of ``single`` takes two thirds of one of ``plain``."""
DEFAULTS = {"learning_rate": 0.002, "standard_weight": 0.3, "box_ratio": 0.6, "regularizer": 0.0}
"""Settings of both sides; the epochs are given beside them."""
TARGET = 0.5
"""Points by which a cheap pair may be worse."""


def configuration(kind: str, seed: int, asked: argparse.Namespace) -> RunConfig:
    epochs = round(asked.epochs * (LONGER if kind == "longer" else 1))
    return parse(
        RunConfig,
        {
            "data": {"name": "mnist", "root": str(asked.root)}
            | ({"train_samples": asked.train_samples} if asked.train_samples else {}),
            "model": {"name": "cnn_small"}, "threat": {"epsilon": 0.1}, "method": "cactus", "seed": seed,
            "train": {"epochs": epochs, "batch_size": 128, "ramp": 0.3, "regularizer": asked.regularizer},
            "learning_rate": asked.learning_rate, "standard_weight": asked.standard_weight,
            "certified_loss": "sabr", "box_ratio": asked.box_ratio, "attack_steps": 1,
            "compression_set": {"strategy": "single", "low": 0.5, "high": 0.97, **SHARING[kind]},
        },
    )  # fmt: skip


def plain_pair(step: Step) -> Iterator[Tensor]:
    """CACTUS's Eq. 8 for {full, one pruned copy}, each with an attack of its own on the whole batch."""
    config = step.config
    kind, chosen = config.certified_loss, config.compression_set
    assert kind is not None
    assert chosen is not None
    loss, region = full_loss(step, kind)
    yield 0.5 * loss
    (sparsity,) = draw(chosen, step.progress, step.generator, step.graph, step.params)
    member = apply_masks(step.params, masks(step.graph, step.params, chosen.family, sparsity))
    if region.point is not None:
        assert config.attack_steps is not None
        assert config.attack_step_size is not None
        statistics_: Statistics = {}
        point = pgd(
            step.graph, member, step.labels, region.ball, steps=config.attack_steps,
            step_size=config.attack_step_size * step.epsilon, start=step.noise, statistics=statistics_,
        )  # fmt: skip
        region = Region(region.labels, region.ball, point, region.generator)
    yield 0.5 * member_loss(step, member, region, kind)


def measured(kind: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """One network: what its training took, and its accuracies by level."""
    config = configuration(kind, seed, asked)
    ours = methods.METHODS["cactus"]
    methods.METHODS["cactus"] = plain_pair if kind == "plain" else ours
    begun = time.process_time()
    try:
        data = load(config.data, ("train", "selection"))
        result = train(config, data, report=lambda epoch: True, device=asked.device)
    finally:
        methods.METHODS["cactus"] = ours
    seconds = {"cpu_seconds": round(time.process_time() - begun, 1)}
    seconds = seconds if asked.device == "cpu" else {"seconds": round(result.seconds, 1)}
    spent = {**seconds, "config_hash": config.config_hash}
    images, labels = load(config.data, ("test",)).split("test")
    found = {}
    for level in LEVELS:
        network = deployed(result.network, level, config.data, config.threat)
        found[level] = interval_accuracies(network, images, labels, config.threat)
    return spent | {"levels": found}


def show(found: dict[str, Any], kind: str) -> None:
    """How ``kind`` compares with ``plain``: one row per level."""
    rows = found["networks"]
    seeds = [s for s in range(len(rows)) if f"{kind}-{s}" in rows and f"plain-{s}" in rows]
    if not seeds:
        return
    print(f"\n{found['plan']}, {len(seeds)} paired seeds; IBP-certified (standard) accuracy, %\n")
    print(f"| level | {kind} | plain | difference, 95 % interval | within {TARGET} |\n|---|---|---|---|---|")
    for level in LEVELS:
        cheap, plain = ([rows[f"{name}-{s}"]["levels"][level] for s in seeds] for name in (kind, "plain"))
        differences = [100 * (a[1] - b[1]) for a, b in zip(cheap, plain, strict=True)]
        mean = statistics.mean(differences)
        text, verdict = f"{mean:+.2f}", "yes" if mean > -TARGET else "no"
        if len(seeds) > 1:
            half = stats.t.ppf(0.975, len(seeds) - 1) * statistics.stdev(differences) / len(seeds) ** 0.5
            text += f" [{mean - half:+.2f}, {mean + half:+.2f}]"
            verdict += "" if mean - half > -TARGET or mean < -TARGET else ", the interval reaches below"
        cells = [" ".join((f"{_mean(v, 1):.2f}", f"({_mean(v, 0):.2f})")) for v in (cheap, plain)]
        print(f"| `{level}` | {cells[0]} | {cells[1]} | {text} | {verdict} |")
    clock = "seconds" if "device" in found["plan"] else "cpu_seconds"
    ratio = statistics.mean(rows[f"{kind}-{s}"][clock] / rows[f"plain-{s}"][clock] for s in seeds)
    words = f"Seconds of training on {found['plan']['device']}" if clock == "seconds" else "CPU seconds of training"
    print(f"\n{words}, {kind} over plain: {ratio:.2f}")


def _mean(values: list[Any], place: int) -> float:
    return 100 * statistics.mean(v[place] for v in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--results", type=Path, help="file of figures")
    parser.add_argument("--kinds", nargs="+", default=["single"], choices=[k for k in SHARING if k != "plain"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    for key, default in DEFAULTS.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=float, default=default, help="of both sides")
    parser.add_argument("--train-samples", type=int, help="train on a fixed subset of this size")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where networks are trained")
    parser.add_argument("--show", type=Path, help="only print the table of such a file")
    asked = parser.parse_args()
    if asked.show:
        for kind in SHARING:
            if kind != "plain":
                show(json.loads(asked.show.read_text()), kind)
        return
    if asked.root is None or asked.results is None:
        parser.error("--root FOLDER and --results FILE are needed")
    torch.set_num_threads(1)
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    plan = {"epochs": asked.epochs} | ({"train_samples": asked.train_samples} if asked.train_samples else {})
    plan |= {} if asked.device == "cpu" else {"device": asked.device}
    plan |= {key: getattr(asked, key) for key, default in DEFAULTS.items() if getattr(asked, key) != default}
    found: dict[str, Any] = {"plan": plan, "networks": {}}
    if asked.results.exists():
        found = json.loads(asked.results.read_text())
        if found["plan"] != plan:
            raise SystemExit(f"{asked.results}: of {found['plan']}, not {plan}; remove it or name another")
    for seed in range(asked.seeds):
        for kind in ("plain", *asked.kinds):
            name = f"{kind}-{seed}"
            if name not in found["networks"]:
                found["networks"][name] = measured(kind, seed, asked)
                lines = ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in found["networks"].items())
                asked.results.write_text(f'{{"plan": {json.dumps(plan)},\n"networks": {{\n{lines}\n}}}}\n')
                print(f"{name}: {found['networks'][name]}", flush=True)
    for kind in asked.kinds:
        show(found, kind)


if __name__ == "__main__":
    main()
