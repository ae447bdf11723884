"""Files and directories that are either wholly there or not there at all.

Everything is written beside its target, forced to the disk, and renamed. A full disk, a read-only place, an exception
or a killed process leaves what was there before as it was.
"""

import contextlib
import ctypes
import errno
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path


def write_bytes_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Replaces the file `path` by one with the content `data`. Raises OSError, with the old file untouched."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            _sync(file)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_directory(path.parent)


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Replaces the file `path` by one with `text` in UTF-8. Raises OSError, with the old file untouched."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: str | os.PathLike, value, *, sort_keys: bool = False) -> None:
    """Replaces the file `path` by `value` as indented JSON. Raises TypeError where `value` is not JSON, or OSError."""
    write_bytes_atomic(path, json_bytes(value, sort_keys=sort_keys))


def json_bytes(value, *, sort_keys: bool = False) -> bytes:
    """`value` as indented UTF-8 JSON with a newline at its end, as Hugging Face writes its configuration files."""
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n").encode("utf-8")


@contextlib.contextmanager
def replace_directory(
    directory: str | os.PathLike, *, drop: Callable[[str], bool] = lambda name: False
) -> Iterator[Path]:
    """Yields an empty directory to write into; on leaving the block without an exception it becomes `directory`.

    Where `directory` exists already, its other entries are carried over by hard links (copies where the file system has
    none), save those for which `drop(name)` is true and those the block wrote itself. So files that a checkpoint does
    not know (a model card, a tokenizer) stay, and stale weights go. The exchange of the two directories is one atomic
    rename on Linux; elsewhere two renames, the first undone when the second fails.

    Raises ValueError where `directory` is a file or a mount point (which cannot be renamed), OSError for everything
    that the disk refuses. In both cases, and for any exception from the block, the old directory stays as it was and
    nothing is left beside it.
    """
    directory = Path(os.path.realpath(directory))  # a symlink to a directory keeps pointing at it
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory: {directory} is a file; name a directory")
    if os.path.ismount(directory):
        raise ValueError(f"directory: {directory} is a mount point and cannot be replaced; name a directory inside it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{directory.name}.saving-{socket.gethostname()}-"
    with contextlib.suppress(OSError):  # tidiness alone
        _remove_leftovers(directory.parent, prefix)
    temporary = directory.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        yield temporary
        if directory.exists():
            # Only now: writing into a hard-linked file would change the old directory too.
            _carry_over(directory, temporary, drop)
            shutil.copymode(directory, temporary)
        _sync_tree(temporary)
        _move_into_place(temporary, directory)
    except OSError as error:
        raise OSError(
            error.errno, f"could not write {directory}, which is as it was before: {error.strerror or error}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after the exchange this is the old directory
    _sync_directory(directory.parent)


def _remove_leftovers(parent: Path, prefix: str) -> None:
    """Removes what a killed process on this machine left half written."""
    for leftover in parent.iterdir():
        pid = leftover.name.removeprefix(prefix).split("-")[0]
        if leftover.name.startswith(prefix) and pid.isdecimal():
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                shutil.rmtree(leftover, ignore_errors=True)
            except (OSError, OverflowError):
                pass  # somebody else's process is alive: leave its directory alone


def _carry_over(old: Path, new: Path, drop: Callable[[str], bool]) -> None:
    for entry in os.scandir(old):
        target = new / entry.name
        if drop(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            target.mkdir(exist_ok=True)
            _carry_over(Path(entry.path), target, lambda name: False)
        elif not os.path.lexists(target):
            try:
                os.link(entry.path, target, follow_symlinks=False)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                shutil.copy2(entry.path, target, follow_symlinks=False)


def _move_into_place(new: Path, old: Path) -> None:
    """`old` becomes `new`; afterwards `new` is what `old` was, where it existed."""
    if not old.exists():
        os.rename(new, old)
    elif not _exchange(new, old):
        aside = new.with_name(new.name + "-old")
        os.rename(old, aside)
        try:
            os.rename(new, old)
        except OSError:
            os.rename(aside, old)
            raise
        os.rename(aside, new)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two paths in one step (Linux renameat2 with RENAME_EXCHANGE). False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    at_cwd, exchange = -100, 2
    if renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    """Forces renames in `directory` to the disk, where the system lets a directory be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sync_tree(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        for name in files:
            path = os.path.join(folder, name)
            if not os.path.islink(path) and os.access(path, os.R_OK):
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
        _sync_directory(Path(folder))
