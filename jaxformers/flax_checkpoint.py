"""Weights that `transformers` 4 saved from its Flax classes: `flax_model.msgpack`, whole or in shards.

The file is a nested dict under Flax's names. Every leaf has one name and one layout in a torch checkpoint, by the same
rule for all architectures, so that the tables of :mod:`jaxformers.models` serve these files too:

    encoder/layer/0/attention/self/query/kernel (in, out)  ->  encoder.layer.0.attention.self.query.weight (out, in)
    embeddings/LayerNorm/scale, word_embeddings/embedding  ->  .weight
    batch_stats/…/mean, batch_stats/…/var                  ->  .running_mean, .running_var
    a convolution's kernel (height, width, in, out)        ->  .weight (out, in, height, width)
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxformers.safetensors_file import CheckpointError, check_plain_name, is_finite, read_json, show

STEM = "flax_model"
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_STATISTICS = {"mean": "running_mean", "var": "running_var"}


class FlaxTensor:
    """One array of the file under its torch name; what `LazyTensor` is for safetensors."""

    def __init__(self, name: str, array: np.ndarray, path: Path, check_finite: bool):
        self.name, self.path, self._array, self._check_finite = name, path, array, check_finite

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> np.dtype:
        return self._array.dtype

    @property
    def ndim(self) -> int:
        return self._array.ndim

    @property
    def nbytes(self) -> int:
        return self._array.nbytes

    def read(self) -> np.ndarray:
        """The array, no copy. Raises CheckpointError for NaN or infinity (`check_finite`)."""
        return self[...]

    def __getitem__(self, index: Any) -> np.ndarray:
        view = self._array[index]
        if self._check_finite and not is_finite(view):
            raise CheckpointError(f"{self.path}: tensor {show(self.name)} contains NaN or infinite values")
        return view


class FlaxFile(Mapping[str, FlaxTensor]):
    """One `.msgpack` file, held in memory as long as its tensors are (msgpack cannot be read in parts).

    Raises CheckpointError for anything but a nested dict of numeric arrays.
    """

    def __init__(self, path: str | os.PathLike, *, check_finite: bool = False):
        self.path, self.metadata = Path(path), {}
        self._tensors: dict[str, FlaxTensor] = {}
        for parts, array in _leaves(_restore(self.path), (), self.path):
            name, array = _torch(parts, array)
            if name in self._tensors:
                raise CheckpointError(f"{self.path}: two arrays stand for the tensor {show(name)}")
            self._tensors[name] = FlaxTensor(name, array, self.path, check_finite)

    def __getitem__(self, name: str) -> FlaxTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def release(self) -> None:
        """Nothing to give back: the file is in memory."""


def flax_files(directory: Path, *, check_finite: bool = False) -> list[FlaxFile]:
    """The Flax weights in ``directory``: `flax_model.msgpack`, or the shards that its index lists; [] without them.

    Raises CheckpointError naming a shard that is missing or a file that is not such a file.
    """
    if (whole := directory / f"{STEM}.msgpack").is_file():
        return [FlaxFile(whole, check_finite=check_finite)]
    index = directory / f"{STEM}.msgpack.index.json"
    if not index.is_file():
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map' from names to files")
    for name, file in weight_map.items():
        check_plain_name(file, f"{index}: the file of {show(name)}")
        if not (directory / file).is_file():
            raise CheckpointError(f"{index}: shard {show(file)} is missing from the directory")
    return [FlaxFile(directory / file, check_finite=check_finite) for file in sorted(set(weight_map.values()))]


def _restore(path: Path) -> Any:
    from flax.serialization import msgpack_restore

    try:
        return msgpack_restore(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # msgpack's, NumPy's and Flax's errors on malformed bytes have no common base
        raise CheckpointError(f"{path}: not a Flax msgpack file: {show(str(error) or type(error).__name__)}") from error


def _leaves(tree: Any, parts: tuple[str, ...], path: Path) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    if len(parts) > 64:
        raise CheckpointError(f"{path}: nested more than 64 levels deep; expected a Flax model's parameters")
    if isinstance(tree, dict):
        for name, branch in tree.items():
            if not isinstance(name, str):
                raise CheckpointError(f"{path}: {show(name)} is not a parameter's name")
            yield from _leaves(branch, (*parts, name), path)
    elif isinstance(tree, np.ndarray) and tree.dtype.kind in "biufV":
        yield parts, tree
    else:
        where = show("/".join(parts) or "the file")
        raise CheckpointError(f"{path}: {where} is no array; expected nested dicts of arrays")


def _torch(parts: tuple[str, ...], array: np.ndarray) -> tuple[str, np.ndarray]:
    """The torch name and layout of the leaf at ``parts``."""
    *module, leaf = parts[1:] if parts[0] in ("params", "batch_stats") else parts
    if leaf == "kernel" and array.ndim >= 2:  # (…, in, out) -> (out, in, …)
        array = array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
    statistics = _STATISTICS if parts[0] == "batch_stats" else {}
    return ".".join([*module, (statistics | _LEAVES).get(leaf, leaf)]), array
