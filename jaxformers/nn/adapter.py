"""Bottleneck adapters: small trained layers inside a frozen model."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformers import paths, surgery
from jaxformers.nn.linear import Linear
from jaxformers.nn.mlp import activation


class Adapter(nnx.Module):
    """``up(act(down(y)))``, added to the output ``y`` of the linear layer that carries it."""

    def __init__(self, width: int, size: int, *, act: str = "gelu", rngs: nnx.Rngs):
        self.path, self.act = "", act
        activation(act)
        self.down = Linear(width, size, std=width**-0.5, rngs=rngs)
        self.up = Linear(size, width, std=0.0, rngs=rngs)

    def __call__(self, y: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        return self.up(activation(self.act)(self.down(y)))


def add_adapters(
    model: nnx.Module,
    targets: paths.Patterns = "layers.*.{attention.out,mlp.down}",
    *,
    size: int = 64,
    act: str = "gelu",
    key: jax.Array,
) -> nnx.Module:
    """A copy of ``model`` with an :class:`Adapter` of ``size`` hidden units on each linear layer at ``targets``.

    By default after each sub-layer, before its residual connection (Houlsby et al., arXiv 1902.00751, figure 2).
    ``up`` starts at zero: the model's outputs do not change. `jaxformers.train.fit` trains the adapters and a
    classification head, the rest stays frozen, unless its ``trainable`` says otherwise. Raises ValueError when ``size``
    < 1, nothing matches, or a target has an adapter already.
    """
    if size < 1:
        raise ValueError(f"size: expected 1 or more, got {size}")
    model = surgery.copy(model)
    linears = surgery.find_linears(model, targets)
    for (path, linear), k in zip(linears, jax.random.split(key, len(linears)), strict=True):
        if linear.adapter is not None:
            raise ValueError(f"targets: {path} has an adapter already")
        kernel = linear.kernel.get_value()
        dtype = kernel.dtype if jnp.issubdtype(kernel.dtype, jnp.floating) else jnp.float32
        adapter = Adapter(kernel.shape[-1], size, act=act, rngs=nnx.Rngs(k))
        graph, state = nnx.split(adapter)
        linear.adapter = nnx.merge(graph, jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), state))
    return surgery.record(
        model, "jaxformers.nn.adapter:_abstract_adapters", targets=[p for p, _ in linears], size=size, act=act
    )


def _abstract_adapters(model: nnx.Module, *, targets: list[str], size: int, act: str) -> nnx.Module:
    """Rebuild the structure that :func:`add_adapters` made; the checkpoint fills the values."""
    return add_adapters(model, targets, size=size, act=act, key=jax.random.key(0))
