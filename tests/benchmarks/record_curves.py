"""Whole learning curves of random configurations: what any search over them would have seen, for ``bench_search.py``.

    .venv/bin/python tests/benchmarks/record_curves.py search_spaces/digits.yaml --count 160 \
        --set train.epochs=10 --set train.batch_size=64 --set verification.attack_steps=5 \
        --set verification.samples=150 --out tests/benchmarks/curves/digits.jsonl
    .venv/bin/python tests/benchmarks/record_curves.py search_spaces/mnist_small.yaml --count 60 \
        --set train.epochs=5 --set data.train_samples=5000 --set verification.attack_steps=5 \
        --set verification.samples=150 --set data.root=../shared/data --out tests/benchmarks/curves/mnist.jsonl

Draws ``--count`` configurations with the random sampler (the paper's points are left out), each with a seed of its own,
trains every one to its end whatever it shows, scores the proxies of halving at every level after every epoch, and
verifies all levels at the end with the space's own settings. The file: a header, then one line per configuration;
accuracies as counts of samples, times in milliseconds of processor time of one thread, so that load does not distort
them. Goes on where the file ends; two runs with ``--shard 0/2`` and ``--shard 1/2`` may share one file. ``--sizes 8``
records, in a file of its own, only the sizes of all levels after each of the first eight epochs, for older recordings
that lack them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cactus_ray.commands.search import reference_point
from cactus_ray.config import RunConfig
from cactus_ray.data import DataSet, load, subset
from cactus_ray.models.build import create
from cactus_ray.models.network import Network
from cactus_ray.search.evaluate import at_level
from cactus_ray.search.rungs import PROXIES, epoch_costs
from cactus_ray.search.sampler import OptunaSampler
from cactus_ray.search.space import Space, load_space, parse_space
from cactus_ray.training.loop import EpochReport, NonFiniteLossError, train
from cactus_ray.training.state import unpack_state
from cactus_ray.verification.siblings import LevelModel, verify_levels
from cactus_ray.verification.timing import stage_seconds
from cactus_ray.verification.verdict import Verdict

MEASURES = ("bytes", "ideal_bits", "macs")


def drawn(space: Space, count: int) -> list[dict[str, Any]]:
    """The first ``count`` random configurations of the space: the same for the same seed."""
    search = replace(space.search, sampler="random")
    sampler = OptunaSampler(replace(space, search=search, points=()))
    asked = (sampler.ask() for _ in range(count))
    return [suggestion.values for suggestion in asked if suggestion is not None]


def header(space: Space, untrained: Network, data: DataSet) -> dict[str, Any]:
    """What the lines below are about; paths of this machine are left out."""
    plain = space.to_dict()
    plain["data"] = {k: v for k, v in plain["data"].items() if k != "root"}
    config = space.configuration({p.name: p.domain.ends()[0] for p in space.parameters}, 1)
    scored = min(config.train.proxy_samples, len(data.labels["selection"]))
    return {
        "schema": 1, "space": plain, "reference_point": reference_point(space, untrained), "scored": scored,
        "train": len(data.labels["train"]), "torch": torch.__version__, "digests": dict(data.digests),
    }  # fmt: skip


def recorded(space: Space, config: RunConfig, data: DataSet) -> dict[str, Any]:
    """One configuration, trained to the end: counts after every epoch and after verification, and what all that cost.

    ``train``: ms by epoch. ``seen``: by epoch, [right, IBP-certified] of the scored images by level. ``proxy``: ms by
    level, of all epochs. ``sizes``, ``sizing``: see ``sized``. ``verify``: ms by level, its network and file included.
    A loss that is not finite ends it.
    """
    levels, scored = space.levels, min(config.train.proxy_samples, len(data.labels["selection"]))
    spent: list[int] = []
    seen: list[list[list[int | None]]] = []
    proxy, sizing = dict.fromkeys(levels, 0.0), dict.fromkeys(levels, 0.0)
    sizes: list[list[list[int]]] = []
    clock = time.process_time()

    def report(epoch: EpochReport) -> bool:
        nonlocal clock
        spent.append(milliseconds(clock))
        row = []
        for level in levels:
            begun = time.process_time()
            found = epoch.score([level])
            row.append([count_of(found[f"{name}@{level}"], scored) for name in PROXIES])
            proxy[level] += time.process_time() - begun
        seen.append(row)
        sizes.append(sizes_of(space, config, data, epoch, sizing))
        clock = time.process_time()
        return True

    found: dict[str, Any] = {}
    try:
        result = train(config, data, report=report)
        found = verified(space, result.network, data)
    except NonFiniteLossError as error:
        found = {"error": str(error)}
    costs = {name: [round(1000 * s) for s in took.values()] for name, took in (("proxy", proxy), ("sizing", sizing))}
    return {"train": spent, "seen": seen, "sizes": sizes, **costs, **found}


def sized(space: Space, config: RunConfig, data: DataSet, epochs: int) -> dict[str, Any]:
    """``sizes``: [bytes, ideal_bits] by level after each of the first epochs; ``sizing``: ms by level, of all these."""
    found: list[list[list[int]]] = []
    spent = dict.fromkeys(space.levels, 0.0)

    def report(epoch: EpochReport) -> bool:
        found.append(sizes_of(space, config, data, epoch, spent))
        return epoch.epoch < epochs

    train(config, data, report=report)
    return {"sizes": found, "sizing": [round(1000 * s) for s in spent.values()]}


def sizes_of(
    space: Space, config: RunConfig, data: DataSet, epoch: EpochReport, spent: dict[str, float]
) -> list[list[int]]:
    """[bytes, ideal_bits] by level of the network after an epoch; the seconds of each level are added to ``spent``."""
    state = unpack_state(epoch.save())
    network, found = Network(state.graph, state.params, config, data.class_names), []
    for level in space.levels:
        begun = time.process_time()
        measures = at_level(network, level, space.data, space.threat.domain).measures
        found.append([measures["bytes"], measures["ideal_bits"]])
        spent[level] += time.process_time() - begun
    return found


def verified(space: Space, network: Network, data: DataSet) -> dict[str, Any]:
    """Verdict counts of all levels on the space's selection samples, in pieces as a verifier gets them.

    ``points``: by level right, certified, falsified, unknown and the measures; ``decided``: by level, samples by what
    decided them; ``stages``: ms by stage, of all levels.
    """
    images, labels = data.split("selection")
    chosen = subset(len(labels), None if space.samples == "selection" else int(space.samples))
    models, measures, spent = {}, {}, {}
    for level in space.levels:
        begun = time.process_time()
        made = at_level(network, level, space.data, space.threat.domain)
        models[level], measures[level] = LevelModel(made.graph, made.params), made.measures
        spent[level] = time.process_time() - begun
    counts = {level: Counter[str]() for level in space.levels}
    decided = {level: Counter[str]() for level in space.levels}
    begun = time.process_time()
    shares = dict.fromkeys(space.levels, 0.0)
    with stage_seconds() as stages:
        for part in chosen.split(space.resources.cheap_samples):
            verdicts = verify_levels(
                models, images[part], labels[part], part.tolist(), space.threat, space.verification
            )
            for level, rows in verdicts.items():
                counts[level].update(row.verdict.value for row in rows)
                counts[level]["right"] += sum(row.correct for row in rows)
                decided[level].update(row.decided_by for row in rows)
                shares[level] += sum(row.seconds for row in rows)
    total, shared = time.process_time() - begun, sum(shares.values())
    names = ("right", Verdict.CERTIFIED.value, Verdict.FALSIFIED.value, Verdict.UNKNOWN.value)
    return {
        "verify": [round(1000 * (spent[level] + total * shares[level] / shared)) for level in space.levels],
        "points": [[*(counts[v][n] for n in names), *(measures[v][m] for m in MEASURES)] for v in space.levels],
        "decided": [dict(decided[level]) for level in space.levels],
        "stages": {name: round(1000 * seconds) for name, seconds in stages.items()},
    }


def count_of(share: float, whole: int) -> int | None:
    return round(share * whole) if share == share else None


def milliseconds(since: float) -> int:
    return round(1000 * (time.process_time() - since))


def append(file: Path, row: Mapping[str, Any]) -> None:
    """One line in one write, so that two writers do not mix."""
    line = (json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n").encode()
    target = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(target, line)
    finally:
        os.close(target)


def known(file: Path, head: Mapping[str, Any]) -> set[int]:
    """Numbers of the configurations that the file holds; it is begun if there is none."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        append(file, head)
    first, *rows = map(json.loads, file.read_text().splitlines())
    if first["space"] != json.loads(json.dumps(head["space"])) or first["digests"] != head["digests"]:
        raise SystemExit(f"{file}: recorded with another space or other data; expected a file of this space, or none")
    return {row["number"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("space", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=160, help="configurations to draw")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the space")
    parser.add_argument("--shard", default="0/1", help="K/N: every N-th configuration, from the K-th on")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no other one after so many")
    parser.add_argument("--sizes", type=int, metavar="EPOCHS", help="record sizes only, after the first so many epochs")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    space = load_space(asked.space, dict(text.split("=", 1) for text in asked.set))
    space = parse_space({**space.to_dict(), "search": {"sampler": "random", "seed": space.search.seed}})
    data = load(space.data, ("train", "selection"))

    def untrained(config: RunConfig) -> Network:
        return create(config, data.input_shape, data.classes, data.class_names)

    first = space.configuration({p.name: p.domain.ends()[0] for p in space.parameters}, 1)
    done = known(asked.out, header(space, untrained(first), data))
    cost = epoch_costs(first, untrained)
    shard, shards = map(int, asked.shard.split("/"))
    recorded(space, replace(first, train=replace(first.train, epochs=1)), data)  # the first steps of a process are slow
    begun = time.monotonic()
    for number, values in enumerate(drawn(space, asked.count), 1):
        if number in done or number % shards != shard or time.monotonic() - begun > asked.seconds:
            continue
        config, since = space.configuration(values, number), time.process_time()
        mean = cost(config)(config.train.epochs) / config.train.epochs
        row = {"number": number, "values": values, "seed": config.seed, "epoch_cost": round(mean, 4)}
        if asked.sizes:
            row = {"number": number, **sized(space, config, data, asked.sizes)}
        else:
            row |= recorded(space, config, data)
        append(asked.out, row)
        print(f"{number} of {asked.count}: {milliseconds(since) / 1000:.1f} s", flush=True)


if __name__ == "__main__":
    main()
