"""Method x level, over seeds: one network per method and seed, verified at every level on the test split.

    .venv/bin/python tests/benchmarks/bench_methods.py --data mnist --root ../shared/data --out methods

All methods share model, epochs, batch and rate, and are not tuned one by one; ``EPOCHS`` gives SABR and its kin as many
more epochs as CACTUS's steps cost more, so that both train for the same seconds (printed). Every level is measured
twice: plain and IBP-certified accuracy on the whole test split (float64), and the cascade (attack, IBP and CROWN, with
float32 charged) on ``--samples`` fixed samples, ``--branch-samples`` of them with branch and bound, 5 s each. Kept
in ``--out`` network by network: a second run goes on where it ended, and only prints what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cactus_ray.bounds.graph import forward
from cactus_ray.bounds.interval import ball, margins
from cactus_ray.config import METHODS, DataConfig, RunConfig, ThreatConfig, options_of, parse
from cactus_ray.data import load, subset
from cactus_ray.interchange.read import read_onnx
from cactus_ray.models.network import Network, save
from cactus_ray.models.network import load as load_network
from cactus_ray.search.evaluate import at_level
from cactus_ray.training.loop import train
from cactus_ray.verification.siblings import LevelModel, verify_levels
from cactus_ray.verification.verdict import SampleVerdict, VerificationSettings, summary

LEVELS: dict[str, tuple[str, ...]] = {
    "mnist": (
        "dense", "int8", "int4", "int3", "ternary", "prune:gu-l1:0.9", "prune:gu-l1:0.95", "prune:gu-l1:0.97",
        "prune:gs-l2:0.5",
    ),
    "digits": ("dense", "int8", "int4", "int3", "prune:gu-l1:0.9", "prune:gu-l1:0.95", "prune:gs-l2:0.5+int8"),
}  # fmt: skip
COMMON: dict[str, dict[str, Any]] = {
    "mnist": {
        "train": {"batch_size": 128, "ramp": 0.3, "regularizer": 0.5},
        "learning_rate": 0.001, "standard_weight": 0.3, "attack_steps": 1, "box_ratio": 0.6,
    },
    "digits": {
        "train": {"batch_size": 32}, "learning_rate": 0.005, "standard_weight": 0.2, "box_ratio": 0.8, "weight_bits": 4,
    },
}  # fmt: skip
EPOCHS = {"mnist": 10, "digits": 20}
LONGER = {"mnist": 1.2, "digits": 1.2}
"""Epochs of every other method over those of CACTUS: the ratio of their steps' seconds."""
CACTUS = {
    "certified_loss": "sabr",
    "compression_set": {
        "strategy": "single", "low": 0.5, "high": 0.97, "member_fraction": 0.25, "refresh_every": 10,
    },
}  # fmt: skip
IBP_BATCH, CASCADE_BATCH = 500, 100
SECONDS_OF_BRANCH = 5.0


def configuration(data: str, root: Path | None, method: str, seed: int) -> RunConfig:
    """The run of a method; options that the method does not know are left out."""
    common = dict(COMMON[data])
    epochs = EPOCHS[data] if method == "cactus" else round(EPOCHS[data] * LONGER[data])
    plain: dict[str, Any] = {
        "data": {"name": data} | ({"root": str(root)} if root else {}), "model": {"name": "cnn_small"},
        "threat": {"epsilon": 0.1}, "method": method, "seed": seed,
        "train": common.pop("train") | {"epochs": epochs}, **(CACTUS if method == "cactus" else {}),
    }  # fmt: skip
    known = options(method)
    return parse(RunConfig, plain | {k: v for k, v in common.items() if k in known})


def options(method: str) -> set[str]:
    """Names of the parameters that a method takes, beside those that all take."""
    return set(options_of(method, "sabr" if method == "cactus" else None)) | {"learning_rate"}


def trained(folder: Path, config: RunConfig, name: str) -> tuple[Network, float]:
    """The network and the seconds of its training; trained unless it is there."""
    file, note = folder / f"{name}.safetensors", folder / f"{name}.json"
    if not note.exists():
        result = train(config, load(config.data, ("train", "selection")), report=lambda epoch: True)
        save(result.network, file)
        note.write_text(json.dumps({"seconds": result.seconds, "config_hash": config.config_hash}))
    kept = json.loads(note.read_text())
    if kept["config_hash"] != config.config_hash:
        raise SystemExit(f"{note}: of the configuration {kept['config_hash']}, not {config.config_hash}; remove it")
    return load_network(file), float(kept["seconds"])


def measured(network: Network, data: DataConfig, threat: ThreatConfig, asked: argparse.Namespace) -> dict[str, Any]:
    """By level: bytes, both measurements, and those of branch and bound."""
    images, labels = load(data, ("test",)).split("test")
    levels = {level: at_level(network, level, data, threat.domain) for level in LEVELS[asked.data]}
    models = {}
    for level, found in levels.items():
        graph, params, _ = read_onnx(found.file)
        models[level] = LevelModel(graph, params)
    rows: dict[str, Any] = {}
    for level, model in models.items():
        standard, certified = interval_accuracies(model, images, labels, threat)
        rows[level] = {"bytes": levels[level].measures["bytes"], "standard": standard, "ibp": certified}
    settings = VerificationSettings()
    for level, verdicts in cascade(
        models, images, labels, subset(len(labels), asked.samples), threat, settings
    ).items():
        rows[level]["cascade"] = summary(verdicts)
    if asked.branch_samples:
        settings = replace(settings, bound="branch", seconds_per_sample=SECONDS_OF_BRANCH)
        some = subset(len(labels), asked.branch_samples)
        for level, verdicts in cascade(models, images, labels, some, threat, settings).items():
            rows[level]["branch"] = summary(verdicts)
    return rows


def interval_accuracies(
    model: LevelModel, images: torch.Tensor, labels: torch.Tensor, threat: ThreatConfig
) -> tuple[float, float]:
    """Plain and IBP-certified accuracy in float64, roundings not charged."""
    params = {name: tensor.double() for name, tensor in model.params.items()}
    right = proved = 0
    with torch.no_grad():
        for x, y in zip(images.double().split(IBP_BATCH), labels.split(IBP_BATCH), strict=True):
            right += int((forward(model.graph, params, x).argmax(1) == y).sum())
            lower = margins(model.graph, params, ball(x, threat.epsilon, threat.domain), y)
            own = torch.zeros_like(lower, dtype=torch.bool).scatter(1, y[:, None], True)
            proved += int(((lower > 0) | own).all(1).sum())
    return right / len(labels), proved / len(labels)


def cascade(
    models: dict[str, LevelModel], images: torch.Tensor, labels: torch.Tensor, chosen: torch.Tensor,
    threat: ThreatConfig, settings: VerificationSettings,
) -> dict[str, list[SampleVerdict]]:  # fmt: skip
    """Verdicts by level; levels share what they find."""
    found: dict[str, list[SampleVerdict]] = {level: [] for level in models}
    for part in chosen.split(CASCADE_BATCH):
        for level, verdicts in verify_levels(
            models, images[part], labels[part], part.tolist(), threat, settings
        ).items():
            found[level] += verdicts
    return found


def show(results: dict[tuple[str, int], dict[str, Any]], levels: Sequence[str], reference: str) -> None:
    """Markdown tables of accuracies, mean and spread over seeds; differences to a reference, paired by seed."""
    methods = list(dict.fromkeys(method for method, _ in results))
    seeds = {method: sorted(s for m, s in results if m == method) for method in methods}
    for title, value in (
        ("certified by the cascade", lambda row: row["cascade"]["certified_accuracy"]),
        ("certified by IBP", lambda row: row["ibp"]),
        ("standard", lambda row: row["standard"]),
        ("branch and bound", lambda row: row["branch"]["certified_accuracy"] if "branch" in row else None),
    ):
        print(f"\n{title}, %, mean (smallest to largest)\n\n| method | " + " | ".join(f"`{v}`" for v in levels) + " |")
        print("|---" * (len(levels) + 1) + "|")
        for method in methods:
            cells = []
            for level in levels:
                rows = [results[method, seed]["levels"][level] for seed in seeds[method]]
                cells.append(spread([100 * v for row in rows if (v := value(row)) is not None]))
            print(f"| `{method}` | " + " | ".join(cells) + " |")
    for method in methods:
        paired = [s for s in seeds[method] if s in seeds.get(reference, [])]
        if method == reference or not paired:
            continue
        print(f"\n{method} minus {reference}, points, certified by the cascade (paired by seed), and by IBP")
        for level in levels:
            pairs = [(results[method, s]["levels"][level], results[reference, s]["levels"][level]) for s in paired]
            cascades = [
                100 * (a["cascade"]["certified_accuracy"] - b["cascade"]["certified_accuracy"]) for a, b in pairs
            ]
            print(f"  {level}: {spread(cascades)}; {spread([100 * (a['ibp'] - b['ibp']) for a, b in pairs])}")
    for method in methods:
        seconds = [results[method, s]["seconds"] for s in seeds[method]]
        print(f"{method}: {len(seconds)} seeds, {statistics.mean(seconds):.0f} s of training each")


def spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(LEVELS), default="digits")
    parser.add_argument("--root", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--out", type=Path, required=True, help="folder of networks and results")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2000, help="of the test split, for the cascade")
    parser.add_argument("--branch-samples", type=int, default=0, help="of the test split, for branch and bound")
    parser.add_argument("--reference", default="sabr", help="method that the others are compared with")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    results: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in range(asked.seeds):
        for method in asked.methods:
            name = f"{asked.data}-{method}-{seed}"
            config = configuration(asked.data, asked.root, method, seed)
            network, seconds = trained(asked.out, config, name)
            kept = asked.out / f"{name}-{asked.samples}-{asked.branch_samples}.json"
            if not kept.exists():
                kept.write_text(json.dumps(measured(network, config.data, config.threat, asked)))
            results[method, seed] = {"seconds": seconds, "levels": json.loads(kept.read_text())}
            print(f"{name}: {seconds:.0f} s of training", flush=True)
    show(results, LEVELS[asked.data], asked.reference)


if __name__ == "__main__":
    main()
