"""The structures that AxFormer finds, as data: what is removed and hardened in which layer, to save and to apply.

`axformer.py` searches them. As masks (:func:`masks_of`) they speak the language of :mod:`jaxformers.gates`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jaxformers import gates
from jaxformers.atomic import write_json_atomic

Layers = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Structure:
    """What is changed in a model whose layer l has ``heads[l]`` heads and ``widths[l]`` FFN units.

    ``hard_attn``: layers whose queries keep their ``k`` largest probabilities. ``attn_prune`` and ``ffn_prune``: layers
    without attention or FFN. ``attn_heads[l]`` and ``ffn_groups[l]``: heads, and groups of ``group_size`` consecutive
    units, that are removed. The names are those of the official code.
    """

    k: int
    group_size: int
    heads: Layers
    widths: Layers
    hard_attn: Layers
    attn_prune: Layers
    ffn_prune: Layers
    attn_heads: tuple[Layers, ...]
    ffn_groups: tuple[Layers, ...]

    @classmethod
    def whole(cls, model: nnx.Module, k: int = 30, group_size: int = 256) -> "Structure":
        """Nothing changed yet. Raises ValueError for a model without a stack of attention and FFN blocks."""
        heads, widths = shape_of(model)
        none = ((),) * len(heads)
        if group_size < 1:
            raise ValueError(f"group_size: expected at least one unit, got {group_size}")
        return cls(k, group_size, heads, widths, (), (), (), none, none)

    def without(self, kind: str, layer: int, index: int = -1) -> "Structure":
        """This structure and one more element: "hard", "attn" or "ffn" of a layer, or "head" or "ffn_group" ``index``
        of it."""
        whole = {"hard": "hard_attn", "attn": "attn_prune", "ffn": "ffn_prune"}
        if kind in whole:
            name = whole[kind]
            return dataclasses.replace(self, **{name: _with(getattr(self, name), layer)})
        name = {"head": "attn_heads", "ffn_group": "ffn_groups"}[kind]
        parts = list(getattr(self, name))
        parts[layer] = _with(parts[layer], index)
        return dataclasses.replace(self, **{name: tuple(parts)})

    def check(self, model: nnx.Module) -> None:
        """Raise ValueError when this is no structure of ``model``."""
        heads, widths = shape_of(model)
        if (heads, widths) != (self.heads, self.widths):
            raise ValueError(
                f"structure: it is for {len(self.heads)} layers of {self.heads} heads and {self.widths} FFN units; the "
                f"model has {len(heads)} of {heads} and {widths}"
            )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Structure":
        """The inverse of :meth:`to_json`. Raises ValueError for what is no structure."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(value, Mapping) or set(value) != set(names):
            raise ValueError(f"structure: expected an object with {', '.join(names)}")
        try:
            numbers = {name: _numbers(value[name]) for name in names}
            structure = cls(**numbers)
            _check_ranges(structure)
        except (TypeError, IndexError) as error:
            raise ValueError(f"structure: {error}") from None
        return structure

    def save(self, file: str | Path) -> None:
        write_json_atomic(file, self.to_json())

    @classmethod
    def load(cls, file: str | Path) -> "Structure":
        """Read what :meth:`save` wrote. Raises ValueError for a file that holds none."""
        try:
            value = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"structure: {file} cannot be read: {error}") from None
        return cls.from_json(value)


def shape_of(model: nnx.Module) -> tuple[Layers, Layers]:
    """(heads, FFN units) of each of ``model``'s layers. Raises ValueError where a layer lacks either."""
    sizes = gates.units(model, ("heads", "ffn"))
    depth = len(model.layers) if hasattr(model, "layers") else 0
    paths = [(f"layers.{i}.attention", f"layers.{i}.mlp") for i in range(depth)]
    if not depth or any(a not in sizes["heads"] or m not in sizes["ffn"] for a, m in paths):
        raise ValueError(f"model: {type(model).__name__} has no single stack of layers with attention and FFN each")
    return tuple(sizes["heads"][a] for a, _ in paths), tuple(sizes["ffn"][m] for _, m in paths)


def masks_of(structure: Structure) -> dict[str, dict[str, np.ndarray]]:
    """The structure's removals as masks for :func:`jaxformers.gates.gated` and :func:`jaxformers.compact`."""
    heads, ffn, sublayers = {}, {}, {}
    for layer, (n, width) in enumerate(zip(structure.heads, structure.widths, strict=True)):
        attention, mlp = f"layers.{layer}.attention", f"layers.{layer}.mlp"
        heads[attention], ffn[mlp] = np.ones(n, np.float32), np.ones(width, np.float32)
        heads[attention][list(structure.attn_heads[layer])] = 0
        for group in structure.ffn_groups[layer]:
            ffn[mlp][group * structure.group_size : (group + 1) * structure.group_size] = 0
        sublayers[attention] = np.float32(layer not in structure.attn_prune)
        sublayers[mlp] = np.float32(layer not in structure.ffn_prune)
    return {"heads": heads, "ffn": ffn, "sublayers": sublayers}


def hard_layers(structure: Structure) -> Layers:
    """The layers with hard attention, those without any attention left out."""
    whole = {i for i, gone in enumerate(structure.attn_heads) if len(gone) == structure.heads[i]}
    return tuple(i for i in structure.hard_attn if i not in structure.attn_prune and i not in whole)


def _with(numbers: Layers, one: int) -> Layers:
    return tuple(sorted({*numbers, one}))


def _numbers(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_numbers(v) for v in value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected integers and lists of them, got {value!r}")
    return value


def _check_ranges(structure: Structure) -> None:
    depth = len(structure.heads)
    if not depth == len(structure.widths) == len(structure.attn_heads) == len(structure.ffn_groups):
        raise TypeError("heads, widths, attn_heads and ffn_groups must have one entry a layer")
    if structure.k < 1 or structure.group_size < 1:
        raise TypeError(f"k and group_size must be 1 or more, got {structure.k} and {structure.group_size}")
    within = [(name, getattr(structure, name), depth) for name in ("hard_attn", "attn_prune", "ffn_prune")]
    within += [(f"attn_heads[{i}]", structure.attn_heads[i], structure.heads[i]) for i in range(depth)]
    groups = [width // structure.group_size for width in structure.widths]
    within += [(f"ffn_groups[{i}]", structure.ffn_groups[i], groups[i]) for i in range(depth)]
    for name, numbers, count in within:
        if not all(0 <= i < count for i in numbers):
            raise TypeError(f"{name} must hold numbers from 0 to {count - 1}, got {numbers}")
