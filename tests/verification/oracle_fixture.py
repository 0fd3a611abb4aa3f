"""The campaign on disk: the fixture with networks, radii and exact brackets, and lines of resumable files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracle_campaign import LEVELS, NETWORKS, Campaign, Case, Subject

FIXTURE = Path(__file__).with_name("oracle_cases.npz")


def save(path: Path, campaign: Campaign, cases: list[Case]) -> None:
    """Write the fixture: networks, subjects and cases."""
    subjects = sorted({c.subject.number: c.subject for c in cases}.values(), key=lambda s: s.number)
    tensors = {f"{n}/{k}": v.half().numpy() for n, p in campaign.networks.items() for k, v in p.items()}
    listed = [[s.number, NETWORKS.index(s.network), LEVELS.index(s.level), s.sample, s.label] for s in subjects]
    np.savez_compressed(
        path,
        subjects=np.array(listed, dtype=np.int16),
        radii=np.array([s.radius for s in subjects]),
        cases=np.array([[c.number, c.subject.number, c.unstable] for c in cases], dtype=np.int16),
        epsilons=np.array([c.epsilon for c in cases]),
        lows=np.array([c.low for c in cases]),
        shares=np.array([c.shares for c in cases], dtype=np.uint16),
        **tensors,
    )


def load(path: Path = FIXTURE) -> tuple[Campaign, list[Case]]:
    """Read the fixture."""
    with np.load(path) as found:
        data = {name: found[name] for name in found.files}
    networks = {
        n: {k.split("/")[1]: torch.from_numpy(v).float() for k, v in data.items() if k.startswith(f"{n}/")}
        for n in NETWORKS
    }
    subjects = {}
    for (number, network, level, sample, label), (safe, falls) in zip(
        data["subjects"].tolist(), data["radii"].tolist(), strict=True
    ):
        subjects[number] = Subject(number, NETWORKS[network], LEVELS[level], sample, label, (safe, falls))
    columns = zip(data["cases"], data["epsilons"], data["lows"], data["shares"], strict=True)
    return Campaign(networks), [
        Case(int(c[0]), subjects[int(c[1])], float(e), float(low), shares, int(c[2])) for c, e, low, shares in columns
    ]


def to_json(case: Case) -> str:
    """One line of a resumable file."""
    subject = case.subject.__dict__ | {"radius": list(case.subject.radius)}
    plain = {"case": case.number, "epsilon": case.epsilon, "low": case.low, "unstable": case.unstable}
    return json.dumps(plain | {"subject": subject, "shares": case.shares.tolist()})


def from_json(data: dict[str, Any]) -> Case:
    """Inverse of ``to_json``, of the parsed line."""
    subject = Subject(**{**data["subject"], "radius": tuple(data["subject"]["radius"])})
    shares = np.array(data["shares"], dtype=np.uint16)
    return Case(data["case"], subject, data["epsilon"], data["low"], shares, data["unstable"])
