"""Architectures as published, deterministic first weights, and the user's own networks."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cactus_ray.bounds.graph import Params, forward
from cactus_ray.config import DataConfig, ModelConfig, RunConfig, ThreatConfig
from cactus_ray.data import load
from cactus_ray.errors import ConfigError, UnsupportedGraphError, UserError
from cactus_ray.models import Normalize, build, create
from cactus_ray.models.build import NORMALIZATION


def run(data: str = "mnist", seed: int = 0, **model: object) -> RunConfig:
    return RunConfig(
        data=DataConfig(name=data),
        model=ModelConfig(**model),  # type: ignore[arg-type]
        threat=ThreatConfig(epsilon=0.1),
        seed=seed,
    )


def shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in params.items() if k.endswith(".weight")}


def test_cnn7_is_the_published_network() -> None:
    network = create(run("image_folder", name="cnn7"), (3, 32, 32), 10)
    weights = {n.name: network.params[f"{n.name}.weight"].numel() for n in network.graph.weighted()}
    assert sum(weights.values()) == 17_189_568  # 17.19 M
    assert weights["fc1"] / sum(weights.values()) == pytest.approx(0.976, abs=5e-4)
    found = network.graph.shapes(network.params)
    macs = sum(
        found[n.name][1] * found[n.name][2] * weights[n.name] if n.op == "conv2d" else weights[n.name]
        for n in network.graph.weighted()
    )
    assert macs == pytest.approx(150.7e6, rel=1e-3)
    assert [n.op for n in network.graph.nodes][:5] == ["input", "scale_shift", "conv2d", "batch_norm", "relu"]


def test_cnn7_on_mnist_and_its_width() -> None:
    weights = shapes(create(run(name="cnn7", width=0.25), (1, 28, 28), 10).params)
    assert weights["conv3.weight"] == (32, 16, 3, 3)
    assert weights["fc1.weight"] == (128, 32 * 14 * 14)
    assert weights["fc2.weight"] == (10, 128)


def test_cnn_small_on_large_and_on_small_images() -> None:
    assert shapes(create(run(name="cnn_small"), (1, 28, 28), 10).params) == {
        "conv1.weight": (16, 1, 4, 4),
        "conv2.weight": (32, 16, 4, 4),
        "fc1.weight": (100, 32 * 7 * 7),
        "fc2.weight": (10, 100),
    }
    digits = create(run("digits", name="cnn_small"), (1, 8, 8), 10)
    assert shapes(digits.params) == {
        "conv1.weight": (16, 1, 3, 3),
        "conv2.weight": (32, 16, 3, 3),
        "fc1.weight": (64, 32 * 4 * 4),
        "fc2.weight": (10, 64),
    }
    assert digits.graph["conv1"]["stride"] == (1, 1)
    assert digits.graph["conv2"]["stride"] == (2, 2)


def test_cnn5() -> None:
    network = create(run("cifar10", name="cnn5"), (3, 32, 32), 10)
    assert shapes(network.params) == {
        "conv1.weight": (32, 3, 3, 3),
        "conv2.weight": (64, 32, 3, 3),
        "conv3.weight": (64, 64, 3, 3),
        "fc1.weight": (256, 64 * 8 * 8),
        "fc2.weight": (10, 256),
    }
    assert network.graph.nodes[1].op == "scale_shift"
    assert all(n.op != "batch_norm" for n in network.graph.nodes)


def _wired(shape: tuple[int, ...], **model: object) -> tuple[list[tuple[int, ...]], list[str], dict[str, Any]]:
    """Output shapes of the convolutions, the operators that follow the stem, and the strides by name."""
    network = create(run("cifar10", name="resnet18", **model), shape, 10)
    found = network.graph.shapes(network.params)
    convolutions = [n for n in network.graph.nodes if n.op == "conv2d"]
    operators = [n.op for n in network.graph.nodes][:6]
    return [found[n.name] for n in convolutions], operators, {n.name: n["stride"] for n in convolutions}


def test_resnet18_is_torchvisions_with_another_stem_for_small_images() -> None:
    from torchvision.models import resnet18

    reference = {k: tuple(v.shape) for k, v in resnet18().state_dict().items() if "num_batches" not in k}
    large = create(run("cifar10", name="resnet18"), (3, 96, 96), 1000)
    ours = {k: tuple(v.shape) for k, v in large.params.items() if not k.startswith("normalize")}
    assert ours == reference
    small = create(run("cifar10", name="resnet18"), (3, 64, 64), 1000)
    ours = {k: tuple(v.shape) for k, v in small.params.items() if not k.startswith("normalize")}
    assert ours == reference | {"conv1.weight": (64, 3, 3, 3)}
    shapes_, operators, strides = _wired((3, 32, 32), width=0.25)
    assert operators == ["input", "scale_shift", "conv2d", "batch_norm", "relu", "conv2d"]
    assert shapes_[0] == (16, 32, 32)
    assert shapes_[-1] == (128, 4, 4)
    assert {k for k, v in strides.items() if v == (2, 2)} == {
        f"layer{i}.0.{name}" for i in (2, 3, 4) for name in ("conv1", "downsample.0")
    }
    assert _wired((3, 96, 96), width=0.25)[0][0] == (16, 48, 48)
    assert _wired((3, 96, 96), width=0.25)[1][5] == "max_pool2d"


def test_resnet18_computes_what_torchvisions_does(generator: torch.Generator) -> None:
    from torchvision.models import resnet18

    with torch.random.fork_rng(devices=[]):
        reference = resnet18(num_classes=10).eval()
    module = build(ModelConfig(name="resnet18"), (3, 96, 96), 10, generator=generator).eval()
    missing = module.load_state_dict(reference.state_dict(), strict=False)
    assert missing.missing_keys == ["normalize.scale", "normalize.shift"]
    assert not missing.unexpected_keys
    x = torch.rand(2, 3, 96, 96, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(module(x), reference((x - 0.5) / 0.25), rtol=1e-4, atol=1e-5)


def test_resnet18_without_batch_norm_has_biases() -> None:
    network = create(run("cifar10", name="resnet18", width=0.1, batch_norm=False), (3, 16, 16), 10)
    assert all(n.op != "batch_norm" for n in network.graph.nodes)
    assert all(f"{n.name}.bias" in network.params for n in network.graph.weighted())


def test_mlp_hidden_and_width() -> None:
    network = create(run("digits", name="mlp", hidden=(30, 20), width=0.5), (1, 8, 8), 10)
    assert shapes(network.params) == {"fc1.weight": (15, 64), "fc2.weight": (10, 15), "fc3.weight": (10, 10)}


@pytest.mark.parametrize("name", ["mlp", "cnn_small", "cnn5", "cnn7"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_batch_norm_follows_every_hidden_layer_or_none(name: str, batch_norm: bool) -> None:
    graph = create(run("digits", name=name, width=0.1, batch_norm=batch_norm), (1, 8, 8), 10).graph
    counts = [sum(n.op == op for n in graph.nodes) for op in ("batch_norm", "relu")]
    assert counts == [counts[1] if batch_norm else 0, len(graph.weighted()) - 1]
    assert graph.output.op == "linear"


def test_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (create(run("digits", seed=s, name="cnn_small"), (1, 8, 8), 10).params for s in (3, 3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not any(torch.equal(first[k], other[k]) for k in first)


def test_the_global_generator_is_neither_read_nor_moved(generator: torch.Generator) -> None:
    before = torch.random.get_rng_state()
    module = build(ModelConfig(name="mlp"), (1, 8, 8), 10, generator=generator)
    assert torch.equal(before, torch.random.get_rng_state())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(123)
        again = build(ModelConfig(name="mlp"), (1, 8, 8), 10, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_the_generator_moves_on(generator: torch.Generator) -> None:
    first, second = (build(ModelConfig(name="mlp"), (1, 8, 8), 10, generator=generator) for _ in range(2))
    assert not torch.equal(next(first.parameters()), next(second.parameters()))


@pytest.mark.parametrize("name", ["mlp", "cnn_small", "cnn5", "cnn7", "resnet18"])
def test_graph_computes_what_the_module_does(name: str, generator: torch.Generator) -> None:
    from cactus_ray.bounds.trace import trace

    module = build(ModelConfig(name=name, width=0.25), (1, 8, 8), 10, generator=generator).eval()
    graph, params = trace(module, (1, 8, 8))
    x = torch.rand(5, 1, 8, 8, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(forward(graph, params, x), module(x))


def test_normalization_of_digits_is_that_of_its_training_split() -> None:
    images, _ = load(DataConfig(name="digits"), ("train",)).split("train")
    assert torch.tensor(NORMALIZATION["digits"])[:, 0].tolist() == pytest.approx(
        [images.mean().item(), images.std().item()], abs=1e-4
    )


def test_normalize_layer() -> None:
    layer = Normalize.standard((0.5, 0.25), (0.5, 0.125))
    x = torch.tensor([0.5, 0.5]).view(1, 2, 1, 1)
    assert layer(x).flatten().tolist() == [0.0, 2.0]
    assert not list(layer.parameters())


def test_cnn_on_flat_inputs_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.name: cnn7 on inputs of shape \[64\]"):
        create(run(name="cnn7"), (64,), 10)


# --- the user's own networks ---------------------------------------------------------------------------------------

OWN = """
import torch
from torch import nn

class Twice(nn.Module):
    def __init__(self, features, classes):
        super().__init__()
        self.flatten, self.first, self.last = nn.Flatten(), nn.Linear(features, 16), nn.Linear(16, classes)
    def forward(self, x):
        x = self.first(self.flatten(x))
        return self.last(torch.relu(x) + x)

def net(input_shape, classes):
    return Twice(input_shape[0] * input_shape[1] * input_shape[2], classes).double()

def sigmoid(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes), nn.Sigmoid())

def wrong_logits(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes + 1))

def wrong_input(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(65, classes))

def no_module(input_shape, classes):
    return "network"

def fails(input_shape, classes):
    raise LookupError("no weights here")

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_networks.py").write_text(OWN)
    (tmp_path / "my_broken_networks.py").write_text("import no_such_package_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_networks", "my_broken_networks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "my_networks"


def test_factory(own: str, generator: torch.Generator) -> None:
    config = run("digits", factory=f"{own}:net")
    network = create(config, (1, 8, 8), 10, class_names=("a",) * 10, trust_code=True)
    again = create(config, (1, 8, 8), 10, trust_code=True)
    assert [n.op for n in network.graph.nodes] == ["input", "flatten", "linear", "relu", "add", "linear"]
    assert all(v.dtype == torch.float32 for v in network.params.values())
    assert all(torch.equal(v, again.params[k]) for k, v in network.params.items())
    assert network.class_names == ("a",) * 10
    assert network.config is config


def test_factory_needs_trust_and_is_not_imported_without(own: str) -> None:
    with pytest.raises(UserError, match="'my_networks:net' would run code of yours; expected --trust-code"):
        create(run("digits", factory=f"{own}:net"), (1, 8, 8), 10)
    assert own not in sys.modules


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("my_networks", "got 'my_networks'; expected package.module:function"),
        ("my_networks:", "expected package.module:function"),
        ("../my networks:net", "expected package.module:function"),
        ("my_networks:absent", "my_networks has no function 'absent'"),
        ("my_networks:number", "my_networks has no function 'number'"),
        ("no_such_module_of_mine:net", "'no_such_module_of_mine' cannot be imported"),
        ("my_broken_networks:net", "cannot be imported .ModuleNotFoundError.*no_such_package_anywhere"),
        ("my_networks:fails", "failed .LookupError: no weights here"),
        ("my_networks:no_module", "returned str; expected a torch.nn.Module"),
        ("my_networks:wrong_logits", r"gives logits \[2, 11\] for 2 images; expected \[2, 10\]"),
        ("my_networks:wrong_input", r"fails on images \[2, 1, 8, 8\] .RuntimeError.*expected logits \[2, 10\]"),
    ],
)
def test_unusable_factories(own: str, factory: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        create(run("digits", factory=factory), (1, 8, 8), 10, trust_code=True)
    assert str(caught.value).startswith("model.factory")


def test_malformed_factory_is_a_configuration_error_even_without_trust() -> None:
    with pytest.raises(ConfigError):
        create(run("digits", factory="no colon"), (1, 8, 8), 10)


def test_what_the_bounds_do_not_understand_is_named(own: str) -> None:
    with pytest.raises(UnsupportedGraphError, match="Sigmoid"):
        create(run("digits", factory=f"{own}:sigmoid"), (1, 8, 8), 10, trust_code=True)


def test_trying_out_leaves_batch_norm_alone(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flatten, self.norm, self.fc = nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(self.flatten(x)))  # type: ignore[no-any-return]

    import my_networks  # type: ignore[import-not-found]

    monkeypatch.setattr(my_networks, "net", lambda shape, classes: Own())
    params = create(run("digits", factory=f"{own}:net"), (1, 8, 8), 10, trust_code=True).params
    assert params["norm.running_mean"].abs().max() == 0
    assert (params["norm.running_var"] == 1).all()


def test_threads_that_build_at_once_get_the_same_weights() -> None:
    config = ModelConfig(name="mlp")

    def weights(seed: int) -> list[torch.Tensor]:
        module = build(config, (1, 8, 8), 10, generator=torch.Generator().manual_seed(seed))
        return [parameter.detach() for parameter in module.parameters()]

    alone = [weights(seed) for seed in (0, 1)] * 8
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(weights, [0, 1] * 8))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
