"""Cases near the exact robust radius, and what a verifier's verdicts on them are worth.

A subject is a right prediction of one network at one level; its cases are four radii: below, above and at the exact
robust radius (all within 10 % of it), and one farther away. Networks, radii and brackets are kept in a fixture, which
``tests/benchmarks/bench_oracle.py`` makes and can solve again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from oracle import Array, Exact, Program, box, evaluate, margin, smallest_margin, unroll, unstable_relus
from oracle_radius import attacked_radius, robust_radius
from sklearn.datasets import load_digits
from torch import Tensor, nn

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.bounds.trace import trace
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import materialize
from cactus_ray.config import ThreatConfig
from cactus_ray.verification.cascade import SoundnessError, verify
from cactus_ray.verification.verdict import VerificationSettings

LEVELS = ("dense", "int8", "int4", "prune:gu-l1:0.5")
PER_SUBJECT = 4
MOST_UNSTABLE = 28
"""Unstable ReLUs at the radius that an attack finds; the oracle needs seconds for more, so such samples are skipped."""
TRAINED = 1_200
"""Digits that the networks are trained on; subjects are among the others."""


class Residual(nn.Module):
    """A strided convolution and a residual block, with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.again = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm_again = nn.BatchNorm2d(3)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head((torch.relu(self.norm_again(self.again(x)) + x)).flatten(1))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 10)
    ),
    "conv": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 10),
    ),
    "residual": Residual,
}
NETWORKS = tuple(f"{kind}-{seed}" for seed in range(2) for kind in KINDS)


@dataclass(frozen=True)
class Subject:
    """A rightly classified digit (``sample``) of a network at a level, with the bracket of its exact radius."""

    number: int
    network: str
    level: str
    sample: int
    label: int
    radius: tuple[float, float]


@dataclass(frozen=True)
class Case:
    """A subject and a ball; ``shares``: where in the box the witness of the upper end lies, in steps of 1 / 65,535."""

    number: int
    subject: Subject
    epsilon: float
    low: float
    shares: Array
    unstable: int

    @property
    def near(self) -> bool:
        """Whether epsilon is within 10 % of the exact radius, wherever in its bracket that is."""
        safe, falls = self.subject.radius
        return 0.9 * falls <= self.epsilon <= 1.1 * safe


@dataclass(frozen=True)
class Level:
    """A network as deployed, and as the oracle sees it."""

    graph: Graph
    params: Params
    program: Program


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images float32 [1797, 1, 8, 8] in [0, 1], labels, in a fixed random order."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(bunch.images, dtype=torch.float32)[order, None] / 16, torch.tensor(bunch.target)[order]


def train(name: str) -> Params:
    """Tensors of one of ``NETWORKS`` after some seconds of adversarial training, rounded to float16 values."""
    kind, seed = name.split("-")
    generator = torch.Generator().manual_seed(int(seed))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))  # torch.nn's initialisers read the global generator
        module = KINDS[kind]()
    images, labels = digits()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.005)
    for _ in range(600):
        chosen = torch.randint(TRAINED, (64,), generator=generator)
        x, y = images[chosen], labels[chosen]
        noise = 0.05 * (2 * torch.rand(x.shape, generator=generator) - 1)
        noise.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(module(x + noise), y), noise)
        x = (x + (noise.detach() + 0.05 * gradient.sign()).clamp(-0.05, 0.05)).clamp(0, 1)
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    _, params = trace(module.eval(), (1, 8, 8))
    return {k: v.detach().half().float() for k, v in params.items()}


@cache
def structure(kind: str) -> Graph:
    return trace(KINDS[kind]().eval(), (1, 8, 8))[0]


def compress(name: str, tensors: Params, level: str) -> Level:
    """One network at one level, in both forms."""
    made = materialize(structure(name.split("-")[0]), tensors, parse_level(level))
    return Level(made.graph, made.params, unroll(made.graph, made.params))


class Campaign:
    """The networks of a campaign, their levels, and the subjects in their order: everything is a function of these."""

    def __init__(self, networks: dict[str, Params]) -> None:
        self.networks = networks
        self.levels = {(n, v): compress(n, networks[n], v) for v in LEVELS for n in NETWORKS}

    def of(self, subject: Subject) -> Level:
        return self.levels[subject.network, subject.level]

    def pixels(self, sample: int) -> Array:
        return np.asarray(digits()[0][sample].double().flatten().numpy())

    def subjects(self, known: dict[int, Subject]) -> Iterator[Subject]:
        """Level by level in turn, the next right prediction that the oracle can decide; ``known`` ones are given."""
        places = list(self.levels)
        following = dict.fromkeys(places, TRAINED)
        number = 0
        while places:
            place = places[number % len(places)]
            subject = known.get(number) or self._next(number, *place, following[place])
            if subject is None:
                return
            following[place] = subject.sample + 1
            yield subject
            number += 1

    def _next(self, number: int, network: str, level: str, first: int) -> Subject | None:
        program, labels = self.levels[network, level].program, digits()[1]
        for sample in range(first, len(labels)):
            image, label = self.pixels(sample), int(labels[sample])
            if margin(program, image, label) <= 0:
                continue
            start = attacked_radius(program, image, label)
            if start is not None and unstable_relus(program, *box(image, 1.1 * start)) <= MOST_UNSTABLE:
                radius = robust_radius(program, image, label, start)
                if radius is not None:
                    return Subject(number, network, level, sample, label, radius)
        return None

    def epsilons(self, subject: Subject, seed: int) -> list[float]:
        """The radii of a subject's cases."""
        random = np.random.default_rng([seed, subject.number])
        far = random.uniform(0.5, 0.9) if subject.number % 2 else random.uniform(1.1, 1.3)
        ratios = random.uniform(0.92, 0.995), random.uniform(1.005, 1.08), random.uniform(0.97, 1.03), far
        return [round(float(r) * sum(subject.radius) / 2, 6) for r in ratios]

    def solve(self, number: int, subject: Subject, epsilon: float) -> Case:
        """The exact bracket of one case."""
        lower, upper = box(self.pixels(subject.sample), epsilon)
        found: Exact = smallest_margin(self.of(subject).program, lower, upper, subject.label)
        width = np.where(upper > lower, upper - lower, 1.0)
        shares = np.round((found.witness - lower) / width * 65_535).astype(np.uint16)
        return Case(number, subject, epsilon, found.low, shares, found.unstable)

    def high(self, case: Case) -> float:
        """Upper end of the bracket: the network's own margin at the witness, in float64."""
        lower, upper = box(self.pixels(case.subject.sample), case.epsilon)
        point = np.clip(lower + case.shares / 65_535 * (upper - lower), lower, upper)
        return margin(self.of(case.subject).program, point, case.subject.label)

    def judge(self, case: Case, settings: VerificationSettings) -> dict[str, Any]:
        """What the cascade says of a case, and the faults of it: a plain record."""
        subject, level = case.subject, self.of(case.subject)
        images, labels = digits()
        one = slice(subject.sample, subject.sample + 1)
        threat = ThreatConfig(epsilon=case.epsilon)
        record: dict[str, Any] = {"case": case.number, "epsilon": case.epsilon, "bound": settings.bound}
        started = time.perf_counter(), time.process_time()
        try:
            (said,) = verify(level.graph, level.params, images[one], labels[one], [subject.sample], threat, settings)
        except Exception as error:  # a crash is a fault of the case; the campaign goes on and its exit status tells
            kind = "contradicted" if isinstance(error, SoundnessError) else "crashed"
            found = {"verdict": kind.upper(), "faults": [kind], "said": f"{type(error).__name__}: {error}"}
            return record | found | {"seconds": 0.0, "cpu_seconds": 0.0}
        wall, core = time.perf_counter() - started[0], time.process_time() - started[1]
        faults, high = [], self.high(case)
        slack = 1e-9 * (1 + float(np.abs(evaluate(level.program, self.pixels(subject.sample))).max()))
        if said.verdict == "CERTIFIED" and high < 0:
            faults.append("wrong CERTIFIED")
        # the solver's proof is only as good as its tolerance; the point itself is the sharper check
        if said.verdict == "FALSIFIED" and not (case.low < 1e-5 and self._falls(case, said.counterexample)):
            faults.append("wrong FALSIFIED")
        if said.lower_bound is not None and said.lower_bound > high + slack:
            faults.append("bound above the bracket")
        return record | {
            "verdict": str(said.verdict), "by": said.decided_by, "lower_bound": said.lower_bound, "high": high,
            "faults": faults, "seconds": round(wall, 4), "cpu_seconds": round(core, 4),
        }  # fmt: skip

    def _falls(self, case: Case, point: tuple[float, ...] | None) -> bool:
        """Whether a counterexample is one, by the oracle's own arithmetic."""
        if point is None:
            return False
        x, image, subject = np.array(point), self.pixels(case.subject.sample), case.subject
        inside = bool((np.abs(x - image) <= case.epsilon).all() and (x >= 0).all() and (x <= 1).all())
        return inside and margin(self.of(subject).program, x, subject.label) < 0


def strongest(seconds: float = 10.0) -> VerificationSettings:
    """Branch and bound where the cascade has it, else its linear bounds; ``seconds`` per sample."""
    field = VerificationSettings.__dataclass_fields__["bound"]
    return VerificationSettings(bound=field.metadata["choices"][-1], seconds_per_sample=seconds)


def table(cases: list[Case], records: list[dict[str, Any]]) -> str:
    """The campaign's result as text."""
    faults = [fault for record in records for fault in record["faults"]]
    unknown = sum(r["verdict"] == "UNKNOWN" for r in records)
    rows = {
        "cases": f"{len(records)}",
        "bound": ", ".join(sorted({r["bound"] for r in records})),
        "within 10 % of the exact radius": f"{np.mean([c.near for c in cases]):.1%}",
        "unstable ReLUs, median (largest)": f"{np.median([c.unstable for c in cases]):g} "
        f"({max(c.unstable for c in cases)})",
        "CERTIFIED / FALSIFIED / UNKNOWN": " / ".join(
            str(sum(r["verdict"] == v for r in records)) for v in ("CERTIFIED", "FALSIFIED", "UNKNOWN")
        ),
        "wrong CERTIFIED": str(faults.count("wrong CERTIFIED")),
        "wrong FALSIFIED": str(faults.count("wrong FALSIFIED")),
        "bound above the bracket": str(faults.count("bound above the bracket")),
        "contradicted by the cascade's own check": str(faults.count("contradicted")),
        "crashed": str(faults.count("crashed")),
        "UNKNOWN": f"{unknown / len(records):.1%}",
        **{
            f"{name} per case, mean (largest)": f"{np.mean([r[key] for r in records]):.2f} "
            f"({max(r[key] for r in records):.2f})"
            for name, key in (("seconds", "seconds"), ("seconds of a core", "cpu_seconds"))
        },
    }
    return "\n".join(f"{name:<46}{value}" for name, value in rows.items())
