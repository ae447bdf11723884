"""The units of a transformer that can be taken away, and which axes of which parameters run over them.

Read off the modules, not listed by architecture: every :class:`jaxformers.nn.Block` has heads, feed-forward units and
sub-layers where its modules are of the usual kind; a residual stream (``hidden``) is known where every parameter along
it is. :mod:`jaxformers.gates` says what the kinds mean.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from flax import nnx

from jaxformers import nn, paths
from jaxformers import residual as residuals
from jaxformers.residual import at, ends_in_table

KINDS = ("heads", "ffn", "sublayers", "hidden", "embeddings")
PROJECTIONS = ("query", "key", "value", "out")
LAST = {"attention": "out", "cross_attention": "out", "mlp": "down"}  # the map that a sub-layer's output comes from


@dataclasses.dataclass(frozen=True)
class Axis:
    """The units that an axis of a parameter runs over: ``block`` entries each, all of it ``copies`` times in a row."""

    kind: str
    name: str = ""
    block: int = 1
    copies: int = 1


HIDDEN, COLUMN = Axis("hidden"), Axis("embeddings")
Axes = tuple[Axis | None, ...]


def units(model: nnx.Module, kinds: tuple[str, ...] | None = None) -> dict[str, Any]:
    """How many units there are: ``{"heads": {"layers.0.attention": 12}, …, "hidden": 768}``; a sub-layer has 1.

    ``kinds``: some of :data:`KINDS`; by default those that ``model`` has throughout. ``model`` may be abstract. Raises
    ValueError for an unknown kind, and for one that this architecture does not carry, saying why.
    """
    find = {"heads": _heads, "ffn": _ffn, "sublayers": _sublayers, "hidden": _hidden, "embeddings": _columns}
    for kind in kinds or ():
        if kind not in KINDS:
            raise ValueError(f"kinds: {kind!r} is unknown; there are {', '.join(KINDS)}")
    found = {}
    for kind in KINDS if kinds is None else kinds:
        answer = find[kind](model)
        if not isinstance(answer, str):
            found[kind] = answer
        elif kinds is not None:
            raise ValueError(f"{kind}: {answer}")
    return found


def axes(model: nnx.Module) -> dict[str, Axes]:
    """For each parameter that units touch what its axes run over: {path: one :class:`Axis` or None per axis}.

    Hidden units and embedding columns appear where :func:`units` has them.
    """
    flat = flat_state(model)
    found: dict[str, list[Axis | None]] = {}

    def say(path: str, axis: int, what: Axis | None) -> None:
        if path in flat and what is not None:
            rank = len(flat[path].shape)
            found.setdefault(path, [None] * rank)[axis % rank] = what

    for path, attention in attentions(model):
        query, shared = head_blocks(attention)
        for part in ("query", "key", "value", "position_query", "position_key"):
            block = query if "query" in part else shared
            for leaf, axis in (("kernel", 1), ("bias", 0)):
                say(f"{path}.{part}.{leaf}", axis, Axis("heads", path, block) if block else None)
        say(f"{path}.out.kernel", 0, Axis("heads", path, query))
        say(f"{path}.relative.table", 1, Axis("heads", path))
    for path, _ in mlps(model):
        for part in ("up", "gate"):
            say(f"{path}.{part}.kernel", 1, Axis("ffn", path))
            say(f"{path}.{part}.bias", 0, Axis("ffn", path))
        say(f"{path}.down.kernel", 0, Axis("ffn", path))
    stream = residual(model)
    for path, own in (stream if isinstance(stream, dict) else {}).items():
        for axis, what in enumerate(own):
            say(path, axis, what)
    return {path: tuple(own) for path, own in found.items()}


def blocks(model: nnx.Module) -> Iterator[tuple[str, nn.Block]]:
    """``(path, block)`` of every transformer block; an encoder's before those of the decoder that reads it."""
    found = [(".".join(map(str, path)), module) for path, module in nnx.iter_modules(model)]
    stacks = [(path, module) for path, module in found if isinstance(module, nn.Layers)]
    for path, layers in sorted(stacks, key=lambda item: (not item[0].startswith("encoder"), item[0])):
        yield from ((f"{path}.{i}", block) for i, block in enumerate(layers) if isinstance(block, nn.Block))


def sub_layers(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """``(path, module)`` of every attention, cross-attention and MLP, those left out that were removed."""
    for path, block in blocks(model):
        for name in LAST:
            module = getattr(block, name)
            if module is not None and not isinstance(module, nn.NoAttention | nn.NoMLP):
                yield f"{path}.{name}", module


def attentions(model: nnx.Module) -> list[tuple[str, Any]]:
    """Those whose heads stand one by one: linear maps to (heads, size) and back."""
    return [
        (path, module)
        for path, module in sub_layers(model)
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in PROJECTIONS)
    ]


def mlps(model: nnx.Module) -> list[tuple[str, nn.MLP]]:
    return [(path, module) for path, module in sub_layers(model) if isinstance(module, nn.MLP)]


def head_blocks(attention: Any) -> tuple[int, int]:
    """Entries of a query and of a key for each head gate of ``attention``; 0: all gates share the one key head."""
    kv_heads = getattr(attention, "kv_heads", attention.heads)
    if kv_heads == 1 and attention.heads > 1:
        return attention.size, 0
    return attention.heads // kv_heads * attention.size, attention.size


def last_maps(model: nnx.Module) -> dict[str, nn.Linear | nn.Bias]:
    """The map that each sub-layer's output comes from, by the sub-layer's path; of some only a bias is left."""
    found = {}
    for path, block in blocks(model):
        for name, last in LAST.items():
            linear = getattr(getattr(block, name), last, None)
            if isinstance(linear, nn.Linear | nn.Bias):
                found[f"{path}.{name}"] = linear
    return found


def last_path(sub_layer: str) -> str:
    """The path of that map."""
    return f"{sub_layer}.{LAST[sub_layer.rpartition('.')[2]]}"


def bridge(model: nnx.Module) -> str | None:
    """The path of the linear map from a table that is narrower than the model; None where there is none."""
    names = [name for name in ("project", "widen") if getattr(model.embeddings, name, None) is not None]
    return f"embeddings.{names[0]}" if names else None


def norms(model: nnx.Module, kind: str) -> list[str]:
    """The norms over hidden units, or over embedding columns."""
    stream = residual(model)
    found = [
        (".".join(map(str, path)), module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm)
    ]
    rule = lambda path: stream.get(f"{path}.scale") if isinstance(stream, dict) else None
    return [path for path, _ in found if (own := rule(path)) is not None and own[0] is not None and own[0].kind == kind]


def flat_state(model: nnx.Module) -> dict[str, Any]:
    return paths.flatten(nnx.to_pure_dict(nnx.state(model)))


# ---- kinds: the sizes, or why there are none -----------------------------------------------------------------------


def _heads(model: nnx.Module) -> dict[str, int] | str:
    found = dict(attentions(model))
    for path, module in sub_layers(model):
        if not path.endswith(".mlp") and path not in found:
            return f"{path} is a {type(module).__name__}, whose heads have no projections of their own"
    return {path: a.heads * a.size // head_blocks(a)[0] for path, a in found.items()} or _none(model)


def _ffn(model: nnx.Module) -> dict[str, int] | str:
    found = {path: module for path, module in sub_layers(model) if path.endswith(".mlp")}
    for path, module in found.items():
        if not isinstance(getattr(module, "up", None), nn.Linear) or not isinstance(module.down, nn.Linear):
            return f"{path} is a {type(module).__name__}, not one feed-forward network"
    return {path: module.down.kernel.get_value().shape[0] for path, module in found.items()} or _none(model)


def _sublayers(model: nnx.Module) -> dict[str, int] | str:
    found = last_maps(model)
    for path, module in sub_layers(model):
        if path not in found:
            return f"{path} is a {type(module).__name__} without one last linear map"
    return dict.fromkeys(found, 1) or _none(model)


def _none(model: nnx.Module) -> str:
    return f"{type(model).__name__} has no transformer block with any"


def _hidden(model: nnx.Module) -> int | str:
    stream = residual(model)
    return stream if isinstance(stream, str) else _widths(model).pop()


def _columns(model: nnx.Module) -> int | str:
    if isinstance(reason := _hidden(model), str):
        return reason
    if (path := bridge(model)) is None:
        return f"the table of {type(model).__name__} is as wide as the model: its columns are units of 'hidden'"
    return at(model, path).kernel.get_value().shape[0]


def _widths(model: nnx.Module) -> set[int]:
    found = set()
    for linear in last_maps(model).values():
        leaf = linear.kernel if isinstance(linear, nn.Linear) else linear.bias
        found.add(leaf.get_value().shape[-1])
    return found


# ---- the residual stream -------------------------------------------------------------------------------------------


def residual(model: nnx.Module) -> dict[str, Axes] | str:
    """The axes along the residual stream, by parameter; or why this model's stream is not one that can be narrowed.

    Encoder and decoder that share their embeddings share the stream's units.
    """
    if len(widths := _widths(model)) != 1:
        return f"{type(model).__name__} has {len(widths)} widths, {sorted(widths)}, no residual stream of one"
    for path, module in sub_layers(model):
        if not isinstance(module, nn.Attention | nn.MLP) or getattr(module, "reduce", None) is not None:
            return f"{path} is a {type(module).__name__}; how it reads the residual stream is not known here"
    if not isinstance(getattr(model, "embeddings", None), nnx.Module):
        return f"{type(model).__name__} has no embeddings of its own at the top"
    flat, found = flat_state(model), {}

    def say(path: str, axis: int, what: Axis) -> None:
        if path in flat:
            found.setdefault(path, [None] * len(flat[path].shape))[axis] = what

    try:
        for stream in residuals.streams(model):
            for axis in residuals.axes(model, stream):
                say(axis.path, axis.axis, dataclasses.replace(HIDDEN, copies=axis.copies))
            for norm in stream.norms:  # also those without parameters
                found.setdefault(f"{norm}.scale", [HIDDEN])
    except ValueError as error:
        return str(error)
    for path, axis in _columns_of(model):
        say(path, axis, COLUMN)
    return {path: tuple(own) for path, own in found.items()}


def _columns_of(model: nnx.Module) -> list[tuple[str, int]]:
    """The axes over the columns of a table that is narrower than the model."""
    if (narrow := bridge(model)) is None:
        return []
    inner = ["token"] if narrow.endswith("project") else ["token", "position", "token_type"]
    found = [(f"embeddings.{name}.embedding", -1) for name in inner] + [(f"{narrow}.kernel", -2)]
    found += [(f"embeddings.norm.{leaf}", -1) for leaf in ("scale", "bias") if narrow.endswith("widen")]
    if ends_in_table(at(model, "head")):  # what ends in the table ends in its columns
        behind = "project_out" if getattr(model, "project_out", None) is not None else "head.dense"
        found += [(f"{behind}.{leaf}", -1) for leaf in ("kernel", "bias")]
        found += [(f"head.norm.{leaf}", -1) for leaf in ("scale", "bias")]
    return found
