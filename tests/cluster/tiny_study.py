"""A study of seconds on digits."""

from pathlib import Path
from typing import Any

from cactus_ray.cluster.driver import DriverOptions, run_study
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import Records, RunStore, read_records
from cactus_ray.search.study import Study

SPACE: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits", "train_samples": 256},
    "model": {"name": "mlp", "hidden": [16]},
    "threat": {"epsilon": 0.02},
    "levels": ["dense", "int8"],
    "train": {"epochs": 2, "batch_size": 64},
    "parameters": {"method": {"value": "cactus"}, "learning_rate": {"min": 0.001, "max": 0.01}},
    "search": {"trials": 1, "concurrency": 1},
    "verification": {"samples": 40, "attack_steps": 5},
    "resources": {"cheap_samples": 10},
}
REFERENCE = {"certified_accuracy": 0.0, "bytes": 1e5, "standard_accuracy": 0.0}


def space(**changes: Any) -> Space:
    resources = {**SPACE["resources"], **changes.pop("resources", {})}
    return parse_space({**SPACE, "resources": resources, **changes}, "tiny.yaml")


def run(tiny: Space, folder: Path) -> Records:
    study = Study(tiny, RunStore(folder), Records(), list(range(40)))
    study.begin({"name": "tiny", "seed": 0}, REFERENCE)
    run_study(study, DriverOptions(cpus=4))
    return read_records(folder)
