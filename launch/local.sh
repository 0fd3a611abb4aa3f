#!/usr/bin/env bash
# The whole way on this machine: set up .venv, search search_spaces/digits.yaml, print the front, write the report,
# pick one network, certify its file, and check the certificate again. Can be run again: a finished study is kept.
# Exit status 3: no network meets the requirements.
# Usage: bash launch/local.sh [arguments of `cactus-ray search`, such as --trials 20 or --from-scratch]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
cactus=.venv/bin/cactus-ray

echo "== search: search_spaces/digits.yaml (embedded data, nothing is downloaded)"
"$cactus" search search_spaces/digits.yaml --name digits "$@"

echo "== pick: the network of the front with the highest certified accuracy in at most 46 kB (30 % of the dense float32 file)"
"$cactus" pick runs/digits --max-bytes 46k --min-certified 0.8 --min-accuracy 0.95 --prefer certified --bound branch --out runs/digits/picked

echo "== check: everything that the certificate says, again, from the files alone"
"$cactus" check runs/digits/picked
echo "== done: runs/digits/report.html (the study), runs/digits/picked (the network and its certificate)"
