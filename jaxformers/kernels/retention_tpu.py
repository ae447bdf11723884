"""The part of chunk-wise retention inside the chunks, in Pallas for TPUs. Equations and interface of ``retention_gpu``.

One program does one chunk of one head, and a chunk's c×c scores stay in VMEM: with c = 128 a matrix unit's tile. Times
come twice, as a column and as a row, as the scores want them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxformers.kernels.lazy import pl, pltpu
from jaxformers.kernels.tiles import dot


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Nothing to choose: the chunk is the tile."""


def default_tiles(size: int, dtype: Any) -> Tiles:
    return Tiles()


def _decay(x):
    """D, (queries, keys) of a chunk; exponents above the diagonal are never formed."""
    column, row = x["column"][...], x["row"][...]
    chunk = column.shape[0]
    i = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
    m = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    return jnp.where(i >= m, jnp.exp(jnp.where(i >= m, column - row, 0.0) * x["log_decay"][...]), 0.0)


def _forward_kernel(x, out, *, exact):
    q, v = x["q"][...], x["v"][...]
    scores = dot(q, x["k"][...], trans_b=True, precision=exact) * _decay(x)
    ahead = dot(q, x["state"][...].astype(q.dtype), precision=exact) * jnp.exp(x["column"][...] * x["log_decay"][...])
    out["out"][...] = dot(scores.astype(v.dtype), v, precision=exact) + ahead


def _backward_kernel(x, out, *, exact):
    q, k, v, do = (x[n][...] for n in ("q", "k", "v", "do"))
    decay, reach = _decay(x), jnp.exp(x["column"][...] * x["log_decay"][...])
    scores = (dot(q, k, trans_b=True, precision=exact) * decay).astype(v.dtype)
    ds = (dot(do, v, trans_b=True, precision=exact) * decay).astype(q.dtype)
    ahead = dot(do, x["state"][...].astype(do.dtype), trans_b=True, precision=exact) * reach
    out["dq"][...] = dot(ds, k, precision=exact) + ahead
    out["dk"][...] = dot(ds.T, q, precision=exact)
    out["dv"][...] = dot(scores.T, do, precision=exact)
    out["dstate"][...] = dot((q.astype(jnp.float32) * reach).astype(q.dtype).T, do, precision=exact)


def _call(kernel, x, shapes, interpret: bool):
    batch, heads, length, _ = x["q"].shape
    chunks = x["state"].shape[2]
    chunk = length // chunks

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        if name in ("state", "dstate"):
            return pl.BlockSpec((None, None, None, *shape[3:]), lambda b, h, c: (b, h, c, 0, 0))
        if name == "row":
            return pl.BlockSpec((None, 1, chunk), lambda b, h, c: (b, 0, c))
        if name == "column":
            return pl.BlockSpec((None, chunk, 1), lambda b, h, c: (b, c, 0))
        if name == "log_decay":
            return pl.BlockSpec((None, 1, 1), lambda b, h, c: (h, 0, 0))
        return pl.BlockSpec((None, None, chunk, shape[3]), lambda b, h, c: (b, h, c, 0))

    exact = "highest" if x["q"].dtype == jnp.float32 else None
    return pl.pallas_call(
        functools.partial(kernel, exact=exact),
        grid=(batch, heads, chunks),
        in_specs=[{n: spec(n, a.shape) for n, a in x.items()}],
        out_specs={n: spec(n, s) for n, s in shapes.items()},
        out_shape={n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        interpret=interpret,
        name="retention" + kernel.__name__,
    )(x)


def _operands(q, k, v, since, log_decay, state):
    x = {"q": q.swapaxes(1, 2), "k": k.swapaxes(1, 2), "v": v.swapaxes(1, 2), "state": state}
    return x | {"column": since[..., None], "row": since[:, None], "log_decay": log_decay[:, None, None]}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _inside(interpret: bool, q, k, v, since, log_decay, state):
    x = _operands(q, k, v, since, log_decay, state)
    return _call(_forward_kernel, x, {"out": x["v"].shape}, interpret)["out"].swapaxes(1, 2)


def _forward(interpret, q, k, v, since, log_decay, state):
    out = _inside(interpret, q, k, v, since, log_decay, state)
    return out, (q, k, v, since, log_decay, state, out)


def _backward(interpret, saved, do):
    q, k, v, since, log_decay, state, out = saved
    x = {**_operands(q, k, v, since, log_decay, state), "do": do.astype(v.dtype).swapaxes(1, 2)}
    shapes = {"dq": x["q"].shape, "dk": x["k"].shape, "dv": x["v"].shape, "dstate": state.shape}
    g = _call(_backward_kernel, x, shapes, interpret)
    dq, dk, dv = (g[n].swapaxes(1, 2) for n in ("dq", "dk", "dv"))
    times = time_gradients(do, out, k, dk, since, log_decay)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), *times, g["dstate"]


_inside.defvjp(_forward, _backward)


def time_gradients(do, out, k, dk, since, log_decay):
    """Gradients of ``since`` (B, L) and of ``log_decay`` (H,), from dd_i = dO_i · O_i − K_i · dK_i."""
    dd = (do.astype(jnp.float32) * out).sum(-1) - (k.astype(jnp.float32) * dk).sum(-1)  # (B, L, H)
    return jnp.einsum("blh,h->bl", dd, log_decay, precision="highest"), jnp.einsum(
        "blh,bl->h", dd, since, precision="highest"
    )


def inside(q, k, v, since, log_decay, state, *, tiles: Tiles, interpret: bool = False):
    """As ``retention._inside``.

    Raises ValueError for chunks that are no multiple of 128 steps, unless there is one only: a row of times must fill
    the lanes.
    """
    chunk, chunks = q.shape[1] // state.shape[2], state.shape[2]
    if chunk % 128 and chunks > 1:
        raise ValueError(f"chunk: expected a multiple of 128 on a TPU, got {chunk}")
    return _inside(interpret, q, k, v, since, log_decay, state)
