"""A weight with entries fixed at zero."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxformers.weights import base as weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masked:
    """``dense() = base · mask``: masked entries stay exactly zero whatever an optimiser does to ``base``.

    ``base`` (in, out) is an array or a typed weight; ``mask`` (in, out) is bool, True = kept. No gradient reaches a
    masked entry.
    """

    base: Any
    mask: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def dense(self) -> jax.Array:
        base = weights.dense(self.base)
        return base * self.mask.astype(base.dtype)

    def matmul(self, x: jax.Array) -> jax.Array:
        return weights.matmul(x, self.dense())

    def to_tensors(self) -> dict[str, np.ndarray]:
        return {**weights.to_tensors(self.base), "weight_mask": np.asarray(self.mask).T}

    def from_tensors(self, read: weights.Read) -> "Masked":
        return Masked(weights.from_tensors(self.base, read), read("weight_mask").T)
