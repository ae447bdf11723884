"""Exact nearest neighbours by inner product, in blocks: no n x m matrix is ever built.

The left rows (queries) go by in blocks; for each block the right rows (keys) are scanned in blocks, and only a running
top-k of (score, index) is kept. All products run in float32 at the highest matmul precision. Ties go to the lower key
index. With unit vectors the inner product is the cosine.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from jaxformers.kernels import topk as kernel

DENSE_ELEMENTS = 1 << 24  # scores held at a time when the keys are not cut into blocks: 64 MB


def normalize(x: ArrayLike, eps: float = 1e-12) -> np.ndarray:
    """Rows of (n, D) scaled to unit length; the norm is clipped at eps from below, so that a zero row stays zero."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.float32(eps))


def topk(
    queries: ArrayLike,
    keys: ArrayLike,
    k: int,
    *,
    query_block: int = 1024,
    key_block: int | None = 8192,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k keys of largest inner product for each query: (scores (n, k) float32, indices (n, k) int64), descending.

    queries (n, D), keys (m, D); 1 <= k <= m. `key_block=None` scores a block of queries against all keys at once (fast
    for small tables), otherwise memory is query_block x key_block scores. Results do not depend on the blocks.
    With a `mesh` each device holds a slice of the keys and a running top-k; then the devices' candidates are merged.
    """
    queries, keys = _check(queries, keys)
    n, m = len(queries), len(keys)
    if not isinstance(k, (int, np.integer)) or not 1 <= k <= m:
        raise ValueError(f"k must be an integer in 1..{m} (the number of keys), got {k!r}")
    _check_blocks(query_block, key_block)
    if key_block is None:
        query_block = min(query_block, max(1, DENSE_ELEMENTS // _bucket(m)))
    stacked = _blocks(keys, key_block, 1 if mesh is None else mesh.size)  # (blocks, block, D)
    stacked = jax.device_put(stacked, None if mesh is None else NamedSharding(mesh, P(mesh.axis_names)))
    scores, indices = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    for start, block, size in _query_blocks(queries, query_block):
        s, i = _topk_block(block, stacked, m, int(k), mesh)
        scores[start : start + size], indices[start : start + size] = np.asarray(s)[:size], np.asarray(i)[:size]
    return scores, indices


def range_search(
    queries: ArrayLike,
    keys: ArrayLike,
    threshold: float,
    *,
    query_block: int = 1024,
    key_block: int | None = 8192,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs with inner product >= threshold: (query index, key index, score), by query, then descending score.

    Equal scores of a query are in key order. Memory is one block of scores and the pairs found.
    """
    n = len(np.asarray(queries))
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
    found += list(range_blocks(queries, keys, threshold, query_block=query_block, key_block=key_block))
    q, i, s = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.lexsort((i, -s, q)) if n else slice(None)
    return q[order], i[order], s[order]


def range_blocks(
    queries: ArrayLike,
    keys: ArrayLike,
    threshold: float,
    *,
    query_block: int = 1024,
    key_block: int | None = 8192,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The pairs of `range_search` block by block and unsorted, for callers that need not hold them all."""
    queries, keys = _check(queries, keys)
    _check_blocks(query_block, key_block)
    if key_block is None:
        query_block = min(query_block, max(1, DENSE_ELEMENTS // _bucket(max(len(keys), 1))))
    stacked = jnp.asarray(_blocks(keys, key_block))
    for start, block, size in _query_blocks(queries, query_block):
        for b in range(len(stacked)):
            offset = b * stacked.shape[1]
            scores = np.asarray(_scores(block, stacked[b]))[:size, : len(keys) - offset]
            q, i = np.nonzero(scores >= np.float32(threshold))
            yield q + start, i + offset, scores[q, i]


# ------------------------------------------------------------------------------------------------------- private


@jax.jit
def _scores(queries: Float[Array, "n D"], keys: Float[Array, "m D"]) -> Float[Array, "n m"]:
    return jnp.matmul(queries, keys.T, precision="highest")


def _running_topk(queries: Float[Array, "n D"], keys: Float[Array, "blocks block D"], start: Any, m: int, k: int):
    """(scores, indices) (n, k) over key blocks, the first key having index `start`.

    On a GPU one kernel does it (`kernels/topk.py`), elsewhere a scan over the blocks.

    Kept candidates stand before the new ones and top_k prefers the earlier of equals, so equal scores keep the order of
    their indices.
    """
    n, (blocks, block, width) = len(queries), keys.shape
    if kernel.choose(blocks * block, k) != "xla" and k <= blocks * block:
        scores, indices = kernel.topk(queries, keys.reshape(-1, width), k, count=jnp.clip(m - start, 0, blocks * block))
        return scores, jnp.where(scores > -jnp.inf, indices + start, -1)
    column = jnp.arange(block)

    def merge(best, item):
        offset, keys_b = item
        scores = jnp.where(offset + column < m, _scores(queries, keys_b), -jnp.inf)  # padded keys never win
        new_scores, new_column = jax.lax.top_k(scores, min(k, block))
        scores = jnp.concatenate([best[0], new_scores], 1)
        indices = jnp.concatenate([best[1], offset + new_column], 1)
        scores, place = jax.lax.top_k(scores, k)
        return (scores, jnp.take_along_axis(indices, place, 1)), None

    none = (jnp.full((n, k), -jnp.inf), jnp.full((n, k), -1, jnp.int32))
    return jax.lax.scan(merge, none, (start + jnp.arange(len(keys)) * block, keys))[0]


@partial(jax.jit, static_argnames=("k", "mesh"))
def _topk_block(queries: jax.Array, keys: jax.Array, m: int, k: int, mesh: Mesh | None = None):
    if mesh is None:
        return _running_topk(queries, keys, 0, m, k)
    axes = mesh.axis_names

    def local(queries, keys):
        start = jax.lax.axis_index(axes) * keys.shape[0] * keys.shape[1]
        # candidates side by side in the order of the devices, which is that of the indices
        found = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in _running_topk(queries, keys, start, m, k))
        scores, indices = found
        scores, place = jax.lax.top_k(scores, k)
        return scores, jnp.take_along_axis(indices, place, 1)

    return jax.shard_map(local, mesh=mesh, in_specs=(P(), P(axes)), out_specs=P(), check_vma=False)(queries, keys)


def _check(queries: ArrayLike, keys: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    queries, keys = np.asarray(queries, np.float32), np.asarray(keys, np.float32)
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(f"queries (n, D) and keys (m, D) must have one width, got {queries.shape} and {keys.shape}")
    for name, x in (("queries", queries), ("keys", keys)):
        if not np.isfinite(x).all():
            raise ValueError(f"{name} must be finite: row {np.argwhere(~np.isfinite(x))[0, 0]} holds NaN or infinity")
    return queries, keys


def _check_blocks(query_block: int, key_block: int | None) -> None:
    if query_block < 1 or (key_block is not None and key_block < 1):
        raise ValueError(f"query_block and key_block must be >= 1, got {query_block} and {key_block}")


def _bucket(n: int) -> int:
    """Next power of two from 8 on: few different shapes are ever compiled."""
    return max(8, 1 << (n - 1).bit_length())


def _blocks(x: np.ndarray, block: int | None, ways: int = 1) -> np.ndarray:
    """(m, D) -> (blocks, block, D), zero rows behind; the number of blocks is a multiple of `ways`."""
    share = _bucket(-(-len(x) // ways))
    size = share if block is None else min(block, share)
    count = -(-len(x) // (size * ways)) * ways
    padded = np.zeros((count * size, x.shape[1]), np.float32)
    padded[: len(x)] = x
    return padded.reshape(count, size, x.shape[1])


def _query_blocks(queries: np.ndarray, block: int) -> Iterator[tuple[int, jax.Array, int]]:
    """(start, padded block, rows that count)."""
    if len(queries):
        size = min(block, _bucket(len(queries)))
        for i, rows in enumerate(_blocks(queries, size)):
            yield i * size, jnp.asarray(rows), min(size, len(queries) - i * size)
