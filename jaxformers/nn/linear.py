"""Linear maps and embedding tables: where parameters are, and where their sites are."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers import weights
from jaxformers.sites import site


class Linear(nnx.Module):
    """``y = x W + b`` with ``kernel`` W (in, out), an array or a typed weight. Sites: ``input``, ``output``.

    ``adapter``: a module that surgery has put behind the map, ``y + adapter(y)``.
    """

    def __init__(self, d_in: int, d_out: int, *, bias: bool = True, std: float = 0.02, rngs: nnx.Rngs):
        self.path = ""
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros(d_out)) if bias else None
        self.adapter = nnx.data(None)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        x = site(f"{self.path}.input", x)
        y = weights.matmul(x, self.kernel.get_value())
        if self.bias is not None:
            y = add_bias(y, self.bias.get_value())
        if self.adapter is not None:
            y = y + self.adapter(y)
        return site(f"{self.path}.output", y)


class CenteredLinear(nnx.Module):
    """``y = x (W − W̄) + b − b̄``, W̄ the mean of each row of ``kernel`` W (in, out) and b̄ that of the bias.

    So y has mean 0 over its outputs, whatever an optimiser does to W and b, and neither gets a gradient that would
    move the mean (arXiv 2305.14858, section 3.2). Sites: ``input``, ``output``.
    """

    def __init__(self, d_in: int, d_out: int, *, bias: bool = True, std: float = 0.02, rngs: nnx.Rngs):
        self.path = ""
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros(d_out)) if bias else None
        self.adapter = nnx.data(None)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        x = site(f"{self.path}.input", x)
        y = weights.matmul(x, centered(weights.dense(self.kernel.get_value())))
        if self.bias is not None:
            y = add_bias(y, centered(self.bias.get_value()))
        if self.adapter is not None:
            y = y + centered(self.adapter(y))
        return site(f"{self.path}.output", y)


def centered(x: Float[Array, "*batch out"]) -> Float[Array, "*batch out"]:
    """``x − mean(x)`` over the last axis; the mean is taken in float32 at least."""
    h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (h - h.mean(-1, keepdims=True)).astype(x.dtype)


WIDE = 8192  # outputs from which a CPU's sum over all rows takes longer than a product with ones


def add_bias(y: Float[Array, "*batch out"], bias: Float[Array, "out"]) -> Float[Array, "*batch out"]:
    """``y + bias``. On a CPU a vocabulary's bias is added as ones · bias, an outer product that XLA turns into a
    broadcast; its gradient is then a matrix product, ten times as fast there as the sum over a column's rows."""
    bias = bias.astype(y.dtype)
    if y.shape[-1] < WIDE or jax.default_backend() != "cpu":
        return y + bias
    rows = math.prod(y.shape[:-1])
    return y + (jnp.ones((rows, 1), y.dtype) @ bias[None]).reshape(y.shape)


class Embed(nnx.Module):
    """A table ``embedding`` (rows, width), array or typed weight: looked up, or transposed as output projection."""

    def __init__(self, rows: int, width: int, *, std: float = 0.02, rngs: nnx.Rngs):
        self.path = ""
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (rows, width)))

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch width"]:
        return weights.take(self.embedding.get_value(), ids)

    def attend(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch rows"]:
        """Scores of every row, ``x Eᵀ``: tied input and output embeddings."""
        return weights.matmul(x, weights.dense(self.embedding.get_value()).T)
