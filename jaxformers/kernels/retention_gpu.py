"""The part of chunk-wise retention inside the chunks, in Pallas-Triton, with its gradient. See ``retention``.

Per chunk and head, with D_im = e^{d_i − d_m} for m ≤ i, else 0:
    O = (Q Kᵀ ⊙ D) V + e^d ⊙ (Q S);      dQ = (dO Vᵀ ⊙ D) K + e^d ⊙ (dO Sᵀ),  dK = (dO Vᵀ ⊙ D)ᵀ Q,  dV = (Q Kᵀ ⊙ D)ᵀ dO,
    dS = (e^d ⊙ Q)ᵀ dO (a plain product),  dd_i = dO_i · O_i − K_i · dK_i (d_i scales all of O_i, and what k_i gives).
d_i = ln γ · (time since the chunk's state); differences of times are taken before they are multiplied, or long gaps
would cost digits.
The c×c scores live in registers, a tile at a time.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxformers.kernels.decode import exact_precision
from jaxformers.kernels.lazy import pl, plgpu
from jaxformers.kernels.tiles import dot


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Steps a tile (a power of two that divides the chunk), warps and pipeline stages."""

    steps: int = 64
    warps: int = 4
    stages: int = 2


def default_tiles(size: int, dtype: Any) -> Tiles:
    """Tiles for the larger of the head's two sizes."""
    if jnp.dtype(dtype).itemsize == 4:
        return Tiles(32 if size > 64 else 64, 4, 1)
    return Tiles(64, 4 if size <= 64 else 8, 2 if size <= 128 else 1)


def _load(ref, rows, block: int, width: int):
    """Rows of a chunk's matrix; columns beyond ``width`` are zero."""
    ref = ref.at[pl.ds(rows * block, block), :]
    if ref.shape[-1] == width:
        return plgpu.load(ref)
    return plgpu.load(ref, mask=(jnp.arange(ref.shape[-1]) < width)[None, :], other=0.0)


def _store(ref, rows, block: int, width: int, value):
    inside = (jnp.arange(value.shape[1]) < width)[None, :]
    plgpu.store(ref.at[pl.ds(rows * block, block), :], value.astype(ref.dtype), mask=inside)


def _state(x, sizes, dtype):
    rows, columns = jnp.arange(x["state"].shape[0]) < sizes[0], jnp.arange(x["state"].shape[1]) < sizes[1]
    return plgpu.load(x["state"], mask=rows[:, None] & columns[None, :], other=0.0).astype(dtype)


def _decay(x, i, m, block: int):
    """D of query tile i and key tile m of the chunk, (queries, keys)."""
    later, earlier = (plgpu.load(x["since"].at[pl.ds(n * block, block)]) for n in (i, m))
    index = jnp.arange(block)
    below = (i * block + index)[:, None] >= (m * block + index)[None, :]
    gap = jnp.where(below, later[:, None] - earlier[None, :], 0.0)
    return jnp.where(below, jnp.exp(gap * x["log_decay"][0]), 0.0)


def _rows_kernel(x, out, *, block: int, sizes: tuple[int, int], tiles: int, exact, backward: bool):
    """O, or dQ: rows i of the chunk against all rows m ≤ i."""
    i = jax.lax.rem(pl.program_id(0), jnp.int32(tiles))
    left, across, width, name = ("q", "v", sizes[1], "out") if not backward else ("do", "k", sizes[0], "dq")
    against, inner = ("k", sizes[0]) if not backward else ("v", sizes[1])
    q = _load(x[left], i, block, inner)
    state = _state(x, sizes, q.dtype)
    reach = jnp.exp(plgpu.load(x["since"].at[pl.ds(i * block, block)]) * x["log_decay"][0])
    first = dot(q, state, trans_b=backward, precision=exact) * reach[:, None]

    def step(m, acc):
        scores = dot(q, _load(x[against], m, block, inner), trans_b=True, precision=exact)
        scores = scores * _decay(x, i, m, block)
        other = _load(x[across], m, block, width)
        return acc + dot(scores.astype(other.dtype), other, precision=exact)

    _store(out[name], i, block, width, jax.lax.fori_loop(jnp.int32(0), i + 1, step, first))


def _columns_kernel(x, out, *, block: int, sizes: tuple[int, int], tiles: int, exact):
    """dK and dV: rows m of the chunk against all rows i ≥ m."""
    m = jax.lax.rem(pl.program_id(0), jnp.int32(tiles))
    k, v = _load(x["k"], m, block, sizes[0]), _load(x["v"], m, block, sizes[1])

    def step(i, carry):
        dk, dv = carry
        q, do = _load(x["q"], i, block, sizes[0]), _load(x["do"], i, block, sizes[1])
        decay = _decay(x, i, m, block)
        scores = (dot(q, k, trans_b=True, precision=exact) * decay).astype(do.dtype)
        ds = (dot(do, v, trans_b=True, precision=exact) * decay).astype(q.dtype)
        return dk + dot(ds, q, trans_a=True, precision=exact), dv + dot(scores, do, trans_a=True, precision=exact)

    zero = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(m, jnp.int32(tiles), step, zero)
    _store(out["dk"], m, block, sizes[0], dk)
    _store(out["dv"], m, block, sizes[1], dv)


def _call(kernel, x, shapes, tiles: Tiles, interpret: bool, **settings):
    batch, length, heads, size = x["q"].shape
    chunks, value = x["state"].shape[2], x["v"].shape[3]
    chunk = length // chunks
    block = min(tiles.steps, chunk)
    many = chunk // block
    pow2 = lambda n: max(16, pl.next_power_of_2(n))
    at = lambda n: jax.lax.div(n, jnp.int32(many))  # the chunk of a program

    def spec(shape):
        if len(shape) == 5:
            return pl.BlockSpec((None, None, None, pow2(size), pow2(value)), lambda n, h, b: (b, h, at(n), 0, 0))
        if len(shape) == 4:
            return pl.BlockSpec((None, chunk, None, pow2(shape[3])), lambda n, h, b: (b, at(n), h, 0))
        if len(shape) == 2:
            return pl.BlockSpec((None, chunk), lambda n, h, b: (b, at(n)))
        return pl.BlockSpec((1,), lambda n, h, b: (h,))

    exact = exact_precision(x["q"].dtype, interpret)
    return pl.pallas_call(
        functools.partial(kernel, block=block, sizes=(size, value), tiles=many, exact=exact, **settings),
        grid=(chunks * many, heads, batch),
        in_specs=[{name: spec(a.shape) for name, a in x.items()}],
        out_specs={name: spec(a.shape) for name, a in shapes.items()},
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="retention_" + kernel.__name__.strip("_"),
    )(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _inside(tiles: Tiles, interpret: bool, q, k, v, since, log_decay, state):
    x = {"q": q, "k": k, "v": v, "since": since, "log_decay": log_decay, "state": state}
    shape = {"out": jax.ShapeDtypeStruct(v.shape, jnp.float32)}
    return _call(_rows_kernel, x, shape, tiles, interpret, backward=False)["out"]


def _forward(tiles, interpret, q, k, v, since, log_decay, state):
    out = _inside(tiles, interpret, q, k, v, since, log_decay, state)
    return out, (q, k, v, since, log_decay, state, out)


def _backward(tiles, interpret, saved, do):
    q, k, v, since, log_decay, state, out = saved
    x = {"q": q, "k": k, "v": v, "since": since, "log_decay": log_decay, "state": state, "do": do.astype(v.dtype)}
    like = lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32)
    dq = _call(_rows_kernel, x, {"dq": like(q)}, tiles, interpret, backward=True)["dq"]
    pair = _call(_columns_kernel, x, {"dk": like(k), "dv": like(v)}, tiles, interpret)
    split = lambda a: a.reshape(len(a), state.shape[2], -1, *a.shape[2:])
    ahead = (split(q).astype(jnp.float32) * jnp.exp(split(since)[..., None] * log_decay)[..., None]).astype(q.dtype)
    exact = "highest" if q.dtype == jnp.float32 else None
    ds = jnp.einsum("bcihk,bcihv->bhckv", ahead, split(x["do"]), precision=exact, preferred_element_type=jnp.float32)
    times = time_gradients(do, out, k, pair["dk"], since, log_decay)
    return dq.astype(q.dtype), pair["dk"].astype(k.dtype), pair["dv"].astype(v.dtype), *times, ds


_inside.defvjp(_forward, _backward)


def time_gradients(do, out, k, dk, since, log_decay):
    """Gradients of ``since`` (B, L) and of ``log_decay`` (H,), from dd_i = dO_i · O_i − K_i · dK_i."""
    dd = (do.astype(jnp.float32) * out).sum(-1) - (k.astype(jnp.float32) * dk).sum(-1)  # (B, L, H)
    return jnp.einsum("blh,h->bl", dd, log_decay, precision="highest"), jnp.einsum(
        "blh,bl->h", dd, since, precision="highest"
    )


def inside(q, k, v, since, log_decay, state, *, tiles: Tiles, interpret: bool = False):
    """As ``retention._inside``."""
    return _inside(tiles, interpret, q, k, v, since, log_decay, state)
