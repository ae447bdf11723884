"""Checkpoints in Hugging Face's layout: in, out, and where they are found.

    model = load("path/or/hub-id", dtype="bfloat16", mesh=mesh)
    save(model, "directory")                                     # what other tools read, bit-equal

Loading builds the model abstractly, replays what surgery made of it, and then reads one tensor at a time, straight to
its dtype and place: never more than one of them is held twice.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import atomic, fp8, models, nn, paths, resolve, surgery, weights
from jaxformers.kernels import lowbit
from jaxformers.models import config as configs
from jaxformers.models.reading import dtype_of, expect_packed, fill
from jaxformers.models.writing import to_tensors
from jaxformers.nn.keys import Keys
from jaxformers.safetensors_file import show
from jaxformers.safetensors_io import (
    CheckpointError,
    open_checkpoint,
    read_json,
    write_checkpoint,
)
from jaxformers.weights import gptq_format
from jaxformers.weights.arranged import restored

NO_HEAD = "none"
module_of = models.module_of
_HEAD_OF_CLASS = (
    ("ForMaskedLM", "masked_lm"),
    ("ForPreTraining", "masked_lm"),
    ("ForCausalLM", "causal_lm"),
    ("T5WithLMHeadModel", "seq2seq_lm"),  # what the first files of T5 called it
    ("LMHeadModel", "causal_lm"),
    ("ForSequenceClassification", "sequence_classification"),
    ("ForTokenClassification", "token_classification"),
    ("ForQuestionAnswering", "question_answering"),
    ("Model", None),
)


def load(
    path_or_id: str | Path,
    *,
    head: str | None = None,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    key: jax.Array | None = None,
    mapped: bool = False,
    arrange: bool | None = None,
    **config_overrides: Any,
) -> nnx.Module:
    """Load a pretrained model.

    ``path_or_id``: a directory, a hub id (needs ``huggingface_hub``, uses its cache when offline), or the name of a
    checkpoint that an installed package carries (``all-MiniLM-L6-v2``). ``head``: ``masked_lm``, ``causal_lm``,
    ``seq2seq_lm``, ``sequence_classification``, ``token_classification``, ``sentence``, another one of its
    architecture's, or ``"none"``; by default what the checkpoint's ``architectures`` says, or ``sentence`` in the
    sentence-transformers layout. A head that the checkpoint does not have is initialised from ``key``, which must be
    given then. ``dtype``: of the floating-point weights, by default as stored (8-bit floats: times their scales, in the
    dtype that config.json names). ``mesh``: each device receives only its slice, by the rules of
    :mod:`jaxformers.mesh`. ``mapped``: leave the weights in the files, as read-only NumPy views, for work that goes
    through them block by block (then neither ``dtype`` nor ``mesh``). ``arrange``: packed weights in the layout that a
    GPU multiplies fastest (:func:`jaxformers.weights.arrange`), which holds and saves the same; by default on one of
    NVIDIA's Hopper GPUs, without a mesh. ``config_overrides``: fields of the architecture's Config.

    Raises ValueError (CheckpointError for the files) naming what is wrong: an unknown ``model_type``, missing or
    unmapped tensors, shapes that disagree with the config, non-finite weights, pickles.
    """
    if mapped and (dtype is not None or mesh is not None):
        raise ValueError("mapped: the weights stay as and where they are stored; give neither dtype nor mesh")
    if arrange and (mapped or mesh is not None):
        raise ValueError("arrange: the layout is one device's; give neither mapped nor mesh")
    if dtype is not None and not _is_floating(dtype):
        raise ValueError(f"dtype: expected a floating-point type such as 'bfloat16', got {dtype!r}")
    found = outline(path_or_id, head=head, dtype=dtype, **config_overrides)
    model = fill(found.model, found.arch, found.checkpoint, found.extra, dtype, mesh, key, found.skip, mapped)
    if arrange is None:
        arrange = mesh is None and not mapped and lowbit.platform() == "gpu"
    return weights.arrange(model) if arrange else model


class Outline(NamedTuple):
    """A checkpoint before any weight is read: the abstract model, and where each of its arrays comes from."""

    model: nnx.Module
    arch: Any
    checkpoint: Any
    extra: dict[str, Any]
    skip: Callable[[str], bool]


def outline(path_or_id: str | Path, *, head: str | None = None, dtype: Any = None, **config_overrides: Any) -> Outline:
    """What :func:`load` is going to fill; arguments and errors as there."""
    directory = resolve.find(str(path_or_id))
    hf = read_config(Path(directory))
    arch = models.architecture(hf["model_type"])
    checkpoint, hf = fp8.widened(open_checkpoint(directory, check_finite=True), hf, dtype)
    sentence, chosen = None, head
    if head is None:
        sentence = resolve.sentence_settings(directory)
        head = "sentence" if sentence is not None else head_from_architectures(hf, arch)
    elif head == "sentence":
        sentence = resolve.sentence_settings(directory) or {"pooling": "mean"}
    head = None if head == NO_HEAD else head
    check_head(head, arch)

    config = arch.Config.from_hf(hf)
    if hasattr(arch, "settle"):
        config = arch.settle(config, checkpoint)
    for part in ("pooler", "contact_head"):  # what some checkpoints leave out
        if (
            hasattr(config, part)
            and not any(part in name for name in checkpoint)
            and (part != "pooler" or head in (None, "sentence"))
        ):
            config = dataclasses.replace(config, **{part: False})
    config = configs.replace(config, config_overrides)
    _check_head_of(config, head, arch)
    depth = configs.depth(config)
    if depth > len(checkpoint):  # before as many layers are built
        raise CheckpointError(f"{directory}: config.json asks for {depth} layers; there are {len(checkpoint)} tensors")
    body_head = None if head == "sentence" else head
    model = nnx.eval_shape(lambda: arch.Model(config, head=body_head, rngs=Keys(0)))
    extra: dict[str, Any] = {}
    if head == "sentence":
        settings = {name: value for name, value in sentence.items() if name != "dense"}
        if sentence.get("dense") is not None:
            dense = open_checkpoint(sentence["dense"], check_finite=True)
            narrowed = bool(hf.get("jaxformers"))  # by surgery; its width is checked when it is filled in
            width = dense["linear.weight"].shape[1:] if "linear.weight" in dense else ()
            if not width or (width != (config.hidden_size,) and not narrowed):
                raise CheckpointError(
                    f"{sentence['dense']}: expected a linear.weight of shape (…, {config.hidden_size})"
                )
            settings["out"] = dense["linear.weight"].shape[0]
            settings["bias"] = "linear.bias" in dense
            extra = {"head.dense.kernel": dense["linear.weight"].read().T}
            if settings["bias"]:
                extra["head.dense.bias"] = dense["linear.bias"].read()
        # the head is small, but it may be abstract too: its values come from `extra`
        grown = nnx.eval_shape(lambda: nn.SentenceHead(config.hidden_size, **settings, rngs=Keys(0)))
        model.head, model.head_name = nnx.data(grown), "sentence"
    surgery.named(model)
    model = surgery.replay(model, hf.get("jaxformers"))
    expect_packed(model, arch, hf, checkpoint)  # in the layers and widths that surgery has left
    model.source = str(directory)

    prefixed = arch.PREFIX and any(name.startswith(f"{arch.PREFIX}.") for name in checkpoint)

    def skip(name: str) -> bool:
        """Tensors that the caller has declined: other heads, and layers beyond an explicit num_hidden_layers."""
        if chosen is not None and prefixed and not name.startswith(f"{arch.PREFIX}."):
            return True
        layer = re.search(r"\.(\d+)\.", name)
        return (
            "num_hidden_layers" in config_overrides and layer is not None and int(layer[1]) >= config.num_hidden_layers
        )

    return Outline(model, arch, checkpoint, extra, skip)


def init(config: Any, *, head: str | None = None, key: jax.Array, dtype: Any = None) -> nnx.Module:
    """A model with random weights. ``config`` is an architecture's Config, or a dict as ``config.json`` holds it.

    Raises ValueError for a head that the architecture does not have.
    """
    if isinstance(config, Mapping):
        config = models.architecture(config.get("model_type", "")).Config.from_hf(config)
    arch = module_of(config)
    check_head(head, arch)
    _check_head_of(config, head, arch)

    # Not jitted: one program for all draws compiles anew for every configuration, those of single shapes are shared.
    model = arch.Model(config, head=None if head == "sentence" else head, rngs=Keys(key))
    if head == "sentence":
        nn.new_sentence_head(model, pooling="mean", rngs=Keys(0))
    if dtype is not None:
        state = nnx.state(model)
        flat = paths.flatten(nnx.to_pure_dict(state))
        flat = {path: leaf.astype(dtype_of(arch, path, dtype)) for path, leaf in flat.items()}
        nnx.replace_by_pure_dict(state, paths.unflatten(flat))
        nnx.update(model, state)
    return surgery.named(model)


def save(model: nnx.Module, directory: str | Path, tokenizer: Any = None, *, max_shard_bytes: float = 5e9) -> None:
    """Write ``model`` in Hugging Face's layout: ``config.json`` and ``model.safetensors`` (sharded at 5 GB).

    Other tools read it; weights round-trip bit-equal. Packed weights are stored in GPTQ's layout, a sentence head in
    that of sentence-transformers, and other surgery is recorded in ``config.json`` for :func:`load`. ``tokenizer``
    writes its files too; by default those of the checkpoint that the model came from are copied. The directory is
    written beside and renamed: a full disk leaves the old checkpoint whole.
    """
    model, arch = restored(model), module_of(model.config)
    tensors, sentence_dense = to_tensors(model, arch)
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
    # what an older checkpoint in `directory` has and this one has not would change how the new one is read
    drop = resolve.stale(files, sentence=model.head_name == "sentence")
    write_checkpoint(tensors, directory, max_shard_bytes=max_shard_bytes, extra_files=files, drop=drop)


def config_json(model: nnx.Module) -> dict[str, Any]:
    """The ``config.json`` dict that :func:`save` writes for ``model``."""
    model, arch = restored(model), module_of(model.config)
    hf = model.config.to_hf()
    in_heads = model.head_name in arch.HEADS
    old = hf.get("architectures") or []
    ours = arch.HEADS[model.head_name][0] if in_heads else arch.BASE_CLASS
    # one module may serve several model types (roberta, xlm-roberta, camembert): keep the checkpoint's own class
    if not (len(old) == 1 and _head_from_class(old[0], arch) == (model.head_name if in_heads else None)):
        hf["architectures"] = [resolve.class_name(ours, hf["model_type"])]
    flat = paths.flatten(nnx.to_pure_dict(nnx.state(model)))
    chosen = {path: leaf for path, leaf in flat.items() if not paths.matches(getattr(arch, "FLOAT32", ()), path)}
    dtypes = {np.dtype(leaf.dtype) for leaf in jax.tree.leaves(chosen)}
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


def read_config(path_or_id: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint. Raises CheckpointError when there is none, or it names no ``model_type``."""
    directory = path_or_id if isinstance(path_or_id, Path) else Path(resolve.find(path_or_id))
    file = directory / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory}: has no config.json; expected a Hugging Face checkpoint directory")
    hf = read_json(file)
    if not isinstance(hf, dict) or not isinstance(hf.get("model_type"), str):
        raise CheckpointError(f"{file}: no model_type; expected a Hugging Face config.json")
    return hf


def _is_floating(dtype: Any) -> bool:
    try:
        return jnp.issubdtype(np.dtype(dtype), jnp.floating)
    except TypeError:  # no dtype at all
        return False


def _head_from_class(name: str, arch: Any) -> str | None:
    for head, (own, _) in arch.HEADS.items():
        if name.endswith(own):  # also MT5Model for T5Model
            return head
    if name.endswith(arch.BASE_CLASS):
        return None
    for suffix, head in _HEAD_OF_CLASS:
        if name.endswith(suffix):
            return head
    raise ValueError(f"config.json: architectures names {show(name)}, whose head is not known; choose one with head=…")


def head_from_architectures(hf: Mapping[str, Any], arch: Any) -> str | None:
    """The head that config.json's ``architectures`` names. Raises ValueError for one that is not known."""
    names = hf.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("config.json: architectures must be a list of class names")
    return _head_from_class(names[0], arch) if names else getattr(arch, "DEFAULT_HEAD", None)


def _check_head_of(config: Any, head: str | None, arch: Any) -> None:
    """Some heads are for some configs only; a model in the making would say so less clearly."""
    if hasattr(arch, "check_head"):
        arch.check_head(config, None if head == "sentence" else head)


def check_head(head: str | None, arch: Any) -> None:
    """Raise ValueError for a head that the architecture does not have."""
    if head is not None and head != "sentence" and head not in arch.HEADS:
        known = ", ".join((*arch.HEADS, "sentence", NO_HEAD))
        raise ValueError(f"head: {arch.Model.__name__} has no head {head!r}; it has {known}")


def _kernels(model: nnx.Module) -> list[tuple[str, Any]]:
    return [
        (".".join(map(str, path)), module.kernel.get_value())
        for path, module in nnx.iter_modules(model)
        if isinstance(getattr(module, "kernel", None), nnx.Variable)
    ]
