"""The transformer block, and the stack of blocks that runs as a loop or as a scan."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformers import sites
from jaxformers.nn.attention import Mask
from jaxformers.nn.cache import WithMemory
from jaxformers.nn.dropout import dropout, split
from jaxformers.sites import site


class Block(nnx.Module):
    """Attention and MLP with residual connections; sites ``input`` and ``output``.

    ``prenorm`` (GPT-2, llama): ``x + f(norm(x))``; otherwise (BERT): ``norm(x + f(x))``. ``parallel`` (GPT-J,
    GPT-NeoX; pre-norm only): attention and MLP read the same x, ``x + attention(norm(x)) + mlp(norm(x))``; without an
    ``mlp_norm`` the MLP reads attention's. ``attention_scale`` and ``mlp_scale``: a factor per channel of what
    each adds (LayerScale, arXiv 2103.17239). ``drop_path``: the rate at which a sequence skips a branch (stochastic
    depth, arXiv 1603.09382), None for none. ``layer_drop``: the rate at which all of the batch skips the whole block
    (arXiv 1909.11556, wav2vec 2.0). ``cross_attention`` with its ``cross_attention_norm``: an
    encoder–decoder's, between the two, ``x + cross_attention(norm(x), memory)`` or post-norm likewise.
    """

    varying = ("drop_path",)

    def __init__(
        self,
        attention: nnx.Module,
        mlp: nnx.Module,
        attention_norm: nnx.Module,
        mlp_norm: nnx.Module | None,
        *,
        prenorm: bool,
        parallel: bool = False,
        cross_attention: nnx.Module | None = None,
        cross_attention_norm: nnx.Module | None = None,
        layer_scale: float | None = None,
        width: int | None = None,
        rate: float = 0.0,
        drop_path: float | None = None,
        layer_drop: float = 0.0,
    ):
        if parallel and not prenorm:
            raise ValueError("block: parallel attention and MLP are for pre-norm blocks")
        if (cross_attention is None) != (cross_attention_norm is None) or (parallel and cross_attention is not None):
            raise ValueError("block: cross_attention and cross_attention_norm go together, and not with parallel")
        if layer_scale is not None and width is None:
            raise ValueError("block: layer_scale needs the width")
        self.path = ""
        self.prenorm, self.parallel, self.rate, self.drop_path = prenorm, parallel, rate, drop_path
        self.layer_drop = layer_drop
        self.attention, self.attention_norm = attention, attention_norm
        self.mlp, self.mlp_norm = mlp, mlp_norm
        self.cross_attention = cross_attention if cross_attention is not None else nnx.data(None)
        self.cross_attention_norm = cross_attention_norm if cross_attention_norm is not None else nnx.data(None)
        self.attention_scale = None if layer_scale is None else nnx.Param(jnp.full(width, layer_scale))
        self.mlp_scale = None if layer_scale is None else nnx.Param(jnp.full(width, layer_scale))

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        *,
        mask: Mask | None = None,
        bias: jax.Array | None = None,
        rotary: tuple[jax.Array, jax.Array] | None = None,
        memory: Float[Array, "batch keys memory_width"] | None = None,
        memory_mask: Mask | None = None,
        cache: Any = None,
        key: jax.Array | None = None,
        **context: Any,
    ) -> tuple[Float[Array, "batch length width"], Any]:
        """``memory``: the encoder's output, unless ``cache`` (:class:`WithMemory`) has its keys and values; None leaves
        cross-attention out. ``context`` is whatever else this model's attention takes; an MLP that is ``spatial`` takes
        its ``grid``."""
        start = x = site(f"{self.path}.input", x)
        attention_key, drop1, drop2, cross_key, drop3, mlp_key = split(key, 6)
        normed = self.attention_norm(x) if self.prenorm else x
        context |= {"mask": mask, "bias": bias, "rotary": rotary}
        own, memory = (cache.own, cache.memory) if isinstance(cache, WithMemory) else (cache, memory)
        h, own = self.attention(normed, cache=own, key=attention_key, **context)
        before, x = x, x + self._branch(h, self.attention_scale, drop1)
        x = x if self.prenorm else self.attention_norm(x)
        if self.cross_attention is not None and memory is not None:
            normed = self.cross_attention_norm(x) if self.prenorm else x
            h, _ = self.cross_attention(normed, memory=memory, mask=memory_mask, key=cross_key)
            x = x + self._branch(h, None, drop3)
            x = x if self.prenorm else self.cross_attention_norm(x)
        if self.parallel:
            h = self._feed(normed if self.mlp_norm is None else self.mlp_norm(before), mlp_key, context)
        else:
            h = self._feed(self.mlp_norm(x) if self.prenorm else x, mlp_key, context)
        x = x + self._branch(h, self.mlp_scale, drop2)
        x = x if self.prenorm else self.mlp_norm(x)
        if self.layer_drop > 0 and key is not None:
            x = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 6), self.layer_drop), start, x)
        return site(f"{self.path}.output", x), WithMemory(own, memory) if isinstance(cache, WithMemory) else own

    def _feed(self, x: Array, key: jax.Array | None, context: dict[str, Any]) -> Array:
        """The MLP; only one with a dropout of its own takes a key, and only one over a grid is told of it."""
        if getattr(self.mlp, "spatial", False):
            return self.mlp(x, grid=context["grid"], key=key)
        return self.mlp(x, key=key) if getattr(self.mlp, "rate", 0.0) else self.mlp(x)

    def _branch(self, h: Array, scale: nnx.Param | None, key: jax.Array | None) -> Array:
        drop, path = (key, None) if self.drop_path is None else split(key, 2)
        h = dropout(h, self.rate, drop)
        h = h if scale is None else h * scale.get_value().astype(h.dtype)
        return h if path is None else drop_path(h, self.drop_path, path)


def drop_path(
    x: Float[Array, "batch *rest"], rate: float | jax.Array, key: jax.Array | None
) -> Float[Array, "batch *rest"]:
    """Zero whole rows with probability ``rate`` and scale the rest by 1/(1 − rate) (stochastic depth)."""
    if key is None:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(kept, x / (1.0 - rate), 0).astype(x.dtype)


REMAT = {
    "full": None,
    "dots": jax.checkpoint_policies.checkpoint_dots,
    "dots_no_batch": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


Numbers = tuple[tuple[tuple[str, ...], str, tuple[float, ...]], ...]  # (module of a block, attribute, value per layer)


class Layers(nnx.Module):
    """Blocks under the names "0", "1", …; or one block under "*" whose arrays carry a leading layer axis.

    The first form runs as a Python loop (surgery may make layers differ), the second, made by :func:`stack`, under
    ``lax.scan``: compile time no longer grows with depth. ``remat`` recomputes activations in the backward pass:
    ``"full"``, ``"dots"`` (keeps matmul results) or ``"dots_no_batch"``. Each layer gets its own dropout key, the same
    in both forms, and its own entry of ``cache``.

    Equal layers may still differ in numbers: in those attributes that a module of theirs lists in ``varying`` (a rate
    of stochastic depth, the shift of a window). A scan hands each layer its own.
    """

    def __init__(self, blocks: list[nnx.Module]):
        self.path = ""
        self.remat: str | None = None
        self.depth = len(blocks)
        self.numbers: Numbers = ()
        for i, block in enumerate(blocks):
            setattr(self, str(i), block)

    @property
    def stacked(self) -> bool:
        return hasattr(self, "*")

    def __len__(self) -> int:
        return self.depth

    def __getitem__(self, i: int) -> Any:
        if self.stacked:
            raise ValueError("layers are stacked for a scan; take them apart with jf.functional(…, scan_layers=False)")
        return getattr(self, str(range(self.depth)[i]))

    def __setitem__(self, i: int, block: nnx.Module) -> None:
        setattr(self, str(range(self.depth)[i]), block)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(self.depth))

    def empty_cache(self, batch: int, slots: int, dtype: jnp.dtype) -> dict[str, Any]:
        """Empty storage for each layer's attention, stacked when the layers are: whatever pytree of arrays, with the
        batch as first axis, the attention's own ``empty_cache`` returns."""
        if not self.stacked:
            return {str(i): block.attention.empty_cache(batch, slots, dtype) for i, block in enumerate(self)}
        one = getattr(self, "*").attention.empty_cache(batch, slots, dtype)
        return {"*": jax.tree.map(lambda a: jnp.broadcast_to(a, (self.depth, *a.shape)), one)}

    def remember(self, memory: Float[Array, "batch keys memory_width"]) -> dict[str, Any]:
        """Each layer's keys and values of an encoder's output, stacked when the layers are."""
        if not self.stacked:
            return {str(i): block.cross_attention.remember(memory) for i, block in enumerate(self)}
        graph, arrays = nnx.split(getattr(self, "*"))
        names = tuple(f"{self.path}.{i}" for i in range(self.depth))
        body, deliver = sites.looping(
            lambda arrays: nnx.merge(graph, arrays).cross_attention.remember(memory), f"{self.path}.*", names
        )
        _, (made, parked) = jax.lax.scan(lambda _, one: (None, body(*one)), None, (jnp.arange(self.depth), arrays))
        deliver(parked)
        return {"*": made}

    def __call__(
        self, x: Array, *, cache: dict[str, Any] | None = None, key: jax.Array | None = None, **context: Any
    ) -> tuple[Array, dict[str, Any] | None]:
        """Run all blocks; ``context`` goes to each of them. Returns the last output and the new cache."""
        return (self._scan if self.stacked else self._loop)(x, cache, key, context)

    def _checkpoint(self, body: Any) -> Any:
        return body if self.remat is None else jax.checkpoint(body, policy=REMAT[self.remat])

    def _loop(self, x: Array, cache: Any, key: Any, context: dict[str, Any]) -> tuple[Array, Any]:
        new = {}
        # what is no array (the grid of patches) stays what it is when the rest is traced
        fixed = {n: v for n, v in context.items() if all(isinstance(leaf, int) for leaf in jax.tree.leaves(v))}
        arrays_only = {n: v for n, v in context.items() if n not in fixed}
        for i, block in enumerate(self):
            name = f"{self.path}.{i}"
            own_cache = None if cache is None else cache[str(i)]
            own_key = None if key is None else jax.random.fold_in(key, i)
            if self.remat is None:
                x, new[str(i)] = block(x, cache=own_cache, key=own_key, **context)
                continue
            graph, arrays = nnx.split(block)

            def body(arrays: Any, x: Array, c: Any, k: Any, context: Any, graph: Any = graph) -> Any:
                return nnx.merge(graph, arrays)(x, cache=c, key=k, **context, **fixed)

            body, deliver = sites.looping(body, name, (name,))
            (x, new[str(i)]), parked = self._checkpoint(body)(None, arrays, x, own_cache, own_key, arrays_only)
            deliver(parked)
        return x, None if cache is None else new

    def _scan(self, x: Array, cache: Any, key: Any, context: dict[str, Any]) -> tuple[Array, Any]:
        graph, arrays = nnx.split(getattr(self, "*"))
        prefix = f"{self.path}.*"
        names = tuple(f"{self.path}.{i}" for i in range(self.depth))
        places = [(where, name) for where, name, _ in self.numbers]

        def run(arrays: Any, numbers: list[Array], x: Array, c: Any, k: Any) -> Any:
            block = nnx.merge(graph, arrays)
            for (where, name), number in zip(places, numbers, strict=True):
                setattr(_module(block, where), name, number)
            return block(x, cache=c, key=k, **context)

        body, deliver = sites.looping(run, prefix, names)
        body = self._checkpoint(body)

        def step(x: Array, per_layer: Any) -> Any:
            i, arrays, numbers, own_cache = per_layer
            own_key = None if key is None else jax.random.fold_in(key, i)
            (x, own_cache), parked = body(i, arrays, numbers, x, own_cache, own_key)
            return x, (own_cache, parked)

        own = None if cache is None else cache["*"]
        numbers = [jnp.asarray(values) for _, _, values in self.numbers]
        x, (own, parked) = jax.lax.scan(step, x, (jnp.arange(self.depth), arrays, numbers, own))
        deliver(parked)
        return x, None if cache is None else {"*": own}


def stack(layers: Layers) -> Layers:
    """Equal blocks as one block with a leading layer axis, for ``lax.scan``.

    Raises ValueError naming the first block that differs in structure or shape from block 0.
    """
    if layers.stacked:
        return layers
    blocks = _nameless(layers)
    numbers = _numbers(blocks)
    for where, name, values in numbers:
        for block in blocks:
            setattr(_module(block, where), name, values[0])
    graphs, states = zip(*(nnx.split(block) for block in blocks), strict=True)
    first = jax.tree.map(lambda a: (a.shape, a.dtype), states[0])
    for i, (graph, state) in enumerate(zip(graphs, states, strict=True)):
        if graph != graphs[0] or jax.tree.map(lambda a: (a.shape, a.dtype), state) != first:
            raise ValueError(f"scan_layers: layer {i} differs from layer 0; layers of different shape run as a loop")
    stacked = Layers([])
    stacked.depth, stacked.remat, stacked.numbers = layers.depth, layers.remat, numbers
    setattr(stacked, "*", nnx.merge(graphs[0], jax.tree.map(lambda *a: jnp.stack(a), *states)))
    return stacked


def unstack(layers: Layers) -> Layers:
    """The inverse of :func:`stack`."""
    if not layers.stacked:
        return layers
    graph, state = nnx.split(getattr(layers, "*"))
    blocks = [nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state)) for i in range(layers.depth)]
    for where, name, values in layers.numbers:
        for block, value in zip(blocks, values, strict=True):
            setattr(_module(block, where), name, value)
    apart = Layers(blocks)
    apart.remat = layers.remat
    return apart


def _nameless(layers: Layers) -> list[nnx.Module]:
    blocks = [nnx.clone(block) for block in layers]
    for block in blocks:
        for _, module in nnx.iter_modules(block):
            if hasattr(module, "path"):
                module.path = ""
    return blocks


def _numbers(blocks: list[nnx.Module]) -> Numbers:
    """The attributes listed in ``varying`` whose numbers are not the same in all blocks."""
    found = []
    for where, module in nnx.iter_modules(blocks[0]) if blocks else ():
        for name in getattr(module, "varying", ()):
            values = [getattr(_module(block, where), name, None) for block in blocks]
            if len(set(values)) > 1 and all(isinstance(value, int | float) for value in values):
                found.append((where, name, tuple(values)))
    return tuple(found)


def _module(block: nnx.Module, where: tuple[str, ...]) -> Any:
    for name in where:
        block = getattr(block, name, None)
    return block
