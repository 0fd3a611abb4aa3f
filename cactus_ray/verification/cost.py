"""About how many multiply-adds the verification of one sample takes, so that a long task is told from a hung one.

Estimates from the network's shapes: how many neurons CROWN has to bound, and which stages decide a sample, only shows
when it is verified.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cactus_ray.bounds import interval
from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.bounds.relaxation import RELAXED
from cactus_ray.compression.size import macs_of
from cactus_ray.errors import UserError
from cactus_ray.models.network import outline
from cactus_ray.verification.verdict import VerificationSettings

CPU_PACE, GPU_PACE = 1e10, 3e11
"""Of these multiply-adds per second. A core did 2e10 on an untrained cnn7 (CIFAR-10, CROWN), and 9e9 while other work
kept it busy; the GPU's number is a guess, low for bounds in float64."""
TASK_SECONDS = 600.0
"""A task is cut into smaller ones that is estimated to take longer."""
UNSTABLE = 0.2
"""Share of the neurons before a ReLU that CROWN bounds, as of a certifiably trained network; up to 1 of others."""
DOUBLE = 2.0
"""What a multiply-add in float64 counts."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Multiply-adds per sample and level. ``cheap``: attacks, IBP, CROWN; ``dear``: a shorter attack, CROWN and alpha.

    Branch and bound is not in it: it has a limit in seconds.
    """

    cheap: float = 0.0
    dear: float = 0.0

    def of(self, dear: bool) -> float:
        return self.dear if dear else self.cheap


UNKNOWN = Cost()


def pace(on_gpu: bool) -> float:
    """Multiply-adds per second that a verifier does at least, as far as nothing was measured."""
    return GPU_PACE if on_gpu else CPU_PACE


def cost_of(graph: Graph, params: Params, settings: VerificationSettings) -> Cost:
    """The cost of a network; the tensors of ``params`` may be without data (device "meta")."""
    forward = float(sum(macs_of(graph, params).values()))
    short = -(-settings.attack_steps // 4)
    steps = short + settings.attack_steps * settings.restarts + short * settings.targeted_runs
    interval_pass = 2.0 * DOUBLE * forward
    linear = 0.0
    if settings.bound != "ibp":
        output = graph.shapes(params)[graph.output.name]
        linear = DOUBLE * (sum(_bounded(graph, params, settings.intermediate_rows)) + output[-1] * forward)
    # a step of an attack or of slopes goes forward and backward
    cheap = 2.0 * steps * forward + interval_pass + linear
    alpha = 2.0 * settings.alpha_iterations * linear / DOUBLE if settings.bound in ("alpha", "branch") else 0.0
    return Cost(cheap, 2.0 * (short + short * settings.targeted_runs) * forward + interval_pass + linear + alpha)


def cost_of_file(path: Path, settings: VerificationSettings) -> Cost:
    """The cost of a network file; nothing where it is none, which whoever verifies it will say."""
    try:
        return cost_of(*outline(path), settings)
    except UserError:
        return UNKNOWN


def _bounded(graph: Graph, params: Params, rows: int) -> Iterator[float]:
    """Multiply-adds of each node whose neurons CROWN bounds: a pass back to the input for every unstable one."""
    shapes, mixing, readers = graph.shapes(params), interval.mixing(graph), graph.consumers()
    weighted = macs_of(graph, params)
    before = 0.0
    for node in graph.nodes[:-1]:
        before += weighted.get(node.name, 0)
        if mixing[node.name] == 2 and {reader.op for reader in readers[node.name]} & {*RELAXED}:
            yield min(rows, UNSTABLE * torch.Size(shapes[node.name]).numel()) * before
