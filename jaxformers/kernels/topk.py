"""Inner products and a running top-k in one pass: the n × m scores are never written.

Exact: every pair is scored, equal scores go to the lower key index. FLOPs 2·n·m·D; bytes n·D + ⌈n/tile⌉·m·D elements
and splits·n·k candidates, against another 4·n·m written and read by a product followed by ``lax.top_k``.

A program holds a tile of queries and walks its share of the keys. Of each tile of scores it takes out the rows' maxima
for as long as one of them beats its row's k-th best; after the first tiles that is seldom. The k candidates of all
shares are merged at the end by (score, index). The float32 products are three TF32 passes on a GPU, six bfloat16 passes
on a TPU: float32 to within rounding.

:func:`choose`: a GPU, from ``WORTH`` keys on and up to ``MOST`` results a query; XLA elsewhere.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxformers.kernels.decode import exact_precision
from jaxformers.kernels.lazy import pl, plgpu, pltpu
from jaxformers.kernels.tiles import dot, partitioned, platform

WORTH = 4096  # keys from which the kernel is worth its start
MOST = 64  # results a query: each costs a pass over the first tiles
PROGRAMS = 264  # enough to fill a large GPU twice


@dataclasses.dataclass(frozen=True)
class Tile:
    """Queries, keys and columns of a step; the shares of the keys (None: as many as fill the GPU); warps; stages."""

    queries: int = 64
    keys: int = 128
    columns: int = 32
    splits: int | None = None
    warps: int = 4
    stages: int = 3


def topk(
    queries: jax.Array,
    keys: jax.Array,
    k: int,
    *,
    count: jax.Array | int | None = None,
    implementation: str | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(scores float32, indices int32), (n, k): the k of ``keys`` (m, D) of largest inner product with each of
    ``queries`` (n, D), descending.

    ``count``: only so many keys are real (the rest is padding; it may be traced, and must be at least k).
    ``implementation``: None (:func:`choose`), "xla", "pallas_gpu" or "pallas_tpu".

    Raises ValueError for shapes or a k that do not fit.
    """
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(f"queries (n, D) and keys (m, D) must have one width, got {queries.shape} and {keys.shape}")
    if not 1 <= k <= len(keys):
        raise ValueError(f"k: expected 1..{len(keys)} (the number of keys), got {k}")
    implementation = implementation or choose(len(keys), k)
    count = jnp.asarray(len(keys) if count is None else count, jnp.int32)
    if implementation == "xla":
        return reference(queries, keys, k, count)
    if implementation == "pallas_gpu":
        return _gpu(queries, keys, k, count, tile or Tile(), interpret)
    if implementation == "pallas_tpu":
        return _tpu(queries, keys, k, count, tile or Tile(256, 512), interpret)
    raise ValueError(f"implementation: expected xla, pallas_gpu or pallas_tpu, got {implementation!r}")


def choose(keys: int, k: int) -> str:
    """The implementation on the platform that is compiled for."""
    fits = keys >= WORTH and k <= MOST and not partitioned()
    return "pallas_gpu" if platform() == "gpu" and fits else "xla"


def reference(queries, keys, k: int, count):
    """The definition: all scores at once."""
    scores = jnp.matmul(queries, keys.T, precision="highest", preferred_element_type=jnp.float32)
    return jax.lax.top_k(jnp.where(jnp.arange(len(keys)) < count, scores, -jnp.inf), k)


def merge(scores: jax.Array, indices: jax.Array, k: int):
    """The k best of c candidates, equal scores by index."""
    scores, indices = jax.lax.sort((-scores, indices), num_keys=2)
    return -scores[:, :k], indices[:, :k]


def bounds(scores, best):
    """Each row's largest new score and its worst candidate, and whether any of the former beats the latter."""
    top, worst = scores.max(axis=1, keepdims=True), best.min(axis=1, keepdims=True)
    return top, worst, (top > worst).astype(jnp.int32).max(axis=1).max(axis=0)


def exchange(scores, best, indices, top, worst, offset):
    """One round: where a row's largest of ``scores`` (rows, keys) beats its worst of ``best`` (rows, slots), it takes
    that place. The first key has index ``offset``. The candidates are in no order; of equals the worst is that of the
    largest index. Slots from k on hold infinity."""
    column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    at = jnp.where(scores == top, column, scores.shape[1]).min(axis=1, keepdims=True)
    last = jnp.where(best == worst, indices, -(1 << 30)).max(axis=1, keepdims=True)
    hit = (best == worst) & (indices == last) & (top > worst)
    best, indices = jnp.where(hit, top, best), jnp.where(hit, at + offset, indices)
    return jnp.where(column == at, -jnp.inf, scores), best, indices


def take(scores, offset, best, indices):
    """:func:`exchange` until no new score beats a candidate: (best, indices)."""

    def body(carry):
        scores, best, indices = exchange(*carry[:5], offset)
        return (scores, best, indices, *bounds(scores, best))

    start = (scores, best, indices, *bounds(scores, best))
    return jax.lax.while_loop(lambda carry: carry[5] > 0, body, start)[1:3]


def empty(rows: int, slots: int, k: int):
    """No candidates yet: −∞ at negative indices, all different; infinity in the slots from k on."""
    slot = jax.lax.broadcasted_iota(jnp.int32, (rows, slots), 1)
    return jnp.where(slot < k, -jnp.inf, jnp.inf).astype(jnp.float32), -1 - slot


def _gpu_kernel(
    q_ref, k_ref, count_ref, score_ref, index_ref, *, tile: Tile, n: int, m: int, width: int, k: int, exact
):
    block, share = pl.program_id(0), pl.program_id(1)
    rows = block * tile.queries + jnp.arange(tile.queries)
    steps = pl.cdiv(pl.cdiv(m, tile.keys), tile.splits)
    slots = pl.next_power_of_2(k)

    def step(j, carry):
        index = j * tile.keys + jnp.arange(tile.keys)

        def product(d, scores):
            columns = d * tile.columns + jnp.arange(tile.columns) < width
            at = pl.ds(d * tile.columns, tile.columns)
            q = plgpu.load(
                q_ref.at[pl.ds(block * tile.queries, tile.queries), at],
                mask=(rows < n)[:, None] & columns[None, :],
                other=0.0,
            )
            key = plgpu.load(
                k_ref.at[pl.ds(j * tile.keys, tile.keys), at], mask=(index < m)[:, None] & columns[None, :], other=0.0
            )
            return scores + dot(q, key, trans_b=True, precision=exact)

        scores = jnp.zeros((tile.queries, tile.keys), jnp.float32)
        scores = jax.lax.fori_loop(0, pl.cdiv(width, tile.columns), product, scores)
        scores = jnp.where((index < count_ref[0])[None, :] & (rows < n)[:, None], scores, -jnp.inf)
        return take(scores, j * tile.keys, *carry)

    first = share * steps
    last = jnp.minimum(first + steps, pl.cdiv(m, tile.keys))
    best, indices = jax.lax.fori_loop(first, last, step, empty(tile.queries, slots, k))
    inside = (rows < n)[:, None] & (jnp.arange(slots) < k)[None, :]
    at = pl.ds(block * tile.queries, tile.queries), pl.ds(0, slots)
    plgpu.store(score_ref.at[*at], best, mask=inside)
    plgpu.store(index_ref.at[*at], indices, mask=inside)


@functools.partial(jax.jit, static_argnames=("k", "tile", "interpret"))
def _gpu(queries, keys, k: int, count, tile: Tile, interpret: bool):
    (n, width), m = queries.shape, len(keys)
    blocks, steps = pl.cdiv(n, tile.queries), pl.cdiv(m, tile.keys)
    splits = min(tile.splits or max(1, PROGRAMS // blocks), steps)
    tile = dataclasses.replace(tile, splits=splits)
    slots, columns = pl.next_power_of_2(k), pl.cdiv(width, tile.columns) * tile.columns
    shape = lambda dtype: jax.ShapeDtypeStruct((splits, n, k), dtype)
    out = pl.BlockSpec((None, blocks * tile.queries, slots), lambda i, s: (s, 0, 0))
    scores, indices = pl.pallas_call(
        functools.partial(
            _gpu_kernel, tile=tile, n=n, m=m, width=width, k=k, exact=exact_precision(keys.dtype, interpret)
        ),
        grid=(blocks, splits),
        in_specs=[
            pl.BlockSpec((blocks * tile.queries, columns), lambda i, s: (0, 0)),
            pl.BlockSpec((steps * tile.keys, columns), lambda i, s: (0, 0)),
            pl.BlockSpec((1,), lambda i, s: (0,)),
        ],
        out_specs=[out, out],
        out_shape=[shape(jnp.float32), shape(jnp.int32)],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="topk_kernel",
    )(queries, keys, count.reshape(1))
    flat = lambda a: jnp.moveaxis(a, 0, 1).reshape(n, splits * k)
    return merge(flat(scores), flat(indices), k)


def _tpu_kernel(count_ref, q_ref, k_ref, score_ref, index_ref, scores_ref, *, k: int, exact):
    """The grid's last axis walks over the keys; the candidates stay in VMEM."""
    j = pl.program_id(1)
    rows, keys = scores_ref.shape

    @pl.when(j == 0)
    def _():
        score_ref[...], index_ref[...] = empty(rows, score_ref.shape[1], k)

    index = j * keys + jax.lax.broadcasted_iota(jnp.int32, (rows, keys), 1)
    product = dot(q_ref[...], k_ref[...], trans_b=True, precision=exact)
    scores_ref[...] = jnp.where(index < count_ref[0], product, -jnp.inf)

    def body(_):
        top, worst, _ = bounds(scores_ref[...], score_ref[...])
        found = exchange(scores_ref[...], score_ref[...], index_ref[...], top, worst, j * keys)
        scores_ref[...], score_ref[...], index_ref[...] = found
        return bounds(scores_ref[...], score_ref[...])[2]

    jax.lax.while_loop(lambda more: more > 0, body, bounds(scores_ref[...], score_ref[...])[2])


@functools.partial(jax.jit, static_argnames=("k", "tile", "interpret"))
def _tpu(queries, keys, k: int, count, tile: Tile, interpret: bool):
    (n, width), m = queries.shape, len(keys)
    slots = pl.cdiv(k, 128) * 128
    edge = min(tile.queries, pl.cdiv(n, 8) * 8), min(tile.keys, pl.cdiv(m, 128) * 128)
    blocks, steps = pl.cdiv(n, edge[0]), pl.cdiv(m, edge[1])
    exact = "highest" if keys.dtype == jnp.float32 else None
    at = lambda i, j, *_: (i, 0)
    scores, indices = pl.pallas_call(
        functools.partial(_tpu_kernel, k=k, exact=exact),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks, steps),
            in_specs=[pl.BlockSpec((edge[0], width), at), pl.BlockSpec((edge[1], width), lambda i, j, *_: (j, 0))],
            out_specs=[pl.BlockSpec((edge[0], slots), at)] * 2,
            scratch_shapes=[pltpu.VMEM(edge, jnp.float32)],
        ),
        out_shape=[jax.ShapeDtypeStruct((blocks * edge[0], slots), t) for t in (jnp.float32, jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="topk_kernel",
    )(
        count.reshape(1),
        jnp.pad(queries, ((0, blocks * edge[0] - n), (0, 0))),
        jnp.pad(keys, ((0, steps * edge[1] - m), (0, 0))),
    )
    return merge(scores[:n, :k], indices[:n, :k], k)
