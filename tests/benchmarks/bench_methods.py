"""Method x level, over seeds: one network per method and seed, verified at every level on the test split.

    .venv/bin/python tests/benchmarks/bench_methods.py --data mnist --root ../shared/data --out methods \\
        --methods sabr cactus --tune 4 --samples 10000 --branch-samples 500
    .venv/bin/python tests/benchmarks/bench_methods.py --show tests/benchmarks/results/methods_mnist.json

Budget: ``--epochs`` of plain SABR; every other method gets as many epochs as cost the same CPU seconds (steps of every
stage, of the warm-up and of the ramp are timed in turns at the start, the epochs kept), or seconds with ``--device
cuda``. ``cactus_channels`` is CACTUS whose every second member loses channels. ``--tune N``: SABR and either CACTUS
(``--tuned``) each try N settings, a third of the budget each, with a seed of their own; the best mean over the levels
of certified accuracy on the selection split is taken (by the cascade with CROWN, 500 images). All other methods take
SABR's choice. Every level is deployed with or without ``rebn``, whichever has the higher IBP-certified accuracy on the
selection split; without batch norm, and at ``dense``, there is nothing to choose.

Measured on the test split: plain and IBP-certified accuracy on all images (float64), the cascade (attack, IBP, CROWN,
float32 charged) on ``--samples`` fixed images, and on ``--branch-samples`` of these branch and bound, 5 s per image.
Levels of one network share counterexamples. Everything is kept, networks in ``--out`` and figures in ``--results``: a
second run goes on, level by level, where the first ended.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import methods_table
import torch
from level_figures import Sharing, counts, deployed, interval_accuracies
from methods_runs import (
    COMPARED,
    LEVELS,
    METHODS,
    REFERENCE,
    TUNING_SEED,
    TUNING_SHARE,
    VARIANTS,
    Plan,
    add_costs,
    epochs_of,
    settings,
    step_seconds,
)

from cactus_ray.config import RunConfig
from cactus_ray.data import load, subset
from cactus_ray.models.network import Network, save
from cactus_ray.models.network import load as load_network
from cactus_ray.training.loop import train
from cactus_ray.verification.verdict import Verdict, VerificationSettings

TUNING_SAMPLES = 500
SECONDS_OF_BRANCH = 5.0


class Store:
    """The results as one JSON file, written after every step of the work."""

    def __init__(self, path: Path, plan: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[str, Any] = {"plan": plan, "step_seconds": {}, "tuning": {}, "networks": {}}
        if path.exists():
            self.found = json.loads(path.read_text())
            if self.found["plan"] != plan:
                raise SystemExit(f"{path}: of the plan {self.found['plan']}, not {plan}; remove it or name another")

    def write(self) -> None:
        """One line per network and tuning run, so that a difference can be read."""
        rows = {
            "tuning": {k: [json.dumps(row) for row in rows] for k, rows in self.found["tuning"].items()},
            "networks": {k: json.dumps(row) for k, row in self.found["networks"].items()},
        }
        tuning = ",\n".join(f'"{k}": [\n' + ",\n".join(lines) + "\n]" for k, lines in rows["tuning"].items())
        networks = ",\n".join(f'"{k}": {line}' for k, line in rows["networks"].items())
        head = ",\n".join(f'"{k}": {json.dumps(self.found[k])}' for k in ("plan", "step_seconds"))
        text = f'{{{head},\n"tuning": {{{tuning}}},\n"networks": {{\n{networks}\n}}}}\n'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text(text)
        partial.replace(self.path)


def trained(folder: Path, config: RunConfig, name: str, device: str) -> tuple[Network, dict[str, float]]:
    """The network, and the seconds of its training by the clock and of the processor; trained unless it is there."""
    file, note = folder / f"{name}.safetensors", folder / f"{name}.json"
    if not note.exists():
        print(f"{name}: training, {config.train.epochs} epochs", flush=True)
        begun = time.process_time()
        data = load(config.data, ("train", "selection"))
        result = train(config, data, report=lambda epoch: True, device=device)
        spent = {"seconds": round(result.seconds, 1), "cpu_seconds": round(time.process_time() - begun, 1)}
        save(result.network, file)
        note.write_text(json.dumps(spent | {"config_hash": config.config_hash}))
    kept = json.loads(note.read_text())
    if kept.pop("config_hash") != config.config_hash:
        raise SystemExit(f"{note}: not of the configuration {config.config_hash}; remove it")
    return load_network(file), kept


def tuned(store: Store, plan: Plan, method: str, count: int, folder: Path) -> dict[str, Any]:
    """The setting with the best score among the first ``count``; the one that comes first where two are equal."""
    rows = store.found["tuning"].setdefault(method, [])
    for index, setting in enumerate(settings(plan.data, method)[:count]):
        epochs = epochs_of(plan, store.found["step_seconds"], method, index, TUNING_SHARE)
        config = plan.config(method, setting, epochs, TUNING_SEED)
        if index < len(rows):
            if rows[index]["config_hash"] != config.config_hash:
                raise SystemExit(f"{store.path}: setting {index} of {method} is of another configuration; remove it")
            continue
        network, spent = trained(folder, config, f"{plan.data}-{method}-tune{index}", plan.place)
        by_level = selection_scores(network, config, LEVELS[plan.data])
        score = sum(by_level.values()) / len(by_level)
        row = {"setting": setting, "epochs": epochs, **spent, "config_hash": config.config_hash, "score": score}
        rows.append(row | {"levels": by_level})
        store.write()
        print(f"{method}, setting {index}: {100 * score:.2f} in {spent['seconds']:.0f} s, {setting}", flush=True)
    best = max(range(count), key=lambda i: (rows[i]["score"], -i))
    return {"setting": best, "chosen": rows[best]["setting"]}


def selection_scores(network: Network, config: RunConfig, levels: Sequence[str]) -> dict[str, float]:
    """Share of some selection images that the cascade certifies, by level."""
    images, labels = load(config.data, ("selection",)).split("selection")
    chosen = subset(len(labels), TUNING_SAMPLES).tolist()
    sharing = Sharing(images, labels, {}, {})
    scores = {}
    for level in levels:
        candidate = deployed(network, level, config.data, config.threat)
        verdicts = sharing.verdicts(candidate, chosen, config.threat, VerificationSettings())
        scores[level] = sum(v.verdict is Verdict.CERTIFIED for v in verdicts) / len(verdicts)
    return scores


def is_complete(row: dict[str, Any] | None, samples: int, some: int) -> bool:
    """Whether a level was verified on so many samples, and on so many with branch and bound."""
    return bool(row) and row["cascade"][0] == samples and (not some or row.get("branch", [0])[0] == some)


def measure_network(store: Store, name: str, network: Network, config: RunConfig, samples: int, some: int) -> None:
    """Every level of a network that is not yet in its row of the store, on the test split."""
    images, labels = load(config.data, ("test",)).split("test")
    everyone, few = subset(len(labels), samples).tolist(), set(subset(len(labels), some).tolist()) if some else set()
    sharing = Sharing(images, labels, {}, {})
    levels = store.found["networks"][name]["levels"]
    for level in LEVELS[config.data.name]:
        if is_complete(levels.get(level), len(everyone), len(few)):
            continue
        begun = time.process_time()
        candidate = deployed(network, level, config.data, config.threat)
        standard, certified = interval_accuracies(candidate, images, labels, config.threat)
        row = {"as": candidate.text, "bytes": candidate.bytes, "standard": standard, "ibp": certified}
        verdicts = sharing.verdicts(candidate, everyone, config.threat, VerificationSettings())
        row["cascade"] = counts(verdicts)
        if few:
            mine = {v.index: v for v in verdicts if v.index in few}
            left = [index for index, v in mine.items() if v.verdict is Verdict.UNKNOWN]
            how = VerificationSettings(bound="branch", seconds_per_sample=SECONDS_OF_BRANCH)
            mine |= {v.index: v for v in sharing.verdicts(candidate, left, config.threat, how)}
            row["branch"] = counts(list(mine.values()))
        levels[level] = row
        store.write()
        print(f"{name} {candidate.text}: {row}, {time.process_time() - begun:.0f} s", flush=True)


def run(asked: argparse.Namespace, store: Store, plan: Plan) -> None:
    """Costs, tuning, networks, measurements: what is not there yet."""
    tunes = [m for m in asked.tuned if m in (REFERENCE, *asked.methods)] if asked.tune else []
    missing = [m for m in dict.fromkeys([REFERENCE, *asked.methods]) if m not in store.found["step_seconds"]]
    if missing:
        print(f"timing steps of {', '.join(missing)}", flush=True)
        measured = step_seconds(plan, list(dict.fromkeys([REFERENCE, *missing])), asked.tuned)
        add_costs(store.found["step_seconds"], measured)
        store.write()
    chosen: dict[str, dict[str, Any]] = {}
    for method in tunes:
        chosen[method] = tuned(store, plan, method, asked.tune, asked.out)
    for seed in range(asked.seeds):
        for method in asked.methods:
            default = chosen.get(REFERENCE) if method in METHODS and method != "cactus" else None
            pick = chosen.get(method) or default or {"setting": 0, "chosen": settings(plan.data, method)[0]}
            epochs = epochs_of(plan, store.found["step_seconds"], method, pick["setting"])
            config = plan.config(method, pick["chosen"], epochs, seed)
            name = f"{method}-{seed}"
            known = store.found["networks"].get(name, {"levels": {}})
            if known.get("config_hash", config.config_hash) != config.config_hash:
                raise SystemExit(f"{store.path}: {name} is of another configuration; remove it")
            levels = [known["levels"].get(level) for level in LEVELS[plan.data]]
            if all(is_complete(row, asked.samples, asked.branch_samples) for row in levels):
                continue
            network, spent = trained(asked.out, config, f"{plan.data}-{name}", plan.place)
            row = {
                "method": method, "seed": seed, "setting": pick["setting"], "epochs": epochs, **spent,
                "config_hash": config.config_hash, "config": config.to_dict() | {"data": {"name": plan.data}},
            }  # fmt: skip
            store.found["networks"][name] = row | {"levels": known["levels"]}
            measure_network(store, name, network, config, asked.samples, asked.branch_samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(LEVELS), default="digits")
    parser.add_argument("--root", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--out", type=Path, help="folder of networks")
    parser.add_argument("--results", type=Path, help="file of figures; default: OUT/methods_DATA.json")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=COMPARED)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="of plain SABR")
    parser.add_argument("--tune", type=int, default=0, metavar="N", help="settings that each tuned method tries")
    parser.add_argument("--tuned", nargs="+", default=[REFERENCE, "cactus", *VARIANTS], choices=COMPARED)
    parser.add_argument("--samples", type=int, default=2000, help="of the test split, for the cascade")
    parser.add_argument("--branch-samples", type=int, default=0, help="of these, for branch and bound")
    parser.add_argument("--batch-norm", action="store_true", help="cnn_small with batch norm")
    parser.add_argument("--train-samples", type=int, help="train on a fixed subset of this size")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where networks are trained and timed")
    parser.add_argument("--show", type=Path, help="only print the tables of such a file")
    asked = parser.parse_args()
    if asked.show:
        methods_table.show(json.loads(asked.show.read_text()), REFERENCE)
        return
    if asked.out is None:
        parser.error("--out FOLDER is missing")
    asked.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    plan = Plan.of(asked.data, asked.root, asked.epochs, asked.batch_norm, asked.train_samples, asked.device)
    store = Store(asked.results or asked.out / f"methods_{asked.data}.json", plan.record())
    run(asked, store, plan)
    methods_table.show(store.found, REFERENCE)


if __name__ == "__main__":
    main()
