"""Flash attention's forward pass for Hopper, in Pallas-Mosaic-GPU: causal or unmasked, bfloat16 or float16.

The scheme is that of FlashAttention-3 (arXiv 2407.08608). A program is a few warpgroups. The last only copies: tiles
of queries, keys and values, by TMA, into buffers of shared memory that barriers hand over and back. Each other one owns
some rows of queries, and goes over the tiles of keys from the last that it sees to the first, so that the only tiles
which the causal mask cuts come first. Its probabilities stay in registers, where wgmma takes them from.

One step of the tensor cores is Q Kᵀ of a tile and P V of the tile before. Exponentials run beside it in two ways: a
warpgroup takes those of its new scores while its own P V runs, and warpgroups take turns in issuing products, so that
one's exponentials run while another's products do.

Logarithms, masks and the meaning of both outputs are those of :mod:`jaxformers.kernels.attention_gpu`, whose backward
pass takes them. FLOPs: 4·D·(pairs seen) for each of B·H. Bytes: queries and the output once, keys and values once for
each program, of which L2 serves most, 4·B·H·L for the log-sum-exp.

Of 16 heads, causal, 4 × 4096 tokens take 512 µs on an H100 at size 128 (cuDNN 557, Triton 731) and 375 µs at size 64
(cuDNN 360, Triton 455); 16 384 tokens in one row 1876 µs at size 128 (cuDNN 1989): see
``benchmarks/results/kernels_attention_h100.md``, which also has what did not help.
"""

import dataclasses
import importlib
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxformers.kernels.lazy import pl, plmgpu
from jaxformers.kernels.tiles import MASKED

LOG2E = math.log2(math.e)
SHARED = 227 * 1024  # bytes of shared memory that a program may use
L2 = 16 * 2**20  # bytes of keys and values that programs which run at a time should share: a third of the L2 cache
REGISTERS = {1: (40, 232), 2: (40, 232), 3: (32, 160)}  # per thread, of the copying and of each other warpgroup


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the kernel is cut.

    ``k``: keys a tile; ``rows``: queries a warpgroup; ``groups``: how many warpgroups have some; ``stages``: buffers of
    keys and of values.
    """

    k: int = 128
    rows: int = 64
    groups: int = 2
    stages: int = 2

    @property
    def q(self) -> int:
        """Queries a program has."""
        return self.rows * self.groups


def default_tile(size: int) -> Tile:
    """The fastest that was measured for a head size."""
    return Tile(stages=2 if size > 64 else 4)


def takes(q: Any, k: Any, v: Any, *, causal: bool, scale: float, start: int = 0, tile: Tile | None = None) -> bool:
    """Whether :func:`forward` can be called so. Arrays as there; ``jax.ShapeDtypeStruct`` will do."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or scale < 1e-9:
        return False
    (batch, queries, heads, size), (_, keys, kv_heads, _) = q.shape, k.shape
    if k.shape != (batch, keys, kv_heads, size) or size not in (64, 128) or heads % kv_heads:
        return False
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        return False
    tile = tile or default_tile(size)
    whole = tile.rows % 64 == 0 and (tile.k % tile.rows == 0 or (tile.rows % tile.k == 0 and tile.k % 64 == 0))
    shared = 2 * size * (tile.q + 2 * tile.stages * tile.k) + 4 * tile.q + 2048  # about
    if not whole or tile.groups not in REGISTERS or shared > SHARED:
        return False
    if not queries or queries % tile.q or not keys or keys % tile.k:
        return False
    return not causal or (isinstance(start, int) and 0 <= start <= keys - queries and start % tile.rows == 0)


@dataclasses.dataclass(frozen=True)
class _Work:
    """Which queries are whose, and which keys they see."""

    tile: Tile
    queries: int
    keys: int
    heads: int
    group: int  # heads that share keys
    causal: bool
    start: int
    span: int  # heads that are worked on side by side

    def place(self) -> tuple[Any, Any, Any]:
        """(batch, head, first query) of this program; the queries that see most keys go first."""
        blocks = self.queries // self.tile.q
        section, rest = _divide(jax.lax.axis_index("program"), self.span * blocks)
        level, head = _divide(rest, self.span)
        b, head = _divide(section * self.span + head, self.heads)
        return b, head, (blocks - 1 - level) * self.tile.q

    def key_tiles(self, last):
        """How many tiles of keys the query ``last``, and those up to a tile's rows before it, see."""
        if not self.causal:
            return jnp.int32(self.keys // self.tile.k)
        return _divide(last + self.start, self.tile.k)[0] + 1


def _divide(a, b: int):
    """(a // b, a % b) of numbers that are not negative."""
    if b == 1:
        return a, jnp.int32(0)
    return jax.lax.div(a, jnp.int32(b)), jax.lax.rem(a, jnp.int32(b))


def _copy(work: _Work, x: dict[str, Any], m: dict[str, Any]) -> None:
    """The copying warpgroup: fill each buffer as soon as its last readers have handed it back."""
    tile = work.tile
    batch, head, first = work.place()
    kv_head = _divide(head, work.group)[0]
    for w in range(tile.groups):
        rows = pl.ds(first + w * tile.rows, tile.rows)
        plmgpu.copy_gmem_to_smem(x["q"].at[batch, rows, head], m["q"].at[w], m["q_full"].at[w])
    tiles = work.key_tiles(first + tile.q - 1)

    def step(t, _):
        slot = _divide(t, tile.stages)[1]
        rows = pl.ds((tiles - 1 - t) * tile.k, tile.k)
        for name in ("k", "v"):
            plmgpu.barrier_wait(m[f"{name}_free"].at[slot])
            source = x[name].at[batch, rows, kv_head]
            plmgpu.copy_gmem_to_smem(source, m[name].at[slot], m[f"{name}_full"].at[slot])

    jax.lax.fori_loop(jnp.int32(0), tiles, step, None)


def _attend(work: _Work, w, x: dict[str, Any], m: dict[str, Any], scale: float) -> None:
    """Warpgroup w of those that have queries. Tiles of keys are numbered as they come: the last first."""
    tile, size, dtype = work.tile, x["q"].shape[-1], x["q"].dtype
    factor, shape = scale * LOG2E, (work.tile.rows, work.tile.k)
    cut = max(1, tile.rows // tile.k) if work.causal else 0  # tiles of keys that the mask cuts
    batch, head, first = work.place()
    first = first + w * tile.rows
    end = work.key_tiles(first + (tile.groups - w) * tile.rows - 1)
    begin = end - work.key_tiles(first + tile.rows - 1)
    slot = lambda t: _divide(t, tile.stages)[1]
    below = lambda t: (end - 1 - t) * tile.k - first - work.start  # key − query of a tile's [0, 0]
    per_row = lambda a, columns: jax.lax.broadcast_in_dim(a, (tile.rows, columns), [0])

    def turn(wait: bool):
        """Wait for this warpgroup's turn to issue products, or hand it on."""
        if wait:
            plmgpu.barrier_wait(m["turn"].at[w])
        else:
            plmgpu.barrier_arrive(m["turn"].at[jnp.where(w == tile.groups - 1, 0, w + 1)])

    def softmax(s, top, below=None):
        """(probabilities, their sums, the new maxima, what older sums shrink by); masked if ``below`` is given."""
        if below is not None:
            iota = lambda axis: plmgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plmgpu.Layout.WGMMA)
            s = jnp.where(iota(0) >= iota(1) + below, s, 2 * MASKED)
        new = s.max(axis=1)
        if below is not None:
            new = jnp.maximum(new, MASKED)
        shrink = None
        if top is not None:
            new = jnp.maximum(top, new)
            shrink = jnp.exp2(top * factor - new * factor)
        p = jnp.exp2(s * factor - per_row(new * factor, tile.k))
        return p, p.sum(axis=1), new, shrink

    # what a buffer waits for is that all have handed it back: at first nobody has to read it
    for name in ("k_free", "v_free"):
        for s in range(tile.stages):
            plmgpu.barrier_arrive(m[name].at[s])
    pl.when(w == tile.groups - 1)(lambda: turn(False))

    def pass_by(t, _):
        """A tile that only other warpgroups see."""
        for name in ("k", "v"):
            plmgpu.barrier_wait(m[f"{name}_full"].at[slot(t)])
            plmgpu.barrier_arrive(m[f"{name}_free"].at[slot(t)])
        turn(True)
        turn(False)

    jax.lax.fori_loop(jnp.int32(0), begin, pass_by, None)

    plmgpu.barrier_wait(m["q_full"].at[w])
    plmgpu.barrier_wait(m["k_full"].at[slot(begin)])
    turn(True)

    def scores(acc):
        plmgpu.wgmma(acc, m["q"].at[w], m["k"].at[slot(begin)].transpose((1, 0)))
        turn(False)
        return acc[...]

    s = pl.run_scoped(scores, plmgpu.ACC(shape, jnp.float32))
    plmgpu.barrier_arrive(m["k_free"].at[slot(begin)])
    p, total, top, _ = softmax(s, None, below(begin) if cut else None)
    acc = plmgpu.layout_cast(jnp.zeros((tile.rows, size), jnp.float32), plmgpu.Layout.WGMMA)

    def step(t, carry, masked=False):
        """Scores of tile t, and their exponentials beside the values of the tile before."""
        acc, total, top, p = carry
        plmgpu.barrier_wait(m["v_full"].at[slot(t - 1)])
        plmgpu.barrier_wait(m["k_full"].at[slot(t)])
        turn(True)
        acc, p = jax.lax.optimization_barrier((acc, p))  # in their registers before the first product is issued

        def products(s_acc):
            plmgpu.wgmma(s_acc, m["q"].at[w], m["k"].at[slot(t)].transpose((1, 0)))
            out = _add_product(acc, p, m["v"].at[slot(t - 1)])
            turn(False)
            s = plmgpu.wgmma_accumulator_load(s_acc, wait_n=1)
            plmgpu.barrier_arrive(m["k_free"].at[slot(t)])
            new_p, *rest = jax.lax.optimization_barrier(softmax(s, top, below(t) if masked else None))
            _settle(rest[0])
            plmgpu.wgmma_wait(0)  # until then p is read, and the new one must not be rounded into its place
            out, new_p = jax.lax.optimization_barrier((out, new_p))
            plmgpu.barrier_arrive(m["v_free"].at[slot(t - 1)])
            return out, new_p.astype(dtype), *rest

        acc, p, summed, top, shrink = pl.run_scoped(products, plmgpu.ACC(shape, jnp.float32))
        return acc * per_row(shrink, size), total * shrink + summed, top, p

    carry = acc, total, top, p.astype(dtype)
    for t in range(1, cut):
        carry = step(begin + t, carry, masked=True)
    acc, total, top, p = jax.lax.fori_loop(begin + max(cut, 1), end, step, carry)

    plmgpu.barrier_wait(m["v_full"].at[slot(end - 1)])

    def last(o_acc):
        o_acc[...] = acc
        plmgpu.wgmma(o_acc, p, m["v"].at[slot(end - 1)])
        return o_acc[...]

    acc = pl.run_scoped(last, plmgpu.ACC((tile.rows, size), jnp.float32))

    m["q"].at[w][...] = (acc * per_row(1.0 / total, size)).astype(dtype)  # the queries are not needed any more
    m["lse"].at[w][...] = top * scale + jnp.log(total)
    plmgpu.commit_smem()
    rows = pl.ds(first, tile.rows)
    plmgpu.copy_smem_to_gmem(m["q"].at[w], x["out"].at[batch, rows, head])
    plmgpu.copy_smem_to_gmem(m["lse"].at[w], x["lse"].at[batch, head, rows])
    plmgpu.wait_smem_to_gmem(0)


def _add_product(acc: jax.Array, p: jax.Array, v: Any) -> jax.Array:
    """acc + p v, begun and not waited for: ``plmgpu.wgmma`` with p in registers, less the fence that it puts before.

    All of p and acc must be in registers already, with a fence since. Across a fence of p the compiler lets no product
    run on that was begun before, and so would serialize the two of a step.
    """
    layout = plmgpu.Layout.WGMMA
    result = plmgpu.ShapeDtypeStruct(acc.shape, acc.dtype, layout=layout)
    held = plmgpu.RefType((plmgpu.TilingTransform((8, 64)), plmgpu.SwizzleTransform(128)))

    @plmgpu.inline_mgpu(arg_types=(layout, layout, held), return_type=result)
    def product(_, acc, p, v):
        from jax.experimental.mosaic import gpu
        from jax.experimental.mosaic.gpu import mma_utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm, nvvm

        module = importlib.import_module("jax.experimental.mosaic.gpu.wgmma")  # its package has a function named so
        rows, size = acc.shape
        (base, (_, (step, *_))), (_, stride), _ = mma_utils.create_descriptor(
            v, swizzle=128, large_tile=(64, 64), group_size=(64, size), logical_k_major=True
        )
        types = [name for name in inspect.signature(module.wgmma_m64).parameters if name.endswith("element_type")]
        how = dict(a_transpose=None, a_k_stride=None, b_transpose=True, b_k_stride=step, n=size, swizzle=128)
        how |= dict.fromkeys(types, p.mlir_dtype)
        sums = gpu.WGMMAAccumulator.from_registers(acc, sync=False)
        registers = sums._value.registers.copy()
        for j in range(p.shape[1] // 64):
            offset = gpu.c(mma_utils.encode_addr(j * stride), ir.IntegerType.get_signless(64))
            at = llvm.add(base, offset, overflow_flags=llvm.IntegerOverflowFlags.none)
            for i in range(rows // 64):
                part = p[64 * i : 64 * (i + 1), 64 * j : 64 * (j + 1)]
                registers[i : i + 1] = module.wgmma_m64(registers[i : i + 1], part, at, **how)
        nvvm.wgmma_commit_group_sync_aligned()
        whole = gpu.FragmentedArray(_registers=registers, _layout=sums._value.layout, _is_signed=sums._value.is_signed)
        return whole.to_layout(acc.layout)

    return product(acc, p, v)


def _settle(sums: jax.Array) -> None:
    """Have the compiler finish all that leads to ``sums`` before it waits for a product.

    It would move the wait up as far as it can, and leave most exponentials with nothing to run beside. It does not know
    that sums of them are never negative.
    """

    @plmgpu.inline_mgpu(arg_types=(plmgpu.Layout.WGMMA.reduce(1),))
    def check(_, sums):
        from jaxlib.mlir.dialects import llvm

        asm = "{ .reg .pred p; setp.lt.f32 p, $0, 0f00000000; @p nanosleep.u32 1; }"
        for a in sums.registers.flat:
            llvm.inline_asm(None, [a], asm, "f", has_side_effects=True, asm_dialect=0)

    check(sums)


def _span(heads: int, group: int, bytes_: int) -> int:
    """How many heads to work on side by side: a divisor, so that the cache holds what they read.

    ``bytes_``: keys and values that ``group`` heads share.
    """
    return max((n for n in range(1, heads + 1) if heads % n == 0 and n * bytes_ <= L2 * group), default=1)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    scale: float,
    start: int = 0,
    tile: Tile | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """(out (B, L, H, D) of q's type, log-sum-exp (B, H, L) float32) of q (B, L, H, D), k and v (B, S, G, D).

    Query i stands at slot i + start, and sees keys up to that slot if ``causal``. ``ValueError`` for what :func:`takes`
    does not take. ``interpret``: ``InterpretGPUParams`` of newer versions of JAX.
    """
    tile = tile or default_tile(q.shape[-1])
    if not takes(q, k, v, causal=causal, scale=scale, start=start, tile=tile):
        raise ValueError(
            f"no Hopper kernel for q {q.shape}, k {k.shape}, v {v.shape} of {q.dtype}, {causal=}, {scale=}, {start=}: "
            f"sizes of 64 or 128, queries by {tile.q} and keys by {tile.k} of {tile}"
        )
    (batch, queries, heads, size), (_, keys, kv_heads, _) = q.shape, k.shape
    group = heads // kv_heads
    span = _span(batch * heads, group, 4 * keys * size)
    work = _Work(tile, queries, keys, heads, group, causal, start, span)

    shared = lambda n, rows: plmgpu.SMEM(
        (n, rows, size), q.dtype, transforms=(plmgpu.TilingTransform((8, 64)), plmgpu.SwizzleTransform(128))
    )
    barriers = lambda n, arrivals=1: plmgpu.Barrier(num_arrivals=arrivals, num_barriers=n)
    memory = {
        "q": shared(tile.groups, tile.rows),
        "k": shared(tile.stages, tile.k),
        "v": shared(tile.stages, tile.k),
        "lse": plmgpu.SMEM((tile.groups, tile.rows), jnp.float32),
        "q_full": barriers(tile.groups),
        "k_full": barriers(tile.stages),
        "v_full": barriers(tile.stages),
        "k_free": barriers(tile.stages, tile.groups),
        "v_free": barriers(tile.stages, tile.groups),
        "turn": barriers(tile.groups),
    }

    def entry(q_ref, k_ref, v_ref, out_ref, lse_ref, *held):
        x = {"q": q_ref, "k": k_ref, "v": v_ref, "out": out_ref, "lse": lse_ref}
        m = dict(zip(memory, held, strict=True))
        w = jax.lax.axis_index("group")
        few, many = REGISTERS[tile.groups]

        @pl.when(w < tile.groups)
        def _():
            plmgpu.set_max_registers(many, action="increase")
            _attend(work, w, x, m, scale)

        @pl.when(w == tile.groups)
        def _():
            plmgpu.set_max_registers(few, action="decrease")
            _copy(work, x, m)

    return plmgpu.kernel(
        entry,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
        ),
        scratch_types=tuple(memory.values()),
        grid=(batch * heads * (queries // tile.q),),
        grid_names=("program",),
        num_threads=tile.groups + 1,
        thread_name="group",
        compiler_params=plmgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plmgpu.LoweringSemantics.Lane
        ),
        **({"interpret": interpret} if interpret is not None else {}),
    )(q, k, v)
