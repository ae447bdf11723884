"""Sites: named points of the forward pass that can be read (:func:`reap`) and rewritten (:func:`edit`).

A module calls ``site(name, value)`` at every point worth naming and goes on with what comes back. Outside of reap and
edit that is the value itself and costs nothing at run time. Names are module paths plus one of ``input``, ``output``,
``scores``, ``probs``, ``context``, ``hidden``; see the list in the documentation of :func:`reap`.

The mechanism is a stack that exists while a function is traced, so it works under jit, grad and vmap. Bodies of
``lax.scan`` and ``jax.checkpoint`` must return what was read in them, or tracers leak: :func:`looping` does that in one
place, and :class:`jaxformers.nn.Layers` is its only caller. Under a scan all layers share one trace: their sites are
collected with a leading layer axis and handed out under each layer's own name, and an edit that targets some of the
layers is applied under ``lax.cond`` on the layer index.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxformers import paths


@dataclasses.dataclass(frozen=True)
class Each:
    """An edit with a value of its own for each site: ``fn(site's value, values[site name])``; sites without stay.

    ``values`` holds a pytree of arrays per site name, inputs of the function that is traced: nothing compiles anew when
    they change. Under a scan they are stacked, so those of the layers that share a trace must have equal shapes.
    """

    fn: Callable[[jax.Array, Any], jax.Array]
    values: Mapping[str, Any]


Edit = Callable[[jax.Array], jax.Array] | Each


@dataclasses.dataclass
class _Reaper:
    patterns: tuple[str, ...]
    seen: dict[str, Any]


@dataclasses.dataclass
class _Editor:
    edits: dict[str, Edit]
    used: set[str]


@dataclasses.dataclass
class _Body:
    """The body of a scan or checkpoint: what reapers outside of it want is parked here and returned by the body."""

    prefix: str  # sites named prefix.<anything> stand for every layer of the loop
    names: tuple[str, ...]  # the layers' own prefixes, in order; one entry: a checkpointed single layer
    index: jax.Array | None  # which layer is running (traced), None when there is only one
    parked: dict[int, dict[str, Any]]  # depth of the reaper in the stack -> {site name as traced: value}


class _Local(threading.local):  # tracing may run in several threads at once
    def __init__(self) -> None:
        self.stack: list[_Reaper | _Editor | _Body] = []


_local = _Local()  # frames are alive during tracing only


def _own_names(name: str, above: int) -> list[tuple[str, int, _Body | None]]:
    """The names that ``name`` stands for, seen from stack position ``above``: several inside a scanned body."""
    for body in _local.stack[above + 1 :]:
        if isinstance(body, _Body) and name.startswith(body.prefix + "."):
            rest = name[len(body.prefix) :]
            return [(own + rest, i, body) for i, own in enumerate(body.names)]
    return [(name, 0, None)]


def wanted(name: str) -> bool:
    """Does anybody read or rewrite the site ``name``? Attention asks before it forms its probabilities."""
    for depth, frame in enumerate(_local.stack):
        if isinstance(frame, _Body):
            continue
        patterns = frame.patterns if isinstance(frame, _Reaper) else tuple(frame.edits)
        if any(paths.matches(patterns, own) for own, _, _ in _own_names(name, depth)):
            return True
    return False


def site(name: str, value: jax.Array) -> jax.Array:
    """Offer ``value`` under ``name`` to the reapers and editors around this call; returns it, perhaps rewritten.

    The innermost reap or edit acts first, so ``reap(edit(apply, …), …)`` reads the edited value.
    """
    for depth in range(len(_local.stack) - 1, -1, -1):
        frame = _local.stack[depth]
        if isinstance(frame, _Body):
            continue
        own = _own_names(name, depth)
        if isinstance(frame, _Editor):
            value = _apply_edits(frame, own, value)
        elif any(paths.matches(frame.patterns, n) for n, _, _ in own):
            body = own[0][2]
            store = frame.seen if body is None else body.parked.setdefault(depth, {})
            if name in store:
                raise ValueError(f"site {name} was passed twice in one forward pass: its value would be ambiguous")
            store[name] = value
    return value


def _apply_edits(frame: _Editor, own: list[tuple[str, int, _Body | None]], value: jax.Array) -> jax.Array:
    for pattern, fn in frame.edits.items():
        hits = [i for n, i, _ in own if paths.matches(pattern, n) and (not isinstance(fn, Each) or n in fn.values)]
        if not hits:
            continue
        frame.used.add(pattern)
        if isinstance(fn, Each):
            fn = _of_this_layer(fn, own, hits)
        if len(hits) == len(own):
            value = _checked(own[0][0], value, fn(value))
        else:  # one trace serves all layers of a scan, but only some of them are to be edited
            index = own[0][2].index
            value = jax.lax.cond(
                jnp.isin(index, jnp.asarray(hits)), lambda v, fn=fn: _checked(own[0][0], v, fn(v)), lambda v: v, value
            )
    return value


def _of_this_layer(each: Each, own: list[tuple[str, int, _Body | None]], hits: list[int]) -> Callable:
    """``each`` as a function of the site's value alone; in a scan it looks its layer's value up."""
    values = [each.values[own[i if len(own) > 1 else 0][0]] for i in hits]
    if len(own) == 1:
        return lambda value: each.fn(value, values[0])
    rows = jnp.asarray([hits.index(i) if i in hits else 0 for i in range(len(own))])
    row = rows[own[0][2].index]
    mine = jax.tree.map(lambda *a: jnp.stack(a)[row], *values)
    return lambda value: each.fn(value, mine)


def _checked(name: str, old: jax.Array, new: jax.Array) -> jax.Array:
    if getattr(new, "shape", None) != old.shape:
        raise ValueError(
            f"edit of {name}: the function must return shape {old.shape}, got {getattr(new, 'shape', new)}"
        )
    return new.astype(old.dtype)


@contextlib.contextmanager
def _pushed(frame: Any) -> Iterator[Any]:
    _local.stack.append(frame)
    try:
        yield frame
    finally:
        _local.stack.pop()


def _refuse_jitted(apply: Callable) -> None:
    if hasattr(apply, "lower") and hasattr(apply, "trace"):
        raise ValueError(
            "apply is already jitted: its compiled code has no sites left. Pass the plain function and jit the result, "
            "as in jax.jit(jf.reap(apply, pattern))"
        )


def reap(apply: Callable, patterns: paths.Patterns) -> Callable:
    """A function like ``apply`` that also returns the values at the sites that match ``patterns``.

    ``reap(apply, "layers.*.attention.probs")(params, batch)`` returns ``(output, {site name: value})``.

    Sites of every architecture, with B = batch, L = length, D = width, H = heads:
    ``embeddings`` (B, L, D); ``<linear>.input``, ``<linear>.output`` (…, in), (…, out); ``<block>.input``,
    ``<block>.output`` (B, L, D); ``<attention>.scores`` (B, H, query, key), scaled and biased, before the mask;
    ``<attention>.probs`` (B, H, query, key) after softmax and before dropout; ``<attention>.context``
    (B, L, H, head size), before the output projection; ``<mlp>.hidden`` (B, L, mlp width) after the activation;
    ``<norm>.weights`` (D,): how much each unit counts in the statistics, ones; a unit with weight 0 becomes 0.

    Raises ValueError when ``apply`` is already jitted, or when a pattern matches no site.
    """
    _refuse_jitted(apply)
    wanted_patterns = paths.as_tuple(patterns)

    def reaped(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        with _pushed(_Reaper(wanted_patterns, {})) as frame:
            out = apply(*args, **kwargs)
        for pattern in wanted_patterns:
            if not any(paths.matches(pattern, name) for name in frame.seen):
                raise ValueError(f"patterns: no site of this model matches {pattern!r}")
        return out, frame.seen

    return reaped


def edit(apply: Callable, edits: Mapping[str, Edit]) -> Callable:
    """A function like ``apply`` in which each site that matches a pattern of ``edits`` is replaced by ``fn(value)``.

    The function must keep the shape; its result is cast to the site's dtype. An :class:`Each` stands for a function
    with a value of its own per site. Edits of one call act in the order given. Raises ValueError when ``apply`` is
    already jitted, or when a pattern matches no site.
    """
    _refuse_jitted(apply)
    edits = dict(edits)
    for pattern, fn in edits.items():
        paths.as_tuple(pattern)
        if not callable(fn) and not isinstance(fn, Each):
            raise ValueError(f"edits[{pattern!r}]: expected a function of the site's value, or Each, got {fn!r}")

    def edited(*args: Any, **kwargs: Any) -> Any:
        with _pushed(_Editor(edits, set())) as frame:
            out = apply(*args, **kwargs)
        unused = [p for p in edits if p not in frame.used]
        if unused:
            raise ValueError(f"edits: no site of this model matches {unused[0]!r}")
        return out

    return edited


def looping(body: Callable, prefix: str, names: tuple[str, ...]) -> tuple[Callable, Callable]:
    """Make ``body`` safe for ``lax.scan`` and ``jax.checkpoint``; for :class:`jaxformers.nn.Layers`.

    Returns ``(wrapped, deliver)``: ``wrapped(index, *args)`` returns ``(body(*args), parked)``, where ``parked`` holds
    what reapers asked for; ``deliver(parked)`` hands it to them afterwards. With several ``names`` the leaves of
    ``parked`` carry a leading layer axis (as ``lax.scan`` stacks them).
    """

    def wrapped(index: jax.Array | None, *args: Any) -> tuple[Any, dict[int, dict[str, Any]]]:
        with _pushed(_Body(prefix, names, index, {})) as frame:
            out = body(*args)
        return out, frame.parked

    def deliver(parked: dict[int, dict[str, Any]]) -> None:
        for depth, values in parked.items():
            frame = _local.stack[depth]
            for name, value in values.items():
                if len(names) == 1:
                    frame.seen[name] = value
                    continue
                for i, own in enumerate(names):
                    own_name = own + name[len(prefix) :]
                    if paths.matches(frame.patterns, own_name):
                        frame.seen[own_name] = value[i]

    return wrapped, deliver
