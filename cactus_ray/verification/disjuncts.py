"""Cases of specifications over many free inputs: alpha-CROWN, then branch and bound over ReLUs.

The forms of a case become the outputs of a network: a linear layer behind its last one gives ``A y - b``. A disjunct is
excluded where on every sub-domain one of its outputs, or a mixture of them with weights >= 0, is above 0; which one,
each sub-domain chooses for itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cactus_ray.bounds.alpha import Margins, alpha_forms
from cactus_ray.bounds.ascent import Search
from cactus_ray.bounds.graph import Graph, Node, forward
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.linear import Effort
from cactus_ray.bounds.rounding import Rounding
from cactus_ray.bounds.splits import Network
from cactus_ray.verification.branch import ATTACK_STEPS, Branching
from cactus_ray.verification.soundness import Model
from cactus_ray.verification.tree import Budget, Tree
from cactus_ray.verification.unsafe import Unsafe
from cactus_ray.verification.witness import ContradictionError, Replay, Witness, confirmed, descend

FORMS = "A y - b"
"""Name of the layer that gives the forms."""
ALPHA_STEPS = 20
"""Steps of the search for slopes; a sub-problem gets half."""
ALPHA_SHARE = 0.5
"""Of the time that is left, what the search for slopes may take: branch and bound makes more of the rest."""


@dataclass(frozen=True, slots=True)
class Proof:
    """A counterexample, or what stands in the way of a proof (empty: nothing); ``nodes``: sub-problems bounded."""

    witness: Witness | None
    reason: str
    nodes: int


def with_forms(model: Model, unsafe: Unsafe) -> Model:
    """The network whose outputs [N, R] are ``A y - b`` of the case's forms; b is rounded up, so they are no larger."""
    name = FORMS
    while any(node.name == name for node in model.graph.nodes):  # names come from the file
        name += "_"
    last = Node(name, "linear", (model.graph.output.name,))
    params = model.double | {f"{name}.weight": unsafe.rows, f"{name}.bias": -unsafe.bounds}
    return Model.of(Graph((*model.graph.nodes, last), model.graph.input_shape), params)


def prove(
    model: Model,
    unsafe: Unsafe,
    replay: Replay,
    known: tuple[Mapping[str, Box], Tensor],
    *,
    arithmetic: str,
    deadline: float,
) -> Proof:
    """Whether no disjunct of the case is possible; deterministic unless the deadline strikes.

    ``known``: over the case's whole box, boxes of the network's nodes and bounds [1, R] of the forms ``A y``. A proof
    is a float64 bound with its rounding charged, and that of ``arithmetic``; ``deadline``: of ``time.perf_counter``.
    Raises ContradictionError where a bound is above what the network gives at a point that was tried.
    """
    boxes, floors = known
    whole = with_forms(model, unsafe)
    rounding = Rounding.of(whole.graph, whole.double, arithmetic)
    network = Network(whole.graph, whole.double, whole.single, rounding)
    last = model.graph.output
    out = rounding.step(last, whole.double, [boxes[name] for name in last.inputs])
    goals = _Disjuncts(model, unsafe, replay)
    now = time.perf_counter()
    alpha_deadline = now + ALPHA_SHARE * (deadline - now)
    margins = alpha_forms(
        network,
        {**boxes, last.name: out},
        floors - unsafe.bounds,
        goals,
        effort=Effort(deadline=alpha_deadline),
        how=Search(ALPHA_STEPS, deadline=alpha_deadline),
    )
    box = boxes[model.graph.nodes[0].name]
    goals.see(torch.cat([box.center, box.lower, box.upper]))
    goals.check(dict(enumerate(unsafe.worst(margins.lower)[0].tolist())))
    left = goals.left(margins)
    opened, disjuncts = goals.seeds(margins, left)
    budget = Budget(nodes=2**62, seconds=torch.inf, iterations=-(-ALPHA_STEPS // 2), deadline=deadline)
    work = Branching(whole, goals, margins, budget, [Tree(0, 0.0)])
    work.run(opened, disjuncts)
    (tree,) = work.trees
    proved = tree.bounds()
    goals.check(proved)
    missing = any(not 0 < proved.get(d, -torch.inf) < torch.inf for d in left)
    return Proof(goals.witness, tree.reason(budget) or ("bounds" if missing else ""), tree.nodes)


@dataclass(slots=True)
class _Disjuncts:
    """The disjuncts of one case as goals of branch and bound. ``least`` [D]: the smallest excess at a point tried."""

    model: Model
    unsafe: Unsafe
    replay: Replay
    least: Tensor = field(init=False)
    witness: Witness | None = None

    def __post_init__(self) -> None:
        self.least = torch.full((len(self.unsafe.members),), torch.inf, dtype=torch.float64)

    @property
    def incidence(self) -> Tensor:
        """Which forms [D, R] belong to which disjunct."""
        members = self.unsafe.members
        return torch.zeros(len(members), len(self.unsafe.rows), dtype=torch.bool).scatter(1, members, True)

    def rows(self, sample: Tensor, form: Tensor) -> Tensor:
        return torch.eye(len(self.unsafe.rows), dtype=torch.float64)[form]

    def open(self, lower: Tensor, target: float) -> Tensor:
        left = ~(self.unsafe.worst(lower) > target)  # NaN stays open
        return (left[:, :, None] & self.incidence).any(1)

    def members(self, goal: Tensor) -> Tensor | None:
        return self.incidence[goal] if self.unsafe.members.shape[1] > 1 else None

    def left(self, margins: Margins) -> list[int]:
        """The disjuncts that are not proved; NaN proves nothing."""
        found: list[int] = (~(self.unsafe.worst(margins.lower)[0] > 0)).nonzero()[:, 0].tolist()
        return found

    def seeds(self, margins: Margins, left: Sequence[int]) -> tuple[list[int], list[int]]:
        """Rows of the margins, and the disjuncts that they begin: of each its form with the largest bound.

        A disjunct none of whose forms has a row (its bounds became NaN at last) is not begun, and so not proved.
        """
        lower = margins.lower[0].nan_to_num(nan=-torch.inf)
        place = {form: row for row, form in enumerate(margins.other.tolist())}
        known = {d: [form for form in self.unsafe.members[d].tolist() if form in place] for d in left}
        best = {d: max(forms, key=lambda form: float(lower[form])) for d, forms in known.items() if forms}
        return [place[form] for form in best.values()], list(best)

    def clip(self, sample: Tensor, points: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(points.float(), self.unsafe.first), self.unsafe.last)

    def fallen(self, sample: Tensor, points: Tensor) -> Iterator[int]:
        self.see(points.double())
        if self.witness is None:
            self.witness = confirmed(self.model, self.unsafe, points, self.replay)
            if self.witness is not None:
                yield next(i for i, point in enumerate(points) if torch.equal(point, self.witness.inputs))

    def descend(self, sample: Tensor, goal: Tensor, points: Tensor) -> Tensor:
        return descend(self.model, self.unsafe, points, goal, ATTACK_STEPS)

    def see(self, points: Tensor) -> None:
        """Remember the excess of points [N, *input] of the box, float64, and a little more for its rounding."""
        with torch.no_grad():
            outputs = forward(self.model.graph, self.model.double, points)
        slack = 1e-9 * (1 + (outputs.abs() @ self.unsafe.rows.T.abs()).amax(1, keepdim=True))
        worst = self.unsafe.worst(self.unsafe.excess(outputs)) + slack
        self.least = torch.minimum(self.least, worst.amin(0))  # a NaN stays, and contradicts nothing

    def check(self, bounds: Mapping[int, float]) -> None:
        """Raises ContradictionError where a disjunct's bound is above its excess at a point that was seen."""
        for disjunct, bound in bounds.items():
            least = float(self.least[disjunct])
            if least < bound < torch.inf:
                raise ContradictionError(
                    f"unsound bound: disjunct {disjunct} of the unsafe set is claimed to be missed by {bound!r} at"
                    f" least, but at a point of the box it is missed by {least!r}"
                )
