import compressible
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_ray.bounds.graph import Graph, Node, Params, forward
from cactus_ray.compression.channels import channel_groups
from cactus_ray.compression.prune import apply_masks, masks
from cactus_ray.errors import UnsupportedGraphError


def _line(*weights: torch.Tensor) -> tuple[Graph, Params]:
    """Linear layers in a row."""
    nodes, params = [Node("input", "input")], {}
    for i, weight in enumerate(weights):
        nodes.append(Node(f"fc{i}", "linear", (nodes[-1].name,)))
        params[f"fc{i}.weight"] = weight
    return Graph(tuple(nodes), (weights[0].shape[1],)), params


@given(
    n=st.integers(1, 40), sparsity=st.floats(0, 1, exclude_max=True), levels=st.integers(1, 5), seed=st.integers(0, 9)
)
@settings(max_examples=60, deadline=None)
def test_global_sparsity_is_exact_and_ties_fall_by_index(n: int, sparsity: float, levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-levels, levels + 1, (2, n), generator=generator).float()
    graph, params = _line(weight, torch.full((3, 2), 2.0))
    found = masks(graph, params, "gu-l1", sparsity)
    flat = torch.cat([found["fc0.weight"].flatten(), found["fc1.weight"].flatten()])
    scores = torch.cat([weight.flatten(), torch.full((6,), 2.0)]).abs()
    removed = round(sparsity * len(scores))
    order = sorted(range(len(scores)), key=lambda i: (float(scores[i]), i))
    assert sorted(order[:removed]) == (flat == 0).nonzero().flatten().tolist()


def test_local_sparsity_holds_in_every_tensor_the_classifier_included() -> None:
    graph, params = compressible.network("cnn")
    found = masks(graph, params, "lu-l2", 0.7)
    assert set(found) == {f"{n.name}.weight" for n in graph.weighted()}
    for name, mask in found.items():
        assert int((mask == 0).sum()) == round(0.7 * mask.numel())
        assert params[name][mask == 0].abs().max() <= params[name][mask == 1].abs().min()


def test_gradient_scores() -> None:
    graph, params = _line(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    gradients = {"fc0.weight": torch.tensor([[8.0, 1.0, -1.0, 0.0]])}
    assert masks(graph, params, "gu-grad", 0.5, gradients)["fc0.weight"].tolist() == [[1, 0, 1, 0]]
    with pytest.raises(ValueError, match="needs gradients"):
        masks(graph, params, "gu-grad", 0.5)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_impossible_sparsity(sparsity: float) -> None:
    with pytest.raises(ValueError, match="0 <= sparsity < 1"):
        masks(*_line(torch.ones(1, 2)), "gu-l1", sparsity)


def test_masks_carry_the_gradient_of_what_is_kept_only() -> None:
    graph, params = compressible.network("cnn", dtype=torch.float32)
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    found = masks(graph, leaves, "gu-l1", 0.6)
    assert not any(mask.requires_grad for mask in found.values())
    assert all(found[k].dtype == torch.float32 for k in found)
    forward(graph, apply_masks(leaves, found), compressible.images(4, dtype=torch.float32)).sum().backward()
    for name, mask in found.items():
        gradient = leaves[name].grad
        assert gradient is not None
        assert not gradient[mask == 0].any()


def test_groups_of_a_residual_network() -> None:
    groups = channel_groups(*compressible.network("residual"))
    assert [(g.size, g.producers) for g in groups] == [
        (6, ("stem",)),
        (5, ("inner",)),
        (4, ("outer", "shortcut", "again")),
        (7, ("hidden",)),
    ]
    assert groups[2].affine == ("norm",)
    assert groups[2].consumers == ("again", "hidden")


def test_image_and_classes_are_never_removed() -> None:
    for kind in compressible.KINDS:
        graph, params = compressible.network(kind)
        producers = {name for group in channel_groups(graph, params) for name in group.producers}
        assert graph.output.name not in producers


def test_channels_added_to_something_of_another_layout_stay() -> None:
    groups = channel_groups(*compressible.network("flat sum"))
    assert [g.producers for g in groups] == [("hidden",)]


def test_both_sides_of_a_depthwise_convolution_go_together() -> None:
    groups = channel_groups(*compressible.network("depthwise"))
    assert groups[0].producers == ("0", "3")
    assert groups[0].consumers == ("5",)


def test_other_grouped_convolutions_are_refused_by_name() -> None:
    attributes = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 2}
    nodes = (Node("input", "input"), Node("wide", "conv2d", ("input",), attributes))
    with pytest.raises(UnsupportedGraphError, match="'wide' has 2 groups"):
        masks(Graph(nodes, (4, 5, 5)), {"wide.weight": torch.ones(4, 2, 3, 3)}, "gs-l1", 0.5)


@pytest.mark.parametrize("kind", list(compressible.KINDS))
@pytest.mark.parametrize("scope", ["g", "l"])
@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.999])
def test_share_of_channels(kind: str, scope: str, sparsity: float) -> None:
    graph, params = compressible.network(kind)
    groups = channel_groups(graph, params)
    found = masks(graph, params, f"{scope}s-l2", sparsity)
    removed = [int((found[f"{g.producers[0]}.weight"].flatten(1)[:, 0] == 0).sum()) for g in groups]
    total = sum(g.size for g in groups)
    if scope == "g":
        assert sum(removed) == min(round(sparsity * total), total - len(groups))
    else:
        assert removed == [min(round(sparsity * g.size), g.size - 1) for g in groups]
    assert all(r < g.size for r, g in zip(removed, groups, strict=True))


def test_the_weakest_channels_go() -> None:
    graph, params = _line(torch.tensor([[3.0, 4.0], [6.0, 0.0], [0.1, 0.1]]), torch.ones(2, 3))
    assert masks(graph, params, "gs-l1", 0.5)["fc0.weight"][:, 0].tolist() == [1, 0, 0]
    assert masks(graph, params, "gs-l2", 0.5)["fc0.weight"][:, 0].tolist() == [0, 1, 0]
    gradients = {"fc0.weight": torch.tensor([[0.0, 0.0], [1.0, 0.0], [100.0, 0.0]]), "fc1.weight": torch.ones(2, 3)}
    assert masks(graph, params, "ls-grad", 0.4, gradients)["fc0.weight"][:, 0].tolist() == [0, 1, 1]
    equal = {**params, "fc0.weight": torch.ones(3, 2)}
    assert masks(graph, equal, "gs-l1", 0.99)["fc0.weight"][:, 0].tolist() == [0, 0, 1]
