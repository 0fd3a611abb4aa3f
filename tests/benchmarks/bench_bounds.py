"""Our bounds and auto_LiRPA's, side by side in one process on one thread: time, and tightness.

    python tests/benchmarks/bench_bounds.py --mnist ../shared/data
    python tests/benchmarks/bench_bounds.py --mnist ../shared/data --stages
    python tests/benchmarks/bench_bounds.py --mnist ../shared/data --model cnn7 --device cuda

Both bound the same margins of the same network on the same images, in turns; a ratio is ours / theirs within one turn.
Ours are always decided in float64 (alpha's search is in float32); theirs run in the precision that the row names.
alpha-CROWN is upstream's own call with its defaults (20 iterations), which bounds the nodes inside anew in every
iteration; "alpha-fixed" is its faster use, the boxes inside taken once from its CROWN. For both we take the fewest
iterations whose mean margin is no worse than theirs, and say which. Without MNIST the images are random, without
auto_LiRPA only our times are printed; both are said. ``--stages``: images per second of every stage of a verification.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stages
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

TARGETS = {"IBP": 0.9, "CROWN": 0.5, "alpha-CROWN": 0.25, "alpha-fixed": 0.25}
PRECISIONS = {"IBP": (torch.float32, torch.float64), "CROWN": (torch.float64,)}
SEARCHES = {
    "alpha-CROWN": ((10, 4), (20, 4), (20, 6), (20, 10), (40, 10), (80, 20)),
    "alpha-fixed": tuple((n, 0) for n in (3, 4, 5, 6, 8, 10, 14, 20, 40, 80)),
}
"""Our iterations and box steps, in the order in which they are tried."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
THEIR_ITERATIONS = 20
"""auto_LiRPA's own default."""


@dataclass(frozen=True)
class Case:
    """What is bounded."""

    graph: Graph
    params: Params
    images: Tensor
    box: Box
    labels: Tensor

    def take(self, count: int, dtype: torch.dtype) -> Case:
        box = Box(self.box.center[:count].to(dtype), self.box.radius[:count].to(dtype))
        params = {k: v.to(dtype) for k, v in self.params.items()}
        return Case(self.graph, params, self.images[:count], box, self.labels[:count])

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
        if arguments.stages:
            rows = stages.measure(case.graph, case.params, case.images, case.labels, arguments, clock)
            print(stages.table(rows))
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
    parser.add_argument("--images", type=int, default=16, help="at once; IBP gets four times as many")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=300, help="training steps of the network")
    parser.add_argument("--only", nargs="*", choices=tuple(TARGETS), default=list(TARGETS))
    parser.add_argument("--stages", action="store_true", help="images per second of every stage, and nothing else")
    parser.add_argument("--nodes", type=int, default=200, help="of branch and bound, per image of --stages")
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS), help="cpu: the thread's, for a busy machine")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="JSON of the table")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; expected a CUDA device, or --device cpu")
    if arguments.device == "cuda" and arguments.clock == "cpu":
        parser.error("--clock cpu: does not see the work of --device cuda; expected --clock wall")
    return arguments


def _case(arguments: argparse.Namespace) -> Case:
    """A network of ours, certifiably trained for some steps, and images that it was not trained on."""
    generator = torch.Generator().manual_seed(0)
    count = 4 * arguments.images
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
    box = Box(box.center.to(device), box.radius.to(device))
    return Case(graph, moved, images[:count].to(device), box, labels[:count].to(device))


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
    for name in [] if arguments.stages else arguments.only:
        images = 4 * arguments.images if name == "IBP" else arguments.images
        precisions = PRECISIONS.get(name, (torch.float64, torch.float32))
        for dtype in precisions if name == "IBP" or not alone else (torch.float64,):
            theirs = None if alone else their_bound(name, case.take(images, dtype), stack)
            ours = case.take(images, dtype if name == "IBP" else torch.float64)
            yield name, dtype, images, our_bound(name, ours, theirs), theirs


def our_bound(name: str, case: Case, theirs: Timed | None) -> Timed:
    """Our margins [N, classes] as a function without arguments."""
    bounds, nothing = CactusEngine(case.graph, case.params), case.nothing
    if name == "IBP":
        return torch.no_grad()(lambda: interval.margins(case.graph, case.params, case.box, case.labels))
    if name == "CROWN":
        effort = linear.Effort(rows=1 << 30)  # as theirs: every unstable neuron
        return torch.no_grad()(lambda: bounds.linear_margins(case.box, case.labels, known=nothing, effort=effort))
    goal = -torch.inf if theirs is None else float(theirs().mean())
    for iterations, box_steps in SEARCHES[name]:
        how = alpha.Search(iterations=iterations, box_steps=box_steps, target=torch.inf)  # every class to the end

        def run(how: alpha.Search = how) -> Tensor:
            return alpha.alpha_margins(case.graph, case.params, case.box, case.labels, known=nothing, how=how).lower

        mean = float(run().mean())
        print(f"  {name} of {iterations} iterations, {box_steps} box steps: mean {mean:.5f} against {goal:.5f}")
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

    def ask(method: str, **options: Any) -> Tensor:
        with torch.set_grad_enabled(method == "CROWN-Optimized"):
            found = bounds.bounded.compute_bounds(
                x=(point,), C=differences, method=method, bound_upper=False, **options
            )
        return torch.zeros_like(case.nothing).scatter(1, others, found[0].detach())

    def fixed() -> Tensor:
        ask("CROWN")
        inside = [node.inputs[0] for node in bounds.bounded.relus]
        return ask("CROWN-Optimized", interm_bounds={n.name: (n.lower.detach(), n.upper.detach()) for n in inside})

    return fixed if name == "alpha-fixed" else lambda: ask(name)


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
    if name.startswith("alpha"):
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
        row["no_looser"] = row["our_mean"] >= row["their_mean"] - 1e-6 * (1 + abs(row["their_mean"]))
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
    return [round(q, 4) for q in stages.quartiles(values)]


def table(rows: list[dict[str, Any]], header: bool) -> str:
    """Lines: median [quartiles]."""
    lines = [
        f"{'bound':12} {'dtype':8} {'images':>6} {'ours, ms':>24} {'theirs, ms':>26} {'ratio':>24} target  mean margin"
    ]
    for row in rows:
        cells = [_spread(row.get(key)) for key in ("ours_ms", "theirs_ms", "ratio")]
        means = f"{row['our_mean']:.5f}"
        if "their_mean" in row:
            means += f" / {row['their_mean']:.5f}: {'no looser' if row['no_looser'] else 'LOOSER'}"
        lines.append(
            f"{row['bound']:12} {row['dtype']:8} {row['images']:6} {cells[0]:>24} {cells[1]:>26} {cells[2]:>24} "
            f"{row['target']:6} {means}"
        )
    return "\n".join(lines if header else lines[1:])


def _spread(values: list[float] | None) -> str:
    return "-" if values is None else f"{values[1]:.4g} [{values[0]:.4g}, {values[2]:.4g}]"


if __name__ == "__main__":
    main()
