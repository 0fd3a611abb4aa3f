"""A verifier without Ray: what the two stages try, and what they book."""

from dataclasses import replace

import pytest
from tiny_study import space

from cactus_ray.cluster.verifier import Verifier, VerifierContext, stage_settings
from cactus_ray.data import load
from cactus_ray.models.network import Network, pack
from cactus_ray.search.chunks import Chunk, ChunkResult
from cactus_ray.search.space import Space
from cactus_ray.training.loop import train
from cactus_ray.verification.verdict import VerificationSettings

LEVELS = ("dense", "int8", "prune:gu-l1:0.5")


@pytest.fixture(scope="module")
def network() -> Network:
    return trained(space())


def trained(tiny: Space) -> Network:
    values = {p.name: p.domain.ends()[0] for p in tiny.parameters}
    config = tiny.configuration(values, 1)
    return train(config, load(config.data, ("train", "selection")), report=lambda epoch: True).network


def chunk(stage: str, indices: tuple[int, ...], spent: float = 0.0, levels: tuple[str, ...] = LEVELS) -> Chunk:
    return Chunk(f"t/{stage}/{indices[0]}", "t", stage, levels, indices, spent)


@pytest.mark.parametrize(
    ("bound", "cheap"), [("ibp", "ibp"), ("crown", "crown"), ("alpha", "crown"), ("branch", "crown")]
)
def test_the_cheap_stage_goes_no_further_than_crown(bound: str, cheap: str) -> None:
    settings = VerificationSettings(bound=bound, attack_steps=40)
    found = stage_settings(settings, chunk("cheap", (0,)))
    assert found == replace(settings, bound=cheap)


def test_the_dear_stage_starts_other_attacks_and_has_the_seconds_that_are_left() -> None:
    settings = VerificationSettings(
        bound="branch", attack_steps=42, restarts=5, seed=2**31 - 1, seconds_per_sample=10.0
    )
    found = stage_settings(settings, chunk("dear", (0,), spent=4.0))
    assert (found.bound, found.attack_steps, found.restarts, found.seed) == ("branch", 11, 1, 0)
    assert found.seconds_per_sample == 6.0
    assert 0 < stage_settings(settings, chunk("dear", (0,), spent=11.0)).seconds_per_sample < 0.01
    without = replace(settings, seconds_per_sample=0.0, attack_steps=0)
    assert stage_settings(without, chunk("dear", (0,), spent=4.0)).seconds_per_sample == 0.0
    assert stage_settings(without, chunk("dear", (0,))).attack_steps == 0


def test_all_levels_of_a_chunk_come_together_with_a_ledger() -> None:
    tiny = space(
        model={"name": "cnn_small"},
        threat={"epsilon": 0.1},
        train={"epochs": 4, "batch_size": 64},
        parameters={"method": {"value": "ibp"}, "learning_rate": {"value": 0.005}, "standard_weight": {"value": 1.0}},
    )
    network = trained(tiny)
    verifier = Verifier(VerifierContext(tiny.data, tiny.threat, replace(tiny.verification, bound="branch"), 1))
    indices = tuple(range(40))
    cheap = verifier.verify(chunk("cheap", indices), pack(network))
    assert isinstance(cheap, ChunkResult)
    assert list(cheap.levels) == list(LEVELS)
    assert len({level.measures["bytes"] for level in cheap.levels.values()}) == 3
    assert sum(level.seconds for level in cheap.levels.values()) == pytest.approx(cheap.seconds)
    assert set(cheap.ledger) == {"clean", "attack", "ibp", "crown", "overhead"}
    open_ = {level: [row[0] for row in found.samples if row[5] == "bounds"] for level, found in cheap.levels.items()}
    level, left = max(open_.items(), key=lambda item: len(item[1]))
    assert left, "nothing is open: this network is too easy for the test"
    dear = verifier.verify(chunk("dear", tuple(left), levels=(level,)), pack(network))
    assert isinstance(dear, ChunkResult)
    assert dear.ledger["alpha"] > 0
    assert [row[0] for row in dear.levels[level].samples] == left
    assert any(row[2] != "UNKNOWN" for row in dear.levels[level].samples)


def test_a_verifier_without_a_gpu_in_sight_works_on_the_cpu(network: Network) -> None:
    tiny = space()
    verifier = Verifier(VerifierContext(tiny.data, tiny.threat, tiny.verification, 1, gpu=True))
    assert isinstance(verifier.verify(chunk("cheap", (0, 1)), pack(network)), ChunkResult)


def test_networks_and_levels_that_were_used_last_are_kept(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cactus_ray.cluster.verifier.CACHED_LEVELS", 3)
    monkeypatch.setattr("cactus_ray.cluster.verifier.CACHED_NETWORKS", 2)
    tiny = space()
    verifier = Verifier(VerifierContext(tiny.data, tiny.threat, tiny.verification, 1))
    for trial in ("a", "b", "a", "c"):
        verifier.verify(replace(chunk("cheap", (0,), levels=("dense",)), trial=trial), pack(network))
    assert list(verifier.levels) == [("b", "dense"), ("a", "dense"), ("c", "dense")]
    assert list(verifier.networks) == ["b", "c"]  # every level of a was there already
    verifier.verify(chunk("cheap", (0,)), pack(network))
    assert list(verifier.levels) == [("t", level) for level in LEVELS]
