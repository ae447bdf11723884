"""Hard attention: each query keeps its largest probabilities only."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformers import paths, surgery


def keep_largest(probs: Float[Array, "*batch keys"], k: int) -> Float[Array, "*batch keys"]:
    """The ``k`` largest of each row, 0 in place of the rest, of equal ones the first; rows are not normalised again.

    ``k`` of all keys or more changes nothing. Masked keys have probability 0 and take nothing from real ones.
    Source: AxFormer, arXiv 2010.03688.
    """
    if k >= probs.shape[-1]:
        return probs
    least = jax.lax.top_k(probs, k)[0][..., -1:]
    above, equal = probs > least, probs == least
    places = k - above.sum(-1, keepdims=True)
    return jnp.where(above | (equal & (equal.cumsum(-1) <= places)), probs, 0)


def hard_attention(model: nnx.Module, targets: paths.Patterns = "**.attention", *, k: int | None) -> nnx.Module:
    """A copy of ``model`` whose attention at ``targets`` keeps the ``k`` largest probabilities of each query, after
    their dropout; None: all of them again. It saves and reloads.

    Raises ValueError when ``k`` < 1, when nothing matches, and for attention that has no such option.
    """
    if k is not None and k < 1:
        raise ValueError(f"k: hard attention keeps at least one key, got {k}")
    model = surgery.copy(model)
    named = [(".".join(map(str, path)), module) for path, module in nnx.iter_modules(model)]
    hits = [(path, module) for path, module in named if paths.matches(targets, path)]
    if not hits:
        known = ", ".join([path for path, module in named if hasattr(module, "top_k")][:6])
        raise ValueError(
            f"targets {paths.as_tuple(targets)}: no module matches; attention with this option: {known}, …"
        )
    for path, module in hits:
        if not hasattr(module, "top_k"):
            raise ValueError(f"targets: {path} ({type(module).__name__}) has no hard attention")
        module.top_k = k
    hits.sort(key=lambda hit: surgery.natural(hit[0]))
    return surgery.record(model, "jaxformers.nn.hard:abstract_hard_attention", targets=[p for p, _ in hits], k=k)


def abstract_hard_attention(model: nnx.Module, *, targets: list[str], k: Any) -> nnx.Module:
    """Set again what :func:`hard_attention` has set; there are no values to fill."""
    return hard_attention(model, targets, k=k)
