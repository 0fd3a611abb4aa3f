"""What the broker decides, told by a clock that the test holds."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import Any

import pytest

from cactus_ray.cluster.broker import Broker, Cut, Job, Limits, Lost, Start
from cactus_ray.cluster.verifier_pool import SPARED, VerifierPool
from cactus_ray.search.chunks import Chunk


def job(number: int, stage: str = "cheap", count: int = 2, size: int = 10, priority: float = 0.0) -> Job:
    trial = f"t{number}"
    chunks = [Chunk(f"{trial}/{stage}/{i}", trial, stage, ("dense", "int8"), (2 * i, 2 * i + 1)) for i in range(count)]
    return Job(trial, number, size, chunks, priority)


def broker(slots: int = 1, spent: dict[str, float] | None = None, **limits: Any) -> Broker:
    return Broker(Limits(**limits), [f"v{i}" for i in range(slots)], spent)


def work_off(made: Broker, now: float = 0.0) -> list[str]:
    """Chunks in the order in which a single verifier gets them."""
    order = []
    while starts := made.assign(now)[0]:
        order += [start.chunk.id for start in starts]
        for start in starts:
            made.done(start.slot, 1.0)
    return order


# --- order ---------------------------------------------------------------------------------------------------------


def test_cheap_before_dear_then_priority_then_the_trials_order() -> None:
    made = broker()
    for offered in (job(1, "dear"), job(3), job(2), job(5, priority=1.0), job(4, "dear", priority=1.0)):
        made.offer(offered)
    expected = [f"{name}/{i}" for name in ("t5/cheap", "t2/cheap", "t3/cheap", "t4/dear", "t1/dear") for i in (0, 1)]
    assert work_off(made) == expected


def test_each_free_verifier_gets_one_chunk() -> None:
    made = broker(3)
    made.offer(job(1, count=5))
    starts, cuts = made.assign(0.0)
    assert (len(starts), {s.slot for s in starts}, cuts) == (3, {"v0", "v1", "v2"}, [])
    assert made.assign(0.0) == ([], [])
    assert made.done("v1", 1.0).id == starts[1].chunk.id
    ((again,), _) = made.assign(1.0)
    assert again == Start("v1", job(1, count=5).chunks[3])


def test_nothing_to_do_is_nothing_done() -> None:
    made = broker()
    made.offer(Job("t1", 1, 10, []))
    assert made.assign(0.0) == ([], [])
    assert not made.full
    assert made.networks == frozenset()


# --- back-pressure -------------------------------------------------------------------------------------------------


def test_the_heap_is_bounded_and_the_driver_is_told_to_wait() -> None:
    made = broker(tasks=3)
    made.offer(job(1))
    assert not made.full
    made.offer(job(2))
    assert made.full
    assert len(made.heap) == 2
    assert work_off(made) == ["t1/cheap/0", "t1/cheap/1", "t2/cheap/0", "t2/cheap/1"]
    assert not made.full


def test_networks_in_memory_are_bounded_by_their_bytes() -> None:
    made = broker(network_bytes=25)
    for number in (1, 2, 3):
        made.offer(job(number, size=10))
    assert made.networks == {"t1", "t2"}
    assert made.full
    made.assign(0.0)
    made.done("v0", 1.0)
    made.assign(1.0)
    assert made.networks == {"t1", "t2"}  # the second chunk of t1 runs
    made.done("v0", 1.0)
    assert made.networks == {"t2", "t3"}


def test_a_network_or_trial_beyond_every_bound_is_verified_alone() -> None:
    made = broker(tasks=1, network_bytes=5)
    made.offer(job(1, size=100))
    made.offer(job(2, size=100))
    assert len(made.heap) == 2
    assert work_off(made) == ["t1/cheap/0", "t1/cheap/1", "t2/cheap/0", "t2/cheap/1"]


def test_room_that_dear_work_takes_is_given_to_cheap_work() -> None:
    made = broker(tasks=4, network_bytes=25)
    made.offer(job(1, "dear"))
    made.offer(job(2, "dear"))
    made.offer(job(3))
    assert made.networks == {"t1", "t3"}
    assert made.full
    order = ["t3/cheap/0", "t3/cheap/1", "t1/dear/0", "t1/dear/1", "t2/dear/0", "t2/dear/1"]
    assert work_off(made) == order


def test_a_trial_that_is_dropped_leaves_nothing_behind() -> None:
    made = broker(tasks=2)
    made.offer(job(1))
    made.offer(job(2))
    made.offer(job(2, "dear"))
    made.drop("t1")
    assert made.networks == {"t2"}
    made.drop("t2")
    assert (made.heap, made.parked, made.networks, dict(made.inside)) == ([], [], frozenset(), {})


def test_a_dropped_trials_chunk_is_not_tried_again() -> None:
    made = broker()
    made.offer(job(1))
    made.assign(0.0)
    made.drop("t1")
    assert made.networks == {"t1"}
    assert made.lost("v0", "verifier_died", 1.0).over
    assert (made.heap, made.networks) == ([], frozenset())


def test_bounds_hold_and_every_chunk_comes_once_whatever_happens() -> None:
    """A thousand random steps: the heap and the networks stay within their bounds, and nothing is lost."""
    dice = random.Random(0)
    made = broker(3, tasks=12, network_bytes=60, attempts=3)
    offered, ended = Counter[str](), Counter[str]()
    for step in range(1000):
        if dice.random() < 0.3 and not made.full:
            new = job(step, dice.choice(("cheap", "dear")), dice.randint(1, 6), dice.randint(1, 20), dice.random())
            offered.update(chunk.id for chunk in new.chunks)
            made.offer(new)
        made.assign(float(step))
        for slot in [slot for slot in made.running if dice.random() < 0.5]:
            if dice.random() < 0.1:
                gone = made.lost(slot, "verifier_died", float(step))
                ended.update([gone.chunk.id] if gone.over else [])
            else:
                ended.update([made.done(slot, 1.0).id])
        assert len(made.heap) <= 12 + 6 + 3  # what lost chunks and the one job that is always let in may add
        assert sum(made.sizes.values()) <= 60 + 20 + 3 * 20
        assert made.inside.total() == len(made.heap) + len(made.running)
    rest = Counter(work_off(made))
    for slot in list(made.running):
        ended.update([made.done(slot, 1.0).id])
    ended += rest + Counter(work_off(made))
    assert ended == offered
    assert made.networks == frozenset()


# --- verifiers that die or hang ------------------------------------------------------------------------------------


def test_a_lost_chunk_is_tried_elsewhere_a_limited_number_of_times() -> None:
    made = broker(2, attempts=3)
    made.offer(job(1, count=1))
    ((start,), _) = made.assign(0.0)
    assert made.lost(start.slot, "verifier_died", 2.0) == Lost(start.chunk, "verifier_died", 2.0, over=False)
    ((second,), _) = made.assign(2.0)
    assert second.slot != start.slot
    assert not made.lost(second.slot, "verifier_hung", 5.0).over
    ((third,), _) = made.assign(5.0)  # both have lost it: whichever is free
    gone = made.lost(third.slot, "verifier_died", 6.0)
    assert (gone.over, gone.seconds) == (True, 1.0)
    assert made.assign(6.0) == ([], [])
    assert made.spent == {"t1": 6.0}
    assert made.networks == frozenset()


def test_a_lost_chunk_waits_for_another_verifier_rather_than_its_own() -> None:
    made = broker(2)
    made.offer(job(1, count=3))
    (one, other), _ = made.assign(0.0)
    made.lost(one.slot, "verifier_died", 1.0)
    ((next_,), _) = made.assign(1.0)
    assert (next_.slot, next_.chunk.id) == (one.slot, "t1/cheap/2")
    made.done(one.slot, 1.0)
    assert made.assign(2.0) == ([], [])
    made.done(other.slot, 1.0)
    assert made.assign(3.0)[0] == [Start(other.slot, one.chunk)]


def test_chunks_that_killed_verifiers_of_an_earlier_driver_have_fewer_attempts() -> None:
    made = Broker(Limits(attempts=3), ["v0"], losses={"t1/cheap/0": 2})
    made.offer(job(1, count=2))
    made.assign(0.0)
    assert made.lost("v0", "verifier_died", 1.0).over
    made.assign(1.0)
    assert not made.lost("v0", "verifier_died", 2.0).over


def test_a_verifier_hangs_when_it_works_longer_than_its_samples_may_take() -> None:
    made = broker(hang_seconds=100.0, sample_seconds=5.0)
    made.offer(job(1, count=1))  # two samples at two levels: twice 20 s beyond
    made.assign(10.0)
    assert made.hung(149.0) == []
    assert made.hung(151.0) == ["v0"]


# --- budgets -------------------------------------------------------------------------------------------------------


def test_a_trials_budget_ends_its_dear_work_and_no_other() -> None:
    made = broker(trial_seconds=3.0)
    made.offer(job(1, "dear", count=4))
    made.offer(job(2, "dear", count=1))
    cuts: list[Cut] = []
    order = []
    now = 0.0
    while True:
        starts, ended = made.assign(now)
        cuts += ended
        if not starts:
            break
        order += [start.chunk.id for start in starts]
        now += 2.0
        made.done("v0", 2.0)
    assert order == ["t1/dear/0", "t1/dear/1", "t2/dear/0"]
    assert [(cut.chunk.id, cut.reason) for cut in cuts] == [("t1/dear/2", "budget"), ("t1/dear/3", "budget")]
    assert made.networks == frozenset()


def test_cheap_work_is_done_whatever_was_spent() -> None:
    made = broker(trial_seconds=1.0, study_seconds=1.0, spent={"t1": 50.0})
    made.offer(job(1))
    made.offer(job(1, "dear", count=1))
    assert work_off(made) == ["t1/cheap/0", "t1/cheap/1"]


def test_the_studys_budget_counts_all_trials_and_earlier_drivers() -> None:
    made = broker(study_seconds=10.0, spent={"t8": 6.0, "t9": 3.0})
    made.offer(job(1, "dear", count=2))
    ((start,), _) = made.assign(0.0)
    assert start.chunk.id == "t1/dear/0"
    made.done("v0", 1.0)
    assert made.assign(1.0) == ([], [Cut(job(1, "dear").chunks[1])])


def test_what_runs_now_counts_against_a_budget() -> None:
    made = broker(2, trial_seconds=5.0)
    made.offer(job(1, "dear", count=3))
    assert len(made.assign(0.0)[0]) == 2
    made.done("v0", 1.0)
    starts, cuts = made.assign(4.5)  # 1 s and 4.5 s
    assert (starts, [cut.chunk.id for cut in cuts]) == ([], ["t1/dear/2"])


@pytest.mark.parametrize("seconds", [0.5, 5.0])
def test_seconds_lost_with_a_verifier_are_spent(seconds: float) -> None:
    made = broker(trial_seconds=1.0)
    made.offer(job(1, "dear", count=1))
    made.assign(0.0)
    made.lost("v0", "verifier_died", seconds)
    starts, cuts = made.assign(seconds)
    assert (len(starts), len(cuts)) == ((1, 0) if seconds < 1 else (0, 1))


# --- what is withdrawn as it is handed out -------------------------------------------------------------------------


def test_a_verifier_that_is_free_gets_the_next_chunk_where_one_is_withdrawn() -> None:
    pool = object.__new__(VerifierPool)  # without actors: Ray is not needed to hand out
    pool.broker, pool.lock = broker(2), threading.Lock()
    pool.broker.offer(job(1, "dear", count=3))
    pool.broker.offer(job(2, "dear", count=1))
    left: dict[str, tuple[str, ...]] = {"t1/dear/0": (), "t1/dear/1": ("int8",), "t1/dear/2": ()}
    pool.still_worth = lambda chunk: left.get(chunk.id, chunk.levels)
    starts, cuts = pool._assign()
    assert [(s.chunk.id, s.chunk.levels) for s in starts] == [
        ("t1/dear/1", ("int8",)),
        ("t2/dear/0", ("dense", "int8")),
    ]
    assert [(c.chunk.id, c.reason) for c in cuts] == [("t1/dear/0", SPARED), ("t1/dear/2", SPARED)]
    assert {s.slot for s in starts} == set(pool.broker.running) == {"v0", "v1"}
    assert pool.broker.spent.get("t1", 0.0) == 0.0
