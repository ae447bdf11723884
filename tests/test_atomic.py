"""Atomic replacement: a full disk, a read-only place, an exception or a kill leave what was there before."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest

from jaxformers import atomic
from jaxformers.atomic import json_bytes, replace_directory, write_bytes_atomic, write_json_atomic, write_text_atomic
from jaxformers.safetensors_io import open_checkpoint, write_checkpoint

MEGABYTE = np.zeros(1 << 18, np.float32)


def tree(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def old(tmp_path) -> Path:
    """A checkpoint with other files beside it; `intact(old)` tells whether anything happened to it."""
    directory = tmp_path / "place" / "old"
    write_checkpoint([("a", np.arange(4.0)), ("b", np.ones(3))], directory, extra_files={"config.json": '{"v": 1}'})
    (directory / "README.md").write_text("card")
    return directory


def intact(directory: Path, before: dict[str, bytes]) -> bool:
    return tree(directory) == before and [p.name for p in directory.parent.iterdir()] == [directory.name]


def run_python(code: str, *arguments, check=True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    root = Path(atomic.__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def test_files_are_replaced(tmp_path):
    path = tmp_path / "a.json"
    write_json_atomic(path, {"b": 1, "a": "ü"}, sort_keys=True)
    assert path.read_text(encoding="utf-8") == '{\n  "a": "ü",\n  "b": 1\n}\n'
    write_text_atomic(path, "ä")
    assert path.read_bytes() == "ä".encode()
    write_bytes_atomic(path, b"\0")
    assert path.read_bytes() == b"\0" and json_bytes([]) == b"[]\n"
    assert list(tmp_path.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # not the private mode of a temporary file


def test_a_failing_file_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json_atomic(path, 1)
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})
    monkeypatch.setattr(os, "fsync", raiser(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        write_json_atomic(path, 2)
    assert path.read_text() == "1\n" and list(tmp_path.iterdir()) == [path]


def raiser(code: int):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("function", ["mkdir", "fsync", "link", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_any_refused_call_leaves_the_old_checkpoint(old, monkeypatch, function, code):
    before = tree(old)
    monkeypatch.setattr(os, function, raiser(code))
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)  # so that os.rename is what is used
    with pytest.raises(OSError, match="old, which is as it was before: " + os.strerror(code)) as caught:
        write_checkpoint([("a", np.zeros(9))], old)
    assert caught.value.errno == code
    monkeypatch.undo()
    assert intact(old, before)


def test_an_exchange_that_fails_half_way_is_undone(old, monkeypatch):
    before, rename, calls = tree(old), os.rename, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        write_checkpoint([("a", np.zeros(9))], old)
    assert len(calls) == 3 and intact(old, before)


@pytest.mark.parametrize("exchange", [True, False])
def test_both_ways_of_exchanging(old, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    write_checkpoint([("a", np.zeros(9))], old)
    assert set(open_checkpoint(old)) == {"a"} and (old / "README.md").read_text() == "card"
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_exchange_is_one_step_on_linux(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    assert atomic._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()
    with pytest.raises(OSError, match="No such file"):
        atomic._exchange(tmp_path / "a", tmp_path / "missing")


def test_exceptions_and_interrupts_while_fetching_leave_the_old_checkpoint(old):
    before = tree(old)
    for error in (RuntimeError, MemoryError, KeyboardInterrupt, SystemExit):

        def fail(error=error):
            raise error("stop")

        with pytest.raises(error):
            write_checkpoint([("a", MEGABYTE), ("b", (1,), np.float32, fail)], old)
        assert intact(old, before)


def test_hard_links_fail_over_to_copies(old, monkeypatch):
    monkeypatch.setattr(os, "link", raiser(errno.EPERM))
    (old / "link").symlink_to("README.md")
    write_checkpoint([("a", np.zeros(9))], old)
    assert (old / "README.md").read_text() == "card" and os.readlink(old / "link") == "README.md"


def test_other_files_are_linked_not_copied_and_a_block_cannot_write_through_the_links(old):
    inode = (old / "README.md").stat().st_ino
    with replace_directory(old) as temporary:
        assert list(temporary.iterdir()) == []
        (temporary / "config.json").write_text("new")
    assert (old / "README.md").stat().st_ino == inode and (old / "config.json").read_text() == "new"


def test_kinds_of_targets(tmp_path, old, monkeypatch):
    write_checkpoint([("a", np.zeros(1))], tmp_path / "new" / "deeper")  # parents are made
    assert set(open_checkpoint(tmp_path / "new" / "deeper")) == {"a"}
    (tmp_path / "link").symlink_to(old)
    write_checkpoint([("c", np.zeros(1))], tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and set(open_checkpoint(old)) == {"c"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is a file; name a directory"):
        write_checkpoint([("a", np.zeros(1))], tmp_path / "file")
    with pytest.raises(ValueError, match="is a mount point"):
        write_checkpoint([("a", np.zeros(1))], "/")
    monkeypatch.chdir(old)
    write_checkpoint([("d", np.zeros(1))], ".")
    assert set(open_checkpoint(old)) == {"d"}
    mode = 0o750
    old.chmod(mode)
    write_checkpoint([("e", np.zeros(1))], old)
    assert old.stat().st_mode & 0o777 == mode


SAVE_WITHOUT_SPACE = """
    import sys, numpy as np
    from jaxformers.safetensors_io import write_checkpoint
    try:
        write_checkpoint([(f"t{i}", np.zeros(1 << 18, np.float32)) for i in range(8)], sys.argv[1])
    except OSError as error:
        print(error)
    else:
        raise SystemExit("nothing went wrong")
"""


def test_a_real_write_error_from_a_file_size_limit(old):
    """The kernel refuses the write itself (EFBIG); no function of Python is replaced."""
    before = tree(old)
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))\n"
    done = run_python(limit + textwrap.dedent(SAVE_WITHOUT_SPACE), old)
    assert "which is as it was before: File too large" in done.stdout
    assert intact(old, before)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, mounted for the test; needs root on Linux."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=4m", "none", place], capture_output=True).returncode
    ):
        pytest.skip("cannot mount a small file system here (needs root)")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk(small_disk):
    old = small_disk / "old"
    write_checkpoint([("a", MEGABYTE)], old, extra_files={"config.json": "{}"})
    before = tree(old)
    done = run_python(SAVE_WITHOUT_SPACE, old)
    assert "which is as it was before: No space left on device" in done.stdout
    assert intact(old, before)


def test_a_read_only_file_system(small_disk):
    old = small_disk / "old"
    write_checkpoint([("a", np.ones(3))], old)
    before = tree(old)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        write_checkpoint([("a", np.zeros(3))], old)
    assert intact(old, before)


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
def test_a_read_only_parent():
    """Permission bits do not bind root, who becomes nobody for the attempt."""
    with tempfile.TemporaryDirectory() as place:
        old = Path(place) / "old"
        write_checkpoint([("a", np.ones(3))], old)
        before = tree(old)
        os.chmod(place, 0o555)
        root = os.geteuid() == 0
        try:
            if root:
                os.seteuid(65534)
            with pytest.raises(PermissionError, match="which is as it was before: Permission denied"):
                write_checkpoint([("a", np.zeros(3))], old)
            with pytest.raises(PermissionError):
                write_json_atomic(Path(place) / "a.json", 1)
        finally:
            if root:
                os.seteuid(0)
            os.chmod(place, 0o755)
        assert intact(old, before)


def test_a_killed_save_leaves_the_old_checkpoint_and_the_next_save_clears_up(old):
    before = tree(old)
    done = run_python(
        """
        import os, signal, sys, numpy as np
        from jaxformers.safetensors_io import write_checkpoint
        die = lambda: os.kill(os.getpid(), signal.SIGKILL)
        write_checkpoint([("a", np.zeros(9)), ("z", (1,), np.float32, die)], sys.argv[1], max_shard_bytes=72)
        """,
        old,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert tree(old) == before and len(list(old.parent.iterdir())) == 2
    somebody = (
        old.parent / f"{[p for p in old.parent.iterdir() if p != old][0].name.rsplit('-', 2)[0]}-{os.getpid()}-ab"
    )
    somebody.mkdir()  # a save that is still running, here in this process
    write_checkpoint([("a", np.zeros(9))], old)
    assert set(old.parent.iterdir()) == {old, somebody}
    assert set(open_checkpoint(old)) == {"a"}
