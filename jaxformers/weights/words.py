"""Low-bit codes in 32-bit words, as GPTQ checkpoints hold them.

Along one axis, 32 codes of `bits` bits become `bits` words: one little-endian stream of bits, the first code in the
lowest bits of the first word. For 2, 4 and 8 bits no code straddles two words. For 3 bits 32 codes fill 96 bits, and
codes 10 and 21 of each 32 straddle; read as four lanes of 24 bits the stream holds eight whole codes per lane.

Every function takes NumPy or JAX arrays and answers in kind. Words are int32, codes uint8.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # np.ndarray or jax.Array


def _numpy_like(x: Array) -> Any:
    return jnp if isinstance(x, jax.Array) else np


def n_words(n: int, bits: int) -> int:
    """How many words hold `n` codes: whole runs of 32 codes at 3 bits, whole words otherwise."""
    return -(-n // 32) * 3 if bits == 3 else -(-n * bits // 32)


def pack(codes: Array, bits: int, axis: int = -2) -> Array:
    """Codes (…, n, …) below 2^bits -> int32 words (…, n_words(n), …) along `axis`; missing codes count as 0."""
    xp = _numpy_like(codes)
    codes = xp.moveaxis(codes, axis, -1).astype(xp.uint32)
    n, lead = codes.shape[-1], codes.shape[:-1]
    padded = n_words(n, bits) * 32 // bits
    codes = xp.pad(codes, [(0, 0)] * len(lead) + [(0, padded - n)])
    if bits == 3:
        lanes = _join(xp, codes.reshape(*lead, padded // 8, 8), 3).reshape(*lead, padded // 32, 4)
        a, b, c, d = (lanes[..., i] for i in range(4))
        words = xp.stack([a | (b << 24), (b >> 8) | (c << 16), (c >> 16) | (d << 8)], axis=-1).reshape(*lead, -1)
    else:
        words = _join(xp, codes.reshape(*lead, -1, 32 // bits), bits)
    return xp.moveaxis(words.view(xp.int32) if xp is np else jax.lax.bitcast_convert_type(words, jnp.int32), -1, axis)


def _join(xp: Any, codes: Array, bits: int) -> Array:
    """(…, k) codes -> (…,) one unsigned number of k · bits bits each."""
    shifts = xp.arange(codes.shape[-1], dtype=xp.uint32) * xp.uint32(bits)
    return (codes << shifts).sum(-1, dtype=xp.uint32)


def unpack(words: Array, bits: int, n: int, axis: int = -2) -> Array:
    """The inverse of :func:`pack`: the first `n` codes, uint8, along `axis`."""
    xp = _numpy_like(words)
    axis = axis % words.ndim
    words = words.view(xp.uint32) if xp is np else jax.lax.bitcast_convert_type(words, jnp.uint32)
    take = lambda i: words[(slice(None),) * axis + (slice(i, None, 3),)]  # noqa: E731
    if bits == 3:
        a, b, c = take(0), take(1), take(2)
        lanes = [a, (a >> 24) | (b << 8), (b >> 16) | (c << 16), c >> 8]  # what exceeds 24 bits is never looked at
        lanes, per_lane = xp.stack(lanes, axis=axis + 1), 8
        lanes = lanes.reshape(*words.shape[:axis], -1, *words.shape[axis + 1 :])
    else:
        lanes, per_lane = words, 32 // bits
    shape = [1] * (words.ndim + 1)
    shape[axis + 1] = per_lane
    shifts = xp.arange(per_lane, dtype=xp.uint32).reshape(shape) * xp.uint32(bits)
    codes = (xp.expand_dims(lanes, axis + 1) >> shifts) & xp.uint32(2**bits - 1)
    codes = codes.astype(xp.uint8).reshape(*lanes.shape[:axis], lanes.shape[axis] * per_lane, *lanes.shape[axis + 1 :])
    return codes[(slice(None),) * axis + (slice(0, n),)]


def shift_zeros(qzeros: Array, bits: int, by: int) -> Array:
    """Add `by` to every packed code (along the last axis), each wrapping within its own field.

    Version 1 of the format stores `zero - 1` and version 2 `zero`; so `by=1` reads version 1 and `by=-1` writes it.
    A zero of 0 becomes 2^bits - 1 and comes back: no carry reaches a neighbour.
    """
    n = qzeros.shape[-1] * 32 // bits
    codes = unpack(qzeros, bits, n, axis=-1).astype("int32")
    return pack((codes + by) % 2**bits, bits, axis=-1)
