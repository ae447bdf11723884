"""Flash attention in Pallas for TPUs: what ``attention_gpu`` computes, with the same interface and equations.

The grid's last axis runs in order, so that a tile's accumulators stay in VMEM over the tiles of the other side. Tiles
that see nothing are not computed, and not fetched either: their index maps repeat the nearest tile that is. Vectors
along queries are columns (…, Q, 1), vectors along keys rows (…, 1, S), as the tiles of scores want them.

FLOPs as in ``attention_gpu``. Bytes: with T tiles of queries, q and out once and k and v T times (half of it under a
causal mask), from HBM; a tile of 512 queries makes that 512 FLOPs a byte, above what any TPU needs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxformers.kernels.lazy import pl, pltpu
from jaxformers.kernels.tiles import MASKED, Rules, dot, key_tiles, query_tiles, seen

Operands = dict[str, Any]
LANES = 128


@dataclasses.dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, multiples of 16 and of 128."""

    q: int = 512
    k: int = 512


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of the forward, the dK/dV and the dQ kernel."""

    forward: Tile = Tile()
    dkv: Tile = Tile()
    dq: Tile = Tile()


def default_tiles(size: int, dtype: Any) -> Tiles:
    """Tiles for the larger of the head's two sizes."""
    edge = 512 if size * jnp.dtype(dtype).itemsize <= 512 else 256
    return Tiles(*(Tile(edge, edge) for _ in range(3)))


@dataclasses.dataclass(frozen=True)
class _Tiled:
    rules: Rules
    tile: Tile
    scale: float
    exact: Any

    def scores(self, x: Operands, i, j, positional: bool):
        s = dot(x["q"][...], x["k"][...], trans_b=True, precision=self.exact) * self.scale
        if "bias" in x:
            s = s + x["bias"][...].astype(jnp.float32)
        slots = i * self.tile.q + jax.lax.broadcasted_iota(jnp.int32, (self.tile.q, 1), 0) + x["start"]
        keys = j * self.tile.k + jax.lax.broadcasted_iota(jnp.int32, (1, self.tile.k), 1)
        query_segments = x["query_segments"][...] if "query_segments" in x else None
        key_segments = x["key_segments"][...] if "key_segments" in x else None
        return s, seen(self.rules, slots, keys, x["prefix"], query_segments, key_segments, positional=positional)

    def probs(self, x: Operands, i, j, positional: bool):
        """exp(S − L), zero where masked."""
        s, allowed = self.scores(x, i, j, positional)
        p = jnp.exp(s - x["lse"][...])
        return p if allowed is None else jnp.where(allowed, p, 0.0)

    def key_range(self, i, start, prefix):
        return key_tiles(self.rules, i * self.tile.q, self.tile.q, self.tile.k, start, prefix)

    def query_range(self, j, start, prefix):
        return query_tiles(self.rules, j * self.tile.k, self.tile.q, self.tile.k, start, prefix)

    @property
    def positional(self) -> bool:
        """Whether positions decide anything anywhere."""
        return self.rules.causal or self.rules.keys % self.tile.k != 0


def _visit(t: _Tiled, tiles, n, body) -> None:
    """Run ``body(positional)`` for tile n of a range (low, a, b, high)."""
    if not t.positional:
        body(False)
        return
    low, a, b, high = tiles
    inner = (n >= a) & (n < b)
    pl.when(inner)(lambda: body(False))
    pl.when(jnp.logical_not(inner) & (n >= low) & (n < high))(lambda: body(True))


def _forward_kernel(x: Operands, out: Operands, scratch: Operands, i, j, *, t: _Tiled):
    acc, top, total = scratch["acc"], scratch["top"], scratch["total"]

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)

    def body(positional: bool):
        s, allowed = t.scores(x, i, j, positional)
        if allowed is not None:
            s = jnp.where(allowed, s, MASKED)
        old = top[:, :1]
        new = jnp.maximum(old, s.max(axis=1, keepdims=True))
        p = jnp.exp(s - new)
        if allowed is not None:
            p = jnp.where(allowed, p, 0.0)
        shrink = jnp.exp(old - new)
        v = x["v"][...] if "v" in x else x["k"][:, : acc.shape[1]]
        acc[...] = acc[...] * shrink + dot(p.astype(v.dtype), v, precision=t.exact)
        top[...] = jnp.broadcast_to(new, top.shape)
        total[...] = jnp.broadcast_to(total[:, :1] * shrink + p.sum(axis=1, keepdims=True), total.shape)

    _visit(t, t.key_range(i, x["start"], x["prefix"]), j, body)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        some = total[:, :1] > 0
        safe = jnp.where(some, total[:, :1], 1.0)
        out["out"][...] = (acc[...] / safe).astype(out["out"].dtype)
        out["lse"][...] = jnp.where(some, top[:, :1] + jnp.log(safe), MASKED)


def _dq_kernel(x: Operands, out: Operands, scratch: Operands, i, j, *, t: _Tiled):
    acc = scratch["acc"]

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def body(positional: bool):
        p = t.probs(x, i, j, positional)
        ds = p * (dot(x["do"][...], x["v"][...], trans_b=True, precision=t.exact) - x["delta"][...])
        k = x["k"][...]
        acc[...] += dot(ds.astype(k.dtype), k, precision=t.exact)

    _visit(t, t.key_range(i, x["start"], x["prefix"]), j, body)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        out["dq"][...] = (acc[...] * t.scale).astype(out["dq"].dtype)


def _dkv_kernel(x: Operands, out: Operands, scratch: Operands, i, j, *, t: _Tiled):
    dk, dv = scratch["dk"], scratch["dv"]

    @pl.when(i == 0)
    def _():
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    def body(positional: bool):
        q, do = x["q"][...], x["do"][...]
        p = t.probs(x, i, j, positional)
        dv[...] += dot(p.T.astype(do.dtype), do, precision=t.exact)
        ds = p * (dot(do, x["v"][...], trans_b=True, precision=t.exact) - x["delta"][...])
        dk[...] += dot(ds.T.astype(q.dtype), q, precision=t.exact)

    _visit(t, t.query_range(j, x["start"], x["prefix"]), i, body)

    @pl.when(i == pl.num_programs(3) - 1)
    def _():
        out["dk"][...] = (dk[...] * t.scale).astype(out["dk"].dtype)
        out["dv"][...] = dv[...].astype(out["dv"].dtype)


def _sums_kernel(x: Operands, out: Operands, scratch: Operands, i, j, *, t: _Tiled):
    @pl.when(i == 0)
    def _():
        out["sums"][...] = jnp.zeros_like(out["sums"])

    def body(positional: bool):
        out["sums"][...] += (t.probs(x, i, j, positional) * x["votes"][...]).sum(axis=0, keepdims=True)

    _visit(t, t.query_range(j, x["start"], x["prefix"]), i, body)


def _dbias_kernel(x: Operands, out: Operands, scratch: Operands, i, j, *, t: _Tiled):
    """The grid's last axis runs over the batch elements and heads that share a bias."""

    @pl.when(pl.program_id(4) == 0)
    def _():
        out["dbias"][...] = jnp.zeros_like(out["dbias"])

    def body(positional: bool):
        p = t.probs(x, i, j, positional)
        out["dbias"][...] += p * (dot(x["do"][...], x["v"][...], trans_b=True, precision=t.exact) - x["delta"][...])

    _visit(t, t.key_range(i, x["start"], x["prefix"]), j, body)


# --------------------------------------------------------------------------------------------------------- calls


def forward(
    x: Operands, rules: Rules, scale: float, tile: Tile, interpret: bool = False, value_size: int | None = None
):
    """(out (B, Q, H, E), log-sum-exp (B, H, Q) float32) of q (B, Q, H, D), k (B, S, G, D), v (B, S, G, E) in ``x``.

    Without v the first ``value_size`` columns of k are the values, too, and are read once."""
    t, y = _prepared(x, rules, scale, tile)
    batch, heads, queries, _ = y["q"].shape
    size = y["v"].shape[3] if "v" in y else value_size
    shapes = {"out": (batch, heads, queries, size), "lse": (batch, heads, queries, 1)}
    scratch = {"acc": (t.tile.q, size), "top": (t.tile.q, LANES), "total": (t.tile.q, LANES)}
    out = _call(_forward_kernel, t, y, shapes, {"out": x["q"].dtype}, scratch, interpret)
    return out["out"][:, :, : rules.queries].swapaxes(1, 2), out["lse"][:, :, : rules.queries, 0]


def backward(x: Operands, rules: Rules, scale: float, tiles: Tiles, interpret: bool = False):
    """{dq, dk, dv, dbias?}: ``x`` also holds do, lse and delta = rowsum(do · out) − dlse (B, H, Q)."""
    t, y = _prepared(x, rules, scale, tiles.dq)
    scratch = {"acc": (t.tile.q, y["q"].shape[3])}
    dq = _call(_dq_kernel, t, y, {"dq": y["q"].shape}, {"dq": x["q"].dtype}, scratch, interpret)["dq"]
    out = {"dq": dq[:, :, : rules.queries].swapaxes(1, 2)}
    if "bias" in x:
        out["dbias"] = _bias_gradient(t, y, interpret)[:, :, : rules.queries, : rules.keys].astype(x["bias"].dtype)
    t, y = _prepared(x, rules, scale, tiles.dkv)
    heads, kv_heads = x["q"].shape[2], x["k"].shape[2]
    shapes = {"d" + n: (y[n].shape[0], heads, *y[n].shape[2:]) for n in ("k", "v")}
    scratch = {"d" + n: (t.tile.k, y[n].shape[3]) for n in ("k", "v")}
    dtypes = {"d" + n: x[n].dtype if heads == kv_heads else jnp.float32 for n in ("k", "v")}
    for name, g in _call(_dkv_kernel, t, y, shapes, dtypes, scratch, interpret).items():
        g = g[:, :, : rules.keys]
        if heads > kv_heads:
            g = g.reshape(g.shape[0], kv_heads, -1, *g.shape[2:]).sum(axis=2)
        out[name] = g.swapaxes(1, 2).astype(x[name[1:]].dtype)
    return out


def column_sums(x: Operands, rules: Rules, scale: float, tile: Tile, interpret: bool = False):
    """Aᵀ s (B, H, S) float32 of votes s (B, H, Q) in ``x``, which also holds q, k and lse."""
    t, y = _prepared(x, rules, scale, tile)
    shapes = {"sums": (*y["q"].shape[:2], 1, y["k"].shape[2])}
    return _call(_sums_kernel, t, y, shapes, {}, {}, interpret)["sums"][:, :, 0, : rules.keys]


_QUERY, _KEY = ("q", "do", "lse", "delta", "votes", "query_segments", "out", "dq"), ("k", "v", "dk", "dv")


def _prepared(x: Operands, rules: Rules, scale: float, tile: Tile) -> tuple[_Tiled, Operands]:
    """Heads before lengths, vectors as columns and rows, and lengths padded to whole tiles."""
    edge = lambda n, limit, unit: min(limit, pl.cdiv(n, unit) * unit)
    tile = Tile(edge(rules.queries, tile.q, 16), edge(rules.keys, tile.k, LANES))
    exact = "highest" if x["q"].dtype == jnp.float32 else None
    t = _Tiled(rules, tile, scale, exact)
    behind = lambda n, block: pl.cdiv(n, block) * block - n
    rest, more = behind(rules.queries, tile.q), behind(rules.keys, tile.k)
    pad = lambda a, axis, n, value=0: (
        jnp.pad(a, [(0, n if i == axis else 0) for i in range(a.ndim)], constant_values=value) if n else a
    )
    y = {}
    for name, a in x.items():
        if name in ("q", "do"):
            y[name] = pad(a.swapaxes(1, 2), 2, rest)
        elif name in ("k", "v"):
            y[name] = pad(a.swapaxes(1, 2), 2, more)
        elif name == "bias":
            y[name] = pad(pad(a, 2, rest), 3, more)
        elif name in ("lse", "delta", "votes"):
            y[name] = pad(a, 2, rest)[..., None]
        elif name == "query_segments":
            y[name] = pad(a, 1, rest, -2)[..., None]
        elif name == "key_segments":
            y[name] = pad(a, 1, more, -1)[:, None]
        else:
            y[name] = a
    y.setdefault("start", jnp.zeros((1,), jnp.int32))
    y.setdefault("prefix", jnp.zeros((x["q"].shape[0],), jnp.int32))
    return t, y


def _call(kernel, t: _Tiled, y: Operands, shapes, dtypes, scratch, interpret: bool):
    """Run ``kernel`` on a grid (batch, heads, tiles of the result's side, tiles of the other side, in order)."""
    batch, heads, queries, _ = y["q"].shape
    group, keys = heads // y["k"].shape[1], y["k"].shape[2]
    tiles_q, tiles_k = queries // t.tile.q, keys // t.tile.k
    over_keys = kernel in (_forward_kernel, _dq_kernel)  # the last axis walks over keys
    names = [n for n in y if n not in ("start", "prefix") and not (kernel is _sums_kernel and n == "v")]

    def pair(b, outer, inner, start, prefix):
        """(query tile, key tile), the inner one moved to the nearest that is visited."""
        if not t.positional:
            return (outer, inner) if over_keys else (inner, outer)
        find = t.key_range if over_keys else t.query_range
        low, _, _, high = find(outer, start[0], prefix[b])
        inner = jnp.clip(inner, low, jnp.maximum(high - 1, low))
        inner = jnp.minimum(inner, (tiles_k if over_keys else tiles_q) - 1)
        return (outer, inner) if over_keys else (inner, outer)

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        if name == "query_segments":
            return pl.BlockSpec((None, t.tile.q, 1), lambda b, h, o, n, *s: (b, pair(b, o, n, *s)[0], 0))
        if name == "key_segments":
            return pl.BlockSpec((None, 1, t.tile.k), lambda b, h, o, n, *s: (b, 0, pair(b, o, n, *s)[1]))
        if name == "bias":
            at = lambda b, h, o, n, *s: (b if shape[0] > 1 else 0, h if shape[1] > 1 else 0, *pair(b, o, n, *s))
            return pl.BlockSpec((None, None, t.tile.q, t.tile.k), at)
        if name == "sums":
            return pl.BlockSpec((None, None, 1, t.tile.k), lambda b, h, o, n, *s: (b, h, 0, o))
        if name in _QUERY:
            at = lambda b, h, o, n, *s: (b, h, pair(b, o, n, *s)[0], 0)
            return pl.BlockSpec((None, None, t.tile.q, shape[3]), at)
        share = group if name in ("k", "v") else 1
        at = lambda b, h, o, n, *s: (b, jax.lax.div(h, jnp.int32(share)), pair(b, o, n, *s)[1], 0)
        return pl.BlockSpec((None, None, t.tile.k, shape[3]), at)

    def program(start, prefix, ins, outs, scratches):
        b, outer, inner = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        i, j = (outer, inner) if over_keys else (inner, outer)
        kernel({**ins, "start": start[0], "prefix": prefix[b]}, outs, scratches, i, j, t=t)

    outer, inner = (tiles_q, tiles_k) if over_keys else (tiles_k, tiles_q)
    return pl.pallas_call(
        program,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, outer, inner),
            in_specs=[{n: spec(n, y[n].shape) for n in names}],
            out_specs={n: spec(n, s) for n, s in shapes.items()},
            scratch_shapes=[{n: pltpu.VMEM(s, jnp.float32) for n, s in scratch.items()}],
        ),
        out_shape={n: jax.ShapeDtypeStruct(s, dtypes.get(n, jnp.float32)) for n, s in shapes.items()},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="attention_" + kernel.__name__.strip("_"),
    )(y["start"], y["prefix"], {n: y[n] for n in names})


def _bias_gradient(t: _Tiled, y: Operands, interpret: bool):
    """Σ dS over what shares the bias, float32, on a grid (bias batch, bias heads, query tiles, key tiles, sharers)."""
    bias = y["bias"]
    batch, heads, queries, _ = y["q"].shape
    group, keys = heads // y["k"].shape[1], y["k"].shape[2]
    shared = batch if bias.shape[0] == 1 else 1, heads if bias.shape[1] == 1 else 1

    def who(b, h, n):
        return (
            jax.lax.div(n, jnp.int32(shared[1])) if shared[0] > 1 else b,
            jax.lax.rem(n, jnp.int32(shared[1])) if shared[1] > 1 else h,
        )

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        if name == "query_segments":
            return pl.BlockSpec((None, t.tile.q, 1), lambda b, h, i, j, n, *_: (who(b, h, n)[0], i, 0))
        if name == "key_segments":
            return pl.BlockSpec((None, 1, t.tile.k), lambda b, h, i, j, n, *_: (who(b, h, n)[0], 0, j))
        if name in ("bias", "dbias"):
            return pl.BlockSpec((None, None, t.tile.q, t.tile.k), lambda b, h, i, j, n, *_: (b, h, i, j))
        if name in _QUERY:
            return pl.BlockSpec((None, None, t.tile.q, shape[3]), lambda b, h, i, j, n, *_: (*who(b, h, n), i, 0))

        def at(b, h, i, j, n, *_):
            b, h = who(b, h, n)
            return b, jax.lax.div(h, jnp.int32(group)), j, 0

        return pl.BlockSpec((None, None, t.tile.k, shape[3]), at)

    def program(start, prefix, ins, outs):
        b = who(*(pl.program_id(a) for a in (0, 1, 4)))[0]
        x = {**ins, "start": start[0], "prefix": prefix[b]}
        _dbias_kernel(x, outs, {}, pl.program_id(2), pl.program_id(3), t=t)

    names = [n for n in y if n not in ("start", "prefix")]
    return pl.pallas_call(
        program,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(*bias.shape[:2], queries // t.tile.q, keys // t.tile.k, shared[0] * shared[1]),
            in_specs=[{n: spec(n, y[n].shape) for n in names}],
            out_specs={"dbias": spec("dbias", bias.shape)},
        ),
        out_shape={"dbias": jax.ShapeDtypeStruct(bias.shape, jnp.float32)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 4 + ("arbitrary",)),
        interpret=interpret,
        name="attention_dbias_kernel",
    )(y["start"], y["prefix"], {n: y[n] for n in names})["dbias"]
