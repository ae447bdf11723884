"""Reading and writing ``config.json``: one field vocabulary for every architecture, Hugging Face's names in a table."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from jaxformers.safetensors_file import show

C = TypeVar("C")
POSITIVE = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
LIMITS = {
    "num_hidden_layers": 2000,
    "num_attention_heads": 4096,
    "num_labels": 10_000_000,
    "num_decoder_layers": 2000,
    "relative_attention_max_distance": 1_000_000,
}


def from_hf(cls: type[C], hf: Mapping[str, Any], names: Mapping[str, str], **computed: Any) -> C:
    """Build the frozen config ``cls`` from a ``config.json`` dict.

    ``names`` maps a field to Hugging Face's key where they differ; ``computed`` fields win. The whole dict is kept in
    the field ``hf`` so that saving loses nothing. Raises ValueError naming the key whose value cannot be.
    """
    values: dict[str, Any] = {"hf": kept(hf)}
    for field in dataclasses.fields(cls):
        key = names.get(field.name, field.name)
        if field.name == "hf" or hf.get(key) is None:
            continue
        values[field.name] = _checked(key, field, hf[key])
    if any(field.name == "num_labels" for field in dataclasses.fields(cls)):
        labels = hf.get("id2label")
        values["num_labels"] = len(labels) if isinstance(labels, dict) and labels else hf.get("num_labels") or 2
    values.update(computed)
    required = [f for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
    if required:
        missing = ", ".join(names.get(f.name, f.name) for f in required)
        raise ValueError(f"config.json: {missing} missing")
    for name, limit in LIMITS.items():
        if values.get(name, 0) > limit:
            raise ValueError(f"config.json: {names.get(name, name)} = {values[name]} is beyond reason (limit {limit})")
    for name in POSITIVE:
        if values.get(name, 1) == 0:
            raise ValueError(f"config.json: {names.get(name, name)} must be 1 or more, got 0")
    return cls(**values)


def pair(hf: Mapping[str, Any], name: str, default: int) -> tuple[int, int]:
    """A size that ``config.json`` gives as one number or as (height, width). Raises ValueError for anything else."""
    value = hf.get(name, default)
    both = (value, value) if isinstance(value, int) else value
    two = isinstance(both, list | tuple) and len(both) == 2
    fits = two and all(isinstance(n, int) and 0 < n < 1 << 20 for n in both)
    if not fits:
        raise ValueError(f"config.json: {name} must be a number or (height, width), got {show(value)}")
    return tuple(both)


def counts(hf: Mapping[str, Any], name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """One number per stage of a hierarchical model. Raises ValueError for anything else."""
    value = hf.get(name)
    value = default if value is None else value
    whole = isinstance(value, list | tuple) and all(type(n) is int and 0 < n < 1 << 20 for n in value)
    if not whole or not 0 < len(value) <= 64 or (name == "depths" and sum(value) > LIMITS["num_hidden_layers"]):
        raise ValueError(f"config.json: {name} must list one number of 1 or more per stage, got {show(value)}")
    return tuple(value)


def same_length(config: Any, *names: str) -> None:
    """Raise ValueError when the fields ``names`` do not all speak of the same number of stages."""
    lengths = {name: len(getattr(config, name)) for name in names}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {n}" for name, n in lengths.items())
        raise ValueError(f"config.json: there must be one number per stage in all of these lists, got {listed}")


def put_pairs(hf: dict[str, Any], config: Any, *names: str) -> dict[str, Any]:
    """``hf`` with the sizes ``names`` of ``config``, in the form in which they were read where they are the same."""
    for name in names:
        value = getattr(config, name)
        if name not in hf or pair(hf, name, 1) != value:
            hf[name] = value[0] if value[0] == value[1] else list(value)
    return hf


def section(hf: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of a part of a model; ``{}`` where ``config.json`` has none. Raises ValueError for no dict."""
    value = hf.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"config.json: {name} must hold the settings of a model, got {show(value)}")
    return dict(value or {})


def without_pooler(config: C, tensors: Iterable[str], name: str) -> C:
    """A part's ``config`` without the pooler that a checkpoint with ``tensors`` does not have under ``name``."""
    if getattr(config, "pooler", False) and not any(name in tensor for tensor in tensors):
        return dataclasses.replace(config, pooler=False)
    return config


def positions_of(config: Any) -> int | None:
    """How many tokens a model has positions for (RoBERTa's first serve padding); None: no limit."""
    return getattr(config, "max_length", getattr(config, "max_position_embeddings", None))


def depth(config: Any) -> int:
    """How many layers ``config`` asks for, those of its parts' configs included."""
    parts = [getattr(config, field.name) for field in dataclasses.fields(config)]
    own = getattr(config, "num_hidden_layers", 0) or 0
    return own + sum(depth(part) for part in parts if dataclasses.is_dataclass(part))


def kept(hf: Mapping[str, Any]) -> str:
    """A whole ``config.json`` dict as the field ``hf`` keeps it."""
    return json.dumps(dict(hf), sort_keys=True)


def _checked(key: str, field: dataclasses.Field, value: Any) -> Any:
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    if "int" in str(kind) and "tuple" not in str(kind):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < 0 or value > 2**40:
            raise ValueError(f"config.json: {key} must be a whole number of 0 or more, got {show(value)}")
    elif str(kind).startswith("float"):
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
            raise ValueError(f"config.json: {key} must be a number, got {show(value)}")
        is_rate = "dropout" in field.name or field.name.endswith("prob")
        if value < 0 or (is_rate and value > 1):
            raise ValueError(
                f"config.json: {key} must be a number {'from 0 to 1' if is_rate else 'of 0 or more'}, got {value}"
            )
        return float(value)
    elif str(kind).startswith("bool") and not isinstance(value, bool):
        raise ValueError(f"config.json: {key} must be true or false, got {show(value)}")
    elif str(kind).startswith("str") and not isinstance(value, str):
        raise ValueError(f"config.json: {key} must be text, got {show(value)}")
    return value


def to_hf(config: Any, names: Mapping[str, str], model_type: str, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """The ``config.json`` dict of ``config``: what was read, with the fields that have since changed."""
    hf = json.loads(config.hf)
    hf["model_type"] = model_type
    for field in dataclasses.fields(config):
        if field.name not in ("hf", "num_labels", *skip):
            key = names.get(field.name, field.name)
            value = getattr(config, field.name)
            if value is not None or key in hf:
                hf[key] = value
    labels = getattr(config, "num_labels", None)
    if labels is not None and len(hf.get("id2label") or {}) != labels and (labels != 2 or "id2label" in hf):
        hf["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        hf["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    return hf


def replace(config: C, overrides: Mapping[str, Any]) -> C:
    """``dataclasses.replace`` with a ValueError that lists the fields when one is unknown."""
    known = [f.name for f in dataclasses.fields(config) if f.name != "hf"]
    for name in overrides:
        if name not in known:
            raise ValueError(f"{name}: {type(config).__name__} has no such field; it has {', '.join(known)}")
    return dataclasses.replace(config, **overrides)
