"""The residual stream: which weights write to it, which read it, which norms lie between, where it begins and ends.

The blocks of a transformer hand on one vector a token. Embeddings start it, the last map of every branch (attention's
``out``, an MLP's ``down``) adds to it, the first maps of every branch read it through a norm (pre-norm) or as it is
(post-norm, where the norm's output *is* the stream), and heads read it at the end. :func:`streams` finds these roles in
a model by the names that all architectures share, in models changed by surgery too; :func:`axes` lists every axis of
every parameter that has the stream's coordinates.

    for stream in residual.streams(model):                       # one of gpt2, two of t5 and clip, four of swin
        for branch in stream.branches:                           # in the order in which they run
            branch.readers, branch.writers                       # ("layers.0.mlp.up",), ("layers.0.mlp.down",)
        for axis in residual.axes(model, stream):                # to slice, rotate or prune the width itself
            axis.path, axis.axis, axis.copies                    # ("layers.0.mlp.up.kernel", -2, 1)

To prune what a branch computes inside (hidden units, heads) cut its readers along their outputs and its writers along
their inputs; of an MLP readers leave out the ``router`` of experts, and of attention ``key`` and ``value`` of what
shortens the sequence first (see :attr:`Branch.readers`). A graph network has no residual stream.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from flax import nnx

from jaxformers import paths, surgery
from jaxformers.nn.block import Layers
from jaxformers.nn.stages import Stages

BRANCHES = ("attention", "cross_attention", "mlp", "conv")
READERS = (
    "query", "query_down", "key", "value", "kv_down", "reduce.conv",
    "up", "gate", "router", "experts.up", "experts.gate", "shared.up", "shared.gate",
)  # fmt: skip
WRITERS = ("out", "down", "experts.down", "shared.down")
INNER = ("query_up", "kv_up", "conv", "position_key", "position_query")  # between the two, or beside the stream
TABLES = ("project", "token", "position", "token_type", "patch", "mask_token", "masked", "cls_token",
          "distillation_token", "register_tokens")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Branch:
    """A sub-layer: what it adds to the stream.

    ``path``: its module. ``norm``: what it reads the stream through, None in post-norm blocks. ``readers``: the modules
    whose kernel has the stream on its input axis; of a cross-attention the query alone (keys and values read a memory),
    and with a ``reduce`` its convolution instead of key and value. ``writers``: those whose kernel, and bias, have it
    on their output axis. ``scale``: the parameter of LayerScale that multiplies what is written. ``after``: in
    post-norm blocks, the norm of the sum. ``parallel``: it reads the stream as the branch before it found it.
    ``rate``: dropout of what is written.
    """

    path: str
    norm: str | None
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    scale: str | None = None
    after: str | None = None
    parallel: bool = False
    rate: float = 0.0


@dataclasses.dataclass(frozen=True)
class Exit:
    """What reads the stream behind its blocks.

    ``norm``: through which it is read; None: as it is. ``readers``: the linear maps (and convolutions) behind.
    ``tied``: the token table is one of them, transposed. ``by``: a module that reads it by other means. ``leaves``: it
    is what a caller gets, and no map of the model behind it.
    """

    norm: str | None
    readers: tuple[str, ...] = ()
    tied: bool = False
    by: str = ""
    leaves: bool = False


@dataclasses.dataclass(frozen=True)
class Stream:
    """One residual stream.

    ``path``: the module that has the blocks in ``layers`` (empty: the model). ``entries``: the parameters, or modules
    with a kernel and bias, on whose last axis the stream's first vector stands; their sum (of tokens one of them) is
    that vector where ``linear``. ``entry_norm``: a norm behind them, whose output starts the stream (of Swin the norm
    of the patches alone, before positions are added). ``entry``: the module that gives the first vector. ``table``: the
    token table, where its rows enter the stream; ``table_again``: what reads it besides: "exit" (a tied output
    projection), "head" (the same behind a head's own layers) or None.
    ``rate``: dropout behind the entry.
    """

    path: str
    width: int
    prenorm: bool
    branches: tuple[Branch, ...]
    entries: tuple[str, ...]
    linear: bool
    entry: str
    entry_norm: str | None
    exits: tuple[Exit, ...]
    table: str | None = None
    table_again: str | None = None
    rate: float = 0.0

    @property
    def norms(self) -> tuple[str, ...]:
        """Every norm on the stream, in order."""
        between = [norm for branch in self.branches for norm in (branch.norm, branch.after)]
        listed = (self.entry_norm, *between, *(way.norm for way in self.exits))
        return tuple(dict.fromkeys(norm for norm in listed if norm is not None))


@dataclasses.dataclass(frozen=True)
class Axis:
    """``axis`` (negative) of the parameter at ``path`` has the stream's coordinates, ``copies`` times in a row:
    DINOv2's classifier reads two states side by side, Swin's patch merging four."""

    path: str
    axis: int
    copies: int = 1


def streams(model: nnx.Module) -> tuple[Stream, ...]:
    """The residual streams of ``model``, in the model's order; none for a graph network.

    Raises ValueError naming a module with weights in a block whose role is not known.
    """
    owners = [
        (".".join(map(str, path)), module)
        for path, module in nnx.iter_modules(model)
        if isinstance(getattr(module, "layers", None), Layers)
    ]
    owners = [(path, owner) for path, owner in owners if len(owner.layers) and hasattr(owner.layers[0], "attention")]
    return tuple(_stream(model, path, owner) for path, owner in sorted(owners, key=lambda o: surgery.natural(o[0])))


def axes(model: nnx.Module, stream: Stream) -> tuple[Axis, ...]:
    """Every axis of a parameter of ``model`` that has the coordinates of ``stream``, each once.

    Not among them: the convolution over positions of wav2vec 2.0, whose groups cut the stream in pieces (then the
    stream's ``linear`` is False). Raises ValueError where a head reads the stream by other than linear maps.
    """
    flat = paths.flatten(nnx.to_pure_dict(nnx.state(model)))
    found: dict[tuple[str, int], Axis] = {}

    def add(path: str, axis: int) -> None:
        for leaf in (path, f"{path}.kernel", f"{path}.embedding"):
            if leaf in flat:
                copies, rest = divmod(flat[leaf].shape[axis], stream.width)
                if rest:
                    raise ValueError(f"model: {leaf} has no axis of the stream's width {stream.width}")
                found.setdefault((leaf, axis), Axis(leaf, axis, copies))

    def outputs(path: str) -> None:
        add(path, -1)
        add(f"{path}.bias", -1)

    def norm(path: str | None) -> None:
        for leaf in ("scale", "bias"):
            add(f"{path}.{leaf}", -1)

    for entry in stream.entries:
        outputs(entry)
    norm(stream.entry_norm)
    for branch in stream.branches:
        norm(branch.norm)
        for reader in branch.readers:
            add(reader, -2)
        for writer in branch.writers:
            outputs(writer)
        if branch.scale is not None:
            add(branch.scale, -1)
        norm(branch.after)
        if getattr(_at(model, branch.path), "kinds", ()) and _shares_keys(_at(model, branch.path)):
            add(_join(stream.path, "relative"), -1)  # DeBERTa's positions pass through the contents' projections
            norm(_join(stream.path, "relative_norm"))
    for way in stream.exits:
        norm(way.norm)
        if way.by and not is_norm(_at(model, way.by)):
            raise ValueError(f"model: {way.by} reads the residual stream of {stream.path or 'the model'} by more than "
                             "linear maps; its axes are not known")  # fmt: skip
        norm(way.by)
        for reader in way.readers:
            add(reader, -2)
            if stream.table_again == "head" and reader.endswith("head.dense"):  # a masked-LM head ends in the table
                outputs(reader)
                norm(f"{reader.removesuffix('dense')}norm")
    return tuple(found.values())


# ---- one stream ----------------------------------------------------------------------------------------------------


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _at(model: Any, path: str) -> Any:
    """The module at ``path``; None where there is none."""
    for name in path.split(".") if path else ():
        model = getattr(model, name, None)
    return model


def _has(module: Any, name: str) -> bool:
    return getattr(module, name, None) is not None


def is_norm(module: Any) -> bool:
    """Is it one of the library's norms?"""
    return hasattr(module, "eps") and not hasattr(module, "kernel")


def _stream(model: nnx.Module, path: str, owner: Any) -> Stream:
    blocks = [(_join(path, f"layers.{i}"), block) for i, block in enumerate(owner.layers)]
    branches = tuple(branch for where, block in blocks for branch in _branches(where, block))
    width = _at(model, branches[0].writers[0]).kernel.get_value().shape[-1]
    place, entries, linear, norm = _entries(model, path, owner, width)
    table = next((entry for entry in entries if entry.endswith("embeddings.token")), None)
    exits = tuple(_exits(model, path, owner))
    again = "exit" if any(way.tied for way in exits) else None
    if any(reader.endswith("head.dense") and _ends_in_table(_at(model, reader.removesuffix(".dense")))
           for way in exits for reader in way.readers):  # fmt: skip
        again = "head"
    rate = getattr(_at(model, place), "rate", 0.0)
    return Stream(
        path=path,
        width=width,
        prenorm=branches[0].norm is not None,
        branches=branches,
        entries=entries,
        linear=linear,
        entry=place,
        entry_norm=norm,
        exits=exits,
        table=table,
        table_again=None if table is None else again,
        rate=rate,
    )


def _branches(where: str, block: Any) -> Iterator[Branch]:
    prenorm, parallel = getattr(block, "prenorm", False), getattr(block, "parallel", False)
    first = None
    for name in BRANCHES:
        part = getattr(block, name, None)
        if part is None:
            continue
        path, norm = f"{where}.{name}", f"{where}.{name}_norm" if _has(block, f"{name}_norm") else first
        first = first or norm
        readers, writers = _roles(path, part, cross=name == "cross_attention")
        scale = f"{where}.{name}_scale" if _has(block, f"{name}_scale") else None
        yield Branch(
            path=path,
            norm=norm if prenorm else None,
            readers=readers,
            writers=writers,
            scale=scale,
            after=None if prenorm else norm,
            parallel=parallel and name == "mlp",
            rate=getattr(block, "rate", 0.0),
        )


def _roles(path: str, part: Any, *, cross: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(readers, writers) of a branch. Raises ValueError for a module with a kernel that is neither, nor between."""
    if hasattr(part, "kernel"):  # a convolution from stream to stream
        return (path,), (path,)
    behind = ("key", "value") if cross or _has(part, "reduce") else ()
    readers = tuple(f"{path}.{name}" for name in READERS if name not in behind and _at(part, name) is not None)
    writers = tuple(f"{path}.{name}" for name in WRITERS if _at(part, name) is not None)
    known = {*readers, *writers, *(f"{path}.{name}" for name in (*INNER, *behind))}
    for inner, module in nnx.iter_modules(part):
        name = f"{path}.{'.'.join(map(str, inner))}"
        if hasattr(module, "kernel") and name not in known and ".adapter." not in name:
            raise ValueError(f"model: {name} has weights, but its part in the residual stream is not known")
    if not readers or not writers:
        raise ValueError(f"model: {path} has no module that is known to read the residual stream, or to write to it")
    return readers, writers


def _shares_keys(attention: Any) -> bool:
    return not _has(attention, "position_key") and not _has(attention, "position_query")


def _entries(model: nnx.Module, path: str, owner: Any, width: int) -> tuple[str, tuple[str, ...], bool, str | None]:
    """(the module that starts the stream, what enters there, whether linearly, the norm behind)."""
    parent_path, _, name = path.rpartition(".")
    parent = _at(model, parent_path)
    if isinstance(parent, Stages) and not _has(owner, "embeddings"):  # a stage behind another
        if int(name):
            return f"{parent_path}.{int(name) - 1}", (f"{parent_path}.{int(name) - 1}.merge.reduction",), True, None
        place = _join(parent_path.rpartition(".")[0], "embeddings")
    elif _has(owner, "embed"):  # a decoder of what an encoder saw of an image
        return path, tuple(_join(path, part) for part in ("embed", "mask_token", "position")), True, None
    elif _has(owner, "embeddings"):
        place = _join(path, "embeddings")
    else:  # encoder and decoder that share their embeddings
        return path, (_join(parent_path, "embeddings.token"),), True, None
    module = _at(model, place)
    if _has(module, "widen"):
        found = ["widen"]
    else:
        tables = [part for part in TABLES if _has(module, part)]
        found = [part for part in tables if part != "token"] if _has(module, "project") else tables
    entries = [f"{place}.{part}" for part in found]
    if _has(parent, "projector") and name == "text":  # images that stand where tokens stood
        entries.append(_join(parent_path, "projector.down"))
    wave = hasattr(module, "features")
    names = ("out_norm",) if wave else ("norm", "patch_norm")
    norm = next((n for n in names if _has(module, n) and _norm_width(getattr(module, n), width) == width), None)
    return place, tuple(entries), not wave and norm is None, f"{place}.{norm}" if norm else None


def _norm_width(norm: Any, default: int) -> int:
    scale = getattr(norm, "scale", None)
    return default if scale is None else scale.get_value().shape[-1]


# ---- where it ends -------------------------------------------------------------------------------------------------


def _ends_in_table(head: Any) -> bool:
    return hasattr(head, "decoder") and head.decoder is None


def _of_head(path: str, head: Any) -> Exit:
    """What a head reads of the states that it is given; the norm is left open."""
    if head is None:
        return Exit(None, leaves=True)
    if hasattr(head, "kernel"):
        return Exit(None, (path,))
    for name in ("embed", "project", "dense"):
        if _has(head, name):
            return Exit(None, (f"{path}.{name}",))
    if hasattr(head, "pooling"):  # a sentence's vector, without a map
        return Exit(None, leaves=True)
    if hasattr(head, "pyramid"):
        return Exit(None, by=path)
    found = tuple(f"{path}.{n}" for n in ("decoder", "classifier", "distillation_classifier") if _has(head, n))
    if is_norm(getattr(head, "norm", None)):  # a second norm in a row
        return Exit(None, found, by=f"{path}.norm")
    return Exit(None, found, tied=_ends_in_table(head))


def _exits(model: nnx.Module, path: str, owner: Any) -> tuple[Exit, ...]:
    parent_path, _, name = path.rpartition(".")
    if path and isinstance(_at(model, parent_path), Stages):
        return (_stage_exit(model, path, owner),)
    norm = next((_join(path, n) for n in ("final_norm", "norm", "pool_norm") if is_norm(getattr(owner, n, None))), None)
    if _has(owner, "embed"):  # a head with blocks of its own
        return (Exit(norm, (_join(path, "decoder"),)),)
    own, pooler = _of_head(*_head(model, path, owner)), getattr(owner, "pooler", None)
    states, layers, pooled = _around(model, path)
    raw = [Exit(None, layers)] if layers else []
    if is_norm(pooler):  # BEiT's, of the mean over patches: the states themselves are an output
        return (*raw, Exit(norm, states, leaves=not states), dataclasses.replace(own, norm=_join(path, "pooler")))
    if own.by.endswith(".norm") and norm is None:  # the head has the only norm
        return (*raw, Exit(None, states, leaves=not states), Exit(own.by, own.readers))
    if norm is not None and norm.endswith("pool_norm"):  # of the class token; the states are an output as they are
        readers = (*own.readers, *pooled)
        return (*raw, Exit(None, states, leaves=not states), Exit(norm, readers, leaves=not readers))
    if own.by and not own.by.endswith(".norm"):
        return (*raw, own, Exit(norm, states, leaves=not states))
    if _has(getattr(owner, "head", None), "layer_weights"):  # a sum over the states of all layers
        return (*raw, own, Exit(norm, states, leaves=not states))
    if _has(owner, "project_out"):  # what head and callers get is behind it
        return (*raw, Exit(norm, (_join(path, "project_out"),)))
    if pooler is not None:  # a classifier of sequences reads what the pooler gives
        more = own if own.leaves or hasattr(owner.head, "pooling") else Exit(None)
        own = dataclasses.replace(more, readers=(*more.readers, _join(path, "pooler")))
    readers = (*own.readers, *states, *pooled)
    return (*raw, dataclasses.replace(own, norm=norm, readers=readers, leaves=own.leaves and not (states or pooled)))


def _stage_exit(model: nnx.Module, path: str, owner: Any) -> Exit:
    """Where a stage of a hierarchical model ends: in the next one, or in the model's head."""
    if _has(owner, "merge"):
        return Exit(f"{path}.merge.norm", (f"{path}.merge.reduction",))
    stages_path, _, number = path.rpartition(".")
    top_path = stages_path.rpartition(".")[0]
    top, stages, i = _at(model, top_path), _at(model, stages_path), int(number)
    norm = f"{path}.norm" if _has(owner, "norm") else _join(top_path, "final_norm")
    following = (f"{stages_path}.{i + 1}.embeddings.patch",) if i + 1 < len(stages) else ()
    head, head_path = getattr(top, "head", None), _join(top_path, "head")
    if isinstance(getattr(head, "project", None), Stages):  # a head that reads the states of all stages
        return Exit(norm, (*following, f"{head_path}.project.{i}"))
    return Exit(norm, following) if following else dataclasses.replace(_of_head(head_path, head), norm=norm)


def _head(model: nnx.Module, path: str, owner: Any) -> tuple[str, Any]:
    """(path, module) of the head that reads the stream: its owner's, or that of the model around it."""
    parent_path, _, name = path.rpartition(".")
    parent = _at(model, parent_path)
    beside = name in ("text", "decoder") or (name == "encoder" and not _has(parent, "decoder"))
    if path and beside and not _has(owner, "head") and _has(parent, "head"):
        return _join(parent_path, "head"), parent.head
    return _join(path, "head"), getattr(owner, "head", None)


def _around(model: nnx.Module, path: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Maps in the model around that read (the states, the outputs of layers, the pooled state)."""
    parent_path, _, name = path.rpartition(".")
    parent = _at(model, parent_path)
    if not path:
        return (), (), ()
    if name == "vision" and _has(parent, "projector"):
        return (), (_join(parent_path, "projector.up"),), ()
    if name == "vision" and _has(parent, "head"):
        return (_join(parent_path, "head.classifier"),), (), ()
    if _has(parent, f"{name}_projection"):
        return (), (), (_join(parent_path, f"{name}_projection"),)
    if name == "encoder" and _has(parent, "decoder"):
        if _has(parent, "memory_projection"):
            return (_join(parent_path, "memory_projection"),), (), ()
        blocks = [_join(parent_path, f"decoder.layers.{i}.cross_attention") for i in range(len(parent.decoder.layers))]
        return tuple(f"{block}.{part}" for block in blocks for part in ("key", "value")), (), ()
    return (), (), ()
