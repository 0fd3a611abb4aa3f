"""The benchmark of searches: what is read from a recording, what counts as cost, and what was never reached."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from course import SPACE

from cactus_ray.search.settings import SchedulerSettings
from cactus_ray.search.space import parse_space

LEVELS = ["dense", "int8"]
REFERENCE = {"certified_accuracy": 0.0, "standard_accuracy": 0.0, "bytes": 1000}


@pytest.fixture(scope="module")
def bench(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("bench_search")


def row(number: int, good: int, seconds: int = 1) -> dict[str, Any]:
    """A configuration whose counts, of ten samples, are ``good`` everywhere; epochs of so many seconds."""
    return {
        "number": number, "values": {"learning_rate": number / 1000}, "seed": number, "epoch_cost": 1.0,
        "train": [1000 * seconds] * 3, "seen": [[[good, good]] * 2] * 3, "proxy": [300, 600],
        "verify": [500, 1500], "points": [[good, good, 10 - good, 0, size, 0, 0] for size in (800, 200)],
    }  # fmt: skip


def recording(bench: ModuleType, folder: Path, rows: list[dict[str, Any]]) -> Any:
    space = {
        **SPACE, "levels": LEVELS, "train": {"epochs": 3},
        "parameters": {"learning_rate": {"min": 0.0001, "max": 0.1}},
    }  # fmt: skip
    head = {"space": parse_space(space).to_dict(), "reference_point": REFERENCE, "scored": 10}
    file = folder / "curves.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in [head, *rows]))
    return bench.Recording(*bench.read_curves(file))


def test_a_recording_is_read_as_curves_of_accuracies_and_seconds(bench: ModuleType, tmp_path: Path) -> None:
    broken = {**row(3, 5), "error": "the loss is not finite"}
    del broken["points"]
    found = recording(bench, tmp_path, [row(1, 5), row(2, 8), broken])
    first, second = found.curves
    assert (first.seconds, first.verify_seconds) == ((1.0, 1.0, 1.0), 2.0)
    assert first.score_seconds == pytest.approx({"dense": 0.1, "int8": 0.2})  # of one epoch out of three
    assert second.metrics[0]["ibp_certified_accuracy@int8"] == 0.8
    assert second.metrics[0]["mean_standard_accuracy"] == pytest.approx(0.8)
    assert second.metrics[0][bench.weighted(0.25)] == pytest.approx(0.8)
    assert [p["certified_accuracy"] for p in first.points] == [0.5, 0.5]
    assert first.outcome["certified_accuracy@int8"] == 0.5


def test_cost_is_training_scoring_at_rungs_and_verification(bench: ModuleType, tmp_path: Path) -> None:
    found = recording(bench, tmp_path, [row(n, 5) for n in (1, 2, 3)])
    whole = found.run(bench.Search(), 0, 1)
    assert whole.cost == pytest.approx(3 * (3 + 2))  # nobody scores where nobody asks
    assert whole.hypervolume == pytest.approx(0.5 * 0.5 * 0.8)  # the smaller point covers the larger one
    asha = SchedulerSettings(name="asha", reduction=3, min_epochs=1, promote=False)
    halved = found.run(bench.Search("random", asha), 0, 1)
    assert halved.stopped == 1  # the first two of a rung go on; of three equal ones the first does
    assert halved.cost == pytest.approx(2 * (3 + 2) + 1 + 3 * 0.3)
    one = found.run(bench.Search("random", asha, "ibp_certified_accuracy@dense"), 0, 1)
    assert one.cost == pytest.approx(2 * (3 + 2) + 1 + 3 * 0.1)  # one metric at one level is scored at that level


def test_the_share_is_the_cost_of_what_random_search_found(bench: ModuleType, tmp_path: Path) -> None:
    found = recording(bench, tmp_path, [row(n, good) for n, good in enumerate((1, 2, 3, 9), 1)])
    bases = [found.run(bench.Search(), seed, 1, 4) for seed in range(3)]
    again = bench.shares(found, bench.Search(), bases, 1)
    place = [base.started.index(3) + 1 for base in bases]  # the best one alone reaches the final hypervolume
    assert again == pytest.approx([p / 4 for p in place])


def test_what_is_never_reached_is_infinite(bench: ModuleType, tmp_path: Path) -> None:
    rows = [row(n, 5) for n in (1, 2, 3, 4, 5)]
    late = row(6, 2)
    late["points"] = [[9, 9, 1, 0, size, 0, 0] for size in (800, 200)]  # looks bad to the end and is best
    found = recording(bench, tmp_path, [*rows, late])
    asha = bench.Search("random", SchedulerSettings(name="asha", reduction=3, min_epochs=1, promote=False))
    bases = [found.run(bench.Search(), seed, 1, 6) for seed in range(6)]
    shares = bench.shares(found, asha, bases, 1)
    first_two = [5 in base.started[:2] for base in bases]
    assert [math.isfinite(share) for share in shares] == first_two
    assert not all(first_two)
    assert "never" in bench.line("asha", shares)
