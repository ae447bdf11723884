"""Attention of one new token to a static cache of keys and values, split over the keys so that a GPU is full.

One query per sequence reads the whole cache once: B·S·G·(D+E) elements for 2·B·S·H·(D+E) FLOPs, H/G heads sharing
each key head: far below the FLOPs that would hide the reading, so the floor is the bytes over the memory's bandwidth.
Each of ``splits`` programs a head reads its share of the slots, up to the last one that is visible, and leaves a
partial context with its log-sum-exp; their combination is (arXiv 2311.01282)

    L = log Σ_s exp(L_s),   context = Σ_s exp(L_s − L) context_s.

On a TPU one program a head walks over the slots (``attention_tpu``, the heads that share a key head being its queries)
up to the last visible one; it is there by request (``implementation="pallas_tpu"``), since XLA streams a whole cache at
the memory's speed already. On the CPU :func:`reference` runs. ``mla.py`` uses the same kernels with the latent cache as
keys and values at once.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxformers.kernels import attention_tpu
from jaxformers.kernels.lazy import pl, plgpu
from jaxformers.kernels.tiles import MASKED, Rules, dot, partitioned, platform

LOG2E = math.log2(math.e)
WORTH = 1024  # slots from which the kernel beats XLA on a GPU
SPLIT_PROGRAMS = 264  # programs that fill a large GPU twice


@dataclasses.dataclass(frozen=True)
class Tile:
    """Heads and slots a step, the splits of the cache (None: as many as fill the GPU), warps, pipeline stages."""

    heads: int
    slots: int
    splits: int | None = None
    warps: int = 4
    stages: int = 3


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    allowed: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The context (B, H, E) of one query a sequence, q (B, H, D), over the slots of k (B, G, S, D) and v (B, G, S, E)
    that ``allowed`` (B, S) marks; zeros where it marks none. H is a multiple of G.

    ``implementation``: None (:func:`choose`), "xla", "pallas_gpu" or "pallas_tpu". The kernels take their
    gradients from the reference. Raises ValueError for shapes that do not fit.
    """
    batch, heads, size = q.shape
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != size or v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"k, v: expected ({batch}, kv heads, slots, {size}) and a value size, got {k.shape}, {v.shape}"
        )
    if heads % k.shape[1]:
        raise ValueError(f"q: {heads} heads are no multiple of {k.shape[1]} key heads")
    if allowed is not None and allowed.shape != (batch, k.shape[2]):
        raise ValueError(f"allowed: expected ({batch}, {k.shape[2]}), got {allowed.shape}")
    scale = size**-0.5 if scale is None else float(scale)
    implementation = implementation or choose(k.shape[2])
    if implementation == "xla":
        return reference(q, k, v, allowed, scale)
    group = heads // k.shape[1]

    def kernel(q, k, v, allowed):
        x = {"q": q.reshape(batch, k.shape[1], group, size), "k": k, "v": v}
        if implementation == "pallas_tpu":
            out = walk(x, allowed, scale, v.shape[3], interpret)
        else:
            cut = tile or Tile(min(64, _pow2(group)), 64 if k.dtype.itemsize == 2 else 32)
            out = split_decode(x, allowed, scale, cut, interpret)
        return out.reshape(batch, heads, -1).astype(q.dtype)

    if implementation not in ("pallas_gpu", "pallas_tpu"):
        raise ValueError(f"implementation: expected xla, pallas_gpu or pallas_tpu, got {implementation!r}")
    return with_gradient_of(lambda q, k, v, allowed: reference(q, k, v, allowed, scale), kernel, (q, k, v), allowed)


def with_gradient_of(reference: Any, kernel: Any, operands: tuple[jax.Array, ...], allowed: jax.Array | None) -> Any:
    """``kernel(*operands, allowed)``, whose gradient is that of ``reference``: decoding is seldom trained."""
    run = jax.custom_vjp(kernel)

    def backward(saved, grad):
        *operands, allowed = saved
        return (*jax.vjp(lambda *a: reference(*a, allowed), *operands)[1](grad), None)

    run.defvjp(lambda *a: (kernel(*a), a), backward)
    return run(*operands, allowed)


def walk(x: dict[str, Any], allowed, scale: float, value_size: int, interpret: bool = False):
    """(B, G, heads, E): ``attention_tpu`` over the slots, q (B, G, heads, D), k (B, G, slots, D), v as there or none.

    That a slot behind the last visible one is not fetched, is told as a prefix: all queries stand before the cache."""
    batch, kv_heads, heads, _ = x["q"].shape
    slots = x["k"].shape[2]
    allowed = jnp.ones((batch, slots), bool) if allowed is None else allowed.astype(bool)
    stop = (jnp.arange(1, slots + 1, dtype=jnp.int32) * allowed).max(axis=1)
    rules = Rules(heads, slots, causal=True, prefix=True, valid=True)
    y = {name: a.swapaxes(1, 2) for name, a in x.items()}  # as attention has them; there they are turned back
    y |= {"key_segments": jnp.where(allowed, 0, -1), "prefix": stop, "start": jnp.full((1,), -(1 << 24), jnp.int32)}
    tile = attention_tpu.Tile(128, 512)
    return attention_tpu.forward(y, rules, scale, tile, interpret, value_size)[0].swapaxes(1, 2)


def choose(slots: int) -> str:
    """The implementation on the platform that is compiled for."""
    return "pallas_gpu" if platform() == "gpu" and slots >= WORTH and not partitioned() else "xla"


def reference(q, k, v, allowed, scale: float):
    """The definition, float32 inside."""
    batch, heads, size = q.shape
    exact = "highest" if q.dtype == jnp.float32 else None
    q = q.reshape(batch, k.shape[1], -1, size)
    s = jnp.einsum("bghd,bgsd->bghs", q, k, precision=exact, preferred_element_type=jnp.float32) * scale
    p = masked_softmax(s, None if allowed is None else allowed[:, None, None, :].astype(bool))
    out = jnp.einsum("bghs,bgsd->bghd", p.astype(v.dtype), v, precision=exact, preferred_element_type=jnp.float32)
    return out.reshape(batch, heads, -1).astype(q.dtype)


def masked_softmax(s, allowed):
    """Softmax over the last axis among ``allowed``; all zero where nothing is."""
    if allowed is None:
        return jax.nn.softmax(s, axis=-1)
    s = jnp.where(allowed, s, MASKED)  # before exp, so that what is masked has no gradient that overflows
    e = jnp.where(allowed, jnp.exp(s - jax.lax.stop_gradient(s.max(axis=-1, keepdims=True))), 0.0)
    total = e.sum(axis=-1, keepdims=True)
    return e / jnp.where(total > 0, total, 1.0)


def _pow2(n: int) -> int:
    return max(16, pl.next_power_of_2(n))


# -------------------------------------------------------------------------------------------------------- Triton


def _kernel(x: dict[str, Any], out: dict[str, Any], *, tile: Tile, slots: int, sizes: dict[str, int], scale, exact):
    """One split of one key head: ``x`` holds q (heads, D), k (slots, D), v (slots, E) or none (then v = k), and for a
    second, shared part of the keys q2 (heads, P) and k2, the columns of k behind the first D."""
    split, block = pl.program_id(0), pl.program_id(1)
    share = pl.cdiv(pl.cdiv(slots, tile.slots), tile.splits)  # tiles of slots a split
    rows = block * tile.heads + jnp.arange(tile.heads) < sizes["heads"]

    def columns(name: str):
        width = _pow2(sizes[name])
        return None if width == sizes[name] else (jnp.arange(width) < sizes[name])[None, :]

    def load(ref, inside, extra):
        inside = inside if extra is None else inside & extra
        return plgpu.load(ref, mask=inside, other=0.0)

    heads = pl.ds(block * tile.heads, tile.heads)
    q = load(x["q"].at[heads, :], rows[:, None], columns("size"))
    q2 = load(x["q2"].at[heads, :], rows[:, None], columns("extra")) if "q2" in x else None

    def step(j, carry):
        acc, m, total = carry
        at, index = pl.ds(j * tile.slots, tile.slots), j * tile.slots + jnp.arange(tile.slots)
        inside = index < slots
        k = load(x["k"].at[at, pl.ds(0, _pow2(sizes["size"]))], inside[:, None], columns("size"))
        s = dot(q, k, trans_b=True, precision=exact)
        if q2 is not None:
            k2 = load(x["k"].at[at, pl.ds(sizes["size"], _pow2(sizes["extra"]))], inside[:, None], columns("extra"))
            s = s + dot(q2, k2, trans_b=True, precision=exact)
        if "allowed" in x:
            inside = inside & (plgpu.load(x["allowed"].at[at], mask=inside, other=0) != 0)
        s = jnp.where(inside[None, :], s * (scale * LOG2E), MASKED)
        m_new = jnp.maximum(m, s.max(axis=1))
        p = jnp.where(inside[None, :], jnp.exp2(s - m_new[:, None]), 0.0)
        shrink = jnp.exp2(m - m_new)
        v = k if "v" not in x else load(x["v"].at[at, :], (index < slots)[:, None], columns("value"))
        acc = acc * shrink[:, None] + dot(p.astype(v.dtype), v, precision=exact)
        return acc, m_new, total * shrink + p.sum(axis=1)

    first = split * share
    last = jnp.minimum(first + share, pl.cdiv(slots, tile.slots))
    if "stop" in x:  # no slot from there on is visible
        last = jnp.minimum(last, jax.lax.div(x["stop"][0] + (tile.slots - 1), jnp.int32(tile.slots)))
    width = _pow2(sizes["value"])
    start = jnp.full((tile.heads,), MASKED, jnp.float32), jnp.zeros((tile.heads,), jnp.float32)
    acc, m, total = jax.lax.fori_loop(first, last, step, (jnp.zeros((tile.heads, width), jnp.float32), *start))
    some = total > 0
    total = jnp.where(some, total, 1.0)
    extra = columns("value")
    inside = rows[:, None] if extra is None else rows[:, None] & extra
    plgpu.store(out["out"].at[heads, :], acc / total[:, None], mask=inside)
    plgpu.store(out["lse"].at[heads], jnp.where(some, (m + jnp.log2(total)) / LOG2E, MASKED), mask=rows)


def split_decode(x: dict[str, Any], allowed, scale: float, tile: Tile, interpret: bool = False):
    """(B, G, heads, E) float32. ``x``: q (B, G, heads, D), k (B, G, slots, ≥ D), v (B, G, slots, E) or none: then the
    first D columns of k are the values, too; q2 (B, G, heads, P) meets the P columns of k behind them."""
    batch, kv_heads, heads, size = x["q"].shape
    slots = x["k"].shape[2]
    blocks, steps = pl.cdiv(heads, tile.heads), pl.cdiv(slots, tile.slots)
    splits = tile.splits or max(1, SPLIT_PROGRAMS // (batch * kv_heads * blocks))
    splits = min(splits, steps)
    tile = dataclasses.replace(tile, splits=splits)
    value = x["v"].shape[3] if "v" in x else size
    sizes = {"heads": heads, "size": size, "value": value, "extra": x["q2"].shape[3] if "q2" in x else 0}
    if allowed is not None:
        marks = jnp.arange(1, slots + 1, dtype=jnp.int32) * allowed.astype(jnp.int32)
        x = {**x, "allowed": allowed.astype(jnp.int32), "stop": marks.max(axis=1)}
    tall, wide = pl.cdiv(heads, tile.heads) * tile.heads, steps * tile.slots
    columns = {"q": _pow2(size), "q2": _pow2(sizes["extra"]), "v": _pow2(value)}
    columns["k"] = size + _pow2(sizes["extra"]) if "q2" in x else _pow2(size)
    columns["k"] = max(columns["k"], _pow2(size))

    def spec(name: str) -> pl.BlockSpec:
        at = lambda s, h, n: (jax.lax.div(n, jnp.int32(kv_heads)), jax.lax.rem(n, jnp.int32(kv_heads)), 0, 0)
        if name == "allowed":
            return pl.BlockSpec((None, wide), lambda s, h, n: at(s, h, n)[:1] + (0,))
        if name == "stop":
            return pl.BlockSpec((1,), lambda s, h, n: at(s, h, n)[:1])
        return pl.BlockSpec((None, None, tall if name in ("q", "q2") else wide, columns[name]), at)

    out = pl.pallas_call(
        partial(
            _kernel,
            tile=tile,
            slots=slots,
            sizes=sizes,
            scale=scale,
            exact=exact_precision(x["k"].dtype, interpret),
        ),
        grid=(splits, blocks, batch * kv_heads),
        in_specs=[{name: spec(name) for name in x}],
        out_specs={
            "out": pl.BlockSpec((None, None, tall, columns["v"]), lambda s, h, n: (n, s, 0, 0)),
            "lse": pl.BlockSpec((None, None, tall), lambda s, h, n: (n, s, 0)),
        },
        out_shape={
            "out": jax.ShapeDtypeStruct((batch * kv_heads, splits, heads, value), jnp.float32),
            "lse": jax.ShapeDtypeStruct((batch * kv_heads, splits, heads), jnp.float32),
        },
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="decode_kernel",
    )(x)
    return combine(out["out"], out["lse"]).reshape(batch, kv_heads, heads, value)


def combine(context: jax.Array, lse: jax.Array):
    """The context of all splits, from each one's own and its log-sum-exp."""
    weight = jnp.exp(lse - lse.max(axis=1, keepdims=True)) * (lse > MASKED)
    weight = weight / jnp.maximum(weight.sum(axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return (context * weight[..., None]).sum(axis=1)


def exact_precision(dtype, interpret: bool):
    """Precision of a kernel's float32 products: three TF32 passes on a GPU, the CPU's own in the interpreter."""
    if dtype != jnp.float32:
        return None
    return "highest" if interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
