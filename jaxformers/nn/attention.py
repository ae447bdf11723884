"""Multi-head attention: bidirectional, causal, prefix or cross; MHA, GQA or MQA; cached or not.

context = softmax(Q Kᵀ · scale + bias, masked) V                            (arXiv 1706.03762, equation 1)
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxformers.fake_quant import Quantiser
from jaxformers.kernels import attention as kernel
from jaxformers.kernels import decode
from jaxformers.kernels.tiles import platform
from jaxformers.nn.cache import Cache, KeyValue, extend
from jaxformers.nn.dropout import dropout, split
from jaxformers.nn.hard import keep_largest
from jaxformers.nn.linear import Linear
from jaxformers.nn.positions import rotate
from jaxformers.nn.rolling import Rolling
from jaxformers.sites import site, wanted

MASKED = -1e30  # added to the score of a key that is not to be seen: swallows any score, and overflows with none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which key a query may see, kept as rules so that a kernel need not read a dense matrix.

    ``valid`` (B, S): real keys (None = all). ``causal``: key slot ≤ query slot. ``window``: also query slot − key
    slot < window. ``prefix`` (B,): keys before it are visible whatever ``causal`` says (prefix language models).
    ``segments`` (B, L): packed documents see only themselves (no cache). ``start``: slot of the first query.
    """

    valid: Bool[Array, "batch keys"] | None = None
    prefix: Int[Array, "batch"] | None = None
    segments: Int[Array, "batch length"] | None = None
    start: Int[Array, ""] | int = 0
    causal: bool = dataclasses.field(metadata={"static": True}, default=False)
    window: int | None = dataclasses.field(metadata={"static": True}, default=None)

    def dense(self, queries: int, keys: int) -> Bool[Array, "batch 1 queries keys"] | None:
        """The rules as a boolean matrix, (1 or B, 1, queries, keys), or None when everything is visible."""
        allowed = None
        if self.causal:
            q = (jnp.arange(queries) + self.start)[:, None]
            k = jnp.arange(keys)[None, :]
            allowed = (k <= q)[None, None]
            if self.prefix is not None:
                allowed = allowed | (k[None, None] < self.prefix[:, None, None, None])
            if self.window is not None:
                allowed = allowed & (q - k < self.window)[None, None]
        if self.segments is not None:
            same = self.segments[:, None, :, None] == self.segments[:, None, None, :]
            allowed = same if allowed is None else allowed & same
        if self.valid is not None:
            valid = self.valid[:, None, None, :].astype(bool)
            allowed = valid if allowed is None else allowed & valid
        return allowed


def causal_mask(
    batch: int,
    length: int,
    attention_mask: Int[Array, "batch length"] | None,
    cache: Cache | None,
    *,
    window: int | None = None,
) -> tuple[Mask, Int[Array, "1 length"], Cache | None]:
    """A decoder's mask, the default positions of its ``length`` new tokens, and the cache with them marked."""
    slots = jnp.arange(length)[None]
    if cache is None:
        return Mask(valid=attention_mask, causal=True, window=window), slots, None
    if cache.valid.shape[0] != batch:
        raise ValueError(f"cache: made for {cache.valid.shape[0]} sequences, the batch has {batch}")
    cache = extend(cache, attention_mask, length)
    mask = Mask(valid=cache.valid, start=cache.used, causal=True, window=window)
    return mask, slots + cache.used, cache


def attend(
    q: Float[Array, "batch queries heads size"],
    k: Float[Array, "batch keys kv_heads size"],
    v: Float[Array, "batch keys kv_heads size"],
    *,
    mask: Mask | None = None,
    bias: Float[Array, "#batch heads queries keys"] | None = None,
    scale: float | None = None,
    path: str = "",
    rate: float = 0.0,
    key: jax.Array | None = None,
    top_k: int | None = None,
    operands: Callable[[jax.Array], jax.Array] | None = None,
) -> Float[Array, "batch queries heads size"]:
    """Attention of one layer, before the output projection.

    Heads must be a multiple of kv_heads. Scores and softmax are float32 at least. Probabilities are formed only when
    somebody asks for the sites ``<path>.scores`` or ``<path>.probs``; otherwise the fused path divides by the sum of
    the softmax after the product with V, where there is less to divide. When there is no dropout either, and sizes make
    it pay on this accelerator, a kernel runs instead (``kernels/attention.py``, ``kernels/decode.py`` for one query). A
    query that sees no key gets the mean of all values, or zeros from a kernel: not meaningful, but finite.
    ``top_k``: each query keeps its so many largest probabilities after dropout (:func:`jaxformers.nn.keep_largest`).
    ``operands`` rounds what enters the two products, (B, H, …) each: queries, keys, values, and the probabilities after
    dropout. No kernel does that.
    """
    batch, queries, heads, size = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    scale = size**-0.5 if scale is None else scale
    if operands is not None:
        q, k, v = (operands(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v))
    elif top_k is None and needs_only_context(path, rate, key):
        context = _by_kernel(q, k, v, mask or Mask(), bias, scale)
        if context is not None:
            return context
    # heads lead, and the queries of the heads that share a key head follow each other: plain batched matrix products
    q, k, v = ((q * scale).astype(q.dtype).swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2))
    q = q.reshape(batch, kv_heads, heads // kv_heads * queries, size)
    kind = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=kind)
    scores = scores.reshape(batch, heads, queries, keys)
    if bias is not None:
        scores = scores + bias.astype(kind)
    scores = site(f"{path}.scores", scores)
    allowed = None if mask is None else mask.dense(queries, keys)
    if allowed is not None:
        scores = scores + jnp.where(allowed, 0.0, MASKED)  # added: so a query without keys has Hugging Face's gradient
    if operands is not None or wanted(f"{path}.scores") or wanted(f"{path}.probs"):
        probs, total = site(f"{path}.probs", jax.nn.softmax(scores, axis=-1)), None
    else:
        probs, total = unnormalized_softmax(scores)
    probs = dropout(probs, rate, key)
    probs = probs if top_k is None else keep_largest(probs, top_k)
    probs = (probs if operands is None else operands(probs)).astype(v.dtype).reshape(batch, kv_heads, -1, keys)
    context = jnp.einsum("bhqk,bhkd->bhqd", probs, v).reshape(batch, heads, queries, v.shape[-1])
    return (context if total is None else (context / total).astype(v.dtype)).swapaxes(1, 2)


def needs_only_context(path: str, rate: float, key: jax.Array | None) -> bool:
    """Whether nobody looks at or rewrites the scores and probabilities of the attention ``path``, dropout included."""
    observed = wanted(f"{path}.scores") or wanted(f"{path}.probs")
    return not observed and (key is None or rate == 0.0)


def visible_slots(mask: Mask, batch: int, keys: int) -> Bool[Array, "batch keys"] | None:
    """The keys that a single query may see; None: all."""
    allowed = mask.dense(1, keys)
    return None if allowed is None else jnp.broadcast_to(allowed[:, 0, 0], (batch, keys))


def _by_kernel(q, k, v, mask: Mask, bias, scale) -> jax.Array | None:
    """The context by a kernel, or None where XLA is the better choice."""
    if platform() == "cpu" or k.shape[1] < min(kernel.WORTH, decode.WORTH):
        return None
    if q.shape[1] == 1 and bias is None:
        if decode.choose(k.shape[1]) == "xla":
            return None
        allowed = visible_slots(mask, q.shape[0], k.shape[1])
        keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)  # as a cache keeps them
        return decode.decode(q[:, 0], keys, values, allowed=allowed, scale=scale)[:, None]
    batch, queries, keys = *q.shape[:2], k.shape[1]
    if bias is not None and (bias.shape[0] not in (1, batch) or bias.shape[2:] != (queries, keys)):
        return None  # broadcast in a way that the kernels do not know
    valid = None if mask.valid is None else jnp.broadcast_to(mask.valid, (batch, keys))
    rules = {"causal": mask.causal, "valid": valid, "segments": mask.segments}
    if mask.causal:
        rules |= {"window": mask.window, "prefix": mask.prefix, "start": mask.start}
    how = kernel.choose(*kernel.operands(q, k, v, bias=bias, **rules))
    return None if how == "xla" else kernel.attention(q, k, v, bias=bias, scale=scale, implementation=how, **rules)


def unnormalized_softmax(scores: Float[Array, "*batch keys"]) -> tuple[Float[Array, "*batch keys"], jax.Array]:
    """(e, Σ e) over the last axis, with e = exp(scores − their maximum): softmax is their quotient."""
    e = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    return e, e.sum(axis=-1, keepdims=True)


class Attention(nnx.Module):
    """Projections ``query``, ``key``, ``value``, ``out`` around :func:`attend`.

    ``relative``: a module that gives this layer's own bias for a ``grid`` (rows, columns) of patches.
    ``reduce``: a module that gives, for such a grid, the shorter sequence that keys and values are made of.
    ``bias_heads``: which heads of a bias that all layers share are this layer's, where surgery has removed some.
    ``window``: this layer sees so many of the latest tokens only, itself included (a causal mask's window).
    ``top_k``: how many keys each query keeps, where surgery has made the attention hard (`jaxformers.nn.hard`).
    ``operands``: rounds what enters its two products, see :func:`attend` (`jaxformers.weights.fake_quantise`).

    Sites: ``scores`` (B, H, queries, keys) scaled, with bias, before the mask; ``probs``; ``context`` (B, L, H, size)
    before the output projection.
    """

    top_k: int | None = None

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_size: int | None = None,
        bias: bool = True,
        key_bias: bool | None = None,
        out_bias: bool | None = None,
        scale: float | None = None,
        rate: float = 0.0,
        interleaved: bool = False,
        window: int | None = None,
        memory_width: int | None = None,
        relative: nnx.Module | None = None,
        reduce: nnx.Module | None = None,
        std: float = 0.02,
        rngs: nnx.Rngs,
    ):
        kv_heads = heads if kv_heads is None else kv_heads
        if head_size is None and width % heads:
            raise ValueError(f"attention: width {width} is not divisible by {heads} heads")
        if heads % kv_heads:
            raise ValueError(f"attention: {heads} heads are not divisible by {kv_heads} key/value heads")
        self.path = ""
        self.heads, self.kv_heads, self.size = heads, kv_heads, head_size or width // heads
        self.scale, self.rate, self.interleaved, self.window = scale, rate, interleaved, window
        self.bias_heads: tuple[int, ...] | None = None
        self.operands: Quantiser | None = None
        self.relative = relative if relative is not None else nnx.data(None)
        self.reduce = reduce if reduce is not None else nnx.data(None)
        source = width if memory_width is None else memory_width
        self.query = Linear(width, heads * self.size, bias=bias, std=std, rngs=rngs)
        key_bias = bias if key_bias is None else key_bias  # BEiT's keys have none: softmax would not see it
        self.key = Linear(source, kv_heads * self.size, bias=key_bias, std=std, rngs=rngs)
        self.value = Linear(source, kv_heads * self.size, bias=bias, std=std, rngs=rngs)
        out_bias = bias if out_bias is None else out_bias
        self.out = Linear(heads * self.size, width, bias=out_bias, std=std, rngs=rngs)

    def empty_cache(self, batch: int, slots: int, dtype: jnp.dtype) -> KeyValue | Rolling:
        """Storage for ``slots`` keys and values; with a window, for no more than it."""
        rolling = self.window is not None and self.window < slots
        zeros = jnp.zeros((batch, self.kv_heads, self.window if rolling else slots, self.size), dtype)
        return Rolling(zeros, zeros) if rolling else KeyValue(zeros, zeros)

    def remember(self, memory: Float[Array, "batch keys memory_width"]) -> KeyValue:
        """The keys and values of an encoder's output, to be computed once for all steps of a decoder."""
        k, v = self._project(memory)
        return KeyValue(k.swapaxes(1, 2), v.swapaxes(1, 2))

    def _project(self, source: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch, length, _ = source.shape
        k = self.key(source).reshape(batch, length, self.kv_heads, self.size)
        return k, self.value(source).reshape(batch, length, self.kv_heads, self.size)

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        *,
        mask: Mask | None = None,
        bias: jax.Array | None = None,
        rotary: tuple[jax.Array, jax.Array] | None = None,
        cache: KeyValue | Rolling | None = None,
        memory: Float[Array, "batch keys memory_width"] | KeyValue | None = None,
        grid: tuple[int, int] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "batch length width"], KeyValue | Rolling | None]:
        """Attend from ``x`` to itself, to ``cache`` (after writing to it at slot ``mask.start``), or to ``memory``: an
        encoder's output, or what :meth:`remember` has made of it."""
        batch, length, _ = x.shape
        q = self.query(x).reshape(batch, length, self.heads, self.size)
        own = x if self.reduce is None else self.reduce(x, grid)
        source = own if memory is None else memory
        k, v = source.read(q.dtype) if isinstance(source, KeyValue) else self._project(source)
        if rotary is not None:
            q, k = rotate(q, rotary, self.interleaved), rotate(k, rotary, self.interleaved)
        if self.window is not None:
            mask = dataclasses.replace(mask, window=self.window)
        if isinstance(cache, Rolling):
            if bias is not None:
                raise ValueError("bias: a cache of a window's length does not keep the slots that a bias is for")
            cache, k, v, mask = cache.turn(k, v, mask)
        elif cache is not None:
            cache = cache.write(k, v, mask.start)
            k, v = cache.read(q.dtype)
        if bias is not None and self.bias_heads is not None:
            bias = bias[:, jnp.asarray(self.bias_heads)]
        if self.relative is not None:
            bias = self.relative(grid) if bias is None else bias + self.relative(grid)
        (drop,) = split(key, 1)
        options = {"scale": self.scale, "path": self.path, "rate": self.rate, "top_k": self.top_k}
        context = attend(q, k, v, mask=mask, bias=bias, key=drop, operands=self.operands, **options)
        context = site(f"{self.path}.context", context)
        return self.out(context.reshape(batch, length, self.heads * self.size)), cache
