"""Checkpoint directories: one safetensors file or shards with an index, opened lazily and written as a unit."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from jaxformers.atomic import json_bytes, replace_directory
from jaxformers.flax_checkpoint import FlaxFile, flax_files
from jaxformers.safetensors_file import (
    CheckpointError,
    LazyTensor,
    PendingTensor,
    SafetensorsFile,
    check_plain_name,
    pending_tensors,
    read_header,
    read_json,
    show,
    write_file,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LazyTensor",
    "SafetensorsFile",
    "open_checkpoint",
    "read_header",
    "read_json",
    "write_checkpoint",
    "write_tensors",
]


class Checkpoint(Mapping[str, LazyTensor]):
    """All tensors of a checkpoint directory by name. `.directory`, `.files` (shards), `.metadata` (of the first)."""

    def __init__(self, directory: Path, files: list[SafetensorsFile] | list[FlaxFile]):
        self.directory, self.files = directory, files
        self.metadata = files[0].metadata if files else {}
        self._tensors: dict[str, LazyTensor] = {}
        for file in files:
            for name, tensor in file.items():
                if name in self._tensors:
                    other = next(f.path.name for f in files if name in f)
                    raise CheckpointError(f"{directory}: tensor {show(name)} is in both {other} and {file.path.name}")
                self._tensors[name] = tensor

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def release(self) -> None:
        """Lets the system drop the pages of what was read (`SafetensorsFile.release`): call it after each tensor."""
        for file in self.files:
            file.release()


def open_checkpoint(directory: str | os.PathLike, *, check_finite: bool = False) -> Checkpoint:
    """Opens the safetensors checkpoint in `directory`: one file or shards with an index; reads headers only.

    Looked for in this order: `model.safetensors`, `model.safetensors.index.json`, the file that `quantize_config.json`
    (or `quantization_config` in `config.json`) calls `model_file_base_name`, the only `*.safetensors`; then what
    `transformers` 4 saved from its Flax classes, `flax_model.msgpack` or its shards (read whole).
    Raises CheckpointError, naming file and reason, for whatever is missing, malformed, ambiguous or points elsewhere.
    """
    directory = Path(directory)
    if not os.path.isdir(directory):
        raise CheckpointError(f"{directory}: {'is not a directory' if os.path.exists(directory) else 'does not exist'}")
    for find_stem in (lambda _: "model", _quantized_stem):  # what comes second is not read where the first is there
        if (stem := find_stem(directory)) is not None:
            file = directory / f"{stem}.safetensors"
            if os.path.exists(file):
                return Checkpoint(directory, [SafetensorsFile(file, check_finite=check_finite)])
            index = directory / f"{stem}.safetensors.index.json"
            if os.path.exists(index):
                return _open_shards(directory, index, check_finite)
    found = sorted(directory.glob("*.safetensors"))
    indices = sorted(directory.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return _open_shards(directory, indices[0], check_finite)
    if len(found) == 1:
        return Checkpoint(directory, [SafetensorsFile(found[0], check_finite=check_finite)])
    if found:
        names = ", ".join(path.name for path in found[:5])
        raise CheckpointError(f"{directory}: several safetensors files ({names}), none called model, and no index")
    if flax := flax_files(directory, check_finite=check_finite):
        return Checkpoint(directory, flax)
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory}: only pickled weights ({', '.join(pickles[:5])}), which can run code when read; "
            "convert them to safetensors first"
        )
    raise CheckpointError(f"{directory}: no model.safetensors, no index of shards, no other *.safetensors")


def _open_shards(directory: Path, index: Path, check_finite: bool) -> Checkpoint:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map' from tensor names to files")
    for name, file in weight_map.items():
        check_plain_name(file, f"{index}: the file of tensor {show(name)}")
    files = {}
    for file in sorted(set(weight_map.values())):
        if not os.path.exists(directory / file):
            raise CheckpointError(f"{index}: shard {show(file)} is missing from the directory")
        files[file] = SafetensorsFile(directory / file, check_finite=check_finite)
    for name, file in weight_map.items():
        if name not in files[file]:
            raise CheckpointError(f"{index}: tensor {show(name)} is not in {file}, where the index says it is")
    return Checkpoint(directory, list(files.values()))


def _quantized_stem(directory: Path) -> str | None:
    stem = None
    if (directory / "quantize_config.json").is_file():
        stem = read_json(directory / "quantize_config.json").get("model_file_base_name")
    if stem is None and (directory / "config.json").is_file():
        nested = read_json(directory / "config.json").get("quantization_config")
        stem = nested.get("model_file_base_name") if isinstance(nested, dict) else None
    if stem is not None:
        check_plain_name(stem, f"{directory}: model_file_base_name")
        stem = stem.removesuffix(".safetensors")
    return stem


def write_checkpoint(
    tensors: Iterable[tuple],
    directory: str | os.PathLike,
    *,
    max_shard_bytes: float = 5e9,
    metadata: Mapping[str, str] | None = None,
    extra_files: Mapping[str, bytes | str] | None = None,
    stem: str = "model",
    drop: Iterable[str] = ("quantize_config.json",),
) -> None:
    """Writes a checkpoint directory, replacing `directory` as a unit (see `atomic.replace_directory`).

    `tensors` yields `(name, array)` (NumPy, JAX, LazyTensor: anything with shape and dtype) or
    `(name, shape, dtype, read)`, where `read()` returns the array when its turn comes; one array is held at a time.
    Written are `{stem}.safetensors`, or shards of at most `max_shard_bytes` with an index, and `extra_files`
    (name, with `/` for folders -> content). Of what is in `directory` already, weights and the entries called in `drop`
    go unless they are written anew; other files stay. `metadata` defaults to `{"format": "pt"}`, which Hugging Face
    asks for.
    Raises ValueError before anything is written (a name twice, a dtype without a place in the format), or when a
    `read()` returns something else than announced; OSError when the disk refuses. The old checkpoint then stays.
    """
    pending = pending_tensors(tensors)
    for name in extra_files or {}:
        if not name or Path(name).is_absolute() or any(part in ("..", "") for part in name.split("/")) or "\\" in name:
            raise ValueError(f"extra_files: {show(name)} is not a relative path inside the checkpoint")
    dropped = frozenset(drop)
    with replace_directory(directory, drop=lambda name: name in dropped or is_weight_file(name)) as temporary:
        write_tensors(pending, temporary, max_shard_bytes=max_shard_bytes, metadata=metadata, stem=stem)
        for name, content in (extra_files or {}).items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def is_weight_file(name: str) -> bool:
    """Whether `name` is a file that `open_checkpoint` would read weights from (adapters are something else)."""
    return bool(re.search(r"\.safetensors(\.index\.json)?$", name)) and not name.startswith("adapter_model.")


def write_tensors(
    tensors: Iterable[tuple],
    directory: str | os.PathLike,
    *,
    max_shard_bytes: float = 5e9,
    metadata: Mapping[str, str] | None = None,
    stem: str = "model",
) -> None:
    """Writes the weight files alone into a directory made by `replace_directory`; arguments: see `write_checkpoint`."""
    directory = Path(directory)
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise ValueError("metadata: must map strings to strings")
    check_plain_name(stem, "stem")
    shards = _shards(pending_tensors(tensors), max_shard_bytes)
    if len(shards) == 1:
        write_file(shards[0], directory / f"{stem}.safetensors", metadata)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(shard, directory / file, metadata)
        weight_map |= {tensor.name: file for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / f"{stem}.safetensors.index.json").write_bytes(json_bytes(index))


def _shards(tensors: list[PendingTensor], max_shard_bytes: float) -> list[list[PendingTensor]]:
    """Cuts the tensors, in their order, into runs of at most `max_shard_bytes` (a larger tensor stands alone)."""
    if not max_shard_bytes > 0:
        raise ValueError(f"max_shard_bytes: must be positive, is {max_shard_bytes}")
    shards: list[list[PendingTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards
