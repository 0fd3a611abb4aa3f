"""Seconds of an ask, and the memory, of a sampler in a long study.

    python tests/benchmarks/bench_sampler.py --trials 100,1000,10000 --sampler tpe --pruned 0.5

Replays made-up records of a conditional space with two objectives and a constraint, then asks and tells.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import time
from typing import Any

from cactus_ray.search.sampler import OptunaSampler
from cactus_ray.search.space import Space, parse_space
from cactus_ray.search.store import Records, TrialRecord


def space(sampler: str, trials: int) -> Space:
    return parse_space(
        {
            "name": "bench", "data": {"name": "digits"}, "model": {"name": "mlp"}, "threat": {"epsilon": 0.1},
            "levels": ["dense", "int8"],
            "parameters": {
                "method": {"values": ["cactus", "sabr", "ibp", "mtl_ibp"]},
                "learning_rate": {"distribution": "log_uniform_values", "min": 0.0001, "max": 0.1},
                "standard_weight": {"min": 0.0, "max": 1.0},
                "box_ratio": {"min": 0.1, "max": 1.0},
                "ibp_weight": {"min": 0.0, "max": 1.0},
                "train.batch_size": {"distribution": "q_log_uniform_values", "min": 16, "max": 256, "q": 16},
                "compression_set.high": {"min": 0.75, "max": 0.98, "when": {"method": ["cactus"]}},
                "awp_radius": {"min": 0.0, "max": 1.0, "when": {"method": ["cactus"]}},
            },
            "constraints": [{"metric": "standard_accuracy@int8", "min": 0.2}],
            "search": {"sampler": sampler, "trials": trials},
        }
    )  # fmt: skip


def metrics(values: dict[str, Any], noise: random.Random) -> dict[str, float]:
    weight = values.get("standard_weight", 0.5) + noise.gauss(0.0, 0.05)
    off = abs(values["learning_rate"] - 0.01) + abs(noise.gauss(0.0, 0.05))
    return {
        "mean_certified_accuracy": 1 - weight**2 - off,
        "mean_standard_accuracy": 1 - (1 - weight) ** 2 - off,
        "standard_accuracy@int8": 1 - off,
    }


def history(asked: Space, trials: int, pruned: float) -> Records:
    """Records of random trials, some of them stopped early."""
    draws, noise = OptunaSampler(space("random", trials)), random.Random(0)
    records = Records()
    for number in range(1, trials + 1):
        suggestion = draws.ask()
        assert suggestion is not None
        record = TrialRecord(f"t{number:05d}", number, "stopped" if noise.random() < pruned else "completed")
        record.parameters = suggestion.values
        record.metrics = metrics(suggestion.values, noise)
        draws.tell(number, None, "failed")
        records.trials[record.id] = record
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", default="100,1000,10000")
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--pruned", type=float, default=0.3)
    parser.add_argument("--asks", type=int, default=10)
    arguments = parser.parse_args()
    noise = random.Random(1)
    for trials in map(int, arguments.trials.split(",")):
        asked = space(arguments.sampler, trials)
        records = history(asked, trials, arguments.pruned)
        begin = time.process_time()
        sampler = OptunaSampler(asked)
        sampler.replay(records)
        replayed = time.process_time() - begin
        asks, tells = [], []
        for _ in range(arguments.asks):
            begin = time.process_time()
            suggestion = sampler.ask()
            assert suggestion is not None
            middle = time.process_time()
            sampler.tell(suggestion.number, metrics(suggestion.values, noise), "completed")
            asks.append(middle - begin)
            tells.append(time.process_time() - middle)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"{arguments.sampler} {trials:6d} trials: ask {statistics.median(asks):.3f} s (largest {max(asks):.3f}), "
            f"tell {1000 * statistics.median(tells):.2f} ms, replay {replayed:.1f} s, memory {memory:.2f} GB (CPU time)"
        )


if __name__ == "__main__":
    main()
