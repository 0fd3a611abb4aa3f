"""The files in launch/ parse, ask for tokens, name their resources and hold no secret."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
DOCUMENTS = sorted(LAUNCH.rglob("*.yaml"))
CLUSTERS = ("kuberay/raycluster.yaml", "kuberay/rayjob.yaml")


def read(name: str) -> Any:
    return yaml.safe_load((LAUNCH / name).read_text())


def constraint(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(\S+)$", (LAUNCH / "constraints.txt").read_text(), re.MULTILINE)
    return str(version)


def groups() -> list[Any]:
    """Every group of pods of both Kubernetes documents, with its document's name."""
    found = []
    for name, spec in (
        ("raycluster.yaml", read("kuberay/raycluster.yaml")["spec"]),
        ("rayjob.yaml", read("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]),
    ):
        members = [("head", spec["headGroupSpec"]), *((g["groupName"], g) for g in spec["workerGroupSpecs"])]
        found += [pytest.param(group, id=f"{name}-{label}") for label, group in members]
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_strict_and_parse(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", [*SCRIPTS, *DOCUMENTS], ids=lambda p: p.name)
def test_no_token_is_written_down(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"RAY_AUTH_TOKEN\s*[=:]\s*[\"']?[A-Za-z0-9]", text)
    assert not re.search(r"\b[0-9a-f]{32,}\b", text)
    assert not re.search(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", text)


def test_cluster_launcher_document_is_one() -> None:
    cluster = read("cluster.yaml")
    (package,) = importlib.util.find_spec("ray").submodule_search_locations  # type: ignore[union-attr, misc]
    schema = json.loads((Path(package) / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    assert cluster["provider"]["type"] == "local"
    assert cluster["max_workers"] == len(cluster["provider"]["worker_ips"])
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in c for c in cluster["setup_commands"])
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert all(c.startswith("RAY_AUTH_MODE=token ") for c in commands if "ray start" in c)


def search_options(command: str) -> dict[str, str]:
    """Options with their values of a `cactus-ray search` in a command line."""
    words = shlex.split(command.replace("\\\n#", " "))
    words = words[words.index("search") + 2 :]
    return dict(zip(words[::2], words[1::2], strict=True))


def test_the_search_of_the_cluster_launcher_names_a_scratch_folder_that_all_machines_see() -> None:
    (line,) = re.findall(r"^#   ray exec launch/cluster.yaml '(.*)'$", (LAUNCH / "cluster.yaml").read_text(), re.M)
    storage = Path(search_options(line)["--storage"])
    assert storage.is_absolute()
    assert f"Change {storage.parent}: " in (LAUNCH / "cluster.yaml").read_text()


@pytest.mark.parametrize("name", CLUSTERS)
def test_records_and_scratch_of_a_search_on_kubernetes_outlive_its_pods(name: str) -> None:
    """Both options point to claims that head and workers mount; records are written by the head alone."""
    text, document = (LAUNCH / name).read_text(), read(name)
    if document["kind"] == "RayJob":
        spec, command = document["spec"]["rayClusterSpec"], document["spec"]["entrypoint"]
    else:
        (command,) = re.findall(r"^#     (cactus-ray search .*)$", text, re.MULTILINE)
        spec = document["spec"]
    options = search_options(command)
    assert options["--runs"] != options["--storage"]
    claims = {
        claim["metadata"]["name"]: claim["spec"]
        for claim in yaml.safe_load_all((LAUNCH / "kuberay" / "claims.yaml").read_text())
    }
    assert all(claim["accessModes"] == ["ReadWriteMany"] for claim in claims.values())
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in pod["containers"][0]["volumeMounts"]}
        assert volumes.keys() == {mount["name"] for mount in mounts.values()}
        assert volumes[mounts[options["--runs"]]["name"]] == "cactus-ray-runs"
        assert volumes[mounts[options["--storage"]]["name"]] == "cactus-ray-scratch"
        assert set(volumes.values()) == claims.keys()
        assert mounts[options["--runs"]].get("readOnly", False) is (group is not spec["headGroupSpec"])
        assert not mounts[options["--storage"]].get("readOnly")


@pytest.mark.parametrize("group", groups())
def test_the_key_of_wandb_comes_from_a_secret_and_only_to_the_driver(group: Any) -> None:
    (container,) = group["template"]["spec"]["containers"]
    keys = [variable for variable in container["env"] if variable["name"].startswith("WANDB")]
    secret = {"name": "wandb", "key": "api-key", "optional": True}
    expected = [{"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": secret}}]
    assert keys == (expected if container["name"] == "ray-head" else [])


@pytest.mark.parametrize("path", [*SCRIPTS, *DOCUMENTS], ids=lambda p: p.name)
def test_no_file_suggests_what_a_search_refuses(path: Path) -> None:
    assert not re.search(r"(s3|gs|ray)://", path.read_text())


def test_kubernetes_documents_ask_for_tokens_and_one_ray_version() -> None:
    cluster, job = read("kuberay/raycluster.yaml"), read("kuberay/rayjob.yaml")
    assert (cluster["kind"], job["kind"]) == ("RayCluster", "RayJob")
    for spec in (cluster["spec"], job["spec"]["rayClusterSpec"]):
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["rayVersion"] == constraint("ray")
    assert job["spec"]["entrypoint"].startswith("cactus-ray search ")
    assert job["spec"]["shutdownAfterJobFinishes"] is True


@pytest.mark.parametrize("group", groups())
def test_pods_are_bounded_and_unprivileged(group: Any) -> None:
    pod = group["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    (container,) = pod["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys() == {"cpu", "memory"}
    assert "/" not in container["image"]  # no registry of ours


def test_network_policy_opens_all_ports_to_ray_only() -> None:
    policy = read("kuberay/networkpolicy.yaml")
    unrestricted = [rule["from"] for rule in policy["spec"]["ingress"] if "ports" not in rule]
    assert unrestricted == [[{"podSelector": policy["spec"]["podSelector"]}]]


# --- the Slurm script with a Slurm, a Ray and a cactus-ray of paper ------------------------------------------------

TOOLS = {
    "scontrol": 'printf "node1\\nnode2\\n"',
    "srun": 'echo "srun $*" >> "$LOG"; while [ "$1" != "${1#--}" ]; do shift; done; exec "$@"',
    "hostname": "echo 192.0.2.1 192.0.2.2",
    ".venv/bin/ray": 'echo "ray $*" >> "$LOG"; exec sleep 60',
    ".venv/bin/python": """
if [ "$1" = -c ]; then exec "$REAL_PYTHON" "$@"; fi
cat > /dev/null
for _ in $(seq 500); do  # as the real one does: until so many nodes have started
    [ "$(grep -c '^ray start' "$LOG")" -ge "$3" ] && break
    sleep 0.05
done
echo "waited for $3 at $2" >> "$LOG"
""",
    ".venv/bin/cactus-ray": """
echo "cactus-ray $*" >> "$LOG"
stat -c "token %a %s" "$RAY_AUTH_TOKEN_PATH" >> "$LOG"
echo "mode $RAY_AUTH_MODE ${RAY_AUTH_TOKEN-unset}" >> "$LOG"
trap 'echo interrupted >> "$LOG"; exit 130' INT
if [ -n "${WAIT_FOR_SIGNAL-}" ]; then kill -INT "$PPID"; while :; do sleep 0.05; done; fi
exit 3
""",
}


@pytest.fixture
def paper_cluster(tmp_path: Path) -> dict[str, str]:
    """Environment of a Slurm job of two nodes whose tools only write down how they are called."""
    for name, text in TOOLS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    python = shutil.which("python3")
    assert python is not None
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LOG": str(tmp_path / "log"),
        "REAL_PYTHON": python,
        "RAY_AUTH_TOKEN": "somebody else's",
        "SLURM_JOB_ID": "6001",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "4",
    }


def slurm(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", LAUNCH / "slurm.sh", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        # a shell cannot trap what was ignored when it began, as SIGINT is in the background of another shell
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_slurm_starts_head_workers_and_search(paper_cluster: dict[str, str]) -> None:
    done = slurm(paper_cluster, "space.yaml", "--trials", "2")
    assert done.returncode == 3, done.stderr  # the search's own
    log = Path(paper_cluster["LOG"]).read_text()
    lines = log.splitlines()
    head, worker = (line for line in lines if line.startswith("ray start"))
    assert "--head" in head
    assert "--node-ip-address=192.0.2.1 --port=20002 " in head
    assert "--num-cpus=4 --num-gpus=0" in head
    assert "--address=192.0.2.1:20002 " in worker
    assert any(line.startswith("srun --nodes=1 --ntasks=1 --nodelist=node1 ") for line in lines)
    assert any(line.startswith("srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --exclude=node1 ") for line in lines)
    storage = f"--storage {paper_cluster['SLURM_SUBMIT_DIR']}/runs/.ray"
    assert lines.index("waited for 2 at 192.0.2.1:20002") < lines.index(
        f"cactus-ray search {storage} space.yaml --trials 2 --address 192.0.2.1:20002"
    )
    assert "token 600 64" in lines
    assert "mode token unset" in lines
    assert not list(Path(paper_cluster["HOME"], ".cactus-ray").iterdir())  # the token is gone with the job


def test_slurm_takes_another_scratch_folder(paper_cluster: dict[str, str]) -> None:
    done = slurm({**paper_cluster, "CACTUS_STORAGE": "/mnt/fast disk"}, "space.yaml")
    assert done.returncode == 3, done.stderr
    assert "cactus-ray search --storage /mnt/fast disk space.yaml " in Path(paper_cluster["LOG"]).read_text()


def test_slurm_passes_the_signal_on_and_waits_for_a_clean_stop(paper_cluster: dict[str, str]) -> None:
    done = slurm({**paper_cluster, "WAIT_FOR_SIGNAL": "1"}, "space.yaml")
    assert done.returncode == 130, done.stderr
    assert "interrupted" in Path(paper_cluster["LOG"]).read_text()


def test_slurm_says_what_is_missing(paper_cluster: dict[str, str]) -> None:
    assert slurm(paper_cluster).returncode == 2
    without_job = {k: v for k, v in paper_cluster.items() if k != "SLURM_JOB_ID"}
    assert "use: sbatch launch/slurm.sh SPACE" in slurm(without_job, "space.yaml").stderr
    Path(paper_cluster["SLURM_SUBMIT_DIR"], ".venv/bin/cactus-ray").unlink()
    done = slurm(paper_cluster, "space.yaml")
    assert done.returncode == 2
    assert "expected: bash launch/setup.sh" in done.stderr
