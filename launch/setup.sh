#!/usr/bin/env bash
# Makes .venv beside the repository's files and installs cactus_ray with the versions that CI passes with.
# Usage: bash launch/setup.sh [EXTRA]      (EXTRA: dev, for lint, types and tests)
# PYTHON chooses the interpreter (default: python3.11 or newer found on the path).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python >= 3.11 found (tried: ${PYTHON:-python3.11 python3.12 python3.13 python3}); set PYTHON" >&2
    exit 1
}

extra="${1:-}"
wanted=$(cat pyproject.toml launch/constraints.txt | cksum)" ${extra}"
# The stamp says which extras and which requirements the environment was made for: a second run installs nothing.
if [ -x .venv/bin/python ] && grep -qxF -- "$wanted" .venv/cactus-ray.stamp 2>/dev/null; then
    echo "== .venv is up to date"
    exit 0
fi
if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    echo "== making .venv with $($python --version)"
    "$python" -m venv .venv
fi
echo "== installing cactus_ray${extra:+ [$extra]} (torch is large: a few minutes the first time)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt -e ".${extra:+[$extra]}"
echo "$wanted" >> .venv/cactus-ray.stamp
