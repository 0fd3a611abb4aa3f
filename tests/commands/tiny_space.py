"""A space of one small study, for tests of how studies begin."""

from typing import Any

SPACE: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits", "train_samples": 128},
    "model": {"name": "mlp", "hidden": [8]},
    "threat": {"epsilon": 0.02},
    "levels": ["dense"],
    "train": {"epochs": 1, "batch_size": 64},
    "parameters": {"method": {"value": "cactus"}, "learning_rate": {"min": 0.001, "max": 0.01}},
    "search": {"trials": 2, "concurrency": 1},
    "verification": {"samples": 40},
}
