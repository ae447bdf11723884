"""One vector per sequence."""

import jax.numpy as jnp
from jaxtyping import Array, Float

MODES = ("mean", "cls", "max", "last")


def pool(
    hidden: Float[Array, "batch length width"], attention_mask: Float[Array, "batch length"] | None, mode: str
) -> Float[Array, "batch width"]:
    """Pool over real tokens: ``mean`` (sum(h·m) / max(sum(m), 1e-9)), ``cls`` (first), ``last`` (last real), ``max``.

    Raises ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"pooling {mode!r} is unknown; there are {', '.join(MODES)}")
    if attention_mask is None:
        attention_mask = jnp.ones(hidden.shape[:2], jnp.int32)
    if mode == "cls":
        return hidden[:, 0]
    if mode == "last":
        position = jnp.arange(hidden.shape[1]) * (attention_mask != 0)
        return jnp.take_along_axis(hidden, position.argmax(1)[:, None, None], axis=1)[:, 0]
    m = attention_mask[:, :, None].astype(hidden.dtype)
    if mode == "max":
        return jnp.where(m > 0, hidden, jnp.finfo(hidden.dtype).min).max(axis=1)
    total = jnp.sum(hidden * m, axis=1, dtype=jnp.float32)
    return (total / jnp.maximum(m.sum(axis=1, dtype=jnp.float32), 1e-9)).astype(hidden.dtype)


def normalize(x: Float[Array, "batch width"]) -> Float[Array, "batch width"]:
    """Rows of Euclidean length 1; a zero row stays zero (norm clipped at 1e-12)."""
    norm = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True))
    return (x / jnp.maximum(norm, 1e-12)).astype(x.dtype)
