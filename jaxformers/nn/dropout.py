"""Dropout with explicit keys: no key, no dropout."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dropout(x: Float[Array, "*shape"], rate: float, key: jax.Array | None) -> Float[Array, "*shape"]:
    """Zero each entry with probability ``rate`` and scale the rest by 1/(1 − rate); identity when ``key`` is None."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0).astype(x.dtype)


def split(key: jax.Array | None, n: int) -> list[jax.Array | None]:
    """``n`` keys from one, or ``n`` times None."""
    return [None] * n if key is None else list(jax.random.split(key, n))
