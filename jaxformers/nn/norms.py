"""Normalisations. Statistics are float32 whatever the activations' dtype."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class LayerNorm(nnx.Module):
    """``(x − mean) / sqrt(var + eps) · scale + bias`` over the last axis (arXiv 1607.06450)."""

    def __init__(self, width: int, *, eps: float = 1e-5, affine: bool = True):
        self.path = ""
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width)) if affine else None
        self.bias = nnx.Param(jnp.zeros(width)) if affine else None

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        h = x.astype(jnp.float32)
        h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
        if self.scale is not None:
            h = h * self.scale.get_value() + self.bias.get_value()
        return h.astype(x.dtype)


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x²) + eps) · scale`` over the last axis (arXiv 1910.07467)."""

    def __init__(self, width: int, *, eps: float = 1e-6):
        self.path = ""
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
        # rounded to the activations' dtype before the scale, as llama checkpoints were trained
        return (h.astype(x.dtype) * self.scale.get_value()).astype(x.dtype)
