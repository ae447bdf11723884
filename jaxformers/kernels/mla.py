"""Absorbed decoding of multi-head latent attention: all heads read one cache line a token, once.

The cache holds [c | k_pe] (B, S, R + P): the latent of keys and values, and the rotated key shared by all heads
(arXiv 2405.04434, 2503.11132). With W_uk absorbed into the query (q̃ = q_nope W_uk) and W_uv into what follows,

    scores = (q̃ · c + q_pe · k_pe) · scale,   context = softmax(scores) c   (B, H, R).

Bytes: the cache once, B·S·(R+P) elements; FLOPs 2·B·S·H·(2R+P): with 16-bit elements about 2H FLOPs a byte, so that
from a hundred heads on the tensor cores, not the memory, are the limit. XLA reads the latent twice (as keys, as values)
and writes the scores between. The kernels are those of ``decode.py``, and so is the choice; elsewhere
:func:`reference` runs.
"""

import jax
import jax.numpy as jnp

from jaxformers.kernels import decode
from jaxformers.kernels.decode import Tile


def mla_decode(
    q_latent: jax.Array,
    q_rope: jax.Array,
    cache: jax.Array,
    *,
    scale: float,
    valid: jax.Array | None = None,
    implementation: str | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The latent context (B, H, R) of one new token: q_latent (B, H, R) and q_rope (B, H, P) over the slots of
    ``cache`` (B, S, R + P) that ``valid`` (B, S) marks; zeros where it marks none.

    ``scale`` is 1/√(d_nope + d_rope) of the unabsorbed heads. ``implementation``: None (``decode.choose``), "xla",
    "pallas_gpu" or "pallas_tpu". The kernels take their gradients from the reference.

    Raises ValueError for shapes that do not fit.
    """
    batch, heads, rank = q_latent.shape
    if q_rope.shape[:2] != (batch, heads):
        raise ValueError(f"q_rope: expected ({batch}, {heads}, rope), got {q_rope.shape}")
    if cache.ndim != 3 or cache.shape[0] != batch or cache.shape[2] != rank + q_rope.shape[2]:
        raise ValueError(f"cache: expected ({batch}, slots, {rank} + {q_rope.shape[2]}), got {cache.shape}")
    if valid is not None and valid.shape != cache.shape[:2]:
        raise ValueError(f"valid: expected {cache.shape[:2]}, got {valid.shape}")
    implementation = implementation or decode.choose(cache.shape[1])
    if implementation == "xla":
        return reference(q_latent, q_rope, cache, scale, valid)
    if implementation not in ("pallas_gpu", "pallas_tpu"):
        raise ValueError(f"implementation: expected xla, pallas_gpu or pallas_tpu, got {implementation!r}")
    scale = float(scale)

    def kernel(q, turned, cache, valid):
        q, turned = q.astype(cache.dtype), turned.astype(cache.dtype)
        if implementation == "pallas_tpu":
            x = {"q": jnp.concatenate([q, turned], axis=-1)[:, None], "k": cache[:, None]}
            return decode.walk(x, valid, scale, rank, interpret)[:, 0].astype(q_latent.dtype)
        slots = 64 if rank <= 512 else 32
        cut = tile or (Tile(16, slots, None, 4, 2) if cache.dtype.itemsize == 2 else Tile(16, 16, None, 8, 2))
        x = {"q": q[:, None], "q2": turned[:, None], "k": cache[:, None]}
        return decode.split_decode(x, valid, scale, cut, interpret)[:, 0].astype(q_latent.dtype)

    defined = lambda q, turned, cache, valid: reference(q, turned, cache, scale, valid)
    return decode.with_gradient_of(defined, kernel, (q_latent, q_rope, cache), valid)


def reference(q_latent, q_rope, cache, scale: float, valid=None):
    """The definition, float32 inside."""
    rank = q_latent.shape[-1]
    exact = "highest" if cache.dtype == jnp.float32 else None
    q = jnp.concatenate([q_latent, q_rope], axis=-1).astype(cache.dtype)
    s = jnp.einsum("bhr,bsr->bhs", q, cache, precision=exact, preferred_element_type=jnp.float32) * scale
    p = decode.masked_softmax(s, None if valid is None else valid[:, None, :].astype(bool)).astype(cache.dtype)
    context = jnp.einsum("bhs,bsr->bhr", p, cache[..., :rank], precision=exact, preferred_element_type=jnp.float32)
    return context.astype(q_latent.dtype)
