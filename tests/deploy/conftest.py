"""A small network trained on the digits, a run that holds it, and what was picked from that run: made once."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deploy_support import CONFIG, DIGITS, EPSILON, LEVELS, QUICK, SPACE
from torch import nn

from cactus_ray.bounds.interval import ball, margins
from cactus_ray.bounds.trace import trace
from cactus_ray.config import RunConfig, ThreatConfig, parse
from cactus_ray.data import load
from cactus_ray.deploy.certificate import certify_file
from cactus_ray.deploy.export import PickResult, pick
from cactus_ray.deploy.pick import Requirements
from cactus_ray.models.network import Network, pack
from cactus_ray.search.evaluate import at_level
from cactus_ray.search.space import load_space
from cactus_ray.search.store import RunStore


@pytest.fixture(scope="session")
def network() -> Network:
    """64-24-10, trained by IBP for about two seconds."""
    data = load(DIGITS, ("train",))
    images, labels = data.split("train")
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    for tensor in module.parameters():
        nn.init.uniform_(tensor, -0.12, 0.12, generator=generator)
    graph, params = trace(module, (1, 8, 8))
    trained = {name: tensor.requires_grad_() for name, tensor in params.items()}
    optimizer = torch.optim.Adam(list(trained.values()), lr=0.01)
    steps = 12 * (len(labels) // 64)
    for step in range(steps):
        chosen = torch.randint(len(labels), (64,), generator=generator)
        x, y = images[chosen], labels[chosen]
        radius = EPSILON * min(1.0, 2 * step / steps)
        clean, worst = (margins(graph, trained, ball(x, r, (0.0, 1.0)), y) for r in (0.0, radius))
        loss = 0.3 * F.cross_entropy(-clean, y) + 0.7 * F.cross_entropy(-worst, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    final = {name: tensor.detach() for name, tensor in trained.items()}
    return Network(graph, final, parse(RunConfig, CONFIG), data.class_names)


def points_of(network: Network, trial: str) -> list[dict[str, Any]]:
    """Rows of points.csv for all levels, with verdicts on 40 selection samples."""
    found = []
    for level in LEVELS:
        deployed = at_level(network, level, DIGITS, (0.0, 1.0))
        threat = ThreatConfig(epsilon=EPSILON)
        s = certify_file(deployed.file, DIGITS, "selection", threat, QUICK, samples=40).summary
        figures = {k: getattr(s, k) for k in ("n_certified", "n_falsified", "n_unknown", "certified_accuracy")}
        found.append(
            {
                "trial": trial, "level": level, "method": "ibp", "seed": 0, "split": "selection", "samples": s.samples,
                "standard_accuracy": s.standard_accuracy, **figures, **deployed.measures, "train_seconds": 1.0,
                "verify_seconds": 1.0, "config_hash": parse(RunConfig, CONFIG).config_hash,
            }
        )  # fmt: skip
    return found


@pytest.fixture(scope="session")
def run_folder(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one trial with three levels."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    store = RunStore(folder)
    (folder / "space.yaml").write_text(SPACE)
    assert load_space(folder / "space.yaml").verification == QUICK
    content, config, now = pack(network), parse(RunConfig, CONFIG), time.time()
    path = store.save_checkpoint("t0001", content)
    about = {"event": "study", "schema": 1, "name": "tiny", "time": now, "seed": 0, "versions": {}, "commit": "abc123"}
    store.append({**about, "reference_point": {"certified_accuracy": 0.0, "bytes": 1e6, "standard_accuracy": 0.0}})
    plain = {"config": config.to_dict(), "config_hash": config.config_hash, "seed": 0, "time": now}
    store.append({"event": "started", "trial": "t0001", "number": 1, "parameters": {}, **plain})
    digest = hashlib.sha256(content).hexdigest()
    trained = {"event": "trained", "trial": "t0001", "epochs": 12, "train_seconds": 1.0, "time": now, "sha256": digest}
    store.append({**trained, "checkpoint": path.relative_to(folder).as_posix()})
    points = points_of(network, "t0001")
    metrics = {"mean_certified_accuracy": sum(p["certified_accuracy"] for p in points) / len(points)}
    store.append({"event": "completed", "trial": "t0001", "points": points, "metrics": metrics, "time": now})
    store.append({"event": "finished", "status": "completed", "seconds": 1.0, "time": now})
    return folder


@pytest.fixture(scope="session")
def picked(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PickResult:
    """The int8 network of the run, certified on the whole test split."""
    out = tmp_path_factory.mktemp("picked") / "digits"
    return pick(run_folder, Requirements(max_bytes=40_000, min_certified=0.5, min_accuracy=0.8, level="int8"), out)


@pytest.fixture
def copy(picked: PickResult, tmp_path: Path) -> Path:
    """A copy of the picked folder that a test may change."""
    return Path(shutil.copytree(picked.folder, tmp_path / "copy"))


@pytest.fixture
def edit(copy: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """Changes the certificate of the copy with a function of its JSON; gives the folder."""

    def change(function: Callable[[dict[str, Any]], object]) -> Path:
        path = copy / "certificate.json"
        plain = json.loads(path.read_text())
        function(plain)
        path.write_text(json.dumps(plain))
        return copy

    return change
