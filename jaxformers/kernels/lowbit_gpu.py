"""The Pallas-Triton kernel that writes packed low-bit weights out as they lie on disk. See :mod:`.lowbit`.

XLA's product follows. Products that are fast with few rows need the layout of :mod:`jaxformers.kernels.planes`: out of
GPTQ's words they reached 1.6 times the speed of bfloat16 with one row, out of planes 2.4 times.
"""

import functools

import jax
import jax.numpy as jnp

from jaxformers.kernels.codes import WORDS, as_float32, codes, quotient, shift_right
from jaxformers.kernels.lazy import pl, plgpu
from jaxformers.kernels.shape import Shape

ROWS, COLUMNS = 16, 128  # of words a program: what was fastest on an H100


def _take(ref, index, mask, other=0):
    return plgpu.load(ref.at[index], mask=mask, other=other)


def _load_words(w_ref, rows, cols, shape: Shape) -> list[jax.Array]:
    """The words (or the triple of words) of `rows` × `cols`."""
    mask = (rows < shape.rows)[:, None] & (cols < shape.n)[None, :]
    count = WORDS[shape.bits]
    return [_take(w_ref, (rows[:, None] * count + i, cols[None, :]), mask) for i in range(count)]


def _load_zeros(z_ref, group, cols, mask, bits: int) -> jax.Array:
    """The zeros of `group` × `cols`, float32, out of words packed along the columns."""
    position = cols * bits
    word, offset = position >> 5, position & 31
    zero = shift_right(_take(z_ref, (group, word), mask), jnp.broadcast_to(offset, mask.shape))
    if bits == 3:  # a field may straddle two words
        straddles = mask & (offset > 29)
        rest = _take(z_ref, (group, word + 1), straddles)
        zero = zero | jnp.where(straddles, rest << ((32 - offset) & 31), 0)
    return as_float32(zero & (2**bits - 1))


def _levels(s_ref, z_ref, group, cols, mask, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """(scale, zero) of `group` × `cols`, or for ternary weights (positive, negative level); float32."""
    scale = _take(s_ref, (group, cols), mask).astype(jnp.float32)
    if shape.ternary:
        return scale, _take(z_ref, (group, cols), mask).astype(jnp.float32)
    return scale, _load_zeros(z_ref, group, cols, mask, shape.bits)


def _value(code: jax.Array, scale: jax.Array, zero: jax.Array, ternary: bool) -> jax.Array:
    """The weights that codes stand for, float32."""
    if ternary:
        return jnp.where(code == 1, scale, jnp.where(code == 2, zero, 0.0))
    return scale * (as_float32(code) - zero)


def _dequantise_kernel(w_ref, s_ref, z_ref, *rest, shape: Shape):
    g_ref, y_ref = rest if shape.act_order else (None, *rest)
    per = shape.per
    rows = pl.program_id(0) * ROWS + jnp.arange(ROWS)
    cols = pl.program_id(1) * COLUMNS + jnp.arange(COLUMNS)
    by_word = not shape.act_order and (shape.groups == 1 or shape.group % per == 0)

    def levels(k):
        group = _take(g_ref, (k,), k < shape.k) if shape.act_order else quotient(k, shape.group)
        mask = (k < shape.k)[:, None] & (cols < shape.n)[None, :]
        return _levels(s_ref, z_ref, group[:, None], cols[None, :], mask, shape)

    once = levels(rows * per) if by_word else None
    for i, code in enumerate(codes(_load_words(w_ref, rows, cols, shape), shape.bits)):
        k = rows * per + i
        value = _value(code, *(once or levels(k)), shape.ternary).astype(y_ref.dtype)
        plgpu.store(y_ref.at[k[:, None], cols[None, :]], value, mask=(k < shape.k)[:, None] & (cols < shape.n)[None, :])


def dequantise(words, scales, zeros, g_idx, shape: Shape, dtype, interpret: bool = False) -> jax.Array:
    """The packed matrix as (k, n) in `dtype`: bit for bit what the definition gives.

    `zeros`: packed, or the ternary negative levels.
    """
    operands = (words, scales, zeros) + ((g_idx,) if shape.act_order else ())
    return pl.pallas_call(
        functools.partial(_dequantise_kernel, shape=shape),
        out_shape=jax.ShapeDtypeStruct((shape.k, shape.n), dtype),
        grid=(-(-shape.rows // ROWS), -(-shape.n // COLUMNS)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name=f"lowbit_dequantise_{shape.bits}_bits",
    )(*operands)
