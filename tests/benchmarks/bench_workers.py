"""One and two Ray Train workers: seconds of an epoch, accuracy, and whether the workers agree.

    .venv/bin/python tests/benchmarks/bench_workers.py --root ../shared/data --results workers.json

Trains CACTUS (pruned member, and one whose weights are perturbed; cnn_small with batch norm, MNIST, a subset) through
Ray Train with gloo, one thread per worker, the same batch split over the workers. Every worker hashes (SHA-256) the
masks and the weight perturbations of every step, and the whole state after every epoch: weights, batch-norm statistics
and the optimiser's moments. Seconds are the median over all epochs but the first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Params
from cactus_ray.cluster.train_workers import TorchWorkers
from cactus_ray.config import RunConfig, parse
from cactus_ray.data import load
from cactus_ray.training import methods, perturb
from cactus_ray.training.evaluate import level_scores
from cactus_ray.training.loop import EpochReport, train
from cactus_ray.training.state import unpack_state
from cactus_ray.training.step import Step
from cactus_ray.training.workers import Alone

LEVELS = ("dense", "prune:gu-l1:0.95", "int4")


def configuration(asked: argparse.Namespace) -> dict[str, Any]:
    return {
        "data": {"name": "mnist", "root": str(asked.root.resolve()), "train_samples": asked.train_samples},
        "model": {"name": "cnn_small", "batch_norm": True}, "threat": {"epsilon": 0.1}, "method": "cactus",
        "train": {"epochs": asked.epochs, "batch_size": 128, "ramp": 0.3, "regularizer": 0.5},
        "learning_rate": 0.002, "standard_weight": 0.3, "certified_loss": "sabr", "box_ratio": 0.6, "awp_radius": 0.5,
        "compression_set": {"strategy": "single", "low": 0.5, "high": 0.97, "refresh_every": 10},
    }  # fmt: skip


class Recorder:
    """Hashes what the steps of one worker use, without changing it."""

    def __init__(self) -> None:
        self.digests = {"masks": hashlib.sha256(), "perturbations": hashlib.sha256()}
        self.counts = dict.fromkeys(self.digests, 0)
        self.states: list[dict[str, str]] = []

    def install(self) -> None:
        """Around CACTUS and ``perturb.apply``, in this process."""
        cactus, apply = methods.METHODS["cactus"], perturb.apply

        def with_masks(step: Step) -> Iterator[Tensor]:
            yield from cactus(step)
            for mask in step.memory["masks"]:
                self._see("masks", mask)

        def with_perturbations(params: Params, deltas: Params) -> Params:
            self._see("perturbations", deltas)
            return apply(params, deltas)

        methods.METHODS["cactus"] = with_masks
        perturb.apply = with_perturbations

    def _see(self, what: str, tensors: Params) -> None:
        _feed(self.digests[what], tensors)
        self.counts[what] += 1

    def report(self, epoch: EpochReport) -> bool:
        """After every epoch; what else the state holds (seconds of the history) is each worker's own."""
        state = unpack_state(epoch.save())
        running = {k: v for k, v in state.params.items() if ".running_" in k}
        moments = {f"{name}.{key}": v for name, values in state.moments.items() for key, v in values.items()}
        parts = {"weights": state.params, "batch-norm statistics": running, "moments": moments}
        self.states.append({what: _feed(hashlib.sha256(), tensors).hexdigest() for what, tensors in parts.items()})
        return True

    def found(self) -> dict[str, Any]:
        return {k: f"{v.hexdigest()} of {self.counts[k]}" for k, v in self.digests.items()} | {"states": self.states}


def _feed(digest: Any, tensors: Params) -> Any:
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest


def worker(given: dict[str, Any]) -> None:
    """The loop in one Ray Train worker; leaves what it found as JSON in the folder."""
    import ray.train

    torch.set_num_threads(1)
    workers, recorder = TorchWorkers(), Recorder()
    config = parse(RunConfig, given["run"])
    recorder.install()

    def report(epoch: EpochReport) -> bool:
        ray.train.report(dict(epoch.metrics))
        return recorder.report(epoch)

    result = train(config, load(config.data, ("train", "selection")), report=report, workers=workers)
    network, test = result.network, load(config.data, ("train", "test")).split("test")
    accuracies = {
        level: level_scores(network.graph, network.params, level, test, config.threat, workers=Alone())[:2]
        for level in LEVELS
    }
    seconds = [metrics["seconds"] for metrics in result.history]
    found = recorder.found() | {"seconds": seconds, "accuracies": accuracies}
    Path(given["folder"], f"{workers.size}-{workers.rank}.json").write_text(json.dumps(found))


def trained(run: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What every one of ``count`` workers found."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    with tempfile.TemporaryDirectory() as folder:
        TorchTrainer(
            worker,
            train_loop_config={"run": run, "folder": folder},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(num_workers=count, resources_per_worker={"CPU": 1.0}),
            run_config=ray.train.RunConfig(name=f"workers-{count}", storage_path=folder),
        ).fit()
        return [json.loads(Path(folder, f"{count}-{rank}.json").read_text()) for rank in range(count)]


def show(found: dict[str, Any]) -> None:
    print(f"\n{found['plan']}; accuracies on the test split: standard / IBP-certified, %\n")
    print("| workers | s per epoch: median (smallest to largest) | " + " | ".join(f"`{v}`" for v in LEVELS) + " |")
    print("|---" * (2 + len(LEVELS)) + "|")
    medians = {}
    for count, ranks in found["workers"].items():
        seconds = [max(s) for s in zip(*(r["seconds"] for r in ranks), strict=True)][1:]
        medians[count] = statistics.median(seconds)
        cells = [" / ".join(f"{100 * a:.2f}" for a in ranks[0]["accuracies"][level]) for level in LEVELS]
        text = f"{medians[count]:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        print(f"| {count} | {text} | " + " | ".join(cells) + " |")
    if {"1", "2"} <= medians.keys():
        print(f"\nTwo workers take {medians['2'] / medians['1']:.2f} of the time of one.")
    for count, ranks in found["workers"].items():
        if len(ranks) > 1:
            print(f"{count} workers, equal hashes: " + ", ".join(f"{k}: {v}" for k, v in agreement(ranks).items()))


def agreement(ranks: list[dict[str, Any]]) -> dict[str, str]:
    """By kind of tensor: whether all workers have the same, and of how many steps or epochs."""
    found = {k: f"{_same(r[k] for r in ranks)} ({ranks[0][k].split()[-1]})" for k in ("masks", "perturbations")}
    for kind in ranks[0]["states"][0]:
        epochs = [_same(r["states"][i][kind] for r in ranks) for i in range(len(ranks[0]["states"]))]
        found[kind] = f"{'yes' if set(epochs) == {'yes'} else 'NO'} ({len(epochs)} epochs)"
    return found


def _same(values: Iterable[str]) -> str:
    return "yes" if len(set(values)) == 1 else "NO"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--results", type=Path, help="file of figures")
    parser.add_argument("--train-samples", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--show", type=Path, help="only print the table of such a file")
    asked = parser.parse_args()
    if asked.show:
        show(json.loads(asked.show.read_text()))
        return
    if asked.root is None or asked.results is None:
        parser.error("--root FOLDER and --results FILE are needed")
    import ray

    plan = {"epochs": asked.epochs, "train_samples": asked.train_samples}
    found: dict[str, Any] = {"plan": plan, "workers": {}}
    if asked.results.exists():
        found = json.loads(asked.results.read_text())
        if found["plan"] != plan:
            raise SystemExit(f"{asked.results}: of {found['plan']}, not {plan}; remove it or name another")
    ray.init(address="local", num_cpus=max(asked.workers) + 1, include_dashboard=False, log_to_driver=False)
    try:
        for count in asked.workers:
            if str(count) not in found["workers"]:
                found["workers"][str(count)] = trained(configuration(asked), count)
                asked.results.write_text(json.dumps(found) + "\n")
    finally:
        ray.shutdown()
    show(found)


if __name__ == "__main__":
    main()
