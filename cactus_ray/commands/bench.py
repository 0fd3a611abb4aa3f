"""``cactus-ray bench train``: what the steps of the training methods cost on this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import rich.box
import torch
from rich.console import Console
from rich.table import Table

from cactus_ray.commands.single import DEVICES
from cactus_ray.config import METHODS, RunConfig, options_of, parse
from cactus_ray.data import DataSet
from cactus_ray.errors import ConfigError
from cactus_ray.models import create
from cactus_ray.options import METHOD_OPTIONS
from cactus_ray.training.bench import Costs, Spread, StepCost, measure
from cactus_ray.training.losses.tail import possible_tails

CLASSES = 10
NAMES = tuple(str(label) for label in range(CLASSES))
CERTIFIED_LOSS = "sabr"  # of the methods that take one
REFERENCE = "sabr"  # the method that the others' steps are compared with
_QUARTER: dict[str, Any] = {"member_fraction": 0.25, "refresh_every": 10}
"""Of a strategy named /4: members see a quarter of the batch, under a mask that is kept for ten steps."""


def _steps(strategy: str, awp: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    return {"compression_set": {"strategy": strategy, **values}, **({} if awp is None else {"awp_radius": 0.5, **awp})}


STRATEGIES: dict[str, dict[str, Any]] = {
    "single": _steps("single"),
    "single/4": _steps("single", **_QUARTER),
    "triple": _steps("triple"),
    "triple/4": _steps("triple", **_QUARTER),
    "random": _steps("random"),
    "fixed": _steps("fixed"),
    "dense": _steps("dense"),
    "progressive": _steps("progressive"),
    "adaptive": _steps("adaptive"),
    "awp": _steps("none", {}),
    "awp-noise": _steps("none", {"awp_kind": "noise"}),
    "awp-rounding": _steps("none", {"awp_kind": "rounding"}),
    "awp-3": _steps("none", {"awp_steps": 3}),
    "single+awp": _steps("single", {}),
    "single+awp-pruned": _steps("single", {"awp_member": "pruned"}),
}
"""What CACTUS is timed with, by name. awp-3: three ascent steps; awp-pruned: the pruned copy is perturbed."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What is measured. ``image``: text such as 1x28x28; ``steps_of_attack``: text such as 1,8; ``strategies``: of
    CACTUS, names in ``STRATEGIES`` separated by commas (None: all); ``batch_norm``: None for the model's own."""

    model: str
    width: float
    batch_norm: bool | None
    image: str
    batch_size: int
    methods: str | None
    strategies: str | None
    steps_of_attack: str
    repeats: int
    threads: int
    device: str
    compiled: bool = False


def bench_train(console: Console, options: BenchOptions, *, as_json: bool) -> None:
    """Time every method's step beside the plain forward, in one process and in turns, and print the table.

    Random images: no data set is needed. Raises ConfigError for options that do not fit.
    """
    shape = _shape(options.image)
    if options.device not in DEVICES:
        raise ConfigError("--device", options.device, " or ".join(DEVICES))
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", options.device, "cpu: torch sees no CUDA device")
    torch.set_num_threads(options.threads)
    cases = _cases(options, shape)
    with console.status("measuring") as status:
        found = measure(
            cases, _images(shape, options.batch_size), repeats=options.repeats, device=options.device,
            progress=status.update if not as_json else lambda text: None,
        )  # fmt: skip
    if as_json:
        settings = asdict(options) | {"torch": torch.__version__}
        steps = [asdict(step) | _derived(step, found) for step in found.steps]
        console.print_json(json.dumps({"settings": settings, **asdict(found), "steps": steps}))
    else:
        _print(console, found, options)


def _cases(options: BenchOptions, shape: tuple[int, ...]) -> list[tuple[str, RunConfig]]:
    counts = _whole_numbers("--attack-steps", options.steps_of_attack)
    wanted = options.methods.split(",") if options.methods else list(METHODS)
    if options.strategies is not None and "cactus" not in wanted:
        raise ConfigError("--strategies", options.strategies, "nothing without cactus among --methods")
    cases: list[tuple[str, RunConfig]] = []
    for method in wanted:
        if method not in METHODS:
            raise ConfigError("--methods", method, f"some of {', '.join(METHODS)}, separated by commas")
        variants = _strategies(options.strategies) if method == "cactus" else {"": {}}
        for variant, values in variants.items():
            attacked = "attack_steps" in options_of(method, CERTIFIED_LOSS if method in METHOD_OPTIONS else None)
            for count in counts if attacked else (None,):
                name = " ".join([method, variant] if variant else [method])
                cases.append((name, _config(options, shape, method, values, count)))
    return cases


def _strategies(text: str | None) -> dict[str, dict[str, Any]]:
    names = list(STRATEGIES) if text is None else text.split(",")
    for name in names:
        if name not in STRATEGIES:
            raise ConfigError("--strategies", name, f"some of {', '.join(STRATEGIES)}, separated by commas")
    return {name: STRATEGIES[name] for name in names}


def _config(
    options: BenchOptions, shape: tuple[int, ...], method: str, values: dict[str, Any], attack_steps: int | None
) -> RunConfig:
    norm = {} if options.batch_norm is None else {"batch_norm": options.batch_norm}
    plain = {
        # only its normalisation is used: no file is read
        "data": {"name": "image_folder" if shape[0] == 3 else "mnist", "root": "."},
        "model": {"name": options.model, "width": options.width, **norm},
        "threat": {"epsilon": 0.1 if shape[0] == 1 else 8 / 255},
        "train": {"batch_size": options.batch_size, "compile": "step" if options.compiled else "none"},
        "method": method,
        **({"certified_loss": CERTIFIED_LOSS} if method in METHOD_OPTIONS else {}),
        **({} if attack_steps is None else {"attack_steps": attack_steps}),
        **values,
    }
    config = parse(RunConfig, plain)
    if config.tail_layers is None:
        return config
    network = create(config, shape, CLASSES, NAMES)
    possible = possible_tails(network.graph)
    return parse(RunConfig, plain | {"tail_layers": min((n for n in possible if n > 1), default=1)})


def _images(shape: tuple[int, ...], batch_size: int) -> DataSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((batch_size, *shape), generator=generator)
    labels = torch.randint(CLASSES, (batch_size,), generator=generator)
    splits = ("train", "selection")
    return DataSet("random", NAMES, dict.fromkeys(splits, images), dict.fromkeys(splits, labels), {})


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise ConfigError("--image", text, "channels, height and width, such as 1x28x28")
    channels, height, width = (int(part) for part in text.split("x"))
    if channels not in (1, 3):
        raise ConfigError("--image", text, "1 or 3 channels")
    return channels, height, width


def _whole_numbers(option: str, text: str) -> Sequence[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ConfigError(option, text, "whole numbers of at least 1, separated by commas, such as 1,8")
    return [int(part) for part in text.split(",")]


def _over_reference(step: StepCost, found: Costs) -> Spread | None:
    """How many steps of SABR with as many attack steps one takes; None without that, and for SABR's own."""
    beside = [other for other in found.steps if other.name == REFERENCE and other.attack_steps == step.attack_steps]
    return step.over(beside[0]) if beside and step.name != REFERENCE else None


def _derived(step: StepCost, found: Costs) -> dict[str, Any]:
    ratio = _over_reference(step, found)
    return {"seconds": asdict(step.seconds), f"over_{REFERENCE}": None if ratio is None else asdict(ratio)}


def _print(console: Console, found: Costs, options: BenchOptions) -> None:
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for heading in ("step", "k", "ms", "F", "from-to", "ideal", "eff.", f"x {REFERENCE}", "MB"):
        table.add_column(heading, justify="left" if heading == "step" else "right", no_wrap=True)
    plain = found.forward_seconds
    spread = f"{plain.low / plain.median:.1f}-{plain.high / plain.median:.1f}"
    table.add_row("plain forward", "", _milliseconds(plain), "1", spread, "1", "", "", "")
    for step in found.steps:
        times = step.forwards
        ideal, efficiency, ratio = step.ideal, step.efficiency, _over_reference(step, found)
        table.add_row(
            step.name, "" if step.attack_steps is None else str(step.attack_steps), _milliseconds(step.seconds),
            f"{times.median:.1f}", f"{times.low:.0f}-{times.high:.0f}", "" if ideal is None else f"{ideal:.1f}",
            "" if efficiency is None else f"{efficiency:.2f}", "" if ratio is None else f"{ratio.median:.2f}",
            "" if step.peak_bytes is None else f"{step.peak_bytes / 1e6:.0f}",
        )  # fmt: skip
    console.print(table)
    norm = {None: "", True: ", batch norm", False: ", no batch norm"}[options.batch_norm]
    console.print(
        f"{options.model} (width {options.width:g}{norm}), batch {options.batch_size} of {options.image},"
        f" {options.device}, {options.threads} threads{', compiled passes' if options.compiled else ''}, torch"
        f" {torch.__version__}. F: plain forward, as written, {found.layout};"
        f" medians of {options.repeats} turns; k: attack steps; ideal: passes counted in F; eff. = ideal / F;"
        f" x {REFERENCE}: steps of it with the same k, turn by turn, median; MB: peak of live tensors;"
        " /4: members see a quarter of the batch, under masks that are kept for 10 steps.",
        highlight=False,
    )


def _milliseconds(spread: Spread) -> str:
    return f"{1e3 * spread.median:.4g}"
