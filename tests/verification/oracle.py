"""Exact smallest margin of a small ReLU network over a box, by mixed-integer linear programming (Tjeng et al. 2019).

Shares no code with the bound engines: layers become matrices here, and the big-M constants are computed here (interval
arithmetic, then linear programs), in numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from cactus_ray.bounds.graph import Graph, Node, Params

Array = NDArray[np.float64]

SLACK = 1e-6
"""Widening of bounds that a linear program gave: more than its tolerance."""
SECONDS = 600.0
"""Limit of one mixed-integer program; what it has not proved by then makes the bracket wider, not wrong."""


@dataclass(frozen=True)
class Program:
    """A network as affine maps of everything before: ``v = x``; per layer ``v = [v, relu(A v + b)]``; then logits.

    ``layers``: A [neurons, len(v)] and b of each group of ReLUs; ``head``: those of the logits. Residual sums, folded
    batch norms and convolutions are all in the matrices.
    """

    inputs: int
    layers: tuple[tuple[Array, Array], ...]
    head: tuple[Array, Array]


@dataclass(frozen=True)
class Exact:
    """``low <= min over the box and the other classes of logit[label] - logit[j] <= high``.

    ``high`` is what the network computes in float64 at ``witness``, so it holds whatever the solver did; ``low`` is the
    solver's proof. ``unstable``: ReLUs that interval arithmetic, layer by layer, leaves unstable.
    """

    low: float
    high: float
    witness: Array
    unstable: int


def dense(layers: list[tuple[Array, Array]]) -> Program:
    """The program of linear layers, weight [out, in] and bias [out], with ReLUs between them."""
    widths = [layers[0][0].shape[1]]
    found = []
    for weight, bias in layers:
        found.append((np.hstack([np.zeros((len(bias), sum(widths[:-1]))), weight]), bias))
        widths.append(len(bias))
    return Program(widths[0], tuple(found[:-1]), found[-1])


def unroll(graph: Graph, params: Params) -> Program:
    """The program of a graph without batch norm and max pooling (``compression.materialize`` folds the former)."""
    inputs = int(np.prod(graph.input_shape))
    tensors = {k: v.detach().double().numpy() for k, v in params.items()}
    maps: dict[str, tuple[Array, Array]] = {}  # value of a node [features] = A v + b
    shapes: dict[str, tuple[int, ...]] = {}
    layers: list[tuple[Array, Array]] = []
    size = inputs
    for node in graph.nodes:
        if node.op == "input":
            maps[node.name], shapes[node.name] = (np.eye(inputs), np.zeros(inputs)), tuple(graph.input_shape)
            continue
        (matrix, offset), shape = maps[node.inputs[0]], shapes[node.inputs[0]]
        if node.op == "relu":
            layers.append((_columns(matrix, size), offset))
            matrix = np.hstack([np.zeros((len(offset), size)), np.eye(len(offset))])
            size, offset = size + len(offset), np.zeros(len(offset))
        elif node.op == "add":
            other, more = maps[node.inputs[1]]
            matrix, offset = _columns(matrix, size) + _columns(other, size), offset + more
        elif node.op == "flatten":
            shape = (len(offset),)
        else:
            weight, bias, shape = _matrix(node, tensors, shape)
            matrix, offset = weight @ matrix, weight @ offset + bias
        maps[node.name], shapes[node.name] = (matrix, offset), shape
    matrix, offset = maps[graph.output.name]
    return Program(inputs, tuple(layers), (_columns(matrix, size), offset))


def _columns(matrix: Array, size: int) -> Array:
    return np.pad(matrix, ((0, 0), (0, size - matrix.shape[1])))


def _matrix(node: Node, tensors: dict[str, Array], shape: tuple[int, ...]) -> tuple[Array, Array, tuple[int, ...]]:
    """Matrix, bias and output shape of one linear node, a convolution entry by entry."""
    if node.op == "scale_shift":
        repeat = int(np.prod(shape[1:]))
        scale, shift = (tensors[f"{node.name}.{k}"] for k in ("scale", "shift"))
        return np.diag(np.repeat(scale, repeat)), np.repeat(shift, repeat), shape
    if node.op not in ("linear", "conv2d"):
        raise ValueError(f"the oracle knows no {node.op!r} (node {node.name!r})")
    weight = tensors[f"{node.name}.weight"]
    bias = tensors.get(f"{node.name}.bias", np.zeros(len(weight)))
    if node.op == "linear":
        return weight, bias, (len(weight),)
    (top, left), (down, right), (tall, wide) = node["padding"], node["stride"], node["dilation"]
    channels, height, width = shape
    out, fan, kernel_h, kernel_w = weight.shape
    rows = (height + 2 * top - tall * (kernel_h - 1) - 1) // down + 1
    columns = (width + 2 * left - wide * (kernel_w - 1) - 1) // right + 1
    matrix = np.zeros((out, rows, columns, channels, height, width))
    for o, i, j, c, a, b in np.ndindex(out, rows, columns, fan, kernel_h, kernel_w):
        y, x = i * down - top + a * tall, j * right - left + b * wide
        if 0 <= y < height and 0 <= x < width:
            matrix[o, i, j, o // (out // node["groups"]) * fan + c, y, x] = weight[o, c, a, b]
    return matrix.reshape(out * rows * columns, -1), np.repeat(bias, rows * columns), (out, rows, columns)


def evaluate(program: Program, x: Array) -> Array:
    """Logits of one input, flattened."""
    v = x
    for matrix, offset in program.layers:
        v = np.concatenate([v, np.maximum(matrix @ v + offset, 0)])
    return program.head[0] @ v + program.head[1]


def margin(program: Program, x: Array, label: int) -> float:
    """Smallest ``logit[label] - logit[j]`` over the other classes."""
    logits = evaluate(program, x)
    return float(logits[label] - np.delete(logits, label).max())


def box(image: Array, epsilon: float) -> tuple[Array, Array]:
    """The linf ball within the domain [0, 1]."""
    return np.clip(image - epsilon, 0, 1), np.clip(image + epsilon, 0, 1)


def interval(matrix: Array, offset: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """Ends of ``matrix @ v + offset`` for v between low and high."""
    positive, negative = np.maximum(matrix, 0), np.minimum(matrix, 0)
    return positive @ low + negative @ high + offset, positive @ high + negative @ low + offset


def unstable_relus(program: Program, lower: Array, upper: Array) -> int:
    """ReLUs whose sign interval arithmetic, layer by layer, leaves open."""
    low, high, count = lower, upper, 0
    for matrix, offset in program.layers:
        z_low, z_high = interval(matrix, offset, low, high)
        count += int(((z_low < 0) & (z_high > 0)).sum())
        low, high = np.append(low, np.maximum(z_low, 0)), np.append(high, np.maximum(z_high, 0))
    return count


class _Encoding:
    """The network over the box as constraints on y = (inputs, values of unstable ReLUs); stable ones are substituted.

    ``shape``, ``offset``: v = shape @ y + offset, row by row.
    """

    def __init__(self, program: Program, lower: Array, upper: Array) -> None:
        self.low, self.high = [*map(float, lower)], [*map(float, upper)]
        self.shape, self.offset = np.eye(len(lower)), np.zeros(len(lower))
        self.unstable: list[tuple[int, Array, float, float, float]] = []  # column, coefficients and offset of z, ends
        for number, (matrix, offset) in enumerate(program.layers):
            self._add(matrix @ self.shape, matrix @ self.offset + offset, tighten=number > 0)

    def _add(self, matrix: Array, offset: Array, *, tighten: bool) -> None:
        z_low, z_high = interval(matrix, offset, np.array(self.low), np.array(self.high))
        if tighten:
            for i in ((z_low < 0) & (z_high > 0)).nonzero()[0]:
                z_high[i] = min(z_high[i], -self.minimize(-matrix[i]) + offset[i] + SLACK)
                if z_high[i] > 0:
                    z_low[i] = max(z_low[i], self.minimize(matrix[i]) + offset[i] - SLACK)
        open_ = (z_low < 0) & (z_high > 0)
        rows = np.pad(np.where((z_low >= 0)[:, None], matrix, 0.0), ((0, 0), (0, int(open_.sum()))))
        for i in open_.nonzero()[0]:
            column = len(self.low)
            self.unstable.append((column, matrix[i], float(offset[i]), float(z_low[i]), float(z_high[i])))
            rows[i, column] = 1.0
            self.low.append(0.0)
            self.high.append(float(z_high[i]))
        self.shape = np.vstack([_columns(self.shape, len(self.low)), rows])
        self.offset = np.append(self.offset, np.where(z_low >= 0, offset, 0.0))

    def constraints(self, exact: bool) -> LinearConstraint | tuple[()]:
        """Rows over y, and over one binary per unstable ReLU behind it if ``exact``, else the triangle relaxation."""
        columns, rows, low, high = len(self.low), [], [], []
        width = columns + (len(self.unstable) if exact else 0)
        for number, (column, factors, offset, z_low, z_high) in enumerate(self.unstable):
            above = np.zeros(width)  # value - z >= 0
            above[: len(factors)], above[column] = -factors, 1.0
            rows.append(above)
            low.append(offset)
            high.append(np.inf)
            if exact:
                below, closed = above.copy(), np.zeros(width)
                below[columns + number] = -z_low  # value - z <= -z_low (1 - on)
                closed[column], closed[columns + number] = 1.0, -z_high  # value <= z_high on
                rows += [below, closed]
                low += [-np.inf, -np.inf]
                high += [offset - z_low, 0.0]
            else:
                slope, chord = z_high / (z_high - z_low), np.zeros(width)  # value <= slope (z - z_low)
                chord[: len(factors)], chord[column] = -slope * factors, 1.0
                rows.append(chord)
                low.append(-np.inf)
                high.append(slope * (offset - z_low))
        return LinearConstraint(np.array(rows), low, high) if rows else ()

    def minimize(self, goal: Array) -> float:
        """Least value of ``goal @ y`` in the triangle relaxation; -inf where the solver gives none."""
        solution = milp(
            _columns(goal[None], len(self.low))[0],
            bounds=Bounds(self.low, self.high),
            constraints=self.constraints(exact=False),
        )
        return float(solution.fun) if solution.status == 0 else -np.inf

    def solve(self, goal: Array, gap: float) -> tuple[float, Array]:
        """Proved lower bound of ``goal @ y`` in the network itself, and the inputs of the best solution (or none)."""
        binaries = len(self.unstable)
        for presolve in (True, False):  # HiGHS fails on a few programs; without its presolve it does not
            options: dict[str, Any] = {"mip_rel_gap": gap, "time_limit": SECONDS, "presolve": presolve}
            solution = milp(
                np.append(_columns(goal[None], len(self.low))[0], np.zeros(binaries)),
                integrality=[0] * len(self.low) + [1] * binaries,
                bounds=Bounds([*self.low, *[0.0] * binaries], [*self.high, *[1.0] * binaries]),
                constraints=self.constraints(exact=True),
                options=options,
            )
            if solution.status in (0, 1):
                break
        else:
            return -np.inf, np.array([])
        proof = solution.fun if not binaries else solution.mip_dual_bound
        return (-np.inf if proof is None else float(proof)), np.array([] if solution.x is None else solution.x)


def smallest_margin(program: Program, lower: Array, upper: Array, label: int, gap: float = 1e-5) -> Exact:
    """The exact smallest margin of ``label`` over the box [lower, upper], flattened inputs, up to the solver's gap."""
    encoding = _Encoding(program, lower, upper)
    head = program.head[0] @ encoding.shape, program.head[0] @ encoding.offset + program.head[1]
    goals = {j: (head[0][label] - head[0][j], float(head[1][label] - head[1][j])) for j in range(len(head[1]))}
    del goals[label]
    proofs = {j: encoding.minimize(goal) + offset - SLACK for j, (goal, offset) in goals.items()}
    witness = np.clip((lower + upper) / 2, lower, upper)
    high = margin(program, witness, label)
    for other in sorted(proofs, key=lambda j: proofs[j]):
        if proofs[other] >= high:
            break  # neither this class nor a later one can be below what is known
        goal, offset = goals[other]
        proof, solution = encoding.solve(goal, gap)
        proofs[other] = max(proofs[other], proof + offset)
        if len(solution):
            point = np.clip(solution[: program.inputs], lower, upper)
            value = margin(program, point, label)
            if value < high:
                witness, high = point, value
    return Exact(min(proofs.values()), high, witness, unstable_relus(program, lower, upper))
