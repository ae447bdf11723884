"""Products of few rows with weights in planes, for Hopper, in Pallas-Mosaic-GPU: what decoding waits for.

The layout is :mod:`jaxformers.kernels.planes_layout`'s. A program has some blocks of 16 outputs, and each of its warps
every so many'th unit of the inputs. Weights go from memory to registers, 16 bytes a thread at a time, where they lie as
the matrix units want them: which of a plane's inputs is called the k-th is free, so long as x agrees, so that of each
32 inputs a thread holds eight neighbours. A warp loads the next unit while it multiplies one; in the end the warps'
sums, float32, are added in shared memory.

Kernels follow each other closely: what this one needs of the weights it has the L2 cache fetch before it waits for the
kernel ahead of it, and lets the next one begin as soon as it has waited itself (programmatic dependent launch, from JAX
0.11 on; with older versions the two instructions do nothing). A prefetch is no read: even weights that the kernel ahead
writes are read after the wait.

Bytes: the cells once, k·n·bits / 8, 4·n a group, x (m·k) once for each program, from L2, and m·n. FLOPs 2·m·k·n.
"""

import dataclasses
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
    """A program computes ``blocks`` of 16 outputs, with ``warps`` (a multiple of 4) that share the inputs."""

    blocks: int = 2
    warps: int = 8


def takes(shape: Shape, dtype: Any) -> bool:
    """Whether :func:`matmul` can be called so."""
    size = max(shape.k * shape.n * shape.bits // 8, shape.m * max(shape.k, shape.n) * 2)
    return 0 < shape.m <= MOST and dtype in (jnp.bfloat16, jnp.float16) and shape.k % 8 == 0 and size < 2**31


def tile_for(shape: Shape) -> Tile:
    """The tile that was fastest on an H100 (benchmarks/results/kernels_lowbit.md)."""
    return Tile()


def fetch(w: Any, cells: Any, shape: Shape, tile: Tile) -> None:
    """Have L2 fetch this program's cells, which lie side by side for each block."""
    blocks, units, _, lanes = shape.cells
    size = units * ROWS * lanes * 2
    for b in range(tile.blocks):
        block = w.program * tile.blocks + b
        w.prefetch(cells, block * (units * ROWS * lanes), size, w.both(w.thread < 1, block < blocks))


def compute(w: Any, x: Any, cells: Any, levels: Any, negative: Any, y: Any, sums: Any, shape: Shape, tile: Tile) -> None:
    """What one thread does, on references to the arrays and to shared memory (warps · blocks · 16 · columns floats)."""
    dtype = jnp.bfloat16 if w.half == "bf16" else jnp.float16
    bits, plane, unit = shape.bits, shape.plane, shape.unit
    blocks, units, _, lanes = shape.cells
    columns = -(-shape.m // 8)  # of eight rows of x
    steps = -(-units // tile.warps)
    runs = unit // plane // shape.run
    parts = 1 if bits == 3 else plane // 32  # of a plane, 32 inputs each
    g, t = w.lane // 4, w.lane % 4  # this thread's row (and g + 8), and eighth of 32 inputs

    def load_cells(i):
        """[block][row g or g + 8][32 cells] -> four registers, each two neighbouring cells."""
        at = i * tile.warps + w.warp
        inside = w.both(i < steps, True if units % tile.warps == 0 else at < units)

        def one(b, row, q):
            block = w.least(w.program * tile.blocks + b, blocks - 1)
            return w.load(cells, ((block * units + at) * ROWS + row) * lanes + 32 * q + t * 8, inside, once=True)

        return [[[one(b, row, q) for q in range(lanes // 32)] for row in (g, g + 8)] for b in range(tile.blocks)]

    def load_run(i, r):
        """(x, levels, negative levels) of run r: [plane, part][column] -> four registers; [block][row g or g + 8]."""
        at = i * tile.warps + w.warp
        inside = w.both(i < steps, True if units % tile.warps == 0 else at < units)
        group = at * unit + r * shape.run * plane

        def part(j, q, c):
            k = group + j * plane + 32 * q + t * 8
            rows = True if shape.m % 8 == 0 or c < columns - 1 else g < shape.m - 8 * c
            where = w.both(inside, rows, True if shape.k % unit == 0 else k < shape.k)
            return w.load(x, (g + 8 * c) * shape.k + k, where)

        def level(table, b, row):
            output = w.least((w.program * tile.blocks + b) * ROWS + row, shape.n - 1)
            of = 0 if shape.groups == 1 else w.least(group // shape.group, shape.groups - 1)
            return w.load(table, of * shape.n + output, inside, n=1)[0]

        tables = [levels] if negative is None else [levels, negative]
        return (
            [[part(j, q, c) for c in range(columns)] for j in range(shape.run) for q in range(parts)],
            [[[level(table, b, row) for row in (g, g + 8)] for b in range(tile.blocks)] for table in tables],
        )

    def numbers(held, j, q, b, zeros, bit=None):
        """The four registers, two of each row, of 16 inputs each (two of them) of plane j's part q."""
        found = []
        for s in (0, 1):
            for half in (0, 1):
                for row in (0, 1):
                    if bit is not None:
                        found.append(w.ptx(bit_ptx(2 * j + bit, dtype), [held[b][row][q][2 * s + half]]))
                        continue
                    which, body = plane_ptx(j, bits, dtype)
                    own = [held[b][row][c if bits == 3 else q][2 * s + half] for c in which]
                    found.append(w.ptx(body, [*own, zeros[row]]))
        return found[:4], found[4:]

    def multiply(acc, held, r, run):
        values, tables = run
        out = []
        for b in range(tile.blocks):
            scales = [[w.as_float(level & 0xFFFFFF00 if i == 0 else level) for level in table[b]]
                      for i, table in enumerate(tables)]
            zeros = None if shape.ternary else [_zeros(w, level & 0xFF, bits, dtype) for level in tables[0][b]]
            mine = acc[b]
            for i, scale in enumerate(scales):
                own = [[w.zero()] * 4 for _ in range(columns)]
                for j in range(shape.run):
                    for q in range(parts):
                        bit = i if shape.ternary else None
                        for s, a in enumerate(numbers(held, r * shape.run + j, q, b, zeros, bit)):
                            of = values[j * parts + q]
                            own = [w.mma(own[c], a, of[c][2 * s : 2 * s + 2]) for c in range(columns)]
                mine = [[w.fma(own[c][e], scale[e // 2], mine[c][e]) for e in range(4)] for c in range(columns)]
            out.append(mine)
        return out

    def step(i, carry):
        acc, held, run = carry
        ahead = load_cells(i + 1)
        for r in range(runs):
            following = load_run(i, r + 1) if r + 1 < runs else load_run(i + 1, 0)
            acc, run = multiply(acc, held, r, run), following
        return acc, ahead, run

    acc = [[[w.zero()] * 4 for _ in range(columns)] for _ in range(tile.blocks)]
    acc, _, _ = w.loop(steps, step, (acc, load_cells(0), load_run(0, 0)))

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
    """x (m, k), bfloat16 or float16, times the matrix -> (m, n) in the dtype of x. For what :func:`takes` takes."""
    tile = tile or tile_for(shape)
    arrays = [a for a in planes if a is not None]
    half = "bf16" if x.dtype == jnp.bfloat16 else "f16"
    columns = -(-shape.m // 8) * 8

    def entry(x_ref, cells_ref, levels_ref, *rest):
        *negative, y_ref, sums = rest
        anything = plmgpu.RefType()

        @plmgpu.inline_mgpu(arg_types=(anything,))
        def before(_, cells):
            fetch(Warp(half), cells, shape, tile)

        @plmgpu.inline_mgpu(arg_types=(anything,) * (5 + len(negative)))
        def product(_, x, cells, levels, *rest):
            *negative, y, sums = rest
            compute(Warp(half), x, cells, levels, *(negative or [None]), y, sums, shape, tile)

        before(cells_ref)
        plmgpu.griddepcontrol_wait()
        plmgpu.griddepcontrol_launch_dependents()
        product(x_ref, cells_ref, levels_ref, *negative, y_ref, sums)

    return plmgpu.kernel(
        entry,
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
