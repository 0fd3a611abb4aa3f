"""Every loss worked out by hand on a 2-2-2 network.

Around x = (0.5, 0.25), radius 0.1, label 0. With h the two hidden neurons after ReLU, the logits are (h0 + 0.5,
h1 - h0), and the margin is m = 2 h0 - h1 + 0.5.

Ball: fc1 has centre (0.25, 0.25), radius (0.2, 0.3), so boxes [0.05, 0.45] and [-0.05, 0.55]; after ReLU [0.05, 0.45]
and [0, 0.55]. Elided m lies in [0.1 - 0.55 + 0.5, 0.9 - 0 + 0.5] = [0.05, 1.4].

Point (0.4, 0.35), a corner: h = (0.05, 0.15), m = 0.1 - 0.15 + 0.5 = 0.45.
"""

import math

import pytest
import torch

from cactus_ray.bounds.graph import Graph, Params
from cactus_ray.bounds.interval import ball, margins
from cactus_ray.training.losses import CERTIFIED_LOSSES, LossOptions, Region, standard

IMAGE, LABEL, POINT = torch.tensor([[0.5, 0.25]]), torch.tensor([0]), torch.tensor([[0.4, 0.35]])


def ce(margin: float) -> float:
    """Cross-entropy of two classes at a margin."""
    return math.log(1 + math.exp(-margin))


def fused(margin: float) -> float:
    """What the chord of exp(-m) over [0.05, 1.4] makes of a lower bound of the margin, plus the label's own 1."""
    slope = (math.exp(-1.4) - math.exp(-0.05)) / 1.35
    return 1 + math.exp(-0.05) + slope * (margin - 0.05)


VALUES = {
    "ibp": ("ibp", {}, ce(0.05)),
    "pgd": ("pgd", {}, ce(0.45)),
    # Radius 0.05, and the point pushed to the centre (0.45, 0.3). fc1: centre (0.15, 0.2), radius (0.1, 0.15), so
    # [0.05, 0.25] and [0.05, 0.35]. Lowest m = 0.1 - 0.35 + 0.5 = 0.25.
    "sabr": ("sabr", {"box_ratio": 0.5}, ce(0.25)),
    # The whole ball: only the second neuron, [-0.05, 0.55], is unstable; its upper end shrinks to 0.44, and m to
    # 0.1 - 0.44 + 0.5 = 0.16.
    "sabr, shrunk": ("sabr", {"box_ratio": 1.0, "relu_shrinkage": 0.8}, ce(0.16)),
    "mtl_ibp": ("mtl_ibp", {"ibp_weight": 0.25}, 0.25 * ce(0.05) + 0.75 * ce(0.45)),
    # 0.25 * 0.05 + 0.75 * 0.45 = 0.35
    "cc_ibp": ("cc_ibp", {"ibp_weight": 0.25}, ce(0.35)),
    "exp_ibp": ("exp_ibp", {"ibp_weight": 0.25}, ce(0.05) ** 0.25 * ce(0.45) ** 0.75),
    # Behind the ReLU m is linear: the attack on the box finds its corner, the interval bound itself.
    "taps, last layer": ("taps", {"tail_layers": 1}, ce(0.05) * ce(0.05)),
    # The attack on the input ball: x0 - x1 >= 0.05 is active, so m = 2 x0 - 2 x1 - relu(2 x0 + x1 - 1) + 0.5, which
    # falls with x1. At x1 = 0.35 the second neuron is active for all x0 in [0.4, 0.6], and m = 1.5 - 3 x1 = 0.45.
    "taps, both layers": ("taps", {"tail_layers": 2}, ce(0.45) * ce(0.05)),
    # The box of sabr is [0.4, 0.5] x [0.25, 0.35]: 0.45 again by attack, 0.25 by intervals.
    "staps": ("staps", {"tail_layers": 2, "box_ratio": 0.5}, ce(0.45) * ce(0.25)),
    # h0 = x0 - x1. The chord of the second ReLU over [-0.05, 0.55] has slope 11/12: h1 <= 11/12 (2 x0 + x1 - 0.95).
    # m >= x0 / 6 - 35/12 x1 + 0.5 + 11/12 * 0.95, lowest at (0.4, 0.35): 0.4/6 - 12.25/12 + 0.5 + 10.45/12 = 5/12.
    "crown_ibp": ("crown_ibp", {"crown_weight": 1.0}, math.log(fused(5 / 12))),
    "crown_ibp, half": ("crown_ibp", {"crown_weight": 0.5}, math.log((fused(5 / 12) + 1 + math.exp(-0.05)) / 2)),
    "crown_ibp, none": ("crown_ibp", {"crown_weight": 0.0}, ce(0.05)),
}


@pytest.mark.parametrize("case", VALUES)
def test_loss_by_hand(case: str, tiny: tuple[Graph, Params], generator: torch.Generator) -> None:
    name, options, expected = VALUES[case]
    region = Region(LABEL, ball(IMAGE, 0.1, (0.0, 1.0)), POINT, generator)
    assert CERTIFIED_LOSSES[name](*tiny, region, LossOptions(**options)).item() == pytest.approx(expected, rel=1e-5)


def test_every_loss_has_a_value_by_hand() -> None:
    assert {name for name, _, _ in VALUES.values()} == set(CERTIFIED_LOSSES)


def test_clean_loss_and_bound_by_hand(tiny: tuple[Graph, Params]) -> None:
    assert standard(*tiny, IMAGE, LABEL, {}).item() == pytest.approx(ce(0.75), 1e-5)  # h = (0.25, 0.25)
    lower = margins(*tiny, ball(IMAGE, 0.1, (0.0, 1.0)), LABEL)
    torch.testing.assert_close(lower, torch.tensor([[0.0, 0.05]]))
