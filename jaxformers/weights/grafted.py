"""A weight into which another one is grafted: ``W + K ⊙ W_f`` with a learnable K (FuseGPT, arXiv 2411.14507)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.weights import base as weights
from jaxformers.weights.lowrank import LowRank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grafted:
    """``base`` plus ``(d c) ⊙ donor``, elementwise; without ``d``, plus ``c ⊙ donor``.

    ``base`` (in, out) is an array or a typed weight, a :class:`Grafted` too: each graft has a donor of its own.
    ``donor`` (in, out) stays as it is; ``d`` (in, r) and ``c`` (r, out) are trained. Without ``d``, ``c`` is whatever
    spreads to the donor's shape: (in, out), or (1, out), one number per output. A bias (out,) is grafted likewise.

    The sum is formed in float32 (wider where its parts are) and rounded to the dtype of ``base`` once, however many
    grafts and low-rank updates lie below.
    """

    base: Any
    donor: jax.Array
    c: jax.Array
    d: jax.Array | None = None
    constants: ClassVar = ("donor",)
    updates: ClassVar = ("c", "d")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def dense(self) -> jax.Array:
        return _wide_sum(self).astype(self.dtype)

    def matmul(self, x: jax.Array) -> jax.Array:
        return weights.matmul(x, self.dense())

    def to_tensors(self) -> dict[str, np.ndarray]:
        own = {"donor": self.donor, "c": self.c} | ({} if self.d is None else {"d": self.d})
        named = {f"graft_{_depth(self)}.{name}": np.asarray(array).T for name, array in own.items()}
        return {**weights.to_tensors(self.base), **named}

    def from_tensors(self, read: weights.Read) -> "Grafted":
        own = {name: read(f"graft_{_depth(self)}.{name}").T for name in ("donor", "c", "d")[: 3 - (self.d is None)]}
        return Grafted(weights.from_tensors(self.base, read), **own)


def _wide_sum(w: Any) -> jax.Array:
    """W and all that was added to it, before any rounding."""
    if isinstance(w, Grafted):
        coefficient = w.c if w.d is None else jnp.matmul(w.d, w.c, precision="highest")
        return _wide_sum(w.base) + coefficient * w.donor
    if isinstance(w, LowRank):
        return _wide_sum(w.base) + w.scale * jnp.matmul(w.a, w.b, precision="highest")
    array = weights.dense(w)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _depth(w: Any) -> int:
    """Which graft this is, counted from the base."""
    return 1 + _depth(w.base) if isinstance(w, Grafted) else 0
