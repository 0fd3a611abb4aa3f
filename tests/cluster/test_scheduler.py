"""Early stopping on a small real Ray: in anybody's Tune experiment, and in a study of ours."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import ray
from chaos import plain_network
from ray import tune
from tiny_study import SPACE, run, space

from cactus_ray.cluster.connect import connected
from cactus_ray.cluster.scheduler import MultiObjectiveASHA
from cactus_ray.search.halving import replayed
from cactus_ray.search.in_flight import FOLDER
from cactus_ray.search.rungs import Rungs
from cactus_ray.search.store import Records, with_front

pytestmark = pytest.mark.ray


def test_any_tune_experiment_can_use_the_scheduler(tmp_path: Path) -> None:
    scheduler = MultiObjectiveASHA(["accuracy", "cost"], ["max", "min"], time_attr="epoch", max_t=9)

    def toy(config: dict[str, Any]) -> None:  # in here, because Ray's workers cannot import this file
        for epoch in range(1, 10):
            tune.report({"accuracy": config["quality"] * epoch, "cost": 10.0 - config["quality"], "epoch": epoch})

    with connected(None, cpus=1):
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        results = tune.Tuner(
            toy,
            param_space={"quality": tune.grid_search([5, 4, 3, 2, 6])},
            tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=1),
            run_config=tune.RunConfig(name="toy", storage_path=str(tmp_path), verbose=0),
        ).fit()
        assert not results.errors
        epochs = {result.config["quality"]: result.metrics["epoch"] for result in results}
    assert not ray.is_initialized()
    assert epochs == {5: 9, 4: 9, 3: 1, 2: 1, 6: 9}


def test_max_t_and_a_single_metric_are_what_tune_expects() -> None:
    with pytest.raises(ValueError, match="max_t is 1"):
        MultiObjectiveASHA(["a"], ["max"], max_t=1, grace_period=2)
    with pytest.raises(ValueError, match="a goal for each"):
        MultiObjectiveASHA(["a", "b"], ["max"])
    with pytest.raises(ValueError, match="promote is True; expected False"):
        MultiObjectiveASHA(["a"], ["max"], promote=True)
    assert not MultiObjectiveASHA(["a"], ["max"]).set_search_properties("a", "max")
    assert MultiObjectiveASHA(["a"], ["max"]).set_search_properties(None, None)


def check(records: Records, trials: int, tiny: Any) -> None:
    """Every decision is in the records, replays from them, and was obeyed."""
    found = list(records.trials.values())
    assert len(found) == trials
    assert {t.status for t in found} == {"completed", "stopped"}, [(t.id, t.status, t.error) for t in found]
    decisions = [d for t in found for d in t.rungs]
    assert sorted(map(str, replayed(Rungs(tiny, Records()).halving.rules, decisions))) == sorted(map(str, decisions))
    for trial in found:
        assert (trial.status == "stopped") == (not trial.rungs[-1].go_on)
        for decision in trial.rungs:
            values = {e["epoch"]: e["metrics"] for e in trial.epochs}[int(decision.resource)]
            assert dict(decision.values) == {name: values[name] for name in decision.values}
        if trial.status == "stopped":
            assert len(trial.epochs) == int(trial.rungs[-1].resource) < 4
            assert trial.train_seconds == pytest.approx(sum(e["metrics"]["seconds"] for e in trial.epochs))
    stopped = {t.id for t in found if t.status == "stopped"}
    assert not stopped & {p["trial"] for p in with_front(records, tiny.front)}


PARAMETERS = {"method": {"value": "ibp"}, "learning_rate": {"values": [0.01, 0.008, 1e-6, 2e-6, 3e-6]}}
STOPPING = {"name": "asha", "promote": False}
SEARCH = {"trials": 5, "concurrency": 1, "sampler": "random", "scheduler": STOPPING}


@pytest.mark.usefixtures("shared_ray")
def test_trials_of_a_study_stop_themselves_at_rungs(tmp_path: Path) -> None:
    tiny = space(parameters=PARAMETERS, search=SEARCH, train={**SPACE["train"], "epochs": 4})
    check(run(tiny, tmp_path), 5, tiny)


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("execution", ["direct", pytest.param("train", marks=pytest.mark.slow)])
def test_a_trial_waits_and_is_promoted_to_the_network_that_it_would_have_been(tmp_path: Path, execution: str) -> None:
    search = {**SEARCH, "trials": 4, "scheduler": {"name": "asha"}}
    train = {**SPACE["train"], "epochs": 3}
    tiny = space(parameters=PARAMETERS, search=search, train=train, resources={"execution": execution})
    records = run(tiny, tmp_path)
    check(records, 4, tiny)
    events = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    waited = {event["trial"] for event in events if event["event"] == "waiting"}
    went_on = [event["epoch"] for event in events if event["event"] == "begun" and event["epoch"]]
    promoted = [d for trial in records.trials.values() for d in trial.rungs if d.promoted]
    assert sorted(went_on) == sorted(int(decision.resource) for decision in promoted)
    assert len(promoted) >= 2
    completed = [trial for trial in records.trials.values() if trial.status == "completed"]
    assert {trial.id for trial in completed} & waited
    for trial in completed:
        assert [e["epoch"] for e in trial.epochs] == [1, 2, 3]  # none twice
        assert trial.sha256 == plain_network(trial.config)
    assert list((tmp_path / FOLDER).iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_trials_of_ray_train_stop_themselves_at_rungs(tmp_path: Path) -> None:
    tiny = space(
        parameters=PARAMETERS, search=SEARCH, train={**SPACE["train"], "epochs": 4}, resources={"workers": 2}
    )  # fmt: skip
    check(run(tiny, tmp_path), 5, tiny)
