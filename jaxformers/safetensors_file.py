"""Reading and writing single safetensors files without holding them in memory.

Reading: a file is validated by `safetensors.safe_open` (lengths, overlaps, sizes against shapes), then memory-mapped;
a tensor costs memory when it is read. Writing: tensors are fetched and written one after another.
The format (https://github.com/huggingface/safetensors): 8 bytes of header length (little-endian), a JSON header, data.
"""

import json
import math
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 32
MAX_JSON_BYTES = 64_000_000  # the index of the largest public checkpoints is about 15 MB

# In the order of the reference writer, which sorts a file's tensors by descending rank here (so that wide types come
# first and stay aligned), then by name.
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "I16": np.int16,
        "U16": np.uint16,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "I32": np.int32,
        "U32": np.uint32,
        "F32": np.float32,
        "C64": np.complex64,
        "F64": np.float64,
        "I64": np.int64,
        "U64": np.uint64,
    }.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# A five-letter key (however it is escaped: it can only be "shape") before a list of numbers without an end.
_ENDLESS_SHAPE = re.compile(rb'(?<!\\)"(?:[^"\\]|\\u[0-9a-fA-F]{4}){5}"\s*:\s*\[[\d,\s]{2000}')
_RANK = {name: rank for rank, name in enumerate(DTYPES)}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


@dataclass(frozen=True, slots=True, eq=False)
class LazyTensor:
    """A tensor on the disk. `read()`, `tensor[index]` and `np.asarray(tensor)` are read-only views on a memory map."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: "SafetensorsFile"
    offset: int  # of the first byte in the file
    check_finite: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def read(self) -> np.ndarray:
        """The whole tensor: a read-only view, no copy. Raises CheckpointError for NaN or infinity (`check_finite`)."""
        return self[...]

    def __getitem__(self, index) -> np.ndarray:
        view = self._view()[index]
        if self.dtype == np.bool_ and view.size and view.view(np.uint8).max() > 1:
            raise CheckpointError(f"{self.file.path}: BOOL tensor {show(self.name)} has bytes other than 0 and 1")
        if self.check_finite and not is_finite(view):
            raise CheckpointError(f"{self.file.path}: tensor {show(self.name)} contains NaN or infinite values")
        return view

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self.read()
        if copy or (dtype is not None and np.dtype(dtype) != self.dtype):
            return array.astype(dtype or self.dtype)
        return array

    def _view(self) -> np.ndarray:
        if not self.nbytes:
            return np.empty(self.shape, self.dtype)
        self.file._touched.add((self.offset, self.nbytes))
        count = self.nbytes // self.dtype.itemsize
        return np.frombuffer(self.file.map(), self.dtype, count, self.offset).reshape(self.shape)


class SafetensorsFile(Mapping[str, LazyTensor]):
    """One validated safetensors file: a mapping from tensor names to lazy tensors, and `.metadata`.

    Raises CheckpointError for anything but a whole, well-formed file. `check_finite=True` makes every read refuse NaN
    and infinity. The file must not be changed while tensors of it are in use.
    """

    def __init__(self, path: str | os.PathLike, *, check_finite: bool = False):
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        self._touched: set[tuple[int, int]] = set()  # (offset, bytes) read since the last release
        header, data_start, data_bytes = _read_valid_header(self.path)
        self._size = data_start + data_bytes
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self._tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape, dtype = tuple(entry["shape"]), DTYPES.get(entry["dtype"])
            if dtype is None:
                raise CheckpointError(
                    f"{self.path}: tensor {show(name)} has dtype {entry['dtype']}, which is not supported; "
                    f"supported are {', '.join(DTYPES)}"
                )
            # The bounds were validated already; they are checked again because the file was opened a second time.
            possible = len(shape) <= MAX_DIMENSIONS and math.prod(n or 1 for n in shape) * dtype.itemsize < 2**62
            size = math.prod(shape) * dtype.itemsize if possible else -1
            if not 0 <= begin <= end <= data_bytes or end - begin != size:
                raise CheckpointError(f"{self.path}: tensor {show(name)} has shape {show(shape)}, which is impossible")
            self._tensors[name] = LazyTensor(name, shape, dtype, self, data_start + begin, check_finite)

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def map(self) -> mmap.mmap:
        """The file as memory map, made on first use."""
        if self._map is None:
            try:
                with open(self.path, "rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self.path}: cannot be memory-mapped: {error}") from error
            if len(self._map) != self._size:
                raise CheckpointError(f"{self.path}: has changed since it was opened")
        return self._map

    def release(self) -> None:
        """Lets the system drop the pages that reading brought in. Views stay valid: they are read again when used."""
        for offset, count in self._touched:
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            if hasattr(mmap, "MADV_DONTNEED"):
                self.map().madvise(mmap.MADV_DONTNEED, start, offset + count - start)
        self._touched.clear()


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """The validated JSON header of a safetensors file. Raises CheckpointError."""
    return _read_valid_header(Path(path))[0]


def _read_valid_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(header, offset of the first data byte, number of data bytes)."""
    size = _regular_file_size(path)
    if size < 8:
        raise CheckpointError(f"{path}: truncated or empty: {size} bytes, a safetensors file has at least 8")
    head = _read_bytes(path, 8)
    length = int.from_bytes(head, "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        if head[:2] == b"PK" or head[:1] == b"\x80":  # a zip archive of pickles, a pickle
            raise CheckpointError(f"{path}: is a pickle (or torch archive), not safetensors; convert it to safetensors")
        raise CheckpointError(
            f"{path}: the header is said to have {length} bytes; the file has {size} and the format allows "
            f"{MAX_HEADER_BYTES}: truncated, or not safetensors"
        )
    text = _read_bytes(path, length, start=8)
    if _ENDLESS_SHAPE.search(text):  # before anything makes a list of millions of numbers from it
        raise CheckpointError(f"{path}: a tensor has more than {MAX_DIMENSIONS} dimensions")
    try:
        with safe_open(path, framework="np"):
            pass
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the reader's native code is not an Exception
        raise CheckpointError(f"{path}: not a valid safetensors file: {show(str(error), 300)}") from error
    header = _parse_json(text, path)
    return header, 8 + length, size - 8 - length


def check_plain_name(name: Any, what: str) -> None:
    """Refuses whatever could lead out of the directory: separators, drive letters, `..`, NUL."""
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:\x00-\x1f]", name) or len(name) > 255:
        raise CheckpointError(f"{what} is {show(name)}; it must be the plain name of a file in the same directory")


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """The JSON object (or list: `kind`) in a file. Raises CheckpointError: missing, huge, not JSON, a key twice."""
    path = Path(path)
    size = _regular_file_size(path)
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: {size} bytes of JSON; more than {MAX_JSON_BYTES} are not read")
    return _parse_json(_read_bytes(path, size), path, kind)


def _parse_json(data: bytes, path: Path, kind: type = dict) -> Any:
    def unique(pairs):
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise CheckpointError(f"{path}: key {show(twice)} occurs twice")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {show(str(error), 200)}") from error
    if not isinstance(value, kind):
        raise CheckpointError(
            f"{path}: holds a JSON {type(value).__name__}, not {'an object' if kind is dict else 'a list'}"
        )
    return value


def _regular_file_size(path: Path) -> int:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: is not a regular file")
    return status.st_size


def _read_bytes(path: Path, count: int, start: int = 0) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(count)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def show(value: Any, limit: int = 120) -> str:
    """`value` for a message: printable on any terminal and never longer than `limit`, whoever chose it."""
    text = value if isinstance(value, str) else repr(value)
    text = ascii(text[:limit]) if isinstance(value, str) else text[:limit]
    return text + ("..." if len(str(value)) > limit else "")


def is_finite(array: np.ndarray) -> bool:
    """Whether an array has neither NaN nor infinity; 64k elements at a time, so that nothing is copied whole."""
    if array.dtype.kind == "c":
        array = array.view(array.real.dtype) if array.flags.c_contiguous else np.stack([array.real, array.imag])
    exponent = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00, "float64": 0x7FF0000000000000}
    if array.dtype.kind in "biu" or not array.size:
        return True
    if not array.flags.c_contiguous:
        return all(is_finite(row) for row in array) if array.ndim > 1 else bool(np.isfinite(array).all())
    flat, step = array.reshape(-1), 1 << 16
    if array.dtype.name in exponent:
        bits = flat.view(f"u{array.dtype.itemsize}")
        mask = bits.dtype.type(exponent[array.dtype.name])
        return all(((bits[i : i + step] & mask).max() != mask) for i in range(0, flat.size, step))
    finite_byte = np.isfinite(np.arange(256, dtype=np.uint8).view(array.dtype).astype(np.float32))  # the 8-bit types
    return all(finite_byte[flat[i : i + step].view(np.uint8)].all() for i in range(0, flat.size, step))


@dataclass(frozen=True, slots=True)
class PendingTensor:
    """A tensor still to be written: known by shape and dtype, fetched when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # the format's name
    read: Callable[[], Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def pending_tensors(tensors: Iterable[tuple]) -> list[PendingTensor]:
    result: dict[str, PendingTensor] = {}
    for item in tensors:
        if isinstance(item, PendingTensor):
            pending = item
        else:
            name, shape, dtype, read = item if len(item) == 4 else (item[0], *_describe(item[1]))
            kind = _NAMES.get(np.dtype(dtype).newbyteorder("="))
            if kind is None:
                raise ValueError(f"tensors: {show(name)} has dtype {np.dtype(dtype)}; possible are {', '.join(DTYPES)}")
            pending = PendingTensor(name, tuple(int(n) for n in shape), kind, read)
        if not isinstance(pending.name, str) or pending.name == "__metadata__":
            raise ValueError(f"tensors: {show(pending.name)} cannot be a tensor's name")
        if pending.name in result:
            raise ValueError(f"tensors: {show(pending.name)} occurs twice")
        pending.name.encode("utf-8")  # a lone surrogate is a ValueError here, not after a gigabyte
        result[pending.name] = pending
    return list(result.values())


def _describe(array) -> tuple:
    if not hasattr(array, "dtype"):
        array = np.asarray(array)
    return array.shape, array.dtype, lambda: array


def write_file(tensors: list[PendingTensor], path: Path, metadata: Mapping[str, str]) -> None:
    tensors = sorted(tensors, key=lambda tensor: (-_RANK[tensor.dtype], tensor.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for tensor in tensors:
        offsets = [begin, begin + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        begin += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8 bytes
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"tensors: {path.name} would have a header of {len(text)} bytes, more than the format allows")
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            _write_tensor(tensor, file)


def _write_tensor(tensor: PendingTensor, file) -> None:
    array = np.asarray(tensor.read())
    expected = DTYPES[tensor.dtype]
    if array.shape != tensor.shape or array.dtype.newbyteorder("=") != expected:
        raise ValueError(
            f"tensors: {show(tensor.name)} is {array.dtype} {array.shape}, announced was {expected} {tensor.shape}"
        )
    for block in _contiguous_blocks(array, expected.newbyteorder("<")):
        file.write(block.reshape(-1).view(np.uint8).data)


def _contiguous_blocks(array: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The array's leading rows, a few at a time: transposed or of foreign byte order, it is never copied whole."""
    if array.ndim != 2 or array.flags.c_contiguous:
        rows = array if array.ndim else array[None]
        step = max(1, (16 << 20) * len(rows) // max(1, array.nbytes))
        for start in range(0, len(rows), step):
            yield np.ascontiguousarray(rows[start : start + step], dtype=dtype)
        return
    tile = 64  # squares that stay in the first cache: several times faster than turning whole rows
    for start in range(0, len(array), tile):
        rows = array[start : start + tile]
        block = np.empty(rows.shape, dtype)
        for column in range(0, rows.shape[1], tile):
            block[:, column : column + tile] = rows[:, column : column + tile]
        yield block
