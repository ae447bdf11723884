"""An experiment on two real processes: the figures of one, and the files of process 0 alone."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import common

RUN = """
import pathlib, sys
from experiments import common, teacher_intervention as experiment
common.ROOT = pathlib.Path(sys.argv.pop(1))
common.shared_data = lambda name, given=None: given
common.main("teacher_intervention", experiment.PRESETS, experiment.run)
"""


def started(place: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, str(place), "smoke", "--teacher-steps", "2", *options]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(common.ROOT)}
    return subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    """A teacher, then a student in two steps that take up one another's checkpoints, then files."""
    pytest.importorskip("matplotlib")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    together = ("--coordinator", f"localhost:{port}", "--processes", "2", "--process")
    runs = [started(tmp_path / "two", *together, str(i)) for i in range(2)] + [started(tmp_path / "one")]
    said = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], said
    table = "evaluated without intervention"
    assert table in said[0][0] and table not in said[1][0] and "everything is in" not in said[1][0]  # one speaks

    two, one = ([*(tmp_path / name / "runs" / "teacher_intervention").iterdir()] for name in ("two", "one"))
    assert len(two) == len(one) == 1
    files = lambda run: {str(f.relative_to(run)) for f in run.rglob("*") if "checkpoints" not in f.parts}
    assert files(two[0]) == files(one[0])
    found, alone = (json.loads((run / "result.json").read_text()) for run in (two[0], one[0]))
    assert found["rows"][0]["eval_loss"] == pytest.approx(alone["rows"][0]["eval_loss"], rel=1e-4)
    assert found["teacher"] == alone["teacher"]


def test_what_cannot_be_said(capsys, monkeypatch):
    monkeypatch.setattr(common, "run_directory", None)
    for argv, told in (
        (["--processes", "two"], "processes, process: expected numbers, got two and None"),
        (["--coordinator", "localhost:1"], "processes: coordinator, processes and process belong together"),
    ):
        with pytest.raises(SystemExit) as stopped:
            common.main("gptq", {}, None, argv)
        assert stopped.value.code == 2 and told in capsys.readouterr().err
