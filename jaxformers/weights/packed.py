"""Weights of 2, 3, 4 or 8 bits in the word layout of GPTQ checkpoints, multiplied as they are or unpacked by the layer.

    W[i, o] = scales[g_idx[i], o] · (code[i, o] - zero[g_idx[i], o])

The arrays are those of a GPTQ file (layout: GPTQ, arXiv 2210.17323, and the checkpoints of AutoGPTQ and GPTQModel),
with zeros always in their version 2 meaning: the zero itself, where version 1 files store zero - 1. A product unpacks
one layer at a time in plain JAX, except where a kernel is faster (:func:`jaxformers.kernels.lowbit.choose`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.kernels import lowbit
from jaxformers.kernels.shape import Shape
from jaxformers.weights import words
from jaxformers.weights.base import Read

Array = np.ndarray | jax.Array
BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A packed (in, out) kernel with G = ceil(in / group_size) groups of inputs; a typed weight.

    ``qweight`` int32 (in · bits / 32, out); ``qzeros`` int32 (G, out · bits / 32), both packed as
    :mod:`jaxformers.weights.words` says; ``scales`` float (G, out); ``g_idx`` int32 (in,), the group of each input, or
    None for the trivial ``arange(in) // group_size``. ``group_size`` -1: one group. ``checkpoint_format`` is what
    :meth:`to_tensors` writes. ``dense()`` has the dtype of the scales, but float32 where they are float16, which is how
    files store them rather than what anyone computes in. Leaves may carry leading axes (stacked layers).
    """

    qweight: jax.Array
    qzeros: jax.Array
    scales: jax.Array
    g_idx: jax.Array | None
    constants: ClassVar = ("scales",)
    bits: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True}, default=-1)
    checkpoint_format: str = dataclasses.field(metadata={"static": True}, default="gptq")

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, d_out = self.qweight.shape
        return (*lead, rows * 32 // self.bits, d_out)

    @property
    def dtype(self) -> Any:
        return np.dtype(np.float32) if self.scales.dtype == np.float16 else self.scales.dtype

    def codes(self) -> jax.Array:
        """uint8 (in, out)."""
        return words.unpack(self.qweight, self.bits, self.shape[-2])

    def zeros(self) -> jax.Array:
        """uint8 (G, out): the code whose value is 0."""
        return words.unpack(self.qzeros, self.bits, self.shape[-1], axis=-1)

    def dense(self) -> jax.Array:
        return _dense(self, self.dtype)

    def matmul(self, x: jax.Array) -> jax.Array:
        return _matmul(self, x)

    def to_tensors(self) -> dict[str, np.ndarray]:
        return to_gptq(self, self.checkpoint_format)

    def from_tensors(self, read: Read) -> "PackedWeight":
        tensors = {name: read(name) for name in ("qweight", "qzeros", "scales", "g_idx")}
        found = from_gptq(tensors, self.bits, self.group_size, self.checkpoint_format)
        if found.shape != self.shape:
            raise ValueError(f"qweight: expected a packed weight of shape {self.shape}, found {found.shape}")
        return dataclasses.replace(found, scales=found.scales.astype(self.scales.dtype))


def _dense(w: PackedWeight, dtype: Any) -> jax.Array:
    """(…, in, out) in `dtype`; the arithmetic is in float32."""
    *lead, d_in, d_out = w.shape
    groups = w.scales.shape[-2]
    codes, zeros, scales = w.codes(), w.zeros().astype(jnp.float32), w.scales.astype(jnp.float32)
    if w.g_idx is None and d_in % groups == 0 and w.group_size in (-1, d_in // groups):
        codes = codes.reshape(*lead, groups, d_in // groups, d_out).astype(jnp.float32)
        values = scales[..., None, :] * (codes - zeros[..., None, :])  # no gather
        return values.reshape(*lead, d_in, d_out).astype(dtype)
    g_idx = jnp.arange(d_in) // w.group_size if w.g_idx is None else w.g_idx
    g_idx = jnp.broadcast_to(g_idx, (*lead, d_in))
    rows = lambda table, index: jnp.take(table, index, axis=0)  # noqa: E731
    for _ in lead:
        rows = jax.vmap(rows)
    zeros, scales = rows(zeros, g_idx), rows(scales, g_idx)
    return (scales * (codes.astype(jnp.float32) - zeros)).astype(dtype)


def _matmul(w: PackedWeight, x: jax.Array) -> jax.Array:
    if w.qweight.ndim == 2:
        m, (d_in, d_out), groups = math.prod(x.shape[:-1]), w.shape, w.scales.shape[-2]
        group = d_in if groups == 1 else w.group_size
        shape = Shape(m, d_in, d_out, w.bits, group, groups, act_order=w.g_idx is not None)
        if lowbit.choose(shape, x.dtype) != "xla":
            options = {"bits": w.bits, "group_size": w.group_size}
            return lowbit.matmul(x, w.qweight, w.qzeros, w.scales, w.g_idx, **options)
    return _dense_matmul(w, x)


# Rematerialised: what waits for the backward pass is the packed weight, never the dense kernel.
@jax.checkpoint
def _dense_matmul(w: PackedWeight, x: jax.Array) -> jax.Array:
    return x @ _dense(w, x.dtype)


def trivial_groups(g_idx: np.ndarray, group_size: int) -> bool:
    """Does `g_idx` (in,) say nothing beyond arange(in) // group_size?"""
    d_in = g_idx.shape[-1]
    return bool(np.array_equal(g_idx, np.arange(d_in) // (d_in if group_size == -1 else group_size)))


def n_groups(d_in: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-d_in // group_size)


def pack_codes(
    codes: Array,
    zeros: Array,
    scales: Array,
    g_idx: Array,
    *,
    bits: int,
    group_size: int = -1,
    checkpoint_format: str = "gptq",
) -> PackedWeight:
    """Codes uint8 (in, out), zeros (G, out), scales (G, out) and groups (in,) as a :class:`PackedWeight`.

    Raises ValueError when `bits` is unknown, when the number of inputs is not a multiple of 32 (the layout has no such
    files), or when the shapes disagree.
    """
    g_idx = np.asarray(g_idx, np.int32)
    if bits not in BITS:
        raise ValueError(f"bits={bits}: must be one of {BITS}")
    if codes.shape[0] % 32:
        raise ValueError(f"codes: {codes.shape[0]} inputs are not a multiple of 32, which the packed layout needs")
    expected = (n_groups(codes.shape[0], group_size), codes.shape[1])
    if zeros.shape != expected or scales.shape != expected or g_idx.shape != codes.shape[:1]:
        raise ValueError(f"zeros {zeros.shape} and scales {scales.shape}: expected {expected}, g_idx {g_idx.shape}")
    return PackedWeight(
        jnp.asarray(words.pack(codes, bits)),
        jnp.asarray(words.pack(zeros.astype(np.uint8), bits, axis=-1)),
        jnp.asarray(scales),
        None if trivial_groups(g_idx, group_size) else jnp.asarray(g_idx),
        bits,
        group_size,
        checkpoint_format,
    )


def from_gptq(
    tensors: Mapping[str, np.ndarray], bits: int, group_size: int = -1, checkpoint_format: str = "gptq"
) -> PackedWeight:
    """The weight held by a layer's tensors in a GPTQ file: ``qweight``, ``qzeros``, ``scales`` and perhaps ``g_idx``.

    ``checkpoint_format`` "gptq" (version 1, zeros stored less one) or "gptq_v2". Arrays stay NumPy where they were.
    Raises ValueError naming the tensor that is missing, or whose dtype, shape or range does not fit ``bits`` and
    ``group_size``.
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits}: must be one of {BITS}")
    if checkpoint_format not in FORMATS:
        raise ValueError(f"checkpoint_format={checkpoint_format!r}: must be one of {FORMATS}")
    missing = [name for name in ("qweight", "qzeros", "scales") if name not in tensors]
    if missing:
        raise ValueError(f"{missing[0]}: missing from the layer's tensors {sorted(tensors)}")
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    for name, words_ in (("qweight", qweight), ("qzeros", qzeros)):
        if words_.dtype != np.int32 or words_.ndim != 2:
            raise ValueError(f"{name}: expected a matrix of int32 words, found {words_.dtype} {words_.shape}")
    if qweight.shape[0] * 32 % bits or (bits == 3 and qweight.shape[0] % 3):
        raise ValueError(f"qweight: {qweight.shape[0]} rows of words cannot hold {bits}-bit codes")
    d_in, d_out = qweight.shape[0] * 32 // bits, qweight.shape[1]
    groups = n_groups(d_in, group_size)
    for name, found, expected in (
        ("qzeros", qzeros.shape, (groups, words.n_words(d_out, bits))),
        ("scales", scales.shape, (groups, d_out)),
    ):
        if found != expected:
            raise ValueError(
                f"{name}: expected {expected} for {d_in} inputs, {d_out} outputs, {bits} bits and group_size "
                f"{group_size}, found {found}"
            )
    if not jnp.issubdtype(scales.dtype, jnp.floating):
        raise ValueError(f"scales: expected floating point, found {scales.dtype}")
    g_idx = np.asarray(tensors["g_idx"]) if tensors.get("g_idx") is not None else None
    if g_idx is not None:
        if not np.issubdtype(g_idx.dtype, np.integer):
            raise ValueError(f"g_idx: expected whole numbers, found {g_idx.dtype}")
        if g_idx.shape != (d_in,):
            raise ValueError(f"g_idx: expected shape {(d_in,)}, found {g_idx.shape}")
        if g_idx.min() < 0 or g_idx.max() >= groups:
            raise ValueError(f"g_idx: expected values from 0 to {groups - 1}, found {g_idx.min()} to {g_idx.max()}")
        g_idx = None if trivial_groups(g_idx, group_size) else g_idx.astype(np.int32)
    if checkpoint_format == "gptq":
        qzeros = words.shift_zeros(qzeros, bits, 1)
    return PackedWeight(qweight, qzeros, scales, g_idx, bits, group_size, checkpoint_format)


def to_gptq(weight: PackedWeight, checkpoint_format: str = "gptq") -> dict[str, np.ndarray]:
    """The layer's tensors as a GPTQ file holds them: ``qweight``, ``qzeros``, ``scales``, ``g_idx``.

    Scales are written in float16, the format's type, when that is exact, and in their own dtype otherwise. Zeros of
    version 1 wrap within their field, so an asymmetric zero of 0 survives. Raises ValueError when the number of outputs
    is not a multiple of 32 / bits (of 32 at 3 bits), which the layout cannot express, or for an unknown format.
    """
    if checkpoint_format not in FORMATS:
        raise ValueError(f"checkpoint_format={checkpoint_format!r}: must be one of {FORMATS}")
    d_in, d_out = weight.shape
    if words.n_words(d_out, weight.bits) * 32 != d_out * weight.bits:
        raise ValueError(f"weight: {d_out} outputs do not fill whole words of {weight.bits}-bit codes")
    qzeros, scales = np.asarray(weight.qzeros), np.asarray(weight.scales)
    half = scales.astype(np.float16)
    g_idx = np.arange(d_in) // (d_in if weight.group_size == -1 else weight.group_size)
    return {
        "qweight": np.asarray(weight.qweight),
        "qzeros": words.shift_zeros(qzeros, weight.bits, -1) if checkpoint_format == "gptq" else qzeros,
        "scales": half if np.array_equal(half.astype(scales.dtype), scales) else scales,
        "g_idx": (g_idx if weight.g_idx is None else np.asarray(weight.g_idx)).astype(np.int32),
    }


def from_official_3bit(qweight: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> PackedWeight:
    """A layer of the official repository's own 3-bit files: one row grid, `zeros` (out, 1) = zero · scale, in float.

    Raises ValueError when a zero is no integer multiple of its scale within the range of the codes.
    """
    scales, zeros = np.asarray(scales, np.float32).reshape(1, -1), np.asarray(zeros, np.float32).reshape(1, -1)
    codes = zeros / scales
    if np.any(np.abs(codes - np.round(codes)) > 1e-3) or np.any(np.round(codes) % 8 != np.round(codes)):
        raise ValueError("zeros: expected zero · scale with an integer zero from 0 to 7")
    qzeros = words.pack(np.round(codes).astype(np.uint8), 3, axis=-1)
    return PackedWeight(np.asarray(qweight), qzeros, scales, None, 3)
