"""Products with packed low-bit weights: x (m, k) times an (k, n) matrix of 2, 3, 4 or 8 bits, or of three values.

    W[i, o] = scales[g_idx[i], o] · (code[i, o] - zero[g_idx[i], o])

in the words of GPTQ checkpoints (arXiv 2210.17323; layout in :mod:`jaxformers.kernels.codes`), as they lie on disk.
:func:`dequantise` is the definition; a kernel reads k·n·bits/8 bytes of words, n·(2 + bits/8) bytes for each group of
inputs (float16 scales, packed zeros) and (m·k + m·n) activations, and does 2·m·k·n FLOPs and one to three integer
operations a weight. With few rows the bytes bound what is possible (at 4 bits in groups of 128, 0.26 of bfloat16's),
with many the FLOPs, which are the same, and unpacking comes on top.

On a GPU the kernel here writes the matrix out in the dtype of x, and XLA multiplies: a third of the time of XLA's own
unpacking and product. With few rows that is slower than the bfloat16 matrix where it fits; products that are faster
want another layout, made once, :mod:`jaxformers.kernels.planes`. TPUs have a kernel that multiplies packed words.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxformers.kernels import lowbit_gpu, lowbit_tpu, tiles
from jaxformers.kernels.codes import PER_WORD, WORDS, codes
from jaxformers.kernels.shape import Shape

Implementation = Literal["xla", "gpu", "tpu"]


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """Words int32 (rows of words, n) -> codes int32 (rows of words · 32 / bits, n)."""
    count = WORDS[bits]
    found = codes([words[i::count] for i in range(count)], bits)
    return jnp.stack(found, axis=1).reshape(-1, words.shape[1])


def unpack_zeros(qzeros: jax.Array, bits: int, n: int) -> jax.Array:
    """Words int32 (G, ceil(n · bits / 32)), packed along n -> zeros int32 (G, n)."""
    return unpack(qzeros.T, bits).T[:, :n]


def dequantise(qweight, qzeros, scales, g_idx=None, *, bits: int, group_size: int = -1, dtype=jnp.float32) -> jax.Array:
    """The (k, n) matrix in `dtype`; the arithmetic is in float32. The definition that every kernel is held to.

    qweight int32 (k · bits / 32, n); qzeros int32 (G, ceil(n · bits / 32)), packed along n, zeros as they are (version
    2 of the format); scales float (G, n); g_idx int32 (k,), None for `arange(k) // group_size`; G = ceil(k /
    group_size), 1 for group_size -1.
    """
    rows = unpack(qweight, bits)
    k, n = rows.shape
    group = jnp.arange(k) // (k if group_size == -1 else group_size) if g_idx is None else g_idx
    scale, zero = scales.astype(jnp.float32)[group], unpack_zeros(qzeros, bits, n)[group]
    return (scale * (rows - zero).astype(jnp.float32)).astype(dtype)


def ternary_dequantise(words, positive, negative, g_idx=None, *, group_size: int = -1, dtype=jnp.float32) -> jax.Array:
    """The (k, n) matrix of 2-bit codes in words int32 (k / 16, n): 0, `positive` (1) or `negative` (2), both (G, n)."""
    rows = unpack(words, 2)
    k = rows.shape[0]
    group = jnp.arange(k) // (k if group_size == -1 else group_size) if g_idx is None else g_idx
    one, two = positive.astype(dtype)[group], negative.astype(dtype)[group]
    return jnp.where(rows == 1, one, jnp.where(rows == 2, two, 0)).astype(dtype)


def platform() -> str:
    """The platform: "cpu", "gpu" (NVIDIA's Hopper) or "tpu"; "other" where no kernel may be used.

    Programs that XLA cuts over several devices have none (:func:`jaxformers.kernels.tiles.partitioned`). The tiles of
    the GPU kernels were measured on an H100 and may not fit into the shared memory of other kinds.
    """
    where = tiles.platform()
    if where == "cpu":
        return where
    return "other" if tiles.partitioned() or (where == "gpu" and not tiles.hopper()) else where


def choose(shape: Shape, dtype, where: str | None = None) -> Implementation:
    """The implementation for a product of `shape` with x of `dtype`, on `where` (:func:`platform` if None).

    On a GPU the kernel was faster than XLA's unpacking wherever it was measured, so it is always taken. TPU:
    reasoned from bytes, not measured: XLA writes the dequantised matrix out and reads it again (five times the bytes of
    4-bit words and more), so the kernel takes up to 256 rows; bfloat16 and float32 only, which TPUs compute in.
    """
    where = platform() if where is None else where
    if shape.m == 0:
        return "xla"
    if where == "gpu" and dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        return "gpu"
    if where == "tpu" and shape.m <= 256 and dtype in (jnp.bfloat16, jnp.float32) and lowbit_tpu.tile_for(shape):
        return "tpu"
    return "xla"


def matmul(
    x: jax.Array,
    qweight: jax.Array,
    qzeros: jax.Array,
    scales: jax.Array,
    g_idx: jax.Array | None = None,
    *,
    bits: int,
    group_size: int = -1,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x (…, k) times the matrix that :func:`dequantise` defines -> (…, n), in the dtype of x, accumulated in float32.

    Differentiable with respect to x and scales: the backward pass dequantises again and keeps no dense matrix.
    ``implementation`` overrides :func:`choose`; ``interpret`` runs a kernel on any machine, slowly. Raises ValueError
    for unknown bits, for shapes that disagree, and for an implementation that does not take this shape.
    """
    if bits not in PER_WORD:
        raise ValueError(f"bits={bits}: must be one of {tuple(PER_WORD)}")
    shape = _shape(x, qweight, scales, g_idx, bits, group_size, ternary=False)
    zeros = -(-shape.n // 32) * 3 if bits == 3 else -(-shape.n * bits // 32)
    if qzeros.shape != (shape.groups, zeros):
        raise ValueError(f"qzeros: expected {(shape.groups, zeros)} for scales {scales.shape}, found {qzeros.shape}")
    return _run(shape, group_size, implementation, interpret, x, (qweight, scales, qzeros, g_idx))


def ternary_matmul(
    x: jax.Array,
    words: jax.Array,
    positive: jax.Array,
    negative: jax.Array,
    g_idx: jax.Array | None = None,
    *,
    group_size: int = -1,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x (…, k) times the matrix that :func:`ternary_dequantise` defines -> (…, n). Otherwise as :func:`matmul`.

    No code may be 3.
    """
    shape = _shape(x, words, positive, g_idx, 2, group_size, ternary=True)
    if negative.shape != positive.shape:
        raise ValueError(f"negative: expected {positive.shape} as positive, found {negative.shape}")
    return _run(shape, group_size, implementation, interpret, x, (words, positive, negative, g_idx))


def _shape(x, words, scales, g_idx, bits: int, group_size: int, ternary: bool) -> Shape:
    k, n = words.shape[0] // WORDS[bits] * PER_WORD[bits], words.shape[1]
    groups = 1 if group_size == -1 else -(-k // group_size)
    if x.shape[-1] != k:
        raise ValueError(f"x: expected {k} inputs, as the words of {bits} bits hold, found {x.shape}")
    if scales.shape != (groups, n):
        raise ValueError(f"scales: expected {(groups, n)} for group_size {group_size}, found {scales.shape}")
    if g_idx is not None and g_idx.shape != (k,):
        raise ValueError(f"g_idx: expected shape {(k,)}, found {g_idx.shape}")
    rows = math.prod(x.shape[:-1])
    return Shape(rows, k, n, bits, k if groups == 1 else group_size, groups, ternary, g_idx is not None)


def _run(shape: Shape, group_size: int, implementation, interpret: bool, x, operands) -> jax.Array:
    chosen = choose(shape, x.dtype) if implementation is None else implementation
    if chosen not in ("xla", "gpu", "tpu"):
        raise ValueError(f"implementation={implementation!r}: must be 'xla', 'gpu' or 'tpu'")
    y = _product((shape, group_size, chosen, interpret), x.reshape(shape.m, shape.k), *operands)
    return y.reshape(*x.shape[:-1], shape.n)


def _reference(shape: Shape, group_size: int, x, words, scales, zeros, g_idx) -> jax.Array:
    if shape.ternary:
        w = ternary_dequantise(words, scales, zeros, g_idx, group_size=group_size, dtype=x.dtype)
    else:
        w = dequantise(words, zeros, scales, g_idx, bits=shape.bits, group_size=group_size, dtype=x.dtype)
    return x @ w


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how, x, words, scales, zeros, g_idx):
    shape, group_size, chosen, interpret = how
    if chosen == "xla":
        return _reference(shape, group_size, x, words, scales, zeros, g_idx)
    if chosen == "gpu":
        return x @ lowbit_gpu.dequantise(words, scales, zeros, g_idx, shape, x.dtype, interpret=interpret)
    zeros = zeros if shape.ternary else unpack_zeros(zeros, shape.bits, shape.n)
    return lowbit_tpu.matmul(
        x, words, scales.astype(jnp.float32), zeros.astype(jnp.float32), shape, interpret=interpret
    )


def _forward(how, x, *operands):
    return _product(how, x, *operands), (x, operands)


def _backward(how, saved, dy):
    """dx = dy Wᵀ with W dequantised anew; what nobody asks for of the rest is left out when the program is compiled."""
    shape, group_size, chosen, interpret = how
    x, (words, scales, zeros, g_idx) = saved
    reference = lambda x, s, z: _reference(shape, group_size, x, words, s, z, g_idx)
    if shape.ternary:
        dx, d_scales, d_zeros = jax.vjp(reference, x, scales, zeros)[1](dy)
    else:
        (dx, d_scales), d_zeros = jax.vjp(lambda x, s: reference(x, s, zeros), x, scales)[1](dy), None
    if chosen == "gpu":
        dx = dy @ lowbit_gpu.dequantise(words, scales, zeros, g_idx, shape, x.dtype, interpret=interpret).T
    return dx, None, d_scales, d_zeros, None


_product.defvjp(_forward, _backward)
