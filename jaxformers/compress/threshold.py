"""The k smallest of very many scores, exactly, with ties decided by place: by bisection, without sorting or joining.

A score becomes an unsigned *key* whose order is that of the score: the bit pattern of a float that is not negative. The
k-th smallest key is found bit by bit, from the highest: a bit belongs to it when fewer than k keys lie below what the
bits so far and this one make. Each pass counts, and counting needs neither the arrays of a model side by side nor on
one device: sharded arrays are counted where they lie. Cost: one pass over the data for each bit.

Among equal scores those that come first are the smaller ones: the first array, then the lowest flat index of a weight
as checkpoints hold it, (out, in). Kernels here are (in, out).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt


def keys(scores: Float[Array, "*shape"], kept: Bool[Array, "*shape"] | None = None) -> UInt[Array, "*shape"]:
    """Unsigned keys in the order of ``|scores|``; 0, below all others, where ``kept`` is False. NaN comes last."""
    scores = jnp.abs(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)))
    pattern = jax.lax.bitcast_convert_type(scores, jnp.dtype(f"uint{8 * scores.dtype.itemsize}"))
    return pattern if kept is None else jnp.where(kept, pattern + 1, 0)


def kth_key(keys: UInt[Array, "in out"], k: Array | int, axis: int | None = None) -> Array:
    """The k-th smallest key, counted from 1, of all (a scalar) or along ``axis``. ``k`` (int32) may be traced."""

    def settle(low: Array, high: Array) -> Array:
        below = jnp.sum(keys < (high if axis is None else jnp.expand_dims(high, axis)), axis=axis, dtype=jnp.int32)
        return jnp.where(below < k, high, low)

    shape = () if axis is None else tuple(np.delete(keys.shape, axis))
    return _bisect(settle, jnp.zeros(shape, keys.dtype))


def _bisect(settle: object, start: Array) -> Array:
    """From the highest bit on, ``settle(low, low with the bit)`` says which of both the next bits build on."""
    bits = 8 * start.dtype.itemsize
    one = jnp.ones((), start.dtype)
    bit = lambda i, low: settle(low, low | (one << (bits - 1 - i).astype(start.dtype)))  # noqa: E731
    return jax.lax.fori_loop(0, bits, bit, start)


@jax.jit
def smallest_of_columns(keys: UInt[Array, "in out"], k: Array | int) -> Bool[Array, "in out"]:
    """True at exactly ``k`` entries of each output: those with the smallest keys, of equal ones the first inputs."""
    limit = kth_key(keys, k, axis=0)
    below, ties = keys < limit, keys == limit
    room = k - jnp.sum(below, axis=0, dtype=jnp.int32)
    first = lambda: ties & (jnp.cumsum(ties, axis=0, dtype=jnp.int32) <= room)  # noqa: E731
    crowded = jnp.any(jnp.sum(ties, axis=0, dtype=jnp.int32) > room)
    return (below | jax.lax.cond(crowded, first, lambda: ties)) & (k > 0)


@functools.partial(jax.jit, static_argnames=("drop", "m"))
def smallest_of_groups(keys: UInt[Array, "in out"], drop: int, m: int) -> Bool[Array, "in out"]:
    """True at the ``drop`` smallest keys of each ``m`` consecutive inputs of an output, of equal ones the first.

    A last group with fewer than ``m`` inputs loses ``drop`` as well; it must have as many.
    """
    n = len(keys)
    grouped = jnp.pad(keys, ((0, -n % m), (0, 0)), constant_values=jnp.array(jnp.iinfo(keys.dtype).max, keys.dtype))
    grouped = grouped.reshape(-1, m, keys.shape[1])
    rank = sum(  # how many of its group come before an entry
        (other < grouped) | ((other == grouped) & (j < jnp.arange(m)[None, :, None]))
        for j in range(m)
        for other in [grouped[:, j : j + 1]]
    )
    return (rank < drop).reshape(-1, keys.shape[1])[:n]


def smallest_of_all(keys: Sequence[UInt[Array, "in out"]], k: int) -> list[Bool[Array, "in out"]]:
    """True at exactly ``k`` entries of all matrices together: those with the smallest keys, of equal ones the first.

    Each matrix has fewer than 2^31 entries, their number together may be larger: the host adds up what each counts, and
    chooses the next bit. Compiled once per shape of a matrix, whatever ``k`` and however many there are.
    """
    dtype = np.dtype(functools.reduce(jnp.promote_types, [a.dtype for a in keys]))
    keys = [a.astype(dtype) for a in keys]
    below = lambda limit: [int(n) for n in jax.device_get([_below(a, dtype.type(limit)) for a in keys])]  # noqa: E731
    limit = 0
    for bit in reversed(range(8 * dtype.itemsize)):
        if sum(below(limit | 1 << bit)) < k:
            limit |= 1 << bit
    room = k - sum(below(limit))  # for keys equal to the limit
    found = []
    for a, ties in zip(keys, jax.device_get([_equal(a, dtype.type(limit)) for a in keys]), strict=True):
        found.append(_removed(a, dtype.type(limit), np.int32(min(max(room, 0), int(ties)))))
        room -= int(ties)
    return found


@jax.jit
def _below(keys: Array, limit: Array) -> Array:
    return jnp.sum(keys < limit, dtype=jnp.int32)


@jax.jit
def _equal(keys: Array, limit: Array) -> Array:
    return jnp.sum(keys == limit, dtype=jnp.int32)


@jax.jit
def _removed(keys: Array, limit: Array, room: Array) -> Array:
    return (keys < limit) | _first(keys == limit, room)


def _first(ties: Bool[Array, "in out"], room: Array) -> Bool[Array, "in out"]:
    """The first ``room`` true entries in the order (out, in): all of the first outputs, and a part of one."""
    count = jnp.sum(ties, axis=0, dtype=jnp.int32)
    upto = jnp.cumsum(count)
    whole = upto <= room
    part = jnp.argmin(whole)  # the first output that is not taken whole
    own = ties & (jnp.arange(ties.shape[1]) == part) & ~whole[part]
    own = own & (jnp.cumsum(own.any(axis=1), dtype=jnp.int32) <= room - (upto - count)[part])[:, None]
    return (ties & whole) | own
