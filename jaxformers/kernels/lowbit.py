"""Products with packed low-bit weights: x (m, k) times an (k, n) matrix of 2, 3, 4 or 8 bits, or of three values.

    W[i, o] = scales[g_idx[i], o] · (code[i, o] - zero[g_idx[i], o])

in the words of GPTQ checkpoints (arXiv 2210.17323; layout in :mod:`jaxformers.kernels.codes`), as they lie on disk.
:func:`dequantise` is the definition.
"""

import jax
import jax.numpy as jnp

from jaxformers.kernels.codes import WORDS, codes

IMPLEMENTATIONS = ("xla", "gpu")


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """Words int32 (rows of words, n) -> codes int32 (rows of words · 32 / bits, n)."""
    count = WORDS[bits]
    found = codes([words[i::count] for i in range(count)], bits)
    return jnp.stack(found, axis=1).reshape(-1, words.shape[1])


def dequantise(qweight, qzeros, scales, g_idx=None, *, bits: int, group_size: int = -1, dtype=jnp.float32) -> jax.Array:
    """The (k, n) matrix in `dtype`; the arithmetic is in float32. The definition that every kernel is held to.

    qweight int32 (k · bits / 32, n); qzeros int32 (G, ceil(n · bits / 32)), packed along n, zeros as they are (version
    2 of the format); scales float (G, n); g_idx int32 (k,), None for `arange(k) // group_size`; G = ceil(k /
    group_size), 1 for group_size -1.
    """
    rows = unpack(qweight, bits)
    k, n = rows.shape
    zeros = unpack(qzeros.T, bits).T[:, :n]
    group = jnp.arange(k) // (k if group_size == -1 else group_size) if g_idx is None else g_idx
    scale, zero = scales.astype(jnp.float32)[group], zeros[group]
    return (scale * (rows - zero).astype(jnp.float32)).astype(dtype)


def ternary_dequantise(codes_, positive, negative, g_idx=None, *, group_size: int = -1, dtype=jnp.float32) -> jax.Array:
    """The (k, n) matrix of 2-bit codes (k / 16, n): 0, `positive` (code 1) or `negative` (code 2), both (G, n)."""
    rows = unpack(codes_, 2)
    k = rows.shape[0]
    group = jnp.arange(k) // (k if group_size == -1 else group_size) if g_idx is None else g_idx
    one, two = positive.astype(dtype)[group], negative.astype(dtype)[group]
    return jnp.where(rows == 1, one, jnp.where(rows == 2, two, 0)).astype(dtype)
