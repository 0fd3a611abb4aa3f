"""What the driver spends per event in a long study, without training and without Ray.

    python tests/benchmarks/bench_driver.py --trials 1000,10000 --samplers random,tpe
    python tests/benchmarks/bench_driver.py --ray 24

The real ``Study`` with its real store (events synced to disk), rungs, tables, kept networks and progress lines. 64
simulated workers make up epochs and verdicts in simulated time. The history grows under random search; then the study
is reopened from its records, as after a kill, under each sampler in turn, and so many more trials are measured.
``--ray``: so many trials that sleep instead, through Ray, its desk and its mailbox.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import io
import itertools
import logging
import os
import random
import resource
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_overhead import SLEEP
from rich.console import Console

from cactus_ray.cluster.driver import DriverOptions, run_study
from cactus_ray.report.page import write_page
from cactus_ray.report.progress import StudyProgress
from cactus_ray.search.chunks import Chunk, ChunkResult, LevelResult
from cactus_ray.search.rungs import proxy_goals
from cactus_ray.search.space import Space, load_space, parse_space
from cactus_ray.search.store import Records, RunStore, read_records, write_tables
from cactus_ray.search.study import Study
from cactus_ray.search.upkeep import Upkeep

SPACE = Path(__file__).parents[2] / "search_spaces" / "digits.yaml"
WORKERS = 64
SAMPLES = 360
REFERENCE = {"certified_accuracy": 0.0, "bytes": 400_000.0, "standard_accuracy": 0.0}
SIZES = (120_000, 40_000, 25_000, 30_000, 20_000, 15_000)


@dataclass
class Times:
    """Seconds of the calls of each kind: of the wall, and of this process's CPUs."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    busy: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        begin, busy = time.perf_counter(), time.process_time()
        yield
        self.seconds[kind].append(time.perf_counter() - begin)
        self.busy[kind].append(time.process_time() - busy)

    def print(self) -> None:
        for kind, found in sorted(self.seconds.items()):
            print(f"    {kind:22s} {len(found):5d} calls  {_spread(found)} ms;  of CPU {_spread(self.busy[kind])} ms")


def _spread(found: list[float]) -> str:
    """Where other work shares the cores, the tenth part that was disturbed least says more than the median."""
    ordered = sorted(found)
    low, middle, high = (1e3 * ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in (0.1, 0.5, 0.99))
    return f"p10 {low:6.2f}  median {middle:6.2f}  p99 {high:6.2f}  max {1e3 * ordered[-1]:6.2f}"


def space(sampler: str, options: argparse.Namespace) -> Space:
    changes = {
        "search.sampler": sampler, "search.trials": "1000000", "search.scheduler.name": options.scheduler,
        "search.scheduler.reduction": str(options.reduction), "train.epochs": str(options.epochs),
        "wandb.mode": "disabled", "search.scheduler.promote": str(not options.stop).lower(),
    }  # fmt: skip
    return load_space(SPACE, changes)


class Workers:
    """Simulated trainers and verifiers of one study: what they send, in the order of simulated time."""

    def __init__(self, study: Study, times: Times, seed: int) -> None:
        self.study, self.times, self.noise = study, times, random.Random(seed)
        self.network = self.noise.randbytes(60_000)
        self.goals = proxy_goals(study.space.levels)
        self.now, self.order = 0.0, itertools.count()
        self.events: list[tuple[float, int, Callable[[], None]]] = []

    def run(self, trials: int) -> None:
        """Go on until so many more trials have ended."""
        for chunk in self.study.resume():
            self._later(self.noise.random(), lambda chunk=chunk: self._verdicts(chunk))
        goal = self._ended() + trials
        while self._ended() < goal:
            while self.study.in_flight < WORKERS:
                with self.times.of("ask (next trial)"):
                    start = self.study.next_trial()
                assert start is not None
                self._later(1 + self.noise.random(), lambda start=start: self._epoch(start, start.epoch + 1))
            self.now, _, act = heapq.heappop(self.events)
            act()

    def _ended(self) -> int:
        return self.study.finished + len(self.study.waiting)

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.order), act))

    def _quality(self, trial: str) -> float:
        return random.Random(trial).random()

    def _epoch(self, start: Any, epoch: int) -> None:
        epochs = start.config.train.epochs
        found = {
            name: min(1.0, 0.6 * epoch / epochs + 0.3 * self._quality(f"{start.id} {name}") + 0.1 * self.noise.random())
            for name in ("standard_accuracy", "ibp_certified_accuracy", *(self.goals if epoch in start.scored else ()))
        }
        found |= {"loss": 1 / epoch, "epsilon": 0.1, "standard_weight": 0.3, "learning_rate": 0.01, "seconds": 1.0}
        kind = "rung report" if epoch in start.asked else "epoch report"
        with self.times.of(kind):
            go_on = self.study.epoch(start.id, epoch, epochs, found)
        if not go_on:
            with self.times.of("record of a wait" if self.study.rungs.waits(start.id) else "record of a stop"):
                self.study.waits(start.id, epoch, self.network, float(epoch))
        elif epoch < epochs:
            self._later(1 + self.noise.random(), lambda: self._epoch(start, epoch + 1))
        else:
            with self.times.of("record of a training"):
                chunks = self.study.trained(start.id, {"last": self.network, "best": self.network}, "last", epochs, 9.0)
            self._verify(chunks)

    def _verify(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            self._later(self.noise.random(), lambda chunk=chunk: self._verdicts(chunk))

    def _verdicts(self, chunk: Chunk) -> None:
        weight = self._quality(chunk.trial)
        levels = {}
        for level in chunk.levels:
            place = self.study.space.levels.index(level)
            standard, certified = 1 - 0.2 * weight**2, (0.9 - 0.1 * place) * (1 - 0.5 * (1 - weight) ** 2)
            rows = [self._row(index, standard, certified) for index in chunk.indices]
            size = int(SIZES[place] * (0.7 + 0.6 * self._quality(f"{chunk.trial} size")))
            levels[level] = LevelResult(rows, {"bytes": size, "ideal_bits": 8 * size, "macs": 100_000}, 1.0)
        result = ChunkResult(chunk, levels, {"attack": 3.0, "ibp": 1.0, "crown": 1.0, "overhead": 0.5})
        completes = len(self.study.verification.states[chunk.trial].open) == 1
        with self.times.of("record of a trial" if completes else "verdicts of a chunk"):
            chunks = self.study.verified(result)
        self._verify(chunks)

    def _row(self, index: int, standard: float, certified: float) -> list[Any]:
        draw = self.noise.random()
        verdict = "CERTIFIED" if draw < certified else "FALSIFIED" if draw < certified + 0.3 else "UNKNOWN"
        return [index, index % 10, verdict, draw < standard, 0.1 - draw, "crown", 0.01 * draw]


class Run:
    """A run's folder, opened again for every part of the benchmark."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options, self.part = folder, options, 0

    def more(self, sampler: str, trials: int, what: str | None) -> None:
        """So many more trials under a sampler; times are printed where ``what`` names them."""
        asked, store = space(sampler, self.options), RunStore(self.folder)
        begin = time.perf_counter()
        records = read_records(self.folder, verdicts=False) if store.file.exists() else Records()
        read = time.perf_counter()
        upkeep = Upkeep(asked, store, records)
        progress = StudyProgress(asked, records, console=Console(file=io.StringIO()))
        study = Study(asked, store, records, list(range(SAMPLES)), [progress.event, upkeep.event])
        ready = time.perf_counter()
        if not records.study:
            study.begin({"name": "bench", "seed": 0}, REFERENCE)
        del records
        study.work()
        times = Times()
        gc.collect()
        gc.freeze()  # as the driver does
        with upkeep.writing():
            Workers(study, times, self.part).run(trials)
        self.part += 1
        if what:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            leading = len(study.verification.rivals.all.front.points)
            complete, points = len(upkeep.table.texts) // len(asked.levels), len(upkeep.table.texts)
            print(
                f"{what}, {sampler}: {complete} complete, {points} points, {leading} on the "
                f"front; records read in {read - begin:.1f} s, study rebuilt in {ready - read:.1f} s; "
                f"peak memory {memory:.2f} GiB; trials.jsonl {store.file.stat().st_size / 2**20:.0f} MiB"
            )
            times.print()
            begin = time.perf_counter()
            upkeep.write()
            print(f"    tables written in {time.perf_counter() - begin:.2f} s")

    def end(self) -> None:
        """What a driver does when its study is over."""
        begin = time.perf_counter()
        asked = space("random", self.options)
        write_tables(self.folder, read_records(self.folder, verdicts=False), asked.front)
        middle = time.perf_counter()
        print(f"tables from the records in {middle - begin:.1f} s")
        if self.options.page:
            import yaml

            (self.folder / "space.yaml").write_text(yaml.safe_dump(asked.to_dict(), sort_keys=False))
            size = write_page(self.folder).stat().st_size / 2**20
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"page in {time.perf_counter() - middle:.1f} s, {size:.0f} MiB; peak memory {memory:.2f} GiB")


def sleeping(trials: int, at_once: int, folder: Path) -> None:
    """The real driver path: Ray Tune, the desk and verifiers, with trials that sleep in the place of every step."""
    os.environ[SLEEP] = "0.25"
    asked = parse_space(
        {
            "name": "sleep", "data": {"name": "digits", "train_samples": 256}, "threat": {"epsilon": 0.02},
            "model": {"factory": "bench_overhead:network"}, "levels": ["dense", "int8"],
            "train": {"epochs": 9, "batch_size": 64},
            "parameters": {"method": {"value": "sabr"}, "learning_rate": {"min": 0.001, "max": 0.01}},
            "search": {"trials": trials, "concurrency": at_once, "scheduler": {"name": "asha"}},
            "verification": {"samples": 20, "attack_steps": 1}, "wandb": {"mode": "disabled"},
        }
    )  # fmt: skip
    times, store = Times(), RunStore(folder)
    upkeep = Upkeep(asked, store, Records())
    study = Study(asked, store, Records(), list(range(20)), [upkeep.event])
    for name in ("begun", "epoch", "saved", "trained", "verified", "stopped", "waits", "next_trial"):
        setattr(study, name, _timed(getattr(study, name), name, times))
    study.begin({"name": "sleep", "seed": 0}, REFERENCE)
    begin, busy = time.perf_counter(), time.process_time()
    with upkeep.writing():
        run_study(study, DriverOptions(cpus=at_once + 1, trust_code=True))
    wall, cpu = time.perf_counter() - begin, time.process_time() - busy
    handled = sum(sum(found) for found in times.seconds.values())
    print(f"{trials} trials that sleep, {at_once} at once: {wall:.1f} s, of which {cpu:.1f} s CPU of the driver")
    print(f"in the study's hands {handled:.2f} s, {handled / wall:.2%} of the time")
    times.print()


def _timed(call: Callable[..., Any], name: str, times: Times) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        with times.of(name):
            return call(*arguments, **options)

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", default="1000,10000")
    parser.add_argument("--samplers", default="random,tpe")
    parser.add_argument("--scheduler", default="asha", help="none: every trial is trained to its end and verified")
    parser.add_argument("--stop", action="store_true", help="trials that are not among the best do not wait")
    parser.add_argument("--reduction", type=float, default=3.0, help="of halving: more trials are stopped at once")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--measured", type=int, default=200, help="trials that are measured under each sampler")
    parser.add_argument("--end", action="store_true", help="write the tables from the records at the end, too")
    parser.add_argument("--page", action="store_true", help="with --end: report.html, too")
    parser.add_argument("--folder", type=Path, help="keep the run here and go on with it")
    parser.add_argument("--ray", type=int, help="this many trials that sleep, through Ray")
    parser.add_argument("--at-once", type=int, default=4)
    options = parser.parse_args()
    logging.getLogger("cactus_ray.search.attempts").setLevel(logging.ERROR)  # made-up states are passed over
    folder = options.folder or Path(tempfile.mkdtemp(prefix="bench-driver-"))
    try:
        if options.ray:
            sleeping(options.ray, options.at_once, folder)
            return
        run = Run(folder, options)
        done = len(read_records(folder, verdicts=False).trials) if (folder / "trials.jsonl").exists() else 0
        for trials in map(int, options.trials.split(",")):
            if done < trials:
                run.more("random", trials - done, None)
                done = trials
            for sampler in filter(None, options.samplers.split(",")):
                run.more(sampler, options.measured, f"{trials} trials")
                done += options.measured
        if options.end:
            run.end()
    finally:
        if options.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
