"""A model as a pure function over a nested dict of weights.

``nnx.split`` once, ``nnx.merge`` inside the traced function: nothing of nnx is left at run time, and the dict's paths
are the module paths (``params["layers"]["0"]["attention"]["query"]["kernel"]``).
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jaxformers import surgery
from jaxformers.nn.block import REMAT, Layers, stack, unstack
from jaxformers.nn.output import Output
from jaxformers.paths import dotted

Params = dict[str, Any]
Apply = Callable[..., Output]


def functional(model: nnx.Module, *, scan_layers: bool = False, remat: str | None = None) -> tuple[Apply, Params]:
    """``(apply, params)``: a pure function and its weights, a plain nested dict.

    ``apply(params, batch, *, rngs=None) -> Output``: ``batch`` holds the model's inputs by Hugging Face's names
    (``input_ids`` (B, L), ``attention_mask`` (B, L) with 1 = real, …); ``rngs`` is a PRNG key that turns dropout on.
    Use it under jit, grad, vmap and sharding as any function.

    ``scan_layers`` stacks equal layers under the key ``"*"`` (``params["layers"]["*"]``) and runs them by ``lax.scan``.
    ``remat``: None, ``"full"``, ``"dots"`` or ``"dots_no_batch"``, see :class:`jaxformers.nn.Layers`.

    Raises ValueError when ``scan_layers`` is asked for and layers differ, or for an unknown ``remat``.
    """
    graph, params = _split(model, scan_layers, remat)

    def apply(params: Params, batch: Mapping[str, Any], *, rngs: jax.Array | None = None) -> Output:
        model = nnx.merge(graph, params)
        return model(**inputs(model, batch), rngs=rngs)

    return apply, params


def split_head(
    model: nnx.Module, *, scan_layers: bool = False, remat: str | None = None
) -> tuple[Apply, Callable[[Params, jax.Array], jax.Array], Params]:
    """``(body, head, params)``: a language model whose logits are formed when, and for what, they are asked for.

    ``body(params, batch, *, rngs=None) -> Output`` stops at ``last_hidden_state`` (B, L, D); ``head(params, hidden)``
    makes (…, L, V) logits of any part of it. Both take the same ``params``, those of :func:`functional`. A loss over a
    large vocabulary need then never hold all logits. Options and errors as there.

    Raises ValueError for a model whose head is neither ``causal_lm`` nor ``masked_lm`` over the body's own states.
    """
    if model.head_name not in ("causal_lm", "masked_lm") or not hasattr(getattr(model, "embeddings", None), "token"):
        raise ValueError(
            f"model: expected a causal_lm or masked_lm head over token embeddings, {type(model).__name__} has "
            f"{model.head_name or 'none'}"
        )
    graph, params = _split(model, scan_layers, remat)

    def body(params: Params, batch: Mapping[str, Any], *, rngs: jax.Array | None = None) -> Output:
        model = nnx.merge(graph, params)
        model.head_name = None
        return model(**inputs(model, batch), rngs=rngs)

    def head(params: Params, hidden: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        return model.head(hidden, model.embeddings.token)

    return body, head, params


def _split(model: nnx.Module, scan_layers: bool, remat: str | None) -> tuple[Any, Params]:
    """The structure and the weights of a copy of ``model`` whose layers are stacked or not."""
    if remat is not None and remat not in REMAT:
        raise ValueError(f"remat: expected None or one of {', '.join(REMAT)}, got {remat!r}")
    model = surgery.copy(model)
    for _, module in list(nnx.iter_modules(model)):
        for name, child in list(vars(module).items()):
            if isinstance(child, Layers):
                changed = stack(child) if scan_layers else unstack(child)
                changed.remat = remat
                setattr(module, name, changed)
    graph, state = nnx.split(surgery.named(model))
    return graph, nnx.to_pure_dict(state)


def inputs(model: nnx.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``batch`` that ``model`` reads. Tokenizers make ``token_type_ids`` for every architecture; those
    without token types do without. Any other name that the model does not know is a ValueError."""
    known = [name for name in inspect.signature(type(model).__call__).parameters if name not in ("self", "rngs")]
    for name in batch:
        if name not in known and name != "token_type_ids":
            raise ValueError(f"batch: {name!r} is no input of {type(model).__name__}; it takes {', '.join(known)}")
    return {name: value for name, value in batch.items() if name in known}


def with_params(model: nnx.Module, params: Params) -> nnx.Module:
    """A copy of ``model`` with the weights ``params``, stacked or not.

    Raises ValueError when a path or a shape does not fit the model.
    """
    stacked = any(isinstance(layers, dict) and "*" in layers for layers in _layer_dicts(params))
    model = surgery.copy(model)
    for _, module in list(nnx.iter_modules(model)):
        for name, child in list(vars(module).items()):
            if isinstance(child, Layers):
                setattr(module, name, stack(child) if stacked else unstack(child))
    graph, state = nnx.split(surgery.named(model))
    state = nnx.to_pure_dict(state)
    ours, theirs = (jax.tree_util.tree_structure(t) for t in (state, params))
    if ours != theirs:
        raise ValueError("params: the tree does not fit this model; they must come from jf.functional of its like")
    for (path, old), new in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(params), strict=True):
        if old.shape != new.shape:
            raise ValueError(f"params: {dotted(path)} has shape {new.shape}, the model's has {old.shape}")
    model = surgery.named(nnx.merge(graph, params))
    for _, module in list(nnx.iter_modules(model)):
        for name, child in list(vars(module).items()):
            if isinstance(child, Layers):
                setattr(module, name, unstack(child))
    return surgery.named(model)


def _layer_dicts(params: Params) -> list[Any]:
    found = []
    for key, value in params.items():
        if key == "layers":
            found.append(value)
        elif isinstance(value, dict):
            found.extend(_layer_dicts(value))
    return found
