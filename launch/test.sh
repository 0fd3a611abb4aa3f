#!/usr/bin/env bash
# Sets up .venv and runs lint, types and tests. Arguments go to pytest:
#   bash launch/test.sh                  all but slow and gpu tests
#   bash launch/test.sh -m slow          the slow ones
#   bash launch/test.sh tests/bounds     one room
# TEST_PROCESSES: how many run at once (default 2; 0: one after the other in pytest's own process).
# CACTUS_TEST_DATA: folder of real data sets (default ../shared/data); tests that need it are skipped, and say so, where it is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh dev
echo "== ruff"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
echo "== mypy"
.venv/bin/mypy
echo "== pytest"
if [ "$#" -eq 0 ]; then
    set -- -m "not slow and not gpu"
fi
exec .venv/bin/python -m pytest --numprocesses "${TEST_PROCESSES:-2}" --dist loadgroup "$@"
