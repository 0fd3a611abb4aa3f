"""Which samples of the selection split a search did not use."""

from __future__ import annotations

from typing import Any

import pytest
from course import SPACE

from cactus_ray.data import subset
from cactus_ray.search.fresh import fresh_samples
from cactus_ray.search.space import Space, parse_space
from cactus_ray.training.evaluate import evenly_spaced


def space(samples: int | str, **changes: Any) -> Space:
    return parse_space({**SPACE, "verification": {"samples": samples}, **changes}, "course.yaml")


def search(**changes: Any) -> dict[str, Any]:
    return {"search": {**SPACE["search"], **changes}}  # type: ignore[dict-item]


@pytest.mark.parametrize(("wanted", "count"), [(None, 60), (100, 100), (1000, 227), (1, 1)])
def test_fresh_samples_are_others_and_as_many_as_are_wanted_and_left(wanted: int | None, count: int) -> None:
    found, why = fresh_samples(space(60, **search(fresh_samples=wanted)), 287)
    assert (len(found), why) == (count, None)
    assert found == sorted(set(found))
    assert not set(found) & set(subset(287, 60).tolist())
    assert max(found) < 287


def test_a_study_on_more_samples_takes_the_fresh_ones_first() -> None:
    found, _ = fresh_samples(space(60), 287)
    assert set(found) == set(subset(287, 120).tolist()) - set(subset(287, 60).tolist())


def test_none_are_left_of_a_split_that_was_used_whole() -> None:
    for samples in ("selection", 287, 500):
        found, why = fresh_samples(space(samples), 287)
        assert found == []
        assert "all 287 of the selection split" in str(why)
        assert "less than 287 as verification.samples leaves some" in str(why)
    assert fresh_samples(space("selection", **search(fresh_samples=0)), 287) == ([], None)


@pytest.mark.parametrize("change", [{"train": {"keep": "best"}}, search(scheduler={"name": "asha"})])
def test_images_whose_scores_decided_something_are_used(change: dict[str, Any]) -> None:
    train = {"proxy_samples": 100, **change.get("train", {})}
    found, why = fresh_samples(
        space(
            60,
            **{**change, "train": train},
        ),
        287,
    )
    assert why is None
    assert found
    assert not set(found) & set(evenly_spaced(287, 100).tolist())
    assert not set(found) & set(subset(287, 60).tolist())
    none, why = fresh_samples(space(60, **change), 287)  # by default every image of so small a split is scored
    assert none == []
    assert "train.proxy_samples: 512" in str(why)
    assert "less than 287 as train.proxy_samples leaves some" in str(why)
