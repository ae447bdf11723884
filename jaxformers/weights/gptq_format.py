"""``quantization_config`` of ``config.json`` and ``quantize_config.json``: what GPTQ checkpoints say of themselves."""

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxformers.safetensors_file import show
from jaxformers.safetensors_io import read_json
from jaxformers.weights import words
from jaxformers.weights.packed import BITS, FORMATS, PackedWeight, n_groups

log = logging.getLogger(__name__)
_SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size", "format": "checkpoint_format"}


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """The settings that decide how packed words are read, and those that say how they were made."""

    bits: int
    group_size: int = -1
    sym: bool = True
    desc_act: bool = False
    static_groups: bool = False
    true_sequential: bool = False
    damp_percent: float = 0.01
    checkpoint_format: str = "gptq"
    dynamic: tuple[tuple[str, Mapping[str, Any]], ...] = ()  # (pattern of layer names, settings that differ there)

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ValueError(f"quantization_config: bits must be one of {BITS}, got {self.bits!r}")
        if type(self.group_size) is not int or self.group_size == 0 or self.group_size < -1:
            raise ValueError(f"quantization_config: group_size must be -1 or positive, got {self.group_size!r}")
        if self.checkpoint_format not in FORMATS:
            raise ValueError(
                f"quantization_config: checkpoint_format must be one of {FORMATS}, got {self.checkpoint_format!r}"
            )

    def for_layer(self, name: str) -> "QuantizeConfig":
        """The settings of the layer called ``name`` in the file: those of the first ``dynamic`` pattern that matches.

        A pattern ``-:…`` says that the layer is not packed, which the file shows by itself.
        """
        for pattern, own in self.dynamic:
            if re.match(re.sub(r"^[+-]:", "", pattern), name):
                known = {k: own[k] for k in ("bits", "group_size", "sym", "desc_act") if k in own}
                return dataclasses.replace(self, **known)
        return self


def parse(config: Mapping[str, Any]) -> QuantizeConfig:
    """A :class:`QuantizeConfig` from any of the spellings in use.

    Synonyms ``w_bit``, ``q_group_size``, ``format``; no ``checkpoint_format`` means version 1; no ``sym`` means true,
    with a warning. ``dynamic``: settings of single layers. Raises ValueError for another ``quant_method`` (awq, marlin,
    …), naming it, for words that are not int32, and for values out of range.
    """
    method = config.get("quant_method", "awq" if str(config.get("version", "")).lower().startswith("gem") else "gptq")
    if method != "gptq":
        raise ValueError(f"quantization_config: quant_method {method!r} is not supported, only 'gptq'")
    if str(config.get("pack_dtype", "int32")).removeprefix("torch.") != "int32":
        raise ValueError(f"quantization_config: pack_dtype {config['pack_dtype']!r} is not supported, only 'int32'")
    found = {_SYNONYMS.get(k, k): v for k, v in config.items() if v is not None}
    if "bits" not in found:
        raise ValueError("quantization_config: bits missing")
    dynamic = found.pop("dynamic", None) or {}
    if not isinstance(dynamic, Mapping) or not all(isinstance(own, Mapping | None) for own in dynamic.values()):
        raise ValueError("quantization_config: dynamic must map patterns of layer names to settings")
    for pattern in dynamic:
        plain = re.sub(r"^[+-]:", "", pattern)
        try:
            re.compile(plain)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"quantization_config: dynamic has the pattern {show(pattern)}: {error}") from None
        # (.+)* and its like take a time exponential in the length of a name that does not match
        if len(plain) > 500 or re.search(r"\)[*+{]", plain) or len(re.findall(r"(?<!\\)[*+{]", plain)) > 5:
            raise ValueError(
                f"quantization_config: dynamic has the pattern {show(pattern)}; repeated groups and more than five "
                "repetitions are not supported"
            )
    found["dynamic"] = tuple((pattern, own or {}) for pattern, own in dynamic.items())
    if "sym" not in found:
        log.warning("quantization_config has no 'sym': assuming true")
    names = {f.name for f in dataclasses.fields(QuantizeConfig)}
    return QuantizeConfig(**{k: v for k, v in found.items() if k in names})


def read_config(directory: Path, hf: Mapping[str, Any]) -> QuantizeConfig:
    """The settings of the checkpoint at ``directory`` whose ``config.json`` is ``hf``."""
    file = directory / "quantize_config.json"
    config = hf.get("quantization_config") or (read_json(file) if file.is_file() else None)
    if not isinstance(config, Mapping):
        raise ValueError(f"{directory}: packed weights, but neither quantization_config nor quantize_config.json")
    return parse(config)


def abstract(config: QuantizeConfig, shape: tuple[int, int], tensors: Mapping[str, Any]) -> PackedWeight:
    """The packed weight of logical ``shape`` (in, out) as shapes only; ``tensors`` are those of its layer."""
    d_in, d_out = shape
    groups = n_groups(d_in, config.group_size)
    scales = tensors["scales"].dtype if "scales" in tensors else np.dtype(np.float16)
    return PackedWeight(
        jax.ShapeDtypeStruct((d_in * config.bits // 32, d_out), np.int32),
        jax.ShapeDtypeStruct((groups, words.n_words(d_out, config.bits)), np.int32),
        jax.ShapeDtypeStruct((groups, d_out), scales),
        None,
        config.bits,
        config.group_size,
        config.checkpoint_format,
    )


def config_json(packed: list[PackedWeight], hf: Mapping[str, Any]) -> dict[str, Any]:
    """``quantization_config`` for a model with the packed weights ``packed`` that came from ``config.json`` ``hf``.

    Raises ValueError when they differ in bits, group size or format, which one configuration cannot say.
    """
    kinds = {(w.bits, w.group_size, w.checkpoint_format) for w in packed}
    if len(kinds) > 1:
        raise ValueError(f"model: packed weights of different kinds {sorted(kinds)} cannot be saved in one checkpoint")
    bits, group_size, checkpoint_format = kinds.pop()
    before = dict(hf.get("quantization_config") or {})
    sorted_groups = any(w.g_idx is not None for w in packed)
    made = {
        "sym": True,
        "desc_act": sorted_groups,
        "static_groups": False,
        "true_sequential": False,
        "damp_percent": 0.01,
    }
    fixed = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "checkpoint_format": checkpoint_format}
    return {**made, **before, **fixed}
