"""Pallas-Triton kernels for products with packed low-bit weights. See :mod:`jaxformers.kernels.lowbit`.

`tensor` multiplies on the tensor cores, in tiles of 16 rows of x and more; `vector` with fused multiply-adds in
float32, for one to four rows. Both read each word once from memory and unpack it in registers. Neither puts the rows of
the matrix into their order: the i-th codes of a tile of words meet columns i, i + 8, … of x (at 4 bits).

Scales and zeros are applied after the product, for each group: with q' = q + offset, what the mantissa trick yields,

    Σ_k x_k s (q_k - z) = s (Σ_k x_k q'_k - (z + offset) Σ_k x_k).

Where one step of the loop spans several groups (S of them), x enters as S rows that are zero outside their group: on
the tensor cores these take the place of rows that a small batch leaves empty ("group"). Elsewhere scales enter before
the product: one for the codes of a word ("word"), or, in act-order and for odd groups, one for each code ("row").
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxformers.kernels.codes import (
    WORDS,
    as_float32,
    as_halves,
    codes,
    offset_of,
    pairs,
    quotient,
    remainder,
    shift_right,
)
from jaxformers.kernels.shape import Shape


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a product is cut: a program computes `m` rows × `n` columns over one of `splits` parts of the inputs.

    Each step of its loop takes `words` rows of words (of triples of words at 3 bits), `unroll` times. `vector`: without
    tensor cores. `x_load`: how the columns i, i + 8, … of x are come by: "strided" loads, or one load that is "split".
    """

    m: int = 16
    n: int = 64
    words: int = 16
    splits: int = 1
    unroll: int = 1
    warps: int = 4
    stages: int = 4
    vector: bool = False
    scaling: str = "group"
    x_load: str = "strided"
    transposed: bool = False


def _segments(shape: Shape, tile: Tile) -> int:
    """Groups in one step of the loop; 0 when steps and groups do not fit into each other."""
    step = tile.words * shape.per
    if shape.groups == 1 or shape.group % step == 0:
        return 1
    return step // shape.group if step % shape.group == 0 else 0


def _scaling(shape: Shape, tile: Tile) -> str:
    """Where scales enter: what the tile asks for, or what the groups allow."""
    if shape.act_order or (shape.groups > 1 and shape.group % shape.per):
        return "row"
    segments = _segments(shape, tile)
    return "group" if tile.scaling == "group" and segments and tile.m % segments == 0 else "word"


def _fold(shape: Shape, tile: Tile) -> int:
    """Rows of a tile that one row of x takes: one for each group of a step."""
    return _segments(shape, tile) if _scaling(shape, tile) == "group" and not tile.vector else 1


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


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # else Triton takes TF32
    return jnp.dot(x, w, precision=precision, preferred_element_type=jnp.float32)


def _steps(shape: Shape, tile: Tile) -> int:
    """Iterations of the loop of one program."""
    return -(-shape.rows // (tile.words * tile.unroll * tile.splits))


def _loop(step, init, shape: Shape, tile: Tile):
    """Run ``step(first word row, carry)`` over this program's part of the inputs."""
    steps = _steps(shape, tile)
    first = pl.program_id(2) * steps

    def body(i, carry):
        for u in range(tile.unroll):
            carry = step(((first + i) * tile.unroll + u) * tile.words, carry)
        return carry

    return lax.fori_loop(0, steps, body, init)


def _tensor_kernel(x_ref, w_ref, s_ref, z_ref, *rest, shape: Shape, tile: Tile):
    g_ref, y_ref = rest if shape.act_order else (None, *rest)
    per, fold = shape.per, _fold(shape, tile)
    cols = pl.program_id(1) * tile.n + jnp.arange(tile.n)
    in_n = cols < shape.n
    local = jnp.arange(tile.m)
    m_rows, part = pl.program_id(0) * (tile.m // fold) + quotient(local, fold), remainder(local, fold)
    dtype = x_ref.dtype
    # The product is formed as (m, n) or, `transposed`, as (n, m): along(v) lies along m or n of it.
    along_m = (lambda v: v[None, :]) if tile.transposed else (lambda v: v[:, None])
    along_n = (lambda v: v[:, None]) if tile.transposed else (lambda v: v[None, :])
    dot = (lambda x, w: _dot(w.T, x.T)) if tile.transposed else _dot
    size = (tile.n, tile.m) if tile.transposed else (tile.m, tile.n)

    def load_x(k, offset, index):  # k (columns of x,), offset (their place in the step,)
        mask = (m_rows < shape.m)[:, None] & (k < shape.k)[None, :]
        if fold > 1:
            mask &= quotient(offset, shape.group)[None, :] == part[:, None]
        return _take(x_ref, (m_rows[:, None], *index), mask)

    def load_parts(row):
        """x for the i-th codes of the words from `row` on, for each i."""
        if tile.x_load == "split":
            offset = jnp.arange(tile.words * per)
            k = row * per + offset
            x = load_x(k, offset, (k[None, :],)).reshape(tile.m, tile.words, per)
            return [p.reshape(tile.m, tile.words) for p in lax.split(x, (1,) * per, axis=2)]
        offset, rows = jnp.arange(tile.words) * per, row + jnp.arange(tile.words)
        if tile.x_load == "permuted":
            return [load_x(rows * per + i, offset + i, (i, rows[None, :])) for i in range(per)]
        return [load_x(rows * per + i, offset + i, ((rows * per + i)[None, :],)) for i in range(per)]

    def row_by_row(row, acc):
        rows, xs = row + jnp.arange(tile.words), load_parts(row)
        for i, code in enumerate(codes(_load_words(w_ref, rows, cols, shape), shape.bits)):
            k = rows * per + i
            group = _take(g_ref, (k,), k < shape.k) if shape.act_order else quotient(k, shape.group)
            mask = (k < shape.k)[:, None] & in_n[None, :]
            scale, zero = _levels(s_ref, z_ref, group[:, None], cols[None, :], mask, shape)
            acc += dot(xs[i], _value(code, scale, zero, shape.ternary).astype(dtype))
        return acc

    def word_by_word(row, acc):
        rows = row + jnp.arange(tile.words)
        group = quotient(rows * per, shape.group)
        mask = (rows < shape.rows)[:, None] & in_n[None, :]
        scale, zero = _levels(s_ref, z_ref, group[:, None], cols[None, :], mask, shape)
        words, xs = _load_words(w_ref, rows, cols, shape), load_parts(row)
        for x, code in zip(xs, codes(words, shape.bits)):
            acc += dot(x, _value(code, scale, zero, shape.ternary).astype(dtype))
        return acc

    def group_by_group(row, acc):
        group = part if fold > 1 else jnp.zeros((1,), jnp.int32)
        group = group if shape.groups == 1 else group + quotient(row * per, shape.group)
        mask = along_m(group < shape.groups) & along_n(in_n)
        scale, zero = _levels(s_ref, z_ref, along_m(group), along_n(cols), mask, shape)
        words, xs = _load_words(w_ref, row + jnp.arange(tile.words), cols, shape), load_parts(row)
        total = along_m(sum(x.astype(jnp.float32) for x in xs).sum(axis=1))
        offset = offset_of(dtype, shape.bits)
        sums = [jnp.zeros(size, jnp.float32)] * (2 if shape.ternary else 1)
        for low, high, pair in pairs(words, shape.bits):
            planes = (pair & 0x10001, shift_right(pair, 1) & 0x10001) if shape.ternary else (pair,)
            for p, plane in enumerate(planes):
                one, two = as_halves(plane, dtype, shape.bits)
                sums[p] = sums[p] + dot(xs[low], one)
                sums[p] = sums[p] + dot(xs[high], two)
        if shape.ternary:  # a plane of bits for each level
            return acc + scale * (sums[0] - offset * total) + zero * (sums[1] - offset * total)
        return acc + scale * (sums[0] - (zero + offset) * total)

    step = {"group": group_by_group, "word": word_by_word, "row": row_by_row}[_scaling(shape, tile)]
    acc = _loop(step, jnp.zeros(size, jnp.float32), shape, tile)
    if fold > 1:
        rows = tile.m // fold
        acc = acc.reshape(tile.n, rows, fold).sum(2) if tile.transposed else acc.reshape(rows, fold, tile.n).sum(1)
        m_rows = pl.program_id(0) * rows + jnp.arange(rows)
    mask = along_m(m_rows < shape.m) & along_n(in_n)
    plgpu.store(y_ref.at[pl.program_id(2), along_m(m_rows), along_n(cols)], acc.astype(y_ref.dtype), mask=mask)


def _vector_kernel(x_ref, w_ref, s_ref, z_ref, *rest, shape: Shape, tile: Tile):
    g_ref, y_ref = rest if shape.act_order else (None, *rest)
    per = shape.per
    cols = pl.program_id(1) * tile.n + jnp.arange(tile.n)
    m_rows = [pl.program_id(0) * tile.m + i for i in range(tile.m)]
    per_word = not shape.act_order and (shape.groups == 1 or shape.group % per == 0)

    def load_x(k):
        return [_take(x_ref, (m, k), (k < shape.k) & (m < shape.m)).astype(jnp.float32)[:, None] for m in m_rows]

    def step(row, acc):
        rows = row + jnp.arange(tile.words)
        words = _load_words(w_ref, rows, cols, shape)
        if per_word:  # one scale for all codes of a word
            if shape.groups == 1:
                group = jnp.zeros((1,), jnp.int32)
            else:
                whole = shape.group % (tile.words * per) == 0  # the step lies within one group
                group = quotient((jnp.full((1,), row, jnp.int32) if whole else rows) * per, shape.group)
            mask = (group < shape.groups)[:, None] & (cols < shape.n)[None, :]
            scale, zero = _levels(s_ref, z_ref, group[:, None], cols[None, :], mask, shape)
            one, two = (scale, zero) if shape.ternary else (1.0, zero)
        sums = [jnp.zeros((tile.words, tile.n), jnp.float32)] * tile.m
        for i, code in enumerate(codes(words, shape.bits)):
            k = rows * per + i
            if not per_word:
                group = _take(g_ref, (k,), k < shape.k) if shape.act_order else quotient(k, shape.group)
                mask = (k < shape.k)[:, None] & (cols < shape.n)[None, :]
                one, two = _levels(s_ref, z_ref, group[:, None], cols[None, :], mask, shape)
            value = as_float32(code) - two if per_word and not shape.ternary else _value(code, one, two, shape.ternary)
            sums = [s + x * value for s, x in zip(sums, load_x(k))]
        return tuple(a + (scale * s if per_word and not shape.ternary else s) for a, s in zip(acc, sums))

    zero = jnp.zeros((tile.words, tile.n), jnp.float32)
    acc = _loop(step, (zero,) * tile.m, shape, tile)
    for m, a in zip(m_rows, acc):
        y = a.sum(axis=0).astype(y_ref.dtype)
        plgpu.store(y_ref.at[pl.program_id(2), m, cols], y, mask=(cols < shape.n) & (m < shape.m))


def matmul(x, words, scales, zeros, g_idx, shape: Shape, tile: Tile, interpret: bool = False) -> jax.Array:
    """x (m, k) times the packed matrix -> (m, n) in the dtype of x. `zeros`: packed, or the ternary negative levels."""
    fold = _fold(shape, tile)
    if tile.x_load == "permuted" and not tile.vector:
        x = jnp.pad(x, ((0, 0), (0, shape.rows * shape.per - shape.k)))
        x = x.reshape(shape.m, shape.rows, shape.per).swapaxes(1, 2)
    kernel = functools.partial(_vector_kernel if tile.vector else _tensor_kernel, shape=shape, tile=tile)
    operands = (x, words, scales, zeros) + ((g_idx,) if shape.act_order else ())
    out = jax.ShapeDtypeStruct((tile.splits, shape.m, shape.n), x.dtype if tile.splits == 1 else jnp.float32)
    partial = pl.pallas_call(
        kernel,
        out_shape=out,
        grid=(-(-shape.m // (tile.m // fold)), -(-shape.n // tile.n), tile.splits),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=shape.cost(x.dtype),
        interpret=interpret,
        name=f"lowbit_matmul_{shape.bits}_bits",
    )(*operands)
    return partial[0] if tile.splits == 1 else partial.sum(axis=0).astype(x.dtype)


def tile_for(shape: Shape, dtype, forced: bool = False) -> Tile | None:
    """The tile for a product, as measured on an H100; None where dequantising once and XLA's product are faster."""
    if shape.m > 256 and not forced:
        return None
    if shape.m <= 2:
        return Tile(m=shape.m, n=64, words=32, splits=4, vector=True)
    if dtype == jnp.float32:
        return Tile(m=16, n=64, splits=2)
    return Tile(m=16 if shape.m <= 16 else 32 if shape.m <= 32 else 64, n=64, splits=4, x_load="permuted")
