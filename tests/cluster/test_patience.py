"""How long a verifier may work on a chunk before it is taken for hung, and how large a chunk is cut."""

from __future__ import annotations

from typing import Any

import pytest

from cactus_ray.cluster.broker import MARGIN, Broker, Job, Limits
from cactus_ray.search.chunks import CHEAP, DEAR, Chunk, Pieces, Verification
from cactus_ray.verification.cost import Cost


def broker(slots: int = 1, **limits: Any) -> Broker:
    return Broker(Limits(hang_seconds=100.0, pace=1e9, **limits), [f"v{i}" for i in range(slots)])


def offer(made: Broker, *chunks: Chunk) -> None:
    for number, chunk in enumerate(chunks):
        made.offer(Job(chunk.trial, number, 10, [chunk]))


def chunk(name: str, cost: float, stage: str = CHEAP) -> Chunk:
    return Chunk(name, name, stage, ("dense",), (0,), cost=cost)


def patience(made: Broker, since: float) -> float:
    """Seconds, found by halving, for which the one chunk that runs is not called hung."""
    low, high = 0.0, 1e9
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if made.hung(since + middle) else (middle, high)
    return low


def test_a_chunk_has_hang_seconds_and_a_multiple_of_what_it_costs() -> None:
    made = broker()
    offer(made, chunk("small", 0.0), chunk("large", 1000e9))
    made.assign(10.0)
    assert patience(made, 10.0) == pytest.approx(100.0, abs=0.01)
    made.done("v0", 5.0)
    made.assign(20.0)
    assert patience(made, 20.0) == pytest.approx(100.0 + MARGIN * 1000.0, abs=0.01)


def test_a_machine_that_is_slower_than_expected_is_waited_for_and_a_real_hang_still_found() -> None:
    made = broker()
    offer(made, chunk("first", 1000e9), chunk("second", 2000e9), chunk("other", 1000e9, DEAR))
    made.assign(0.0)
    made.done("v0", 2500.0)  # 2.5 times slower
    made.assign(3000.0)
    assert patience(made, 3000.0) == pytest.approx(100.0 + MARGIN * 5000.0, abs=0.01)
    made.done("v0", 4000.0)  # the slowest counts
    made.assign(8000.0)
    assert patience(made, 8000.0) == pytest.approx(100.0 + MARGIN * 1000.0, abs=0.01)  # of another kind


def test_what_is_over_at_once_says_nothing_of_the_pace() -> None:
    made = broker()
    offer(made, chunk("tiny", 1.0), chunk("large", 1000e9))
    made.assign(0.0)
    made.done("v0", 9.0)  # overhead: by this the large one would take centuries
    made.assign(10.0)
    assert patience(made, 10.0) == pytest.approx(100.0 + MARGIN * 1000.0, abs=0.01)


def test_each_further_attempt_at_a_chunk_has_twice_as_long() -> None:
    made = broker(attempts=3)
    offer(made, chunk("slow", 100e9))
    now = 0.0
    for attempt in range(3):
        made.assign(now)
        expected = (100.0 + MARGIN * 100.0) * 2**attempt
        assert patience(made, now) == pytest.approx(expected, abs=0.01)
        now += expected + 1.0
        assert made.hung(now) == ["v0"]
        assert made.lost("v0", "verifier_hung", now).over == (attempt == 2)


# --- how chunks are cut --------------------------------------------------------------------------------------------


def sizes(cost: Cost, most: float, stage: str = CHEAP, levels: int = 2) -> list[int]:
    names = tuple(f"level{i}" for i in range(levels))
    pieces = Pieces(names, tuple(range(100)), 50, 4, dear=True, most=most)
    state = Verification("t0001", pieces, 0.0, cost)
    rows = {index: [index, 0, "UNKNOWN", True, None, "bounds", 0.1] for index in range(100)}
    state.rows = dict.fromkeys(names, rows)  # what the cheap stage left to the dear one
    found = state._cut(stage, {name: set(range(100)) for name in names}, 50 if stage == CHEAP else 4)
    assert [index for one in found for index in one.indices] == list(range(100))
    each = levels * (cost.cheap if stage == CHEAP else cost.dear)
    assert [one.cost for one in found] == pytest.approx([each * len(one.indices) for one in found])
    return [len(one.indices) for one in found]


@pytest.mark.parametrize(
    ("cost", "most", "expected"),
    [
        (Cost(), 100.0, [50, 50]),  # not known
        (Cost(cheap=1.0), 100.0, [50, 50]),
        (Cost(cheap=1.0), 60.0, [30, 30, 30, 10]),
        (Cost(cheap=1e6), 60.0, [1] * 100),
    ],
)
def test_chunks_are_no_dearer_than_they_may_be(cost: Cost, most: float, expected: list[int]) -> None:
    assert sizes(cost, most) == expected


def test_stages_and_levels_count() -> None:
    assert sizes(Cost(cheap=1e9, dear=1.0), 4.0, DEAR) == [2] * 50
    assert sizes(Cost(cheap=1.0), 60.0, levels=6) == [10] * 10
