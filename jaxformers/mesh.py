"""Meshes and sharding: one table from parameter paths to logical axes, one from logical axes to mesh axes.

    mesh = jf.mesh("data=2,fsdp=4,tensor=8")
    model = jf.load(directory, mesh=mesh)               # each device reads its slice
    params = jax.device_put(params, shardings(mesh, params))
    apply = constrained(apply, mesh)                    # activations follow the batch, so that weights are gathered

Since every architecture uses one vocabulary of paths, one table serves all of them. Mesh axes and what they cut:

- ``data``: the batch. Weights are whole on every device; gradients are summed.
- ``fsdp``: the batch, and every matrix along the model's width: weights are gathered when their layer's turn comes.
- ``tensor``: heads, MLP and vocabulary, without the batch: two sums of activations a layer. It should divide the
  number of key/value heads, or heads are cut apart.
- ``sequence``: the length of activations: attention gathers keys and values.
- ``expert``: the experts of a mixture. Every device of the axis sees all tokens of its part of the batch and
  multiplies those of its own experts.

All may be combined. Pipelines (layers on different devices) are not supported.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxformers import paths, sites

AXES = ("data", "fsdp", "tensor", "sequence", "expert")

# parameter path -> logical axes of its dimensions; the first match counts, no match means replicated
LOGICAL_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("**.{attention,cross_attention}.{query,key,value}.kernel", ("embed", "heads")),
    ("**.{attention,cross_attention}.{query,key,value}.bias", ("heads",)),
    ("**.{attention,cross_attention}.out.kernel", ("heads", "embed")),
    ("**.attention.{query_up,kv_up}.kernel", (None, "heads")),
    ("**.mlp.experts.{up,gate}.kernel", ("expert", "embed", "mlp")),
    ("**.mlp.experts.down.kernel", ("expert", "mlp", "embed")),
    ("**.mlp.experts.{up,gate}.bias", ("expert", "mlp")),
    ("**.mlp.experts.down.bias", ("expert", None)),
    ("**.mlp.shared.{up,gate}.kernel", ("embed", "mlp")),
    ("**.mlp.shared.down.kernel", ("mlp", "embed")),
    ("**.mlp.{up,gate}.kernel", ("embed", "mlp")),
    ("**.mlp.{up,gate}.bias", ("mlp",)),
    ("**.mlp.down.kernel", ("mlp", "embed")),
    ("**.mlp.conv.kernel", (None, None, None, "mlp")),  # depthwise: each hidden channel has its own filter
    ("**.mlp.conv.bias", ("mlp",)),
    ("**.attention.relative.table", (None, "heads")),
    ("**.attention.reduce.conv.kernel", (None, None, "embed", None)),
    ("**embeddings.patch.kernel", (None, None, None, "embed")),
    ("**embeddings.token.embedding", ("vocab", "embed")),
    ("**embeddings.*.embedding", (None, "embed")),
    ("**head.decoder.kernel", ("embed", "vocab")),
    ("head.{bias,decoder.bias}", ("vocab",)),
    ("**.kernel", ("embed", None)),
)

# arrays inside a typed weight without the kernel's two axes: which of those (0: in, 1: out) each of theirs stands for
TYPED_AXES: Mapping[str, tuple[int | None, ...]] = {
    "a": (0, None),
    "b": (None, 1),
    "g_idx": (0,),
    "cells": (1, 0, None, None),
}

# logical axis -> mesh axes it is cut along, those that the mesh has
RULES: Mapping[str, tuple[str, ...]] = {
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "layers": (),
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
}


def mesh(shape: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A device mesh from text such as ``"data=2,fsdp=4,tensor=8"``; one size may be -1 for "the rest".

    Axes: ``data`` (batch), ``fsdp`` (batch, weights gathered as needed), ``tensor`` (heads, MLP and vocabulary),
    ``sequence``, ``expert``. Raises ValueError for unknown axes and for sizes that do not fit the devices.
    """
    sizes = mesh_sizes(shape)
    devices = list(jax.devices() if devices is None else devices)
    known = math.prod(n for n in sizes.values() if n != -1)
    if list(sizes.values()).count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes = {name: len(devices) // known if n == -1 else n for name, n in sizes.items()}
    total = math.prod(sizes.values())
    if total < 1 or any(n < 1 for n in sizes.values()) or total > len(devices):
        raise ValueError(f"mesh {shape!r}: {total} devices asked for, {len(devices)} are there")
    return Mesh(_arranged(tuple(sizes.values()), devices[:total], total == len(devices)), tuple(sizes))


def mesh_sizes(shape: str) -> dict[str, int]:
    """{axis: size} of a mesh's text, -1 for "the rest". Raises ValueError for unknown axes and what is no number."""
    sizes: dict[str, int] = {}
    for part in shape.replace(" ", "").split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not size.lstrip("-").isdigit():
            raise ValueError(f"mesh {shape!r}: {part!r} is not one of {', '.join(AXES)} followed by =size")
        sizes[name] = int(size)
    return sizes


def _arranged(shape: tuple[int, ...], devices: list[jax.Device], all_of_them: bool) -> np.ndarray:
    """The devices in the mesh's shape. On TPUs neighbours in the mesh are neighbours in the torus, and slices that only
    the data-centre network connects lie along the first axis that can be cut into as many."""
    if devices[0].platform != "tpu" or not all_of_them:
        return np.asarray(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    between = [1] * len(shape)
    for axis, size in enumerate(shape):
        if slices > 1 and size % slices == 0:
            between[axis] = slices
            within = tuple(n // k for n, k in zip(shape, between, strict=True))
            return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def spec(mesh: Mesh, path: str, shape: Sequence[int], rules: Mapping[str, tuple[str, ...]] = RULES) -> PartitionSpec:
    """How the parameter at ``path`` is cut. An axis whose size a mesh axis does not divide stays whole.

    An array inside a typed weight (packed words, scales, zeros, a mask, low-rank factors) is cut like the kernel that
    it stands for, along those of its axes that it shares.
    """
    inside = ""
    for leaf in (".kernel", ".embedding"):
        if f"{leaf}." in path:
            path, _, inside = path.partition(f"{leaf}.")
            path += leaf
    axes = next((axes for pattern, axes in LOGICAL_AXES if paths.matches(pattern, path)), ())
    shared = TYPED_AXES.get(inside.rpartition(".")[2])
    if shared is not None and len(axes) >= 2:
        axes = (*axes[:-2], *(None if i is None else axes[-2:][i] for i in shared))
    if "layers.*." in path and len(shape) == len(axes) + 1:
        axes = ("layers", *axes)
    if len(axes) != len(shape):
        return PartitionSpec()
    return PartitionSpec(*(_cut(mesh, axis, size, rules) for axis, size in zip(axes, shape, strict=True)))


def _cut(mesh: Mesh, axis: str | None, size: int, rules: Mapping[str, tuple[str, ...]]) -> Any:
    names = [name for name in rules.get(axis, ()) if name in mesh.shape] if axis else []
    while names and size % math.prod(mesh.shape[name] for name in names):
        names.pop()
    return tuple(names) if len(names) > 1 else (names[0] if names else None)


def sharding(
    mesh: Mesh, path: str, shape: Sequence[int], rules: Mapping[str, tuple[str, ...]] = RULES
) -> NamedSharding:
    """:func:`spec` as a sharding on ``mesh``."""
    return NamedSharding(mesh, spec(mesh, path, shape, rules))


def shardings(mesh: Mesh, params: Any, rules: Mapping[str, tuple[str, ...]] = RULES) -> Any:
    """Shardings for a whole tree of parameters (arrays or their shapes), by path."""
    return jax.tree_util.tree_map_with_path(lambda p, a: sharding(mesh, paths.dotted(p), a.shape, rules), params)


def batch_sharding(mesh: Mesh, rules: Mapping[str, tuple[str, ...]] = RULES) -> NamedSharding:
    """The first axis of a batch over the data axes of ``mesh``."""
    names = tuple(name for name in rules["batch"] if name in mesh.shape)
    return NamedSharding(mesh, PartitionSpec(names) if names else PartitionSpec())


def batch_ways(mesh: Mesh, rules: Mapping[str, tuple[str, ...]] = RULES) -> int:
    """Into how many parts ``mesh`` cuts a batch."""
    return math.prod(mesh.shape[name] for name in rules["batch"] if name in mesh.shape)


def cache_shardings(mesh: Mesh, cache: Any, rules: Mapping[str, tuple[str, ...]] = RULES) -> Any:
    """Shardings of a decoder's cache (or its shapes): sequences over the data axes, key/value heads over ``tensor``.

    A latent line serves all heads, and is whole on every device along ``tensor``."""
    stored = ("batch", "heads", "length", None)
    known = {"key": stored, "value": stored, "line": ("batch", "length", None), "valid": ("batch", None)}

    def place(path: tuple, leaf: Any) -> NamedSharding:
        axes = known.get(paths.dotted(path).rpartition(".")[2], ())
        axes = (None,) * (leaf.ndim - len(axes)) + axes  # stacked layers lead
        cut = (_cut(mesh, axis, size, rules) for axis, size in zip(axes, leaf.shape, strict=True))
        return NamedSharding(mesh, PartitionSpec(*cut))

    return jax.tree_util.tree_map_with_path(place, cache)


def constrained(apply: Callable, mesh: Mesh, rules: Mapping[str, tuple[str, ...]] = RULES) -> Callable:
    """``apply`` with its activations (``embeddings`` and each block's output) held to the batch's sharding.

    Left alone, the partitioner follows the width that ``fsdp`` cuts the embedding table along: it then sums activations
    in every layer instead of gathering weights. With an axis ``sequence`` they are cut along the length as well. An
    axis that the mesh does not divide stays as it is. For the same reason embedding tables are gathered along the width
    before they are looked up: rows of a table in pieces would have to be put together for the whole batch. Modules that
    place their own work, such as :class:`jaxformers.nn.Experts`, ask :func:`current` for the mesh.
    """

    ways = batch_ways(mesh, rules)

    def held(x: jax.Array) -> jax.Array:
        if x.shape[0] % ways:
            return x
        length = _cut(mesh, "length", x.shape[1], rules) if x.ndim == 3 else None
        cut = PartitionSpec(_cut(mesh, "batch", x.shape[0], rules), length)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, cut))

    def whole_rows(path: tuple, x: Any) -> Any:
        name = paths.dotted(path)
        if not paths.matches("**embeddings.*.embedding{,.base}", name):
            return x
        return jax.lax.with_sharding_constraint(x, sharding(mesh, name, x.shape, {**rules, "embed": ()}))

    edited = sites.edit(apply, {"**embeddings": held, "**layers.*.output": held})

    def applied(params: Any, *args: Any, **kwargs: Any) -> Any:
        outer, _local.here = _local.here, (mesh, rules)
        try:
            return edited(jax.tree_util.tree_map_with_path(whole_rows, params), *args, **kwargs)
        finally:
            _local.here = outer

    return applied


class _Local(threading.local):  # tracing may run in several threads at once
    here: tuple[Mesh, Mapping[str, tuple[str, ...]]] | None = None


_local = _Local()  # set only while a constrained function is traced


def current() -> Mesh | None:
    """The mesh of the :func:`constrained` function that is being traced."""
    return None if _local.here is None else _local.here[0]


def cut(axis: str, size: int) -> tuple[str, ...]:
    """The axes of the :func:`current` mesh that a logical ``axis`` of ``size`` is cut along; none without a mesh."""
    if _local.here is None:
        return ()
    names = _cut(_local.here[0], axis, size, _local.here[1])
    names = names if isinstance(names, tuple) else (() if names is None else (names,))
    return tuple(name for name in names if _local.here[0].shape[name] > 1)
