#!/usr/bin/env bash
# Sets up .venv and runs lint, types and tests. Arguments go to pytest:
#   bash launch/test.sh                  all but slow and gpu tests
#   bash launch/test.sh -m slow          the slow ones
#   bash launch/test.sh tests/bounds     one room
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
if [ "$#" -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi
# Two processes share the files; then those that start Ray, which fills two cores by itself.
.venv/bin/python -m pytest --numprocesses 2 --dist loadfile -m "not ray and not slow and not gpu"
exec .venv/bin/python -m pytest -m "ray and not slow and not gpu"
