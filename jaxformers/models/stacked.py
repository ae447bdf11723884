"""Parameters that stack what a checkpoint keeps as one tensor an expert, or as one tensor of all experts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxformers.models.keymap import HF, turned, turned_back
from jaxformers.safetensors_io import CheckpointError, LazyTensor


@dataclasses.dataclass(frozen=True)
class Stack:
    """An array (experts, …) that is read expert by expert, when and as far as it is indexed."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int], np.ndarray]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        chosen = range(*index[0].indices(self.shape[0]))
        return np.stack([self.read(i)[index[1:]] for i in chosen])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def reader(
    get: Callable[[str], LazyTensor | None], entry: HF, leaf_name: str, shape: tuple[int, ...]
) -> Callable[[], Stack] | None:
    """A function that gives the parameter of ``shape`` at ``entry``, or None when the checkpoint has nothing of it.

    Raises ValueError naming the tensor that is missing, or whose shape or dtype does not fit.
    """
    name, i, n = entry.whole
    whole = get(name) if leaf_name == "weight" else get(f"{name}_{leaf_name}")
    own = shape[1:]
    if whole is not None:
        out = own[-1]
        _check(name, whole, (shape[0], n * out, *own[:-1]))
        part = slice(i * out, (i + 1) * out)
        return lambda: Stack(shape, whole.dtype, lambda e: _turned(whole[e, part]))
    names = [f"{entry.name.format(e)}.{leaf_name}" for e in range(shape[0])]
    tensors = [get(each) for each in names]
    if all(tensor is None for tensor in tensors):
        return None
    for each, tensor in zip(names, tensors, strict=True):
        if tensor is None:
            raise CheckpointError(f"tensors missing: {each}")
        _check(each, tensor, turned(own))
        if tensor.dtype != tensors[0].dtype:
            raise ValueError(f"{each} has dtype {tensor.dtype}, other experts have {tensors[0].dtype}")
    return lambda: Stack(shape, tensors[0].dtype, lambda e: _turned(tensors[e].read()))


def _turned(weight: np.ndarray) -> np.ndarray:
    return turned_back(weight) if weight.ndim > 1 else weight


def _check(name: str, tensor: LazyTensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but config.json asks for {tuple(shape)}")
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected a floating-point one")


def tensors(entry: HF, leaf_name: str, leaf: Any) -> list[tuple]:
    """``[(name, shape, dtype, read)]``: one tensor an expert."""
    shape = turned(tuple(leaf.shape[1:])) if leaf.ndim > 2 else tuple(leaf.shape[1:])

    def read(e: int) -> np.ndarray:
        own = np.asarray(leaf[e])
        return turned(own) if own.ndim > 1 else own

    return [
        (f"{entry.name.format(e)}.{leaf_name}", shape, np.dtype(leaf.dtype), lambda e=e: read(e))
        for e in range(leaf.shape[0])
    ]
