"""The launch scripts: what they would do, and what they refuse."""

import shlex
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
COMMAND = ["jaxformers", "train", "run file.toml", "--mesh", "fsdp=-1"]
NEEDED = {
    "tpu_gcloud.sh": ["--name", "slice", "--zone", "us-east5-a"],
    "tpu_xpk.sh": ["--cluster", "c", "--workload", "w", "--tpu", "v5p-128"],
    "slurm.sh": [],
    "gpu_host.sh": [],
}


def launch(script, *options, command=COMMAND, dry=True):
    argv = [str(LAUNCH / script), *NEEDED[script], *(["--dry-run"] if dry else []), *map(str, options), "--", *command]
    return subprocess.run(argv, capture_output=True, text=True, timeout=20)


def said(*args, **options):
    done = launch(*args, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_gcloud():
    lines = [shlex.split(line) for line in said("tpu_gcloud.sh", "--create", "v5p-128", "--project", "p").splitlines()]
    assert [line[:5] for line in lines] == [
        ["gcloud", "compute", "tpus", "queued-resources", "create"],
        ["gcloud", "compute", "tpus", "tpu-vm", "scp"],
        ["gcloud", "compute", "tpus", "tpu-vm", "ssh"],
        ["gcloud", "compute", "tpus", "tpu-vm", "ssh"],
    ]
    for line in lines:
        assert line[line.index("--zone") + 1] == "us-east5-a" and line[line.index("--project") + 1] == "p"
    remote = lines[-1][lines[-1].index("--command") + 1]
    assert shlex.split(remote) == ["cd", "jaxformers", "&&", *COMMAND]  # quoted once for here and once for there
    assert lines[-1][lines[-1].index("--worker") + 1] == "all"
    assert "create" not in said("tpu_gcloud.sh")


def test_xpk():
    (line,) = said("tpu_xpk.sh", "--slices", 2).splitlines()
    argv = shlex.split(line)
    assert argv[:3] == ["xpk", "workload", "create"] and argv[argv.index("--num-slices") + 1] == "2"
    inner = shlex.split(argv[argv.index("--command") + 1])
    assert inner[-len(COMMAND) :] == COMMAND and "pip" in inner
    argv = shlex.split(said("tpu_xpk.sh", "--image", "repo/image:1"))
    assert argv[argv.index("--docker-image") + 1] == "repo/image:1"
    assert shlex.split(argv[argv.index("--command") + 1]) == COMMAND


def test_slurm(tmp_path):
    script = said("slurm.sh", "--nodes", 4, "--gpus", 8, "--partition", "gpu")
    for line in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu", "--signal=B:TERM@120"):
        assert f"#SBATCH {line}\n" in script
    assert "account" not in script
    (line,) = (line for line in script.splitlines() if line.startswith("srun "))
    assert shlex.split(line.rstrip("& "))[2:] == COMMAND
    cpus = said("slurm.sh", "--gpus", 0)
    assert "#SBATCH --ntasks-per-node=1\n" in cpus and "gpus" not in cpus
    # the job script itself, with srun and scontrol replaced: a lost process puts the job back into the queue
    for name, body in (("srun", 'shift; exec "$@"'), ("scontrol", 'echo "$@" >> "$LOG"')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    for code, requeued in ((0, False), (1, False), (75, True)):
        (tmp_path / "job").write_text(said("slurm.sh", command=["bash", "-c", f"exit {code}"]))
        log = tmp_path / f"log{code}"
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "LOG": str(log)}
        assert subprocess.run(["bash", str(tmp_path / "job")], env=environment, timeout=20).returncode == code
        assert log.exists() == requeued


def test_one_host(tmp_path):
    assert shlex.split(said("gpu_host.sh")) == COMMAND
    lines = [shlex.split(line) for line in said("gpu_host.sh", "--processes", 2, "--port", 9).splitlines()]
    for i, line in enumerate(lines):
        together = ["--coordinator", "localhost:9", "--processes", "2", "--process", str(i)]
        assert line == ["env", f"CUDA_VISIBLE_DEVICES={i}", *COMMAND, *together]
    # for real: the code of the process that failed, and the other one is ended
    fails = ["bash", "-c", f"[ $CUDA_VISIBLE_DEVICES = 1 ] && exit 75; exec sleep 60; touch {tmp_path}/never"]
    assert launch("gpu_host.sh", "--processes", 2, command=fails, dry=False).returncode == 75
    works = ["bash", "-c", f'echo "$@" > {tmp_path}/$CUDA_VISIBLE_DEVICES', "x"]
    assert launch("gpu_host.sh", "--processes", 2, command=works, dry=False).returncode == 0
    told = (tmp_path / "1").read_text().split()
    assert told == ["--coordinator", "localhost:12355", "--processes", "2", "--process", "1"]


@pytest.mark.parametrize("script", NEEDED)
def test_what_they_refuse(script):
    assert launch(script, "--frobnicate").returncode == 2
    assert launch(script, command=[]).returncode == 2
    done = subprocess.run([str(LAUNCH / script), "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 2 and f"launch/{script}" in done.stderr  # the usage


def test_numbers():
    for script, options in (
        ("tpu_xpk.sh", ("--slices", 0)), ("slurm.sh", ("--nodes", "two")), ("gpu_host.sh", ("--processes", "-1")),
    ):  # fmt: skip
        done = launch(script, *options)
        assert done.returncode == 2 and options[0] in done.stderr
