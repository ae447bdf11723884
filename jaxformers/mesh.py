"""Meshes and sharding: one table from parameter paths to logical axes, one from logical axes to mesh axes.

    mesh = jf.mesh("data=2,fsdp=4,tensor=8")
    model = jf.load(directory, mesh=mesh)               # each device reads its slice
    params = jax.device_put(params, shardings(mesh, params))
    apply = constrained(apply, mesh)                    # activations follow the batch, so that weights are gathered

Since every architecture uses one vocabulary of paths, one table serves all of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
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
    sizes: dict[str, int] = {}
    for part in shape.replace(" ", "").split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not size.lstrip("-").isdigit():
            raise ValueError(f"mesh {shape!r}: {part!r} is not one of {', '.join(AXES)} followed by =size")
        sizes[name] = int(size)
    devices = list(jax.devices() if devices is None else devices)
    known = math.prod(n for n in sizes.values() if n != -1)
    if list(sizes.values()).count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes = {name: len(devices) // known if n == -1 else n for name, n in sizes.items()}
    total = math.prod(sizes.values())
    if total < 1 or any(n < 1 for n in sizes.values()) or total > len(devices):
        raise ValueError(f"mesh {shape!r}: {total} devices asked for, {len(devices)} are there")
    return Mesh(np.asarray(devices[:total]).reshape(tuple(sizes.values())), tuple(sizes))


def spec(mesh: Mesh, path: str, shape: Sequence[int], rules: Mapping[str, tuple[str, ...]] = RULES) -> PartitionSpec:
    """How the parameter at ``path`` is cut. An axis whose size a mesh axis does not divide stays whole."""
    if ".kernel." in path:  # an array inside a typed weight is cut like the kernel it stands for
        path = path[: path.index(".kernel.") + len(".kernel")]
    axes = next((axes for pattern, axes in LOGICAL_AXES if paths.matches(pattern, path)), ())
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


def constrained(apply: Callable, mesh: Mesh, rules: Mapping[str, tuple[str, ...]] = RULES) -> Callable:
    """``apply`` with its activations (``embeddings`` and each block's output) held to the batch's sharding.

    Left alone, the partitioner follows the width that ``fsdp`` cuts the embedding table along: it then sums activations
    in every layer instead of gathering weights. A batch that the data axes do not divide stays as it is.
    """
    cut = batch_sharding(mesh, rules)
    ways = math.prod(mesh.shape[name] for name in rules["batch"] if name in mesh.shape)

    def along_batch(x: jax.Array) -> jax.Array:
        return x if x.shape[0] % ways else jax.lax.with_sharding_constraint(x, cut)

    return sites.edit(apply, {"**embeddings": along_batch, "**layers.*.output": along_batch})
