"""Dotted paths and the one pattern language that targets weights, modules and sites everywhere in the library.

A path such as ``layers.3.attention.query`` names a module, its parameters (``….query.kernel``) and its sites
(``….query.output``) alike. Patterns are globs over whole paths:

- ``*``      any text within one segment: ``layers.*.mlp.up``
- ``**``     any number of segments, also none: ``layers.**``, ``**.bias``
- ``{a,b}``  one of several alternatives: ``layers.{0,1}.attention.{query,value}``
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

Patterns = str | Iterable[str]


@functools.lru_cache(maxsize=4096)
def _regex(pattern: str) -> re.Pattern[str]:
    out, depth, i = [], 0, 0
    while i < len(pattern):
        c = pattern[i]
        if pattern.startswith("**", i):
            # "**" swallows a neighbouring dot, so that "**.bias" also matches "bias" and "layers.**" also "layers"
            if pattern.startswith("**.", i):
                out.append(r"(?:[^.]+\.)*")
                i += 3
            elif out and out[-1] == r"\.":
                out[-1] = r"(?:\.[^.]+)*"
                i += 2
            else:
                out.append(r".*")
                i += 2
            continue
        if c == "*":
            out.append(r"[^.]*")
        elif c == "{":
            out.append("(?:")
            depth += 1
        elif c == "}" and depth:
            out.append(")")
            depth -= 1
        elif c == "," and depth:
            out.append("|")
        else:
            out.append(re.escape(c))
        i += 1
    if depth:
        raise ValueError(f"pattern {pattern!r}: a '{{' is not closed; write alternatives as {{a,b}}")
    return re.compile("".join(out))


def as_tuple(patterns: Patterns) -> tuple[str, ...]:
    """One pattern or several, as a tuple. Raises ValueError on anything that is not text."""
    found = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for p in found:
        if not isinstance(p, str):
            raise ValueError(f"patterns: expected text such as 'layers.*.mlp.up', got {p!r}")
    return found


def matches(patterns: Patterns, path: str) -> bool:
    """True when the whole of ``path`` matches one of ``patterns``."""
    return any(_regex(p).fullmatch(path) is not None for p in as_tuple(patterns))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as ``{dotted path: leaf}``. Whatever is not a dict is a leaf: a typed weight counts as one."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def dotted(keys: Iterable[Any]) -> str:
    """JAX's key path of an array as a dotted path."""
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)


def _arrays(params: Any) -> tuple[list[tuple[str, str, Any]], Any]:
    """``([(path of the array, path of the leaf it belongs to, array)], treedef)``; they differ in typed weights."""
    entries, treedef = jax.tree_util.tree_flatten_with_path(params)
    found = []
    for keys, array in entries:
        depth = sum(isinstance(k, jax.tree_util.DictKey) for k in keys)
        found.append((dotted(keys), dotted(keys[:depth]), array))
    return found, treedef


def mask(params: Mapping[str, Any], patterns: Patterns) -> Any:
    """A pytree of bools with the structure of ``params``: does the array's path match?

    The arrays inside a typed weight have paths of their own (``….kernel.a`` of a low-rank update); a pattern that
    matches the weight itself (``….kernel``) matches all of them.
    """
    patterns = as_tuple(patterns)
    found, treedef = _arrays(params)
    return treedef.unflatten([matches(patterns, own) or matches(patterns, leaf) for own, leaf, _ in found])


def select(params: Mapping[str, Any], patterns: Patterns) -> list[str]:
    """The paths of the arrays in ``params`` that match. Raises ValueError when none does, naming a few that exist."""
    found, _ = _arrays(params)
    hits = [own for own, leaf, _ in found if matches(patterns, own) or matches(patterns, leaf)]
    if not hits:
        known = ", ".join(own for own, _, _ in found[:8])
        raise ValueError(f"patterns {as_tuple(patterns)}: no parameter matches; there are {known}, …")
    return hits


def partition(params: Mapping[str, Any], patterns: Patterns) -> tuple[Any, Any]:
    """Split ``params`` into (arrays whose path matches, the rest): two trees of the same structure, None as holes.

    The first may be differentiated while the second holds integers; :func:`combine` joins them again.
    """
    chosen = mask(params, patterns)
    ours = jax.tree.map(lambda array, hit: array if hit else None, params, chosen)
    rest = jax.tree.map(lambda array, hit: None if hit else array, params, chosen)
    return ours, rest


def combine(ours: Any, rest: Any) -> Any:
    """Join what :func:`partition` split."""
    return jax.tree.map(lambda a, b: b if a is None else a, ours, rest, is_leaf=lambda x: x is None)


def count(leaf: Any) -> int:
    """Number of weights a leaf stands for: a packed 4-bit matrix counts its logical entries."""
    return int(np.prod(leaf.shape, dtype=np.int64))


def report(params: Mapping[str, Any], trainable: Patterns = "**") -> str:
    """A table of parameters by path: shape, dtype, count, and whether ``trainable`` matches; totals last."""
    rows, total, trained = [], 0, 0
    for path, leaf in flatten(params).items():
        n, hit = count(leaf), matches(trainable, path)
        total, trained = total + n, trained + n * hit
        rows.append(f"{path:<60} {tuple(leaf.shape)!s:>20} {leaf.dtype!s:>9} {n:>13,}{'' if hit else '  frozen'}")
    share = 100 * trained / max(total, 1)
    return "\n".join([*rows, f"{total:,} parameters, {trained:,} trainable ({share:.2f} %)"])
