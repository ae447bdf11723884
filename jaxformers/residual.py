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
from jaxformers.nn.norms import Recentre
from jaxformers.nn.removed import NoAttention, NoMLP
from jaxformers.nn.stages import Stages
from jaxformers.residual_ends import Exit, at, ends_in_table, exits, has, head_of, is_norm, join

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
    on their output axis. (Where surgery has removed what a branch computes there are no readers, and perhaps a bias
    that writes.) ``scale``: the parameter of LayerScale that multiplies what is written. ``after``: in post-norm
    blocks, the norm of the sum. ``parallel``: it reads the stream as the branch before it found it. ``rate``: dropout
    of what is written.
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
class Stream:
    """One residual stream.

    ``path``: the module that has the blocks in ``layers`` (empty: the model). ``entries``: the parameters, or modules
    with a kernel and bias, on whose last axis the stream's first vector stands; their sum (of tokens one of them) is
    that vector where ``linear``. ``entry_norm``: a norm behind them, whose output starts the stream (of Swin the norm
    of the patches alone, before positions are added). ``entry``: the module that gives the first vector. ``table``: the
    token table, where its rows enter the stream; ``table_again``: what reads it besides: "exit" (a tied output
    projection), "head" (the same behind a head's own layers) or None; ``head``: the path of the head that does.
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
    head: str = ""
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
    owners = [(path, owner) for path, owner in owners if any(hasattr(block, "attention") for block in owner.layers)]
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
        if getattr(at(model, branch.path), "kinds", ()) and _shares_keys(at(model, branch.path)):
            add(join(stream.path, "relative"), -1)  # DeBERTa's positions pass through the contents' projections
            norm(join(stream.path, "relative_norm"))
    for way in stream.exits:
        norm(way.norm)
        if way.by and not is_norm(at(model, way.by)):
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


def _stream(model: nnx.Module, path: str, owner: Any) -> Stream:
    blocks = [(join(path, f"layers.{i}"), block) for i, block in enumerate(owner.layers)]
    branches = tuple(branch for where, block in blocks for branch in _branches(where, block))
    writers = [writer for branch in branches for writer in branch.writers]
    if not writers:
        raise ValueError(f"model: no block of {path or type(model).__name__} has anything left that writes")
    first = at(model, writers[0])
    width = getattr(first, "kernel", first.bias).get_value().shape[-1]
    place, entries, linear, norm = _entries(model, path, owner, width)
    table = next((entry for entry in entries if entry.endswith("embeddings.token")), None)
    ends = exits(model, path, owner)
    again = "exit" if any(way.tied for way in ends) else None
    if any(reader.endswith("head.dense") and ends_in_table(at(model, reader.removesuffix(".dense")))
           for way in ends for reader in way.readers):  # fmt: skip
        again = "head"
    rate = getattr(at(model, place), "rate", 0.0)
    return Stream(
        path=path,
        width=width,
        prenorm=any(getattr(block, "prenorm", False) for _, block in blocks),
        branches=branches,
        entries=entries,
        linear=linear,
        entry=place,
        entry_norm=norm,
        exits=ends,
        table=table,
        table_again=None if table is None else again,
        head=head_of(model, path, owner)[0] if table is not None and again is not None else "",
        rate=rate,
    )


def _branches(where: str, block: Any) -> Iterator[Branch]:
    prenorm, parallel = getattr(block, "prenorm", False), getattr(block, "parallel", False)
    first = None
    for name in BRANCHES:
        part = getattr(block, name, None)
        if part is None:
            continue
        own = f"{where}.{name}_norm" if is_norm(getattr(block, f"{name}_norm", None)) else None
        path, norm = f"{where}.{name}", own if has(block, f"{name}_norm") else first
        first = first or norm
        if isinstance(part, NoAttention | NoMLP):  # what surgery has left may be a bias
            readers, writers = (), tuple(f"{path}.{part}" for part in _left(part))
            if not writers and own is None:
                continue
        else:
            readers, writers = _roles(path, part, cross=name == "cross_attention")
        scale = f"{where}.{name}_scale" if has(block, f"{name}_scale") else None
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


def _left(part: Any) -> list[str]:
    return [name for name in ("out", "down") if has(part, name)]


def _roles(path: str, part: Any, *, cross: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(readers, writers) of a branch. Raises ValueError for a module with a kernel that is neither, nor between."""
    if hasattr(part, "kernel"):  # a convolution from stream to stream
        return (path,), (path,)
    behind = ("key", "value") if cross or has(part, "reduce") else ()
    readers = tuple(f"{path}.{name}" for name in READERS if name not in behind and at(part, name) is not None)
    writers = tuple(f"{path}.{name}" for name in WRITERS if at(part, name) is not None)
    known = {*readers, *writers, *(f"{path}.{name}" for name in (*INNER, *behind))}
    for inner, module in nnx.iter_modules(part):
        name = f"{path}.{'.'.join(map(str, inner))}"
        if hasattr(module, "kernel") and name not in known and ".adapter." not in name:
            raise ValueError(f"model: {name} has weights, but its part in the residual stream is not known")
    if not readers or not writers:
        raise ValueError(f"model: {path} has no module that is known to read the residual stream, or to write to it")
    return readers, writers


def _shares_keys(attention: Any) -> bool:
    return not has(attention, "position_key") and not has(attention, "position_query")


def _entries(model: nnx.Module, path: str, owner: Any, width: int) -> tuple[str, tuple[str, ...], bool, str | None]:
    """(the module that starts the stream, what enters there, whether linearly, the norm behind)."""
    parent_path, _, name = path.rpartition(".")
    parent = at(model, parent_path)
    if isinstance(parent, Stages) and not has(owner, "embeddings"):  # a stage behind another
        if int(name):
            return f"{parent_path}.{int(name) - 1}", (f"{parent_path}.{int(name) - 1}.merge.reduction",), True, None
        place = join(parent_path.rpartition(".")[0], "embeddings")
    elif has(owner, "embed"):  # a decoder of what an encoder saw of an image
        return path, tuple(join(path, part) for part in ("embed", "mask_token", "position")), True, None
    elif has(owner, "embeddings"):
        place = join(path, "embeddings")
    else:  # encoder and decoder that share their embeddings
        return path, (join(parent_path, "embeddings.token"),), True, None
    module = at(model, place)
    if has(module, "widen"):
        found = ["widen"]
    else:
        tables = [part for part in TABLES if has(module, part)]
        found = [part for part in tables if part != "token"] if has(module, "project") else tables
    entries = [f"{place}.{part}" for part in found]
    if has(parent, "projector") and name == "text":  # images that stand where tokens stood
        entries.append(join(parent_path, "projector.down"))
    wave = hasattr(module, "features")
    names = ("out_norm",) if wave else ("norm", "patch_norm")
    norm = next((n for n in names if has(module, n) and _norm_width(getattr(module, n), width) == width), None)
    return place, tuple(entries), not wave and norm is None, f"{place}.{norm}" if norm else None


def _norm_width(norm: Any, default: int) -> int:
    scale = getattr(norm, "scale", None)
    return default if scale is None or isinstance(norm, Recentre) else scale.get_value().shape[-1]
