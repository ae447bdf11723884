"""Normalisations. Statistics are float32 whatever the activations' dtype."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxformers import paths
from jaxformers.sites import site, wanted


def unit_weights(path: str, width: int) -> Float[Array, "width"] | None:
    """The site ``<path>.weights``, when somebody asks for it: how much each unit counts in the statistics, ones."""
    return site(f"{path}.weights", jnp.ones(width)) if wanted(f"{path}.weights") else None


def average(h: Float[Array, "*batch width"], weights: Float[Array, "width"] | None) -> Float[Array, "*batch 1"]:
    """The mean over the last axis, by ``weights`` where there are any."""
    if weights is None:
        return h.mean(-1, keepdims=True)
    return (h * weights).sum(-1, keepdims=True) / jnp.maximum(weights.sum(), 1e-9)


def counted(h: Float[Array, "*batch width"], weights: Float[Array, "width"] | None) -> Float[Array, "*batch width"]:
    """Zero where a unit has weight 0: it is not there."""
    return h if weights is None else jnp.where(weights != 0, h, 0)


class LayerNorm(nnx.Module):
    """``(x − mean) / sqrt(var + eps) · scale + bias`` over the last axis (arXiv 1607.06450).

    Site ``weights`` (width,): how much each unit counts in mean and var, ones; units with weight 0 become 0.
    """

    def __init__(self, width: int, *, eps: float = 1e-5, affine: bool = True):
        self.path = ""
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width)) if affine else None
        self.bias = nnx.Param(jnp.zeros(width)) if affine else None

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        h, weights = x.astype(jnp.float32), unit_weights(self.path, x.shape[-1])
        h = h - average(h, weights)
        h = h * jax.lax.rsqrt(average(jnp.square(h), weights) + self.eps)
        if self.scale is not None:
            h = h * self.scale.get_value() + self.bias.get_value()
        return counted(h, weights).astype(x.dtype)


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x²) + eps) · scale`` over the last axis (arXiv 1910.07467). Site ``weights``: LayerNorm's."""

    def __init__(self, width: int, *, eps: float = 1e-6):
        self.path = ""
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        h, weights = x.astype(jnp.float32), unit_weights(self.path, x.shape[-1])
        h = h * jax.lax.rsqrt(average(jnp.square(h), weights) + self.eps)
        # rounded to the activations' dtype before the scale, as llama checkpoints were trained
        return counted(h.astype(x.dtype) * self.scale.get_value(), weights).astype(x.dtype)


class BatchNorm(nnx.Module):
    """``(x − mean) / sqrt(var + eps) · scale + bias`` with one mean and variance per channel (arXiv 1502.03167).

    By default those of the checkpoint, ``mean`` and ``var``, which are no weights: they get no gradient. With
    ``batch_statistics`` those of x itself, as in training; the running ones then follow by :func:`follow`. Rows that
    ``valid`` leaves out (padding) do not count.

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
        self,
        x: Float[Array, "*batch channels"],
        *,
        batch_statistics: bool = False,
        valid: Bool[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch channels"]:
        h = x.astype(jnp.float32)
        if batch_statistics:
            axes, n = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
            if n < 2:
                raise ValueError("batch_statistics: one value per channel has no variance; give more images or pixels")
            if valid is None:
                average, ratio = lambda y: y.mean(axes), n / (n - 1)
            else:
                real = jnp.broadcast_to(valid[..., None], x.shape)
                count = jnp.maximum(valid.sum(), 1).astype(jnp.float32)
                average, ratio = lambda y: jnp.where(real, y, 0).sum(axes) / count, count / jnp.maximum(count - 1, 1)
            mean = site(f"{self.path}.mean", average(h))
            var = site(f"{self.path}.var", average(jnp.square(h - mean)) * ratio) / ratio
        else:
            mean = site(f"{self.path}.mean", jax.lax.stop_gradient(self.mean.get_value().astype(jnp.float32)))
            var = site(f"{self.path}.var", jax.lax.stop_gradient(self.var.get_value().astype(jnp.float32)))
        h = (h - mean) * jax.lax.rsqrt(var + self.eps) * self.scale.get_value() + self.bias.get_value()
        return h.astype(x.dtype)


def follow(running: Float[Array, "channels"], batch: Float[Array, "channels"], momentum: float = 0.1) -> jax.Array:
    """The next running statistic: ``(1 − momentum) · running + momentum · batch``, torch's rule for a BatchNorm."""
    return (1 - momentum) * running + momentum * batch


def followed(params: Mapping[str, Any], seen: Mapping[str, jax.Array], momentum: float = 0.1) -> dict[str, Any]:
    """``params`` whose running statistics :func:`follow` those of a batch, ``seen`` at the sites of its batch norms.

    ``_, seen = jf.reap(apply, "**.norm.{mean,var}")(params, batch, rngs=key)``. Raises ValueError for a name that is no
    parameter.
    """
    flat = paths.flatten(params)
    for name, batch in seen.items():
        if name not in flat:
            raise ValueError(f"seen: {name} is no running statistic of these params")
        flat[name] = follow(flat[name], batch, momentum).astype(flat[name].dtype)
    return paths.unflatten(flat)
