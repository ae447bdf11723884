"""A model's parameters as the named tensors of a Hugging Face checkpoint."""

import dataclasses
from typing import Any

import numpy as np
from flax import nnx

from jaxformers import paths, weights
from jaxformers.models import stacked
from jaxformers.models.keymap import HF, all_keys, body_keys, lookup, own_name, prefix_of, tensor_name, turned

FUSED = {"weight", "bias", "qweight", "qzeros", "scales", "g_idx"}  # tensors that the parts of a fused layer share


def to_tensors(model: nnx.Module, arch: Any) -> tuple[list[tuple], dict[str, np.ndarray]]:
    """``[(name, shape, dtype, read)]`` for the checkpoint, and the tensors of a sentence head's Dense module."""
    keys = all_keys(model, arch)
    prefix = prefix_of(arch, model.head_name)
    dense: dict[str, np.ndarray] = {}
    fused: dict[str, dict[int, Any]] = {}
    tensors: list[tuple] = []
    for path, leaf in paths.flatten(nnx.to_pure_dict(nnx.state(model))).items():
        if model.head_name == "sentence" and path.startswith("head.dense."):
            array = np.asarray(leaf)
            dense["linear.weight" if path.endswith("kernel") else "linear.bias"] = array.T if array.ndim == 2 else array
            continue
        found = lookup(keys, path)
        if found is None and model.surgery:
            found = own_name(path)
        if found is None:
            raise ValueError(f"model: parameter {path} has no name in the Hugging Face layout")
        entry, leaf_name = found
        body = found == lookup(body_keys(arch, model.config), path)
        name = f"{prefix if body else ''}{entry.name}".rstrip(".")
        if entry.whole is not None and not weights.is_typed(leaf):
            tensors += stacked.tensors(dataclasses.replace(entry, name=name), leaf_name, leaf)
        elif entry.part[1] > 1:
            fused.setdefault(f"{name}\n{path.rpartition('.')[2]}", {})[entry.part[0]] = (entry, leaf_name, leaf)
        else:
            tensors += [(tensor_name(name, s), *rest) for s, *rest in _layer_tensors(path, entry, leaf_name, leaf)]
    for key, parts in fused.items():
        tensors += _fused_tensors(*key.split("\n"), [parts[i] for i in sorted(parts)], model.config)
    return tensors, dense


def _layer_tensors(path: str, entry: HF, leaf_name: str, leaf: Any) -> list[tuple]:
    """``[(suffix, shape, dtype, read)]`` of one parameter."""
    if weights.is_typed(leaf):
        found = leaf.to_tensors()
        if entry.conv1d and "weight" in found:
            found["weight"] = found["weight"].T
        return [(suffix, a.shape, a.dtype, lambda a=a: a) for suffix, a in found.items()]
    shape = (1,) * entry.ones + tuple(leaf.shape)
    if path.endswith(".kernel") and not entry.conv1d:
        return [(leaf_name, turned(shape), np.dtype(leaf.dtype), lambda: turned(np.asarray(leaf)))]
    return [(leaf_name, shape, np.dtype(leaf.dtype), lambda: np.asarray(leaf).reshape(shape))]


def _fused_tensors(name: str, leaf_kind: str, parts: list[tuple[HF, str, Any]], config: Any) -> list[tuple]:
    """Concatenate the outputs of layers that the checkpoint keeps as one.

    What only a typed weight has (a low-rank update, a mask) is stored under the number of its part:
    ``c_attn.0.lora_A.weight`` belongs to the first.
    """
    described = [_layer_tensors(f".{leaf_kind}", *part) for part in parts]
    layers = [{suffix: read for suffix, _, _, read in layer} for layer in described]
    shapes = [{suffix: (tuple(shape), dtype) for suffix, shape, dtype, _ in layer} for layer in described]
    own = [(f"{i}.{s}", layer[s]()) for i, layer in enumerate(layers) for s in layer if s not in FUSED]
    out = [(f"{name}.{suffix}", a.shape, a.dtype, lambda a=a: a) for suffix, a in own]
    shared = [set(layer) & FUSED for layer in layers]
    if any(suffixes != shared[0] for suffixes in shared):
        raise ValueError(
            f"model: {name} is one tensor in the checkpoint, but its parts have different kinds of weights"
        )
    for suffix in sorted(shared[0]):
        if suffix == "g_idx":
            arrays = [layer[suffix]() for layer in layers]
            if any(not np.array_equal(a, arrays[0]) for a in arrays):
                raise ValueError(f"model: the parts of {name} order their groups differently; the layout cannot say so")
            out.append((f"{name}.{suffix}", arrays[0].shape, arrays[0].dtype, lambda a=arrays[0]: a))
            continue
        shape, dtype = shapes[0][suffix]
        axis = 0 if suffix == "weight" and not parts[0][0].conv1d else len(shape) - 1
        shape = (*shape[:axis], sum(of[suffix][0][axis] for of in shapes), *shape[axis + 1 :])

        rows = parts[0][0].rows
        if rows is not None and suffix == "qzeros":
            raise ValueError(f"model: the parts of {name} are interleaved, which packed zero points do not allow")

        def join(suffix: str = suffix, axis: int = axis, rows: Any = rows) -> np.ndarray:  # when it is to be written
            whole = np.concatenate([layer[suffix]() for layer in layers], axis=axis)
            order = None if rows is None else np.argsort(np.concatenate(rows(config, whole.shape[axis])))
            return whole if order is None else np.take(whole, order, axis)

        out.append((f"{name}.{suffix}", shape, dtype, join))
    return out
