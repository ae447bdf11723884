"""The protocol of typed weights and the functions that dispatch on it. See :mod:`jaxformers.weights`."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

Read = Callable[[str], np.ndarray]  # suffix of a checkpoint tensor under the layer's name -> its array


@runtime_checkable
class Weight(Protocol):
    """What stands where a kernel array stood; a registered pytree.

    Two class attributes, where a kind has them, tell `jaxformers.train.fit` what to train by default: ``constants``
    names floating-point arrays that are part of a storage format (the scales of packed integers) and stay as they are;
    ``updates`` those that were added to be trained while the rest of the model stays as it is.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(in, out), the logical shape."""

    @property
    def dtype(self) -> Any:
        """The dtype of ``dense()``."""

    def matmul(self, x: jax.Array) -> jax.Array:
        """(…, in) -> (…, out), in the dtype of ``x``."""

    def dense(self) -> jax.Array:
        """The (in, out) array that the weight stands for."""

    def to_tensors(self) -> dict[str, np.ndarray]:
        """{suffix: array} as it stands in a Hugging Face style checkpoint under the layer's name."""

    def from_tensors(self, read: Read) -> "Weight":
        """The same kind of weight with its arrays read from a checkpoint; ``self`` may be abstract."""


def is_typed(w: Any) -> bool:
    """True for a typed weight, False for an array (or the shape of one)."""
    return hasattr(w, "to_tensors") and hasattr(w, "matmul")


def innermost(w: Any) -> Any:
    """What low-rank updates, masks and the like stand upon: the weight without a ``base`` of its own."""
    return innermost(w.base) if hasattr(w, "base") else w


def rebase(w: Any, f: Callable[[Any], Any]) -> Any:
    """``w`` with ``f(innermost(w))`` in the place of its innermost weight."""
    return dataclasses.replace(w, base=rebase(w.base, f)) if hasattr(w, "base") else f(w)


def matmul(x: jax.Array, w: Any) -> jax.Array:
    """``x (…, in) @ w (in, out) -> (…, out)`` in the dtype of ``x``, for an array or a typed weight."""
    if is_typed(w):
        return w.matmul(x)
    w = w.astype(x.dtype)
    if x.ndim > 2 and jax.default_backend() == "cpu":
        # The gradient by w contracts over all leading axes. XLA's CPU backend writes a transposed copy unless they are
        # one axis; elsewhere they stay apart, since a merged axis could not be cut along the length.
        return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])
    return x @ w


def dense(w: Any) -> jax.Array:
    """The plain (in, out) array that ``w`` stands for."""
    return w.dense() if is_typed(w) else jnp.asarray(w)


def take(table: Any, ids: jax.Array) -> jax.Array:
    """Rows of a table (rows, width), an array or a typed weight: ids (…) -> (…, width). Ids beyond it are clipped."""
    if hasattr(table, "take") and is_typed(table):
        return table.take(ids)
    return jnp.take(dense(table), ids, axis=0, mode="clip")


def to_tensors(w: Any) -> dict[str, np.ndarray]:
    """Checkpoint tensors of a kernel: a plain (in, out) array is PyTorch's ``weight`` (out, in)."""
    return w.to_tensors() if is_typed(w) else {"weight": np.asarray(w).T}


def from_tensors(w: Any, read: Read) -> Any:
    """The inverse of :func:`to_tensors`; ``w`` tells the kind and may be abstract."""
    if is_typed(w):
        return w.from_tensors(read)
    weight = read("weight")
    return weight.transpose(*range(2, weight.ndim), 1, 0)  # of a convolution: (out, in, …) -> (…, in, out)
