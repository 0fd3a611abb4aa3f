"""What is recorded is small, complete, of one commit, and names no machine."""

from __future__ import annotations

import json
import re

from recorded_support import DATA, RECORDED

COMMIT = "b02dd459263979b168b1ecd7602248ad5dcef666"
FILES = [file for folder in DATA for file in sorted((RECORDED / folder).rglob("*")) if file.is_file()]


def test_it_is_small_and_holds_nothing_that_is_left_out() -> None:
    assert sum(file.stat().st_size for file in FILES) < 1_500_000
    assert {file.suffix for file in FILES} == {
        ".yaml", ".jsonl", ".csv", ".safetensors", ".journal", ".db", ".onnx", ".json", ".md"
    }  # fmt: skip


def test_it_names_no_machine() -> None:
    """No absolute path of a Unix machine and no address, in text or inside a binary file."""
    for file in FILES:
        content = file.read_bytes()
        found = re.findall(rb"/(?:root|home|tmp|work|usr|var|opt|mnt|data|Users)/[ -~]*", content)
        found += re.findall(rb"(?<![\d.])\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?![\d.])", content)
        assert found == [], file


def test_it_is_of_one_commit() -> None:
    for study in (RECORDED / "studies").iterdir():
        assert json.loads((study / "trials.jsonl").read_text().split("\n")[0])["commit"] == COMMIT
    of_study = json.loads((RECORDED / "picks" / "crown" / "certificate.json").read_text())
    assert of_study["provenance"]["commit"] == COMMIT
    assert COMMIT in (RECORDED / "README.md").read_text()
