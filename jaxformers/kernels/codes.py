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


def as_float32(code: jax.Array) -> jax.Array:
    """Codes below 2^23 as float32, by writing them into the mantissa of 2^23: no conversion instruction."""
    return lax.bitcast_convert_type(code | constant(0x4B000000), jnp.float32) - jnp.float32(2**23)
