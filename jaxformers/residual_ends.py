"""Where residual streams end: what reads them behind their blocks. See :mod:`jaxformers.residual`."""

import dataclasses
from typing import Any

from flax import nnx

from jaxformers.nn.stages import Stages


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


def join(path: str, name: str) -> str:
    """``path.name``; the model itself has no path."""
    return f"{path}.{name}" if path else name


def at(model: Any, path: str) -> Any:
    """The module or parameter at ``path``; None where there is none."""
    for name in path.split(".") if path else ():
        model = getattr(model, name, None)
    return model


def has(module: Any, name: str) -> bool:
    """Is there such a part?"""
    return getattr(module, name, None) is not None


def is_norm(module: Any) -> bool:
    """Is it one of the library's norms?"""
    return hasattr(module, "eps") and not hasattr(module, "kernel")


def ends_in_table(head: Any) -> bool:
    """Does the head multiply by the token table at its end?"""
    return hasattr(head, "decoder") and head.decoder is None


def _of_head(path: str, head: Any) -> Exit:
    """What a head reads of the states that it is given; the norm is left open."""
    if head is None:
        return Exit(None, leaves=True)
    if hasattr(head, "kernel"):
        return Exit(None, (path,))
    for name in ("embed", "project", "dense"):
        if has(head, name):
            return Exit(None, (f"{path}.{name}",))
    if hasattr(head, "pooling"):  # a sentence's vector, without a map
        return Exit(None, leaves=True)
    if hasattr(head, "pyramid"):
        return Exit(None, by=path)
    found = tuple(f"{path}.{n}" for n in ("decoder", "classifier", "distillation_classifier") if has(head, n))
    if is_norm(getattr(head, "norm", None)):  # a second norm in a row
        return Exit(None, found, by=f"{path}.norm")
    return Exit(None, found, tied=ends_in_table(head))


def exits(model: nnx.Module, path: str, owner: Any) -> tuple[Exit, ...]:
    """The exits of the stream of ``owner``, the module at ``path``."""
    parent_path, _, name = path.rpartition(".")
    if path and isinstance(at(model, parent_path), Stages):
        return (_stage_exit(model, path, owner),)
    norm = next((join(path, n) for n in ("final_norm", "norm", "pool_norm") if is_norm(getattr(owner, n, None))), None)
    if has(owner, "embed"):  # a head with blocks of its own
        return (Exit(norm, (join(path, "decoder"),)),)
    own, pooler = _of_head(*head_of(model, path, owner)), getattr(owner, "pooler", None)
    states, layers, pooled = _around(model, path)
    raw = [Exit(None, layers)] if layers else []
    if is_norm(pooler):  # BEiT's, of the mean over patches: the states themselves are an output
        return (*raw, Exit(norm, states, leaves=not states), dataclasses.replace(own, norm=join(path, "pooler")))
    if own.by.endswith(".norm") and norm is None:  # the head has the only norm
        return (*raw, Exit(None, states, leaves=not states), Exit(own.by, own.readers))
    if norm is not None and norm.endswith("pool_norm"):  # of the class token; the states are an output as they are
        readers = (*own.readers, *pooled)
        return (*raw, Exit(None, states, leaves=not states), Exit(norm, readers, leaves=not readers))
    if own.by and not own.by.endswith(".norm"):
        return (*raw, own, Exit(norm, states, leaves=not states))
    if has(getattr(owner, "head", None), "layer_weights"):  # a sum over the states of all layers
        return (*raw, own, Exit(norm, states, leaves=not states))
    if has(owner, "project_out"):  # what head and callers get is behind it
        return (*raw, Exit(norm, (join(path, "project_out"),)))
    if pooler is not None:  # a classifier of sequences reads what the pooler gives
        more = own if own.leaves or hasattr(owner.head, "pooling") else Exit(None)
        own = dataclasses.replace(more, readers=(*more.readers, join(path, "pooler")))
    readers = (*own.readers, *states, *pooled)
    return (*raw, dataclasses.replace(own, norm=norm, readers=readers, leaves=own.leaves and not (states or pooled)))


def _stage_exit(model: nnx.Module, path: str, owner: Any) -> Exit:
    """Where a stage of a hierarchical model ends: in the next one, or in the model's head."""
    if has(owner, "merge"):
        return Exit(f"{path}.merge.norm", (f"{path}.merge.reduction",))
    stages_path, _, number = path.rpartition(".")
    top_path = stages_path.rpartition(".")[0]
    top, stages, i = at(model, top_path), at(model, stages_path), int(number)
    norm = f"{path}.norm" if has(owner, "norm") else join(top_path, "final_norm")
    following = (f"{stages_path}.{i + 1}.embeddings.patch",) if i + 1 < len(stages) else ()
    head, head_path = getattr(top, "head", None), join(top_path, "head")
    if isinstance(getattr(head, "project", None), Stages):  # a head that reads the states of all stages
        return Exit(norm, (*following, f"{head_path}.project.{i}"))
    return Exit(norm, following) if following else dataclasses.replace(_of_head(head_path, head), norm=norm)


def head_of(model: nnx.Module, path: str, owner: Any) -> tuple[str, Any]:
    """(path, module) of the head that reads the stream: its owner's, or that of the model around it."""
    parent_path, _, name = path.rpartition(".")
    parent = at(model, parent_path)
    beside = name in ("text", "decoder") or (name == "encoder" and not has(parent, "decoder"))
    if path and beside and not has(owner, "head") and has(parent, "head"):
        return join(parent_path, "head"), parent.head
    return join(path, "head"), getattr(owner, "head", None)


def _around(model: nnx.Module, path: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Maps in the model around that read (the states, the outputs of layers, the pooled state)."""
    parent_path, _, name = path.rpartition(".")
    parent = at(model, parent_path)
    if not path:
        return (), (), ()
    if name == "vision" and has(parent, "projector"):
        return (), (join(parent_path, "projector.up"),), ()
    if name == "vision" and has(parent, "head"):
        return (join(parent_path, "head.classifier"),), (), ()
    if has(parent, f"{name}_projection"):
        return (), (), (join(parent_path, f"{name}_projection"),)
    if name == "encoder" and has(parent, "decoder"):
        if has(parent, "memory_projection"):
            return (join(parent_path, "memory_projection"),), (), ()
        blocks = [join(parent_path, f"decoder.layers.{i}.cross_attention") for i in range(len(parent.decoder.layers))]
        return tuple(f"{block}.{part}" for block in blocks for part in ("key", "value")), (), ()
    return (), (), ()
