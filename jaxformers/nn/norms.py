"""Normalisations. Statistics are float32 whatever the activations' dtype."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformers.sites import site


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


class BatchNorm(nnx.Module):
    """``(x − mean) / sqrt(var + eps) · scale + bias`` with one mean and variance per channel (arXiv 1502.03167).

    By default those of the checkpoint, ``mean`` and ``var``, which are no weights: they get no gradient. With
    ``batch_statistics`` those of x itself, as in training; the running ones then follow by :func:`follow`.

    Sites: ``mean``, ``var`` (channels,): what was used; the variance is the unbiased one, as torch's running average.
    """

    def __init__(self, width: int, *, eps: float = 1e-5):
        self.path = ""
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.mean = nnx.Param(jnp.zeros(width))
        self.var = nnx.Param(jnp.ones(width))

    def __call__(
        self, x: Float[Array, "*batch channels"], *, batch_statistics: bool = False
    ) -> Float[Array, "*batch channels"]:
        h = x.astype(jnp.float32)
        if batch_statistics:
            axes, n = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
            if n < 2:
                raise ValueError("batch_statistics: one value per channel has no variance; give more images or pixels")
            mean = site(f"{self.path}.mean", h.mean(axes))
            var = site(f"{self.path}.var", jnp.square(h - mean).mean(axes) * (n / (n - 1))) * ((n - 1) / n)
        else:
            mean = site(f"{self.path}.mean", jax.lax.stop_gradient(self.mean.get_value().astype(jnp.float32)))
            var = site(f"{self.path}.var", jax.lax.stop_gradient(self.var.get_value().astype(jnp.float32)))
        h = (h - mean) * jax.lax.rsqrt(var + self.eps) * self.scale.get_value() + self.bias.get_value()
        return h.astype(x.dtype)


def follow(running: Float[Array, "channels"], batch: Float[Array, "channels"], momentum: float = 0.1) -> jax.Array:
    """The next running statistic: ``(1 − momentum) · running + momentum · batch``, torch's rule for a BatchNorm."""
    return (1 - momentum) * running + momentum * batch
