"""Verdicts on networks with quantised activations: against what they compute, and never taken from the others."""

import math
import sys
from pathlib import Path

import pytest
import torch
from digits_subject import EPSILON, Subject
from torch import Tensor

from cactus_ray.bounds import interval
from cactus_ray.bounds.alpha import Search, alpha_margins
from cactus_ray.bounds.graph import forward
from cactus_ray.bounds.interval import Box
from cactus_ray.bounds.quantizer import QuantizeRelaxation, relax_quantize
from cactus_ray.bounds.rounding import Rounding
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import Compressed, materialize
from cactus_ray.config import ThreatConfig
from cactus_ray.errors import UnsupportedGraphError
from cactus_ray.verification import lirpa
from cactus_ray.verification.attack import attack
from cactus_ray.verification.branch import Budget, Outcome, branch
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.decide import Result, decide
from cactus_ray.verification.soundness import Batch, Model, replays
from cactus_ray.verification.verdict import SampleVerdict, Verdict, VerificationSettings
from cactus_ray.verification.vnnlib import parse_vnnlib

sys.path.append(str(Path(__file__).parents[1] / "bounds"))
from containment import points_of, steered_points
from quantised_networks import KINDS, beside_ties, examples, integers, on_the_grid


def outcomes(made: Compressed, batch: Batch, nodes: int = 60) -> tuple[Model, list[Outcome]]:
    model = Model.of(made.graph, made.params)
    charged = Rounding.of(model.graph, model.double, "float32")
    box = interval.ball(batch.images.double(), batch.epsilon, batch.domain)
    nothing = torch.full((len(batch), 3), -torch.inf, dtype=torch.float64).scatter(1, batch.labels[:, None], 0.0)
    how = Search(iterations=5)
    margins = alpha_margins(
        model.graph, model.double, box, batch.labels, known=nothing, how=how, rounding=charged
    )  # fmt: skip
    return model, branch(model, batch, margins, Budget(nodes=nodes, seconds=math.inf, iterations=5))


def above(made: Compressed, images: Tensor, epsilon: float) -> bool:
    """Whether a bound of branch and bound is above a margin at sampled or steered points."""
    labels = forward(made.graph, made.params, images).argmax(1)
    batch = Batch.of(images, labels, range(len(images)), epsilon, (0.0, 1.0))
    model, found = outcomes(made, batch)
    lower, wide = torch.stack([o.lower for o in found]), images.double()
    for i, outcome in enumerate(found):
        assert outcome.point is None or bool(replays(model, batch.select([i]), outcome.point[None])[0])
    points = [*points_of(wide, epsilon, 8, 0), *steered_points(made.graph, model.double, wide, epsilon, 2, 0)]
    points += [attack(model, batch, steps=20, restarts=2, seed=seed)[0].double() for seed in range(3)]
    for point in points:
        logits = forward(made.graph, model.double, point)
        if bool((lower > logits.gather(1, labels[:, None]) - logits + 1e-12).any()):
            return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_branch_and_bound_holds_at_sampled_points(kind: str) -> None:
    assert not above(integers(kind, 2), examples(2, 2), 0.05)
    assert not above(beside_ties(kind, 2), on_the_grid(beside_ties(kind, 2), 2), 0.02)


def test_a_half_knows_what_is_left_of_its_quantisers_and_a_fault_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantisers behind a split ReLU are relaxed on its half; on the half of the sibling, bounds are wrong."""
    cases = [(integers("mlp", seed), examples(3, seed), 0.15) for seed in range(6)]
    assert not any(above(*case) for case in cases)

    def of_sibling(self: QuantizeRelaxation, box: Box) -> QuantizeRelaxation:
        nothing = Box(torch.zeros_like(box.center), torch.zeros_like(box.radius))
        return relax_quantize(self.node, nothing, self.widening)

    monkeypatch.setattr(QuantizeRelaxation, "over", of_sibling)
    assert any(above(*case) for case in cases)


# --- a trained network -----------------------------------------------------------------------------------------------


def at(subject: Subject, level: str) -> Compressed:
    data = subject.images[:30], subject.labels[:30]
    return materialize(subject.graph, subject.params, parse_level(level), data)


def run(
    made: Compressed, subject: Subject, bound: str, epsilon: float = EPSILON, **options: object
) -> list[SampleVerdict]:
    settings = VerificationSettings(bound=bound, attack_steps=20, max_nodes=60, **options)  # type: ignore[arg-type]
    threat, indices = ThreatConfig(epsilon=epsilon), range(len(subject.labels))
    return verify(made.graph, made.params, subject.images, subject.labels, indices, threat, settings)


@pytest.mark.parametrize("level", ["w8a8", "prune:gu-l1:0.5+w8a8"])
def test_every_stage_decides_and_a_strong_attack_finds_nothing_more(subject: Subject, level: str) -> None:
    made = at(subject, level)
    found = {bound: run(made, subject, bound) for bound in ("ibp", "crown", "branch")}
    count = {b: sum(v.verdict is Verdict.CERTIFIED for v in found[b]) for b in found}
    assert 20 < count["ibp"] <= count["crown"] <= count["branch"]
    certified = [v.index for v in found["branch"] if v.verdict is Verdict.CERTIFIED]
    model = Model.of(made.graph, made.params)
    batch = Batch.of(subject.images, subject.labels, range(60), EPSILON, (0.0, 1.0)).select(certified)
    _, margins = attack(model, batch, steps=100, restarts=4, seed=99)
    assert bool((margins > 0).all())
    fallen = [v for v in found["branch"] if v.verdict is Verdict.FALSIFIED and v.decided_by != "clean"]
    assert fallen  # gradients go through quantisers
    for verdict in fallen:
        point = torch.tensor(verdict.counterexample).view(1, *subject.images.shape[1:])
        assert int(forward(made.graph, made.params, point).argmax()) != verdict.label


def test_verdicts_are_of_the_integers_not_of_the_weights(subject: Subject) -> None:
    """The same weights with activations in steps of a quarter of their range: another network, and other bounds."""
    made = at(subject, "w8a8")
    weights_only = at(subject, "int8")
    bounds = [
        [v.lower_bound for v in run(m, subject, "ibp") if v.lower_bound is not None] for m in (made, weights_only)
    ]
    assert bounds[0] != bounds[1]


def test_real_arithmetic_can_be_asked_for(subject: Subject) -> None:
    found = run(at(subject, "w8a8"), subject, "crown", arithmetic="real")
    assert sum(v.verdict is Verdict.CERTIFIED for v in found) > 20


def test_specifications_of_other_tools_are_decided() -> None:
    """A box around an image, and outputs that are just reached or far away."""
    made = integers("mlp")
    image = examples(1)[0]
    double = {k: v.double() for k, v in made.params.items()}
    here = float(forward(made.graph, double, image[None].double())[0, 0])
    lines = [f"(declare-const X_{i} Real)" for i in range(72)] + [f"(declare-const Y_{j} Real)" for j in range(3)]
    for i, pixel in enumerate(image.flatten().tolist()):
        lines.append(f"(assert (>= X_{i} {pixel - 0.01:.6f})) (assert (<= X_{i} {pixel + 0.01:.6f}))")
    for limit, expected in ((here - 0.01, Result.SAT), (here - 3.0, Result.UNSAT)):
        text = "\n".join([*lines, f"(assert (<= Y_0 {limit:.6f}))"])
        answer = decide(
            made.graph, double, parse_vnnlib(text), torch.arange(72),
            lambda points: forward(made.graph, made.params, points), timeout=math.inf,
        )  # fmt: skip
        assert answer.result is expected


def test_auto_lirpa_refuses_quantisers(subject: Subject) -> None:
    with pytest.raises(UnsupportedGraphError, match=r"quantiser .*auto_LiRPA has no such operator"):
        lirpa._check_operators(at(subject, "w8a8").graph)
