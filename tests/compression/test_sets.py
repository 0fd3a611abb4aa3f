import pytest
import torch

from cactus_ray.bounds.graph import Graph, Node, Params
from cactus_ray.compression.sets import draw, prunings
from cactus_ray.config import STRATEGIES, CompressionSetConfig
from cactus_ray.errors import ConfigError


def _network(weight: torch.Tensor) -> tuple[Graph, Params]:
    nodes = (Node("input", "input"), Node("fc", "linear", ("input",)))
    return Graph(nodes, (weight.shape[1],)), {"fc.weight": weight}


def _draw(
    progress: float = 0.0, seed: int = 0, weight: torch.Tensor | None = None, **settings: object
) -> tuple[float, ...]:
    graph, params = _network(torch.ones(2, 5) if weight is None else weight)
    config = CompressionSetConfig(**settings)  # type: ignore[arg-type]
    return draw(config, progress, torch.Generator().manual_seed(seed), graph, params)


@pytest.mark.parametrize(
    ("strategy", "size", "members"),
    [("none", 3, 0), ("single", 3, 1), ("triple", 3, 3), ("random", 5, 4), ("fixed", 4, 3), ("dense", 3, 5),
     ("progressive", 3, 1), ("adaptive", 3, 3)],
)  # fmt: skip
def test_number_of_members(strategy: str, size: int, members: int) -> None:
    assert len(_draw(strategy=strategy, size=size)) == members


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_sparsities_are_valid_and_within_low_and_high(strategy: str, progress: float) -> None:
    found = _draw(progress, strategy=strategy, low=0.3, high=0.9)
    assert all(0.0 <= s < 1.0 for s in found)
    if strategy != "adaptive":
        assert all(0.3 <= s <= 0.9 + 1e-12 for s in found)


def test_the_papers_fixed_and_dense_sets() -> None:
    assert _draw(strategy="fixed", size=4) == pytest.approx((0.25, 0.5, 0.75))
    assert _draw(strategy="dense", low=0.15, high=0.75) == pytest.approx((0.15, 0.3, 0.45, 0.6, 0.75))
    assert _draw(strategy="fixed", size=2) == (0.5,)


def test_progressive_rises_linearly() -> None:
    assert [_draw(p, strategy="progressive")[0] for p in (0.0, 0.5, 1.0)] == pytest.approx([0.25, 0.5, 0.75])


def test_random_draws_follow_the_generator_and_fill_the_range() -> None:
    assert _draw(strategy="triple", seed=7) == _draw(strategy="triple", seed=7)
    assert _draw(strategy="triple", seed=7) != _draw(strategy="triple", seed=8)
    many = [_draw(strategy="single", seed=i)[0] for i in range(300)]
    assert min(many) < 0.27
    assert max(many) > 0.73


def test_adaptive_removes_shares_of_the_squared_weight() -> None:
    # Squares 1 x 90 and 10 x 91: total 1000, so 1, 5 and 10 % are the 10, 50 and 90 (100) smallest of 181.
    weight = torch.cat([torch.ones(90), torch.full((91,), 10.0**0.5)]).view(1, -1)
    assert _draw(strategy="adaptive", weight=weight) == pytest.approx((10 / 181, 50 / 181, 91 / 181))


def test_without_channels_every_member_is_of_the_family_and_nothing_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    config = CompressionSetConfig(family="lu-l2", channels=0.0)
    assert prunings(config, (0.3, 0.7), generator) == [("lu-l2", 0.3), ("lu-l2", 0.7)]
    assert config == CompressionSetConfig(family="lu-l2")  # the same run
    assert torch.equal(generator.get_state(), before)


def test_with_channels_every_second_member_loses_its_share_of_them() -> None:
    config = CompressionSetConfig(family="gu-l2", low=0.0, high=0.8, channels=0.5)
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(prunings(config, (0.4, 0.8, 0.0), generator)) for _ in range(30)}
    assert drawn == {
        (("gu-l2", 0.4), ("gs-l2", 0.5), ("gu-l2", 0.0)),
        (("gs-l2", 0.25), ("gu-l2", 0.8), ("gs-l2", 0.0)),
    }


def test_a_single_member_loses_channels_half_of_the_time() -> None:
    config = CompressionSetConfig(family="lu-l1", high=0.9, channels=0.5)
    generator = torch.Generator().manual_seed(0)
    families = [prunings(config, (0.9,), generator)[0] for _ in range(400)]
    assert set(families) == {("lu-l1", 0.9), ("ls-l2", 0.5)}
    assert 150 < families.count(("ls-l2", 0.5)) < 250


def test_adaptive_sparsities_above_high_lose_no_more_channels() -> None:
    config = CompressionSetConfig(strategy="adaptive", low=0.0, high=0.0, channels=0.5)
    generator = torch.Generator().manual_seed(0)
    found = {made for _ in range(20) for made in prunings(config, (0.9,), generator)}
    assert found == {("gu-l1", 0.9), ("gs-l2", 0.5)}


def test_channels_are_refused_where_every_member_loses_them_already() -> None:
    with pytest.raises(ConfigError, match=r"compression_set.channels.*0.5.*gs-l2"):
        CompressionSetConfig(family="gs-l2", channels=0.5)


def test_channels_are_ranked_by_gradients_where_weights_are() -> None:
    config = CompressionSetConfig(family="gu-grad", high=0.9, channels=0.5)
    generator = torch.Generator().manual_seed(0)
    assert {prunings(config, (0.9,), generator)[0] for _ in range(20)} == {("gu-grad", 0.9), ("gs-grad", 0.5)}
