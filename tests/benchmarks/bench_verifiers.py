"""How much two verifiers are faster than one, through the real pool: broker, Ray, both stages, all levels.

    python tests/benchmarks/bench_verifiers.py --network runs/mnist/checkpoints/t0001.safetensors --seconds 60

Both pools are up and warm; each turn verifies the same samples of the same network with either, in changing order, and
a ratio is one / two within a turn. A trial's network is compressed anew by every verifier that works for it, as in a
study. Beside the wall clock: the CPU seconds of this process (the driver) and of Ray's own (raylet, gcs_server).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import ray
import torch

from cactus_ray.cluster.broker import Broker, Job, Limits, Lost
from cactus_ray.cluster.connect import connected
from cactus_ray.cluster.verifier import VerifierContext
from cactus_ray.cluster.verifier_pool import VerifierPool
from cactus_ray.config import DataConfig, RunConfig, ThreatConfig, parse
from cactus_ray.data import load, subset
from cactus_ray.models.network import Network, pack, unpack
from cactus_ray.search.chunks import DEAR_BOUNDS, ChunkResult, Pieces, Verification
from cactus_ray.training.loop import train
from cactus_ray.verification.verdict import VerificationSettings

TARGET = 1.8
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Turn:
    """One pass over all trials. CPU seconds; ``worked``: seconds that verifiers say they worked, in all."""

    verifiers: int
    wall: float
    worked: float
    driver: float
    rays: float
    chunks: int
    verdicts: dict[str, int]


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    network = _network(arguments)
    assert network.config is not None
    data, threat = network.config.data, network.config.threat
    if arguments.root:
        data = replace(data, root=str(arguments.root.resolve()))
    settings = VerificationSettings(
        bound=arguments.bound, max_nodes=arguments.nodes, seconds_per_sample=arguments.seconds_per_sample
    )
    samples = tuple(subset(len(load(data, ("selection",)).labels["selection"]), arguments.samples).tolist())
    pieces = Pieces(
        tuple(arguments.levels),
        samples,
        arguments.cheap_samples,
        arguments.dear_samples,
        arguments.bound in DEAR_BOUNDS,
    )
    # one logical CPU for each actor of both pools: the idle one costs nothing but its place
    with connected(None, cpus=3):
        pools = {count: _pool(count, pack(network), data, threat, settings) for count in (1, 2)}
        for count, pool in pools.items():
            turn(pool, replace(pieces, samples=samples[: 20 * count]), count, "warm")
        first = turn(pools[1], pieces, 1, "size")
        trials = max(1, math.ceil(arguments.seconds / first.wall))
        what = f"{len(samples)} samples at {len(pieces.levels)} levels"
        print(f"{what} take one verifier {first.wall:.1f} s; {trials} trials of them a turn; {first.verdicts}")
        turns = []
        for number in range(arguments.repeats):
            for count in (1, 2) if number % 2 == 0 else (2, 1):
                turns.append(turn(pools[count], pieces, trials, f"r{number}"))
                print(line(turns[-1]), flush=True)
        for pool in pools.values():
            pool.close()
    print(summary(turns))
    if arguments.out:
        arguments.out.write_text(json.dumps([asdict(t) for t in turns], indent=1) + "\n")


def turn(pool: VerifierPool, pieces: Pieces, trials: int, name: str) -> Turn:
    """Verify ``trials`` trials, as a study's desk would; a lost verifier or a refused chunk ends the benchmark."""
    rays = _ray_processes()
    begin, driver, before = time.perf_counter(), time.process_time(), _cpu(rays)
    states = {f"{name}-{i}": Verification(f"{name}-{i}", pieces, 0.0) for i in range(trials)}
    for number, (trial, state) in enumerate(states.items()):
        pool.submit(Job(trial, number, 1, state.next_chunks()))
    open_, worked, chunks = set(states), 0.0, 0
    while open_:
        for found in pool.poll(0.05):
            if not isinstance(found, ChunkResult):
                sys.exit(f"no measurement: {found.reason if isinstance(found, Lost) else found}")
            state = states[found.chunk.trial]
            state.take(found.chunk, found.levels)
            worked, chunks = worked + found.seconds, chunks + 1
            if not state.open:
                more = state.next_chunks()
                if more:
                    pool.submit(Job(state.trial, int(state.trial.rsplit("-", 1)[1]), 1, more))
                else:
                    open_.discard(state.trial)
    wall = time.perf_counter() - begin
    rows = [row for state in states.values() for level in state.rows.values() for row in level.values()]
    verdicts = {v: sum(row[2] == v for row in rows) for v in ("CERTIFIED", "FALSIFIED", "UNKNOWN")}
    spent = time.process_time() - driver
    return Turn(len(pool.actors), wall, worked, spent, _cpu(rays) - before, chunks, verdicts)


def line(t: Turn) -> str:
    return (
        f"{t.verifiers} verifier(s): {t.wall:7.2f} s wall, {t.worked:7.2f} s worked in {t.chunks} chunks; "
        f"CPU: driver {t.driver:.2f} s, Ray {t.rays:.2f} s"
    )


def summary(turns: list[Turn]) -> str:
    one, two = ([t for t in turns if t.verifiers == count] for count in (1, 2))
    ratios = [a.wall / b.wall for a, b in zip(one, two, strict=True)]
    # What two verifiers could reach on this machine now: how much slower each works beside the other.
    slowdown = statistics.median(b.worked / a.worked for a, b in zip(one, two, strict=True))
    middle = statistics.median(ratios)
    return (
        f"two verifiers are {middle:.2f} times one (median of {len(ratios)}; {min(ratios):.2f} to {max(ratios):.2f}); "
        f"target {TARGET}: {'reached' if middle >= TARGET else 'missed'}\n"
        f"seconds of work of two over those of one: {slowdown:.2f} (above 1: the machine's part of what is missing)\n"
        f"CPU share of driver and Ray beside two verifiers: "
        f"{statistics.median((t.driver + t.rays) / t.wall for t in two):.1%} of a core"
    )


def _pool(
    count: int, network: bytes, data: DataConfig, threat: ThreatConfig, settings: VerificationSettings
) -> VerifierPool:
    broker = Broker(Limits(), [f"v{i}" for i in range(count)])
    context = VerifierContext(data, threat, settings, threads=1)
    pool = VerifierPool(context, broker, {"CPU": 1.0}, lambda trial: network)
    ray.get([actor.pid.remote() for actor in pool.actors.values()])
    return pool


def _network(arguments: argparse.Namespace) -> Network:
    if arguments.network:
        return unpack(arguments.network.read_bytes(), str(arguments.network))
    plain = {
        "data": {"name": "digits"}, "model": {"name": "cnn_small"}, "threat": {"epsilon": 0.1}, "method": "ibp",
        "learning_rate": 0.005, "standard_weight": 1.0, "train": {"epochs": 8},
    }  # fmt: skip
    config = parse(RunConfig, plain)
    return train(config, load(config.data, ("train", "selection")), report=lambda epoch: True).network


def _ray_processes() -> list[int]:
    """Process ids of the raylet and the gcs_server that this process has started."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                name, rest = (folder / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
            except OSError:  # it has ended
                continue
            if name in ("raylet", "gcs_server") and int(rest.split()[1]) == os.getpid():
                found.append(int(folder.name))
    return found


def _cpu(processes: list[int]) -> float:
    """CPU seconds, user and system, of processes."""
    total = 0
    for pid in processes:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--network", type=Path, help="a network of ours; default: one trained on digits")
    parser.add_argument("--root", type=Path, help="folder of the network's data; default: the one it was trained from")
    parser.add_argument("--levels", nargs="+", default=["dense", "int4", "prune:gu-l1:0.95"])
    parser.add_argument("--samples", type=int, default=200, help="samples of the selection split")
    parser.add_argument("--bound", default="branch", choices=["ibp", "crown", "alpha", "branch"])
    parser.add_argument("--nodes", type=int, default=100, help="sub-problems of a sample; few: work that repeats")
    parser.add_argument("--seconds-per-sample", type=float, default=0.0)
    parser.add_argument("--cheap-samples", type=int, default=50)
    parser.add_argument("--dear-samples", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60.0, help="work of a turn for one verifier, at least")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON of all turns")
    return parser.parse_args()


if __name__ == "__main__":
    main()
