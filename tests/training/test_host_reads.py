"""No step waits for the device: the host reads no value of a tensor that a GPU would have to compute first.

On a CPU nothing waits, so the places that read are listed, each with the reason why it may.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cactus_ray
from cactus_ray.config import METHODS, STRATEGIES
from cactus_ray.data import DataSet
from cactus_ray.training.bench import _Bench
from cactus_ray.training.methods import STAGES
from cactus_ray.training.passes import FULL, phases
from cactus_ray.training.stages import WHOLE

ON_THE_HOST = {
    "prune.py keep_largest": "a shortcut that only a CPU takes",
    "sets.py _uniform": "drawn by a generator on the host",
    "sets.py prunings": "the same",
    "cactus.py _deltas": "a seed drawn by a generator on the host",
    "c_sam.py _noisy": "a seed drawn by a generator on the host",
    "atmc.py _after_quantised": "a counter that stays on the host",
}
WAITS = {
    "sets.py _adaptive": "sparsities are numbers on the host, as masks need them; every refresh_every steps",
    "atmc.py zero_kmeans": "clusters are found on the host; every admm_every steps",
    "codebook.py cluster": "the same",
    "codebook.py _lloyd": "the same",
    "codebook.py _nearest": "the same",
    "codebook.py _error": "the same",
}
READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique_consecutive", "_unique2", "is_nonzero")
HOUSE = Path(cactus_ray.__file__).parent


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the innermost function of the package around every operator whose result the host has to wait for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: set[str] = set()

    def note(self) -> None:
        frame = sys._getframe(1)
        while frame.f_back is not None and HOUSE not in Path(frame.f_code.co_filename).parents:
            frame = frame.f_back
        self.places.add(f"{Path(frame.f_code.co_filename).name} {frame.f_code.co_name}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        chooses = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in READS or chooses:
            self.note()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> _Reads:
    found = _Reads()

    def noted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.note()
            return original(*args, **kwargs)

        return call

    for name in ("tolist", "cpu", "numpy"):  # no operators, or none on a CPU
        monkeypatch.setattr(Tensor, name, noted(getattr(Tensor, name)))
    return found


def _cases() -> dict[str, tuple[dict[str, Any], int]]:
    cases: dict[str, tuple[dict[str, Any], int]] = {}
    for method in METHODS:
        values = {"admm_every": 1} if method == "atmc" else {}
        for number, stage in enumerate(STAGES.get(method, WHOLE)):
            cases[f"{method} {stage.name}".rstrip()] = {"method": method, **values}, number
    for strategy in STRATEGIES:
        cases[f"cactus {strategy}"] = {"method": "cactus", "compression_set": {"strategy": strategy}}, 0
    for family in ("gs-l2", "ls-l1", "lu-grad"):
        cases[f"cactus {family}"] = {"method": "cactus", "compression_set": {"family": family}}, 0
    cases["cactus channels"] = {"method": "cactus", "compression_set": {"channels": 0.5}}, 0
    for kind in ("ascent", "noise", "rounding"):
        for member in ("separate", "pruned"):
            cases[f"cactus {kind} {member}"] = (
                {"method": "cactus", "awp_radius": 0.5, "awp_kind": kind, "awp_member": member}, 0,
            )  # fmt: skip
    return cases


CASES = _cases()


def _seen(case: str, run_config: Any, data: DataSet, reads: _Reads) -> set[str]:
    values, number = CASES[case]
    config = run_config(
        model={"name": "cnn_small", "width": 0.25, "batch_norm": True},
        train__regularizer=0.5,
        train__average="ema",
        **values,
    )
    (phase,) = (p for p in phases(config) if p.part == FULL and p.number == number)
    bench = _Bench.of(case, config, data, "cpu", phase, False)
    reads.places.clear()  # what stands before the first step may wait
    with reads:
        for _ in range(2):
            bench.step()
    return reads.places


@pytest.mark.parametrize("case", CASES)
def test_the_host_reads_nothing_in_a_step(case: str, run_config: Any, few_digits: DataSet, reads: _Reads) -> None:
    allowed = set(ON_THE_HOST)
    if case in ("cactus adaptive", "atmc quantised"):
        allowed |= set(WAITS)
    assert _seen(case, run_config, few_digits, reads) <= allowed


def test_no_place_is_listed_in_vain(run_config: Any, few_digits: DataSet, reads: _Reads) -> None:
    of_cactus = (f"cactus {case}" for case in ("single", "channels", "noise separate", "adaptive"))
    cases = (*of_cactus, "c_sam mask", "atmc quantised")
    seen = set().union(*(_seen(case, run_config, few_digits, reads).copy() for case in cases))
    assert seen == set(ON_THE_HOST) | set(WAITS)
