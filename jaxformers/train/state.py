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
from jaxformers.weights.base import is_typed

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
    may match. None trains what :func:`trained_by_default` says. Leaves that are not floating point are always frozen.
    Raises ValueError for a pattern that matches nothing, and when nothing is left to train.
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
    default = trained_by_default(params, freeze) if trainable is None else frozenset()
    trained, frozen = {}, {}
    for (path, owner), x in zip(named, leaves, strict=True):
        hit = lambda patterns, p=path, o=owner: paths.matches(patterns, p) or paths.matches(patterns, o)
        wanted = (path in default if trainable is None else hit(trainable)) and not hit(freeze)
        (trained if wanted and jnp.issubdtype(x.dtype, jnp.floating) else frozen)[path] = x
    if not trained:
        raise ValueError(f"trainable, freeze: {trainable!r} and {freeze!r} leave none of {len(leaves)} arrays to train")
    order = [path for path, _ in named]

    def join(trained: Mapping, frozen: Mapping) -> Any:
        return treedef.unflatten([trained[p] if p in trained else frozen[p] for p in order])

    return trained, frozen, join


def trained_by_default(params: Any, freeze: paths.Patterns = ()) -> frozenset[str]:
    """Paths of the arrays of ``params`` to be trained where nobody says which, apart from those at ``freeze``.

    Every floating-point array, except those that belong to a storage format (``constants`` of a typed weight: the
    scales of packed integers). Where something was added for training alone, low-rank updates (``updates`` of a typed
    weight) or adapters, only that, and the heads that end in a ``classifier``: those are new, as a rule, and PEFT
    trains them too.
    """
    plain: set[str] = set()
    added: set[str] = set()
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_typed)[0]:
        if not paths.matches(freeze, paths.dotted(keys)):
            _sort_arrays(leaf, paths.dotted(keys), plain, added)
    plain, added = ({path for path in found if not paths.matches(freeze, path)} for found in (plain, added))
    added |= {path for path in plain if "adapter" in path.split(".")}
    if not added:
        return frozenset(plain)
    heads = tuple(path.partition("head.classifier.")[0] + "head." for path in plain if "head.classifier." in path)
    return frozenset(added | {path for path in plain if path.startswith(heads)})


def narrowed(params: Any, freeze: paths.Patterns = ()) -> str:
    """A line that says what is trained by default where that is not every array that could be; else nothing."""
    default = trained_by_default(params, freeze)
    arrays = [(path, x) for (path, _), x in zip(leaf_paths(params), jax.tree.leaves(params), strict=True)]
    if default == split(params, "**", freeze)[0].keys():
        return ""
    trained, total = sum(x.size for path, x in arrays if path in default), sum(x.size for _, x in arrays)
    return (
        f"training {trained:,} of {total:,} numbers: only low-rank updates, adapters and classification heads where "
        "there are any of the first two, and no scales of packed weights; `trainable` chooses otherwise"
    )


def _sort_arrays(leaf: Any, path: str, plain: set[str], added: set[str]) -> None:
    """Put the paths of the floating-point arrays of ``leaf``, an array or a typed weight, into one of two sets."""
    if not is_typed(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            plain.add(path)
        return
    for keys, part in jax.tree_util.tree_flatten_with_path(leaf, is_leaf=lambda x: x is not leaf and x is not None)[0]:
        name = paths.dotted(keys)
        if name not in getattr(leaf, "constants", ()):
            _sort_arrays(part, f"{path}.{name}", added if name in getattr(leaf, "updates", ()) else plain, added)


def cast(flat: Mapping[str, jax.Array], dtype: Any) -> Flat:
    """Floating-point leaves in ``dtype`` (None: as they are), the others untouched."""
    if dtype is None:
        return dict(flat)
    return {p: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for p, x in flat.items()}


def master(x: jax.Array) -> jax.Array:
    """A copy of ``x`` to be donated, in float32 at least: an update of relative size 1e-3 is lost in bfloat16."""
    return jnp.array(x, dtype=jnp.promote_types(x.dtype, jnp.float32), copy=True)
