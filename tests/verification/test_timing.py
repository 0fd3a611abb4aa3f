"""The ledger of a verification's stages."""

import pytest
import torch

from cactus_ray.bounds.graph import Graph, Node
from cactus_ray.config import ThreatConfig
from cactus_ray.verification.cascade import verify
from cactus_ray.verification.timing import STAGES, book, stage_seconds
from cactus_ray.verification.verdict import VerificationSettings


def test_seconds_are_booked_by_stage_and_only_inside_the_block() -> None:
    book("clean", 1.0)  # nobody listens
    with stage_seconds() as outer:
        book("quick_attack", 1.0)
        with stage_seconds() as inner:
            book("full_attack", 2.0)
        book("full_attack", 4.0)
        book("linear_bounds", 8.0)
    book("linear_bounds", 16.0)
    assert (outer, inner) == ({"attack": 5.0, "crown": 8.0}, {"attack": 2.0})


@pytest.mark.parametrize(("bound", "last"), [("ibp", "ibp"), ("crown", "crown"), ("branch", "branch")])
def test_the_cascade_books_the_stages_that_it_runs(bound: str, last: str, generator: torch.Generator) -> None:
    nodes = (
        Node("x", "input"), Node("a", "linear", ("x",)), Node("r", "relu", ("a",)), Node("b", "linear", ("r",)),
    )  # fmt: skip
    params = {
        f"{name}.{kind}": torch.randn(*shape, generator=generator)
        for name, rows, columns in (("a", 12, 4), ("b", 3, 12))
        for kind, shape in (("weight", (rows, columns)), ("bias", (rows,)))
    }
    images = torch.rand(8, 4, generator=generator)
    graph = Graph(nodes, (4,))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    with stage_seconds() as seconds:
        found = verify(
            graph, params, images, labels, range(8), ThreatConfig(epsilon=0.1),
            VerificationSettings(bound=bound, attack_steps=2, targeted_runs=0, max_nodes=5),
        )  # fmt: skip
    assert {"clean", "attack", "ibp"} <= set(seconds) <= set(STAGES[: STAGES.index(last) + 1])
    assert sum(seconds.values()) == pytest.approx(sum(v.seconds for v in found))
