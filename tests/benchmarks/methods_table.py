"""The tables of the benchmark of methods, from its file of figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from methods_runs import LEVELS

Row = dict[str, Any]
Value = Callable[[Row], float | None]


def show(found: dict[str, Any], reference: str) -> None:
    """Markdown tables of accuracies over seeds, differences to the reference paired by seed, and what was spent."""
    networks = [row for row in found["networks"].values() if row["levels"]]
    levels = LEVELS[found["plan"]["data"]]
    methods = list(dict.fromkeys(row["method"] for row in networks))
    samples = sorted({row["cascade"][0] for network in networks for row in network["levels"].values()})
    seen = " or ".join(map(str, samples))
    for title, value in (
        (f"certified by attack, IBP and CROWN ({seen} test images)", cascade),
        ("standard (whole test split)", lambda row: 100 * float(row["standard"])),
        ("certified by IBP (whole test split)", lambda row: 100 * float(row["ibp"])),
    ):
        _table(f"{title}, %: mean (smallest to largest) over seeds", networks, methods, levels, lambda r, v=value: v(r))
    if any("branch" in row for network in networks for row in network["levels"].values()):
        _branch(networks, methods, levels)
    for method in methods:
        if method != reference:
            _differences(networks, method, reference, levels)
    _budget(found, networks, methods)


def cascade(row: Row) -> float:
    samples, certified, _ = row["cascade"]
    return 100 * float(certified) / float(samples)


def bracket(row: Row) -> tuple[float, float] | None:
    """Where certified accuracy lies: unknown samples count as not certified, and as certified."""
    if "branch" not in row:
        return None
    samples, certified, falsified = row["branch"]
    return 100 * certified / samples, 100 * (samples - falsified) / samples


def _rows(networks: Sequence[Row], method: str, level: str) -> dict[int, Row]:
    """By seed."""
    return {n["seed"]: n["levels"][level] for n in networks if n["method"] == method and level in n["levels"]}


def _header(title: str, first: str, levels: Sequence[str]) -> None:
    print(f"\n{title}\n\n| {first} | " + " | ".join(f"`{level}`" for level in levels) + " |")
    print("|---" * (len(levels) + 1) + "|")


def _table(title: str, networks: Sequence[Row], methods: Sequence[str], levels: Sequence[str], value: Value) -> None:
    _header(title, "method", levels)
    for method in methods:
        cells = []
        for level in levels:
            values = [value(row) for row in _rows(networks, method, level).values()]
            cells.append(spread([v for v in values if v is not None]))
        print(f"| `{method}` | " + " | ".join(cells) + " |")


def _branch(networks: Sequence[Row], methods: Sequence[str], levels: Sequence[str]) -> None:
    """Means over seeds of both ends of the bracket."""
    _header("certified with branch and bound, %: at least to at most (unknowns), mean over seeds", "method", levels)
    for method in methods:
        cells = []
        for level in levels:
            found = [b for row in _rows(networks, method, level).values() if (b := bracket(row)) is not None]
            low, high = (statistics.mean(ends) for ends in zip(*found, strict=True)) if found else (0.0, 0.0)
            cells.append("" if not found else f"{low:.1f}" if low == high else f"{low:.1f} to {high:.1f}")
        print(f"| `{method}` | " + " | ".join(cells) + " |")


def _differences(networks: Sequence[Row], method: str, reference: str, levels: Sequence[str]) -> None:
    """Of paired seeds. Branch and bound: the worst and the best that the unknowns of both leave possible."""
    print(f"\n`{method}` minus `{reference}`, points, paired by seed: mean (smallest to largest), standard deviation\n")
    print("| level | certified, CROWN | certified, IBP | standard | branch and bound: worst, best case |")
    print("|---|---|---|---|---|")
    for level in levels:
        mine, theirs = _rows(networks, method, level), _rows(networks, reference, level)
        seeds = sorted(mine.keys() & theirs.keys())
        if not seeds:
            continue
        values: tuple[Callable[[Row], float], ...] = (
            cascade, lambda row: 100 * float(row["ibp"]), lambda row: 100 * float(row["standard"]),
        )  # fmt: skip
        cells = [
            spread([value(mine[s]) - value(theirs[s]) for s in seeds], signed=True, deviation=True) for value in values
        ]
        ends = [(a, b) for s in seeds if (a := bracket(mine[s])) and (b := bracket(theirs[s]))]
        worst, best = [a[0] - b[1] for a, b in ends], [a[1] - b[0] for a, b in ends]
        cells.append(f"{statistics.mean(worst):+.1f}, {statistics.mean(best):+.1f}" if ends else "")
        print(f"| `{level}` | " + " | ".join(cells) + " |")


def _budget(found: dict[str, Any], networks: Sequence[Row], methods: Sequence[str]) -> None:
    print("\n| method | seeds | epochs | training, CPU s each (by the clock) | ms a step | tuning | chosen |")
    print("|---|---|---|---|---|---|---|")
    taken = "that of the reference" if found["tuning"] else "none"
    for method in methods:
        mine = [n for n in networks if n["method"] == method]
        cpu, clock = (statistics.mean(n[key] for n in mine) for key in ("cpu_seconds", "seconds"))
        costs = found["step_seconds"][method]
        tuning = found["tuning"].get(method, [])
        tried = f"{len(tuning)} settings, {sum(t['cpu_seconds'] for t in tuning):.0f} CPU s" if tuning else taken
        config = mine[0]["config"]
        flat = config | config.get("compression_set", {})
        keys = ("learning_rate", "standard_weight", "box_ratio", "low", "high", "member_fraction", "refresh_every",
                "channels")  # fmt: skip
        chosen = [f"{k} {flat[k]}" for k in keys if k in flat]
        step = 1000 * costs[min(mine[0]["setting"], len(costs) - 1)]
        print(
            f"| `{method}` | {len(mine)} | {mine[0]['epochs']} | {cpu:.0f} ({clock:.0f}) | {step:.1f} | {tried} | "
            + ", ".join(chosen) + " |"
        )  # fmt: skip


def spread(values: Sequence[float], *, signed: bool = False, deviation: bool = False) -> str:
    """Mean (smallest to largest), and with ``deviation`` the standard deviation."""
    sign = "+" if signed else ""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:{sign}.1f}"
    text = f"{statistics.mean(values):{sign}.1f} ({min(values):{sign}.1f} to {max(values):{sign}.1f})"
    return f"{text}, {statistics.stdev(values):.1f}" if deviation else text
