"""The arithmetic of Pre-RMSNorm and Pre-CRMSNorm on one residual stream: fold, recentre, compress, and back.

Kernels are W (…, in, out), d the width of the stream, and everything that writes to the stream has it on its last axis:

    layer scale λ:   W ← W diag(λ), b ← λ ⊙ b, λ ← 1
    affine γ, β:     W ← diag(γ) W, b ← b + β W,  γ ← 1, β ← 0        (of the linear maps behind a norm)
    recentre:        W ← W − mean over outputs, b ← b − mean(b), each row of a table likewise
    compress:        producers lose their last output; consumers W ← W[:d−1] − W[d−1]

Values are computed in float64 on the host, one array at a time, and rounded to the dtype that they had. :func:`apply`
also runs on an abstract model, to rebuild the structure that a checkpoint is to fill.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import nn, residual, weights
from jaxformers.residual import Exit, Stream, at

TARGETS = ("zero-mean-ln", "rms", "crms")


@dataclasses.dataclass(frozen=True)
class Form:
    """What a stream was turned into. ``affine``, ``scaled``: whether its norms had γ and β, and its branches λ."""

    target: str
    fold: bool
    pad: bool = False
    on_the_fly: bool = False
    affine: bool = True
    scaled: bool = False

    def __post_init__(self):
        if self.target not in TARGETS:
            raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {self.target!r}")
        if self.pad and self.target != "crms":
            raise ValueError("pad: only crms drops a coordinate that padding could keep")
        if self.target == "crms" and not self.fold:
            raise ValueError("fold_affine: crms has no place for γ and β between the blocks; they must be folded")
        if self.on_the_fly and (self.target != "rms" or self.fold):
            raise ValueError("on_the_fly: the form for training is rms, with γ and β where they are")


def stream_at(model: nnx.Module, path: str) -> Stream:
    """The stream ``path`` of ``model``. Raises ValueError when there is none."""
    for stream in residual.streams(model):
        if stream.path == path:
            return stream
    raise ValueError(f"streams: the model has no residual stream {path!r}")


def original(model: nnx.Module, stream: Stream, form: Form) -> Form:
    """``form`` with what must be known to go back."""
    norms = [at(model, branch.norm) for branch in stream.branches if branch.norm is not None]
    scaled = any(branch.scale is not None for branch in stream.branches)
    return dataclasses.replace(form, affine=all(norm.scale is not None for norm in norms), scaled=scaled)


def entry_hook(model: nnx.Module, stream: Stream) -> str | None:
    """Where a norm at the start of the stream stands or might stand."""
    if stream.entry_norm is not None:
        return stream.entry_norm
    module = at(model, stream.entry)
    name = "out_norm" if hasattr(module, "out_norm") else "norm"
    is_embeddings = stream.entry.rpartition(".")[2] == "embeddings"
    return f"{stream.entry}.{name}" if is_embeddings and hasattr(module, name) else None


def all_linear(model: nnx.Module, stream: Stream) -> bool:
    """Is everything that starts the stream the output of a linear map?"""
    return all(isinstance(at(model, entry), nn.Linear | nn.CenteredLinear) for entry in stream.entries)


# ---- arithmetic ----------------------------------------------------------------------------------------------------


def exactly(fn: Callable[..., Any], *arrays: Any) -> Any:
    """``fn`` of the arrays in float64, rounded to the first one's dtype; of abstract ones just what its shape is."""
    first = arrays[0]
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return fn(*arrays).astype(first.dtype)
    value = fn(*(np.asarray(array, np.float64) for array in arrays)).astype(first.dtype)
    if isinstance(first, np.ndarray):  # a view of a file: the result stays on the host
        return value
    return jax.device_put(value, first.sharding) if value.shape == first.shape else jnp.asarray(value)


def _change(variable: nnx.Variable, fn: Callable[..., Any], *others: Any) -> None:
    """``variable`` becomes ``fn`` of itself. What a quantised checkpoint puts in an abstract model's places is packed
    already, and has the shape that it is to have."""
    if not weights.is_typed(variable.get_value()):
        variable.set_value(exactly(fn, variable.get_value(), *others))


def _replace(model: nnx.Module, path: str, module: Any) -> None:
    parent, _, name = path.rpartition(".")
    setattr(at(model, parent), name, nnx.data(module))


def _variables(model: nnx.Module, path: str) -> list[nnx.Variable]:
    """The parameters at ``path`` on whose last axis the stream is."""
    found = at(model, path)
    if isinstance(found, nnx.Variable):
        return [found]
    leaves = (getattr(found, name, None) for name in ("kernel", "embedding", "bias"))
    return [leaf for leaf in leaves if leaf is not None]


def _producers(model: nnx.Module, stream: Stream) -> list[nnx.Variable]:
    """Everything that is added up to the stream; what stands before a norm at its start is not."""
    entries = stream.entries if stream.linear else ()
    writers = (writer for branch in stream.branches for writer in branch.writers)
    return [leaf for path in (*entries, *writers) for leaf in _variables(model, path)]


def _between(stream: Stream) -> dict[str, list[str]]:
    """{norm: readers behind it} of the branches, whose norms GPT-J's share."""
    found: dict[str, list[str]] = {}
    for branch in (b for b in stream.branches if b.norm is not None):
        found.setdefault(branch.norm, []).extend(branch.readers)
    return found


def _foldable(model: nnx.Module, stream: Stream, way: Exit) -> bool:
    """Is everything behind this exit a linear map that may take up γ and β?"""
    maps = [at(model, reader) for reader in way.readers]
    whole = all(module.kernel.get_value().shape[-2] == stream.width for module in maps)
    padded = any(any(getattr(module, "padding", ())) for module in maps)  # zeros that β does not reach
    return way.norm is not None and bool(maps) and not way.leaves and not way.by and whole and not padded


def folded_norms(model: nnx.Module, stream: Stream) -> dict[str, list[str]]:
    """{norm: readers} of all norms that are folded."""
    ends = {way.norm: list(way.readers) for way in stream.exits if _foldable(model, stream, way)}
    return _between(stream) | ends


# ---- there ---------------------------------------------------------------------------------------------------------


def apply(model: nnx.Module, path: str, form: Form) -> None:
    """Give the stream ``path`` of ``model``, a Pre-LN one that rmsnorm_checks.py lets pass, ``form``; in place."""
    stream = stream_at(model, path)
    if form.on_the_fly:
        _for_training(model, stream)
        return
    if stream.table_again is not None:
        _untie(model, stream)
        stream = stream_at(model, path)
    _fold_scales(model, stream, remove=form.target != "zero-mean-ln")
    folded = folded_norms(model, stream) if form.fold else {}
    for norm, readers in folded.items():
        _fold_affine(model, norm, readers)
    for leaf in _producers(model, stream):
        _change(leaf, lambda a: a - a.mean(-1, keepdims=True))
    if form.target == "crms":
        _compress(model, stream, folded, form.pad)
    if form.target != "zero-mean-ln":
        _new_norms(model, stream, form, folded)


def _untie(model: nnx.Module, stream: Stream) -> None:
    """The output projection keeps the table as it is; the table's rows, which start the stream, are recentred."""
    head, table = at(model, stream.head), at(model, stream.table).embedding.get_value()
    kernel = table.T if isinstance(table, jax.core.Tracer | np.ndarray) else jnp.array(table.T)
    bias = getattr(head, "bias", None)
    head.decoder = nnx.data(_linear(kernel, None if bias is None else bias.get_value()))
    if bias is not None:
        head.bias = None
    for _, module in nnx.iter_modules(model):
        if dataclasses.is_dataclass(getattr(module, "config", None)):
            module.config = _untied(module.config)


def _untied(config: Any) -> Any:
    changed = {f.name: _untied(part) for f in dataclasses.fields(config)
               if dataclasses.is_dataclass(part := getattr(config, f.name)) and hasattr(part, "from_hf")}  # fmt: skip
    if getattr(config, "tie_word_embeddings", False):
        changed["tie_word_embeddings"] = False
    return dataclasses.replace(config, **changed)


def _linear(kernel: Any, bias: Any) -> nn.Linear:
    linear = nnx.eval_shape(lambda: nn.Linear(*kernel.shape, bias=bias is not None, rngs=nn.Keys(0)))
    linear.kernel.set_value(kernel)
    if bias is not None:
        linear.bias.set_value(bias)
    return linear


def _fold_scales(model: nnx.Module, stream: Stream, *, remove: bool) -> None:
    for branch in (b for b in stream.branches if b.scale is not None):
        factor = at(model, branch.scale)
        for leaf in (leaf for writer in branch.writers for leaf in _variables(model, writer)):
            _change(leaf, lambda a, f: a * f, factor.get_value())
        if remove:
            block, _, name = branch.scale.rpartition(".")
            setattr(at(model, block), name, None)
        else:
            _change(factor, lambda f: f * 0 + 1)


def _fold_affine(model: nnx.Module, path: str, readers: list[str]) -> None:
    norm = at(model, path)
    if norm.scale is None:
        return
    scale, shift = norm.scale.get_value(), norm.bias.get_value()
    for reader in readers:
        module = at(model, reader)
        kernel = module.kernel.get_value()
        if weights.is_typed(kernel):  # abstract, see _change
            moved = jnp.zeros(kernel.shape[-1], kernel.dtype)
        else:
            moved = exactly(lambda w, b: (w * b[:, None]).sum(axis=tuple(range(w.ndim - 1))), kernel, shift)
        if module.bias is None:
            module.bias = nnx.data(nnx.Param(moved))
        else:
            _change(module.bias, lambda b, m: b + m, moved)
        _change(module.kernel, lambda w, g: w * g[:, None], scale)
    _change(norm.scale, lambda g: g * 0 + 1)
    _change(norm.bias, lambda b: b * 0)


def _compress(model: nnx.Module, stream: Stream, folded: dict[str, list[str]], pad: bool) -> None:
    keep = np.arange(stream.width) < stream.width - 1
    for leaf in _producers(model, stream):
        _change(leaf, lambda a: a * keep if pad else a[..., :-1])
    for reader in (reader for readers in folded.values() for reader in readers):
        short = slice(None) if pad else slice(-1)  # the padded form keeps a last row of zeros
        _change(at(model, reader).kernel, lambda w, s=short: (w - w[..., -1:, :])[..., s, :])


def _new_norms(model: nnx.Module, stream: Stream, form: Form, folded: dict[str, list[str]]) -> None:
    width, crms = stream.width, form.target == "crms"
    for path in (*_between(stream), *(way.norm for way in stream.exits if way.norm is not None)):
        old = at(model, path)
        affine = path not in folded and old.scale is not None
        if crms:
            new = nn.CRMSNorm(width, eps=old.eps, expand=path not in folded, affine=affine)
        else:
            new = nn.RMSNorm(width, eps=old.eps, affine=affine, bias=affine)
        _take_affine(new, old)
        _replace(model, path, new)
    if not stream.linear:
        old = at(model, stream.entry_norm) if stream.entry_norm is not None else None
        keep = width - 1 if crms else width
        options = {"keep": keep, "pad": form.pad}
        _replace(model, entry_hook(model, stream), _recentring(old, width, **options))


def _recentring(old: Any, width: int, **options: Any) -> nn.Recentre:
    if old is None:
        return nn.Recentre(width, **options)
    if old.scale is None:
        raise ValueError("model: a norm without γ and β starts the stream, which no known architecture has")
    new = nn.Recentre(width, eps=old.eps, normalize=True, **options)
    _take_affine(new, old)
    return new


def _take_affine(new: Any, old: Any) -> None:
    for name in ("scale", "bias"):
        if getattr(new, name) is not None:
            getattr(new, name).set_value(getattr(old, name).get_value())


def _for_training(model: nnx.Module, stream: Stream) -> None:
    """RMSNorm with everything that writes to the stream recentred in each forward pass; the parameters stay."""
    norms = (*_between(stream), *(way.norm for way in stream.exits if way.norm is not None))
    for path in norms:
        old = at(model, path)
        new = nn.RMSNorm(stream.width, eps=old.eps, affine=old.scale is not None, bias=old.scale is not None)
        _take_affine(new, old)
        _replace(model, path, new)
    hook = entry_hook(model, stream)
    if hook is not None:
        _replace(model, hook, _recentring(at(model, hook), stream.width))
    for path in (*(() if hook else stream.entries), *(w for b in stream.branches for w in b.writers)):
        _replace(model, path, _centered(at(model, path), nn.CenteredLinear))


def _centered(old: Any, kind: type) -> Any:
    new = nnx.eval_shape(lambda: kind(*old.kernel.get_value().shape, bias=old.bias is not None, rngs=nn.Keys(0)))
    new.kernel.set_value(old.kernel.get_value())
    if old.bias is not None:
        new.bias.set_value(old.bias.get_value())
    return new


# ---- and back ------------------------------------------------------------------------------------------------------


def undo(model: nnx.Module, path: str, form: Form) -> None:
    """Make the stream ``path``, which has ``form``, a Pre-LN one of the full width that computes the same; in place."""
    stream = stream_at(model, path)
    if form.target == "crms":
        _expand(model, stream, form.pad)
    width = stream_at(model, path).width
    for norm in (*_between(stream), *(way.norm for way in stream.exits if way.norm is not None)):
        old = at(model, norm)
        new = nn.LayerNorm(width, eps=old.eps, affine=form.affine or old.scale is not None)
        if old.scale is not None:
            _take_affine(new, old)
        _replace(model, norm, new)
    hook = entry_hook(model, stream)
    if hook is not None and isinstance(at(model, hook), nn.Recentre):
        old = at(model, hook)
        new = nn.LayerNorm(width, eps=old.eps) if old.normalize else None
        if new is not None:
            _take_affine(new, old)
        _replace(model, hook, new)
    for where in (*stream.entries, *(w for b in stream.branches for w in b.writers)):
        if isinstance(at(model, where), nn.CenteredLinear):
            _replace(model, where, _centered(at(model, where), nn.Linear))
    if form.scaled and form.target != "zero-mean-ln":
        for branch in stream.branches:
            name = branch.path.rpartition(".")[2]
            block = at(model, branch.path.rpartition(".")[0])
            setattr(block, f"{name}_scale", nnx.data(nnx.Param(jnp.ones(width))))


def _expand(model: nnx.Module, stream: Stream, pad: bool) -> None:
    """The inverse of :func:`_compress`: any rows of a consumer do that differ from a last one as those here."""
    ends = {way.norm: list(way.readers) for way in stream.exits if way.norm is not None}
    folded = {norm: readers for norm, readers in (_between(stream) | ends).items() if not at(model, norm).expand}
    for leaf in _producers(model, stream):
        _change(leaf, lambda a: np.concatenate([a[..., :-1] if pad else a, -a.sum(-1, keepdims=True)], axis=-1))
    if not pad:
        for reader in (reader for readers in folded.values() for reader in readers):
            kernel = at(model, reader).kernel
            _change(kernel, lambda w: np.concatenate([w, np.zeros_like(w[..., :1, :])], axis=-2))
