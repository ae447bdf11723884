"""Zero-TPrune's choice of tokens behind one block; the paper, the equations and what they are for: `zero_tprune.py`.

Removed tokens are first masked, then cut out, so that the same functions serve a model that really drops tokens and a
search that only pretends to (`zero_tprune_search.py`), whose numbers are traced.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxformers import nn, sites
from jaxformers.kernels import attention as kernel

METHODS = ("zero_tprune", "i_stage", "s_stage", "cls_attention", "random")
PARTITIONS = ("sequential_u", "sequential_i", "alternate", "random", "none")
METRICS = ("cosine", "dot", "manhattan", "euclidean", "minkowski")
FEATURES = {"key": "attention.key.output", "query": "attention.query.output", "value": "attention.value.output",
            "x_pre": "input", "x": "output"}  # fmt: skip
Vote = Callable[[jax.Array], jax.Array]  # s (B, H, N) -> Aᵀ s


@dataclasses.dataclass(frozen=True)
class Stage:
    """A pruning layer behind ``block`` (counted from 1): ``remove`` = r tokens by similarity, then keep the share
    ``keep_rate`` = ρ of the rest (rounded down, at least one) by ``votes`` = T votes."""

    block: int
    remove: int = 0
    keep_rate: float = 1.0
    votes: int = 1


@dataclasses.dataclass(frozen=True)
class Options:
    """How tokens are chosen; how many, the schedule says.

    ``method``: "zero_tprune", or a baseline that keeps as many tokens: "i_stage" (importance alone), "s_stage"
    (similarity alone), "cls_attention" (the class token's mean attention), "random". ``cls_weighting``: "sqrtN" or
    "uniform" first votes. ``eir``: root mean square over heads, False: their mean. ``vhf`` with ``v_min``, ``v_max``:
    filter heads by variance (all stay where none passes), taken of scores whose mean ("mean_one") or sum ("sum_one")
    is 1. ``epsilon``: a graph's votes end when no score changes by as much; None: always T. ``partition``: which
    group S prunes from: "sequential_u" the less important half, "sequential_i" the more important one, "alternate"
    every second, "random", "none" all of them. ``feature``: what is compared ("key", "query", "value", the block's
    input "x_pre" or output "x") by ``metric`` ("cosine", "dot", and the distances "manhattan", "euclidean", "minkowski"
    of order ``p``). ``graph``: "matrix" votes by the matrix A, "column_sums" by the kernel that computes it anew,
    "auto" by what `kernels.attention` would choose.
    """

    method: str = "zero_tprune"
    cls_weighting: str = "sqrtN"
    eir: bool = True
    vhf: bool = True
    v_min: float = 0.01
    v_max: float = 0.7
    vhf_scale: str = "mean_one"
    epsilon: float | None = None
    partition: str = "sequential_u"
    feature: str = "key"
    metric: str = "cosine"
    p: float = 3.0
    graph: str = "auto"

    def __post_init__(self):
        for name, known in (
            ("method", METHODS), ("cls_weighting", ("sqrtN", "uniform")), ("vhf_scale", ("mean_one", "sum_one")),
            ("partition", PARTITIONS), ("feature", tuple(FEATURES)), ("metric", METRICS),
            ("graph", ("auto", "matrix", "column_sums")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 <= self.v_min <= self.v_max:
            raise ValueError(f"v_min, v_max: expected 0 ≤ v_min ≤ v_max, got {self.v_min} and {self.v_max}")
        if self.p < 1 or (self.epsilon is not None and self.epsilon < 0):
            raise ValueError(f"p, epsilon: expected p ≥ 1 and epsilon ≥ 0, got {self.p} and {self.epsilon}")
        if self.method == "cls_attention" and self.graph == "column_sums":
            raise ValueError("graph: the class token's attention is a row of the matrix; column sums do not give it")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Graph:
    """What a pruning layer sees of its block: ``features`` (B, N, d) to compare, ``alive`` (B, N) tokens that are
    still there (None: all), and the attention: ``matrix`` (B, H, N, N), or else ``query`` and ``key`` (B, N, H, size)
    with its ``scale``."""

    features: Float[Array, "batch tokens width"]
    matrix: Float[Array, "batch heads tokens tokens"] | None = None
    query: Float[Array, "batch tokens heads size"] | None = None
    key: Float[Array, "batch tokens heads size"] | None = None
    scale: float | None = dataclasses.field(metadata={"static": True}, default=None)
    alive: Bool[Array, "batch tokens"] | None = None


@dataclasses.dataclass(frozen=True)
class Counts:
    """A stage in numbers of image tokens: ``patches`` come in, ``remove`` go by similarity, ``keep`` are left, by
    ``votes`` votes. Integers, or traced ones: a search then compiles once."""

    patches: Any
    remove: Any
    keep: Any
    votes: Any

    @classmethod
    def of(cls, stage: Stage, patches: int) -> "Counts":
        return cls(patches, stage.remove, kept_patches(stage, patches), stage.votes)


def choose(
    graph: Graph, specials: int, counts: Counts, options: Options, key: jax.Array | None = None
) -> tuple[Bool[Array, "batch tokens"], Float[Array, "batch tokens"]]:
    """``(keep, score)``: which tokens a pruning layer keeps, and the scores of its last stage."""
    batch, length = graph.features.shape[:2]
    alive = jnp.ones((batch, length), bool) if graph.alive is None else graph.alive
    image = alive & (jnp.arange(length) >= specials)
    patches, remove = counts.patches, counts.remove
    best = lambda score, image: alive & (~image | (ranks(score, image) < counts.keep))
    if options.method == "random":
        score = jax.random.uniform(key, alive.shape)
        return best(score, image), score
    if options.method == "cls_attention":
        score = graph.matrix[:, :, 0].mean(1)
        return best(score, image), score
    if options.method == "i_stage":
        score, _, _ = importance(graph, alive, counts.votes, options)
        return best(score, image), score
    score, _, _ = importance(graph, alive, 1, options)  # I'
    remove = patches - counts.keep if options.method == "s_stage" else remove
    if not (isinstance(remove, int) and remove == 0):
        a, similarity = similar(graph.features, score, image, patches, options, key)
        alive &= ~removed(a, similarity, remove, length)
        image &= alive
    if options.method == "s_stage" or (isinstance(remove, int) and counts.keep == patches - remove):
        return alive, score
    score, _, _ = importance(graph, alive, counts.votes, options, subgraph=True)  # I
    return best(score, image), score


def importance(
    graph: Graph, alive: Bool[Array, "batch tokens"], votes: Any, options: Options, *, subgraph: bool = False
) -> tuple[Float[Array, "batch tokens"], Bool[Array, "batch heads"], Float[Array, "batch heads"]]:
    """``(score, η, scores of the heads)`` by ``votes`` votes among the tokens ``alive``; others have 0.

    ``subgraph``: tokens were removed since the attention was computed; its rows are made to sum to 1 again.
    """
    vote, heads = voting(graph, alive, subgraph)
    count = alive.sum(-1, keepdims=True)
    first = (
        jnp.where(jnp.arange(alive.shape[1]) == 0, jnp.sqrt(count), 1.0) if options.cls_weighting == "sqrtN" else 1.0
    )
    first = jnp.where(alive, first, 0.0)
    first = (first / first.sum(-1, keepdims=True)).astype(_wide(graph.features))
    s = jnp.broadcast_to(first[:, None], (first.shape[0], heads, first.shape[1]))

    def turn(_: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        s, done = state
        new = vote(s).astype(s.dtype)
        if options.epsilon is None:
            return new, done
        change = jnp.abs(new - s).max(-1, keepdims=True)
        return jnp.where(done, s, new), done | (change < options.epsilon)

    s, _ = jax.lax.fori_loop(0, votes, turn, (s, jnp.zeros((*s.shape[:2], 1), bool)))
    score, eta = aggregate(s, alive, options)
    return score, eta, s


def voting(graph: Graph, alive: Bool[Array, "batch tokens"], subgraph: bool) -> tuple[Vote, int]:
    """``(s -> Aᵀ s, heads)`` on the graph of the tokens ``alive``."""
    if graph.matrix is not None:
        A = graph.matrix
        if subgraph:
            A = jnp.where(alive[:, None, None], A, 0)
            total = A.sum(-1, keepdims=True)
            A = A / jnp.where(total > 0, total, 1)
        return lambda s: jnp.einsum("bhji,bhj->bhi", A, s, precision="highest"), A.shape[1]
    q, k, scale = graph.query, graph.key, graph.scale
    # softmax over the keys of the survivors is the attention among them with rows that sum to 1 again
    _, lse = kernel.attention(q, k, k, valid=alive, scale=scale, return_lse=True)
    return lambda s: kernel.column_sums(q, k, lse, s, valid=alive, scale=scale), q.shape[2]


def aggregate(
    s: Float[Array, "batch heads tokens"], alive: Bool[Array, "batch tokens"], options: Options
) -> tuple[Float[Array, "batch tokens"], Bool[Array, "batch heads"]]:
    """``(score, η)``: the heads' scores as one, and the heads that it is made of."""
    count, alive = alive.sum(-1)[:, None], alive[:, None]
    scaled = s * count[..., None] if options.vhf_scale == "mean_one" else s
    mean = scaled.sum(-1) / count
    variance = jnp.where(alive, jnp.square(scaled - mean[..., None]), 0).sum(-1) / count
    eta = (options.v_min <= variance) & (variance <= options.v_max)
    eta = eta | ~eta.any(-1, keepdims=True) if options.vhf else jnp.ones_like(eta)
    weight = (eta / eta.sum(-1, keepdims=True)).astype(s.dtype)[..., None]
    return (jnp.sqrt((weight * s**2).sum(1)) if options.eir else (weight * s).sum(1)), eta


def similar(
    features: Float[Array, "batch tokens width"],
    score: Float[Array, "batch tokens"],
    image: Bool[Array, "batch tokens"],
    patches: Any,
    options: Options,
    key: jax.Array | None = None,
) -> tuple[Int[Array, "batch a"], Float[Array, "batch a"]]:
    """The S stage: ``(A, m)``, positions of the tokens to prune from, the most important first, and their greatest
    similarity to a token of group B. Of n = ``patches`` tokens ``image``, |B| = ⌈n/2⌉."""
    length = image.shape[1]
    order = jax.random.uniform(key, image.shape) if options.partition == "random" else score
    rank = ranks(order, image)
    in_a = {
        "sequential_u": rank >= (patches + 1) // 2, "random": rank >= (patches + 1) // 2,
        "sequential_i": rank < patches // 2, "alternate": rank % 2 == 1, "none": rank >= 0,
    }[options.partition] & image  # fmt: skip
    in_b = image if options.partition == "none" else image & ~in_a
    sizes = (length, length)
    if isinstance(patches, int):
        sizes = (patches, patches) if options.partition == "none" else (patches // 2, (patches + 1) // 2)
    by_score = ranks(score, image)
    group = lambda mine, size: jnp.argsort(jnp.where(mine, by_score, length), axis=1, stable=True)[:, :size]
    a, b = group(in_a, sizes[0]), group(in_b, sizes[1])
    features = features.astype(_wide(features))
    x, y = (jnp.take_along_axis(features, i[..., None], 1) for i in (a, b))
    pairs = compare(x, y, options)
    allowed = jnp.take_along_axis(in_b, b, 1)[:, None] & (a[:, :, None] != b[:, None])
    most = jnp.where(allowed, pairs, -jnp.inf).max(-1)
    return a, jnp.where(jnp.take_along_axis(in_a, a, 1), most, -jnp.inf)


def removed(
    a: Int[Array, "batch a"], similarity: Float[Array, "batch a"], remove: Any, length: int
) -> Bool[Array, "batch tokens"]:
    """The ``remove`` tokens of ``a`` that are most similar, as a mask of the sequence. A stage cannot remove more than
    the group has."""
    hit = (ranks(similarity) < remove) & jnp.isfinite(similarity)
    rows = jnp.arange(a.shape[0])[:, None]
    return jnp.zeros((a.shape[0], length), bool).at[rows, a].set(hit)


def compare(
    x: Float[Array, "batch a width"], y: Float[Array, "batch b width"], options: Options
) -> Float[Array, "batch a b"]:
    """Similarity of each pair; distances are negated."""
    if options.metric in ("cosine", "dot"):
        dot = jnp.einsum("bid,bjd->bij", x, y, precision="highest")
        if options.metric == "dot":
            return dot
        return dot / jnp.maximum(_norm(x)[:, :, None] * _norm(y)[:, None], 1e-12)
    order = {"manhattan": 1.0, "euclidean": 2.0, "minkowski": options.p}[options.metric]
    distance = lambda pair: jnp.linalg.norm(pair[0][:, None] - pair[1][None], ord=order, axis=-1)
    return -jax.lax.map(distance, (x, y))  # an image at a time: all differences of a batch would fill the memory


def ranks(x: Float[Array, "batch n"], among: Bool[Array, "batch n"] | None = None) -> Int[Array, "batch n"]:
    """0 for the largest (of equal ones the first), 1 for the next, …; those not ``among`` them come last."""
    x = x if among is None else jnp.where(among, x, -jnp.inf)
    return jnp.argsort(jnp.argsort(-x, axis=1, stable=True), axis=1, stable=True)


def observed(block: nnx.Module, x: jax.Array, options: Options, alive: jax.Array | None = None) -> tuple[Any, Graph]:
    """Run a block and return its output and what its pruning layer sees of it."""
    attention, feature = block.attention, f"{block.path}.{FEATURES[options.feature]}"
    names = [f"{attention.path}.{name}.output" for name in ("query", "key")]
    matrix = options.method == "cls_attention" or options.graph == "matrix"
    if options.graph == "auto" and not matrix:
        size = (*x.shape[:2], attention.heads, attention.size)
        shapes = jax.ShapeDtypeStruct(size, x.dtype)
        how = kernel.choose(*kernel.operands(shapes, shapes, None), return_lse=True, worth=kernel.WORTH_SUMS)
        matrix = how == "xla"
    probs = f"{attention.path}.probs"
    mask = None if alive is None else nn.Mask(valid=alive)
    run = lambda: block(x, mask=mask)[0]
    out, seen = sites.reap(run, [feature, probs] if matrix else [feature, *names])()
    if matrix:
        return out, Graph(seen[feature], matrix=seen[probs], alive=alive)
    q, k = (seen[name].reshape(*x.shape[:2], attention.heads, attention.size) for name in names)
    return out, Graph(seen[feature], query=q, key=k, scale=attention.scale, alive=alive)


def kept_patches(stage: Stage, patches: int) -> int:
    """How many of ``patches`` image tokens a pruning layer keeps: ⌊ρ (n − r)⌋, at least one."""
    # 0.29 of 100 is 29, whatever binary fractions say
    return max(1, math.floor(stage.keep_rate * (patches - stage.remove) + 1e-9))


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(x).sum(-1))


def _wide(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
