"""Flash attention in Pallas-Triton: forward, backward, gradient of the bias, and column sums Aᵀs.

Online softmax as in arXiv 2205.14135 and 2307.08691; scores live in base 2, because the hardware has exp2. Tiles that
positions decide nothing about run without that part of the mask. Arrays are read as they come, (B, L, heads, size);
sizes that are no power of two are padded in registers.

The backward pass recomputes probabilities from the log-sum-exp L, with Δ = rowsum(dO ⊙ O) − dL:
    P = exp(S − L),  dV = Pᵀ dO,  dS = P ⊙ (dO Vᵀ − Δ),  dQ = dS K · scale,  dK = dSᵀ Q · scale,  dbias = Σ dS.
Under grouped queries dK and dV are written per query head and summed outside. The gradient of a bias that is shared by
a batch is summed over the batch in registers, so that nothing larger than the bias is written.

FLOPs, with N = B·H·(pairs seen) and head sizes D, E of keys and values: 2N(D+E) forward, 2N(2D+2E) for dK and dV,
2N(2D+E) for dQ, 2N(D+E) for the bias, 2ND for column sums. Bytes: each operand once for each tile of the other side,
of which L2 serves most; nothing of size L×L but a bias that the caller made.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxformers.kernels import attention_mosaic
from jaxformers.kernels.lazy import pl, plgpu
from jaxformers.kernels.tiles import MASKED, Rules, dot, key_tiles, query_tiles, seen

LOG2E = math.log2(math.e)
Operands = dict[str, Any]  # q, k, v, do (…, size); lse, delta, votes; bias; query_segments, key_segments; start, prefix


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one kernel is cut: queries and keys a tile (powers of two, at least 16), warps, pipeline stages."""

    q: int
    k: int
    warps: int = 4
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of the forward, the dK/dV and the dQ kernel; one of ``attention_mosaic`` means its forward kernel."""

    forward: Tile | attention_mosaic.Tile
    dkv: Tile
    dq: Tile


def default_tiles(size: int, dtype: Any) -> Tiles:
    """Tiles for a head size; float32 takes four times the registers and shared memory of its bfloat16 products."""
    if jnp.dtype(dtype).itemsize == 4:
        edge = 32 if size > 64 else 64
        return Tiles(Tile(64, 32, 4, 2), Tile(32, edge, 4, 1), Tile(edge, 32, 4, 1))
    if size <= 64:
        return Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
    if size <= 128:
        return Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
    return Tiles(Tile(64, 32, 8, 2), Tile(32, 64, 8, 1), Tile(64, 32, 8, 1))


def _pow2(n: int) -> int:
    return max(16, pl.next_power_of_2(n))


@dataclasses.dataclass(frozen=True)
class _Tiled:
    """What every kernel here does with a tile: load its operands and form its scores.

    Operands come with batch and head already chosen, or whole with the choice in ``x["at"]``.
    """

    rules: Rules
    tile: Tile
    scale: float
    size: int
    value_size: int
    interpret: bool = False

    def dot(self, a, b, *, trans_a: bool = False, trans_b: bool = False):
        precision = None
        if a.dtype == jnp.float32:  # three TF32 passes are float32 to within rounding; one pass has ten bits
            precision = "highest" if self.interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        return dot(a, b, trans_a=trans_a, trans_b=trans_b, precision=precision)

    def side(self, name: str) -> tuple[int, int]:
        """(rows a tile, rows) of an operand."""
        if name in ("k", "v", "key_segments", "dk", "dv", "sums"):
            return self.tile.k, self.rules.keys
        return self.tile.q, self.rules.queries

    def load(self, x: Operands, name: str, i):
        """Tile i of a matrix; zeros outside."""
        block, length = self.side(name)
        size = self.value_size if name in ("v", "do", "out") else self.size
        rows, inside = pl.ds(i * block, block), None
        if length % block:
            inside = (i * block + jnp.arange(block) < length)[:, None]
        if size < x[name].shape[-1]:
            columns = (jnp.arange(x[name].shape[-1]) < size)[None, :]
            inside = columns if inside is None else inside & columns
        ref = x[name].at[x["at"][0], rows, x["at"][1], :] if "at" in x else x[name].at[rows, :]
        return plgpu.load(ref) if inside is None else plgpu.load(ref, mask=inside, other=0.0)

    def load_row(self, x: Operands, name: str, i, other: Any = 0.0):
        """Tile i of a vector; ``other`` outside."""
        block, length = self.side(name)
        at = x["at"][: x[name].ndim - 1] if "at" in x else ()
        ref = x[name].at[(*at, pl.ds(i * block, block))]
        if length % block == 0:
            return plgpu.load(ref)
        return plgpu.load(ref, mask=i * block + jnp.arange(block) < length, other=other)

    def store(self, out: Operands, name: str, i, value):
        block, length = self.side(name)
        inside = i * block + jnp.arange(block) < length
        ref = out[name].at[pl.ds(i * block, block)]
        if value.ndim == 2:
            size = self.value_size if name in ("dv", "out") else self.size
            ref = out[name].at[pl.ds(i * block, block), :]
            inside = inside[:, None] & (jnp.arange(value.shape[1]) < size)[None, :]
        plgpu.store(ref, value.astype(out[name].dtype), mask=inside)

    def scores(self, x: Operands, q, k, i, j, positional: bool, factor: float | None = None):
        """(scores · log2 e, visible or None) of query tile i and key tile j; ``factor`` if the caller scales them."""
        s = self.dot(q, k, trans_b=True)
        if factor is None:
            s = s * (self.scale * LOG2E)
        rows, columns = i * self.tile.q + jnp.arange(self.tile.q), j * self.tile.k + jnp.arange(self.tile.k)
        if "bias" in x:
            inside = (rows < self.rules.queries)[:, None] & (columns < self.rules.keys)[None, :]
            ref = x["bias"].at[pl.ds(i * self.tile.q, self.tile.q), pl.ds(j * self.tile.k, self.tile.k)]
            s = s + plgpu.load(ref, mask=inside, other=0.0).astype(jnp.float32) * LOG2E
        query_segments = key_segments = None
        if self.rules.segments:
            query_segments = self.load_row(x, "query_segments", i, -2)[:, None]
        if self.rules.by_content:
            key_segments = self.load_row(x, "key_segments", j, -1)[None, :]
        slots = (rows + _scalar(x, "start"))[:, None]
        prefix, segments = _scalar(x, "prefix"), (query_segments, key_segments)
        even = self.rules.keys % self.tile.k == 0
        return s, seen(self.rules, slots, columns[None, :], prefix, *segments, positional=positional, even=even)

    def probs(self, x: Operands, q, k, i, j, positional: bool):
        """exp(S − L), zero where masked."""
        s, allowed = self.scores(x, q, k, i, j, positional)
        p = jnp.exp2(s - (self.load_row(x, "lse", i) * LOG2E)[:, None])
        return p if allowed is None else jnp.where(allowed, p, 0.0)

    def over_keys(self, x: Operands, i, body, carry):
        """``body(positional)(j, carry)`` over the tiles of keys that query tile i may see."""
        first = i * self.tile.q
        tiles = key_tiles(self.rules, first, self.tile.q, self.tile.k, _scalar(x, "start"), _scalar(x, "prefix"))
        return _loops(tiles, body, carry)

    def over_queries(self, x: Operands, j, body, carry):
        """The same over the tiles of queries that may see key tile j. Queries beyond the end come as zeros."""
        first = j * self.tile.k
        tiles = query_tiles(self.rules, first, self.tile.q, self.tile.k, _scalar(x, "start"), _scalar(x, "prefix"))
        return _loops(tiles, body, carry)


def _loops(tiles, body, carry):
    """Tiles before the inner part, the inner part, and those behind; a part known to be empty is not compiled."""
    low, a, b, high = tiles
    for first, last, positional in ((low, a, True), (a, b, False), (b, high, True)):
        if not (isinstance(first, int) and isinstance(last, int) and first >= last):
            carry = jax.lax.fori_loop(jnp.int32(first), jnp.int32(last), body(positional), carry)
    return carry


def _scalar(x: Operands, name: str):
    if name not in x:
        return 0
    return x[name][x["at"][0]] if name == "prefix" and "at" in x else x[name][0]


# ------------------------------------------------------------------------------------------------------- kernels


def _forward_kernel(x: Operands, out: Operands, *, t: _Tiled):
    i = pl.num_programs(0) - 1 - pl.program_id(0)  # under a causal mask the last queries see most keys: they go first
    q = t.load(x, "q", i)
    # a positive factor keeps the order of scores, so that it can wait for the exponent: s·c − m·c is one instruction
    factor = t.scale * LOG2E if t.scale > 1e-9 and "bias" not in x else None
    scaled = (lambda a: a * factor) if factor else (lambda a: a)

    def body(positional):
        def step(j, carry):
            acc, m, total = carry
            s, allowed = t.scores(x, q, t.load(x, "k", j), i, j, positional, factor)
            if allowed is not None:  # so far below the first maximum that no probability is left, even of an empty row
                s = jnp.where(allowed, s, 2 * MASKED)
            m_new = jnp.maximum(m, s.max(axis=1))
            p = jnp.exp2(scaled(s) - scaled(m_new)[:, None])
            shrink = jnp.exp2(scaled(m - m_new))
            v = t.load(x, "v", j)
            acc = acc * shrink[:, None] + t.dot(p.astype(v.dtype), v)
            return acc, m_new, total * shrink + p.sum(axis=1)

        return step

    zero = jnp.zeros((t.tile.q, x["v"].shape[-1]), jnp.float32)
    carry = zero, jnp.full((t.tile.q,), MASKED, jnp.float32), jnp.zeros((t.tile.q,), jnp.float32)
    acc, m, total = t.over_keys(x, i, body, carry)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    t.store(out, "out", i, acc / total[:, None])
    t.store(out, "lse", i, jnp.where(some, (scaled(m) + jnp.log2(total)) / LOG2E, MASKED))


def _dq_kernel(x: Operands, out: Operands, *, t: _Tiled):
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    q, do = t.load(x, "q", i), t.load(x, "do", i)
    delta = t.load_row(x, "delta", i)[:, None]

    def body(positional):
        def step(j, dq):
            k = t.load(x, "k", j)
            p = t.probs(x, q, k, i, j, positional)
            ds = p * (t.dot(do, t.load(x, "v", j), trans_b=True) - delta)
            return dq + t.dot(ds.astype(k.dtype), k)

        return step

    dq = t.over_keys(x, i, body, jnp.zeros(q.shape, jnp.float32))
    t.store(out, "dq", i, dq * t.scale)


def _dkv_kernel(x: Operands, out: Operands, *, t: _Tiled):
    j = pl.program_id(0)
    k, v = t.load(x, "k", j), t.load(x, "v", j)

    def body(positional):
        def step(i, carry):
            dk, dv = carry
            q, do = t.load(x, "q", i), t.load(x, "do", i)
            p = t.probs(x, q, k, i, j, positional)
            dv = dv + t.dot(p.astype(do.dtype), do, trans_a=True)
            ds = p * (t.dot(do, v, trans_b=True) - t.load_row(x, "delta", i)[:, None])
            return dk + t.dot(ds.astype(q.dtype), q, trans_a=True), dv

        return step

    dk, dv = t.over_queries(x, j, body, (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)))
    t.store(out, "dk", j, dk * t.scale)
    t.store(out, "dv", j, dv)


def _dbias_kernel(x: Operands, out: Operands, *, t: _Tiled, batch: int, heads: int, group: int):
    """One tile of the bias' gradient, summed over the batch and the heads that share it."""
    j, i = pl.program_id(0), pl.program_id(1)
    h0, b0 = (pl.program_id(2) if heads == 1 else 0), (pl.program_id(3) if batch == 1 else 0)

    def step(n, total):
        b, h = (jax.lax.div(n, jnp.int32(heads)) + b0, jax.lax.rem(n, jnp.int32(heads)) + h0)
        y = {**x, "at": (b, h)}
        z = {**x, "at": (b, jax.lax.div(h, jnp.int32(group)))}
        do = t.load(y, "do", i)
        p = t.probs(y, t.load(y, "q", i), t.load(z, "k", j), i, j, True)
        dp = t.dot(do, t.load(z, "v", j), trans_b=True)
        return total + p * (dp - t.load_row(y, "delta", i)[:, None])

    total = jax.lax.fori_loop(0, batch * heads, step, jnp.zeros((t.tile.q, t.tile.k), jnp.float32))
    rows, columns = i * t.tile.q + jnp.arange(t.tile.q), j * t.tile.k + jnp.arange(t.tile.k)
    inside = (rows < t.rules.queries)[:, None] & (columns < t.rules.keys)[None, :]
    ref = out["dbias"].at[pl.ds(i * t.tile.q, t.tile.q), pl.ds(j * t.tile.k, t.tile.k)]
    plgpu.store(ref, total.astype(out["dbias"].dtype), mask=inside)


def _sums_kernel(x: Operands, out: Operands, *, t: _Tiled):
    j = pl.program_id(0)
    k = t.load(x, "k", j)

    def body(positional):
        def step(i, total):
            p = t.probs(x, t.load(x, "q", i), k, i, j, positional)
            return total + (p * t.load_row(x, "votes", i)[:, None]).sum(axis=0)

        return step

    t.store(out, "sums", j, t.over_queries(x, j, body, jnp.zeros((t.tile.k,), jnp.float32)))


# --------------------------------------------------------------------------------------------------------- calls


def takes_mosaic(x: Operands, rules: Rules, scale: float, tile: attention_mosaic.Tile | None = None) -> bool:
    """Whether the forward kernel of ``attention_mosaic`` takes these operands and this mask, on Hopper."""
    if rules.by_content or rules.prefix or rules.window is not None or rules.start is None or "bias" in x:
        return False
    how = dict(causal=rules.causal, scale=scale, start=rules.start, tile=tile)
    return attention_mosaic.takes(x["q"], x["k"], x["v"], **how)


def forward(x: Operands, rules: Rules, scale: float, tile: Tile | attention_mosaic.Tile, interpret: bool = False):
    """(out (B, Q, H, E), log-sum-exp (B, H, Q) float32) of q (B, Q, H, D), k (B, S, G, D), v (B, S, G, E) in ``x``."""
    if isinstance(tile, attention_mosaic.Tile):
        if interpret or not takes_mosaic(x, rules, scale, tile):
            raise ValueError(f"tiles: {tile} has no interpreter, and only causal masks of whole tiles; got {rules}")
        how = dict(causal=rules.causal, scale=scale, start=rules.start, tile=tile)
        return attention_mosaic.forward(x["q"], x["k"], x["v"], **how)
    batch, queries, heads, _ = x["q"].shape
    shape = {
        "out": jax.ShapeDtypeStruct((batch, queries, heads, x["v"].shape[-1]), x["q"].dtype),
        "lse": jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    }
    out = _call(_forward_kernel, x, shape, rules, scale, tile, pl.cdiv(queries, tile.q), interpret)
    return out["out"], out["lse"]


def backward(x: Operands, rules: Rules, scale: float, tiles: Tiles, interpret: bool = False):
    """{dq, dk, dv, dbias?}: ``x`` also holds do, lse and delta = rowsum(do · out) − dlse (B, H, Q)."""
    out = {"dq": backward_queries(x, rules, scale, tiles.dq, interpret)}
    out["dk"], out["dv"] = backward_keys(x, rules, scale, tiles.dkv, interpret)
    if "bias" in x:
        out["dbias"] = backward_bias(x, rules, scale, tiles.dq, interpret)
    return out


def backward_queries(x: Operands, rules: Rules, scale: float, tile: Tile, interpret: bool = False):
    shape = {"dq": jax.ShapeDtypeStruct(x["q"].shape, x["q"].dtype)}
    return _call(_dq_kernel, x, shape, rules, scale, tile, pl.cdiv(rules.queries, tile.q), interpret)["dq"]


def backward_keys(x: Operands, rules: Rules, scale: float, tile: Tile, interpret: bool = False):
    heads, kv_heads = x["q"].shape[2], x["k"].shape[2]
    spread = lambda a: jax.ShapeDtypeStruct(
        (*a.shape[:2], heads, a.shape[3]), a.dtype if heads == kv_heads else jnp.float32
    )
    shape = {"dk": spread(x["k"]), "dv": spread(x["v"])}
    pair = _call(_dkv_kernel, x, shape, rules, scale, tile, pl.cdiv(rules.keys, tile.k), interpret)
    gather = lambda g: g.reshape(*g.shape[:2], kv_heads, -1, g.shape[3]).sum(axis=3) if heads > kv_heads else g
    return gather(pair["dk"]).astype(x["k"].dtype), gather(pair["dv"]).astype(x["v"].dtype)


def column_sums(x: Operands, rules: Rules, scale: float, tile: Tile, interpret: bool = False):
    """Aᵀ s (B, H, S) float32 of votes s (B, H, Q) in ``x``, which also holds q, k and lse."""
    batch, queries, heads, _ = x["q"].shape
    shape = {"sums": jax.ShapeDtypeStruct((batch, heads, rules.keys), jnp.float32)}
    return _call(_sums_kernel, x, shape, rules, scale, tile, pl.cdiv(rules.keys, tile.k), interpret)["sums"]


def _call(kernel, x: Operands, shapes: dict, rules: Rules, scale: float, tile: Tile, blocks: int, interpret: bool):
    """Run ``kernel`` on a grid of (tiles, heads, batch); each program sees its batch element and head only."""
    batch, _, heads, _ = x["q"].shape
    group = heads // x["k"].shape[2]
    t = _Tiled(rules, tile, scale, x["q"].shape[-1], x["v"].shape[-1] if "v" in x else x["k"].shape[-1], interpret)

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        if name in ("start", "prefix"):
            return pl.BlockSpec((1,), (lambda i, h, b: (b,)) if name == "prefix" else (lambda i, h, b: (0,)))
        if name == "bias":
            at = lambda i, h, b: (b if shape[0] > 1 else 0, h if shape[1] > 1 else 0, 0, 0)
            return pl.BlockSpec((None, None, *_padded(t, shape[2:])), at)
        block, length = t.side(name)
        length = pl.cdiv(length, block) * block
        if len(shape) == 4:
            share = group if name in ("k", "v") else 1
            at = lambda i, h, b: (b, 0, jax.lax.div(h, jnp.int32(share)) if share > 1 else h, 0)
            return pl.BlockSpec((None, length, None, _pow2(shape[3])), at)
        if len(shape) == 3:
            return pl.BlockSpec((None, None, length), lambda i, h, b: (b, h, 0))
        return pl.BlockSpec((None, length), lambda i, h, b: (b, 0))

    used = {n: a for n, a in x.items() if not (kernel is _sums_kernel and n == "v")}
    return pl.pallas_call(
        partial(kernel, t=t),
        grid=(blocks, heads, batch),
        in_specs=[{n: spec(n, a.shape) for n, a in used.items()}],
        out_specs={n: spec(n, a.shape) for n, a in shapes.items()},
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(used)


def _padded(t: _Tiled, shape: tuple[int, ...]) -> tuple[int, int]:
    return pl.cdiv(shape[0], t.tile.q) * t.tile.q, pl.cdiv(shape[1], t.tile.k) * t.tile.k


def backward_bias(x: Operands, rules: Rules, scale: float, tile: Tile, interpret: bool = False):
    bias = x["bias"]
    batch, _, heads, _ = x["q"].shape
    group = heads // x["k"].shape[2]
    t = _Tiled(rules, tile, scale, x["q"].shape[-1], x["v"].shape[-1], interpret)
    tiles = _padded(t, bias.shape[2:])

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        if name == "bias":
            at = lambda j, i, h, b: (b if shape[0] > 1 else 0, h if shape[1] > 1 else 0, 0, 0)
            return pl.BlockSpec((None, None, *tiles), at)
        if name not in ("start", "prefix"):
            block, length = t.side(name)
            length = pl.cdiv(length, block) * block
            if len(shape) == 4:
                shape = (shape[0], length, shape[2], _pow2(shape[3]))
            else:
                shape = (*shape[:-1], length)
        return pl.BlockSpec(shape, lambda j, i, h, b: (0,) * len(shape))

    loops = batch if bias.shape[0] == 1 else 1, heads if bias.shape[1] == 1 else 1
    grid = pl.cdiv(rules.keys, tile.k), pl.cdiv(rules.queries, tile.q), bias.shape[1], bias.shape[0]
    return pl.pallas_call(
        partial(_dbias_kernel, t=t, batch=loops[0], heads=loops[1], group=group),
        grid=grid,
        in_specs=[{n: spec(n, a.shape) for n, a in x.items()}],
        out_specs={"dbias": spec("bias", bias.shape)},
        out_shape={"dbias": jax.ShapeDtypeStruct(bias.shape, jnp.float32)},
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="dbias_kernel",
    )(x)["dbias"].astype(bias.dtype)
