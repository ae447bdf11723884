"""Where parameters, optimiser state and batches live on a mesh."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxformers.mesh import batch_sharding, sharding
from jaxformers.train.state import Flat, leaf_paths


def mesh_of(params: Any) -> Mesh | None:
    """The mesh of more than one device that the arrays of ``params`` already live on, or None."""
    for x in jax.tree.leaves(params):
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def param_shardings(params: Any, mesh: Mesh, shardings: Any = None) -> dict[str, NamedSharding]:
    """{path: sharding} of every array: from ``shardings`` (a tree like ``params``), else where it is on ``mesh``, else
    by the table of `jaxformers.mesh`.

    Raises ValueError when ``shardings`` is not shaped like ``params``.
    """
    names = [path for path, _ in leaf_paths(params)]
    leaves, treedef = jax.tree.flatten(params)
    if shardings is not None:
        is_leaf = lambda s: isinstance(s, NamedSharding | PartitionSpec)
        given = jax.tree.flatten(shardings, is_leaf=is_leaf)[0]
        if len(given) != len(leaves):
            raise ValueError(f"shardings: expected a tree like params with {len(leaves)} leaves, got {len(given)}")
        chosen = [s if isinstance(s, NamedSharding) else NamedSharding(mesh, s) for s in given]
    else:
        here = lambda x: isinstance(getattr(x, "sharding", None), NamedSharding) and x.sharding.mesh == mesh
        chosen = [x.sharding if here(x) else sharding(mesh, n, x.shape) for n, x in zip(names, leaves, strict=True)]
    return dict(zip(names, chosen, strict=True))


def state_shardings(abstract: Any, params: Flat, shardings: Mapping[str, NamedSharding], mesh: Mesh) -> Any:
    """Shardings for a tree whose leaves belong to parameters (optimiser state, averages), matched by path and shape.

    A leaf under a parameter's path with its shape is placed like it; a leaf with one axis less (Adafactor's rows and
    columns) keeps the axes it still has; everything else is replicated.
    """

    def place(keys: tuple, leaf: Any) -> NamedSharding:
        name = next((k.key for k in reversed(keys) if isinstance(k, jax.tree_util.DictKey)), None)
        if name not in params:
            return NamedSharding(mesh, PartitionSpec())
        shape = params[name].shape
        spec = tuple(shardings[name].spec) + (None,) * (len(shape) - len(shardings[name].spec))
        if leaf.shape == shape:
            return NamedSharding(mesh, PartitionSpec(*spec))
        if leaf.shape == shape[:-1]:
            return NamedSharding(mesh, PartitionSpec(*spec[:-1]))
        if len(shape) >= 2 and leaf.shape == shape[:-2] + shape[-1:]:
            return NamedSharding(mesh, PartitionSpec(*spec[:-2], spec[-1]))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, abstract)


def own_copy(tree: Any) -> Any:
    """Arrays that every device holds whole, as arrays of this process alone. Nothing is sent."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def put(x: Any, where: NamedSharding) -> jax.Array:
    """``x``, which all processes have alike or share already, as ``where`` says."""
    if isinstance(x, jax.Array) and x.is_fully_addressable and not where.is_fully_addressable:
        x = np.asarray(x)  # JAX would send what is on one process's device to the others
    return jax.device_put(x, where)


def put_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Move one process's part of a batch (numpy, leading axis = examples) onto its devices.

    Raises ValueError when the examples do not divide over the data axes.
    """
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    cut = batch_sharding(mesh)
    axes = cut.spec[0] if len(cut.spec) and cut.spec[0] is not None else ()
    axes = (axes,) if isinstance(axes, str) else axes
    ways = math.prod(mesh.shape[a] for a in axes)

    def put(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x  # global already
        x = np.asarray(x)
        total = (x.shape[0] if x.ndim else 0) * jax.process_count()
        if total == 0 or total % ways:
            raise ValueError(
                f"data: a batch of shape {x.shape} from each of {jax.process_count()} processes does not divide over "
                f"the {ways} devices of the mesh axes {axes}"
            )
        return jax.make_array_from_process_local_data(cut, x)

    return jax.tree.map(put, batch)
