"""A Pallas kernel for TPUs: products with packed low-bit weights. See :mod:`jaxformers.kernels.lowbit`.

A tile of words becomes a tile of bfloat16 without a conversion: two codes are written into the mantissas of two
bfloat16 at once (128 + code), and the 32-bit tile (r, n) *is* then a bfloat16 tile (2r, n), low halves in even rows.
Its rows are the inputs in another order, so the columns of x are put into that order before the kernel. The codes of
a chunk (whole groups, at least eight rows of words) meet x in one product; scales and zeros enter after it:

    Σ_k x_k s (q_k - z) = s (Σ_k x_k q'_k - (z + 128) Σ_k x_k),   q' = q + 128.

A chunk of S > 1 groups takes x as S copies of its rows, each zero outside its group; the matrix unit has them free
while x has few rows. 8 bits, and float32 activations, take the codes one at a time, by conversion.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.kernels.codes import WORDS, as_float32, codes, constant, pairs, quotient, remainder, shift_right
from jaxformers.kernels.lazy import pl, pltpu
from jaxformers.kernels.shape import Shape

SUBLANES = 8  # rows of a 32-bit register


@dataclasses.dataclass(frozen=True)
class Tile:
    """A program computes `m` rows × `n` columns, `chunks` chunks (whole groups) of the inputs at a time."""

    m: int
    n: int
    chunks: int
    rows: int  # rows of words (of triples at 3 bits) in a chunk
    segments: int  # groups in a chunk


def tile_for(shape: Shape) -> Tile | None:
    """How `shape` is cut; None when its groups do not fit whole rows of words, which the kernel needs."""
    per = shape.per
    if shape.act_order or (shape.groups > 1 and shape.group % per):
        return None
    if shape.groups == 1:
        rows, segments = 32, 1
    else:
        rows = shape.group // per
        segments = math.lcm(rows, SUBLANES) // rows
        rows *= segments
    if segments > 8:
        return None
    m = min(256 // segments, -(-shape.m // 16) * 16)
    chunks = max(1, 2048 // (rows * per))
    while (chunks * segments) % SUBLANES and shape.groups > 1:  # blocks of scales are cut at whole registers
        chunks += 1
    return Tile(m, 512 if shape.n >= 512 else -(-shape.n // 128) * 128, chunks, rows, segments)


def _order(shape: Shape, dtype) -> np.ndarray:
    """For each row of a chunk's unpacked tile, divided by the rows of words: (codes' place in the word, …)."""
    if _halves(shape, dtype):
        words = [np.zeros((1, 1), np.int32)] * WORDS[shape.bits]
        return np.asarray([(i, j) for i, j, _ in pairs([jnp.asarray(w) for w in words], shape.bits)])
    return np.arange(shape.per)[:, None]


def _halves(shape: Shape, dtype) -> bool:
    return shape.bits < 8 and dtype == jnp.bfloat16


def permute(x: jax.Array, shape: Shape, tile: Tile, rows: int) -> jax.Array:
    """x (m, k) -> (m, rows · per) with the columns of each chunk as the kernel unpacks them; zeros fill up."""
    order = _order(shape, x.dtype)
    x = jnp.pad(x, ((0, 0), (0, rows * shape.per - shape.k)))
    x = x.reshape(shape.m, rows // tile.rows, tile.rows, shape.per)[..., order]  # (m, chunks, rows, groups of codes, 2)
    return x.transpose(0, 1, 3, 2, 4).reshape(shape.m, rows * shape.per)


def _unpacked(words: list[jax.Array], shape: Shape, dtype) -> list[jax.Array]:
    """The codes of a chunk as tiles (chunk, n); two 0/1 planes for ternary weights. Halves carry the offset 128."""
    if _halves(shape, dtype):
        found = [pair for _, _, pair in pairs(words, shape.bits)]
        planes = [[p & constant(0x10001) for p in found], [shift_right(p, 1) & constant(0x10001) for p in found]]
        to_float = lambda p: pltpu.bitcast(p | constant(0x43004300), jnp.bfloat16)
    else:
        found = codes(words, shape.bits)
        planes = [[c & 1 for c in found], [shift_right(c, 1) & 1 for c in found]]
        to_float = lambda c: as_float32(c).astype(dtype)
    return [jnp.concatenate([to_float(p) for p in plane], axis=0) for plane in (planes if shape.ternary else [found])]


def _load_words(w_refs, chunk: int, tile: Tile, count: int) -> list[jax.Array]:
    """The words (or the triple) of a chunk (rows, n). Strided loads need blocks of 128 columns."""
    first = chunk * tile.rows * count
    if count == 1:
        return [w_refs[0][first : first + tile.rows, :]]
    load = lambda ref, i: ref[pl.ds(first + i, tile.rows, stride=count), :]
    return [jnp.concatenate([load(ref, i) for ref in w_refs], axis=1) for i in range(count)]


def _kernel(x_ref, s_ref, z_ref, *refs, shape: Shape, tile: Tile):
    *w_refs, y_ref, acc_ref = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    count, size = WORDS[shape.bits], tile.rows * shape.per
    dtype = x_ref.dtype
    offset = 128.0 if _halves(shape, dtype) else 0.0
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    doubled = 2 if _halves(shape, dtype) else 1
    for chunk in range(tile.chunks):
        x = x_ref[:, chunk * size : (chunk + 1) * size]
        if tile.segments > 1:  # one copy for each group, zero elsewhere
            place = remainder(jax.lax.broadcasted_iota(jnp.int32, (1, size), 1), tile.rows * doubled)
            segment = quotient(place, doubled * tile.rows // tile.segments)
            wide = x.astype(jnp.float32)  # not every TPU computes in bfloat16
            x = jnp.concatenate([jnp.where(segment == i, wide, 0) for i in range(tile.segments)], axis=0).astype(dtype)
        words = _load_words(w_refs, chunk, tile, count)
        total = jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)
        dots = [
            jnp.dot(x, w, precision=precision, preferred_element_type=jnp.float32)
            for w in _unpacked(words, shape, dtype)
        ]
        y = jnp.zeros((tile.m, tile.n), jnp.float32)
        for i in range(tile.segments):
            rows = slice(i * tile.m, (i + 1) * tile.m)
            group = 0 if shape.groups == 1 else chunk * tile.segments + i
            scale, zero = s_ref[group : group + 1, :], z_ref[group : group + 1, :]
            if shape.ternary:
                one, two = (d[rows] - offset * total[rows] for d in dots)
                y += scale * one + zero * two
            else:
                y += scale * (dots[0][rows] - (zero + offset) * total[rows])
        acc_ref[...] += y

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        y_ref[...] = acc_ref[...].astype(y_ref.dtype)


def matmul(x, words, scales, zeros, shape: Shape, tile: Tile | None = None, interpret: bool = False) -> jax.Array:
    """x (m, k), bfloat16 or float32, times the packed matrix -> (m, n); `scales`, `zeros` or levels float32 (G, n)."""
    tile = tile_for(shape) if tile is None else tile
    if tile is None:
        order = "in act-order " if shape.act_order else ""
        raise ValueError(f"implementation: groups {order}of {shape.group} inputs do not fit the TPU kernel; use 'xla'")
    count, per = WORDS[shape.bits], shape.per
    steps = -(-shape.rows // (tile.rows * tile.chunks))
    rows = steps * tile.rows * tile.chunks
    x = permute(x, shape, tile, rows)
    groups = 1 if shape.groups == 1 else tile.chunks * tile.segments
    if (
        shape.groups > 1
    ):  # what lies behind the end of an array may be NaN; of words any bits will do, as x is zero there
        scales, zeros = (jnp.pad(a, ((0, steps * groups - shape.groups), (0, 0))) for a in (scales, zeros))
    table = pl.BlockSpec((groups, tile.n), lambda m, n, k: (0 if shape.groups == 1 else k, n))
    parts = 1 if count == 1 else tile.n // 128
    block = (tile.rows * tile.chunks * count, tile.n // parts)
    blocks = [pl.BlockSpec(block, lambda m, n, k, i=i: (k, n * parts + i)) for i in range(parts)]
    return pl.pallas_call(
        functools.partial(_kernel, shape=shape, tile=tile),
        out_shape=jax.ShapeDtypeStruct((shape.m, shape.n), x.dtype),
        grid=(-(-shape.m // tile.m), -(-shape.n // tile.n), steps),
        in_specs=[
            pl.BlockSpec((tile.m, tile.rows * tile.chunks * per), lambda m, n, k: (m, k)),
            table,
            table,
            *blocks,
        ],
        out_specs=pl.BlockSpec((tile.m, tile.n), lambda m, n, k: (m, n)),
        scratch_shapes=[pltpu.VMEM((tile.m, tile.n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=shape.cost(x.dtype),
        interpret=interpret,
        name=f"lowbit_matmul_{shape.bits}_bits",
    )(x, scales, zeros, *[words] * parts)
