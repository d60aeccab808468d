"""The templates in launch/: valid, true to the config, and not fooled by a run that was stopped."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
STEPS = runpy.run_path(str(ROOT / "configs" / "124m.py"))["config"].steps
STATUSES = [
    pytest.param(True, 0, id="finished"),
    pytest.param(False, 0, id="stopped"),
    pytest.param(False, 3, id="failed"),
]


def load_yaml(name):
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with huggingface_hub")
    return yaml.safe_load((LAUNCH / name).read_text())


def container():
    job = load_yaml("kubernetes-jobset.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job["template"]["spec"]["containers"][0]


def shell_script(name):
    """What the template has a shell do on every host."""
    if name == "slurm.sbatch":
        return (LAUNCH / name).read_text()
    return load_yaml(name)["run"] if name == "skypilot.yaml" else container()["args"][0]


TEMPLATES = ["slurm.sbatch", "skypilot.yaml", "kubernetes-jobset.yaml"]


@pytest.fixture
def fake_commands(tmp_path, monkeypatch):
    """Makes commands that note how they were called in the file `calls`, then run some Python."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def make(path, body="pass"):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            f"#!{sys.executable}\n"
            f"import signal, sys\n"
            f"print({file.name!r}, *sys.argv[1:], file=open({str(tmp_path / 'calls')!r}, 'a'))\n"
            f"{body}\n"
        )
        file.chmod(0o755)

    return make


def run_template(name, run_dir, finished):
    """Starts the template's script with its run directory moved to `run_dir`."""
    script, count = re.subn(r"(?m)^run_dir=.*$", f"run_dir={run_dir}", shell_script(name))
    assert count == 1
    if finished:
        (run_dir / "checkpoints" / str(STEPS)).mkdir(parents=True)
    return subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True)


def status_of(name, run_dir, finished):
    with run_template(name, run_dir, finished) as shell:
        shell.communicate(timeout=60)
    return shell.returncode


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_shell_accepts_the_script(name):
    subprocess.run(["bash", "-n"], input=shell_script(name), text=True, check=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_knows_the_steps_and_the_files_of_its_config(name):
    script = shell_script(name)
    assert re.findall(r"(?m)^steps=(\d+)$", script) == [str(STEPS)]
    assert "configs/124m.py" in script
    assert (ROOT / "scripts" / "train.py").is_file()
    assert "scripts/train.py --config" in script


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_flag_is_one_of_the_training_script(name):
    command = [sys.executable, "scripts/train.py", "--help"]
    known = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (arguments,) = re.findall(r"scripts/train\.py((?:.*\\\n)*.*)", shell_script(name))
    flags = re.findall(r"--[\w.]+", arguments)
    assert "--config" in flags
    for flag in flags:
        assert re.search(rf"{re.escape(flag)}\s", known), f"{flag} is unknown"


def test_slurm_gives_every_task_all_gpus_of_its_node():
    """JAX gives task i of a node GPU i of those it sees."""
    options = dict(re.findall(r"(?m)^#SBATCH --([a-z-]+)=?(.*)$", shell_script("slurm.sbatch")))
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    assert "gpus-per-task" not in options
    assert options["signal"] == "TERM@120"
    assert "requeue" in options


def test_kubernetes_agrees_with_itself_on_the_coordinator_and_the_number_of_pods():
    jobset = load_yaml("kubernetes-jobset.yaml")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True
    (job,) = jobset["spec"]["replicatedJobs"]
    spec, name = job["template"]["spec"], jobset["metadata"]["name"]
    assert f"--distributed.coordinator {name}-{job['name']}-0-0.{name}:" in container()["args"][0]
    pods = {"name": "PODS", "value": str(spec["completions"])}
    assert pods in container()["env"]
    assert spec["parallelism"] == spec["completions"]
    assert spec["completionMode"] == "Indexed"
    # A pod that fails must fail its job: only then does the JobSet restart all pods.
    assert spec["backoffLimit"] == 0
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize(("finished", "status"), STATUSES)
def test_slurm_requeues_a_run_that_was_stopped_and_no_other(
    tmp_path, monkeypatch, fake_commands, finished, status
):
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    fake_commands("srun", f"sys.exit({status})")
    fake_commands("scontrol")
    assert status_of("slurm.sbatch", tmp_path / "run", finished) == status
    srun, *requeue = (tmp_path / "calls").read_text().splitlines()
    assert srun.endswith(f"--config configs/124m.py --run_dir {tmp_path / 'run'}")
    assert requeue == (["scontrol requeue 17"] if not finished and status == 0 else [])


@pytest.mark.parametrize(("finished", "status"), STATUSES)
@pytest.mark.parametrize("name", ["skypilot.yaml", "kubernetes-jobset.yaml"])
def test_elsewhere_only_a_finished_run_ends_well(
    tmp_path, monkeypatch, fake_commands, name, finished, status
):
    monkeypatch.setenv("SKYPILOT_NODE_IPS", "10.0.0.1\n10.0.0.2")
    monkeypatch.setenv("SKYPILOT_NUM_NODES", "2")
    monkeypatch.setenv("SKYPILOT_NODE_RANK", "1")
    monkeypatch.setenv("PODS", "2")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    for python in ("python", ".venv/bin/python"):
        fake_commands(python, f"sys.exit({status})")
    assert status_of(name, tmp_path / "run", finished) == (0 if finished else status or 1)
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert "--distributed.num_processes 2 --distributed.process_id 1" in call
    host = "10.0.0.1" if name == "skypilot.yaml" else "gpt2-124m-train-0-0.gpt2-124m"
    assert f"--distributed.coordinator {host}:9876" in call


@pytest.mark.parametrize("finished", [True, False])
def test_kubernetes_hands_its_signal_on_and_waits_for_the_checkpoint(
    tmp_path, fake_commands, finished
):
    """The training says that it runs, is told to stop, and takes its time to do so."""
    waiting = (
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        "print('running', flush=True)\n"
        "if signal.sigtimedwait({signal.SIGTERM}, 30):\n"
        f"    print('stopped', file=open({str(tmp_path / 'calls')!r}, 'a'))"
    )
    fake_commands("python", waiting)
    with run_template("kubernetes-jobset.yaml", tmp_path / "run", finished) as shell:
        assert shell.stdout.readline() == "running\n"
        shell.terminate()
    assert shell.returncode == (0 if finished else 1)
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "stopped"
