"""A run between two steps: where it starts, how it is saved, what it has become."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.config import RunConfig
from cactus_ray.data import DataSet, calibration
from cactus_ray.errors import ConfigError, UserError
from cactus_ray.models import untrained
from cactus_ray.models.network import Network
from cactus_ray.training.average import remeasured
from cactus_ray.training.compiled import Passes, passes_of
from cactus_ray.training.evaluate import evenly_spaced
from cactus_ray.training.init import ibp_initialization
from cactus_ray.training.losses.tail import tail_of
from cactus_ray.training.methods import METHODS, STAGES
from cactus_ray.training.precision import refuse_on_cpu
from cactus_ray.training.stages import WHOLE, Span, Stage, begin, prepared, spans
from cactus_ray.training.state import Moments, State, generator_for, pack_state, unpack_state
from cactus_ray.training.workers import Workers

FEWEST_NORMALISED = 2
"""Images without which the statistics of a batch say nothing: the variance of one is 0."""


@dataclass(slots=True)
class Run:
    """A run between two steps; the only thing in training that changes.

    ``images`` and ``labels`` lie on ``device``, or on the host where the device has no room for them.
    """

    config: RunConfig
    graph: Graph
    params: Params
    optimizer: torch.optim.Optimizer
    workers: Workers
    class_names: tuple[str, ...]
    images: Tensor
    labels: Tensor
    selection: tuple[Tensor, Tensor]
    sites: dict[str, int]  # values per sample and channel that each batch norm sees
    device: torch.device
    calibration: Tensor  # images on which the batch-norm statistics of averaged weights are measured
    stages: tuple[Stage, ...]
    spans: tuple[Span, ...]  # epochs of the stages
    number: int  # of the stage in which the last epoch was
    auxiliary: Params  # the method's own tensors
    passes: Passes
    frozen: frozenset[str] = frozenset()  # tensors that the user's own network says not to train
    average: Params = field(default_factory=dict)
    averages: int = 0  # networks in the average
    epoch: int = 0
    best: Params | None = None
    best_score: tuple[float, float] | None = None
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def stage(self) -> Stage:
        return self.stages[self.number]

    @property
    def in_last_stage(self) -> bool:
        return self.number == len(self.stages) - 1

    @property
    def batch_size(self) -> int:
        """Images per step over all workers: static, so the rest of an epoch that fills no batch is left out."""
        size = min(self.config.train.batch_size, len(self.labels))
        return size - size % self.workers.size

    @property
    def steps_per_epoch(self) -> int:
        share = 1.0 if self.config.train.epoch_fraction is None else self.config.train.epoch_fraction
        return max(int(share * len(self.labels) + 1e-9) // self.batch_size, 1)

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of some indices (where ``images`` are), on the device."""
        images, labels = self.images[chosen], self.labels[chosen]
        if images.device == self.device:
            return images, labels
        images, labels = images.pin_memory(), labels.pin_memory()
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def kept(self) -> Params:
        """The network's tensors that would be deployed now: of the averaged leaves as soon as there are any."""
        params = {k: self.average.get(k, v) for k, v in self.params.items()}
        auxiliary = {k: self.average.get(k, v) for k, v in self.auxiliary.items()}
        with torch.no_grad():
            found = self.stage.network(self.config, self.graph, params, auxiliary)
        return remeasured(self.graph, found, self.calibration) if self.averages else found

    def network(self) -> Params:
        """The network's tensors in training, differentiable in the leaves."""
        return self.stage.network(self.config, self.graph, self.params, self.auxiliary)

    def leaves(self) -> Params:
        """What the optimiser of this stage moves, by name.

        Frozen tensors have gradients, which members and masks may read, and are none of these.
        """
        return {k: v for k, v in (self.params | self.auxiliary).items() if v.requires_grad and k not in self.frozen}

    def clear_gradients(self) -> None:
        """Before a step: of what is trained, and of what is frozen."""
        for tensor in (*self.params.values(), *self.auxiliary.values()):
            tensor.grad = None

    def enter_next_stage(self) -> None:
        """Its tensors from those of the stage before, and a fresh optimiser over its leaves."""
        self.number += 1
        self.params, self.auxiliary = begin(self.stage, self.config, self.graph, self.params, self.auxiliary)
        self.optimizer = _optimizer(self.config, self.leaves(), self.frozen)


def start(
    config: RunConfig,
    data: DataSet,
    state: bytes | None,
    init: Network | None,
    workers: Workers,
    trust_code: bool,
    device: str,
) -> Run:
    """A run before its first step, or where ``state`` left it. Arguments and errors are those of ``loop.train``."""
    images, labels = data.split("train")
    if config.train.batch_size % workers.size or len(labels) < workers.size:
        raise ConfigError("train.batch_size", config.train.batch_size, f"a multiple of the {workers.size} workers")
    if state is not None:
        saved = unpack_state(state)
        if saved.config_hash != config.config_hash:
            raise UserError(
                f"training state: written by the run {saved.config_hash}; expected one of {config.config_hash}, "
                "the same configuration in everything"
            )
        graph, params, frozen = saved.graph, saved.params, saved.frozen
    else:
        saved = None
        graph, params, frozen = _first_weights(config, data, init, trust_code)
        if config.model.factory is not None:
            _check_agreement(config.model.factory, graph, params, frozen, workers, device)
    stages = STAGES.get(config.method, WHOLE)
    number = 0 if saved is None else _number_of(stages, saved.stage)
    check_trainable(config, graph, min(config.train.batch_size, len(labels)) // workers.size, frozen)
    params, auxiliary = _on_device(params, device), {} if saved is None else _on_device(saved.auxiliary, device)
    if saved is None:
        params, auxiliary = begin(stages[0], config, graph, params, auxiliary)
    else:
        params, auxiliary = (prepared(stages[number], graph, tensors) for tensors in (params, auxiliary))
    shapes = graph.shapes(params)
    chosen = evenly_spaced(len(data.split("selection")[1]), config.train.proxy_samples)
    selection = tuple(t[chosen].to(device) for t in data.split("selection"))
    place = next(iter(params.values())).device
    refuse_on_cpu(config.train, place)
    home = place if _fits(images, place) else images.device
    run = Run(
        config, graph, params, _optimizer(config, params | auxiliary, frozen), workers, data.class_names,
        images.to(home), labels.to(home), (selection[0], selection[1]),
        {n.name: math.prod(shapes[n.name][1:]) for n in graph.nodes if n.op == "batch_norm"},
        place, calibration(data)[0].to(place) if config.train.average else images[:0].to(place),
        stages, spans(config.stage_shares, config.train.epochs), number, auxiliary,
        passes_of(config.train, place), frozen,
    )  # fmt: skip
    if saved is not None:
        run.epoch, run.best_score, run.history = saved.epoch, saved.best_score, saved.history
        run.best = None if saved.best is None else _on_device(saved.best, device)
        run.average, run.averages = _on_device(saved.average, device), saved.averages
        _restore_moments(run, saved.moments)
    return run


def check_trainable(config: RunConfig, graph: Graph, images: int, frozen: frozenset[str] = frozenset()) -> None:
    """Raise UserError, before the first step, for what cannot work on ``graph`` with so many images of a batch.

    ``frozen``: names of tensors that must stay as they are.
    """
    _check_frozen(config, frozen)
    if config.tail_layers is not None:
        tail_of(graph, config.tail_layers)
    padding, side = config.train.crop_padding, min(graph.input_shape[1:], default=None)
    if padding is not None and side is not None and padding >= side:
        raise ConfigError("train.crop_padding", padding, f"less than the {side} pixels of a side, or crops are empty")
    if all(node.op != "batch_norm" for node in graph.nodes):
        return
    few = f"at least {FEWEST_NORMALISED} images a step and worker, for batch norm has no use for fewer"
    if images < FEWEST_NORMALISED:
        raise ConfigError("train.batch_size", config.train.batch_size, few)
    chosen = config.compression_set
    if chosen is not None and (seen := math.ceil(chosen.member_fraction * images)) < FEWEST_NORMALISED:
        raise ConfigError("compression_set.member_fraction", chosen.member_fraction, f"{few}; members see {seen}")


def _number_of(stages: tuple[Stage, ...], name: str) -> int:
    names = [stage.name for stage in stages]
    if name not in names:
        raise UserError(f"training state: saved in the stage {name!r}; expected one of {', '.join(map(repr, names))}")
    return names.index(name)


def _on_device(tensors: Params, device: str) -> Params:
    """All but whole numbers, which are counters: to read one there would make the host wait for the device."""
    return {name: tensor.to(device) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _fits(images: Tensor, device: torch.device) -> bool:
    """Whether the training images may stay on the device: they take at most half of the memory that is free there."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return 2 * images.nbytes <= free


def _check_frozen(config: RunConfig, frozen: frozenset[str]) -> None:
    """Raise ConfigError for a method that rewrites tensors which must stay as they are."""
    if not frozen or config.method not in STAGES:
        return
    names, others = sorted(frozen), [method for method in METHODS if method not in STAGES]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    raise ConfigError(
        "method", config.method,
        f"one of {', '.join(others)}: {config.model.factory} sets requires_grad=False for {names[0]}{more}, and "
        f"{config.method} rewrites all weights",
    )  # fmt: skip


def _check_agreement(
    path: str, graph: Graph, params: Params, frozen: frozenset[str], workers: Workers, device: str
) -> None:
    """Raise UserError where a factory gave another network to another worker: they would be trained apart."""
    if workers.size == 1:
        return
    digest = hashlib.sha256(json.dumps([graph.to_json(), sorted(frozen)]).encode())
    for name, tensor in sorted(params.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    mine = int.from_bytes(digest.digest()[:4], "big")  # whole numbers of this size have exact means in float64
    mean = torch.tensor([float(mine)], dtype=torch.float64, device=device)
    workers.mean_([mean])
    if float(mean) != mine:
        raise UserError(
            f"model.factory: {path} gives other weights to each of the {workers.size} workers; expected the same, "
            "from the same files on every node"
        )


def _first_weights(
    config: RunConfig, data: DataSet, init: Network | None, trust_code: bool
) -> tuple[Graph, Params, frozenset[str]]:
    """Graph, first weights, and the names of those that are not trained."""
    fresh = untrained(config, data.input_shape, data.classes, data.class_names, trust_code=trust_code)
    graph, params = fresh.network.graph, fresh.network.params
    if init is not None:
        _check_fit(fresh.network, init)
        return graph, init.params, fresh.frozen
    if config.train.initialization == "default":
        return graph, params, fresh.frozen
    generator = generator_for(config.seed, 0, "ibp initialization")
    return graph, ibp_initialization(graph, params, generator, fresh.given | fresh.frozen), fresh.frozen


def _check_fit(fresh: Network, init: Network) -> None:
    """Raise UserError that names the first tensor or node in which ``init`` differs from the configured network."""
    for name in sorted(fresh.params.keys() | init.params.keys()):
        want, have = fresh.params.get(name), init.params.get(name)
        if want is None or have is None or want.shape != have.shape:
            shapes = [None if t is None else list(t.shape) for t in (have, want)]
            raise UserError(
                f"initial network: tensor {name!r} has shape {shapes[0]}; expected {shapes[1]}, as the configured model"
            )
    if fresh.graph != init.graph:
        raise UserError("initial network: its layers differ from the configured model's; expected the same model")


def _optimizer(config: RunConfig, params: Params, frozen: frozenset[str]) -> torch.optim.Optimizer:
    leaves = [v for k, v in params.items() if v.requires_grad and k not in frozen]
    options: dict[str, Any] = {
        "lr": config.learning_rate, "weight_decay": config.train.weight_decay, "fused": True,
    }  # fmt: skip
    match config.train.optimizer:
        case "adam":
            return torch.optim.Adam(leaves, **options)
        case "adamw":
            return torch.optim.AdamW(leaves, **options)
    return torch.optim.SGD(leaves, momentum=config.train.momentum, **options)


def save(run: Run) -> bytes:
    """The whole training state as bytes (``state.pack_state``)."""
    moments = {k: dict(run.optimizer.state[v]) for k, v in run.leaves().items() if v in run.optimizer.state}
    kept = {k: {key: t for key, t in values.items() if t is not None} for k, values in moments.items()}
    state = State(
        run.config.config_hash, run.graph, run.epoch, run.params, kept, run.best, run.best_score, run.history,
        run.average, run.averages, run.stage.name, run.auxiliary, run.frozen,
    )  # fmt: skip
    return pack_state(state)


def _restore_moments(run: Run, moments: Moments) -> None:
    for name, leaf in run.leaves().items():
        for key, value in moments.get(name, {}).items():
            run.optimizer.state[leaf][key] = value.to(leaf.device)


def network(run: Run, params: Params) -> Network:
    """The network with copies of ``params`` on the CPU."""
    tensors = {k: v.detach().cpu().clone() for k, v in params.items()}
    return Network(run.graph, tensors, run.config, run.class_names, {"epochs": run.epoch})
