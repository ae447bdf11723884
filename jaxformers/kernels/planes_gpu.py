"""Pallas-Triton kernels for weights in planes. The layout is :mod:`jaxformers.kernels.planes_layout`'s.

`matmul` copies cells, scales and x ahead into shared memory, loads cells from there as the matrix units want their
operand, and turns two codes at a time into numbers by two or three instructions (PTX: a compiler left to itself takes
one code at a time). The product is formed as (outputs, rows of x), so that weights are the operand that comes from
registers. Codes less zeros are whole numbers, which bfloat16 holds exactly; sums and scales are float32.

Four warps a program and 64 rows take Hopper's matrix instructions, fewer of either the older ones. Products of up to 32
rows in 16 bits are :mod:`jaxformers.kernels.planes_mosaic`'s.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxformers.kernels.codes import quotient, remainder
from jaxformers.kernels.lazy import pl, plgpu
from jaxformers.kernels.planes_layout import CELL, ROWS, Planes, Shape, scales_and_zeros


@dataclasses.dataclass(frozen=True)
class Tile:
    """A program computes `m` rows of x × `n` outputs of the matrix over one of `splits` parts of the inputs."""

    n: int
    m: int
    splits: int = 1
    warps: int = 4
    stages: int = 4


def tile_for(shape: Shape, dtype: Any) -> Tile | None:
    """The tile that was fastest on an H100, or None where :func:`dense` and XLA's product are (or for float32).

    Measured for k = n = 4096 and 8192, groups of 128, bfloat16 (benchmarks/results/kernels_lowbit.md); other sizes and
    float16 go by these. Up to 32 rows only the interpreter comes here.
    """
    m, bits = shape.m, shape.bits
    if dtype == jnp.float32 or m > (64 if bits == 3 or shape.ternary else 256):
        return None
    wanted = 256 if bits == 4 and m > 64 else 128  # programs; there are 132 multiprocessors
    splits = min(8, pl.next_power_of_2(max(1, wanted // (-(-shape.n // 64) * -(-m // 64)))))
    return Tile(64, 64, splits=splits, warps=4, stages=3)


# -------------------------------------------------------------------------------------------- codes into mantissas


def _magic(dtype: Any) -> tuple[int, int]:
    """(bits of a power of two whose mantissa's last place is 1, that number): bfloat16 128, float16 1024."""
    return (0x4300, 128) if dtype == jnp.bfloat16 else (0x6400, 1024)


def _asm(body: str, cells: list[jax.Array], dtype: Any) -> jax.Array:
    """Two cells at a time: `body` leaves two numbers in $0, of the registers $1, …; t and u are to its use."""
    kind = "bf16x2" if dtype == jnp.bfloat16 else "f16x2"
    return plgpu.elementwise_inline_asm(
        "{ .reg .b32 t, u; " + body.replace("KIND", kind) + " }",
        args=cells,
        constraints=",".join(["=r"] + ["r"] * len(cells)),
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(cells[0].shape, dtype)],
    )[0]


def _shift(source: str, by: int) -> str:
    """PTX: `source` shifted right (left if negative) to t, both cells at once; what spills over is masked."""
    if by == 0:
        return f"mov.b32 t, {source};"
    return f"shr.u32 t, {source}, {by};" if by > 0 else f"shl.b32 t, {source}, {-by};"


def _and_or(target: str, mask: int, other: str) -> str:
    return f"lop3.b32 {target}, t, {hex(mask * 0x10001)}, {other}, 0xEA;"


def plane_ptx(j: int, bits: int, dtype: Any) -> tuple[list[int], str]:
    """(which cells, PTX) that make of them, and of zeros as the last argument, the codes of plane j less the zeros."""
    per, magic = CELL // bits, hex(_magic(dtype)[0] * 0x10001)
    if bits == 3 and j == 15:  # the code whose bits are the last of three cells
        body = "".join(_shift(f"${i + 1}", 15 - i) + _and_or("u", 1 << i, magic if i == 0 else "u") for i in range(3))
        return [0, 1, 2], body + "sub.rn.KIND $0, u, $4;"
    cell, j = divmod(j, per)
    body = _shift("$1", bits * j)
    if not apart(bits, dtype):
        return [cell], body + _and_or("t", 2**bits - 1, magic) + "sub.rn.KIND $0, t, $2;"
    # Eight bits exceed the seven of the mantissa: halves of four, 128 + low and 2048 + 16 · high, all steps exact.
    body += _and_or("u", 15, magic) + "shr.u32 t, t, 4;" + _and_or("t", 15, hex(0x45004500))
    body += "{ .reg .b32 a, b; mov.b32 a, 0x43004300; mov.b32 b, 0x45004500; "
    body += "sub.rn.KIND u, u, a; sub.rn.KIND t, t, b; } sub.rn.KIND t, t, $2; add.rn.KIND $0, t, u;"
    return [cell], body


def bit_ptx(at: int, dtype: Any) -> str:
    """PTX that makes 0 or 1 of bit ``at`` of a cell."""
    one = 0x3F80 if dtype == jnp.bfloat16 else 0x3C00
    return _shift("$1", at) + f"and.b32 t, t, 0x10001; mul.lo.u32 $0, t, {hex(one)};"


def _plane(cells: list[jax.Array], zeros, j: int, bits: int, dtype: Any, interpret: bool) -> jax.Array:
    """The codes of plane j less `zeros` (which holds :func:`_magic`'s number more, see :func:`_zeros`), in `dtype`."""
    if not interpret:
        which, body = plane_ptx(j, bits, dtype)
        return _asm(body, [*(cells[i] for i in which), zeros], dtype)
    per = CELL // bits
    wide = [c.astype(jnp.int32) & 0xFFFF for c in cells]
    if bits == 3 and j == 15:
        code = sum((c >> 15) << i for i, c in enumerate(wide))
    else:
        code = wide[j // per] >> (bits * (j % per))
    magic = 0 if apart(bits, dtype) else _magic(dtype)[1]
    return ((code & (2**bits - 1)) + magic).astype(jnp.float32).astype(dtype) - zeros


def apart(bits: int, dtype: Any) -> bool:
    """Do codes exceed the mantissa, so that nothing is added to them (and to zeros)?"""
    return bits == 8 and dtype == jnp.bfloat16


def _zeros(zeros: jax.Array, bits: int, dtype: Any) -> jax.Array:
    """Zeros in `dtype`, with the power of two that codes in a mantissa come with."""
    return (zeros + (0 if apart(bits, dtype) else _magic(dtype)[1])).astype(jnp.float32).astype(dtype)


def _bit(cells: jax.Array, at: int, dtype: Any, interpret: bool) -> jax.Array:
    """Bit `at` of every cell as 0 or 1."""
    if interpret:
        return ((cells.astype(jnp.int32) >> at) & 1).astype(jnp.float32).astype(dtype)
    return _asm(bit_ptx(at, dtype), [cells], dtype)


# -------------------------------------------------------------------------------------------------------- kernels


def _load(ref, index, mask):
    return plgpu.load(ref.at[index]) if mask is None else plgpu.load(ref.at[index], mask=mask, other=0)


def _both(*masks):
    """The conjunction of those that are not None, or None."""
    masks = [m for m in masks if m is not None]
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _load_cells(ref, col, at, mask, shape: Shape) -> list[jax.Array]:
    """The cells of outputs `col` (a,) in the units `at` (a,): one (a, plane) array, or three at 3 bits."""
    lane = jnp.arange(shape.plane)
    where = quotient(col, ROWS)[:, None], at[:, None], remainder(col, ROWS)[:, None]
    mask = None if mask is None else mask[:, None]
    return [_load(ref, (*where, (c * shape.plane + lane)[None, :]), mask) for c in range(3 if shape.bits == 3 else 1)]


def _load_levels(ref, first, col, mask, shape: Shape) -> jax.Array:
    """Levels of outputs `col` (a,) for the plane whose first input is `first` (a,)."""
    group = jnp.minimum(quotient(first, shape.group), shape.groups - 1) if shape.groups > 1 else jnp.zeros_like(col)
    return _load(ref, (group, col), mask)


def _kernel(x_ref, c_ref, l_ref, *rest, shape: Shape, tile: Tile, interpret: bool):
    n_ref, y_ref = rest if shape.ternary else (None, *rest)
    bits, plane, dtype = shape.bits, shape.plane, x_ref.dtype
    step_size, run = shape.unit, shape.run
    planes = step_size // plane
    units = -(-shape.k // step_size)
    steps = -(-units // tile.splits)
    first = pl.program_id(2) * steps
    col = pl.program_id(1) * tile.n + jnp.arange(tile.n)
    row = pl.program_id(0) * tile.m + jnp.arange(tile.m)
    in_n = None if shape.n % tile.n == 0 else col < shape.n
    in_m = None if shape.m % tile.m == 0 else (row < shape.m)[:, None]
    whole = units % tile.splits == 0  # every step of every part lies inside the matrix

    def step(i, acc):
        at = first + i
        ats = jnp.full_like(col, at)
        cells = _load_cells(c_ref, col, ats, _both(in_n, None if whole else ats < units), shape)

        def x(j):
            k = (at * step_size + j * plane + jnp.arange(plane))[None, :]
            in_k = None if whole and shape.k % step_size == 0 else k < shape.k
            return _load(x_ref, (row[:, None], k), _both(in_m, in_k)).T

        def levels(ref, j):
            return _load_levels(ref, ats * step_size + j * plane, col, in_n, shape)

        def dot(weights, j, total):
            return jnp.dot(weights, x(j), preferred_element_type=jnp.float32) + total

        for j0 in range(0, planes, run):
            scale, zero = scales_and_zeros(levels(l_ref, j0))
            own = jnp.zeros((tile.n, tile.m), jnp.float32) if shape.groups > 1 or shape.ternary else acc
            if shape.ternary:
                other = own
                for j in range(j0, j0 + run):
                    own = dot(_bit(cells[0], 2 * j, dtype, interpret), j, own)
                    other = dot(_bit(cells[0], 2 * j + 1, dtype, interpret), j, other)
                acc = acc + scale[:, None] * own + levels(n_ref, j0)[:, None] * other
                continue
            zeros = jnp.broadcast_to(_zeros(zero, bits, dtype)[:, None], cells[0].shape)
            for j in range(j0, j0 + run):
                own = dot(_plane(cells, zeros, j, bits, dtype, interpret), j, own)
            acc = acc + scale[:, None] * own if shape.groups > 1 else own
        return acc

    acc = jnp.zeros((tile.n, tile.m), jnp.float32)
    acc = step(0, acc) if steps == 1 else lax.fori_loop(0, steps, step, acc)
    if shape.groups == 1 and not shape.ternary:
        acc = acc * scales_and_zeros(_load_levels(l_ref, col, col, in_n, shape))[0][:, None]
    mask = (row < shape.m)[None, :] & (col < shape.n)[:, None]
    plgpu.store(y_ref.at[pl.program_id(2), row[None, :], col[:, None]], acc.astype(y_ref.dtype), mask=mask)


def _dense_kernel(c_ref, l_ref, *rest, shape: Shape, rows: int, interpret: bool):
    n_ref, y_ref = rest if shape.ternary else (None, *rest)
    step_size, run = shape.unit, shape.run
    col = pl.program_id(0) * rows + jnp.arange(rows)
    at = jnp.full_like(col, pl.program_id(1))
    in_n = None if shape.n % rows == 0 else col < shape.n
    codes = y_ref.dtype if y_ref.dtype == jnp.float16 else jnp.bfloat16  # float32 is wider than need be
    cells = _load_cells(c_ref, col, at, in_n, shape)
    for j in range(step_size // shape.plane):
        first = at * step_size + j * shape.plane
        if j % run == 0:
            scale, zero = scales_and_zeros(_load_levels(l_ref, first, col, in_n, shape))
            negative = _load_levels(n_ref, first, col, in_n, shape) if shape.ternary else None
        if shape.ternary:
            one, two = (_bit(cells[0], 2 * j + i, codes, interpret).astype(jnp.float32) for i in (0, 1))
            value = scale[:, None] * one + negative[:, None] * two
        else:
            zeros = jnp.broadcast_to(_zeros(zero, shape.bits, codes)[:, None], cells[0].shape)
            value = scale[:, None] * _plane(cells, zeros, j, shape.bits, codes, interpret).astype(jnp.float32)
        k = first[:, None] + jnp.arange(shape.plane)[None, :]
        mask = _both(None if in_n is None else in_n[:, None], None if shape.k % step_size == 0 else k < shape.k)
        plgpu.store(y_ref.at[col[:, None], k], value.astype(y_ref.dtype), mask=mask)


# ---------------------------------------------------------------------------------------------------------- calls


def _arrays(planes: Planes) -> list[jax.Array]:
    return [a for a in planes if a is not None]


def _cost(shape: Shape, dtype: Any, flops: int):
    size = jnp.dtype(dtype).itemsize
    moved = 2 * math.prod(shape.cells) + 4 * shape.groups * shape.n * (2 if shape.ternary else 1)
    moved += size * (shape.m * (shape.k + shape.n) if flops else shape.k * shape.n)
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)


def matmul(x: jax.Array, planes: Planes, shape: Shape, tile: Tile, interpret: bool = False) -> jax.Array:
    """x (m, k), bfloat16 or float16, times the matrix -> (m, n) in the dtype of x."""
    out = jax.ShapeDtypeStruct((tile.splits, shape.m, shape.n), x.dtype if tile.splits == 1 else jnp.float32)
    partial = pl.pallas_call(
        functools.partial(_kernel, shape=shape, tile=tile, interpret=interpret),
        out_shape=out,
        grid=(-(-shape.m // tile.m), -(-shape.n // tile.n), tile.splits),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=_cost(shape, x.dtype, 2 * shape.m * shape.k * shape.n),
        interpret=interpret,
        name=f"planes_matmul_{shape.bits}_bits",
    )(x, *_arrays(planes))
    return functools.reduce(jnp.add, [partial[i] for i in range(tile.splits)]).astype(x.dtype)  # fuses; a sum would not


def dense(planes: Planes, shape: Shape, dtype: Any, rows: int = 64, interpret: bool = False) -> jax.Array:
    """The transposed matrix (n, k) in `dtype`: whole numbers times scales in float32, rounded once."""
    return pl.pallas_call(
        functools.partial(_dense_kernel, shape=shape, rows=rows, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct((shape.n, shape.k), dtype),
        grid=(-(-shape.n // rows), -(-shape.k // shape.unit)),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        cost_estimate=_cost(shape, dtype, 0),
        interpret=interpret,
        name=f"planes_dense_{shape.bits}_bits",
    )(*_arrays(planes))
