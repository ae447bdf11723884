"""Normalisations. Statistics are float32 at least, whatever the activations' dtype."""

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


def wide(x: jax.Array) -> jax.Array:
    """x in float32, or in float64 where it is that."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


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
        h, weights = wide(x), unit_weights(self.path, x.shape[-1])
        h = h - average(h, weights)
        h = h * jax.lax.rsqrt(average(jnp.square(h), weights) + self.eps)
        if self.scale is not None:
            h = h * self.scale.get_value() + self.bias.get_value()
        return counted(h, weights).astype(x.dtype)


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x²) + eps) · scale`` over the last axis (arXiv 1910.07467). Site ``weights``: LayerNorm's.

    ``bias``: plus a bias, as where it stands for a LayerNorm of vectors whose mean is 0 (arXiv 2305.14858): the two are
    equal there. ``affine`` False leaves both out.
    """

    def __init__(self, width: int, *, eps: float = 1e-6, affine: bool = True, bias: bool = False):
        self.path = ""
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width)) if affine else None
        self.bias = nnx.Param(jnp.zeros(width)) if affine and bias else None

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        h, weights = wide(x), unit_weights(self.path, x.shape[-1])
        h = h * jax.lax.rsqrt(average(jnp.square(h), weights) + self.eps)
        if self.scale is None:
            return counted(h, weights).astype(x.dtype)
        if self.bias is not None:
            return counted(h * self.scale.get_value() + self.bias.get_value(), weights).astype(x.dtype)
        # rounded to the activations' dtype before the scale, as llama checkpoints were trained
        return counted(h.astype(x.dtype) * self.scale.get_value(), weights).astype(x.dtype)


class CRMSNorm(nnx.Module):
    """``x / sqrt((Σ x² + (Σ x)²) / width + eps)``: compressed RMSNorm (arXiv 2305.14858, section 3.3).

    x holds the first width − 1 coordinates of a vector whose ``width`` coordinates sum to 0, or all of them with a zero
    in the place of the last. The result is that of a LayerNorm of the whole vector, in the same form as x; with
    ``expand`` the last coordinate, −Σ x, is put in its place, and ``affine`` adds a scale and a bias.
    """

    def __init__(self, width: int, *, eps: float = 1e-5, expand: bool = False, affine: bool = False):
        if affine and not expand:
            raise ValueError("affine: a scale would not keep the sum of the coordinates; it goes with expand")
        self.path = ""
        self.width, self.eps, self.expand = width, eps, expand
        self.scale = nnx.Param(jnp.ones(width)) if affine else None
        self.bias = nnx.Param(jnp.zeros(width)) if affine else None

    def __call__(self, x: Float[Array, "*batch shorter"]) -> Float[Array, "*batch out"]:
        h = wide(x)
        total = h.sum(-1, keepdims=True)
        power = (jnp.square(h).sum(-1, keepdims=True) + jnp.square(total)) / self.width
        if self.expand:
            h = jnp.concatenate([h[..., : self.width - 1], -total], axis=-1)
        h = h * jax.lax.rsqrt(power + self.eps)
        if self.scale is not None:
            h = h * self.scale.get_value() + self.bias.get_value()
        return h.astype(x.dtype)


class Recentre(nnx.Module):
    """``y − mean(y)`` over the last axis, where a stream of vectors with mean 0 starts; y is x, or with ``normalize``
    its LayerNorm.

    ``keep``: how many coordinates are handed on, all ``width`` by default, or but the last; with ``pad`` a zero stands
    for that one.
    """

    def __init__(
        self, width: int, *, eps: float = 1e-5, normalize: bool = False, keep: int | None = None, pad: bool = False
    ):
        self.path = ""
        self.eps, self.normalize, self.keep, self.pad = eps, normalize, width if keep is None else keep, pad
        self.scale = nnx.Param(jnp.ones(width)) if normalize else None
        self.bias = nnx.Param(jnp.zeros(width)) if normalize else None

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch kept"]:
        h = wide(x)
        if self.normalize:
            h = h - h.mean(-1, keepdims=True)
            h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
            h = h * self.scale.get_value() + self.bias.get_value()
        h = (h - h.mean(-1, keepdims=True))[..., : self.keep]
        if self.pad:
            h = jnp.pad(h, [(0, 0)] * (h.ndim - 1) + [(0, 1)])
        return h.astype(x.dtype)


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
