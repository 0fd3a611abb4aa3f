"""``cactus-ray simulate``: what it prints and what it refuses."""

import json
from pathlib import Path

import pytest

from cactus_ray.cli import run

SPACE = str(Path(__file__).parents[2] / "search_spaces" / "digits.yaml")
SMALL = ["simulate", SPACE, "--synthetic", "12", "--trials", "6", "--seeds", "2"]


def test_seeds_are_shown_beside_random_search(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, "--workers", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["curves"], len(found["seeds"])) == (12, 2)
    for seed in found["seeds"]:
        assert 0 < seed["stopped"] < seed["started"] == 12
        assert seed["hypervolume"] == seed["steps"][-1][2]
        assert seed["time"] <= seed["cost"]
    assert run([*SMALL, "--promote", "--rest", "promote", "--json"]) == 0
    assert [seed["stopped"] for seed in json.loads(capsys.readouterr().out)["seeds"]] == [
        0,
        0,
    ]  # all went on in the end
    assert run([*SMALL, "--scheduler", "none", "--sampler", "random"]) == 0
    assert "12 curves; the final hypervolume of random search over 6 whole trials" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--by", "loss"], "--by: got 'loss'; expected an accuracy of every epoch: ibp_certified_accuracy@dense"),
        (["--scheduler", "hyperband"], "hyperband"),
        (["--sampler", "cma"], "cma"),
        (["--ranking", "best"], "best"),
        (["--rest", "wait"], "scheduler.rest: got 'wait'; expected one of stop, promote"),
        (["--stop", "--rest", "promote"], "rest: got 'promote'; expected stop: with promote: false nobody waits"),
    ],
)
def test_bad_options_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", str(tmp_path)]) == 2
    assert "no run here" in " ".join(capsys.readouterr().err.split())
