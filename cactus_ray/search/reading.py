"""The records of a run, read back from the lines of ``trials.jsonl``.

The file is the only truth. A line that a killed driver tore is ignored and counted, and a trial is complete only with a
full, finite record; reading works while a driver writes.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from cactus_ray.errors import UserError
from cactus_ray.search.events import EVENTS, take
from cactus_ray.search.records import Records

BLOCK = 256
_VERDICTS = b'{"event":"verdicts","trial":"'
_ENDS = tuple(b'{"event":"%s","trial":"' % kind for kind in (b"completed", b"failed", b"stopped"))

logger = logging.getLogger(__name__)


def read_records(run: str | Path, *, verdicts: bool = True) -> Records:
    """The records of a run, also while its driver writes. UserError if there is no run or a newer version wrote it.

    ``verdicts=False`` leaves out the rows of verdicts, and what they measured, of trials that have ended: nearly all of
    a long run's file, and nothing that a search or its report reads again. What they cost is in the ledger either way.
    """
    file = Path(run) / "trials.jsonl"
    records = Records()
    try:
        with file.open("rb") as lines:
            ended: set[bytes] = set() if verdicts else _ended(lines)
            lines.seek(0)
            for number, event in _events(lines, ended):
                if event is None or not take(records, event, file):
                    records.damaged_lines += 1
                    logger.warning("%s: line %d is not a whole record and is ignored", file, number)
    except OSError as error:
        raise UserError(f"{run}: no run here ({file.name}: {error.strerror}); expected a folder of runs/") from None
    return records


def _events(lines: Iterable[bytes], ended: Container[bytes]) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Events with the numbers of their lines; None for a line that is no event. Blank lines are passed over.

    Many lines are parsed as one array, in which equal keys are one object: it is faster and takes half the memory.
    """
    numbered = ((number, _without_rows(line, ended)) for number, line in enumerate(lines, 1) if line.strip())
    while block := list(itertools.islice(numbered, BLOCK)):
        try:
            found = json.loads(b"[" + b",".join(line for _, line in block) + b"]")
        except ValueError:
            found = []
        if len(found) != len(block):  # torn, or not UTF-8
            found = [_parsed(line) for _, line in block]
        for (number, _), event in zip(block, found, strict=True):
            yield number, event if isinstance(event, dict) and event.get("event") in EVENTS else None


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _ended(lines: Iterable[bytes]) -> set[bytes]:
    """Names of the trials that have ended, as they stand in the lines."""
    whole = (_parsed(line) for line in lines if line.startswith(_ENDS))
    return {str(event["trial"]).encode() for event in whole if event is not None and "trial" in event}


def _without_rows(line: bytes, ended: Container[bytes]) -> bytes:
    """A line without its verdicts, if the trial has ended; all other lines as they are."""
    if line.startswith(_VERDICTS) and (trial := line[len(_VERDICTS) :].partition(b'"')[0]) in ended:
        _, _, rest = line.rpartition(b',"ledger":{')
        if len(rest) < len(line):  # not from before there was a ledger
            return _VERDICTS + trial + b'","levels":{},"ledger":{' + rest
    return line
