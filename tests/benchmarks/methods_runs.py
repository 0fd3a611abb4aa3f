"""Which runs the benchmark of methods compares: settings, tuning lists, and epochs that cost the same seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cactus_ray.config import METHODS, RunConfig, options_of, parse
from cactus_ray.data import load
from cactus_ray.options import STAGE_SHARES
from cactus_ray.training.bench import measure

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
        "target_sparsity": 0.95, "weight_bits": 4,
    },
    "digits": {"train": {"batch_size": 32}, "weight_bits": 4},
}  # fmt: skip
"""Of every method that knows the option. Sparsity and bits are those of one level: such methods aim at one each."""
EPOCHS = {"mnist": 12, "digits": 24}
"""Of plain SABR; the others get as many as cost the same seconds."""
TUNING_SHARE = 1 / 3
TUNING_SEED = 1000
REFERENCE = "sabr"

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"cactus_channels": ("cactus", {"channels": 0.7})}
"""Methods with another compression set, under names of their own."""
COMPARED = (*METHODS, *VARIANTS)

_CHEAP = ("learning_rate", "standard_weight", "box_ratio")
_SINGLE = {"strategy": "single", "low": 0.5, "high": 0.97, "member_fraction": 0.25, "refresh_every": 10}


_TRIED = {
    "mnist": [
        (0.004, 0.15, 0.6, {}), (0.004, 0.15, 0.4, {}), (0.004, 0.3, 0.6, {}), (0.004, 0.15, 0.8, {}),
    ],
    "digits": [
        (0.0025, 0.3, 0.6, {}), (0.005, 0.3, 0.6, {}), (0.005, 0.3, 0.8, {}), (0.005, 0.15, 0.6, {"low": 0.25}),
        (0.01, 0.3, 0.6, {"member_fraction": 0.5}), (0.01, 0.15, 0.8, {}),
    ],
}  # fmt: skip
"""Learning rate, standard weight and box ratio, of plain losses and of CACTUS; and what differs in its set."""


def settings(data: str, method: str) -> list[dict[str, Any]]:
    """The list that ``method`` chooses from, in a fixed order; the first is for who does not choose."""
    found = []
    for rate, weight, box, differs in _TRIED[data]:
        setting = {"learning_rate": rate, "standard_weight": weight, "box_ratio": box}
        kind, varied = VARIANTS.get(method, (method, {}))
        if kind == "cactus":
            setting |= {"certified_loss": "sabr", "compression_set": _SINGLE | differs | varied}
        found.append(setting)
    return found


@dataclass(frozen=True, slots=True)
class Plan:
    """What all runs of a benchmark share. ``epochs``: of plain SABR; ``batch_norm``: None for the model's own;
    ``device``: None for the CPU."""

    data: str
    root: Path | None
    epochs: int
    batch_norm: bool | None = None
    train_samples: int | None = None
    device: str | None = None

    @staticmethod
    def of(
        data: str, root: Path | None, epochs: int | None, batch_norm: bool, train_samples: int | None, device: str
    ) -> Plan:  # fmt: skip
        other = None if device == "cpu" else device
        return Plan(data, root, epochs or EPOCHS[data], True if batch_norm else None, train_samples, other)

    @property
    def place(self) -> str:
        """Where networks are trained and steps timed."""
        return self.device or "cpu"

    def record(self) -> dict[str, Any]:
        """What two runs must share to be one benchmark."""
        return _present({f.name: getattr(self, f.name) for f in fields(self) if f.name != "root"})

    def config(self, method: str, setting: dict[str, Any], epochs: int, seed: int) -> RunConfig:
        """The run of a method; options that it does not know are left out."""
        common = COMMON[self.data]
        method = VARIANTS.get(method, (method,))[0]
        known = _known(method)
        wanted = {k: v for k, v in (common | setting).items() if k in known}
        root = None if self.root is None else str(self.root)
        data = {"name": self.data, "root": root, "train_samples": self.train_samples}
        given = {
            "data": _present(data), "model": _present({"name": "cnn_small", "batch_norm": self.batch_norm}),
            "threat": {"epsilon": 0.1}, "method": method, "seed": seed,
            "train": common["train"] | {"epochs": epochs}, **wanted,
        }  # fmt: skip
        return parse(RunConfig, given)


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None}


def _known(method: str) -> set[str]:
    """Names of the parameters that a method takes, beside those that all take."""
    return set(options_of(method, "sabr")) | {"learning_rate"}


def step_seconds(plan: Plan, methods: list[str], tuned: list[str]) -> dict[str, list[float]]:
    """Seconds of the mean step of every setting that a method may take, measured in turns.

    Stages, warm-up and ramp count by their shares of the epochs, as in ``search --dry-run``.

    Settings that differ only in rates and weights cost the same, and are measured once.
    """
    cases: dict[str, RunConfig] = {}
    names: dict[str, list[str]] = {}
    for method in methods:
        chosen = settings(plan.data, method)[: None if method in tuned else 1]
        for setting in chosen:
            passes = {k: v for k, v in setting.items() if k not in _CHEAP}
            name = f"{method} {json.dumps(passes, sort_keys=True)}"
            names.setdefault(method, []).append(name)
            cases.setdefault(name, plan.config(method, setting, max(4, plan.epochs), 0))
    data = load(next(iter(cases.values())).data, ("train", "selection"))
    costs = measure(list(cases.items()), data, repeats=7, whole=True, device=plan.place)
    found = {name: costs.of_training(name).median for name in cases}
    return {method: [found[name] for name in mine] for method, mine in names.items()}


def add_costs(known: dict[str, list[float]], measured: dict[str, list[float]]) -> None:
    """Takes in what was not known, in seconds of the day when the reference was first timed."""
    factor = known[REFERENCE][0] / measured[REFERENCE][0] if REFERENCE in known else 1.0
    for method, seconds in measured.items():
        known.setdefault(method, [factor * s for s in seconds])


def epochs_of(plan: Plan, costs: dict[str, list[float]], method: str, setting: int, share: float = 1.0) -> int:
    """Epochs in which ``method`` takes at most the seconds of ``share`` of SABR's epochs, one per stage at least."""
    mine = costs[method][min(setting, len(costs[method]) - 1)]
    epochs = int(plan.epochs * share * costs[REFERENCE][0] / mine + 0.02)
    return max(epochs, len(STAGE_SHARES.get(method, {})), 1)


__all__ = ["COMPARED", "LEVELS", "METHODS", "REFERENCE", "TUNING_SEED", "TUNING_SHARE", "VARIANTS", "Plan",
           "add_costs", "epochs_of", "settings", "step_seconds"]  # fmt: skip
