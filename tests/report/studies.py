"""Runs as a driver would leave them, written through the store, without training anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cactus_ray.search.objectives import trial_metrics
from cactus_ray.search.sampler import OptunaSampler
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import RunStore

REFERENCE = {"certified_accuracy": 0.0, "bytes": 66_000.0, "standard_accuracy": 0.0}
SIZES = {"dense": 60_000, "int8": 16_000, "prune:gu-l1:0.9": 12_000}
SAMPLES = 100


def small_space(trials: int = 6, mode: str = "offline") -> Space:
    return parse_space(
        {
            "name": "digits",
            "data": {"name": "digits"},
            "model": {"name": "cnn_small"},
            "threat": {"epsilon": 0.1},
            "levels": list(SIZES),
            "train": {"epochs": 3},
            "parameters": {
                "method": {"values": ["cactus", "sabr"]},
                "standard_weight": {"min": 0.1, "max": 0.7},
                "compression_set.strategy": {"values": ["single", "triple"], "when": {"method": ["cactus"]}},
            },
            "objectives": [{"metric": "mean_certified_accuracy"}, {"metric": "certified_accuracy@int8"}],
            "constraints": [{"metric": "standard_accuracy@int8", "min": 0.9}],
            "search": {"trials": trials, "sampler": "random"},
            "wandb": {"mode": mode, "project": "tests"},
        }
    )


def points_of(trial: str, method: str, quality: int) -> list[dict[str, Any]]:
    """A curve; ``quality`` is the number of samples certified when dense. Three samples are unknown."""
    points = []
    for place, (level, size) in enumerate(SIZES.items()):
        certified = quality - 4 * place
        points.append(
            {
                "trial": trial, "level": level, "method": method, "seed": 1, "split": "selection", "samples": SAMPLES,
                "standard_accuracy": 0.95, "certified_accuracy": certified / SAMPLES,
                "n_certified": certified, "n_falsified": SAMPLES - certified - 3, "n_unknown": 3,
                "bytes": size + quality, "ideal_bits": 7 * size, "macs": 400_000,
                "train_seconds": 9.0, "verify_seconds": 0.5, "config_hash": "0123456789abcdef",
            }
        )  # fmt: skip
    return points


def events(
    space: Space, failure: str = "loss is not finite at step 7", stop: str = "dominated"
) -> Iterator[dict[str, Any]]:
    """A whole study. Trial 2 fails after an epoch whose loss is NaN, trial 3 is stopped, all others complete."""
    yield {"event": "study", "schema": 1, "name": space.name, "seed": 0, "reference_point": REFERENCE, "commit": None}
    sampler = OptunaSampler(space)
    for number in range(1, space.search.trials + 1):
        suggestion = sampler.ask()
        config = space.configuration(suggestion.values, number)
        trial = f"t{number:04d}"
        yield {
            "event": "started", "trial": trial, "number": number, "parameters": suggestion.values,
            "config": config.to_dict(), "config_hash": config.config_hash, "seed": config.seed,
        }  # fmt: skip
        for epoch in (1, 2, 3):
            loss = float("nan") if (number, epoch) == (2, 3) else 2.0 / epoch
            metrics = {
                "loss": loss,
                "standard_accuracy": 0.3 * epoch,
                "ibp_certified_accuracy": 0.2 * epoch,
                "seconds": 0.5,
            }
            yield {"event": "epoch", "trial": trial, "epoch": epoch, "epochs": 3, "metrics": metrics}
        if number == 2:
            yield {"event": "failed", "trial": trial, "error": failure, "step": 7}
        elif number == 3:
            yield {"event": "stopped", "trial": trial, "reason": stop}
        else:
            yield from _verified(space, trial, config.method, 60 + 5 * number % 40)
    yield {"event": "finished", "status": "completed", "seconds": 100.0}


def _verified(space: Space, trial: str, method: str, quality: int) -> Iterator[dict[str, Any]]:
    yield {
        "event": "trained", "trial": trial, "epochs": 3, "train_seconds": 9.0, "sha256": "0" * 64,
        "checkpoint": f"checkpoints/{trial}.safetensors",
    }  # fmt: skip
    points = points_of(trial, method, quality)
    rows = [[i, 0, "CERTIFIED", True, 0.1, "ibp", 0.005] for i in range(SAMPLES)]
    levels = {point["level"]: {"samples": rows, "measures": {}, "seconds": 0.5} for point in points}
    ledger = {"attack": 0.9, "ibp": 0.5, "overhead": 0.1}
    yield {"event": "verdicts", "trial": trial, "stage": "cheap", "chunk": "c", "levels": levels, "ledger": ledger}
    yield {
        "event": "completed",
        "trial": trial,
        "points": points,
        "metrics": trial_metrics(points, 9.0, space.front, REFERENCE),
    }


def write_run(run: Path, space: Space, lines: Iterator[dict[str, Any]] | list[Mapping[str, Any]]) -> Path:
    """The folder of a run that holds these events, one second apart."""
    store = RunStore(run)
    (run / "space.yaml").write_text(yaml.safe_dump(space.to_dict(), sort_keys=False))
    for second, event in enumerate(lines):
        store.append({**event, "time": 1_790_000_000.0 + second})
    return run
