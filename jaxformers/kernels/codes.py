"""Codes of 2, 3, 4 and 8 bits inside 32-bit words: how kernels take them out in registers.

A row of words holds ``PER_WORD[bits]`` consecutive rows of the matrix (at 3 bits, three rows of words hold 32), the
first in the lowest bits. Kernels never put the rows back into their order: the i-th code of every word is a matrix of
its own, which meets every PER_WORD-th column of x. (Layout: GPTQ, arXiv 2210.17323, and AutoGPTQ's checkpoints.)
"""

import jax
import jax.numpy as jnp
from jax import lax

PER_WORD = {2: 16, 3: 32, 4: 8, 8: 4}  # codes in a word; in three words at 3 bits
WORDS = {2: 1, 3: 3, 4: 1, 8: 1}  # words that belong together

shift_right = lax.shift_right_logical


def quotient(a: jax.Array, b: int) -> jax.Array:
    """`a // b` of numbers that are not negative; jnp's own would mind the sign, at four times the instructions."""
    return lax.div(a, jnp.full_like(a, b))


def remainder(a: jax.Array, b: int) -> jax.Array:
    """`a % b` of numbers that are not negative."""
    return lax.rem(a, jnp.full_like(a, b))


def constant(value: int) -> jax.Array:
    """A 32-bit pattern as an int32 constant."""
    return jnp.int32(value - (1 << 32) if value >= 1 << 31 else value)


def lanes(words: list[jax.Array]) -> list[jax.Array]:
    """Three words of 3-bit codes as four lanes of eight codes; what a lane holds above 24 bits is rubbish."""
    a, b, c = words
    return [a, shift_right(a, 24) | (b << 8), shift_right(b, 16) | (c << 16), shift_right(c, 8)]


def codes(words: list[jax.Array], bits: int) -> list[jax.Array]:
    """The codes of a word (or of three), in the order of the rows: PER_WORD int32 arrays of the words' shape."""
    mask = constant(2**bits - 1)
    if bits == 3:
        return [shift_right(lane, 3 * j) & mask for lane in lanes(words) for j in range(8)]
    return [shift_right(words[0], bits * i) & mask for i in range(32 // bits)]


def pairs(words: list[jax.Array], bits: int) -> list[tuple[int, int, jax.Array]]:
    """The codes two at a time: (i, j, pair), code i in the low half of the pair and code j in its high half.

    One shift and one mask serve both, which is why kernels prefer pairs.
    """
    mask = constant((2**bits - 1) * 0x10001)
    if bits != 3:
        half = 16 // bits
        return [(i, i + half, shift_right(words[0], bits * i) & mask) for i in range(half)]
    out = []
    four = lanes(words)
    for first in (0, 2):
        one, two = four[first], four[first + 1]
        low = (one & constant(0xFFFF)) | (two << 16)
        high = (shift_right(one, 15) & constant(0xFFFF)) | (shift_right(two, 15) << 16)
        for j in range(8):
            pair = shift_right(low, 3 * j) if j < 5 else shift_right(high, 3 * (j - 5))
            out.append((8 * first + j, 8 * first + 8 + j, pair & mask))
    return out


def in_place(words: list[jax.Array], bits: int) -> list[tuple[jax.Array, int]]:
    """The codes of a word (or of three) where they lie: (array, first bit), always within the lowest 23 bits."""
    out = []
    for word in lanes(words) if bits == 3 else words:
        high = None
        for bit in range(0, 24 if bits == 3 else 32, bits):
            if bit + bits <= 23:
                out.append((word, bit))
            else:
                start = bit if high is None else start  # one shift serves all that lie too high
                high = shift_right(word, start) if high is None else high
                out.append((high, bit - start))
    return out


def at_bit(word: jax.Array, bit: int, bits: int) -> jax.Array:
    """The codes at `bit`, times 2^bit, as float32: like :func:`as_float32`, without a shift."""
    mask = constant((2**bits - 1) << bit)
    return lax.bitcast_convert_type((word & mask) | constant(0x4B000000), jnp.float32) - jnp.float32(2**23)


def as_float32(code: jax.Array) -> jax.Array:
    """Codes below 2^23 as float32, by writing them into the mantissa of 2^23: no conversion instruction."""
    return lax.bitcast_convert_type(code | constant(0x4B000000), jnp.float32) - jnp.float32(2**23)


def offset_of(dtype: jnp.dtype, bits: int) -> int:
    """What :func:`as_halves` adds to every code: bfloat16 128, float16 1024, and nothing where that does not fit."""
    if dtype == jnp.bfloat16:
        return 128 if bits < 8 else 0
    return 1024 if dtype == jnp.float16 else 0


def as_halves(pair: jax.Array, dtype: jnp.dtype, bits: int) -> tuple[jax.Array, jax.Array]:
    """The low and the high codes of pairs in `dtype`, plus :func:`offset_of`: both written into mantissas at once."""
    if offset_of(dtype, bits) == 0:
        low, high = pair & constant(0xFFFF), shift_right(pair, 16)
        return as_float32(low).astype(dtype), as_float32(high).astype(dtype)
    pair = pair | constant(0x43004300 if dtype == jnp.bfloat16 else 0x64006400)
    low, high = pair.astype(jnp.int16), shift_right(pair, 16).astype(jnp.int16)
    return lax.bitcast_convert_type(low, dtype), lax.bitcast_convert_type(high, dtype)
