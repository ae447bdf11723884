"""The distillation that VTrans prunes and fine-tunes with (CoFi's, arXiv 2204.00408): logits, and aligned layers.

    L_ce    = T² KL(softmax(teacher / T) || softmax(student / T))
    L_layer = sum over some teacher layers of MSE(teacher's states, W · student's states + b)
    L       = α_ce L_ce + α_layer L_layer

Each of those teacher layers takes the student layer that is nearest by MSE, among those that are not pruned away and
that lie below the one which the teacher layer above took (CoFi's version 4, whose filter goes by the layer here).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxformers.losses import kl_divergence


@dataclasses.dataclass(frozen=True)
class DistilConfig:
    """``ce``, ``layer``: α of the two terms. ``layers``: of the teacher, from 0; None: four at equal distances, the
    last among them (2, 5, 8, 11 of 12)."""

    ce: float = 0.1
    layer: float = 0.9
    temperature: float = 2.0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("ce", "layer"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a weight of 0 or more, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, got {self.temperature}")

    def chosen(self, depth: int) -> tuple[int, ...]:
        """The teacher's layers, ascending. Raises ValueError for those that it does not have."""
        if self.layers is None:
            n = min(4, depth)
            return tuple(depth * (i + 1) // n - 1 for i in range(n))
        if sorted(set(self.layers)) != list(self.layers) or not all(0 <= i < depth for i in self.layers):
            raise ValueError(f"layers: expected ascending numbers below the teacher's {depth}, got {self.layers}")
        return self.layers


def ce_loss(
    teacher: Float[Array, "*batch classes"], student: Float[Array, "*batch classes"], temperature: float = 2.0
) -> Float[Array, ""]:
    """T² KL, a mean over the batch (and positions); of a single output, a regression's, which has no distribution, the
    squared error."""
    if teacher.shape != student.shape:
        raise ValueError(f"teacher: its logits have shape {teacher.shape}, the student's {student.shape}; same labels?")
    if teacher.shape[-1] == 1:
        return jnp.square(teacher - student).mean()
    return temperature**2 * kl_divergence(teacher, student, temperature=temperature).mean()


def layer_errors(
    teacher: Float[Array, "chosen batch length width"],
    student: Float[Array, "layers batch length own"],
    kernel: Float[Array, "own width"],
    bias: Float[Array, "width"],
    mask: Int[Array, "batch length"] | None = None,
) -> Float[Array, "chosen layers"]:
    """MSE of each chosen teacher layer and each student layer behind the map, over real tokens."""
    mapped = student @ kernel + bias
    real = jnp.ones(teacher.shape[1:3]) if mask is None else mask.astype(teacher.dtype)
    error = lambda t, s: (jnp.square(t - s).mean(-1) * real).sum() / jnp.maximum(real.sum(), 1)
    return jax.vmap(lambda t: jax.vmap(lambda s: error(t, s))(mapped))(teacher)


def align(errors: Float[Array, "chosen layers"], existing: Bool[Array, "layers"]) -> Int[Array, "chosen"]:
    """The student layer of each teacher layer, from the top one down: of least error among the existing layers below
    the one taken last; where there is none, the last one again."""
    depth = errors.shape[1]
    last, found = jnp.asarray(depth), []
    for row in errors[::-1]:
        free = existing & (jnp.arange(depth) < last)
        best = jnp.argmin(jnp.where(free, row, jnp.inf))
        last = jnp.where(free.any(), best, jnp.minimum(last, depth - 1))
        found.append(last)
    return jnp.stack(found[::-1])


def layer_loss(errors: Float[Array, "chosen layers"], existing: Bool[Array, "layers"]) -> Float[Array, ""]:
    """Σ over the chosen teacher layers of the error of the aligned one; the choice itself has no gradient."""
    aligned = align(jax.lax.stop_gradient(errors), existing)
    return jnp.take_along_axis(errors, aligned[:, None], axis=1).sum()


def check_teacher(teacher: nnx.Module, model: nnx.Module) -> None:
    """Raise ValueError when ``teacher`` does not speak of the same labels and widths as ``model``."""
    for name, get in (("labels", lambda m: getattr(m.config, "num_labels", None)), ("head", lambda m: m.head_name)):
        if get(teacher) != get(model):
            raise ValueError(f"teacher: its {name} are {get(teacher)}, the model's {get(model)}")


def new_map(width: int) -> dict[str, Any]:
    """The learned map from the student's states to the teacher's, the identity at first."""
    return {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}


def narrowed(layer_map: dict[str, Any], kept: np.ndarray) -> dict[str, Any]:
    """The map from a student whose hidden units are those ``kept``."""
    return {"kernel": layer_map["kernel"][kept], "bias": layer_map["bias"]}
