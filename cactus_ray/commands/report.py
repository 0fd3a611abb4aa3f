"""``cactus-ray report``: everything that can be rebuilt from a run's records."""

from __future__ import annotations

from pathlib import Path

from cactus_ray.errors import UserError
from cactus_ray.report.page import write_page
from cactus_ray.search.space import Space, load_space
from cactus_ray.search.store import Records, read_records, write_tables


def space_of(run: Path) -> Space:
    """The space that a run was made with. Raises UserError where the folder is no run."""
    path = run / "space.yaml"
    if not path.is_file():
        raise UserError(f"{run}: holds no space.yaml; expected the folder of a run, such as runs/digits")
    return load_space(path)


def rebuild(run: Path) -> Records:
    """Write points.csv, front.csv and report.html again, from space.yaml and trials.jsonl alone."""
    space = space_of(run)
    records = read_records(run, verdicts=False)
    write_tables(run, records, space.front)
    write_page(run)
    return records
