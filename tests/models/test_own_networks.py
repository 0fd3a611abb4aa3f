"""Networks that people bring: what is kept as it was brought, what is refused by name, and what works as it is."""

import pytest
import torch

from cactus_ray.config import DataConfig, ModelConfig, RunConfig, ThreatConfig, TrainConfig
from cactus_ray.errors import UserError
from cactus_ray.models import Untrained, checked, create, untrained

SHAPE, CLASSES = (1, 8, 8), 10
REMOVE = 'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")'


def run(name: str, seed: int = 0) -> RunConfig:
    return RunConfig(
        data=DataConfig(name="digits"), model=ModelConfig(factory=f"brought_networks:{name}"),
        threat=ThreatConfig(epsilon=0.1), train=TrainConfig(epochs=1), seed=seed,
    )  # fmt: skip


def brought(name: str, seed: int = 0) -> Untrained:
    return checked(run(name, seed), SHAPE, CLASSES, trust_code=True)


REFUSED = {
    "weight_norm": ("Conv2d '0': its weight", "WeightNorm", REMOVE),
    "spectral_norm": ("Conv2d '0': its weight", "SpectralNorm", REMOVE),
    "orthogonal": ("Linear '3': its weight", "Orthogonal", REMOVE),
    "old_weight_norm": ("Conv2d '0': its weight", 'torch.nn.utils.remove_weight_norm(layer, "weight")'),
    "old_spectral_norm": ("Conv2d '0': its weight", 'torch.nn.utils.remove_spectral_norm(layer, "weight")'),
    "pruned": ("Conv2d '0': its weight", 'torch.nn.utils.prune.remove(layer, "weight")'),
    "pruned_twice": ("Conv2d '0': its weight", 'torch.nn.utils.prune.remove(layer, "weight")'),
    "pruned_bias": ("Linear '3': its bias", 'torch.nn.utils.prune.remove(layer, "bias")'),
    "tied": ("'first.weight' and 'second.weight' are one tensor",),
    "all_frozen": ("nothing to train", "requires_grad=True"),
    "other_weights_each_time": ("other values of '0.weight' at a second call with the same seed",),
    "other_layers_each_time": ("other layers at every call",),
    "other_layers_by_seed": ("other layers at every call",),
    "not_a_number": ("'0.weight' holds NaN",),
    "hooked": ("module '0' (Conv2d) has hooks",),
    "gradient_hook": ("parameter '0.weight' has hooks on its gradient",),
    "dropout": ("module Dropout ('1')", "has no dropout"),
    "dropout_in_forward": ("function 'dropout'", "has no dropout"),
    "another_forward_in_training": ("must not depend on self.training",),
    "one_norm_in_evaluation": ("module '1' (BatchNorm2d) alone is in evaluation mode",),
    "by_value": ("ByValue.forward cannot be traced", "the values of tensors"),
    "compiled": ("the module is compiled", "without torch.compile"),
    "compiled_in_place": ("the module is compiled",),
    "data_parallel": ("wrapped in DataParallel", "its .module"),
    "scripted": ("is TorchScript",),
    "on_meta": ("'0.weight' has no values",),
    "complex_head": ("'3.weight' is torch.complex64",),
    "the_class": ("returned type; expected a torch.nn.Module",),
    "eleven_classes": ("gives logits [2, 11] for 2 images; expected [2, 10]",),
    "group_norm": ("module GroupNorm ('1')", "expected Linear, Conv2d"),
    "layer_norm": ("module LayerNorm ('1')", "expected Linear, Conv2d"),
    "gelu": ("module GELU ('1')", "expected Linear, Conv2d"),
    "silu": ("module SiLU ('1')", "expected Linear, Conv2d"),
    "relu6": ("module ReLU6 ('1')", "expected Linear, Conv2d"),
    "uneven_padding": ("module ZeroPad2d ('0')", "expected Linear, Conv2d"),
    "normalised": ("tensor 'mean'", "Normalize of cactus_ray.models"),
    "by_shape": ("the constant 0.5", "Normalize of cactus_ray.models"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_with_what_to_do(name: str) -> None:
    with pytest.raises(UserError) as caught:
        brought(name)
    message = str(caught.value)
    assert message.startswith(f"model.factory: brought_networks:{name}")
    for words in REFUSED[name]:
        assert words in message


CHAIN = ["input", "conv2d", "relu", "flatten", "linear"]
READ = {
    "plain": CHAIN,
    "pruned_for_good": CHAIN,
    "alias": ["input", "flatten", "linear"],
    "all_in_evaluation": ["input", "conv2d", "batch_norm", "relu", "flatten", "linear"],
    "lazy": ["input", "conv2d", "batch_norm", "relu", "flatten", "linear"],
    "double": CHAIN,
    "channels_last": CHAIN,
    "unused": ["input", "flatten", "linear"],
    "around_ours": ["input", "flatten", *["linear", "relu"] * 2, "linear", "linear"],
    "double_by_default": CHAIN,
}


@pytest.mark.parametrize("name", READ)
def test_read(name: str) -> None:
    network = brought(name).network
    assert [node.op for node in network.graph.nodes] == READ[name]
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in network.params.values())
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def test_a_lazy_batch_norm_has_not_seen_the_images_that_gave_it_its_shape() -> None:
    params = brought("lazy").network.params
    assert not params["1.running_mean"].any()
    assert bool((params["1.running_var"] == 1).all())


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("pretrained", {"0.weight"}),
        ("loaded", {"0.weight", "3.weight"}),
        ("drawn_otherwise", {"0.weight"}),
        ("drawn_by_numpy", {"0.weight"}),
        ("pruned_for_good", {"0.weight"}),
        ("plain", set()),
        ("drawn_with_a_seed", set()),
        ("copied", set()),
        ("double", set()),
        ("lazy", set()),
    ],
)
def test_weights_that_a_factory_sets_are_told_from_those_that_torch_draws(name: str, given: set[str]) -> None:
    assert brought(name).given == given


def test_frozen_parameters_are_known_by_name() -> None:
    assert brought("frozen").frozen == {"0.weight"}
    assert brought("frozen_stem").frozen == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert not brought("pretrained").frozen


def test_the_seed_of_a_run_is_that_of_numpy_and_random_too() -> None:
    first, again = (create(run("drawn_by_numpy"), SHAPE, CLASSES, trust_code=True).params for _ in range(2))
    other = create(run("drawn_by_numpy", seed=1), SHAPE, CLASSES, trust_code=True).params
    assert torch.equal(first["0.weight"], again["0.weight"])
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_the_networks_of_the_package_have_nothing_to_keep() -> None:
    config = RunConfig(
        data=DataConfig(name="digits"), model=ModelConfig(name="mlp"), threat=ThreatConfig(epsilon=0.1)
    )  # fmt: skip
    found = untrained(config, SHAPE, CLASSES)
    assert (found.given, found.frozen) == (frozenset(), frozenset())


def test_layers_draw_as_before_once_a_factory_has_been_called() -> None:
    before = torch.nn.Linear.reset_parameters, torch.nn.Conv2d.reset_parameters
    brought("plain")
    with pytest.raises(UserError):
        brought("the_class")
    assert (torch.nn.Linear.reset_parameters, torch.nn.Conv2d.reset_parameters) == before
