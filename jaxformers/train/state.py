"""What training carries from step to step, and how a parameter tree splits into trained and frozen arrays.

Inside the loop parameters are flat dicts ``{dotted path: array}``: optimiser state, checkpoints and reports then speak
of the same names. A typed weight is split into its arrays (``layers.0.attention.query.kernel.a``), so that a LoRA
factor can be trained over packed integers that no optimiser ever sees.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxformers import paths

Flat = dict[str, jax.Array]


class State(NamedTuple):
    """The donated argument and result of a training step."""

    step: jax.Array  # int32: batches consumed
    params: Flat  # trained leaves, float32 masters
    opt: Any  # optax state
    ema: Flat | None  # float32 moving average of ``params``
    failed: jax.Array  # int32: the first step whose loss or gradient was not finite, -1 while there is none
    skipped: jax.Array  # int32: updates left out in a row because of such steps


def leaf_paths(params: Any) -> list[tuple[str, str]]:
    """(path, owner) for each array of ``params`` in tree order; owner is the path of the typed weight around it.

    For a plain array both are equal. Raises ValueError when two leaves would have the same dotted path.
    """
    found = []
    for keys, _ in jax.tree_util.tree_flatten_with_path(params)[0]:
        plain = [isinstance(key, jax.tree_util.DictKey | jax.tree_util.SequenceKey) for key in keys]
        depth = plain.index(False) if False in plain else len(keys)
        found.append((paths.dotted(keys), paths.dotted(keys[:depth])))
    seen: set[str] = set()
    for path, _ in found:
        if path in seen:
            raise ValueError(f"params: two leaves have the path {path}; keys must not contain dots")
        seen.add(path)
    return found


def split(
    params: Any, trainable: paths.Patterns | None = None, freeze: paths.Patterns = ()
) -> tuple[Flat, Flat, Callable[[Mapping, Mapping], Any]]:
    """Part ``params`` into (trained, frozen, join); ``join(trained, frozen)`` rebuilds the tree.

    ``trainable`` and ``freeze`` are path patterns; either the path of an array or that of the typed weight holding it
    may match. None trains every floating-point leaf. Leaves that are not floating point are always frozen. Raises
    ValueError for a pattern that matches nothing, and when nothing is left to train.
    """
    named = leaf_paths(params)
    leaves, treedef = jax.tree.flatten(params)
    for argument, patterns in (("trainable", trainable), ("freeze", freeze)):
        for pattern in () if patterns is None else paths.as_tuple(patterns):
            if not any(paths.matches(pattern, path) or paths.matches(pattern, owner) for path, owner in named):
                raise ValueError(
                    f"{argument}: {pattern!r} matches no parameter; there are "
                    f"{', '.join(path for path, _ in named[:8])}, …"
                )
    trained, frozen = {}, {}
    for (path, owner), x in zip(named, leaves, strict=True):
        hit = lambda patterns, p=path, o=owner: paths.matches(patterns, p) or paths.matches(patterns, o)
        wanted = (trainable is None or hit(trainable)) and not hit(freeze)
        (trained if wanted and jnp.issubdtype(x.dtype, jnp.floating) else frozen)[path] = x
    if not trained:
        raise ValueError(f"trainable, freeze: {trainable!r} and {freeze!r} leave none of {len(leaves)} arrays to train")
    order = [path for path, _ in named]

    def join(trained: Mapping, frozen: Mapping) -> Any:
        return treedef.unflatten([trained[p] if p in trained else frozen[p] for p in order])

    return trained, frozen, join


def cast(flat: Mapping[str, jax.Array], dtype: Any) -> Flat:
    """Floating-point leaves in ``dtype`` (None: as they are), the others untouched."""
    if dtype is None:
        return dict(flat)
    return {p: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for p, x in flat.items()}


def master(x: jax.Array) -> jax.Array:
    """A copy of ``x`` to be donated, in float32 at least: an update of relative size 1e-3 is lost in bfloat16."""
    return jnp.array(x, dtype=jnp.promote_types(x.dtype, jnp.float32), copy=True)
