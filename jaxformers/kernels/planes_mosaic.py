"""Products of few rows with weights in planes, for Hopper, in Pallas-Mosaic-GPU: what decoding waits for.

The layout is :mod:`jaxformers.kernels.planes_layout`'s. A program has one or two blocks of 16 outputs, and each of its
warps every so many'th unit of the inputs. Weights go from memory to registers, 16 bytes a thread at a time, where they
lie as the matrix units want them: which of a plane's inputs is called the k-th is free, so long as x agrees, so that of
each 32 inputs a thread holds eight neighbours. A warp loads the next unit, and its levels, while it multiplies one; in
the end the warps' sums, float32, are added in shared memory. So there is no second kernel, and no row but those of x.

``early``: the next kernel may begin before this one ends, and waits then (programmatic dependent launch, from JAX 0.11
on; with older versions the two instructions do nothing).

Bytes: the cells once, k·n·bits / 8, 4·n a group, x (m·k) once for each program, of which L2 serves most, and m·n. FLOPs
2·m·k·n. For m = 1 and k = n = 4096 an H100 takes 5.5 µs at 4 bits, XLA's product of the bfloat16 matrix 14.5 µs; what
was measured, and what did not help, is in benchmarks/results/kernels_lowbit.md.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxformers.kernels.lazy import plmgpu
from jaxformers.kernels.planes_gpu import apart, bit_ptx, plane_ptx
from jaxformers.kernels.planes_layout import ROWS, Planes, Shape
from jaxformers.kernels.warp import Warp

MOST = 32  # rows of x


@dataclasses.dataclass(frozen=True)
class Tile:
    """A program computes ``blocks`` of 16 outputs, with ``warps`` (a multiple of 4) that share the inputs.

    ``early``: it lets the kernel that follows begin while it runs.
    """

    blocks: int = 2
    warps: int = 8
    early: bool = False


def takes(shape: Shape, dtype: Any) -> bool:
    """Whether :func:`matmul` can be called so."""
    small = 2 * math.prod(shape.cells) < 2**32  # bytes: offsets have 32 bits
    return 0 < shape.m <= MOST and dtype in (jnp.bfloat16, jnp.float16) and shape.k % 8 == 0 and small


def tile_for(shape: Shape) -> Tile:
    """The tile that was fastest on an H100 for k = n = 4096, groups of 128, bfloat16."""
    few = shape.m <= 4
    if shape.bits == 8:
        return Tile(2, 16)
    if shape.ternary:
        return Tile(2, 16, early=True) if few else Tile(2, 8)
    if shape.bits == 3 and shape.m > 8:
        return Tile(1, 4)
    return Tile(1, 8, early=shape.bits == 4) if few else Tile(2, 8)


def compute(w: Any, x: Any, cells: Any, tables: list[Any], y: Any, sums: Any, shape: Shape, tile: Tile) -> None:
    """What one thread does: y (m, n) = x (m, k) times the matrix, of references to the arrays in memory.

    ``w``: a :class:`~jaxformers.kernels.warp.Warp`. ``tables``: levels, and for ternary weights the negative ones.
    ``sums``: shared memory, warps · blocks · 16 floats for each row of x, of which there are eights.
    """
    dtype = jnp.bfloat16 if w.half == "bf16" else jnp.float16
    bits, plane, unit = shape.bits, shape.plane, shape.unit
    blocks, units, _, lanes = shape.cells
    columns = -(-shape.m // 8)  # of eight rows of x
    runs = unit // plane // shape.run
    chunks = 3 if bits == 3 else 1  # of eight cells a thread, for 32 inputs of each plane
    parts = lanes // 32 // chunks  # of a unit, 32 inputs of each plane each
    steps = -(-units // tile.warps)
    g, t = w.lane // 4, w.lane % 4  # this thread's row (and g + 8), and eighth of 32 inputs
    rows = (g, g + 8)

    def unit_of(i):
        """(the number, whether there is one) of this warp's unit i."""
        at = i * tile.warps + w.warp
        return at, w.both(i < steps, True if units % tile.warps == 0 else at < units)

    def load_unit(i):
        """Cells [block][row g or g + 8][part, chunk] -> four registers of eight neighbours, and
        levels [run][table][block][row g or g + 8]."""
        at, inside = unit_of(i)

        def cell(b, row, q):
            block = w.least(w.program * tile.blocks + b, blocks - 1)
            return w.load(cells, ((block * units + at) * ROWS + row) * lanes + 32 * q + t * 8, inside, once=True)

        def level(table, r, b, row):
            group = (at * unit + r * shape.run * plane) // shape.group
            group = 0 if shape.groups == 1 else w.least(group, shape.groups - 1)
            output = w.least((w.program * tile.blocks + b) * ROWS + row, shape.n - 1)
            return w.load(table, group * shape.n + output, inside, n=1)[0]

        each = range(tile.blocks)
        return (
            [[[cell(b, row, q) for q in range(parts * chunks)] for row in rows] for b in each],
            [[[[level(table, r, b, row) for row in rows] for b in each] for table in tables] for r in range(runs)],
        )

    def load_x(i, r):
        """[plane, part][column] -> four registers, for run r of unit i."""
        at, inside = unit_of(i)

        def one(j, q, c):
            k = at * unit + (r * shape.run + j) * plane + 32 * q + t * 8
            there = True if shape.m % 8 == 0 or c < columns - 1 else g < shape.m - 8 * c
            where = w.both(inside, there, True if shape.k % unit == 0 else k < shape.k)
            return w.load(x, (g + 8 * c) * shape.k + k, where)

        return [[one(j, q, c) for c in range(columns)] for j in range(shape.run) for q in range(parts)]

    def numbers(held, j, zeros, bit):
        """Plane j's 16 first and 16 last of 32 inputs: four registers each, two of either row."""
        found = []
        for s in range(4):
            for half in (0, 1):
                if bit is not None:
                    found.append(w.ptx(bit_ptx(2 * j + bit, dtype), [held[half][0][s]]))
                    continue
                which, body = plane_ptx(j, bits, dtype)
                found.append(w.ptx(body, [*(held[half][c][s] for c in which), zeros[half]]))
        return found[:4], found[4:]

    def multiply(acc, cells, levels, values, r):
        """acc and the products of run r."""
        out = []
        for b in range(tile.blocks):
            zeros = None if shape.ternary else [_zeros(w, level & 0xFF, bits, dtype) for level in levels[0][b]]
            mine = acc[b]
            for table, found in enumerate(levels):
                own = [[w.zero()] * 4 for _ in range(columns)]
                for j in range(shape.run):
                    for q in range(parts):
                        held = [cells[b][half][q * chunks : (q + 1) * chunks] for half in (0, 1)]
                        weights = numbers(held, r * shape.run + j, zeros, table if shape.ternary else None)
                        for s, a in enumerate(weights):
                            of = [v[2 * s : 2 * s + 2] for v in values[j * parts + q]]
                            own = [w.mma(own[c], a, of[c]) for c in range(columns)]
                scale = [w.as_float(level if table else level & 0xFFFFFF00) for level in found[b]]
                mine = [[w.fma(own[c][e], scale[e // 2], mine[c][e]) for e in range(4)] for c in range(columns)]
            out.append(mine)
        return out

    def step(i, carry):
        acc, (cells, levels), values = carry
        ahead = load_unit(i + 1)
        for r in range(runs):
            following = load_x(i, r + 1) if r + 1 < runs else load_x(i + 1, 0)
            acc, values = multiply(acc, cells, levels[r], values, r), following
        return acc, ahead, values

    acc = [[[w.zero()] * 4 for _ in range(columns)] for _ in range(tile.blocks)]
    acc, _, _ = w.loop(steps, step, (acc, load_unit(0), load_x(0, 0)))

    outputs = tile.blocks * ROWS
    for b in range(tile.blocks):
        for c in range(columns):
            for e in range(4):
                row, column = g + b * ROWS + 8 * (e // 2), t * 2 + 8 * c + e % 2
                w.put(sums, (w.warp * (8 * columns) + column) * outputs + row, acc[b][c][e])
    w.barrier()
    for first in range(0, outputs * shape.m, 32 * tile.warps):
        at = w.thread + first
        row, column = at % outputs, at // outputs
        total = w.get(sums, w.least(at, outputs * 8 * columns - 1))
        for other in range(1, tile.warps):
            total = w.add(total, w.get(sums, w.least(at, outputs * 8 * columns - 1) + other * 8 * columns * outputs))
        output = w.program * outputs + row
        w.store(y, column * shape.n + output, total, w.both(column < shape.m, output < shape.n))


def _zeros(w: Any, zero: Any, bits: int, dtype: Any) -> Any:
    """Two zeros as :func:`plane_ptx` wants them."""
    if not apart(bits, dtype):
        return (zero + (0x4300 if dtype == jnp.bfloat16 else 0x6400)) * 0x10001
    body = "{ .reg .b32 a, b; mov.b32 a, 0x43004300; mov.b32 b, 0x45004500; "
    body += "sub.rn.KIND u, $1, a; sub.rn.KIND t, $2, b; } add.rn.KIND $0, t, u;"
    return w.ptx(body, [((zero & 15) + 0x4300) * 0x10001, ((zero >> 4) + 0x4500) * 0x10001])


def matmul(x: jax.Array, planes: Planes, shape: Shape, tile: Tile | None = None) -> jax.Array:
    """x (m, k), bfloat16 or float16, times the matrix -> (m, n) in the dtype of x.

    Raises ValueError for what :func:`takes` does not take, and for a tile that is no whole number of warpgroups.
    """
    tile = tile or tile_for(shape)
    if not takes(shape, x.dtype) or x.shape != (shape.m, shape.k):
        raise ValueError(f"x: expected up to {MOST} rows in 16 bits for {shape}, found {x.dtype} {x.shape}")
    if tile.warps % 4 or not 0 < tile.warps <= 32:
        raise ValueError(f"tile: warps must be a multiple of 4 up to 32, found {tile}")
    arrays = [a for a in planes if a is not None]
    half = "bf16" if x.dtype == jnp.bfloat16 else "f16"
    columns = -(-shape.m // 8) * 8

    def planes_few_rows(x_ref, cells_ref, *rest):
        *tables, y_ref, sums = rest
        anything = plmgpu.RefType()

        @plmgpu.inline_mgpu(arg_types=(anything,) * (4 + len(tables)))
        def product(_, x, cells, *rest):
            *tables, y, sums = rest
            compute(Warp(half), x, cells, tables, y, sums, shape, tile)

        if tile.early:
            plmgpu.griddepcontrol_wait()
            plmgpu.griddepcontrol_launch_dependents()
        product(x_ref, cells_ref, *tables, y_ref, sums)

    return plmgpu.kernel(
        planes_few_rows,
        out_type=jax.ShapeDtypeStruct((shape.m, shape.n), x.dtype),
        scratch_types=(plmgpu.SMEM((tile.warps * tile.blocks * ROWS * columns,), jnp.float32),),
        grid=(-(-shape.cells[0] // tile.blocks),),
        grid_names=("program",),
        num_threads=tile.warps // 4,
        thread_name="group",
        compiler_params=plmgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plmgpu.LoweringSemantics.Lane
        ),
    )(x, *arrays)
