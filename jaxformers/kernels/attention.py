"""Attention without the matrix of scores: the reference, and the choice between it, cuDNN, JAX's and our own kernels.

context = softmax(Q Kᵀ · scale + bias, masked) V, L = log Σ exp of the masked scores    (arXiv 1706.03762, 2205.14135)

Who runs what (:func:`choose`; figures are in ``benchmarks/results/kernels_attention_h100.md``):

* CPU, and sequences below ``WORTH`` keys: XLA. There the scores fit the caches and a fused softmax is as fast.
* GPU, 16-bit, causal or unmasked, no bias: cuDNN through ``jax.nn.dot_product_attention``. On Hopper its
  forward pass is not the fastest (4 × 4096 causal tokens, 16 heads: 557 µs at size 128 against 512, though 360 against
  375 at size 64), but its backward pass is (both, 8 × 2048, size 128: 1364 µs; ours, with older tiles and Triton's
  forward pass, 3036), and the choice does not know whether gradients will be asked for.
* GPU otherwise (padding, prefixes, packed documents, additive biases with their gradient, the log-sum-exp, float32):
  ``attention_gpu``, Pallas-Triton; also for column sums, from ``WORTH_SUMS`` keys on. On Hopper the forward pass is
  that of ``attention_mosaic`` where it takes the operands: 16-bit, sizes of 64 and 128, causal or unmasked, whole tiles
  (512 µs against Triton's 731 at size 128, 375 against 455 at 64).
* Programs that XLA cuts over several devices: XLA or cuDNN; a Pallas kernel cannot be cut, but runs in ``shard_map``.
* TPU: ``attention_tpu``. It was compiled for TPUs, not timed on one, nor compared with JAX's splash attention.

Memory: XLA writes and reads 4·B·H·Q·S bytes of scores (twice that for the backward pass), the kernels none of them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxformers.kernels import attention_gpu, attention_mosaic, attention_tpu
from jaxformers.kernels.tiles import MASKED, Rules, hopper, partitioned, platform, seen

KERNELS = {"pallas_gpu": attention_gpu, "pallas_tpu": attention_tpu}
WORTH = 1024  # keys from which a kernel beats XLA's fused softmax
WORTH_SUMS = 256  # the same for column sums: XLA writes the scores, the kernel a vector


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    window: int | None = None,
    valid: jax.Array | None = None,
    prefix: jax.Array | None = None,
    segments: Any = None,
    start: jax.Array | int = 0,
    bias: jax.Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    tiles: Any = None,
    interpret: bool = False,
) -> Any:
    """Attention (B, Q, H, E), and with ``return_lse`` also the log-sum-exp (B, H, Q) in float32.

    A key is seen when it is ``valid``, of the same segment (``segments``: (B, L), or a pair for queries and keys), and,
    if ``causal``, at a slot ≤ the query's slot i + ``start`` or < ``prefix``, and less than ``window`` slots behind.
    H is a multiple of the key heads. Queries that see no key give zeros, and −1e30 as their log-sum-exp.
    Differentiable in q, k, v and bias, and through both results.

    ``implementation``: None (:func:`choose` decides), "xla", "cudnn", "pallas_gpu" or "pallas_tpu".
    ``tiles``: the kernel's own, see ``attention_gpu.Tiles`` and ``attention_tpu.Tiles``; None: :func:`default_tiles`.
    ``interpret`` runs a Pallas kernel on the CPU.

    Raises ValueError for shapes that do not fit, a window or prefix without ``causal``, and an implementation that
    lacks what is asked for.
    """
    x, rules = operands(
        q, k, v, causal=causal, window=window, valid=valid, prefix=prefix, segments=segments, start=start, bias=bias
    )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if implementation is None:
        implementation = choose(x, rules, return_lse=return_lse)
    if implementation == "xla":
        out, lse = reference(x, rules, scale)
    elif implementation == "cudnn":
        return cudnn(x, rules, scale, return_lse)
    elif implementation in KERNELS:
        kernels = KERNELS[implementation]
        tiles = tiles or default_tiles(implementation, x, rules, scale, interpret)
        out, lse = _flash(kernels, rules, scale, tiles, interpret, *_split(x))
    else:
        raise ValueError(f"implementation: expected xla, cudnn, {', '.join(KERNELS)}, got {implementation!r}")
    return (out, lse) if return_lse else out


def column_sums(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    votes: jax.Array,
    *,
    scale: float | None = None,
    bias: jax.Array | None = None,
    implementation: str | None = None,
    tiles: Any = None,
    interpret: bool = False,
    **mask: Any,
) -> jax.Array:
    """Aᵀ s, float32: what each key receives when every query hands out its vote s along its attention A.

    Zero-TPrune's weighted page rank (arXiv 2305.17328) repeats it: s ← Aᵀ s, Q and K being read once a vote. ``lse`` is
    what :func:`attention` returned for the same arguments; ``mask`` as there. Only the reference has a gradient.
    """
    x, rules = operands(q, k, None, bias=bias, **mask)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    expected = (q.shape[0], q.shape[2], q.shape[1])
    for name, a in (("lse", lse), ("votes", votes)):
        if a.shape != expected:
            raise ValueError(f"{name}: expected (batch, heads, queries) {expected}, got {a.shape}")
    implementation = implementation or choose(x, rules, return_lse=True, worth=WORTH_SUMS)
    if implementation == "xla":
        s, allowed = _scores(x, rules, scale)
        p = jnp.exp(s - lse[..., None])
        p = p if allowed is None else jnp.where(allowed, p, 0.0)
        return jnp.einsum("bhqk,bhq->bhk", p, votes.astype(jnp.float32), precision="highest")
    if implementation not in KERNELS:
        raise ValueError(f"implementation: column sums have xla, {', '.join(KERNELS)}, got {implementation!r}")
    kernels = KERNELS[implementation]
    tiles = tiles or kernels.default_tiles(q.shape[-1], q.dtype)
    x = {**x, "lse": lse.astype(jnp.float32), "votes": votes.astype(jnp.float32)}
    return _no_gradient(kernels, rules, scale, tiles.dkv, interpret, x)


def choose(x: dict[str, Any], rules: Rules, *, return_lse: bool = False, worth: int = WORTH) -> str:
    """The implementation for these operands on this platform; the module's docstring says why."""
    where = platform()
    if where not in ("gpu", "tpu") or rules.keys < worth or rules.queries < 16:
        return "xla"
    ours = "xla" if partitioned() else "pallas_" + where
    if where == "tpu":
        return ours
    plain = not (rules.by_content or rules.prefix or return_lse or "bias" in x)
    square = not rules.causal or ("start" not in x and rules.queries == rules.keys)
    sizes = x["q"].shape[-1] == x.get("v", x["k"]).shape[-1] and x["q"].shape[-1] % 8 == 0
    if plain and square and sizes and x["q"].shape[-1] <= 128 and x["q"].dtype in (jnp.bfloat16, jnp.float16):
        return "cudnn"
    return ours


def default_tiles(implementation: str, x: dict[str, Any], rules: Rules, scale: float, interpret: bool = False) -> Any:
    """The tiles of a Pallas implementation; the forward one also says which kernel runs it on a GPU.

    On Hopper ``attention_mosaic`` does where it takes the operands; it is never interpreted.
    """
    size = x["q"].shape[-1]
    tiles = KERNELS[implementation].default_tiles(max(size, x["v"].shape[-1]), x["q"].dtype)
    if implementation == "pallas_gpu" and not interpret and hopper() and attention_gpu.takes_mosaic(x, rules, scale):
        return dataclasses.replace(tiles, forward=attention_mosaic.default_tile(size))
    return tiles


def operands(q, k, v, *, causal=False, window=None, valid=None, prefix=None, segments=None, start=0, bias=None):
    """The checked arguments as a dict of arrays and the static :class:`Rules`."""
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k: expected (batch, length, heads, size) alike, got {q.shape} and {k.shape}")
    if v is not None and (v.ndim != 4 or v.shape[:3] != k.shape[:3]):
        raise ValueError(f"v: expected {k.shape[:3]} and a size, got {v.shape}")
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    if heads % k.shape[2]:
        raise ValueError(f"q: {heads} heads are no multiple of {k.shape[2]} key heads")
    if not causal and (window is not None or prefix is not None):
        raise ValueError("window and prefix change a causal mask; give causal=True with them")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    x: dict[str, Any] = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}
    if bias is not None:
        shape = [(batch, 1), (heads, 1), (queries,), (keys,)]
        if bias.ndim != 4 or any(n not in allowed for n, allowed in zip(bias.shape, shape, strict=True)):
            raise ValueError(f"bias: expected (1 or {batch}, 1 or {heads}, {queries}, {keys}), got {bias.shape}")
        x["bias"] = bias
    if segments is not None:
        pair = segments if isinstance(segments, tuple) else (segments, segments)
        if pair[0].shape != (batch, queries) or pair[1].shape != (batch, keys):
            raise ValueError(
                f"segments: expected ({batch}, {queries}) and ({batch}, {keys}), got {pair[0].shape}, {pair[1].shape}"
            )
        x["query_segments"], x["key_segments"] = (jnp.asarray(s, jnp.int32) for s in pair)
    if valid is not None:
        if valid.shape != (batch, keys):
            raise ValueError(f"valid: expected ({batch}, {keys}), got {valid.shape}")
        real = x.get("key_segments", jnp.zeros((batch, keys), jnp.int32))
        x["key_segments"] = jnp.where(jnp.asarray(valid).astype(bool), real, -1)
    if causal and not (isinstance(start, int) and start == 0):
        x["start"] = jnp.asarray(start, jnp.int32).reshape(1)
    if prefix is not None:
        if prefix.shape != (batch,):
            raise ValueError(f"prefix: expected ({batch},), got {prefix.shape}")
        x["prefix"] = jnp.asarray(prefix, jnp.int32)
    static = (start if isinstance(start, int) else None) if causal else 0
    rules = Rules(queries, keys, causal, window, prefix is not None, segments is not None, valid is not None, static)
    return x, rules


# ------------------------------------------------------------------------------------------------ implementations


def _scores(x: dict[str, Any], rules: Rules, scale: float):
    """Scores (B, H, Q, S) in float32, and which of them count."""
    q, k = x["q"], x["k"]
    batch, queries, heads, size = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, queries, kv_heads, heads // kv_heads, size)
    exact = "highest" if q.dtype == jnp.float32 else None
    s = jnp.einsum("bqhgd,bkhd->bhgqk", q, k, precision=exact, preferred_element_type=jnp.float32)
    s = s.reshape(batch, heads, queries, rules.keys) * scale
    if "bias" in x:
        s = s + x["bias"].astype(jnp.float32)
    slots = (jnp.arange(rules.queries) + (x["start"][0] if "start" in x else 0))[None, None, :, None]
    keys = jnp.arange(rules.keys)[None, None, None, :]
    prefix = x["prefix"][:, None, None, None] if "prefix" in x else None
    query_segments = x["query_segments"][:, None, :, None] if "query_segments" in x else None
    key_segments = x["key_segments"][:, None, None, :] if "key_segments" in x else None
    return s, seen(rules, slots, keys, prefix, query_segments, key_segments, positional=rules.causal)


def reference(x: dict[str, Any], rules: Rules, scale: float):
    """The definition: (out, log-sum-exp) of the checked operands. Forms all scores."""
    s, allowed = _scores(x, rules, scale)
    s = s if allowed is None else jnp.where(allowed, s, MASKED)
    top = jax.lax.stop_gradient(s.max(axis=-1, keepdims=True))
    e = jnp.exp(s - top)
    e = e if allowed is None else jnp.where(allowed, e, 0.0)
    total = e.sum(axis=-1, keepdims=True)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    lse = jnp.where(some, top + jnp.log(safe), MASKED)[..., 0]
    v = x["v"]
    batch, keys, kv_heads, size = v.shape
    e = e.astype(v.dtype).reshape(batch, kv_heads, -1, rules.queries, keys)
    exact = "highest" if v.dtype == jnp.float32 else None
    out = jnp.einsum("bhgqk,bkhd->bhgqd", e, v, precision=exact, preferred_element_type=jnp.float32)
    out = out.reshape(batch, -1, rules.queries, size) / safe
    return out.swapaxes(1, 2).astype(x["q"].dtype), lse


def cudnn(x: dict[str, Any], rules: Rules, scale: float, return_lse: bool = False):
    """cuDNN's fused attention through JAX; ValueError for what it lacks here."""
    lacking = [n for n in ("prefix", "query_segments", "key_segments", "start") if n in x]
    if lacking or return_lse:
        raise ValueError(f"implementation: cudnn has no {lacking[0] if lacking else 'log-sum-exp'}; use pallas_gpu")
    window = None if rules.window is None else (rules.window - 1, 0)
    return jax.nn.dot_product_attention(
        x["q"],
        x["k"],
        x["v"],
        x.get("bias"),
        scale=scale,
        is_causal=rules.causal,
        local_window_size=window,
        implementation="cudnn",
    )


_DIFFERENTIABLE = ("q", "k", "v", "bias")


def _split(x: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    floats = {n: a for n, a in x.items() if n in _DIFFERENTIABLE}
    return floats, {n: a for n, a in x.items() if n not in _DIFFERENTIABLE}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _flash(kernels: Any, rules: Rules, scale: float, tiles: Any, interpret: bool, floats: dict, rest: dict):
    return kernels.forward({**floats, **rest}, rules, scale, tiles.forward, interpret)


def _flash_forward(kernels, rules, scale, tiles, interpret, floats, rest):
    out, lse = kernels.forward({**floats, **rest}, rules, scale, tiles.forward, interpret)
    return (out, lse), (floats, rest, out, lse)


def _flash_backward(kernels, rules, scale, tiles, interpret, saved, grads):
    floats, rest, out, lse = saved
    do, dlse = grads
    delta = jnp.einsum("bqhd,bqhd->bhq", do.astype(jnp.float32), out.astype(jnp.float32), precision="highest") - dlse
    x = {**floats, **rest, "do": do.astype(out.dtype), "lse": lse, "delta": delta}
    found = kernels.backward(x, rules, scale, tiles, interpret)
    return {n: found["d" + n] for n in floats}, None


_flash.defvjp(_flash_forward, _flash_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _no_gradient(kernels: Any, rules: Rules, scale: float, tile: Any, interpret: bool, x: dict):
    return kernels.column_sums(x, rules, scale, tile, interpret)


def _refuse(*_: Any):
    raise NotImplementedError("column_sums: the kernels have no gradient; use implementation='xla' to differentiate")


_no_gradient.defvjp(_refuse, _refuse)
