"""Taking away for good what masks (:mod:`jaxformers.gates`) set to zero: a smaller dense model with equal outputs.

    small = compact(model, masks)            # narrower, shallower; jf.save, jf.load, jf.generate and scans as before

Masks may hold other numbers than 0 and 1 (the means of a variational bottleneck): they are multiplied into the weights
that read the unit, or for hidden units into those that write it. A result that Hugging Face's ``config.json`` can say
(equal widths in all layers, head sizes where the architecture has a key for them) gets such a config and loads there;
another one is recorded as surgery, which only ``jf.load`` rebuilds.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import gates, nn, surgery, units, weights
from jaxformers.compaction_config import as_config
from jaxformers.residual import at, ends_in_table

FUNCTION = "jaxformers.compaction:abstract_compact"


def compact(model: nnx.Module, masks: gates.Masks, *, uniform: bool = False) -> nnx.Module:
    """``model`` without what ``masks`` sets to zero; the outputs are those of :func:`jaxformers.gates.gated`.

    ``masks``: {kind: {path: array (units,)}} as :func:`jaxformers.gates.ones` makes them; kinds and units that they
    leave out are kept. A sub-layer goes when its own mask is 0, and when all its heads or units are gone (the bias of
    its last map stays then, where it has one). A pre-norm block goes when nothing of it is left. Outputs that run over
    hidden units (``last_hidden_state``, sentence embeddings) are those units that are kept. Where a head is tied to a
    table that takes up a hidden mask other than 0 and 1, its inverse goes into the last norm: logits are equal, and
    ``last_hidden_state`` is rescaled.

    ``uniform``: layers keep as many heads and feed-forward units as the one that keeps most, and sub-layers that are
    gone (but whole pre-norm blocks) stay with zero weights, so that Hugging Face's config can say the result.

    Raises ValueError for masks that do not fit, a residual stream without units, typed weights (merge a low-rank
    update, prune before packing), and with ``uniform`` where the architecture's config still cannot say it.
    """
    gates.check(units.units(model, tuple(masks) if masks else None), masks)
    for path, leaf in units.flat_state(model).items():
        if weights.is_typed(leaf):
            kind = type(leaf).__name__
            raise ValueError(f"model: {path} is a {kind}; compact plain weights (merge_lora, dequantize), pack later")
    masks = {
        kind: {name: np.asarray(mask, np.float64) for name, mask in mine.items()}
        if isinstance(mine, Mapping)
        else {"": np.asarray(mine, np.float64)}
        for kind, mine in masks.items()
    }
    for kind in ("hidden", "embeddings"):
        if kind in masks and not masks[kind][""].any():
            raise ValueError(f"masks[{kind!r}]: all units are masked; a model needs one at least")
    kept, cut = _plan(model, masks, uniform)
    if at(model, "contact_head") is not None and (cut.heads or any("attention" in path for path in cut.removed)):
        raise ValueError("masks: contact_head reads the maps of all heads; load the model with contact_head=False")
    small = _apply(_folded(surgery.copy(model), masks), kept, cut)
    config = as_config(small, cut.blocks)
    if config is not None:
        small.config = config
        return small
    if uniform:
        name = type(model).__name__
        raise ValueError(f"uniform: a config of {name} has no words for these widths; leave uniform out, or keep more")
    return surgery.record(small, FUNCTION, **dataclasses.asdict(cut))


def abstract_compact(
    model: nnx.Module,
    *,
    heads: dict[str, list[int]],
    ffn: dict[str, int],
    hidden: int | None,
    embeddings: int | None,
    removed: dict[str, bool],
    blocks: dict[str, list[int]],
) -> nnx.Module:
    """Rebuild the structure that :func:`compact` made; the checkpoint fills the values. Raises ValueError where the
    record asks for units that the model does not have."""
    cut = Cut(heads, ffn, hidden, embeddings, removed, blocks)
    _check_record(model, cut)  # before arrays of the sizes that a file asks for
    kept: Kept = {("heads", path): np.asarray(which, int) for path, which in heads.items()}
    kept |= {("ffn", path): np.arange(n) for path, n in ffn.items()}
    kept |= {(kind, ""): np.arange(n) for kind, n in (("hidden", hidden), ("embeddings", embeddings)) if n is not None}
    return surgery.record(_apply(surgery.copy(model), kept, cut), FUNCTION, **dataclasses.asdict(cut))


Kept = dict[tuple[str, str], np.ndarray]  # (kind, name) -> the units that stay, ascending


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is left, as the record says it: ``heads`` (which, of each attention that loses some), ``ffn`` (how many,
    likewise), ``hidden`` and ``embeddings`` (how many; None: all), ``blocks`` (which, of each stack that loses some).
    ``removed``: the sub-layers that go, and whether their bias stays."""

    heads: dict[str, list[int]]
    ffn: dict[str, int]
    hidden: int | None
    embeddings: int | None
    removed: dict[str, bool]
    blocks: dict[str, list[int]]


def _check_record(model: nnx.Module, cut: Cut) -> None:
    within = lambda n, low, have: type(n) is int and low <= n <= have
    asked = {kind: getattr(cut, kind) for kind in ("heads", "ffn", "hidden", "embeddings")}
    asked = {kind: mine for kind, mine in asked.items() if mine is not None and mine != {}}
    sizes = units.units(model, tuple(asked))
    for kind, mine in asked.items():
        for path, n in mine.items() if isinstance(mine, dict) else (("", mine),):
            have = sizes[kind].get(path, 0) if path else sizes[kind]
            numbers, most = (n, have - 1) if isinstance(n, list) else ([n], have)
            if not all(within(one, 0 if path else 1, most) for one in numbers):
                what = f"{kind} {path}".rstrip()
                raise ValueError(f"config.json: surgery keeps {what} {str(n)[:80]}, of {have}")
    last, stacks = units.last_maps(model), _stacks(model)
    for path in cut.removed:
        if path not in last:
            raise ValueError(f"config.json: surgery removes {str(path)[:80]}, which the model does not have")
    for path, which in cut.blocks.items():
        have = len(stacks.get(path, ()))
        if not all(within(i, 0, have - 1) for i in which):
            named = f"{str(which)[:80]} of {str(path)[:80]}"
            raise ValueError(f"config.json: surgery keeps blocks {named}, which has {have}")


# ---- which units stay ----------------------------------------------------------------------------------------------


def _plan(model: nnx.Module, masks: dict[str, dict[str, np.ndarray]], uniform: bool) -> tuple[Kept, Cut]:
    off = {path for path, mask in masks.get("sublayers", {}).items() if mask == 0}
    counted = [(kind, name, mask) for kind in masks if kind != "sublayers" for name, mask in masks[kind].items()]
    kept: Kept = {(kind, name): np.flatnonzero(mask) for kind, name, mask in counted if not mask.all()}
    biases = {path: getattr(last, "bias", None) is not None for path, last in units.last_maps(model).items()}
    removed = {path: False for path in off}
    for (kind, path), which in kept.items():
        if kind in ("heads", "ffn") and which.size == 0 and path not in off:
            removed[path] = biases[path]
    blocks, gone = {}, set()
    for stack, layers in _stacks(model).items():
        stay = [i for i, block in layers if not _vanishes(block, f"{stack}.{i}", removed)]
        if len(stay) < len(layers):
            blocks[stack] = stay
            gone |= {f"{stack}.{i}." for i, _ in layers if i not in stay}
    if uniform:
        removed = {path: bias for path, bias in removed.items() if path.startswith(tuple(gone))}
        for kind in ("heads", "ffn"):
            _level(model, kept, kind, masks, removed)
    size = lambda kind: kept[kind, ""].size if (kind, "") in kept else None
    return kept, Cut(
        {path: which.tolist() for (kind, path), which in kept.items() if kind == "heads" and path not in removed},
        {path: int(which.size) for (kind, path), which in kept.items() if kind == "ffn" and path not in removed},
        size("hidden"),
        size("embeddings"),
        removed,
        blocks,
    )


def _stacks(model: nnx.Module) -> dict[str, list[tuple[int, nn.Block]]]:
    found: dict[str, list[tuple[int, nn.Block]]] = {}
    for path, block in units.blocks(model):
        stack, _, i = path.rpartition(".")
        found.setdefault(stack, []).append((int(i), block))
    return found


def _vanishes(block: nn.Block, path: str, removed: Mapping[str, bool]) -> bool:
    """Is a pre-norm block without all its sub-layers, biases included?"""
    names = [name for name in units.LAST if getattr(block, name) is not None]
    emptied = lambda module: isinstance(module, nn.NoAttention | nn.NoMLP) and not nnx.state(module)
    return block.prenorm and all(
        emptied(getattr(block, name)) or removed.get(f"{path}.{name}", True) is False for name in names
    )


def _level(model: nnx.Module, kept: Kept, kind: str, masks: Mapping[str, Any], removed: Mapping[str, bool]) -> None:
    """Give each layer as many units as the one that keeps most; those that come back have zero weights."""
    if not any(k == kind for k, _ in kept):
        return
    sizes = {path: n for path, n in units.units(model, (kind,))[kind].items() if path not in removed}
    most = max((kept[kind, path].size if (kind, path) in kept else n for path, n in sizes.items()), default=0)
    for path in sizes:
        if (kind, path) in kept:
            which, spare = kept[kind, path], np.flatnonzero(masks[kind][path] == 0)
            kept[kind, path] = np.sort(np.concatenate([which, spare[: max(most, 1) - which.size]]))


# ---- values into weights -------------------------------------------------------------------------------------------


def _folded(model: nnx.Module, masks: Mapping[str, dict[str, np.ndarray]]) -> nnx.Module:
    """``model`` (changed in place) whose weights carry the masks' values, zeros included."""
    axes = units.axes(model)
    for path in units.last_maps(model):  # heads and units: into the rows of the map that reads them
        last = units.last_path(path)
        scale = float(masks.get("sublayers", {}).get(path, 1.0))
        for kind in ("heads", "ffn"):
            if path in masks.get(kind, {}):
                _times(model, f"{last}.kernel", -2, axes[f"{last}.kernel"][0], masks[kind][path])
        for leaf in ("kernel", "bias"):
            _times(model, f"{last}.{leaf}", -1, units.HIDDEN, np.full(1, scale))
            if "hidden" in masks:
                _times(model, f"{last}.{leaf}", -1, units.HIDDEN, masks["hidden"][""])
    if "embeddings" in masks:
        _times(model, f"{units.bridge(model)}.kernel", -2, units.COLUMN, masks["embeddings"][""])
    if "hidden" in masks:
        _into_embeddings(model, masks["hidden"][""], axes)
    return model


def _times(model: nnx.Module, path: str, axis: int, units_of: units.Axis, mask: np.ndarray) -> None:
    """Multiply the parameter at ``path``, where there is one, along ``axis``."""
    module, _, leaf = path.rpartition(".")
    variable = getattr(at(model, module), leaf, None)
    if not isinstance(variable, nnx.Variable) or (mask == 1).all():
        return
    value = np.asarray(variable.get_value())  # by NumPy: each of so many shapes would be compiled for
    factor = np.repeat(mask, units_of.block).reshape(-1, *(1,) * (-1 - axis)).astype(np.float32)
    variable.set_value(jnp.asarray((value.astype(np.float32) * factor).astype(value.dtype)))


def _into_embeddings(model: nnx.Module, mask: np.ndarray, axes: Mapping[str, units.Axes]) -> None:
    """Scale what leaves the embeddings: in the last map or norm of them, else in the tables themselves."""
    parts = [name for name in ("widen", "norm") if getattr(model.embeddings, name, None) is not None]
    last = f"embeddings.{parts[0]}" if parts else "embeddings"
    normed = getattr(model.embeddings, "patch_norm", None) is not None  # it undoes what comes before
    for path, own in axes.items():
        inside = path.startswith(f"{last}.") and not (normed and path.startswith("embeddings.patch."))
        if inside and own[-1] is not None and own[-1].kind == "hidden":
            _times(model, path, -1, units.HIDDEN, mask)
    tied = ends_in_table(at(model, "head"))
    if tied and last == "embeddings" and axes["embeddings.token.embedding"][-1].kind == "hidden":
        final = "decoder.final_norm" if at(model, "decoder") is not None else "final_norm"
        final = "head.norm" if isinstance(model.head, nn.MaskedLMHead) else final
        scalable = getattr(at(model, final), "scale", None) is not None
        if not scalable and not np.isin(mask, (0, 1)).all():
            raise ValueError(
                "masks['hidden']: values other than 0 and 1 cannot go into a table that the head is tied to, without a "
                "last norm to take them back; use 0 and 1"
            )
        for leaf in ("scale", "bias"):
            _times(model, f"{final}.{leaf}", -1, units.HIDDEN, 1.0 / np.where(mask == 0, 1.0, mask))


# ---- structure -----------------------------------------------------------------------------------------------------


def _apply(model: nnx.Module, kept: Kept, cut: Cut) -> nnx.Module:
    """``model`` (changed in place) with the units ``kept``, without what ``cut`` removes."""
    for path, own in units.axes(model).items():
        module, _, leaf = path.rpartition(".")
        variable = getattr(at(model, module), leaf)
        value = variable.get_value()
        for axis, what in enumerate(own):
            if what is not None and (what.kind, what.name) in kept:
                n = value.shape[axis] // (what.block * what.copies)
                which = kept[what.kind, what.name][:, None] * what.block + np.arange(what.block)
                which = (np.arange(what.copies)[:, None] * n * what.block + which.reshape(-1)).reshape(-1)
                abstract = isinstance(value, jax.core.Tracer)
                value = jnp.take(value, which, axis=axis) if abstract else np.take(np.asarray(value), which, axis=axis)
        variable.set_value(jnp.asarray(value))
    for path, attention in units.attentions(model):
        if ("heads", path) in kept:
            _fewer_heads(model, path, attention, kept["heads", path])
    for path, has_bias in cut.removed.items():
        _remove(model, path, has_bias)
    for stack, which in cut.blocks.items():
        parent, _, name = stack.rpartition(".")
        owner, layers = at(model, parent) if parent else model, at(model, stack)
        shallower = nn.Layers([layers[i] for i in which])
        shallower.remat = layers.remat
        setattr(owner, name, shallower)
    return surgery.named(model)


def _fewer_heads(model: nnx.Module, path: str, attention: Any, which: np.ndarray) -> None:
    query, shared = units.head_blocks(attention)
    group = query // attention.size
    stack = at(model, path.rpartition("layers.")[0].rstrip("."))
    shared_bias = any(getattr(stack, name, None) is not None for name in ("relative_bias", "relative"))
    if path.endswith(".attention") and shared_bias and isinstance(attention, nn.Attention):
        own = attention.bias_heads or tuple(range(attention.heads))
        attention.bias_heads = tuple(own[i * group + j] for i in which.tolist() for j in range(group))
    attention.heads = len(which) * group
    if hasattr(attention, "kv_heads") and shared:
        attention.kv_heads = len(which)


def _remove(model: nnx.Module, path: str, has_bias: bool) -> None:
    """Put nothing, or the bias alone, in the place of a sub-layer. A pre-norm block's norm goes with it."""
    where, _, name = path.rpartition(".")
    block = at(model, where)
    last = getattr(getattr(block, name), units.LAST[name])
    width = last.bias.get_value().shape[0] if has_bias else None
    empty = nn.NoMLP(width) if name == "mlp" else nn.NoAttention(width)
    if has_bias:
        getattr(empty, units.LAST[name]).bias.set_value(last.bias.get_value())
    setattr(block, name, empty)
    if not has_bias and f"{name}_scale" in vars(block):
        setattr(block, f"{name}_scale", None)
    shared = block.parallel and block.mlp_norm is None  # the MLP reads attention's norm
    if block.prenorm and getattr(block, f"{name}_norm") is not None and not shared:
        setattr(block, f"{name}_norm", nn.Identity())
