"""Which networks of a run are kept: a long study would fill the disk with those that nobody will pick."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cactus_ray.search.records import Records
from cactus_ray.search.store import with_front

VARIANTS = ("", ".best", ".last")


def prune_checkpoints(run: Path, records: Records, front: Mapping[str, str]) -> list[str]:
    """Delete the networks of trials that can no longer matter; returns the names of these trials.

    A trial matters while it is under way (its network is verified, or a later driver needs it) and while one of its
    points is on the front. Points of complete trials stay for ever, so what is dominated once is dominated for good.
    ``cactus-ray train --trial`` makes any of them again.
    """
    leading = {point["trial"] for point in with_front(records, front) if point["on_front"]}
    pruned = []
    for trial in records.trials.values():
        if trial.status not in ("completed", "failed", "stopped") or trial.id in leading:
            continue
        files = [run / "checkpoints" / f"{trial.id}{variant}.safetensors" for variant in VARIANTS]
        present = [file for file in files if file.is_file()]
        for file in present:
            file.unlink()
        pruned += [trial.id] if present else []
    return pruned
