#!/usr/bin/env bash
# Sets up .venv and runs lint, types and tests. Arguments go to pytest:
#   bash launch/test.sh                  all but slow, gpu, cluster and browser tests; at most 12 minutes on two idle cores
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
status=0
tests() {
    .venv/bin/python -m pytest "$@" || status=$?
    [ "$status" -ne 2 ] || exit 2 # interrupted
}
# Two processes share the tests, and the one that is done first takes some of the other's. Then those that start Ray,
# which fills two cores by itself: also where others have failed, so that one run shows all that is broken.
usual="not slow and not gpu and not cluster and not browser"
tests --numprocesses 2 --dist worksteal -m "not ray and $usual"
tests -m "ray and $usual"
exit "$status"
