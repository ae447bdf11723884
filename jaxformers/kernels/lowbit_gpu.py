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

from jaxformers.kernels.codes import (
    WORDS,
    as_float32,
    as_halves,
    at_bit,
    codes,
    in_place,
    offset_of,
    pairs,
    quotient,
    remainder,
    shift_right,
)
from jaxformers.kernels.lazy import pl, plgpu
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


def _first_row(shape: Shape, tile: Tile) -> jax.Array:
    return pl.program_id(2) * (_steps(shape, tile) * tile.unroll * tile.words)


def _loop(step, carry, shape: Shape, tile: Tile):
    """Run ``step(first row of words, carry)`` over this program's part of the inputs."""
    first = _first_row(shape, tile)

    def body(i, carry):
        for u in range(tile.unroll):
            carry = step(first + (i * tile.unroll + u) * tile.words, carry)
        return carry

    if _steps(shape, tile) == 1:
        return body(0, carry)
    return lax.fori_loop(0, _steps(shape, tile), body, carry)


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

    def group_levels(row):
        group = part if fold > 1 else jnp.zeros((1,), jnp.int32)
        group = group if shape.groups == 1 else group + quotient(row * per, shape.group)
        mask = along_m(group < shape.groups) & along_n(in_n)
        return _levels(s_ref, z_ref, along_m(group), along_n(cols), mask, shape)

    def group_by_group(row, carry):
        acc, scale, zero = carry
        ahead = group_levels(row + tile.words)  # asked for one step early: nothing else would hide the wait
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
            return acc + scale * (sums[0] - offset * total) + zero * (sums[1] - offset * total), *ahead
        return acc + scale * (sums[0] - (zero + offset) * total), *ahead

    acc = jnp.zeros(size, jnp.float32)
    if _scaling(shape, tile) == "group":
        acc, _, _ = _loop(group_by_group, (acc, *group_levels(_first_row(shape, tile))), shape, tile)
    else:
        acc = _loop(word_by_word if _scaling(shape, tile) == "word" else row_by_row, acc, shape, tile)
    if fold > 1:
        rows = tile.m // fold
        acc = acc.reshape(tile.n, rows, fold).sum(2) if tile.transposed else acc.reshape(rows, fold, tile.n).sum(1)
        m_rows = pl.program_id(0) * rows + jnp.arange(rows)
    mask = along_m(m_rows < shape.m) & along_n(in_n)
    plgpu.store(y_ref.at[pl.program_id(2), along_m(m_rows), along_n(cols)], acc.astype(y_ref.dtype), mask=mask)


def _runs(shape: Shape, tile: Tile) -> int:
    """How many rows of words in succession are surely of one group, as a power of two that divides a step."""
    whole = tile.words if shape.groups == 1 else shape.group // shape.per
    if whole % tile.words == 0:
        return tile.words
    return whole if tile.words % whole == 0 else 1


def _vector_kernel(x_ref, w_ref, s_ref, z_ref, *rest, shape: Shape, tile: Tile):
    g_ref, y_ref = rest if shape.act_order else (None, *rest)
    per = shape.per
    cols = pl.program_id(1) * tile.n + jnp.arange(tile.n)
    in_n = cols < shape.n
    m_rows = [pl.program_id(0) * tile.m + i for i in range(tile.m)]
    zeros = jnp.zeros((tile.words, tile.n), jnp.float32)

    def load_parts(m, row):
        """x of one row of the batch for the i-th codes of the words from `row` on, for each i; float32."""
        rows = row + jnp.arange(tile.words)
        if tile.x_load == "split":
            k = row * per + jnp.arange(tile.words * per)
            x = _take(x_ref, (m, k), (k < shape.k) & (m < shape.m)).reshape(tile.words, per)
            parts = [p.reshape(tile.words) for p in lax.split(x, (1,) * per, axis=1)]
        else:
            ks = [rows * per + i for i in range(per)]
            parts = [_take(x_ref, (m, k), (k < shape.k) & (m < shape.m)) for k in ks]
        return [p.astype(jnp.float32) for p in parts]

    def by_row(row, carry):
        acc, rest = carry
        rows = row + jnp.arange(tile.words)
        xs = [load_parts(m, row) for m in m_rows]
        for i, code in enumerate(codes(_load_words(w_ref, rows, cols, shape), shape.bits)):
            k = rows * per + i
            group = _take(g_ref, (k,), k < shape.k) if shape.act_order else quotient(k, shape.group)
            mask = (k < shape.k)[:, None] & in_n[None, :]
            value = _value(code, *_levels(s_ref, z_ref, group[:, None], cols[None, :], mask, shape), shape.ternary)
            acc = tuple(a + x[i][:, None] * value for a, x in zip(acc, xs))
        return acc, rest

    def by_word(row, carry):
        """One scale for all codes of a word; zeros enter by the sums of x over groups."""
        acc, rest = carry
        words = _load_words(w_ref, row + jnp.arange(tile.words), cols, shape)
        runs = _runs(shape, tile)
        count = tile.words // runs
        group = quotient((row + jnp.arange(count) * runs) * per, shape.group)
        mask = (group < shape.groups)[:, None] & in_n[None, :]
        scale, zero = _levels(s_ref, z_ref, group[:, None], cols[None, :], mask, shape)
        spread = lambda table: jnp.broadcast_to(table[:, None, :], (count, runs, tile.n)).reshape(tile.words, tile.n)
        if count == 1:
            scales, levels = scale, zero
        else:
            rows = quotient((row + jnp.arange(tile.words)) * per, shape.group)
            mask = (rows < shape.groups)[:, None] & in_n[None, :]
            scales = _take(s_ref, (rows[:, None], cols[None, :]), mask).astype(jnp.float32)
            levels = spread(zero) if shape.ternary else None
        new, more = [], []
        for a, r, m in zip(acc, rest, m_rows):
            xs = load_parts(m, row)
            sums, others, total = zeros, zeros, jnp.zeros((tile.words,), jnp.float32)
            for x, (word, bit) in zip(xs, in_place(words, shape.bits)):
                scaled = (x * 2.0**-bit)[:, None]
                if shape.ternary:
                    sums = sums + scaled * at_bit(word, bit, 1)
                    others = others + (0.5 * scaled) * at_bit(word, bit + 1, 1)
                else:
                    sums = sums + scaled * at_bit(word, bit, shape.bits)
                    total = total + x
            new.append(a + scales * sums + (levels * others if shape.ternary else 0.0))
            if not shape.ternary:
                r = r + (scale * zero * total.reshape(count, runs).sum(axis=1)[:, None]).sum(axis=0)
            more.append(r)
        return tuple(new), tuple(more)

    by = by_row if shape.act_order or (shape.groups > 1 and shape.group % per) else by_word
    start = (zeros,) * tile.m, (jnp.zeros((tile.n,), jnp.float32),) * tile.m
    for m, a, r in zip(m_rows, *_loop(by, start, shape, tile)):
        y = (a.sum(axis=0) - r).astype(y_ref.dtype)
        plgpu.store(y_ref.at[pl.program_id(2), m, cols], y, mask=in_n & (m < shape.m))


def _dequantise_kernel(w_ref, s_ref, z_ref, *rest, shape: Shape, tile: Tile):
    g_ref, y_ref = rest if shape.act_order else (None, *rest)
    per = shape.per
    rows = pl.program_id(0) * tile.words + jnp.arange(tile.words)
    cols = pl.program_id(1) * tile.n + jnp.arange(tile.n)
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


def dequantise(
    words, scales, zeros, g_idx, shape: Shape, dtype, tile: Tile = Tile(n=128, words=16), interpret: bool = False
) -> jax.Array:
    """The packed matrix as (k, n) in `dtype`: bit for bit what the definition gives."""
    operands = (words, scales, zeros) + ((g_idx,) if shape.act_order else ())
    return pl.pallas_call(
        functools.partial(_dequantise_kernel, shape=shape, tile=tile),
        out_shape=jax.ShapeDtypeStruct((shape.k, shape.n), dtype),
        grid=(-(-shape.rows // tile.words), -(-shape.n // tile.n)),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"lowbit_dequantise_{shape.bits}_bits",
    )(*operands)


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


def tile_for(shape: Shape, dtype) -> Tile | None:
    """The tile that was fastest on an H100, or None where :func:`dequantise` and XLA's product are.

    Measured for k = n = 4096 and 8192, groups of 128, bfloat16 (benchmarks/results/kernels_lowbit.md); other sizes and
    float16 go by these. Float32 has no tensor cores that would keep its precision.
    """
    m, bits = shape.m, shape.bits
    if shape.act_order or (shape.groups > 1 and shape.group % shape.per):
        return None  # scales row by row
    if m == 1 and not shape.ternary:
        large = shape.k > 4096
        if bits == 4 and not large or bits == 8:
            return Tile(m=1, n=32, words=512, warps=16, vector=True, x_load="split")
        if bits == 4:
            return Tile(m=1, n=32, words=128, splits=4, vector=True)
        if bits == 3 and not large:
            return Tile(m=1, n=32, words=128, warps=16, vector=True, x_load="split")
        return Tile(m=1, n=32, words=128 if bits == 3 else 256, warps=8, vector=True)
    if dtype == jnp.float32:
        return None
    if bits == 4 and m <= 32:
        tile = Tile(m=16 if m <= 16 else 32, n=128, splits=4, x_load="split")
    elif bits == 8 and m <= 16:
        tile = Tile(m=16, n=128, words=32, splits=4, x_load="split")
    elif bits in (2, 3) and m <= 16:
        tile = Tile(m=64 if bits == 3 else 32, n=128, splits=8, warps=8, x_load="split")
    else:
        return None
    return tile if _scaling(shape, tile) == "group" else None
