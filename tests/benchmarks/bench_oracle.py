"""The cascade against an exact mixed-integer oracle, on cases near the exact robust radius.

    python tests/benchmarks/bench_oracle.py --cases 100 --out oracle.jsonl

Stops and continues at any time: every finished piece is a line of ``--out``. Exact brackets come from the fixture
``tests/verification/oracle_cases.npz`` where it has them; ``--solve`` solves all of them (again).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "verification"))
import oracle_campaign as oc
import oracle_fixture as store


class Lines:
    """The resumable file: brackets by (case, epsilon), verdicts by (case, epsilon, bound)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cases: dict[tuple[int, float], oc.Case] = {}
        self.verdicts: dict[tuple[int, float, str], dict[str, Any]] = {}
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a line that was cut off by a kill is done again
        if whole != text:
            path.write_text(whole)
        for data in map(json.loads, whole.splitlines()):
            if "verdict" in data:
                self.verdicts[data["case"], data["epsilon"], data["bound"]] = data
            else:
                self.cases[data["case"], data["epsilon"]] = store.from_json(data)

    def append(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(line + "\n")


def exact_cases(campaign: oc.Campaign, count: int, seed: int, lines: Lines, stored: list[oc.Case]) -> list[oc.Case]:
    """The first ``count`` cases in their order, from the fixture, the file, or the solver."""
    known = {(c.number, c.epsilon): c for c in stored} | lines.cases
    found: list[oc.Case] = []
    for subject in campaign.subjects({c.subject.number: c.subject for c in known.values()}):
        for place, epsilon in enumerate(campaign.epsilons(subject, seed)):
            number = subject.number * oc.PER_SUBJECT + place
            if number >= count:
                return found
            case = known.get((number, epsilon))
            if case is None:
                case = campaign.solve(number, subject, epsilon)
                lines.append(store.to_json(case))
            found.append(case)
        if subject.number % 25 == 24:
            print(f"{time.strftime('%H:%M:%S')} {len(found)} exact brackets", file=sys.stderr, flush=True)
    return found


def judge_all(campaign: oc.Campaign, cases: list[oc.Case], settings: Any, lines: Lines) -> list[dict[str, Any]]:
    """The records of all cases, from the file or the cascade."""
    found = []
    for number, case in enumerate(cases):
        record = lines.verdicts.get((case.number, case.epsilon, settings.bound))
        if record is None:
            record = campaign.judge(case, settings)
            lines.append(json.dumps(record))
            for fault in record["faults"]:
                print(f"case {case.number}: {fault}: {case.subject} {record}", file=sys.stderr, flush=True)
        found.append(record)
        if number % 100 == 99:
            print(f"{time.strftime('%H:%M:%S')} {number + 1} verdicts", file=sys.stderr, flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 where there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0, help="of the cases' radii; the fixture's is 0")
    parser.add_argument("--out", type=Path, default=Path("oracle.jsonl"))
    parser.add_argument("--seconds", type=float, default=10.0, help="per sample")
    parser.add_argument("--bound", help="default: the strongest that there is")
    parser.add_argument("--solve", action="store_true", help="do not take brackets from the fixture")
    parser.add_argument("--only-solve", action="store_true", help="brackets without verdicts")
    parser.add_argument("--again", action="store_true", help="judge again what is UNKNOWN or at fault")
    parser.add_argument("--store", type=Path, help="write networks and brackets as a fixture")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    campaign, stored = store.load() if store.FIXTURE.exists() else (None, [])
    campaign = campaign or oc.Campaign({name: oc.train(name) for name in oc.NETWORKS})
    lines = Lines(options.out)
    if options.again:
        lines.verdicts = {
            k: r for k, r in lines.verdicts.items() if r["verdict"] in ("CERTIFIED", "FALSIFIED") and not r["faults"]
        }
    cases = exact_cases(campaign, options.cases, options.seed, lines, [] if options.solve else stored)
    if options.store:
        store.save(options.store, campaign, cases)
    if options.only_solve:
        return 0
    settings = oc.strongest(options.seconds)
    if options.bound:
        settings = type(settings)(bound=options.bound, seconds_per_sample=options.seconds)
    records = judge_all(campaign, cases, settings, lines)
    print(oc.table(cases, records))
    return int(any(record["faults"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
