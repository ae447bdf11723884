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
    """The k-th smallest key, counted from 1, of all (a scalar) or along ``axis``. ``k`` may be traced, and fits int32."""

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


@functools.partial(jax.jit, static_argnames="k")
def smallest_of_columns(keys: UInt[Array, "in out"], k: int) -> Bool[Array, "in out"]:
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

    Each matrix has fewer than 2^31 entries, their number together may be larger. Compiled once per set of shapes,
    whatever ``k``.
    """
    dtype = functools.reduce(jnp.promote_types, [a.dtype for a in keys])
    return _smallest_of_all([a.astype(dtype) for a in keys], jnp.asarray([k >> 16, k & 0xFFFF], jnp.uint32))


@jax.jit
def _smallest_of_all(keys: list[Array], k: Array) -> list[Array]:
    def counted(hits: list[Array]) -> list[Array]:
        return [jnp.sum(h, dtype=jnp.int32) for h in hits]

    def settle(low: Array, high: Array) -> Array:
        return jnp.where(_less(_total(counted([a < high for a in keys])), k), high, low)

    limit = _bisect(settle, jnp.zeros((), keys[0].dtype))
    found, before = [], _total(counted([a < limit for a in keys]))  # removed by all smaller keys, then by ties so far
    for a in keys:
        ties = a == limit
        n = jnp.sum(ties, dtype=jnp.int32)
        room = _difference(k, before)
        found.append((a < limit) | _first(ties, jnp.minimum(room, n)))
        before = _total([n], before)
    return found


def _first(ties: Bool[Array, "in out"], room: Array) -> Bool[Array, "in out"]:
    """The first ``room`` true entries in the order (out, in): all of the first outputs, and a part of one."""
    count = jnp.sum(ties, axis=0, dtype=jnp.int32)
    upto = jnp.cumsum(count)
    whole = upto <= room
    part = jnp.argmin(whole)  # the first output that is not taken whole
    own = ties & (jnp.arange(ties.shape[1]) == part) & ~whole[part]
    own = own & (jnp.cumsum(own.any(axis=1), dtype=jnp.int32) <= room - (upto - count)[part])[:, None]
    return (ties & whole) | own


# Counts beyond 2^31 as two numbers of 16 bits and more: (high, low), the low one below 2^16. Exact up to 2^47.


def _total(counts: list[Array], start: Array | None = None) -> Array:
    parts = jnp.stack(counts).astype(jnp.uint32)
    high, low = jnp.sum(parts >> 16, dtype=jnp.uint32), jnp.sum(parts & 0xFFFF, dtype=jnp.uint32)
    if start is not None:
        high, low = high + start[0], low + start[1]
    return jnp.stack([high + (low >> 16), low & 0xFFFF])


def _less(a: Array, b: Array) -> Array:
    return (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))


def _difference(a: Array, b: Array) -> Array:
    """``a - b`` as int32, 0 where it is negative, and at most 2^31 - 1."""
    high, low = (x.astype(jnp.int32) - y.astype(jnp.int32) for x, y in zip(a, b, strict=True))
    high, low = high - (low < 0), low + 0x10000 * (low < 0)
    return jnp.where(high < 0, 0, jnp.where(high > 0x7FFF, jnp.int32(2**31 - 1), high * 0x10000 + low))
