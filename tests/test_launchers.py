"""What starts the trainer elsewhere: the Slurm script with Slurm and Ray faked, the RayJob, and the images."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from openrlhf_apo.options import resolve

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore")
SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("tests/*.sh"), *ROOT.glob("examples/*/*.sh")])
IMAGES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def linter(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return found or pytest.skip(f"no {name} here: pip install -r requirements/test.txt brings it")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    result = subprocess.run([linter("shellcheck"), script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(image):
    result = subprocess.run([linter("hadolint"), image], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# --- Slurm

PYTHON = """#!/usr/bin/env bash
printf 'python|%s|%s\\n' "${RAY_ADDRESS:-}" "$(printf '%q ' "$@")" >> "$CALLS"
case "$*" in
    -c*) echo 10.0.0.1 ;;
    -\\ *) cat > "$STDIN"; exit "$(cat "$JOINED" 2>/dev/null || echo 0)" ;;
    *train_apo_ray*) exit 7 ;;
esac
"""
RAY = """#!/usr/bin/env bash
printf 'ray|%s\\n' "$*" >> "$CALLS"
exit "${HEAD_ANSWERS:-0}"
"""
SRUN = """#!/usr/bin/env bash
printf 'srun|%s\\n' "$*" >> "$CALLS"
[[ "$*" != *"${DIES:-nothing}"* ]] && exec sleep 3
"""


@pytest.fixture
def job(tmp_path):
    """Runs the script on three nodes, as `sbatch` would: -> the result, and the calls of each program."""

    def program(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    program(tmp_path / ".venv" / "bin" / "python", PYTHON)
    program(tmp_path / ".venv" / "bin" / "ray", RAY)
    program(tmp_path / "bin" / "srun", SRUN)
    program(
        tmp_path / "bin" / "scontrol", "#!/usr/bin/env bash\nprintf '%s\\n' node1 node2 node3 | head -n \"$NODES\"\n"
    )
    program(tmp_path / "scripts" / "install.sh", "")

    def run(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess, dict[str, list[str]]]:
        calls = tmp_path / "calls.txt"
        calls.write_text("")
        given = {
            "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_NODELIST": "node[1-3]",
            "SLURM_GPUS_ON_NODE": "8",
            "NODES": "3",
            "CALLS": str(calls),
            "STDIN": str(tmp_path / "stdin.py"),
            "JOINED": str(tmp_path / "joined"),
        } | environment
        command = ["bash", str(ROOT / "examples" / "launch" / "slurm.sh"), *arguments]
        # Its output goes to files, which the steps that outlive it do not keep open for the reader.
        with open(tmp_path / "err", "w+") as err:
            result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=err, env=given, timeout=60)
            err.seek(0)
            result.stderr = err.read()
        made: dict[str, list[str]] = {"python": [], "ray": [], "srun": []}
        for line in calls.read_text().splitlines():
            name, _, rest = line.partition("|")
            made[name].append(rest)
        return result, made

    run.path = tmp_path
    return run


def test_slurm_starts_a_head_then_workers_then_the_trainer(job):
    result, calls = job("--loss", "apo", "--ckpt.output_dir", "runs/a b")
    assert result.returncode == 7 and result.stderr == ""  # the trainer's
    head, workers = calls["srun"]
    assert "--nodes 1 --nodelist node1" in head and "start --head --node-ip-address 10.0.0.1 --port 6379" in head
    assert "--nodes 2 --nodelist node2,node3" in workers and "start --address 10.0.0.1:6379" in workers
    assert all(
        "--overlap" in step and step.endswith("--block --num-gpus 8 --disable-usage-stats") for step in (head, workers)
    )
    address, arguments = calls["python"][-1].split("|")
    assert address == "10.0.0.1:6379"
    assert shlex.split(arguments) == [
        *("-m", "openrlhf_apo.cli.train_apo_ray", "--loss", "apo", "--ckpt.output_dir", "runs/a b")
    ]
    compile((job.path / "stdin.py").read_text(), "what waits for the nodes", "exec")


def test_slurm_on_one_node_starts_no_workers(job):
    result, calls = job(NODES="1", NUM_GPUS="2", SLURM_GPUS_ON_NODE="")
    assert result.returncode == 7 and len(calls["srun"]) == 1 and "--num-gpus 2" in calls["srun"][0]


def test_slurm_waits_for_all_nodes(job):
    (job.path / "joined").write_text("1")
    result, calls = job(DIES="node2")
    assert result.returncode == 1 and result.stderr == "slurm.sh: Ray did not start on node2,node3\n"
    assert not any("train_apo_ray" in call for call in calls["python"])


@pytest.mark.parametrize(
    "environment, code, message",
    [
        ({"SLURM_GPUS_ON_NODE": ""}, 2, "no GPUs in this job: give sbatch --gpus-per-node N"),
        ({"NUM_GPUS": "many"}, 2, "no GPUs in this job"),
        ({"SLURM_SUBMIT_DIR": "/"}, 2, "run bash scripts/install.sh there, and submit the job from there"),
        ({"HEAD_ANSWERS": "1", "DIES": "node1"}, 1, "Ray's head did not start"),
    ],
)
def test_slurm_refuses_in_one_line(job, environment, code, message):
    result, calls = job(**environment)
    assert result.returncode == code and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not any("train_apo_ray" in call for call in calls["python"])


# --- KubeRay


@pytest.fixture(scope="module")
def ray_job() -> dict:
    return yaml.safe_load((ROOT / "examples" / "launch" / "rayjob.yaml").read_text(encoding="utf-8"))


def test_the_ray_job_has_what_kuberay_asks_for(ray_job):
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob") and ray_job["metadata"]["name"]
    cluster = ray_job["spec"]["rayClusterSpec"]
    requirements = (ROOT / "requirements" / "gpu.txt").read_text(encoding="utf-8")
    assert f"ray[default]=={cluster['rayVersion']} " in requirements
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"] and workers["groupName"]
    for group in (head, workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == "openrlhf_apo:gpu" and container["name"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_ray_jobs_command_passes_every_check_and_fits_its_workers(ray_job, monkeypatch):
    words = shlex.split(ray_job["spec"]["entrypoint"])
    start = ["env", "-C", "/opt/openrlhf_apo", ".venv/bin/python", "-m", "openrlhf_apo.cli.train_apo_ray"]
    assert words[:6] == start
    monkeypatch.chdir(ROOT)
    args = resolve(words[6:], False)  # the model is on the pods' volume
    (workers,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    gpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert (args.actor.num_nodes, args.actor.num_gpus_per_node) == (workers["replicas"], gpus)
    assert args.runtime == "ray" and args.train.colocate_all
    assert args.vllm.num_engines * args.vllm.tensor_parallel_size == workers["replicas"] * gpus


# --- images


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_images_install_by_the_script_from_files_that_exist(image):
    text = image.read_text(encoding="utf-8")
    assert re.search(rf"^RUN bash scripts/install\.sh {image.suffix[1:]} ", text, re.MULTILINE)
    copied = [words.split() for words in re.findall(r"^COPY (.*)$", text, re.MULTILINE)]
    assert copied[-1] == [".", "."]
    for *sources, _ in copied:
        assert all((ROOT / source).exists() for source in sources)
    install = (ROOT / "scripts" / "install.sh").read_text(encoding="utf-8")
    read = re.search(r"^state=\$\(cat (.*?) \|", install, re.MULTILINE).group(1)
    sources = [source for *sources, _ in copied[:-1] for source in sources]
    for name in read.replace("{cpu,gpu,test}", "cpu").split():  # else the installation would be made anew in the image
        assert any(name == source or name.startswith(f"{source}/") for source in sources), name


def test_the_page_names_files_that_exist():
    page = (ROOT / "docs" / "launchers.md").read_text(encoding="utf-8")
    named = re.findall(r"\b(?:examples|docker|scripts|configs)/[\w./-]+", page)
    assert {f"examples/launch/{name}" for name in ("slurm.sh", "rayjob.yaml")} | {
        f"docker/Dockerfile.{kind}" for kind in ("cpu", "gpu")
    } <= set(named)
    assert [name for name in named if not (ROOT / name.rstrip(".")).exists()] == []
