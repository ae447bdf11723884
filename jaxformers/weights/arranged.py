"""Packed weights in the layout that a GPU multiplies fastest: made once from GPTQ's words, and given back exactly.

:func:`arrange` is for models that are used rather than changed; ``jaxformers.load`` calls it on NVIDIA's Hopper GPUs.
Layout and kernels: :mod:`jaxformers.kernels.planes`. Elsewhere, and over several devices, XLA unpacks it as it does
:class:`jaxformers.weights.PackedWeight`.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import surgery
from jaxformers.kernels import planes
from jaxformers.kernels.planes_layout import Planes, codes_of, plane_of, scales_and_zeros
from jaxformers.kernels.planes_layout import arrange as arrange_codes
from jaxformers.weights import words
from jaxformers.weights.base import Read, innermost, rebase
from jaxformers.weights.packed import PackedWeight, trivial_groups
from jaxformers.weights.ternary import TernaryWeight

HALVES = (np.dtype(np.float16), np.dtype(jnp.bfloat16))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ArrangedWeight:
    """A packed or ternary (in, out) kernel whose codes lie in planes; a typed weight.

    ``cells``, ``levels``, ``negative``: as :class:`jaxformers.kernels.planes_layout.Planes` has them. ``order`` int32
    (in,): the inputs group by group, or None where they lie so. ``scale_dtype``: what the scales were stored in, a
    16-bit type. Leaves may carry leading axes (stacked layers).
    """

    cells: jax.Array
    levels: jax.Array
    negative: jax.Array | None
    order: jax.Array | None
    constants: ClassVar = ("negative",)
    d_in: int = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True}, default=-1)
    scale_dtype: str = dataclasses.field(metadata={"static": True}, default="float16")
    checkpoint_format: str = dataclasses.field(metadata={"static": True}, default="gptq")

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, _, d_out = self.levels.shape
        return (*lead, self.d_in, d_out)

    @property
    def dtype(self) -> Any:
        return np.dtype(np.float32) if self.scale_dtype == "float16" else jnp.dtype(self.scale_dtype)

    def matmul(self, x: jax.Array) -> jax.Array:
        if self.levels.ndim > 2:
            return x @ self.dense().astype(x.dtype)
        x = x if self.order is None else jnp.take(x, self.order, axis=-1)
        arrays = Planes(self.cells, self.levels, self.negative)
        return planes.matmul(x, arrays, bits=self.bits, k=self.d_in, group_size=self.group_size)

    def dense(self) -> jax.Array:
        return _over_leading(_dense, self)

    def packed(self) -> PackedWeight | TernaryWeight:
        """The weight that this one was made of, bit for bit. Raises ValueError for stacked layers."""
        if self.levels.ndim > 2:
            raise ValueError(f"weight: expected one layer, found the stack {self.shape}")
        return _packed(self)

    def to_tensors(self) -> dict[str, np.ndarray]:
        return self.packed().to_tensors()

    def from_tensors(self, read: Read) -> "ArrangedWeight":
        kind = jax.eval_shape(_packed, self)
        found = arranged(kind.from_tensors(read))
        if not isinstance(found, ArrangedWeight):
            raise ValueError(f"weight: the tensors read cannot lie in planes as {self.shape} was; load the model anew")
        return found


def _over_leading(f: Any, w: ArrangedWeight) -> jax.Array:
    for _ in w.levels.shape[:-2]:
        f = jax.vmap(f)
    return f(w)


def _dense(w: ArrangedWeight) -> jax.Array:
    arrays = Planes(w.cells, w.levels, w.negative)
    found = planes.dense(arrays, planes.shape_of(arrays, 0, w.bits, w.d_in, w.group_size), w.dtype)
    return found if w.order is None else jnp.zeros_like(found).at[w.order].set(found, unique_indices=True)


def _packed(w: ArrangedWeight) -> PackedWeight | TernaryWeight:
    groups = w.levels.shape[0]
    group = w.d_in if groups == 1 else w.group_size
    codes = codes_of(Planes(w.cells, w.levels), w.bits, plane_of(group, groups, w.bits), w.d_in)
    g_idx = None
    if w.order is not None:
        codes = jnp.zeros_like(codes).at[w.order].set(codes, unique_indices=True)
        g_idx = jnp.zeros(w.d_in, jnp.int32).at[w.order].set(jnp.arange(w.d_in, dtype=jnp.int32) // group)
    scales, zeros = scales_and_zeros(w.levels)
    scales, packed = scales.astype(w.scale_dtype), words.pack(codes, w.bits)
    if w.negative is not None:
        return TernaryWeight(packed, scales, w.negative.astype(w.scale_dtype), g_idx, w.group_size)
    qzeros = words.pack(zeros.astype(jnp.uint8), w.bits, axis=-1)
    return PackedWeight(packed, qzeros, scales, g_idx, w.bits, w.group_size, w.checkpoint_format)


def arranged(w: PackedWeight | TernaryWeight) -> ArrangedWeight | PackedWeight | TernaryWeight:
    """``w`` in planes, or as it is where it cannot lie so.

    That needs one layer, scales of 16 bits, and groups of a multiple of 32 inputs (or one group of all).
    """
    ternary = isinstance(w, TernaryWeight)
    bits, scales, tables = (2, w.positive, (w.positive, w.negative)) if ternary else (w.bits, w.scales, (w.scales,))
    groups, d_in = scales.shape[-2], w.shape[-2]
    group = d_in if groups == 1 else w.group_size
    order = None
    if w.g_idx is not None and groups > 1:
        order = np.argsort(np.asarray(w.g_idx), axis=-1, kind="stable")
        if order.ndim != 1 or not trivial_groups(np.asarray(w.g_idx)[order], group):
            return w
    if scales.ndim != 2 or any(t.dtype not in HALVES for t in tables) or plane_of(group, groups, bits) == 0:
        return w
    static = {"group_size": w.group_size, "scale_dtype": scales.dtype.name}
    if not ternary:
        static["checkpoint_format"] = w.checkpoint_format
    order = None if order is None else jnp.asarray(order, jnp.int32)
    arrays = _arrange(w, order, bits=bits, plane=plane_of(group, groups, bits))
    return ArrangedWeight(*arrays, order, d_in=d_in, bits=bits, **static)


@functools.partial(jax.jit, static_argnames=("bits", "plane"))
def _arrange(w: PackedWeight | TernaryWeight, order: jax.Array | None, *, bits: int, plane: int) -> Planes:
    ternary = isinstance(w, TernaryWeight)
    codes = words.unpack(jnp.asarray(w.codes if ternary else w.qweight), bits, w.shape[-2])
    codes = codes if order is None else codes[order]
    scales, zeros = (w.positive, w.negative) if ternary else (w.scales, w.zeros())
    return arrange_codes(codes, scales, zeros, bits, plane, ternary)


def arrange(model: nnx.Module) -> nnx.Module:
    """A copy of ``model`` whose packed and ternary kernels lie in planes, those that can (:func:`arranged`).

    Kernels under low-rank updates and masks too. ``jaxformers.save`` writes such a model as it would have written
    ``model``.
    """
    return _replaced(surgery.copy(model), PackedWeight | TernaryWeight, arranged)


def restored(model: nnx.Module) -> nnx.Module:
    """The inverse of :func:`arrange`; ``model`` itself where nothing was arranged."""
    kernels = [linear.kernel.get_value() for _, linear in surgery.with_kernels(model)]
    if not any(isinstance(innermost(kernel), ArrangedWeight) for kernel in kernels):
        return model
    return _replaced(surgery.copy(model), ArrangedWeight, ArrangedWeight.packed)


def _replaced(model: nnx.Module, kind: Any, f: Any) -> nnx.Module:
    for _, linear in surgery.with_kernels(model):
        kernel = linear.kernel.get_value()
        if isinstance(innermost(kernel), kind):
            linear.kernel.set_value(rebase(kernel, f))
    return model
