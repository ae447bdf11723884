"""Chunk-wise retention in Pallas-Triton, with its gradient. See ``retention``.

With d_i = ln γ · (time since the chunk's state S), D_im = e^{d_i − d_m} for m ≤ i, else 0, and R_i = e^{d_last − d_i}:
    O = s [(Q Kᵀ ⊙ D) V + e^d ⊙ (Q S)],      S' = F (e^{d_last} S + A),  A = (R ⊙ K)ᵀ V.
Three kernels: A of every chunk; S over the chunks, one after the other; and O, for which a program walks through its
chunk in tiles of ``steps``, S in registers, so that each operand is read once and only tiles on the diagonal are
formed. With G' the gradient of S' and E = Fᵀ G', three again: B = s (e^d ⊙ Q)ᵀ dO of every chunk; the recurrence
backwards, G = e^{d_last} E + B; and, tile by tile as before, first dQ with S, then from the last tile on the others
with E,
    dQ = s [(dO Vᵀ ⊙ D) K + e^d ⊙ (dO Sᵀ)],
    dK = s (dO Vᵀ ⊙ D)ᵀ Q + R ⊙ (V Eᵀ),      dV = s (Q Kᵀ ⊙ D)ᵀ dO + R ⊙ (K E);
    dd_i = Q_i · dQ_i − K_i · dK_i, and ⟨G', S'⟩ more at the last: d_i scales what q_i sees, and what k_i gives.
Differences of times are taken before they are multiplied, or long gaps would cost digits.

Bytes: Q, K, V, O and (forward) K, V once more, backward Q, dO; a state is written as float32 and read twice a chunk.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.kernels.decode import exact_precision
from jaxformers.kernels.lazy import pl, plgpu
from jaxformers.kernels.tiles import dot

LOG2E = math.log2(math.e)
AHEAD = 16  # chunks whose sums the recurrence loads together


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Steps a tile (a power of two that divides the chunk), warps and pipeline stages."""

    steps: int = 64
    warps: int = 4
    stages: int = 2


def default_tiles(size: int, dtype: Any) -> Tiles:
    """Tiles for the larger of the head's two sizes."""
    if jnp.dtype(dtype).itemsize == 4:
        return Tiles(32 if size <= 64 else 16, 8, 1)
    return Tiles(64 if size <= 128 else 32, 4 if size <= 64 else 8, 2 if size <= 128 else 1)


def _pow2(n: int) -> int:
    return max(16, pl.next_power_of_2(n))


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """What a program does with the operands of its chunk: ``tiles`` tiles of ``block`` steps."""

    block: int
    tiles: int
    sizes: tuple[int, int]
    scale: float
    exact: Any

    def dot(self, a, b, **transposed):
        return dot(a, b, precision=self.exact, **transposed)

    def width(self, name: str) -> int:
        return self.sizes[name in ("v", "do", "out", "dv")]

    def load(self, x, name: str, t):
        """Tile t of a matrix; columns beyond its width are zero."""
        ref = x[name].at[pl.ds(t * self.block, self.block), :]
        if ref.shape[-1] == self.width(name):
            return plgpu.load(ref)
        return plgpu.load(ref, mask=(jnp.arange(ref.shape[-1]) < self.width(name))[None, :], other=0.0)

    def store(self, out, name: str, t, value):
        ref = out[name].at[pl.ds(t * self.block, self.block), :]
        whole = ref.shape[-1] == self.width(name)
        mask = None if whole else (jnp.arange(ref.shape[-1]) < self.width(name))[None, :]
        plgpu.store(ref, value.astype(ref.dtype), mask=mask)

    def inside(self, ref):
        rows, columns = (jnp.arange(n) < size for n, size in zip(ref.shape, self.sizes, strict=True))
        return None if ref.shape == self.sizes else rows[:, None] & columns[None, :]

    def state(self, ref):
        mask = self.inside(ref)
        return plgpu.load(ref, mask=mask, other=None if mask is None else 0.0).astype(jnp.float32)

    def times(self, x, t):
        return plgpu.load(x["since"].at[pl.ds(t * self.block, self.block)])

    def last(self, x, t):
        """The time of tile t's last step."""
        return plgpu.load(x["since"].at[t * self.block + (self.block - 1)])


def _rate(x):
    """ln γ in base 2, because the hardware has exp2."""
    return x["log_decay"][0] * LOG2E


def _diagonal(times, rate):
    """D of the tile's queries and keys; what overflows above the diagonal is not taken."""
    index = jnp.arange(times.shape[0])
    decay = jnp.exp2((times[:, None] - times[None, :]) * rate)
    return jnp.where(index[:, None] >= index[None, :], decay, 0.0)


def _scaled(a, factor):
    return (a.astype(jnp.float32) * factor[:, None]).astype(a.dtype)


def _sums_kernel(x, out, *, chunk: _Chunk, backward: bool):
    """A, or B: the sum over the chunk of R k vᵀ, or of s e^d q dOᵀ."""
    rate = _rate(x)
    end = x["since"][chunk.block * chunk.tiles - 1]
    left, right = ("q", "do") if backward else ("k", "v")

    def step(t, acc):
        times = chunk.times(x, t)
        factor = jnp.exp2((times if backward else end - times) * rate) * (chunk.scale if backward else 1.0)
        return chunk.dot(_scaled(chunk.load(x, left, t), factor), chunk.load(x, right, t), trans_a=True) + acc

    total = jax.lax.fori_loop(0, chunk.tiles, step, jnp.zeros(out["sums"].shape, jnp.float32))
    plgpu.store(out["sums"], total, mask=chunk.inside(out["sums"]))


def _forward_kernel(x, out, *, chunk: _Chunk):
    rate = _rate(x)

    def step(t, carry):
        state, before = carry
        times, last = chunk.times(x, t), chunk.last(x, t)
        q, k, v = (chunk.load(x, n, t) for n in "qkv")
        scores = (chunk.dot(q, k, trans_b=True) * _diagonal(times, rate)).astype(v.dtype)
        ahead = chunk.dot(q, state.astype(q.dtype)) * jnp.exp2((times - before) * rate)[:, None]
        chunk.store(out, "out", t, (chunk.dot(scores, v) + ahead) * chunk.scale)
        state = state * jnp.exp2((last - before) * rate)
        return chunk.dot(_scaled(k, jnp.exp2((last - times) * rate)), v, trans_a=True) + state, last

    jax.lax.fori_loop(0, chunk.tiles, step, (chunk.state(x["state"]), jnp.float32(0.0)))


def _backward_kernel(x, out, *, chunk: _Chunk):
    """dQ, dK, dV, and the sums Q · dQ and K · dK of each row."""
    rate = _rate(x)

    def sums(name, t, a, b):
        plgpu.store(out[name].at[pl.ds(t * chunk.block, chunk.block)], (a.astype(jnp.float32) * b).sum(1))

    def queries(t, carry):
        state, before = carry
        times, last = chunk.times(x, t), chunk.last(x, t)
        q, k, v, do = (chunk.load(x, n, t) for n in ("q", "k", "v", "do"))
        ds = (chunk.dot(do, v, trans_b=True) * _diagonal(times, rate)).astype(k.dtype)
        ahead = chunk.dot(do, state.astype(do.dtype), trans_b=True) * jnp.exp2((times - before) * rate)[:, None]
        dq = (chunk.dot(ds, k) + ahead) * chunk.scale
        chunk.store(out, "dq", t, dq)
        sums("qdq", t, q, dq)
        state = state * jnp.exp2((last - before) * rate)
        return chunk.dot(_scaled(k, jnp.exp2((last - times) * rate)), v, trans_a=True) + state, last

    def keys(n, carry):
        state, last = carry
        t = chunk.tiles - 1 - n
        times, before = chunk.times(x, t), jnp.where(t > 0, chunk.last(x, jnp.maximum(t - 1, 0)), 0.0)
        q, k, v, do = (chunk.load(x, n, t) for n in ("q", "k", "v", "do"))
        decay, rest = _diagonal(times, rate) * chunk.scale, jnp.exp2((last - times) * rate)[:, None]
        behind = state.astype(k.dtype)
        scores = (chunk.dot(q, k, trans_b=True) * decay).astype(do.dtype)
        chunk.store(out, "dv", t, chunk.dot(scores, do, trans_a=True) + chunk.dot(k, behind) * rest)
        ds = (chunk.dot(do, v, trans_b=True) * decay).astype(q.dtype)
        dk = chunk.dot(ds, q, trans_a=True) + chunk.dot(v, behind, trans_b=True) * rest
        chunk.store(out, "dk", t, dk)
        sums("kdk", t, k, dk)
        state = state * jnp.exp2((last - before) * rate)
        return chunk.dot(_scaled(q, jnp.exp2((times - before) * rate) * chunk.scale), do, trans_a=True) + state, before

    jax.lax.fori_loop(0, chunk.tiles, queries, (chunk.state(x["state"]), jnp.float32(0.0)))
    jax.lax.fori_loop(0, chunk.tiles, keys, (chunk.state(x["behind"]), x["since"][chunk.block * chunk.tiles - 1]))


def _recurrence_kernel(x, out, *, rows: int, chunks: int, sizes: tuple[int, int], backward: bool):
    """S before every chunk, or E behind it, and the last of the recurrence: ``rows`` rows (or pairs of them) a program.

    Every turn of the loop first loads the sums of several chunks, so that it waits for memory once.
    """
    turned = "frames" in x
    row = pl.program_id(0) * rows + jnp.arange(rows)
    column = jnp.arange(_pow2(sizes[1]))
    parts = [2 * row, 2 * row + 1] if turned else [row]
    masks = [(r < sizes[0])[:, None] & (column < sizes[1])[None, :] for r in parts]
    load = lambda ref, *at: [
        plgpu.load(ref.at[(*at, r[:, None], column[None, :])], mask=m, other=0.0)
        for r, m in zip(parts, masks, strict=True)
    ]

    def store(ref, *at, value, now=True):
        for r, m, a in zip(parts, masks, value, strict=True):
            plgpu.store(ref.at[(*at, r[:, None], column[None, :])], a.astype(ref.dtype), mask=m & now)

    if turned:  # real and imaginary part of whole chunks' F, and the last one's
        two, pairs = (jnp.int32(0), jnp.int32(1)), row < sizes[0] // 2
        frames = [[plgpu.load(x["frames"].at[i, j, row], mask=pairs, other=0.0) for j in two] for i in two]

    def turn(c, state):
        if not turned:
            return state
        real, imaginary = (jnp.where(c == chunks - 1, b, a)[:, None] for a, b in zip(*frames, strict=True))
        if backward:
            imaginary = -imaginary
        a, b = state
        return [a * real - b * imaginary, b * real + a * imaginary]

    many = min(AHEAD, chunks)

    def step(n, state):
        steps = [n * many + i for i in range(many)]
        order = [jnp.clip(chunks - 1 - c if backward else c, 0, chunks - 1) for c in steps]
        sums = [load(x["sums"], c) for c in order]
        decays = [plgpu.load(x["decays"].at[c]) for c in order]
        for at, c, added, decay in zip(steps, order, sums, decays, strict=True):
            now = at < chunks
            if backward:
                state_ = turn(c, state)
                store(out["states"], c, value=state_, now=now)
                new = [s * decay + a for s, a in zip(state_, added, strict=True)]
            else:
                store(out["states"], c, value=state, now=now)
                new = turn(c, [s * decay + a for s, a in zip(state, added, strict=True)])
            state = [jnp.where(now, a, b) for a, b in zip(new, state, strict=True)] if chunks % many else new
        return state

    state = jax.lax.fori_loop(0, -(-chunks // many), step, load(x["state"]))
    store(out["last"], value=state)


def _chunk(x, chunks: int, scale: float, tiles: Tiles, interpret: bool) -> _Chunk:
    size, value = x["q"].shape[3], x["v"].shape[3]
    chunk = x["q"].shape[1] // chunks
    block = min(tiles.steps, chunk)
    return _Chunk(block, chunk // block, (size, value), scale, exact_precision(x["q"].dtype, interpret))


def _call(kernel, x, shapes, chunk: _Chunk, tiles: Tiles, interpret: bool, **settings):
    """Run a kernel for every chunk of every head."""
    steps = chunk.block * chunk.tiles
    batch, length = x["since"].shape
    heads = len(x["log_decay"])

    def spec(a):
        shape = a.shape
        if len(shape) == 5:
            return pl.BlockSpec((None, None, None, *map(_pow2, shape[3:])), lambda h, c, b: (b, h, c, 0, 0))
        if len(shape) == 4:
            return pl.BlockSpec((None, steps, None, _pow2(shape[3])), lambda h, c, b: (b, c, h, 0))
        if len(shape) == 3:
            return pl.BlockSpec((None, None, steps), lambda h, c, b: (b, h, c))
        if len(shape) == 2:
            return pl.BlockSpec((None, steps), lambda h, c, b: (b, c))
        return pl.BlockSpec((1,), lambda h, c, b: (h,))

    return pl.pallas_call(
        functools.partial(kernel, chunk=chunk, **settings),
        grid=(heads, length // steps, batch),
        in_specs=[{name: spec(a) for name, a in x.items()}],
        out_specs={name: spec(a) for name, a in shapes.items()},
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="retention" + kernel.__name__,
    )(x)


def _recurrence(sums, decays, state, frames, dtype, interpret: bool, *, backward: bool):
    """(states before the chunks, or gradients behind them, in ``dtype``; the last state, or the first's gradient)."""
    batch, heads, chunks, size, value = sums.shape
    x = {"sums": sums, "decays": decays, "state": state}
    if frames is not None:
        x["frames"] = frames
    across = size // 2 if frames is not None else size
    rows = max(1, 256 // (_pow2(value) * (2 if frames is not None else 1)))  # two floats a thread

    def spec(name, shape):
        if name == "frames":
            return pl.BlockSpec((2, 2, None, shape[3]), lambda r, h, b: (0, 0, h, 0))
        return pl.BlockSpec((None, None, *shape[2:]), lambda r, h, b: (b, h) + (0,) * (len(shape) - 2))

    shapes = {
        "states": jax.ShapeDtypeStruct(sums.shape, dtype),
        "last": jax.ShapeDtypeStruct(state.shape, jnp.float32),
    }
    found = pl.pallas_call(
        functools.partial(_recurrence_kernel, rows=rows, chunks=chunks, sizes=(size, value), backward=backward),
        grid=(-(-across // rows), heads, batch),
        in_specs=[{name: spec(name, a.shape) for name, a in x.items()}],
        out_specs={name: spec(name, a.shape) for name, a in shapes.items()},
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="retention_recurrence_kernel",
    )(x)
    return found["states"], found["last"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _run(scale, chunks, tiles, interpret, q, k, v, since, log_decay, state, frames):
    return _forward(scale, chunks, tiles, interpret, q, k, v, since, log_decay, state, frames)[0]


def _decays(since, log_decay, chunks: int):
    return jnp.exp(since.reshape(len(since), 1, chunks, -1)[..., -1] * log_decay[:, None])  # (B, H, chunks)


def _forward(scale, chunks, tiles, interpret, q, k, v, since, log_decay, state, frames):
    x = {"q": q, "k": k, "v": v, "since": since, "log_decay": log_decay}
    chunk = _chunk(x, chunks, scale, tiles, interpret)
    call = functools.partial(_call, chunk=chunk, tiles=tiles, interpret=interpret)
    sums = {"sums": jax.ShapeDtypeStruct((len(q), q.shape[2], chunks, *chunk.sizes), jnp.float32)}
    added = call(_sums_kernel, {n: a for n, a in x.items() if n != "q"}, sums, backward=False)["sums"]
    decays = _decays(since, log_decay, chunks)
    before, last = _recurrence(added, decays, state, frames, q.dtype, interpret, backward=False)
    out = call(_forward_kernel, x | {"state": before}, {"out": jax.ShapeDtypeStruct(v.shape, v.dtype)})["out"]
    return (out, last), (q, k, v, since, log_decay, before, last, frames)


def _backward(scale, chunks, tiles, interpret, saved, gradients):
    q, k, v, since, log_decay, before, last, frames = saved
    do, dlast = gradients
    x = {"q": q, "k": k, "v": v, "do": do.astype(v.dtype), "since": since, "log_decay": log_decay}
    chunk = _chunk(x, chunks, scale, tiles, interpret)
    call = functools.partial(_call, chunk=chunk, tiles=tiles, interpret=interpret)
    sums = {"sums": jax.ShapeDtypeStruct(before.shape, jnp.float32)}
    seen = call(_sums_kernel, {n: a for n, a in x.items() if n not in "kv"}, sums, backward=True)["sums"]
    decays = _decays(since, log_decay, chunks)
    behind, first = _recurrence(seen, decays, dlast, frames, q.dtype, interpret, backward=True)
    shapes = {"d" + n: jax.ShapeDtypeStruct(x[n].shape, x[n].dtype) for n in "qkv"}
    rows = jax.ShapeDtypeStruct((len(q), q.shape[2], q.shape[1]), jnp.float32)
    g = call(_backward_kernel, x | {"state": before, "behind": behind}, shapes | {"qdq": rows, "kdk": rows})
    # ⟨G', S'⟩: S' is the state before the next chunk, whose G is made of that chunk's own gradients
    later = (behind.astype(jnp.float32) * decays[..., None, None] + seen) * before.astype(jnp.float32)
    ends = jnp.concatenate([later.sum((3, 4))[:, :, 1:], (dlast * last).sum((2, 3))[..., None]], axis=2)
    dd = (g["qdq"] - g["kdk"]).reshape(*ends.shape, -1).at[..., -1].add(ends).reshape(g["qdq"].shape)
    dsince = jnp.einsum("bhl,h->bl", dd, log_decay, precision="highest")
    ddecay = jnp.einsum("bhl,bl->h", dd, since, precision="highest")
    return g["dq"], g["dk"], g["dv"], dsince, ddecay, first, jax.tree.map(jnp.zeros_like, frames)


_run.defvjp(_forward, _backward)


def chunkwise(q, k, v, since, log_decay, state, frames, *, scale: float, tiles: Tiles, interpret: bool = False):
    """(outputs, last state) of chunks: q, k (B, L, H, K), v (B, L, H, V), ``since`` (B, chunks, steps), state.

    ``frames``: real and imaginary part of F of a whole chunk, and of the last, (2, 2, H, K/2); None: F = 1.
    """
    frames = None if frames is None else jnp.asarray(frames, np.float32)
    chunks = since.shape[1]
    return _run(scale, chunks, tiles, interpret, q, k, v, since.reshape(len(q), -1), log_decay, state, frames)
