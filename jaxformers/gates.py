"""Gates: masks at heads, feed-forward units, sub-layers, hidden units and embedding columns, as inputs of a function.

    run = gates.gated(apply, model)
    masks = gates.ones(model)                                   # {"heads": {"layers.0.attention": (H,), …}, …}
    y = jax.jit(run)(params, batch, masks)                      # another mask compiles nothing anew

Pruning methods decide on such masks; :func:`jaxformers.compaction.compact` takes away for good what they set to zero.
What a mask of zero means, for a transformer block with input x:

- ``heads`` {attention: (H,)}: the head's columns of the context are 0; the output projection's bias stays. With grouped
  queries there is one gate a key/value head, with all its queries; with a single key/value head one gate a query head.
- ``ffn`` {mlp: (F,)}: the unit's activation is 0; the second map's bias stays.
- ``sublayers`` {attention, cross-attention or mlp: ()}: the whole output is 0, its bias too. A pre-norm sub-layer is
  then the identity on its residual stream; a post-norm one keeps its norm, ``norm(x)``.
- ``hidden`` (D,): one mask for the whole residual stream, on the embeddings and on every sub-layer's output. Each norm
  over it counts the kept units only, as a narrower norm would.
- ``embeddings`` (E,): the columns of a token table that is narrower than the model (ELECTRA, OPT-350M). Elsewhere a
  column of the table is a hidden unit. A head that is tied to the table loses the column too.

A mask may hold any numbers: it is a factor, and norms count what is not 0.
"""

import dataclasses
import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import sites
from jaxformers.atomic import write_bytes_atomic
from jaxformers.residual import at
from jaxformers.units import KINDS, axes, bridge, last_path, norms, units

__all__ = ["KINDS", "Place", "check", "gated", "kept", "multiply", "ones", "places", "read", "units", "write"]

Masks = Mapping[str, Any]  # {kind: {module path: array}} for heads, ffn and sublayers, {kind: array} for the others


def ones(model: nnx.Module, kinds: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Masks that keep everything, float32; arguments and errors as :func:`units`."""
    sizes = units(model, kinds)
    return {
        kind: jax.tree.map(lambda n, kind=kind: jnp.ones(() if kind == "sublayers" else (n,)), size)
        for kind, size in sizes.items()
    }


def check(sizes: Mapping[str, Any], masks: Masks) -> None:
    """Raise ValueError, naming the mask, when ``masks`` is no part of what ``sizes`` (of :func:`units`) allows."""
    if not isinstance(masks, Mapping) or not masks:
        raise ValueError(f"masks: expected {{kind: masks}} with kinds of {', '.join(sizes)}, got {masks!r}")
    for kind, mine in masks.items():
        if kind not in sizes:
            raise ValueError(f"masks: there are no gates of kind {kind!r} here; there are {', '.join(sizes)}")
        many = isinstance(sizes[kind], Mapping)
        if isinstance(mine, Mapping) != many:
            wanted = "{module path: array}" if many else "one array"
            raise ValueError(f"masks[{kind!r}]: expected {wanted}, got {type(mine).__name__}")
        for name, mask in mine.items() if many else (("", mine),):
            if many and name not in sizes[kind]:
                raise ValueError(f"masks[{kind!r}]: the model has no {name!r}; it has {', '.join(sizes[kind])}")
            shape = () if kind == "sublayers" else (sizes[kind][name] if many else sizes[kind],)
            if tuple(jnp.shape(mask)) != shape:
                where = f"masks[{kind!r}]" + (f"[{name!r}]" if many else "")
                raise ValueError(f"{where}: expected shape {shape}, got {tuple(jnp.shape(mask))}")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a gate acts: at ``site``, with ``masks[kind]`` or ``masks[kind][name]``.

    ``how``: ``units`` (the site's last axis runs over the units), ``heads`` (the last but one does), ``norm`` (the
    weights of a norm's statistics), ``kept`` (the last axis again, but nothing is scaled).
    """

    site: str
    kind: str
    name: str
    how: str


def places(model: nnx.Module, kinds: tuple[str, ...] | None = None) -> list[Place]:
    """Every place where a gate of ``kinds`` acts, always in the same order. Arguments and errors as :func:`units`."""
    sizes = units(model, kinds)
    found = [Place(f"{path}.context", "heads", path, "heads") for path in sizes.get("heads", ())]
    found += [Place(f"{path}.hidden", "ffn", path, "units") for path in sizes.get("ffn", ())]
    outputs = [(path, f"{last_path(path)}.output") for path in units(model, ("sublayers",))["sublayers"]]
    found += [Place(site, "sublayers", path, "units") for path, site in outputs if "sublayers" in sizes]
    if "hidden" in sizes:
        stacks = [f"{name}.embeddings" for name in ("encoder", "decoder") if at(model, f"{name}.layers") is not None]
        entries = stacks or ["embeddings"]
        found += [Place(site, "hidden", "", "units") for site in (*entries, *(site for _, site in outputs))]
    for kind in ("hidden", "embeddings"):
        found += [Place(f"{path}.weights", kind, "", "norm") for path in norms(model, kind) if kind in sizes]
    if "embeddings" in sizes:
        found.append(Place(f"{bridge(model)}.input", "embeddings", "", "units"))
        if any(axes(model).get("project_out.kernel", (None, None))[1:]):
            found.append(Place("project_out.output", "embeddings", "", "kept"))
    return found


def multiply(x: jax.Array, mask: Any, key: jax.Array | None) -> jax.Array:
    """``x · mask``; the last axis runs over the units. What a gate does by default."""
    return x * jnp.asarray(mask, x.dtype)


def kept(mask: Any) -> jax.Array:
    """1 where a unit is kept, 0 where its mask is 0: how much a norm counts it by default."""
    return (jnp.asarray(mask) != 0).astype(jnp.float32)


def gated(
    apply: Callable,
    model: nnx.Module,
    kinds: tuple[str, ...] | None = None,
    *,
    multiply: Callable[[jax.Array, Any, jax.Array | None], jax.Array] = multiply,
    kept: Callable[[Any], jax.Array] = kept,
) -> Callable:
    """``run(params, batch, masks, *, rngs=None, key=None)``: ``apply`` with gates whose masks are inputs.

    ``apply`` comes from ``jf.functional(model)``, scanned or not; of ``model`` only the structure is read. ``masks`` is
    what :func:`ones` returns, or a part of it: what it leaves out is not gated. Outputs are those of ``apply``.

    ``multiply(x, mask, key)`` and ``kept(mask)`` (units,) may be replaced where a gate is more than a factor (a
    distribution that is drawn from). ``masks`` may then have a pytree of arrays (units,) where an array stood; x has
    the units as its last axis (heads: (B, L, entries of a head, H)); ``key`` differs by place, and is None where
    ``run`` gets none. Raises ValueError as :func:`units`, and for masks that do not fit the model, naming them.
    """
    sizes, found = units(model, kinds), list(enumerate(places(model, kinds)))
    factors = multiply is globals()["multiply"]  # then a mask is one array

    def run(params: Any, batch: Any, masks: Masks, *, rngs: Any = None, key: jax.Array | None = None) -> Any:
        check(sizes, masks if factors else _first_leaves(sizes, masks))
        groups: dict[tuple[str, str], dict[str, Any]] = {}
        for i, place in found:
            mask = _mask(masks, place)
            if mask is not None:
                own = None if key is None else jax.random.fold_in(key, i)
                groups.setdefault((place.kind, place.how), {})[place.site] = (mask, own)
        how = {
            "units": lambda x, v: multiply(x, *v),
            "heads": lambda x, v: _on_heads(multiply, x, *v),
            "norm": lambda _, v: kept(v[0]),
            "kept": lambda x, v: x * kept(v[0]).astype(x.dtype),
        }
        edited = apply
        for (_, what), values in groups.items():  # one edit a kind: a site may be a place of two
            edited = sites.edit(edited, {f"{{{','.join(values)}}}": sites.Each(how[what], values)})
        return edited(params, batch, rngs=rngs)

    return run


def write(masks: Masks, path: str | Path) -> None:
    """Keep ``masks`` in a file of NumPy's .npz format, for :func:`read`; the file is written beside and renamed."""
    flat: dict[str, Any] = {}
    for kind, mine in masks.items():
        flat |= {f"{kind}/{name}": m for name, m in mine.items()} if isinstance(mine, Mapping) else {kind: mine}
    with io.BytesIO() as file:
        np.savez(file, **{name: np.asarray(mask) for name, mask in flat.items()})
        write_bytes_atomic(path, file.getvalue())


def read(path: str | Path, model: nnx.Module) -> dict[str, Any]:
    """The masks of a file that :func:`write` made. Raises ValueError where they do not fit ``model``, or for a file
    that holds something else."""
    masks: dict[str, Any] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                kind, _, of = name.partition("/")
                into, key = (masks.setdefault(kind, {}), of) if of else (masks, kind)
                into[key] = jnp.asarray(arrays[name])
    except (ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: expected masks as gates.write keeps them ({error})") from error
    unknown = set(masks) - set(KINDS)
    if unknown:
        raise ValueError(f"{path}: {sorted(unknown)} are no kinds of gates; expected masks as gates.write keeps them")
    check(units(model, tuple(masks)), masks)
    return masks


def _mask(masks: Masks, place: Place) -> Any:
    mine = masks.get(place.kind)
    return mine.get(place.name) if place.name and mine is not None else mine


def _first_leaves(sizes: Mapping[str, Any], masks: Masks) -> Any:
    """``masks`` with one array where a pytree of them may stand."""
    if not isinstance(masks, Mapping):
        return masks
    first = lambda mask: next(iter(jax.tree.leaves(mask)), mask)
    many = lambda kind, mine: isinstance(sizes.get(kind), Mapping) and isinstance(mine, Mapping)
    return {
        kind: {name: first(mask) for name, mask in mine.items()} if many(kind, mine) else first(mine)
        for kind, mine in masks.items()
    }


def _on_heads(multiply: Callable, x: jax.Array, mask: Any, key: jax.Array | None) -> jax.Array:
    """``multiply`` on a context (B, L, query heads, size) whose consecutive query heads share a gate."""
    n = jax.tree.leaves(mask)[0].shape[0]
    by_gate = x.reshape(*x.shape[:2], n, -1).swapaxes(2, 3)
    return multiply(by_gate, mask, key).swapaxes(2, 3).reshape(x.shape)
