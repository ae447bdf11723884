"""Filling an abstract model from a checkpoint: each parameter finds its tensor, shape and dtype checked beforehand."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import paths, surgery, weights
from jaxformers.mesh import sharding as sharding_of
from jaxformers.models import stacked
from jaxformers.models.keymap import (
    HF,
    all_keys,
    body_keys,
    expected,
    ignored,
    lookup,
    own_name,
    tensor_name,
    turned,
    turned_back,
)
from jaxformers.models.keymap import Keys as Keymap
from jaxformers.nn.keys import Keys
from jaxformers.safetensors_file import show
from jaxformers.safetensors_io import Checkpoint, CheckpointError, LazyTensor
from jaxformers.weights import gptq_format
from jaxformers.weights.base import innermost, rebase


class Names:
    """The checkpoint's tensors by today's names without prefix; remembers which were asked for."""

    def __init__(self, checkpoint: Checkpoint, arch: Any, config: Any):
        self.checkpoint, self.config, self.used = checkpoint, config, set()
        self.in_file: dict[str, str] = {}
        self.top: dict[str, str] = {}  # what stands beside the prefixed body and is asked for there
        entries = (e for _, table in arch.HEADS.values() for e in table.values() if isinstance(e, HF) and e.top)
        beside = tuple(f"{entry.name}." for entry in entries)
        prefixed = any(name.startswith(f"{arch.PREFIX}.") for name in checkpoint)
        for name in checkpoint:
            if prefixed and name.startswith(beside):
                self.top[name] = name
                continue
            plain = name.removeprefix(f"{arch.PREFIX}.") if arch.PREFIX else name
            for pattern, today in getattr(arch, "RENAMED", ()):  # layouts of older or newer writers
                plain = re.sub(pattern, today, plain)
            for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
                plain = plain.replace(old, new)
            if plain in self.in_file:
                both = _some([self.in_file[plain], name])
                raise CheckpointError(f"{checkpoint.directory}: several tensors for one parameter: {both}")
            self.in_file[plain] = name
        for name, others in getattr(arch, "ALIASES", {}).items():  # some writers keep one of several equal tensors
            other = next((other for other in others if other in self.in_file), None)
            if name not in self.in_file and other is not None:
                self.in_file[name] = self.in_file.pop(other)

    def get(self, name: str, top: bool = False) -> LazyTensor | None:
        found = (self.top if top else self.in_file).get(name)
        if found is None and name.endswith(".decoder.bias"):  # masked-LM heads used to store it beside the decoder only
            found = self.in_file.get(name.removesuffix("decoder.bias") + "bias")
        if found is not None:
            self.used.add(found)
        return None if found is None else self.checkpoint[found]

    def under(self, module: str) -> dict[str, LazyTensor]:
        """All tensors of a module by suffix."""
        found = {n[len(module) + 1 :]: n for n in self.in_file if n.startswith(module + ".")}
        return {suffix: self.checkpoint[self.in_file[name]] for suffix, name in found.items()}


def expect_packed(model: nnx.Module, arch: Any, hf: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Put an abstract PackedWeight where the checkpoint holds packed words."""
    if not any(name.endswith(".qweight") for name in checkpoint) and "quantization_config" not in hf:
        return
    settings = gptq_format.read_config(checkpoint.directory, hf)
    names, keys = Names(checkpoint, arch, model.config), all_keys(model, arch)
    for path, module in nnx.iter_modules(model):
        if not isinstance(getattr(module, "kernel", None), nnx.Variable):
            continue
        kernel = module.kernel.get_value()
        if weights.is_typed(innermost(kernel)):  # surgery says what it is
            continue
        path = ".".join(map(str, path)) + ".kernel"
        found = lookup(keys, path) or own_name(path)
        if names.get(f"{found[0].name}.qweight") is not None:
            tensors = names.under(found[0].name)
            own = settings.for_layer(names.in_file[f"{found[0].name}.qweight"].removesuffix(".qweight"))
            packed = gptq_format.abstract(own, kernel.shape, tensors)
            module.kernel.set_value(rebase(kernel, lambda _, packed=packed: packed))


def fill(
    model: nnx.Module,
    arch: Any,
    checkpoint: Checkpoint,
    extra: Mapping[str, np.ndarray],
    dtype: Any,
    mesh: jax.sharding.Mesh | None,
    key: jax.Array | None,
    skip: Callable[[str], bool],
    mapped: bool = False,
) -> nnx.Module:
    names, keys = Names(checkpoint, arch, model.config), all_keys(model, arch)
    flat = paths.flatten(nnx.to_pure_dict(nnx.state(model)))
    plan: dict[str, Callable[[], Any]] = {path: lambda path=path: extra[path] for path in extra}
    missing, wrong = [], []
    for path, leaf in flat.items():
        if path in plan:
            continue
        try:
            read = _reader(names, path, *(lookup(keys, path) or own_name(path)), leaf)
        except ValueError as error:
            wrong.append(str(error))
            continue
        if read is None:
            missing.append(path)
        else:
            plan[path] = read
    fresh = [path for path in missing if path.startswith(("head.", "pooler."))]  # a masked LM's file has no pooler
    if len(fresh) < len(missing):
        lost = [_file_name(keys, path) for path in missing if path not in fresh]
        raise CheckpointError(f"{checkpoint.directory}: tensors missing: {_some(lost)}")
    if fresh and key is None:
        raise CheckpointError(
            f"{checkpoint.directory}: no weights for {_some(fresh)}; for a new head, pass key=jax.random.key(…)"
        )
    if wrong:
        raise CheckpointError(f"{checkpoint.directory}: {_some(wrong)}")
    unmapped = _unmapped(names, model, arch, skip)
    if unmapped:
        raise CheckpointError(f"{checkpoint.directory}: tensors that have no place in this model: {_some(unmapped)}")
    values = {}
    for path, read in plan.items():
        value = read()
        if not mapped:
            value = _place(path, value, dtype_of(arch, path, dtype), mesh)
        values[path] = value[:] if isinstance(value, stacked.Stack) else value
        checkpoint.release()  # the file's pages make room for the next tensor
    if fresh:
        new = _fresh(model, fresh, key)
        values.update({path: _place(path, value, dtype_of(arch, path, dtype), mesh) for path, value in new.items()})
    for path, leaf in flat.items():
        if values[path].shape != leaf.shape:
            raise CheckpointError(
                f"{checkpoint.directory}: {path} has shape {values[path].shape}, expected {leaf.shape}"
            )
    graph, _ = nnx.split(model)
    return surgery.named(nnx.merge(graph, paths.unflatten(values)))


def dtype_of(arch: Any, path: str, dtype: Any) -> Any:
    """The dtype for the parameter at ``path`` where the user wants ``dtype``.

    What ``arch.FLOAT32`` names keeps 32 bits, since it decides something (a router's choice).
    """
    narrow = dtype is not None and np.dtype(dtype).itemsize < 4
    return np.dtype(np.float32) if narrow and paths.matches(getattr(arch, "FLOAT32", ()), path) else dtype


def _reader(names: Names, path: str, entry: HF, leaf_name: str, leaf: Any) -> Callable[[], Any] | None:
    """A function that reads the parameter at ``path``, or None when its tensor is missing. Checks shape and dtype."""
    is_kernel = path.endswith(".kernel")
    if weights.is_typed(leaf):
        if not names.under(entry.name):
            return None
        try:
            value = leaf.from_tensors(_torch_like(names, entry))  # views of the file; what is not asked for is unmapped
        except ValueError as error:
            raise ValueError(f"{entry.name}: {error}") from error
        return lambda: value
    if entry.whole is not None:
        return stacked.reader(names.get, entry, leaf_name, tuple(leaf.shape))
    tensor = names.get(tensor_name(entry.name, leaf_name), entry.top)
    if tensor is None:
        return None
    shape = tuple(tensor.shape)
    if entry.ones and shape[: entry.ones] == (1,) * entry.ones:
        shape = shape[entry.ones :]
    if is_kernel and not entry.conv1d:
        shape = turned_back(shape) if len(shape) >= 2 else shape
    if shape and entry.part[1] > 1:
        shape = (*shape[:-1], _part_width(names, entry, shape[-1]))
    if shape != tuple(leaf.shape):
        raise ValueError(
            f"{entry.name}.{leaf_name} has shape {tuple(tensor.shape)}, but config.json asks for "
            f"{turned(tuple(leaf.shape)) if is_kernel and not entry.conv1d else tuple(leaf.shape)}"
        )
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(f"{entry.name}.{leaf_name} has dtype {tensor.dtype}, expected a floating-point one")
    read = _torch_like(names, entry)
    if is_kernel:  # a table may give the leaf another name than "weight"
        return lambda: weights.from_tensors(leaf, lambda suffix: read(leaf_name if suffix == "weight" else suffix))
    return lambda: read(leaf_name).reshape(shape)


def _part_width(names: Names, entry: HF, total: int) -> int:
    """How many outputs of a fused layer of ``total`` belong to ``entry``; 0 when the layer is too small."""
    mine = entry.outputs(names.config, total)
    return len(mine) if len(mine) and mine.max() < total else 0


def _torch_like(names: Names, entry: HF) -> Callable[[str], np.ndarray | None]:
    """``read(suffix)`` as if the module were its own Linear: slices of fused layers, Conv1D turned to (out, in)."""
    i, n = entry.part

    def read(suffix: str) -> np.ndarray | None:
        own = names.get(f"{entry.name}.{i}.{suffix}") if n > 1 else None
        if own is not None:  # belongs to this slice alone
            return own.read()
        tensor = names.get(tensor_name(entry.name, suffix), entry.top)
        if tensor is None:
            if suffix == "g_idx":  # optional in the packed layout
                return None
            raise CheckpointError(f"tensor {suffix} is missing")
        array = tensor.read()
        if suffix == "weight" and entry.conv1d:
            array = array.T
        if n > 1 and suffix != "g_idx" and array.ndim:
            axis = 0 if suffix == "weight" else array.ndim - 1
            array = _take(array, axis, entry, names.config, suffix)
        return array

    return read


def _take(array: np.ndarray, axis: int, entry: HF, config: Any, suffix: str) -> np.ndarray:
    """The part of a fused layer's array that belongs to ``entry``, along ``axis``."""
    if entry.rows is None:
        i, n = entry.part
        width = array.shape[axis] // n  # a slice: a view of the file, and right for packed zero points too
        return array[(slice(None),) * axis + (slice(i * width, (i + 1) * width),)]
    if suffix == "qzeros":
        raise ValueError("its parts are interleaved, which packed zero points do not allow to take apart")
    return np.take(array, entry.outputs(config, array.shape[axis]), axis)


def _place(path: str, value: Any, dtype: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Host arrays (views of the file) to device arrays of ``dtype``; packed words keep their types."""
    if weights.is_typed(value):
        keep = isinstance(value, weights.PackedWeight)
        return jax.tree_util.tree_map_with_path(
            lambda p, a: _place(f"{path}{jax.tree_util.keystr(p)}", a, None if keep else dtype, mesh),
            value,
            is_leaf=lambda a: a is not value and isinstance(a, weights.PackedWeight),
        )
    wanted = np.dtype(dtype) if dtype is not None and jnp.issubdtype(value.dtype, jnp.floating) else value.dtype
    if mesh is None:  # a copy, never an alias of the file
        return jnp.array(np.asarray(value), dtype=None if wanted == value.dtype else wanted)
    sharding = sharding_of(mesh, path, value.shape)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: np.array(value[index], wanted, order="C"))


def _fresh(model: nnx.Module, fresh: list[str], key: jax.Array) -> dict[str, Any]:
    @jax.jit
    def build(key: jax.Array) -> dict[str, Any]:
        new = type(model)(model.config, head=model.head_name, rngs=Keys(key))
        flat = paths.flatten(nnx.to_pure_dict(nnx.state(new)))
        return {path: flat[path] for path in fresh}

    return build(key)


def _unmapped(names: Names, model: nnx.Module, arch: Any, skip: Callable[[str], bool]) -> list[str]:
    """Tensors nobody asked for, less buffers, other heads and what only models with other heads have, and the all-zero
    biases that GPTQ writers add."""
    heads = {f"{head} {path}": entry for head, (_, table) in arch.HEADS.items() for path, entry in table.items()}
    optional = {part: arch.KEYS.get(part, part) for part in ("pooler", "contact_head")}
    ours = paths.flatten(nnx.to_pure_dict(nnx.state(model)))
    within = lambda path, part: path == part or path.startswith(f"{part}.")
    absent = [part for part in getattr(arch, "OPTIONAL", ()) if not any(within(path, part) for path in ours)]
    for path, entry in body_keys(arch, model.config).items():
        if any(within(path, part) for part in absent):
            optional[path] = entry
    other = expected({**heads, **optional}, names.in_file)
    buffers = ignored(arch, names.config)
    left = []
    for plain, name in names.in_file.items():
        if name in names.used or plain in other or skip(name) or any(re.fullmatch(p, plain) for p in buffers):
            continue
        module, _, suffix = plain.rpartition(".")
        if suffix == "bias" and f"{module}.qweight" in names.in_file and not np.any(names.checkpoint[name].read()):
            continue
        left.append(name)
    return left


def _file_name(keys: Keymap, path: str) -> str:
    entry, leaf = lookup(keys, path) or own_name(path)
    return tensor_name(entry.name, leaf)


def _some(items: list[str]) -> str:
    shown = "; ".join(show(item, 200).strip("'") for item in items[:5])  # names are the file's: they may be anything
    return shown if len(items) <= 5 else f"{shown}; and {len(items) - 5} more"
