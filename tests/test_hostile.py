"""Malformed checkpoints: each is refused by name, within a second, in little memory, and runs no code."""

import gc
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from corpus import CORPUS, bert_tensors, spoilt, write_valid

import jaxformers
from jaxformers.safetensors_io import CheckpointError, open_checkpoint, read_json


@pytest.mark.parametrize("case", CORPUS)
def test_is_refused_by_name_within_a_second(tmp_path, case):
    directory = spoilt(tmp_path / "c", case)
    gc.collect()  # what other tests left behind is not to be collected on this one's time
    start = time.thread_time()
    with pytest.raises(CheckpointError, match=CORPUS[case][2]) as caught:
        open_checkpoint(directory)
    assert time.thread_time() - start < 1
    assert str(directory) in str(caught.value) and len(str(caught.value)) < 1500 and str(caught.value).isprintable()
    assert not (directory / "sprung").exists()  # nothing was unpickled


@pytest.mark.parametrize("shards", [False, True])
def test_the_unspoilt_checkpoint_is_valid(tmp_path, shards):
    checkpoint = open_checkpoint(write_valid(tmp_path / "c", shards=shards))
    expected = bert_tensors()
    assert set(checkpoint) == set(expected)
    assert all(np.array_equal(checkpoint[name].read(), array) for name, array in expected.items())


def test_directories_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, message in [
        ("empty", "empty: no model.safetensors"),
        ("file", "is not a directory"),
        ("no", "not exist"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / name)


def test_json_of_another_kind(tmp_path):
    (tmp_path / "a").write_text("[1]")
    (tmp_path / "b").write_text("{}")
    assert read_json(tmp_path / "a", list) == [1] and read_json(tmp_path / "b") == {}
    with pytest.raises(CheckpointError, match="a: holds a JSON list, not an object"):
        read_json(tmp_path / "a")
    with pytest.raises(CheckpointError, match="b: holds a JSON dict, not a list"):
        read_json(tmp_path / "b", list)


def test_an_unreadable_file(tmp_path, monkeypatch):
    directory = write_valid(tmp_path / "c", shards=False)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be read: Permission denied"):
        open_checkpoint(directory)
    with pytest.raises(CheckpointError, match="config.json: cannot be read: Permission denied"):
        read_json(directory / "config.json")


MEASURE = """
    import sys
    from jaxformers.safetensors_io import CheckpointError, open_checkpoint
    def peak():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) >> 10
    for directory in sys.argv[1:]:
        open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
        before = peak()
        try:
            open_checkpoint(directory)
        except CheckpointError:
            print(peak() - before, directory)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="resets the peak as Linux does")
def test_is_refused_in_little_memory(tmp_path):
    """Megabytes beyond the file's own header, which is read once; in a process of its own."""
    directories = [spoilt(tmp_path / str(i), case) for i, case in enumerate(CORPUS)]
    root = Path(jaxformers.__file__).parent.parent
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), *map(str, directories)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60)
    assert done.returncode == 0, done.stderr
    grown = {line.split()[1]: int(line.split()[0]) for line in done.stdout.splitlines()}
    assert set(grown) == {str(directory) for directory in directories}
    for directory, case in zip(directories, CORPUS, strict=True):
        header_bytes = sum(p.stat().st_size for p in directory.glob("*.safetensors") if p.is_file()) / 2**20
        parsed = 24 if case == "30000 tensors, one twice" else 0  # the one whose header is fine but for its last key
        assert grown[str(directory)] <= 16 + 2 * min(header_bytes, 25) + parsed, case
