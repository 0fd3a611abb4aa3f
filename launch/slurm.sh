#!/usr/bin/env bash
# Runs one search on the nodes of a Slurm job: a Ray head on the first node, a Ray worker on every other one, the
# driver beside the head. Ends with the exit status of `cactus-ray search`; submitting it again continues the study.
#
# Before: bash launch/setup.sh, in a folder that all nodes see (.venv, runs and data.root must be on shared storage).
# Usage, from the root of the repository:
#   sbatch launch/slurm.sh SPACE [arguments of `cactus-ray search`, such as --name digits --trials 200]
#   sbatch --nodes=4 --gpus-per-node=4 --partition=gpu launch/slurm.sh search_spaces/mnist_small.yaml
#
# Who may use this Ray: only who knows the token, which is drawn anew for every job, never printed, and lies in a file
# that only you can read (in CACTUS_TOKEN_DIR, default ~/.cactus-ray, on shared storage). Ray's traffic itself is not
# encrypted and its ports listen on all interfaces: use it only on a network that is closed to the outside.
# CACTUS_STORAGE: folder for Ray's scratch files, on shared storage (default runs/.ray; Ray Train keeps checkpoints there).
# CACTUS_HEAD_IP: the head's address, where the first one of `hostname -I` is not the one that the nodes share.
#SBATCH --job-name=cactus-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem-per-cpu=4G
#SBATCH --time=08:00:00
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:INT@180
# (three minutes before the time is up, the search is asked to stop cleanly; what is finished is kept)
set -euo pipefail

if [ "$#" -lt 1 ]; then
    echo "usage: sbatch launch/slurm.sh SPACE [arguments of cactus-ray search]" >&2
    exit 2
fi
: "${SLURM_JOB_ID:?not inside a Slurm job; use: sbatch launch/slurm.sh SPACE}"
cd "${SLURM_SUBMIT_DIR:-.}" # sbatch runs a copy of this file from a folder of its own
bin="$PWD/.venv/bin"
if [ ! -x "$bin/cactus-ray" ]; then
    echo "error: $bin/cactus-ray not found; expected: bash launch/setup.sh, then sbatch from the root of the repository" >&2
    exit 2
fi

# --- the token: 0600, drawn for this job, gone with it
token_dir="${CACTUS_TOKEN_DIR:-$HOME/.cactus-ray}"
token_file="$token_dir/token-$SLURM_JOB_ID"
(
    umask 077
    mkdir -p "$token_dir"
    "$bin/python" -c 'import secrets; print(secrets.token_hex(32), end="")' > "$token_file"
)
unset RAY_AUTH_TOKEN # it would win over the file
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token_file" RAY_USAGE_STATS_ENABLED=0

steps=()
clean_up() {
    if [ "${#steps[@]}" -gt 0 ]; then
        kill "${steps[@]}" 2> /dev/null || true # Ray ends with its job steps
        wait "${steps[@]}" 2> /dev/null || true
    fi
    rm -f "$token_file"
}
trap clean_up EXIT

# --- Ray: ports and folders of the job's own, for nodes may be shared
nodes="${SLURM_JOB_NUM_NODES:-1}"
cpus="${SLURM_CPUS_PER_TASK:-1}"
gpus="${SLURM_GPUS_ON_NODE:-0}"
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | awk 'NR == 1')"
head_ip="${CACTUS_HEAD_IP:-$(hostname -I | awk '{print $1}')}"
port=$((20000 + SLURM_JOB_ID % 6000 * 2))
address="$head_ip:$port"

echo "== Ray head on $head ($address), $cpus CPU and $gpus GPU per node"
srun --nodes=1 --ntasks=1 --nodelist="$head" --cpus-per-task="$cpus" \
    "$bin/ray" start --head --block --node-ip-address="$head_ip" --port="$port" \
    --ray-client-server-port="$((port + 1))" --dashboard-host=127.0.0.1 \
    --num-cpus="$cpus" --num-gpus="$gpus" --temp-dir="/tmp/cactus-ray-$SLURM_JOB_ID" &
steps+=("$!")

wait_for_nodes() { # COUNT: until so many nodes have joined, at most five minutes
    "$bin/python" - "$address" "$1" << 'PYTHON'
import sys
import time

import ray

address, wanted = sys.argv[1], int(sys.argv[2])
deadline = time.monotonic() + 300
found = 0
while time.monotonic() < deadline:
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError):  # not up yet
        time.sleep(2)
        continue
    while time.monotonic() < deadline:
        found = sum(node["Alive"] for node in ray.nodes())
        if found >= wanted:
            print(f"== {found} of {wanted} nodes: {ray.cluster_resources().get('CPU', 0):g} CPU")
            sys.exit(0)
        time.sleep(2)
sys.exit(f"error: {found} of {wanted} nodes have joined Ray at {address} after 5 minutes; see the messages above")
PYTHON
}

wait_for_nodes 1
if [ "$nodes" -gt 1 ]; then
    workers=$((nodes - 1))
    echo "== Ray workers on $workers other node(s)"
    srun --nodes="$workers" --ntasks="$workers" --ntasks-per-node=1 --exclude="$head" --cpus-per-task="$cpus" \
        "$bin/ray" start --block --address="$address" --num-cpus="$cpus" --num-gpus="$gpus" &
    steps+=("$!")
    wait_for_nodes "$nodes"
fi

# --- the search. Job control on: otherwise bash would start it deaf to SIGINT, and it could not stop cleanly.
echo "== cactus-ray search $*"
set -m
"$bin/cactus-ray" search --storage "${CACTUS_STORAGE:-$PWD/runs/.ray}" "$@" --address "$address" &
search="$!"
set +m
trap 'kill -INT "$search" 2> /dev/null || true' INT TERM
status=0
wait "$search" || status="$?"
if kill -0 "$search" 2> /dev/null; then # a signal ended the wait and not the search
    status=0
    wait "$search" || status="$?"
fi
echo "== search ended with status $status"
exit "$status"
