"""Our bounds and auto_LiRPA's, side by side in one process on one thread: time, and tightness.

    python tests/benchmarks/bench_bounds.py --mnist ../shared/data

Both bound the same network on the same images, in turns; a ratio is ours / theirs within one turn. Without MNIST the
images are random, without auto_LiRPA only our times are printed; both are said.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cactus_ray.bounds import alpha, interval, linear
from cactus_ray.bounds.graph import Graph, Params, forward
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.trace import trace
from cactus_ray.config import ModelConfig
from cactus_ray.data import load_split
from cactus_ray.errors import UserError
from cactus_ray.models import build
from cactus_ray.training.init import ibp_initialization
from cactus_ray.verification import lirpa
from cactus_ray.verification.engine import CactusEngine

TARGETS = {"IBP": 0.9, "CROWN": 0.5, "alpha-CROWN": 0.25}
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
THEIR_ITERATIONS = 20
"""auto_LiRPA's own default."""


@dataclass(frozen=True)
class Case:
    """What is bounded."""

    graph: Graph
    params: Params
    box: Box
    labels: Tensor

    def take(self, count: int, dtype: torch.dtype) -> Case:
        box = Box(self.box.center[:count].to(dtype), self.box.radius[:count].to(dtype))
        return Case(self.graph, {k: v.to(dtype) for k, v in self.params.items()}, box, self.labels[:count])

    @property
    def nothing(self) -> Tensor:
        classes = self.graph.shapes(self.params)[self.graph.output.name][0]
        empty = self.box.center.new_full((len(self.labels), classes), -torch.inf)
        return empty.scatter(1, self.labels[:, None], 0.0)


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        case = _case(arguments)
        try:
            about = lirpa.info()
            print(f"{about.name} {about.version} ({about.self_test}); torch {torch.__version__}")
        except UserError as error:
            about = None
            print(f"ours alone: {error}")
        rows = []
        clock, device = CLOCKS[arguments.clock], case.box.center.device
        for name, dtype, count, ours, theirs in _contests(case, arguments, stack, alone=about is None):
            rows.append(measure(name, dtype, count, ours, theirs, arguments.repeats, device, clock))
            print(table(rows[-1:], header=len(rows) == 1), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--model", default="cnn_small", choices=("cnn_small", "cnn7"))
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--epsilon", type=float, default=0.1)
    parser.add_argument("--images", type=int, default=16, help="of CROWN; IBP gets four times as many")
    parser.add_argument("--alpha-images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=300, help="training steps of the network")
    parser.add_argument("--only", nargs="*", choices=tuple(TARGETS), default=list(TARGETS))
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS), help="cpu: the thread's, for a busy machine")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON of the table")
    return parser.parse_args()


def _case(arguments: argparse.Namespace) -> Case:
    """A network of ours, certifiably trained for some steps, and images that it was not trained on."""
    generator = torch.Generator().manual_seed(0)
    count = 4 * max(arguments.images, arguments.alpha_images)
    if arguments.mnist is None:
        print("no --mnist: random images and labels, so bounds are of an untrained network")
        images, labels = torch.rand(2 * count, 1, 28, 28, generator=generator), torch.arange(2 * count) % 10
        steps = 0
    else:
        images, labels = load_split("mnist", "selection", str(arguments.mnist))
        steps = arguments.steps
    config = ModelConfig(name=arguments.model, width=arguments.width)
    graph, params = trace(build(config, tuple(images.shape[1:]), 10, generator=generator), tuple(images.shape[1:]))
    params = ibp_initialization(graph, params, generator)
    params = train(graph, params, images[count:], labels[count:], arguments.epsilon, steps, generator)
    with torch.no_grad():
        accuracy = (forward(graph, params, images[:count]).argmax(1) == labels[:count]).float().mean()
    print(f"{arguments.model}, {steps} steps, accuracy {accuracy:.2f} on {count} images, epsilon {arguments.epsilon}")
    box = interval.ball(images[:count].double(), arguments.epsilon, (0.0, 1.0))
    device = arguments.device
    moved = {k: v.to(device) for k, v in params.items()}
    return Case(graph, moved, Box(box.center.to(device), box.radius.to(device)), labels[:count].to(device))


def train(
    graph: Graph, params: Params, images: Tensor, labels: Tensor, epsilon: float, steps: int, generator: torch.Generator
) -> Params:
    """Half clean, half interval loss over a growing ball of half the radius: CROWN is needed, and succeeds."""
    variables = {k: v.clone().requires_grad_(v.is_floating_point() and "running" not in k) for k, v in params.items()}
    optimizer = torch.optim.Adam([v for v in variables.values() if v.requires_grad], lr=0.002)
    for step in range(steps):
        chosen = torch.randint(len(images), (64,), generator=generator)
        x, y = images[chosen], labels[chosen]
        box = interval.ball(x, 0.5 * epsilon * min(1.0, 2 * step / steps), (0.0, 1.0))
        lower = interval.margins(graph, variables, box, y)
        loss = F.cross_entropy(forward(graph, variables, x), y) + F.cross_entropy(-lower, y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {k: v.detach() for k, v in variables.items()}


Timed = Callable[[], Tensor]


def _contests(
    case: Case, arguments: argparse.Namespace, stack: ExitStack, *, alone: bool
) -> Iterator[tuple[str, torch.dtype, int, Timed, Timed | None]]:
    """(name, dtype, images, our bound, theirs) of every row. auto_LiRPA's scope is entered once, not in the times."""
    for name in arguments.only:
        images = {"IBP": 4 * arguments.images, "CROWN": arguments.images, "alpha-CROWN": arguments.alpha_images}[name]
        for dtype in (torch.float32, torch.float64) if name == "IBP" else (torch.float64,):
            part = case.take(images, dtype)
            theirs = None
            if not alone:
                theirs = their_bound(name, part, stack)
            yield name, dtype, images, our_bound(name, part, theirs), theirs


def our_bound(name: str, case: Case, theirs: Timed | None) -> Timed:
    """Our margins [N, classes] as a function without arguments."""
    bounds, nothing = CactusEngine(case.graph, case.params), case.nothing
    if name == "IBP":
        return torch.no_grad()(lambda: interval.margins(case.graph, case.params, case.box, case.labels))
    if name == "CROWN":
        effort = linear.Effort(rows=1 << 30)  # as theirs: every unstable neuron
        return torch.no_grad()(lambda: bounds.linear_margins(case.box, case.labels, known=nothing, effort=effort))
    goal = -torch.inf if theirs is None else float(theirs().mean())
    for iterations in (5, 10, 20, 40, 80):
        how = alpha.Search(iterations=iterations, target=torch.inf)  # as theirs: every class to the end

        def run(how: alpha.Search = how) -> Tensor:
            return alpha.alpha_margins(case.graph, case.params, case.box, case.labels, known=nothing, how=how).lower

        mean = float(run().mean())
        print(f"  alpha-CROWN of {iterations} iterations: mean {mean:.5f} against {goal:.5f}")
        if mean >= goal:
            break
    return run


def their_bound(name: str, case: Case, stack: ExitStack) -> Timed:
    """auto_LiRPA's margins as a function without arguments: its own call, without our adapter around it."""
    bounds = lirpa.LirpaEngine(case.graph, case.params)
    stack.enter_context(lirpa.scope(case.box.center.dtype, quiet=False))
    if name == "alpha-CROWN":
        return lambda: bounds.alpha_margins(case.box, case.labels, known=case.nothing, iterations=THEIR_ITERATIONS)
    point, differences, others = bounds.question(case.box, case.labels)

    @torch.no_grad()
    def run() -> Tensor:
        lower = bounds.bounded.compute_bounds(x=(point,), C=differences, method=name, bound_upper=False)[0]
        return torch.zeros_like(case.nothing).scatter(1, others, lower)

    return run


def measure(
    name: str,
    dtype: torch.dtype,
    images: int,
    ours: Timed,
    theirs: Timed | None,
    repeats: int,
    device: torch.device,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Times in turns after one warm-up: median and quartiles of milliseconds, and of the ratio within a turn."""
    if name == "alpha-CROWN":
        repeats = min(repeats, 5)
    calls = 20 if name == "IBP" else 1
    mine, other = [], []
    for turn in range(repeats + 1):
        pair = (timed(ours, calls, device, clock), None if theirs is None else timed(theirs, calls, device, clock))
        if turn:
            mine.append(pair[0])
            other += [pair[1]] if pair[1] is not None else []
    row: dict[str, Any] = {
        "bound": name, "dtype": str(dtype).removeprefix("torch."), "images": images, "repeats": repeats,
        "ours_ms": quartiles(mine), "our_mean": float(ours().mean()), "target": TARGETS[name],
    }  # fmt: skip
    if theirs is not None:
        row |= {"theirs_ms": quartiles(other), "their_mean": float(theirs().mean())}
        row["ratio"] = quartiles([a / b for a, b in zip(mine, other, strict=True)])
    return row


def timed(function: Timed, calls: int, device: torch.device, clock: Callable[[], float]) -> float:
    """Milliseconds per call."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = clock()
    for _ in range(calls):
        function()
    wait()
    return 1000 * (clock() - started) / calls


def quartiles(values: list[float]) -> list[float]:
    return [round(q, 4) for q in statistics.quantiles(values, n=4, method="inclusive")]


def table(rows: list[dict[str, Any]], header: bool) -> str:
    """Lines: median [quartiles]."""
    lines = [
        f"{'bound':12} {'dtype':8} {'images':>6} {'ours, ms':>28} {'theirs, ms':>28} {'ratio':>22} target  mean margin"
    ]
    for row in rows:
        cells = [_spread(row.get(key)) for key in ("ours_ms", "theirs_ms", "ratio")]
        means = f"{row['our_mean']:.5f}" + (f" / {row['their_mean']:.5f}" if "their_mean" in row else "")
        lines.append(
            f"{row['bound']:12} {row['dtype']:8} {row['images']:6} {cells[0]:>28} {cells[1]:>28} {cells[2]:>22} "
            f"{row['target']:6} {means}"
        )
    return "\n".join(lines if header else lines[1:])


def _spread(values: list[float] | None) -> str:
    return "-" if values is None else f"{values[1]:.4g} [{values[0]:.4g}, {values[2]:.4g}]"


if __name__ == "__main__":
    main()
