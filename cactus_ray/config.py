"""One run, as frozen dataclasses: what is trained, on what, against which threat.

Every field carries its range in ``metadata``, from which both the strict parser and the editor's JSON schema are made.
Unknown keys, wrong types, NaN and values out of range raise ``ConfigError`` with the key's path. Two runs with the same
``config_hash`` are the same run.
"""

from __future__ import annotations

import hashlib
import json
import typing
from dataclasses import dataclass, field
from typing import Any

from cactus_ray.errors import ConfigError
from cactus_ray.options import CERTIFIED_LOSSES as CERTIFIED_LOSSES
from cactus_ray.options import METHOD_KEYS, STAGE_SHARES, default_of, loss_of
from cactus_ray.options import METHODS as METHODS
from cactus_ray.options import options_of as options_of
from cactus_ray.outputs import FOLDER, SCHEME
from cactus_ray.parsing import convert as convert
from cactus_ray.parsing import describe as describe
from cactus_ray.parsing import parse as parse
from cactus_ray.parsing import plain
from cactus_ray.parsing import setting as setting
from cactus_ray.parsing import to_dict as to_dict

STRATEGIES = ("none", "single", "triple", "random", "fixed", "dense", "progressive", "adaptive")
PRUNE_FAMILIES = tuple(f"{g}{s}-{n}" for g in "gl" for s in "us" for n in ("l1", "l2", "grad"))
_WIDTHS = ("int8", "int6", "int5", "int4", "int3")
AWP_UNITS = (
    "step", "std", "absolute", "relative", *_WIDTHS[1:], "ternary",
    *(f"{width}:tensor" for width in (*_WIDTHS, "ternary")),
    *(f"{width}{scales}:affine" for scales in ("", ":tensor") for width in (*_WIDTHS, "int2")),
    "fp16", "bf16",
)  # fmt: skip
"""Of the radius of a weight perturbation; those that name a format of levels mean its step, ``step`` that of int8."""
AWP_KINDS = ("ascent", "noise", "rounding")
STORED_BITS = (2, 3, 4, 5, 6, 8)
"""Widths of a weight for which there are levels: ``ternary``, ``int3`` to ``int8``, and codebooks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which images. ``root`` is the folder of data sets that are not inside a package."""

    name: str = setting(doc="data set", choices=("digits", "mnist", "cifar10", "tinyimagenet", "image_folder"))
    root: str | None = setting(None, doc="folder that holds the data set")
    image_size: int | None = setting(
        None, doc="side in pixels to which an image folder is resized", minimum=4, maximum=1024
    )
    train_samples: int | None = setting(None, doc="use only this many training images (fixed subset)", minimum=1)

    def __post_init__(self) -> None:
        if self.root is not None and SCHEME.match(self.root):
            raise ConfigError("root", self.root, FOLDER)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which architecture, or ``factory: package.module:function`` for the user's own."""

    name: str | None = setting(None, doc="architecture", choices=("mlp", "cnn_small", "cnn5", "cnn7", "resnet18"))
    width: float = setting(1.0, doc="factor on every width", exclusive_minimum=0.0, maximum=8.0)
    hidden: tuple[int, ...] = setting((128, 64), doc="hidden widths of mlp", minimum=1)
    batch_norm: bool | None = setting(None, doc="batch norm after every hidden layer; default: the architecture's own")
    factory: str | None = setting(None, doc="package.module:function that returns a torch module (needs --trust-code)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreatConfig:
    """The set of inputs against which robustness is certified: a ball clipped to the domain."""

    norm: str = setting("linf", doc="norm of the perturbation", choices=("linf",))
    epsilon: float = setting(doc="radius in units of the image domain", minimum=0.0, maximum=1.0, fraction=True)
    domain: tuple[float, float] = setting((0.0, 1.0), doc="smallest and largest pixel value")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Optimiser and schedules. Fractions are of all training steps; where a method has stages, of those of a stage.

    The warm-up and the ramp are in the first stage; the learning rate falls in each; weights are averaged in the last.
    """

    epochs: int = setting(30, doc="passes over the training split, or over train.epoch_fraction of it", minimum=1)
    epoch_fraction: float | None = setting(
        None, doc="share of the training split in an epoch, images drawn anew for each; default: all of it",
        exclusive_minimum=0.0, maximum=1.0,
    )  # fmt: skip
    batch_size: int = setting(64, doc="images per step, over all workers", minimum=1)
    optimizer: str = setting("adam", doc="optimiser", choices=("adam", "adamw", "sgd"))
    weight_decay: float = setting(0.0, doc="weight decay", minimum=0.0)
    momentum: float = setting(0.9, doc="momentum of sgd", minimum=0.0, exclusive_maximum=1.0)
    l1: float = setting(0.0, doc="weight of the sum of |w| of conv and linear weights that are trained", minimum=0.0)
    clip_norm: float = setting(10.0, doc="largest gradient norm", exclusive_minimum=0.0)
    decay_at: tuple[float, ...] = setting(
        (0.7, 0.9), doc="fractions at which the learning rate falls", minimum=0.0, maximum=1.0
    )
    decay_factor: float = setting(0.2, doc="factor of each fall", exclusive_minimum=0.0, maximum=1.0)
    epsilon_factor: float = setting(
        1.0, doc="largest training radius / threat.epsilon", exclusive_minimum=0.0, maximum=10.0
    )
    warmup: float = setting(
        0.02, doc="fraction with epsilon 0 and standard weight 1", minimum=0.0, exclusive_maximum=1.0
    )
    ramp: float = setting(0.3, doc="fraction over which epsilon and the standard weight move", minimum=0.0, maximum=1.0)
    initialization: str = setting(
        "ibp",
        doc="ibp: Shi et al. 2021, of weights that torch draws; default: as they are made",
        choices=("ibp", "default"),
    )
    regularizer: float = setting(0.0, doc="weight of Shi et al.'s ramp regularisers", minimum=0.0)
    keep: str = setting("last", doc="checkpoint that is verified", choices=("last", "best"))
    crop_padding: int | None = setting(
        None, doc="random crops out of training images padded by this many black pixels; 0: none", minimum=0, maximum=64
    )
    flip: bool | None = setting(None, doc="mirror half of the training images left to right")
    average: str | None = setting(
        None, doc="average of the weights that is kept: ema of every step, swa of every epoch",
        choices=("none", "ema", "swa"),
    )  # fmt: skip
    average_from: float | None = setting(
        None, doc="fraction at which averaging starts; default: the end of the ramp", minimum=0.0, exclusive_maximum=1.0
    )
    average_decay: float | None = setting(
        None, doc="ema: share of the average that a step keeps (default 0.999)", minimum=0.0, exclusive_maximum=1.0
    )
    precision: str | None = setting(
        None, doc="bf16: the attack's convolutions and matrix products in bfloat16, on GPUs; all else is float32",
        choices=("float32", "bf16"),
    )  # fmt: skip
    compile: str | None = setting(
        None, doc="step: the passes of a step (attack, clean pass, certified loss) go through torch.compile",
        choices=("none", "step"),
    )  # fmt: skip
    proxy_samples: int = setting(512, doc="selection images scored after every epoch (plain and IBP)", minimum=1)

    def __post_init__(self) -> None:
        if self.warmup + self.ramp > 1.0 + 1e-9:
            most = f"at most 1 - train.warmup = {1.0 - self.warmup:g}, or epsilon is never reached"
            raise ConfigError("train.ramp", self.ramp, most)
        absent = {"crop_padding": 0, "flip": False, "average": "none", "precision": "float32", "compile": "none"}
        for key, off in absent.items():
            if getattr(self, key) == off:  # absent and off are the same run
                object.__setattr__(self, key, None)
        defaults = {"average_from": min(self.warmup + self.ramp, 0.99), "average_decay": 0.999}
        active = {"ema": ("average_from", "average_decay"), "swa": ("average_from",)}.get(self.average or "", ())
        for key, default in defaults.items():
            if key not in active and getattr(self, key) is not None:
                owners = "ema" if key == "average_decay" else "ema or swa"
                raise ConfigError(f"train.{key}", getattr(self, key), f"nothing without train.average: {owners}")
            if key in active and getattr(self, key) is None:
                object.__setattr__(self, key, default)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionSetConfig:
    """Members of the compression set beside the full network (CACTUS, Sec. 4.3 and Tables 6-8)."""

    strategy: str = setting("single", doc="how sparsities are drawn", choices=STRATEGIES)
    low: float = setting(0.25, doc="smallest sparsity", minimum=0.0, exclusive_maximum=1.0)
    high: float = setting(0.75, doc="largest sparsity", minimum=0.0, exclusive_maximum=1.0)
    size: int = setting(3, doc="members, the full network included (random, fixed)", minimum=2, maximum=16)
    family: str = setting("gu-l1", doc="pruning family", choices=PRUNE_FAMILIES)
    member_fraction: float = setting(
        1.0, doc="share of the batch that a member sees", exclusive_minimum=0.0, maximum=1.0
    )
    refresh_every: int = setting(1, doc="steps for which a mask is kept", minimum=1)
    channels: float | None = setting(
        None, doc="largest share of the channels that every second member loses instead of weights; 0: none does",
        minimum=0.0, exclusive_maximum=1.0,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ConfigError("compression_set.low", self.low, f"at most compression_set.high = {self.high}")
        if self.channels == 0.0:  # absent and none are the same run
            object.__setattr__(self, "channels", None)
        if self.channels is not None and self.family[1] == "s":
            expected = (
                f"nothing, because every member of family {self.family} loses channels; low and high say how many"
            )
            raise ConfigError("compression_set.channels", self.channels, expected)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One trial: everything that its weights depend on, except the machine type and the thread count."""

    data: DataConfig = setting(doc="data")
    model: ModelConfig = setting(doc="model")
    threat: ThreatConfig = setting(doc="threat")
    train: TrainConfig = field(default_factory=TrainConfig, metadata={"doc": "training"})
    method: str = setting("cactus", doc="training method", choices=METHODS)
    learning_rate: float = setting(0.005, doc="learning rate", exclusive_minimum=0.0, maximum=10.0)
    standard_weight: float | None = setting(
        None, doc="lambda of Eq. 7: final weight of the standard loss", minimum=0.0, maximum=1.0
    )
    certified_loss: str | None = setting(
        None, doc="certified loss of the methods that are not named after theirs", choices=CERTIFIED_LOSSES
    )
    box_ratio: float | None = setting(
        None, doc="sabr, staps: radius of the small box / epsilon", exclusive_minimum=0.0, maximum=1.0
    )
    relu_shrinkage: float | None = setting(
        None, doc="factor on the upper bounds of unstable ReLUs; below 1 unsound, in training only",
        exclusive_minimum=0.0, maximum=1.0,
    )  # fmt: skip
    attack_steps: int | None = setting(None, doc="PGD steps", minimum=1, maximum=1000)
    attack_step_size: float | None = setting(
        None, doc="PGD step / radius of the attack", exclusive_minimum=0.0, maximum=10.0
    )
    attack_radius_factor: float | None = setting(
        None, doc="mtl_ibp, cc_ibp, exp_ibp: radius of the attack / epsilon", exclusive_minimum=0.0, maximum=10.0
    )
    ibp_weight: float | None = setting(
        None, doc="alpha of mtl_ibp, cc_ibp, exp_ibp: 0 adversarial, 1 interval bounds", minimum=0.0, maximum=1.0
    )
    tail_layers: int | None = setting(
        None, doc="taps, staps: last convolutions and linear layers, which are attacked", minimum=1, maximum=1000
    )
    latent_steps: int | None = setting(None, doc="taps, staps: steps of the latent attack", minimum=1, maximum=1000)
    latent_restarts: int | None = setting(None, doc="taps, staps: starts of the latent attack", minimum=1, maximum=100)
    latent_targets: int | None = setting(
        None, doc="taps, staps: classes attacked per image, those with the lowest bounds", minimum=1, maximum=10_000
    )
    gradient_scale: float | None = setting(
        None, doc="taps, staps: factor on the gradient of the attacked part", exclusive_minimum=0.0, maximum=100.0
    )
    crown_weight: float | None = setting(
        None, doc="crown_ibp: final weight of CROWN-IBP beside IBP (it starts at 1)", minimum=0.0, maximum=1.0
    )
    compression_set: CompressionSetConfig | None = setting(None, doc="compression set of cactus")
    awp_radius: float | None = setting(None, doc="eta: radius of the weight perturbation in awp_unit", minimum=0.0)
    awp_unit: str | None = setting(
        None, doc="unit of awp_radius (step: int8 step of the channel; int4, int4:affine, fp16: step of that format)",
        choices=AWP_UNITS,
    )  # fmt: skip
    awp_steps: int | None = setting(None, doc="ascent steps of the weight perturbation", minimum=1, maximum=100)
    awp_member: str | None = setting(
        None, doc="perturb a copy of the full network, or the pruned one", choices=("separate", "pruned")
    )
    awp_kind: str | None = setting(
        None, doc="weights within awp_radius: the worst ones, random ones, or rounded with straight-through gradients",
        choices=AWP_KINDS,
    )  # fmt: skip
    stage_shares: tuple[float, ...] | None = setting(
        None, doc="proportion in which the stages of a method share the epochs", exclusive_minimum=0.0, maximum=1e6
    )
    target_sparsity: float | None = setting(
        None, minimum=0.0, exclusive_maximum=1.0,
        doc="share of zeros in the finished network (hydra: in every layer; atmc: U, V and C have what is left)",
    )  # fmt: skip
    mask_noise: float | None = setting(
        None, doc="c_sam: mu, radius of the uniform noise on soft masks", minimum=0.0, maximum=1.0
    )
    mask_saturated: float | None = setting(
        None, doc="c_sam: tau, share of a layer's soft masks that start at 1", exclusive_minimum=0.0, maximum=1.0
    )
    nrs_weight: float | None = setting(
        None, doc="nrsloss: weight of the neurons' instability, once the certified loss has one", minimum=0.0
    )
    weight_bits: int | None = setting(None, doc="qa_ibp: bits of the weights (2: ternary)", choices=STORED_BITS)
    awp_gamma: float | None = setting(
        None, doc="awp: l2 norm of the weight perturbation / that of the tensor", minimum=0.0, exclusive_maximum=1.0
    )
    codebook_bits: int | None = setting(
        None, doc="atmc: bits of the codebooks to which U, V and C are drawn", choices=STORED_BITS
    )
    admm_weight: float | None = setting(None, doc="atmc: rho, how strongly they are drawn", minimum=0.0)
    admm_every: int | None = setting(None, doc="atmc: steps between two codebooks", minimum=1, maximum=10_000)
    seed: int = setting(0, doc="seed of everything random", minimum=0, maximum=2**31 - 1)

    def __post_init__(self) -> None:
        active = options_of(self.method, self.certified_loss)
        for key in sorted(METHOD_KEYS):
            value = getattr(self, key)
            if key not in active and value is not None:
                raise ConfigError(key, plain(value), f"nothing: method {self.method!r} does not use it")
            if key in active and value is None:
                default = default_of(key, self.method, self.certified_loss)
                object.__setattr__(self, key, CompressionSetConfig() if key == "compression_set" else default)
        self._check_stages()
        if self.awp_kind == "rounding" and self.awp_unit == "relative":
            raise ConfigError("awp_unit", self.awp_unit, "a unit that makes a grid, such as step or int4, to round to")
        if self.awp_kind in ("noise", "rounding") and self.awp_steps != 1:
            raise ConfigError("awp_steps", self.awp_steps, f"nothing, or 1: {self.awp_kind} does not ascend")
        if (self.model.name is None) == (self.model.factory is None):
            raise ConfigError("model", plain(self.model), "either name or factory")
        if self.loss in ("taps", "staps") and self.stage_shares is None and self.train.warmup + self.train.ramp >= 1.0:
            below = f"less than 1 - train.warmup = {1.0 - self.train.warmup:g}"
            raise ConfigError("train.ramp", self.train.ramp, f"{below}: {self.loss} begins where the ramp ends")
        low, high = self.threat.domain
        if not low < high:
            raise ConfigError("threat.domain", [low, high], "two increasing numbers")

    def _check_stages(self) -> None:
        if self.stage_shares is None:
            return
        stages = tuple(STAGE_SHARES[self.method])
        if len(self.stage_shares) != len(stages):
            expected = f"{len(stages)} numbers, one for each stage of {self.method}: {', '.join(stages)}"
            raise ConfigError("stage_shares", list(self.stage_shares), expected)
        if self.train.epochs < len(stages):
            expected = f"at least {len(stages)}, one for each stage of {self.method}: {', '.join(stages)}"
            raise ConfigError("train.epochs", self.train.epochs, expected)

    @property
    def loss(self) -> str:
        """The loss of the full network."""
        return loss_of(self.method, self.certified_loss)

    @property
    def training_epsilon(self) -> float:
        """The largest radius of training."""
        return self.threat.epsilon * self.train.epsilon_factor

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict without inactive (None) keys; ``parse(RunConfig, ...)`` reads it back."""
        return typing.cast(dict[str, Any], plain(self))

    @property
    def config_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON; where the data lie on disk does not count."""
        plain = self.to_dict()
        plain["data"].pop("root", None)
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
