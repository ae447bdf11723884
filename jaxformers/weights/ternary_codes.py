"""Symmetric ternary weights in two bits: −α, 0 and α, with one α for the whole matrix or for each of its rows.

Beside :class:`jaxformers.weights.ternary.TernaryWeight`, by which it multiplies, it stores a scale once instead of two
levels per output, takes any number of inputs, and may be an embedding table that is looked up.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformers.weights import words
from jaxformers.weights.base import Read
from jaxformers.weights.ternary import TernaryWeight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TernaryCodes:
    """A kernel (in, out), or with ``table`` an embedding table (rows, width).

    ``codes`` int32: 16 codes a word, 0 for zero, 1 for ``scale``, 2 for ``-scale``; packed along the inputs of a kernel
    (ceil(in / 16), out), along the width of a table (rows, ceil(width / 16)). ``scale`` float (1,), or one per output
    or row. ``packed``: how many codes count along the packed axis, the rest of the last word is zero. Leaves may carry
    leading axes (stacked layers).
    """

    codes: jax.Array
    scale: jax.Array
    constants: ClassVar = ("scale",)
    packed: int = dataclasses.field(metadata={"static": True})
    table: bool = dataclasses.field(metadata={"static": True}, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, first, last = self.codes.shape
        return (*lead, first, self.packed) if self.table else (*lead, self.packed, last)

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    @staticmethod
    def from_dense(w: Float[Array, "*lead a b"], *, table: bool, shared: bool) -> "TernaryCodes":
        """The codes of a matrix whose groups hold −α, 0 and α only: all of it (``shared``), or each row of a table and
        each output of a kernel."""
        axes = (-2, -1) if shared else ((-1,) if table else (-2,))
        scale = jnp.abs(w).max(axes, keepdims=True)
        codes = jnp.where(w > 0, 1, jnp.where(w < 0, 2, 0)).astype(jnp.uint8)
        axis = -1 if table else -2
        return TernaryCodes(words.pack(codes, 2, axis), scale.reshape(*w.shape[:-2], -1), w.shape[axis], table)

    def dense(self) -> jax.Array:
        by_output = self._turned().dense()[..., : self.packed, :]
        return jnp.swapaxes(by_output, -1, -2) if self.table else by_output

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        if self.table:
            return x @ self.dense().astype(x.dtype)
        missing = -self.packed % 16
        if missing:  # meets codes of 0
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
        return self._turned().matmul(x)

    def take(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch width"]:
        """Rows of a table."""
        rows = words.unpack(jnp.take(self.codes, ids, axis=0, mode="clip"), 2, self.packed, axis=-1)
        scale = jnp.broadcast_to(self.scale, self.codes.shape[:1])
        scale = jnp.take(scale, ids, mode="clip")[..., None]
        return jnp.where(rows == 1, scale, jnp.where(rows == 2, -scale, 0))

    def to_tensors(self) -> dict[str, np.ndarray]:
        return {"codes": np.asarray(self.codes), "scale": np.asarray(self.scale)}

    def from_tensors(self, read: Read) -> "TernaryCodes":
        codes, scale = read("codes"), read("scale")
        if codes.dtype != np.int32 or codes.shape != self.codes.shape:
            raise ValueError(f"codes: expected int32 {self.codes.shape}, found {codes.dtype} {codes.shape}")
        if scale.shape != self.scale.shape or not jnp.issubdtype(scale.dtype, jnp.floating):
            raise ValueError(f"scale: expected floats of shape {self.scale.shape}, found {scale.dtype} {scale.shape}")
        if np.any(codes & (codes >> 1) & 0x55555555):
            raise ValueError("codes: some are 3; a ternary weight has 0, 1 and 2")
        return dataclasses.replace(self, codes=codes, scale=scale)

    def _turned(self) -> TernaryWeight:
        """As a kernel of multiples of 16 inputs: that of the transpose for a table."""
        codes = jnp.swapaxes(self.codes, -1, -2) if self.table else self.codes
        level = jnp.broadcast_to(self.scale[..., None, :], (*codes.shape[:-2], 1, codes.shape[-1]))
        return TernaryWeight(codes, level, -level, None)
