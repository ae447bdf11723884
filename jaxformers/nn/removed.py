"""What stands where surgery has removed a sub-layer: it keeps the block's shape and costs nothing."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformers.sites import site


class Bias(nnx.Module):
    """What is left of a linear map without inputs: its ``bias``, for every position. Site: ``output``."""

    def __init__(self, width: int):
        self.path = ""
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        return site(f"{self.path}.output", jnp.broadcast_to(self.bias.get_value().astype(x.dtype), x.shape))


class NoAttention(nnx.Module):
    """Attention without heads: zeros, or the bias ``out`` that its output projection had (``width`` given)."""

    def __init__(self, width: int | None = None):
        self.path = ""
        self.out = nnx.data(None) if width is None else Bias(width)

    def empty_cache(self, batch: int, slots: int, dtype: jnp.dtype) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def remember(self, memory: Float[Array, "batch keys memory_width"]) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def __call__(
        self, x: Float[Array, "batch length width"], *, cache: Any = None, **context: Any
    ) -> tuple[Float[Array, "batch length width"], Any]:
        return jnp.zeros_like(x) if self.out is None else self.out(x), cache


class NoMLP(nnx.Module):
    """An MLP without hidden units: zeros, or the bias ``down`` that its second map had (``width`` given)."""

    def __init__(self, width: int | None = None):
        self.path = ""
        self.down = nnx.data(None) if width is None else Bias(width)

    def __call__(
        self, x: Float[Array, "*batch width"], *, key: jax.Array | None = None
    ) -> Float[Array, "*batch width"]:
        return jnp.zeros_like(x) if self.down is None else self.down(x)


class Identity(nnx.Module):
    """``x``: where a norm stood whose sub-layer has gone."""

    def __init__(self) -> None:
        self.path = ""

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        return x
