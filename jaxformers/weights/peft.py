"""LoRA updates in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import atomic, surgery
from jaxformers.models.keymap import all_keys, body_keys, lookup, prefix_of
from jaxformers.safetensors_file import SafetensorsFile, show
from jaxformers.safetensors_io import CheckpointError, read_json, write_tensors
from jaxformers.weights.lowrank import LowRank, record_lora

_PREFIX = "base_model.model."


def save_adapter(model: nnx.Module, directory: str | Path) -> None:
    """Write the low-rank updates of ``model`` alone, as PEFT reads them.

    Raises ValueError when there are none, when ranks or scales differ, or when a layer is one slice of a fused layer of
    the checkpoint (GPT-2's query, key and value), whose parts PEFT cannot tell apart.
    """
    tensors: list[tuple[str, np.ndarray]] = []
    kinds, names = set(), []
    for path, linear in surgery.find_linears(model, "**"):
        kernel = linear.kernel.get_value()
        if not isinstance(kernel, LowRank):
            continue
        name = _hf_name(model, path)
        names.append(name)
        kinds.add((kernel.a.shape[1], float(kernel.scale)))
        tensors.append((f"{_PREFIX}{name}.lora_A.weight", np.asarray(kernel.a).T))
        tensors.append((f"{_PREFIX}{name}.lora_B.weight", np.asarray(kernel.b).T))
    if len(kinds) != 1:
        raise ValueError(f"model: one kind of low-rank update is needed, found {sorted(kinds) or 'none'}")
    rank, scale = kinds.pop()
    base = None if model.source is None else str(model.source)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(names),
        "base_model_name_or_path": base,
    }
    with atomic.replace_directory(directory) as temporary:
        write_tensors(tensors, temporary, stem="adapter_model")
        (temporary / "adapter_config.json").write_bytes(atomic.json_bytes(config))


def load_adapter(model: nnx.Module, directory: str | Path) -> nnx.Module:
    """A copy of ``model`` with the LoRA updates of a PEFT directory over its kernels, whatever those are.

    Raises ValueError (CheckpointError for the files) for another PEFT method, options that change the arithmetic and
    are not supported (DoRA, per-layer ranks), layers that the model does not have, and shapes that do not fit.
    """
    directory = Path(directory)
    config = read_json(directory / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{directory}: peft_type {config.get('peft_type')!r} is not supported, only 'LORA'")
    for option in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"):
        if config.get(option):
            raise CheckpointError(f"{directory}: the option {option} is not supported")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{directory}: trained biases are not supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{directory}: r={rank!r}, lora_alpha={alpha!r}: expected a rank and a number")
    alpha = alpha * rank**0.5 if config.get("use_rslora") else alpha
    file = SafetensorsFile(directory / "adapter_model.safetensors", check_finite=True)
    updates: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in file.items():
        found = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if found is None:
            raise CheckpointError(f"{directory}: tensor {show(name)} is no low-rank update")
        updates.setdefault(found[1], {})[found[2]] = tensor.read()
    model = surgery.copy(model)
    targets = []
    for path, linear in surgery.find_linears(model, "**"):
        update = updates.pop(_hf_name(model, path, strict=False), None)
        if update is None:
            continue
        kernel = linear.kernel.get_value()
        shapes = {"A": (rank, kernel.shape[0]), "B": (kernel.shape[1], rank)}
        for part, shape in shapes.items():
            if part not in update or update[part].shape != shape:
                got = "nothing" if part not in update else f"shape {update[part].shape}"
                raise CheckpointError(f"{directory}: lora_{part} of {path}: expected shape {shape}, found {got}")
        a, b = (jnp.array(update[part].T, dtype=kernel.dtype) for part in "AB")
        linear.kernel.set_value(LowRank(kernel, a, b, alpha / rank))
        targets.append(path)
    if updates:
        lost = show(next(iter(updates))).strip("'")
        raise CheckpointError(f"{directory}: the model has no layer {lost}")
    return record_lora(model, targets, rank, alpha)


def _hf_name(model: Any, path: str, *, strict: bool = True) -> str:
    """The layer's module name in Hugging Face's model of the same head."""
    from jaxformers import hub

    arch = hub.module_of(model.config)
    found = lookup(all_keys(model, arch), f"{path}.kernel")
    if found is None or found[0].part[1] > 1:
        if strict:
            raise ValueError(f"model: {path} is no layer of its own in Hugging Face's model; PEFT has no name for it")
        return ""
    prefix = prefix_of(arch, model.head_name) if lookup(body_keys(arch, model.config), f"{path}.kernel") else ""
    return prefix + found[0].name
