"""Ternary weights: each is 0, the positive or the negative level of its output (and group), in two bits.

Symmetric ternary weights need no type of their own (2-bit codes around a zero of 1 hold them); this one is for levels
that differ. Source: the ternary grid of GPTQ, arXiv 2210.17323.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import surgery
from jaxformers.kernels import lowbit
from jaxformers.kernels.shape import Shape
from jaxformers.weights import words
from jaxformers.weights.base import Read
from jaxformers.weights.packed import n_groups, trivial_groups


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TernaryWeight:
    """A ternary (in, out) kernel with G groups of inputs; a typed weight.

    ``codes`` int32 (in / 16, out): 2-bit codes packed along the inputs, 0 for zero, 1 for ``positive``, 2 for
    ``negative`` (both (G, out), float). ``g_idx`` int32 (in,), or None for ``arange(in) // group_size``. Leaves may
    carry leading axes (stacked layers).
    """

    codes: jax.Array
    positive: jax.Array
    negative: jax.Array
    g_idx: jax.Array | None
    constants: ClassVar = ("positive", "negative")
    group_size: int = dataclasses.field(metadata={"static": True}, default=-1)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, d_out = self.codes.shape
        return (*lead, rows * 16, d_out)

    @property
    def dtype(self) -> Any:
        return np.dtype(np.float32) if self.positive.dtype == np.float16 else self.positive.dtype

    def dense(self) -> jax.Array:
        return _dense(self, self.dtype)

    def matmul(self, x: jax.Array) -> jax.Array:
        return _matmul(self, x)

    def to_tensors(self) -> dict[str, np.ndarray]:
        names = ("codes", "positive", "negative", "g_idx")
        return {n: np.asarray(getattr(self, n)) for n in names if getattr(self, n) is not None}

    def from_tensors(self, read: Read) -> "TernaryWeight":
        names = ("codes", "positive", "negative", "g_idx")
        found = TernaryWeight.from_file({name: read(name) for name in names}, self.group_size)
        if found.shape != self.shape:
            raise ValueError(f"codes: expected a ternary weight of shape {self.shape}, found {found.shape}")
        return found

    @staticmethod
    def from_file(tensors: Mapping[str, np.ndarray | None], group_size: int) -> "TernaryWeight":
        """The weight whose :meth:`to_tensors` gave ``tensors``. Raises ValueError for shapes that do not fit."""
        codes, positive, negative = (tensors[name] for name in ("codes", "positive", "negative"))
        if codes.dtype != np.int32 or codes.ndim != 2:
            raise ValueError(f"codes: expected a matrix of int32 words, found {codes.dtype} {codes.shape}")
        expected = (n_groups(codes.shape[0] * 16, group_size), codes.shape[1])
        if positive.shape != expected or negative.shape != expected:
            raise ValueError(f"positive {positive.shape}, negative {negative.shape}: expected {expected}")
        return TernaryWeight(codes, positive, negative, tensors.get("g_idx"), group_size)

    @staticmethod
    def from_codes(
        codes: jax.Array, positive: jax.Array, negative: jax.Array, g_idx: np.ndarray, group_size: int
    ) -> "TernaryWeight":
        """Codes uint8 (in, out), levels (G, out), groups (in,). Raises ValueError when in is no multiple of 16."""
        if codes.shape[0] % 16:
            raise ValueError(f"codes: {codes.shape[0]} inputs are not a multiple of 16, which the packed words need")
        own = None if trivial_groups(np.asarray(g_idx), group_size) else jnp.asarray(g_idx, jnp.int32)
        return TernaryWeight(words.pack(codes, 2), positive, negative, own, group_size)


def _dense(w: TernaryWeight, dtype: Any) -> jax.Array:
    *lead, d_in, _ = w.shape
    codes = words.unpack(w.codes, 2, d_in)
    g_idx = jnp.arange(d_in) // (d_in if w.group_size == -1 else w.group_size) if w.g_idx is None else w.g_idx
    rows = lambda table, index: jnp.take(table, index, axis=0)  # noqa: E731
    for _ in lead:
        rows = jax.vmap(rows)
    g_idx = jnp.broadcast_to(g_idx, (*lead, d_in))
    positive, negative = rows(w.positive.astype(dtype), g_idx), rows(w.negative.astype(dtype), g_idx)
    return jnp.where(codes == 1, positive, jnp.where(codes == 2, negative, 0)).astype(dtype)


def _matmul(w: TernaryWeight, x: jax.Array) -> jax.Array:
    if w.codes.ndim == 2:
        m, (d_in, d_out), groups = math.prod(x.shape[:-1]), w.shape, w.positive.shape[-2]
        group = d_in if groups == 1 else w.group_size
        shape = Shape(m, d_in, d_out, 2, group, groups, ternary=True, act_order=w.g_idx is not None)
        if lowbit.choose(shape, x.dtype) != "xla":
            return lowbit.ternary_matmul(x, w.codes, w.positive, w.negative, w.g_idx, group_size=w.group_size)
    return _dense_matmul(w, x)


# Rematerialised: what waits for the backward pass is the packed weight, never the dense kernel.
@jax.checkpoint
def _dense_matmul(w: TernaryWeight, x: jax.Array) -> jax.Array:
    return x @ _dense(w, x.dtype)


def abstract_ternary(model: nnx.Module, *, targets: list[str], sorted_groups: list[str], group_size: int) -> nnx.Module:
    """``model`` with abstract ternary kernels at ``targets``, for a checkpoint to fill (with g_idx: ``sorted_groups``).

    Recorded in ``config.json`` by GPTQ with ``method="ternary"`` and replayed when such a checkpoint is loaded.
    """
    model = surgery.copy(model)
    for path, linear in surgery.find_linears(model, targets):
        d_in, d_out = linear.kernel.get_value().shape
        level = jax.ShapeDtypeStruct((n_groups(d_in, group_size), d_out), np.float16)
        g_idx = jax.ShapeDtypeStruct((d_in,), np.int32) if path in sorted_groups else None
        codes = jax.ShapeDtypeStruct((d_in // 16, d_out), np.int32)
        linear.kernel.set_value(TernaryWeight(codes, level, level, g_idx, group_size))
    return surgery.record(
        model,
        "jaxformers.weights.ternary:abstract_ternary",
        targets=targets,
        sorted_groups=sorted_groups,
        group_size=group_size,
    )
