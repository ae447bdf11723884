"""How a parameter's path translates into the names of a Hugging Face checkpoint: data, one table per architecture.

A table maps module paths (``{}`` = layer number) to Hugging Face's module names. Leaf names follow from the leaf:
``kernel`` ↔ ``weight`` transposed (of a convolution: (…, in, out) ↔ (out, in, …)), ``scale`` and ``embedding`` ↔
``weight``, ``bias`` ↔ ``bias``, ``mean`` and ``var`` ↔ a batch norm's running ones. An entry may also name a single
parameter (``head.bias``). Two things need more than a name, see :class:`HF`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

LEAVES = {
    "kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias", "mean": "running_mean",
    "var": "running_var",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HF:
    """A module of the checkpoint. ``conv1d``: its weight is stored (in, out), as GPT-2's Conv1D does. ``part`` (i, n):
    our module is the i-th of n slices of its outputs (a fused query/key/value projection). The slices are equal and
    follow each other, unless ``rows`` says which of the ``total`` outputs belong to each: ``rows(config, total) -> n
    arrays of indices``.
    ``ones``: the tensor there has so many leading axes of length 1 (a class token, a position table).
    ``whole`` (name, i, n): our parameter stacks one module an expert, whose number stands for the ``{{}}`` in ``name``;
    some writers keep them all in one tensor ``whole[0]`` (experts, out, in) instead, as the i-th of n slices of out.
    ``top``: the tensor is at the top of a checkpoint whose body, under its prefix, may have one of the same name."""

    name: str
    conv1d: bool = False
    part: tuple[int, int] = (0, 1)
    rows: Callable[[Any, int], Sequence[np.ndarray]] | None = None
    ones: int = 0
    whole: tuple[str, int, int] | None = None
    top: bool = False

    def outputs(self, config: Any, total: int) -> np.ndarray:
        """Which of the ``total`` outputs of the fused layer are this part's."""
        if self.rows is not None:
            return self.rows(config, total)[self.part[0]]
        i, n = self.part
        return np.arange(i * (total // n), (i + 1) * (total // n))


Keys = Mapping[str, "str | HF"]


def lookup(keys: Keys, path: str) -> tuple[HF, str] | None:
    """``(module of the checkpoint, leaf name there)`` of the parameter at ``path``; None when the table lacks it."""
    numbers = [part for part in path.split(".") if part.isdigit()]
    general = ".".join("{}" if part.isdigit() else part for part in path.split("."))
    module, _, leaf = general.rpartition(".")
    if general in keys:
        entry = keys[general]
        entry = HF(entry) if isinstance(entry, str) else entry
        name, _, leaf_name = entry.name.rpartition(".")
        return dataclasses.replace(entry, name=name.format(*numbers)), leaf_name
    if module in keys and leaf in LEAVES:
        entry = keys[module]
        entry = HF(entry) if isinstance(entry, str) else entry
        whole = entry.whole and (entry.whole[0].format(*numbers), *entry.whole[1:])
        return dataclasses.replace(entry, name=entry.name.format(*numbers), whole=whole), LEAVES[leaf]
    return None


def nested(keys: Keys, own: str, theirs: str) -> dict[str, HF]:
    """The table ``keys`` of a model that is a part of another one: its submodule ``own``, whose config is the field of
    that name, and which the checkpoint keeps under ``theirs`` (empty: at the top)."""
    table = {}
    for path, entry in keys.items():
        entry = HF(entry) if isinstance(entry, str) else entry
        rows = None if entry.rows is None else _RowsOf(own, entry.rows)
        table[f"{own}.{path}"] = dataclasses.replace(entry, name=tensor_name(theirs, entry.name), rows=rows)
    return table


def nested_ignored(arch: Any, config: Any, theirs: str) -> tuple[str, ...]:
    """What a model that is a part of another one ignores, as patterns of the names under ``theirs``."""
    return tuple(f"{re.escape(theirs)}\\.(?:{pattern})" for pattern in ignored(arch, config))


def ignored(arch: Any, config: Any) -> tuple[str, ...]:
    """Patterns of the tensors that carry no weights of a model with ``config``."""
    return (*arch.IGNORED, *(arch.ignored(config) if hasattr(arch, "ignored") else ()))


@dataclasses.dataclass(frozen=True)  # equal tables compare equal
class _RowsOf:
    own: str
    rows: Callable[[Any, int], Sequence[np.ndarray]]

    def __call__(self, config: Any, total: int) -> Sequence[np.ndarray]:
        return self.rows(getattr(config, self.own), total)


def tensor_name(module: str, leaf: str) -> str:
    """``module.leaf``; a parameter of the model itself has no module before its name."""
    return f"{module}.{leaf}" if module else leaf


def own_name(path: str) -> tuple[HF, str]:
    """Where a parameter that surgery has added is kept: under its own path, out of Hugging Face's way."""
    module, _, leaf = path.rpartition(".")
    return HF(f"jaxformers.{module}"), LEAVES.get(leaf, leaf)


def expected(keys: Keys, names: Iterable[str]) -> set[str]:
    """Those of the checkpoint's tensor ``names`` that the table knows, whether or not this model uses them."""
    patterns = []
    for entry in keys.values():
        name = entry if isinstance(entry, str) else entry.name
        patterns.append(re.escape(name).replace(r"\{\}", r"\d+") + r"(\.weight|\.bias)?")
    regex = re.compile("|".join(patterns)) if patterns else None
    return {name for name in names if regex is not None and regex.fullmatch(name)}


def per_head(config: Any, total: int) -> list[np.ndarray]:
    """Query, key and value rows of a fused layer of ``total`` that holds them head by head: (heads, 3, size).

    Surgery may have removed heads; ``total`` that is no whole number of them gets the rows that the config asks for.
    """
    size = config.hidden_size // config.num_attention_heads
    total = 3 * config.hidden_size if total % (3 * size) else total
    return list(np.arange(total).reshape(-1, 3, size).swapaxes(0, 1).reshape(3, -1))


def turned(kernel: Any) -> Any:
    """A kernel (…, in, out) in torch's order (out, in, …); works on shapes too."""
    order = (*range(len(kernel)),) if isinstance(kernel, tuple) else (*range(kernel.ndim),)
    order = (*reversed(order[-2:]), *order[:-2])
    return tuple(kernel[i] for i in order) if isinstance(kernel, tuple) else kernel.transpose(order)


def turned_back(weight: Any) -> Any:
    """The inverse of :func:`turned`."""
    order = (*range(len(weight)),) if isinstance(weight, tuple) else (*range(weight.ndim),)
    order = (*order[2:], *reversed(order[:2]))
    return tuple(weight[i] for i in order) if isinstance(weight, tuple) else weight.transpose(order)


def prefix_of(arch: Any, head: str | None) -> str:
    """What stands before the names of the body's tensors in the checkpoint of a model with that head."""
    prefixed = head in arch.HEADS and head not in getattr(arch, "UNPREFIXED", ())
    return f"{arch.PREFIX}." if arch.PREFIX and prefixed else ""


def body_keys(arch: Any, config: Any) -> dict[str, "str | HF"]:
    """The table of an architecture's body, names without prefix; ``arch.keys(config)`` adds what a config decides."""
    return {**arch.KEYS, **(arch.keys(config) if hasattr(arch, "keys") else {})}


def all_keys(model: Any, arch: Any) -> dict[str, "str | HF"]:
    """The table of a model's body and of its head."""
    head = arch.HEADS[model.head_name][1] if model.head_name in arch.HEADS else {}
    return {**body_keys(arch, model.config), **head}
