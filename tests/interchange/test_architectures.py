"""Every architecture of ours, with and without batch norm, from the module to the file and through the bounds."""

import pytest
import torch
from torch import Tensor

from cactus_ray.bounds import interval, linear
from cactus_ray.bounds.graph import Graph, Params, forward, is_buffer
from cactus_ray.compression.channels import channel_groups
from cactus_ray.compression.levels import parse_level
from cactus_ray.compression.materialize import Compressed, materialize, remove_channels
from cactus_ray.compression.prune import apply_masks, masks
from cactus_ray.config import DataConfig, ModelConfig, RunConfig, ThreatConfig
from cactus_ray.interchange import run
from cactus_ray.interchange.read import read_onnx
from cactus_ray.interchange.write import FileInfo, onnx_bytes
from cactus_ray.models import create

SHAPE = (3, 8, 8)
SUBJECTS = [("mlp", False), ("mlp", True), ("cnn_small", False), ("cnn5", False), ("cnn5", True), ("cnn7", False),
            ("cnn7", True), ("resnet18", False), ("resnet18", True)]  # fmt: skip
LEVELS = (
    "dense",
    "bf16",
    "int8",
    "int4:affine",
    "prune:gu-l1:0.9+int3",
    "prune:gs-l2:0.5+rebn+int5",
    "prune:ls-l1:0.6",
)
IMAGES = torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(40) % 4


def network(name: str, batch_norm: bool) -> tuple[Graph, Params]:
    """With batch-norm statistics of some images and a channel scale that is not one, so that folding has work."""
    model = ModelConfig(name=name, width=0.07 if name == "resnet18" else 0.1, hidden=(160, 90), batch_norm=batch_norm)
    config = RunConfig(data=DataConfig(name="cifar10"), model=model, threat=ThreatConfig(epsilon=0.01))
    found = create(config, SHAPE, 4)
    generator = torch.Generator().manual_seed(2)
    params = dict(found.params)
    for key, tensor in params.items():
        if tensor.dim() == 1 and not is_buffer(key):
            params[key] = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
    return found.graph, params


def compressed(name: str, batch_norm: bool, level: str) -> Compressed:
    return materialize(*network(name, batch_norm), parse_level(level), (IMAGES, LABELS))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("name", "batch_norm"), SUBJECTS)
def test_the_file_is_the_network(name: str, batch_norm: bool, level: str) -> None:
    subject = compressed(name, batch_norm, level)
    data = onnx_bytes(subject, FileInfo("cifar10", ("a", "b", "c", "d"), (0.0, 1.0)))
    graph, params, metadata = read_onnx(data)
    assert graph == subject.graph
    assert metadata["cactus_ray.level"] == level
    assert all(torch.equal(params[key], tensor) for key, tensor in subject.params.items())
    logits = forward(graph, params, IMAGES)
    assert (run.logits(data, IMAGES) - logits).abs().max() < 1e-4 * max(1.0, float(logits.abs().max()))


@pytest.mark.parametrize("family", ["gs-l2", "ls-l1"])
@pytest.mark.parametrize(("name", "batch_norm"), SUBJECTS)
def test_the_small_network_is_the_masked_one(name: str, batch_norm: bool, family: str) -> None:
    graph, params = network(name, batch_norm)
    wide = {k: v.double() for k, v in params.items()}
    found = masks(graph, wide, family, 0.5)
    masked = apply_masks(wide, found)
    small_graph, small = remove_channels(graph, masked, found)
    x = IMAGES[:4].double()
    assert (forward(graph, masked, x) - forward(small_graph, small, x)).abs().max() < 1e-10
    boxes = [
        interval.propagate(g, p, interval.ball(x, 0.02, (0, 1))) for g, p in ((graph, masked), (small_graph, small))
    ]
    assert (boxes[0].lower - boxes[1].lower).abs().max() < 1e-10
    assert (boxes[0].upper - boxes[1].upper).abs().max() < 1e-10
    assert sum(v.numel() for v in small.values()) < sum(v.numel() for v in params.values())


def _corners(box: interval.Box, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, (count, *box.center.shape), generator=generator) * 2 - 1
    return box.center + signs * box.radius


@pytest.mark.parametrize("level", ["dense", "prune:gs-l2:0.5+rebn+int5"])
@pytest.mark.parametrize(("name", "batch_norm"), SUBJECTS)
def test_bounds_hold_at_corners(name: str, batch_norm: bool, level: str) -> None:
    subject = compressed(name, batch_norm, level)
    graph, params = subject.graph, {k: v.double() for k, v in subject.params.items()}
    x, labels = IMAGES[:1].double(), LABELS[:1]
    box = interval.ball(x, 0.005, (0.0, 1.0))
    known = interval.margins(graph, params, box, labels)
    lower = linear.crown_margins(graph, params, box, labels, known=known)
    for points in _corners(box, 20):
        logits = forward(graph, params, points)
        true = logits.gather(1, labels[:, None]) - logits
        assert (known <= true + 1e-9).all()
        assert (lower <= true + 1e-9).all()
    assert (lower >= known).all()


def test_the_stages_of_a_residual_network_share_their_channels() -> None:
    graph, params = network("resnet18", True)
    groups = channel_groups(graph, params)
    shared = [g.producers for g in groups if len(g.producers) > 1]
    assert shared[0] == ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    assert shared[1] == ("layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2")
    assert len(groups) == 4 + 8  # one per stage, one inside every block
