"""Weights with entries fixed at zero: the typed weight, masks on a model, masks in a file."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import atomic, surgery
from jaxformers.safetensors_file import SafetensorsFile
from jaxformers.weights import base as weights

_RECORD = "jaxformers.weights.masked:abstract_masked"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masked:
    """``dense() = base where mask, else 0``: masked entries stay exactly zero whatever an optimiser does to ``base``.

    ``base`` (in, out) is an array or a typed weight; ``mask`` (in, out) is bool, True = kept. No gradient reaches a
    masked entry. In a checkpoint the weight has its zeros, and beside it stands ``weight_mask``, uint8
    (out, ceil(in / 8)): eight inputs a byte, the first in the highest bit.
    """

    base: Any
    mask: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def dense(self) -> jax.Array:
        base = weights.dense(self.base)
        return jnp.where(self.mask, base, jnp.zeros((), base.dtype))

    def matmul(self, x: jax.Array) -> jax.Array:
        return weights.matmul(x, self.dense())

    def to_tensors(self) -> dict[str, np.ndarray]:
        mask = np.asarray(self.mask).T
        tensors = weights.to_tensors(self.base)
        if "weight" in tensors:  # other tools see the zeros too
            tensors["weight"] = np.where(mask, tensors["weight"], np.zeros((), tensors["weight"].dtype))
        return {**tensors, "weight_mask": np.packbits(mask, axis=-1)}

    def from_tensors(self, read: weights.Read) -> "Masked":
        d_in, d_out = self.shape
        packed = read("weight_mask")
        if packed.dtype != np.uint8 or packed.shape != (d_out, -(-d_in // 8)):
            raise ValueError(
                f"weight_mask: expected uint8 {(d_out, -(-d_in // 8))}, found {packed.dtype} {packed.shape}"
            )
        mask = np.unpackbits(packed, axis=-1, count=d_in).astype(bool).T
        return Masked(weights.from_tensors(self.base, read), mask)


def add_masks(model: nnx.Module, masks: Mapping[str, Any]) -> nnx.Module:
    """A copy of ``model`` whose linear layers keep the entries that ``masks`` lets pass, and hold the others at zero.

    ``masks``: {path of a linear layer: bool (in, out), True = kept}. On kernels that have a mask already both hold.
    Over a low-rank update the mask holds for the sum: pruned weights stay pruned when the update is merged. Whatever
    trains the model, with weight decay or without, masked entries act as zero and are saved as zero.

    Raises ValueError naming the paths that the model does not have, or whose shapes differ, and for anything but bool.
    """
    model = surgery.copy(model)
    modules = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(getattr(module, "kernel", None), nnx.Variable)
    }
    wrong = []
    for path, mask in masks.items():
        if path not in modules:
            wrong.append(f"the model has no linear layer {path}")
        elif tuple(mask.shape) != tuple(modules[path].kernel.get_value().shape):
            wrong.append(f"{path} has shape {tuple(mask.shape)}, not {tuple(modules[path].kernel.get_value().shape)}")
        elif np.dtype(mask.dtype) != np.bool_:
            wrong.append(f"{path} is {mask.dtype}, not bool")
    if wrong or not masks:
        said = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise ValueError(f"masks: {said or 'there are none'}")
    targets = []
    for path, mask in masks.items():
        kernel, mask = modules[path].kernel.get_value(), jnp.asarray(mask)
        if isinstance(kernel, Masked):
            kernel, mask = kernel.base, kernel.mask & mask
        else:
            targets.append(path)
        modules[path].kernel.set_value(Masked(kernel, mask))
    return surgery.record(model, _RECORD, targets=targets) if targets else model


def masks_of(model: nnx.Module) -> dict[str, jax.Array]:
    """{path of a linear layer: its mask} of those that carry one, under a low-rank update too."""
    found = {}
    for path, module in nnx.iter_modules(model):
        kernel = module.kernel.get_value() if isinstance(getattr(module, "kernel", None), nnx.Variable) else None
        while kernel is not None and not isinstance(kernel, Masked):
            kernel = getattr(kernel, "base", None)
        if kernel is not None:
            found[".".join(map(str, path))] = kernel.mask
    return found


def merge_masks(model: nnx.Module) -> nnx.Module:
    """A copy of ``model`` in which every :class:`Masked` kernel has become the array that it stands for, zeros and all.

    A low-rank update below a mask is merged with it; one above stays where it is.
    """
    model = surgery.copy(model)

    def merged(kernel: Any) -> Any:
        if isinstance(kernel, Masked):
            return kernel.dense()
        base = getattr(kernel, "base", None)
        return kernel if base is None else dataclasses.replace(kernel, base=merged(base))

    for _, module in nnx.iter_modules(model):
        if isinstance(getattr(module, "kernel", None), nnx.Variable):
            module.kernel.set_value(merged(module.kernel.get_value()))
    return settle_masks(model)


def settle_masks(model: nnx.Module) -> nnx.Module:
    """Let the records of ``model``, in place, name only the layers that still carry a mask: others were absorbed."""
    kept, carried = [], masks_of(model)
    for function, arguments in model.surgery:
        if function == _RECORD:
            targets = [path for path in json.loads(arguments)["targets"] if path in carried]
            if not targets:
                continue
            arguments = json.dumps({"targets": targets})
        kept.append((function, arguments))
    model.surgery = tuple(kept)
    return model


def abstract_masked(model: nnx.Module, *, targets: list[str]) -> nnx.Module:
    """``model`` with abstract masks over its kernels at ``targets``, for a checkpoint to fill. Replayed by loading."""
    shapes = {path: linear.kernel.get_value().shape for path, linear in surgery.find_linears(model, targets)}
    return add_masks(model, {path: jnp.ones(shape, bool) for path, shape in shapes.items()})


# ---- masks in a file of their own ----------------------------------------------------------------------------------


def save_masks(masks: Mapping[str, Any], file: str | Path) -> None:
    """Write masks as a safetensors file, bit-packed: 1/32 of the size of float32 weights."""
    from safetensors.numpy import save

    arrays = {path: np.asarray(mask) for path, mask in masks.items()}
    shapes = json.dumps({path: array.shape for path, array in arrays.items()})
    tensors = {path: np.ascontiguousarray(np.packbits(array.T, axis=-1)) for path, array in arrays.items()}
    atomic.write_bytes_atomic(file, save(tensors, metadata={"format": "jaxformers masks", "shapes": shapes}))


def load_masks(file: str | Path) -> dict[str, jax.Array]:
    """Masks that :func:`save_masks` wrote. Raises ValueError for any other file."""
    found = SafetensorsFile(Path(file))
    if found.metadata.get("format") != "jaxformers masks":
        raise ValueError(f"file: {file} holds no masks; save_masks writes them")
    masks = {}
    for path, (d_in, d_out) in json.loads(found.metadata["shapes"]).items():
        packed = found[path].read()
        if packed.shape != (d_out, -(-d_in // 8)):
            raise ValueError(f"file: {file}: {path} has shape {packed.shape}, not {(d_out, -(-d_in // 8))}")
        masks[path] = jnp.asarray(np.unpackbits(packed, axis=-1, count=d_in).astype(bool).T)
    return masks
