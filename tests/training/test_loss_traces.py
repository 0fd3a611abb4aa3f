"""Losses of 20 steps of every method and stage, kept: whoever changes a number sees it.

In float64, so that the traces survive another machine's rounding. After an intended change:
``python tests/training/test_loss_traces.py`` writes them again; say in the commit why they changed.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cactus_ray.config import METHODS, RunConfig, parse
from cactus_ray.data import DataSet, load
from cactus_ray.models import create
from cactus_ray.training.compiled import AS_WRITTEN, Passes, compiled
from cactus_ray.training.init import ibp_initialization
from cactus_ray.training.methods import METHODS as TABLE
from cactus_ray.training.methods import STAGES
from cactus_ray.training.stages import WHOLE, begin
from cactus_ray.training.step import Step

PATH = Path(__file__).with_name("loss_traces.json")
STEPS, BATCH = 20, 32
PLAIN: dict[str, Any] = {
    "data": {"name": "digits", "train_samples": STEPS * BATCH},
    "model": {"name": "cnn_small", "batch_norm": True},
    "threat": {"epsilon": 0.05},
    "train": {"regularizer": 0.5},
}
CACTUS = {"compression_set": {"strategy": "single"}, "awp_radius": 0.5}


COMPILED = (
    "cactus",
    "mtl_ibp",
    "staps",
    "exp_ibp",
    "pgd",
    "nrsloss",
    "awp",
    "crown_ibp",
    "hydra mask",
    "qa_ibp quantised",
    "c_sam mask",
)
CASES = {" ".join([m, s.name] if s.name else [m]): (m, i) for m in METHODS for i, s in enumerate(STAGES.get(m, WHOLE))}


def trace(case: str, data: DataSet, passes: Passes = AS_WRITTEN) -> list[float]:
    """Losses of Adam's first steps while epsilon rises to its end at step 10; the stages before took no step."""
    method, number = CASES[case]
    config = parse(RunConfig, PLAIN | {"method": method} | (CACTUS if method == "cactus" else {}))
    network = create(config, data.input_shape, data.classes)
    params = ibp_initialization(network.graph, network.params, torch.Generator().manual_seed(1))
    params, auxiliary = {k: v.double() for k, v in params.items()}, dict[str, Tensor]()
    stages = STAGES.get(method, WHOLE)[: number + 1]
    for stage in stages:
        params, auxiliary = begin(stage, config, network.graph, params, auxiliary)
    optimizer = torch.optim.Adam([v for v in (params | auxiliary).values() if v.requires_grad], lr=0.002)
    images, labels = data.split("train")
    draws, latent = torch.Generator().manual_seed(2), torch.Generator().manual_seed(3)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = []
    for index in range(STEPS):
        done = min(1.0, index / 10)
        part = slice(index * BATCH, (index + 1) * BATCH)
        step = Step(
            config, network.graph, stage.network(config, network.graph, params, auxiliary), images[part].double(),
            labels[part], noise[part], epsilon=0.05 * done,
            standard_weight=1.0 - 0.7 * done, progress=index / STEPS, index=index, generator=draws,
            latent_generator=latent, stage=stage.name, auxiliary=auxiliary, passes=passes,
        )  # fmt: skip
        optimizer.zero_grad()
        total = 0.0
        for loss in TABLE[method](step):
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        optimizer.step()
        if stage.after is not None:
            with torch.no_grad():
                stage.after(step)
        found.append(total)
    return found


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load(parse(RunConfig, PLAIN).data, ("train",))


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_that_were_kept(case: str, digits: DataSet) -> None:
    kept = json.loads(PATH.read_text())
    assert trace(case, digits) == pytest.approx(kept[case], rel=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # hidden by dynamo
@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_passes_give_the_same_losses(case: str, digits: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs of dynamo and their gradients, as the compiler would get them; ``test_compiled`` trains with them."""
    monkeypatch.setattr("cactus_ray.training.compiled.BACKEND", "aot_eager")
    kept = json.loads(PATH.read_text())
    assert trace(case, digits, compiled(torch.device("cpu"))) == pytest.approx(kept[case], rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("case", ["cactus", "mtl_ibp", "staps", "nrsloss"])
def test_compiled_by_inductor_they_do_too(case: str, digits: DataSet) -> None:
    kept = json.loads(PATH.read_text())
    assert trace(case, digits, compiled(torch.device("cpu"))) == pytest.approx(kept[case], rel=1e-4)


def test_no_trace_is_left_over() -> None:
    assert set(json.loads(PATH.read_text())) == set(CASES)


def test_traces_tell_the_methods_apart() -> None:
    """By the last stage: the first of several is often plain training with the method's loss."""
    kept = json.loads(PATH.read_text())
    ends = {method: kept[case][-1] for case, (method, _) in CASES.items()}
    assert len({round(end, 6) for end in ends.values()}) == len(METHODS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train = load(parse(RunConfig, PLAIN).data, ("train",))
    traces = {case: [round(loss, 9) for loss in trace(case, train)] for case in CASES}
    PATH.write_text(json.dumps(traces, indent=1) + "\n")
