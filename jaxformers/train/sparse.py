"""Training around pruned weights: an optimiser that keeps zeros at zero, and a probe of how weights thin out.

Source: "The Emergence of Essential Sparsity in Large Pre-trained Models", arXiv 2306.03805: fine-tuning with a fixed
mask, and the share of weights below a fixed magnitude along pre-training.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxformers import paths
from jaxformers.train.state import leaf_paths
from jaxformers.weights.base import dense, is_typed

KERNELS = "**.layers.**.kernel"


class KeepZerosState(NamedTuple):
    inner: Any
    alive: Any  # bool arrays of the leaves whose zeros are kept, None for the others: saved with every checkpoint


def keep_zeros(
    optimizer: optax.GradientTransformation, patterns: paths.Patterns = KERNELS
) -> optax.GradientTransformation:
    """``optimizer``, but parameters that are exactly zero at the start stay exactly zero, weight decay or not.

    ``patterns``: paths of the parameters whose zeros are kept; those of pruned kernels by default. Gradients of zeros
    do not reach the optimiser (nor its clipping and its moments), and updates of zeros are taken back. For parameters
    that are plain arrays; a :class:`jaxformers.weights.Masked` kernel needs none of it. Any tree of parameters will do,
    layers stacked for a scan too. Which entries are kept is part of the state, and so of checkpoints.

    Raises ValueError, on ``init``, when no parameter matches.
    """
    patterns = paths.as_tuple(patterns)

    def init(params: Any) -> KeepZerosState:
        chosen = [paths.matches(patterns, path) for path, _ in leaf_paths(params)]
        if not any(chosen):
            known = ", ".join(path for path, _ in leaf_paths(params)[:6])
            raise ValueError(f"patterns {patterns}: no parameter matches; there are {known}, …")
        leaves, tree = jax.tree.flatten(params)
        alive = [x != 0 if hit else None for x, hit in zip(leaves, chosen, strict=True)]
        return KeepZerosState(optimizer.init(params), tree.unflatten(alive))

    def masked(tree: Any, alive: Any) -> Any:
        hold = lambda keep, x: x if keep is None else jnp.where(keep, x, jnp.zeros((), x.dtype))  # noqa: E731
        return jax.tree.map(hold, alive, tree, is_leaf=lambda x: x is None)

    def update(grads: Any, state: KeepZerosState, params: Any = None) -> tuple[Any, KeepZerosState]:
        updates, inner = optimizer.update(masked(grads, state.alive), state.inner, params)
        return masked(updates, state.alive), KeepZerosState(inner, state.alive)

    return optax.GradientTransformation(init, update)


def sparsity_probe(thresholds: Sequence[float], patterns: paths.Patterns = KERNELS) -> Callable[[Any, int], dict]:
    """``evaluate(params, step)`` for :func:`jaxformers.train.fit`: the share of weights with |w| < t.

    One number per threshold t and kernel that matches ``patterns``, ``below_<t>/<path>``, and ``below_<t>`` of all of
    them together. Layers stacked for a scan count one by one. ``eval_every`` says how often; what came out is in the
    run's history and `metrics.jsonl`, and :func:`sharpest_rise` finds where the shares jump.

    Raises ValueError for thresholds that are not positive, and in use when no kernel matches.
    """
    thresholds = [float(t) for t in thresholds]
    if not thresholds or not all(0 < t < float("inf") for t in thresholds):
        raise ValueError(f"thresholds: expected magnitudes above 0, got {thresholds}")
    limits = jnp.asarray(thresholds, jnp.float32)

    @jax.jit
    def count(weight: Any) -> jax.Array:
        w = jnp.abs(dense(weight).astype(jnp.float32))
        return jax.lax.map(lambda t: jnp.sum(w < t, axis=(-2, -1), dtype=jnp.int32), limits)  # (thresholds, layers …)

    def probe(params: Mapping[str, Any], step: int) -> dict[str, float]:
        found: dict[str, float] = {}
        total, below = 0, [0] * len(thresholds)
        for path, leaf in _kernels(params):
            if not paths.matches(patterns, path):
                continue
            size = leaf.shape[-2] * leaf.shape[-1]
            counts = count(leaf).reshape(len(thresholds), -1)
            names = [path] if counts.shape[1] == 1 else [path.replace(".*.", f".{i}.") for i in range(counts.shape[1])]
            for t, (name_t, row) in enumerate(zip(thresholds, counts.tolist(), strict=True)):
                found |= {f"below_{name_t:g}/{name}": n / size for name, n in zip(names, row, strict=True)}
                below[t] += sum(row)
            total += size * len(names)
        if not total:
            raise ValueError(f"patterns {paths.as_tuple(patterns)}: no kernel of the model matches")
        return found | {f"below_{t:g}": n / total for t, n in zip(thresholds, below, strict=True)}

    return probe


def _kernels(params: Any) -> list[tuple[str, Any]]:
    """(path, array or typed weight) of everything with two axes or more; a flat dict of dotted paths will do."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_typed)
    return [(paths.dotted(keys), leaf) for keys, leaf in leaves if len(leaf.shape) >= 2]


def sharpest_rise(history: Iterable[Mapping[str, Any]], name: str) -> tuple[int, float]:
    """(step, increase): where the probed number ``name`` rose most since the evaluation before.

    ``history``: the records of :class:`jaxformers.train.FitResult`. Raises ValueError for fewer than two of them.
    """
    seen = [(record["step"], record[name]) for record in history if record.get("kind") == "eval" and name in record]
    if len(seen) < 2:
        raise ValueError(f"name: {name} was evaluated {len(seen)} times; two at least show a rise")
    rises = [(after[1] - before[1], after[0]) for before, after in zip(seen, seen[1:], strict=False)]
    rise, step = max(rises, key=lambda found: (found[0], -found[1]))
    return step, rise
