"""Checkpoints in Hugging Face's layout: in, out, and where they are found.

    model = load("path/or/hub-id", dtype="bfloat16", mesh=mesh)
    save(model, "directory")                                     # what other tools read, bit-equal

Loading builds the model abstractly, replays what surgery made of it, and then reads one tensor at a time, straight to
its dtype and place: never more than one of them is held twice.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import atomic, models, nn, paths, resolve, surgery, weights
from jaxformers import mesh as meshes
from jaxformers.models import config as configs
from jaxformers.models.keymap import HF, expected, lookup
from jaxformers.weights import gptq_format
from jaxformers.safetensors_io import Checkpoint, CheckpointError, LazyTensor, open_checkpoint, read_json, write_checkpoint

NO_HEAD = "none"
_HEAD_OF_CLASS = (
    ("ForMaskedLM", "masked_lm"),
    ("ForPreTraining", "masked_lm"),
    ("ForCausalLM", "causal_lm"),
    ("LMHeadModel", "causal_lm"),
    ("ForSequenceClassification", "sequence_classification"),
    ("ForTokenClassification", "token_classification"),
    ("Model", None),
)


def load(
    path_or_id: str | Path,
    *,
    head: str | None = None,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    key: jax.Array | None = None,
    **config_overrides: Any,
) -> nnx.Module:
    """Load a pretrained model.

    ``path_or_id``: a directory, a hub id (needs ``huggingface_hub``, uses its cache when offline), or the name of a
    checkpoint that an installed package carries (``all-MiniLM-L6-v2``). ``head``: ``masked_lm``, ``causal_lm``,
    ``sequence_classification``, ``token_classification``, ``sentence`` or ``"none"``; by default what the checkpoint's
    ``architectures`` says, or ``sentence`` in the sentence-transformers layout. A head that the checkpoint does not
    have is initialised from ``key``, which must be given then. ``dtype``: of the floating-point weights, by default
    as stored. ``mesh``: each device receives only its slice, by the rules of :mod:`jaxformers.mesh`.
    ``config_overrides``: fields of the architecture's Config.

    Raises ValueError (CheckpointError for the files) naming what is wrong: an unknown ``model_type``, missing or
    unmapped tensors, shapes that disagree with the config, non-finite weights, pickles.
    """
    directory = resolve.find(str(path_or_id))
    hf = _read_config(directory)
    arch = models.architecture(hf["model_type"])
    checkpoint = open_checkpoint(directory)
    sentence, chosen = None, head
    if head is None:
        sentence = resolve.sentence_settings(directory)
        head = "sentence" if sentence is not None else _head_from_architectures(hf)
    elif head == "sentence":
        sentence = resolve.sentence_settings(directory) or {"pooling": "mean"}
    head = None if head == NO_HEAD else head
    _check_head(head, arch)

    config = arch.Config.from_hf(hf)
    if hasattr(config, "pooler") and head is None and not any("pooler" in name for name in checkpoint):
        config = dataclasses.replace(config, pooler=False)
    config = configs.replace(config, config_overrides)
    body_head = None if head == "sentence" else head
    if head == "sentence" and hasattr(config, "pooler"):
        config = dataclasses.replace(config, pooler=False)
    model = nnx.eval_shape(lambda: arch.Model(config, head=body_head, rngs=nnx.Rngs(0)))
    extra: dict[str, Any] = {}
    if head == "sentence":
        settings = {name: value for name, value in sentence.items() if name != "dense"}
        if sentence.get("dense") is not None:
            dense = open_checkpoint(sentence["dense"])
            settings["out"] = dense["linear.weight"].shape[0]
            settings["bias"] = "linear.bias" in dense
            extra = {"head.dense.kernel": dense["linear.weight"].read().T}
            if settings["bias"]:
                extra["head.dense.bias"] = dense["linear.bias"].read()
        # the head is small, but it may be abstract too: its values come from `extra`
        grown = nnx.eval_shape(lambda: nn.SentenceHead(config.hidden_size, **settings, rngs=nnx.Rngs(0)))
        model.head, model.head_name = nnx.data(grown), "sentence"
    surgery.named(model)
    _expect_packed(model, arch, hf, checkpoint)
    model = surgery.replay(model, (hf.get("jaxformers") or {}).get("surgery") or [])
    model.source = str(directory)

    prefixed = any(name.startswith(f"{arch.PREFIX}.") for name in checkpoint)

    def skip(name: str) -> bool:
        """Tensors that the caller has declined: other heads, and layers beyond an explicit num_hidden_layers."""
        if chosen is not None and prefixed and not name.startswith(f"{arch.PREFIX}."):
            return True
        layer = re.search(r"\.(\d+)\.", name)
        return "num_hidden_layers" in config_overrides and layer is not None and int(layer[1]) >= config.num_hidden_layers

    return _fill(model, arch, checkpoint, extra, dtype, mesh, key, skip)


def init(config: Any, *, head: str | None = None, key: jax.Array, dtype: Any = None) -> nnx.Module:
    """A model with random weights. ``config`` is an architecture's Config, or a dict as ``config.json`` holds it.

    Raises ValueError for a head that the architecture does not have.
    """
    if isinstance(config, Mapping):
        config = models.architecture(config.get("model_type", "")).Config.from_hf(config)
    arch = _module_of(config)
    _check_head(head, arch)

    @jax.jit
    def build(key: jax.Array) -> Any:
        model = arch.Model(config, head=None if head == "sentence" else head, rngs=nnx.Rngs(key))
        if head == "sentence":
            nn.new_sentence_head(model, pooling="mean", rngs=nnx.Rngs(0))
        state = nnx.state(model)
        return state if dtype is None else jax.tree.map(lambda a: a.astype(dtype), state)

    def skeleton() -> nnx.Module:
        model = arch.Model(config, head=None if head == "sentence" else head, rngs=nnx.Rngs(0))
        return nn.new_sentence_head(model, pooling="mean", rngs=nnx.Rngs(0)) if head == "sentence" else model

    model = nnx.eval_shape(skeleton)
    nnx.update(model, build(key))
    return surgery.named(model)


def save(model: nnx.Module, directory: str | Path, tokenizer: Any = None, *, max_shard_bytes: float = 5e9) -> None:
    """Write ``model`` in Hugging Face's layout: ``config.json`` and ``model.safetensors`` (sharded at 5 GB).

    Other tools read it; weights round-trip bit-equal. Packed weights are stored in GPTQ's layout, a sentence head in
    that of sentence-transformers, and other surgery is recorded in ``config.json`` for :func:`load`. ``tokenizer``
    writes its files too; by default those of the checkpoint that the model came from are copied. The directory is
    written beside and renamed: a full disk leaves the old checkpoint whole.
    """
    arch = _module_of(model.config)
    tensors, sentence_dense = _to_tensors(model, arch)
    config = config_json(model)
    files: dict[str, bytes] = {"config.json": atomic.json_bytes(config)}
    for name, content in resolve.companions(model.source, with_tokenizer=tokenizer is None).items():
        files.setdefault(name, content)
    if model.head_name == "sentence":
        files.update(resolve.sentence_files(model, sentence_dense))
    if "quantization_config" in config:
        files["quantize_config.json"] = atomic.json_bytes(config["quantization_config"])
    else:
        files.pop("quantize_config.json", None)
    if tokenizer is not None:
        files.update(tokenizer.files())
    write_checkpoint(tensors, directory, max_shard_bytes=max_shard_bytes, extra_files=files)


def config_json(model: nnx.Module) -> dict[str, Any]:
    """The ``config.json`` dict that :func:`save` writes for ``model``."""
    arch = _module_of(model.config)
    hf = model.config.to_hf()
    in_heads = model.head_name in arch.HEADS
    old = hf.get("architectures") or []
    ours = arch.HEADS[model.head_name][0] if in_heads else arch.BASE_CLASS
    # one module may serve several model types (roberta, xlm-roberta, camembert): keep the checkpoint's own class
    if not (len(old) == 1 and _head_from_class(old[0]) == (model.head_name if in_heads else None)):
        hf["architectures"] = [resolve.class_name(ours, hf["model_type"])]
    dtypes = {np.dtype(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model))}
    floats = {d for d in dtypes if jnp.issubdtype(d, jnp.floating)}
    if len(floats) == 1:
        hf.pop("torch_dtype", None)
        hf["dtype"] = str(next(iter(floats)))
    for name in ("quantization_config", "jaxformers"):
        hf.pop(name, None)
    packed = [kernel for _, kernel in _kernels(model) if isinstance(kernel, weights.PackedWeight)]
    if packed:
        hf["quantization_config"] = gptq_format.config_json(packed, json.loads(model.config.hf))
    records = surgery.to_json(model)
    if records:
        hf["jaxformers"] = {"surgery": records}
    return hf


# ---- loading -------------------------------------------------------------------------------------------------------


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory}: has no config.json; expected a Hugging Face checkpoint directory")
    hf = read_json(file)
    if not isinstance(hf, dict) or not isinstance(hf.get("model_type"), str):
        raise CheckpointError(f"{file}: no model_type; expected a Hugging Face config.json")
    return hf


def _head_from_class(name: str) -> str | None:
    for suffix, head in _HEAD_OF_CLASS:
        if name.endswith(suffix):
            return head
    raise ValueError(f"config.json: architectures names {name!r}, whose head is not known; choose one with head=…")


def _head_from_architectures(hf: Mapping[str, Any]) -> str | None:
    names = hf.get("architectures") or []
    return _head_from_class(str(names[0])) if names else None


def _check_head(head: str | None, arch: Any) -> None:
    if head is not None and head != "sentence" and head not in arch.HEADS:
        known = ", ".join((*arch.HEADS, "sentence", NO_HEAD))
        raise ValueError(f"head: {arch.Model.__name__} has no head {head!r}; it has {known}")


def _module_of(config: Any) -> Any:
    return sys.modules[type(config).__module__]


def _kernels(model: nnx.Module) -> list[tuple[str, Any]]:
    return [
        (".".join(map(str, path)), module.kernel.get_value())
        for path, module in nnx.iter_modules(model)
        if isinstance(getattr(module, "kernel", None), nnx.Variable)
    ]


def _all_keys(arch: Any, head: str | None) -> dict[str, Any]:
    """The body's table (without prefix) and that of the head."""
    return {**arch.KEYS, **(arch.HEADS[head][1] if head in arch.HEADS else {})}


class _Names:
    """The checkpoint's tensors by today's names without prefix; remembers which were asked for."""

    def __init__(self, checkpoint: Checkpoint, arch: Any):
        self.checkpoint, self.used = checkpoint, set()
        self.in_file: dict[str, str] = {}
        for name in checkpoint:
            plain = name.removeprefix(arch.PREFIX + ".")
            for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
                plain = plain.replace(old, new)
            self.in_file[plain] = name

    def get(self, name: str) -> LazyTensor | None:
        found = self.in_file.get(name)
        if found is not None:
            self.used.add(found)
        return None if found is None else self.checkpoint[found]

    def under(self, module: str) -> dict[str, LazyTensor]:
        """All tensors of a module by suffix, marked as used."""
        return {n[len(module) + 1 :]: self.get(n) for n in self.in_file if n.startswith(module + ".")}


def _expect_packed(model: nnx.Module, arch: Any, hf: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Put an abstract PackedWeight where the checkpoint holds packed words."""
    if not any(name.endswith(".qweight") for name in checkpoint) and "quantization_config" not in hf:
        return
    settings = gptq_format.read_config(checkpoint.directory, hf)
    names, keys = _Names(checkpoint, arch), _all_keys(arch, model.head_name)
    for path, module in nnx.iter_modules(model):
        if not isinstance(getattr(module, "kernel", None), nnx.Variable):
            continue
        found = lookup(keys, ".".join(map(str, path)) + ".kernel")
        if found is not None and names.get(f"{found[0].name}.qweight") is not None:
            tensors = names.under(found[0].name)
            module.kernel.set_value(gptq_format.abstract(settings, module.kernel.get_value().shape, tensors))


def _fill(
    model: nnx.Module,
    arch: Any,
    checkpoint: Checkpoint,
    extra: Mapping[str, np.ndarray],
    dtype: Any,
    mesh: jax.sharding.Mesh | None,
    key: jax.Array | None,
    skip: Callable[[str], bool],
) -> nnx.Module:
    names, keys = _Names(checkpoint, arch), _all_keys(arch, model.head_name)
    flat = paths.flatten(nnx.to_pure_dict(nnx.state(model)))
    plan: dict[str, Callable[[], Any]] = {path: lambda path=path: extra[path] for path in extra}
    missing, wrong = [], []
    for path, leaf in flat.items():
        if path in plan:
            continue
        found = lookup(keys, path)
        try:
            read = None if found is None else _reader(names, path, *found, leaf)
        except ValueError as error:
            wrong.append(str(error))
            continue
        if read is None:
            missing.append(path)
        else:
            plan[path] = read
    fresh = [path for path in missing if path.startswith("head.")]
    if len(fresh) < len(missing):
        lost = [_file_name(arch, model.head_name, path) for path in missing if path not in fresh]
        raise CheckpointError(f"{checkpoint.directory}: tensors missing: {_some(lost)}")
    if fresh and key is None:
        raise CheckpointError(
            f"{checkpoint.directory}: no weights for {_some(fresh)}; to start with a new head, pass key=jax.random.key(…)"
        )
    if wrong:
        raise CheckpointError(f"{checkpoint.directory}: {_some(wrong)}")
    unmapped = _unmapped(names, arch, skip)
    if unmapped:
        raise CheckpointError(f"{checkpoint.directory}: tensors that have no place in this model: {_some(unmapped)}")
    values = {path: _place(path, read(), dtype, mesh) for path, read in plan.items()}
    if fresh:
        values.update({path: _place(path, value, dtype, mesh) for path, value in _fresh(model, fresh, key).items()})
    for path, leaf in flat.items():
        if values[path].shape != leaf.shape:
            raise CheckpointError(f"{checkpoint.directory}: {path} has shape {values[path].shape}, expected {leaf.shape}")
    graph, _ = nnx.split(model)
    return surgery.named(nnx.merge(graph, paths.unflatten(values)))


def _reader(names: _Names, path: str, entry: HF, leaf_name: str, leaf: Any) -> Callable[[], Any] | None:
    """A function that reads the parameter at ``path``, or None when its tensor is missing. Checks shape and dtype."""
    is_kernel = path.endswith(".kernel")
    if weights.is_typed(leaf):
        tensors = names.under(entry.name)
        return (lambda: leaf.from_tensors(_torch_like(tensors, entry))) if tensors else None
    tensor = names.get(f"{entry.name}.{leaf_name}")
    if tensor is None:
        return None
    shape = tuple(tensor.shape)
    if is_kernel and not entry.conv1d:
        shape = shape[::-1]
    if shape and entry.part[1] > 1:
        shape = (*shape[:-1], shape[-1] // entry.part[1])
    if shape != tuple(leaf.shape):
        raise ValueError(
            f"{entry.name}.{leaf_name} has shape {tuple(tensor.shape)}, but config.json asks for "
            f"{tuple(leaf.shape[::-1] if is_kernel and not entry.conv1d else leaf.shape)}"
        )
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(f"{entry.name}.{leaf_name} has dtype {tensor.dtype}, expected a floating-point one")
    read = _torch_like({leaf_name: tensor}, entry)
    return (lambda: weights.from_tensors(leaf, read)) if is_kernel else (lambda: read(leaf_name))


def _torch_like(tensors: Mapping[str, LazyTensor], entry: HF) -> Callable[[str], np.ndarray | None]:
    """``read(suffix)`` as if the module were a Linear of its own: slices of fused layers, Conv1D turned to (out, in)."""
    i, n = entry.part

    def read(suffix: str) -> np.ndarray | None:
        if suffix not in tensors:
            if suffix == "g_idx":  # optional in the packed layout
                return None
            raise CheckpointError(f"tensor {entry.name}.{suffix} is missing")
        array = tensors[suffix].read()
        if suffix == "weight" and entry.conv1d:
            array = array.T
        if n > 1 and suffix != "g_idx":
            axis = 0 if suffix == "weight" else array.ndim - 1
            width = array.shape[axis] // n
            array = array[(slice(None),) * axis + (slice(i * width, (i + 1) * width),)]
        return array

    return read


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
    if mesh is None:
        return jnp.asarray(np.array(value, wanted, order="C", copy=True)) if isinstance(value, np.ndarray) else value.astype(wanted)
    sharding = meshes.sharding(mesh, path, value.shape)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: np.array(value[index], wanted, order="C"))


def _fresh(model: nnx.Module, fresh: list[str], key: jax.Array) -> dict[str, Any]:
    arch = _module_of(model.config)

    @jax.jit
    def build(key: jax.Array) -> dict[str, Any]:
        new = arch.Model(model.config, head=model.head_name, rngs=nnx.Rngs(key))
        flat = paths.flatten(nnx.to_pure_dict(nnx.state(new)))
        return {path: flat[path] for path in fresh}

    return build(key)


def _unmapped(names: _Names, arch: Any, skip: Callable[[str], bool]) -> list[str]:
    """Tensors nobody asked for, less buffers, other heads, and the all-zero biases that GPTQ writers add."""
    heads = {k: v for _, table in arch.HEADS.values() for k, v in table.items()}
    other = expected({**heads, "pooler": arch.KEYS.get("pooler", "pooler")}, names.in_file)
    left = []
    for plain, name in names.in_file.items():
        if name in names.used or plain in other or skip(name) or any(re.fullmatch(p, plain) for p in arch.IGNORED):
            continue
        module, _, suffix = plain.rpartition(".")
        if suffix == "bias" and f"{module}.qweight" in names.in_file and not np.any(names.checkpoint[name].read()):
            continue
        left.append(name)
    return left


def _file_name(arch: Any, head: str | None, path: str) -> str:
    found = lookup(_all_keys(arch, head), path)
    return path if found is None else f"{found[0].name}.{found[1]}"


def _some(items: list[str]) -> str:
    shown = "; ".join(items[:5])
    return shown if len(items) <= 5 else f"{shown}; and {len(items) - 5} more"


# ---- saving --------------------------------------------------------------------------------------------------------


def _to_tensors(model: nnx.Module, arch: Any) -> tuple[list[tuple], dict[str, np.ndarray]]:
    """``[(name, shape, dtype, read)]`` for the checkpoint, and the tensors of a sentence head's Dense module."""
    keys = _all_keys(arch, model.head_name)
    prefix = f"{arch.PREFIX}." if model.head_name in arch.HEADS else ""
    dense: dict[str, np.ndarray] = {}
    fused: dict[str, dict[int, Any]] = {}
    tensors: list[tuple] = []
    for path, leaf in paths.flatten(nnx.to_pure_dict(nnx.state(model))).items():
        if model.head_name == "sentence" and path.startswith("head.dense."):
            array = np.asarray(leaf)
            dense["linear.weight" if path.endswith("kernel") else "linear.bias"] = array.T if array.ndim == 2 else array
            continue
        found = lookup(keys, path)
        if found is None:
            raise ValueError(f"model: parameter {path} has no name in the Hugging Face layout")
        entry, leaf_name = found
        body = lookup(arch.KEYS, path) is not None
        name = f"{prefix if body else ''}{entry.name}"
        if entry.part[1] > 1:
            fused.setdefault(f"{name}\n{path.rpartition('.')[2]}", {})[entry.part[0]] = (entry, leaf_name, leaf)
        else:
            tensors += [(f"{name}.{s}", *rest) for s, *rest in _layer_tensors(path, entry, leaf_name, leaf)]
    for key, parts in fused.items():
        tensors += _fused_tensors(*key.split("\n"), [parts[i] for i in sorted(parts)])
    return tensors, dense


def _layer_tensors(path: str, entry: HF, leaf_name: str, leaf: Any) -> list[tuple]:
    if weights.is_typed(leaf):
        found = leaf.to_tensors()
        if entry.conv1d and "weight" in found:
            found["weight"] = found["weight"].T
        return [(suffix, a.shape, a.dtype, lambda a=a: a) for suffix, a in found.items()]
    turned = path.endswith(".kernel") and not entry.conv1d
    shape = leaf.shape[::-1] if turned else leaf.shape
    return [(leaf_name, shape, np.dtype(leaf.dtype), lambda: np.asarray(leaf).T if turned else np.asarray(leaf))]


def _fused_tensors(name: str, leaf_kind: str, parts: list[tuple[HF, str, Any]]) -> list[tuple]:
    """Concatenate the outputs of layers that the checkpoint keeps as one."""
    layers = [{s: read for s, _, _, read in _layer_tensors(f".{leaf_kind}", *part)} for part in parts]
    if any(set(layer) != set(layers[0]) for layer in layers):
        raise ValueError(f"model: {name} is one tensor in the checkpoint, but its parts have different kinds of weights")
    out = []
    for suffix in layers[0]:
        arrays = [layer[suffix]() for layer in layers]
        if suffix == "g_idx":
            if any(not np.array_equal(a, arrays[0]) for a in arrays):
                raise ValueError(f"model: the parts of {name} order their groups differently; the layout cannot say so")
            joined = arrays[0]
        elif suffix in ("weight", "bias", "qweight", "qzeros", "scales"):
            axis = 0 if suffix == "weight" and not parts[0][0].conv1d else arrays[0].ndim - 1
            joined = np.concatenate(arrays, axis=axis)
        else:
            raise ValueError(f"model: {name} is one tensor in the checkpoint; merge {suffix} into its weights first")
        out.append((f"{name}.{suffix}", joined.shape, joined.dtype, lambda a=joined: a))
    return out
