"""A low-rank update of a frozen weight: ``W + scale · A B`` (LoRA, arXiv 2106.09685, equation 3)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import paths, surgery
from jaxformers.weights import base as weights
from jaxformers.weights.masked import Masked, settle_masks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """``base`` (in, out), array or typed weight, plus ``scale · a (in, r) @ b (r, out)``; scale = alpha / r."""

    base: Any
    a: jax.Array
    b: jax.Array
    updates: ClassVar = ("a", "b")
    scale: float = dataclasses.field(metadata={"static": True}, default=1.0)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def matmul(self, x: jax.Array) -> jax.Array:
        update = weights.matmul(weights.matmul(x, self.a), self.b)
        return weights.matmul(x, self.base) + self.scale * update

    def dense(self) -> jax.Array:
        base = weights.dense(self.base)
        update = jnp.matmul(self.a, self.b, precision="highest")
        return (base + self.scale * update).astype(base.dtype)

    def to_tensors(self) -> dict[str, np.ndarray]:
        ours = {"lora_A.weight": np.asarray(self.a).T, "lora_B.weight": np.asarray(self.b).T}
        return {**weights.to_tensors(self.base), **ours}

    def from_tensors(self, read: weights.Read) -> "LowRank":
        a, b = read("lora_A.weight").T, read("lora_B.weight").T
        return LowRank(weights.from_tensors(self.base, read), a, b, self.scale)


def add_lora(
    model: nnx.Module,
    targets: paths.Patterns = "layers.*.attention.{query,value}",
    *,
    rank: int = 8,
    alpha: float = 16.0,
    key: jax.Array,
) -> nnx.Module:
    """A copy of ``model`` whose linear layers at ``targets`` carry a low-rank update, zero at first.

    ``a`` is drawn from N(0, 1/in) (Kaiming), ``b`` is zero (LoRA, section 4.1). `jaxformers.train.fit` trains ``a``
    and ``b`` and a classification head, the rest stays frozen, unless its ``trainable`` says otherwise;
    :func:`merge_lora` folds the update into plain kernels. Packed kernels may lie below (QLoRA). Raises ValueError when
    ``rank`` < 1 or nothing matches.
    """
    if rank < 1:
        raise ValueError(f"rank: expected 1 or more, got {rank}")
    model = surgery.copy(model)
    linears = surgery.find_linears(model, targets)
    for (_path, linear), k in zip(linears, jax.random.split(key, len(linears)), strict=True):
        kernel = linear.kernel.get_value()
        d_in, d_out = kernel.shape
        dtype = kernel.dtype
        a = jax.random.normal(k, (d_in, rank), dtype) / d_in**0.5
        linear.kernel.set_value(LowRank(kernel, a, jnp.zeros((rank, d_out), dtype), alpha / rank))
    return record_lora(model, [path for path, _ in linears], rank, alpha)


def record_lora(model: nnx.Module, targets: list[str], rank: int, alpha: float) -> nnx.Module:
    """Note in ``model`` that the layers ``targets`` carry a low-rank update."""
    return surgery.record(model, "jaxformers.weights.lowrank:_abstract_lora", targets=targets, rank=rank, alpha=alpha)


def _abstract_lora(model: nnx.Module, *, targets: list[str], rank: int, alpha: float) -> nnx.Module:
    """Rebuild the structure that :func:`add_lora` made; the checkpoint fills the values."""
    return add_lora(model, targets, rank=rank, alpha=alpha, key=jax.random.key(0))


def merge_lora(model: nnx.Module) -> nnx.Module:
    """A copy of ``model`` in which every :class:`LowRank` kernel has become the plain array it stands for.

    Where a mask lies over the update, it stays, and holds for the merged kernel; one below the update is gone.
    """
    model = surgery.copy(model)
    for _, linear in surgery.with_kernels(model):
        kernel = linear.kernel.get_value()
        if isinstance(kernel, LowRank):
            linear.kernel.set_value(kernel.dense())
        elif isinstance(kernel, Masked) and isinstance(kernel.base, LowRank):
            linear.kernel.set_value(Masked(kernel.base.dense(), kernel.mask))
    return settle_masks(surgery.forget(model, "jaxformers.weights.lowrank:_abstract_lora"))
