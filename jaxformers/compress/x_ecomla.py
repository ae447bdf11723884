"""X-EcoMLA: multi-head latent attention in place of a pretrained decoder's, for a cache several times smaller.

"X-EcoMLA: Upcycling Pre-Trained Attention into MLA for Efficient and Extreme KV Compression" (arXiv 2503.11132); the
module is :class:`jaxformers.nn.LatentAttention`, whose docstring has its equations. With H query heads, n_kv key/value
heads of size d_h, g = H / n_kv, matrices (out, in), and ranks r_q and r_kv, the layer is initialised by two SVDs:

    W_q = U S Vt                W_qd  = S_r Vt_r,               W_qu  = per head rows [first d_n | last d_r] of U_r
    [K; V] = U S Vt             W_kvd = [S_r Vt_r; mean over the n_kv heads of W_k's last d_r rows]
                                W_kvu = per head [first d_n rows of U_r's K part | U_r's V part]

where K and V are W_k and W_v with each head repeated g times. Their SVD is that of sqrt(g) [W_k; W_v], whose U has its
rows repeated and divided by sqrt(g): g times fewer rows. A rank may be chosen by energy: how many of the first
sums of squared singular values stay within the share delta of the whole. At full rank values, queries and the unrotated
part of keys are those of the source. Positions are not (fewer dimensions rotate, and one key rotates for all heads):
the layer needs training, by `jaxformers.train.distil.distil_logits` and then `jaxformers.train.preference.dpo`.

    small = jf.compress.upcycle_mla(model, kv_rank=128, query_rank=1344, d_n=32, d_r=32)
    small = distil_logits(model, small, batches, TrainConfig(steps=...), key=key).model
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from jaxformers import nn, surgery
from jaxformers.compress.x_ecomla_init import Matrices, Sizes, matrix, random_matrices, svd_kv, svd_query
from jaxformers.nn.keys import Keys
from jaxformers.nn.mla import DECODE

RECORD = "jaxformers.compress.x_ecomla:abstract_mla"
LAYOUTS = ("interleaved", "half")
INITS = ("svd", "random")


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What became of one layer's attention.

    ``query_rank`` None: queries are projected at once. Errors are relative Frobenius norms, of what the new layer
    computes for its heads against the same rows of the source: ``query_error``, ``key_error`` (the unrotated part),
    ``value_error``, and ``kv_error`` of the last two together. ``cache``: numbers a token that the layer keeps,
    ``cache_before`` what the source kept.
    """

    layer: int
    query_rank: int | None
    kv_rank: int
    query_error: float
    key_error: float
    value_error: float
    kv_error: float
    cache: int
    cache_before: int


def report_table(reports: Sequence[LayerReport]) -> str:
    """The reports of one call as a table, the ratio of the caches of these layers last."""
    table = Table(title="upcycled layers", title_justify="left")
    for column in ("layer", "r_q", "r_kv", "cache", "of", "error of q", "of k", "of v"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in reports:
        counts = (str(n) for n in (r.layer, r.query_rank or "–", r.kv_rank, r.cache, r.cache_before))
        table.add_row(*counts, *(f"{e:.3f}" for e in (r.query_error, r.key_error, r.value_error)))
    now, before = (sum(getattr(r, name) for r in reports) for name in ("cache", "cache_before"))
    table.caption = f"cache of these layers: {now / before:.1%}"
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def upcycle_mla(
    model: nnx.Module,
    *,
    d_n: int,
    d_r: int,
    kv_rank: int | None = None,
    query_rank: int | None = None,
    kv_energy: float | None = None,
    query_energy: float | None = None,
    fixed_ends: bool = True,
    mla_layers: Sequence[int] | None = None,
    d_v: int | None = None,
    rope_layout: str = "interleaved",
    latent_norm: bool = False,
    init: str = "svd",
    rank_divisor: int = 8,
    original_length: int = 4096,
    decode: str = "absorbed",
    key: jax.Array | None = None,
    report: list[LayerReport] | None = None,
) -> nnx.Module:
    """A copy of ``model`` with latent attention in the layers ``mla_layers`` (None: all); the old model is untouched.

    ``d_n``, ``d_r``: sizes of a head's parts without and with rotary positions. ``kv_rank``, ``query_rank``: the ranks;
    a query rank of None projects queries at once. ``kv_energy``, ``query_energy`` choose a rank for each layer instead,
    by the share of energy in (0, 1], rounded up to a multiple of ``rank_divisor``; the first and the last layer of the
    model keep the fixed ranks where ``fixed_ends`` says so. ``rope_layout``: pairs of rotated dimensions are neighbours
    ("interleaved", as published checkpoints have them) or halves apart ("half"). ``latent_norm``: RMSNorm on both
    latents (it breaks the equality at full rank). ``init``: "svd", or "random", uniform within 1/sqrt(inputs), which
    needs ``key``. Stretched positions of the source become YaRN with its factor over ``original_length``
    (arXiv 2309.00071). ``decode``: see :func:`with_decode`. ``report`` receives a :class:`LayerReport` for each layer.

    ``out``, MLP, norms, embeddings and head are the source's. Quantised or low-rank-updated projections are taken as
    the matrices that they stand for. Ranks are recorded, so that the copy saves and loads.

    Raises ValueError: a rank that its matrix does not have or that is no multiple of the divisor; d_n or d_r above the
    head's size, an odd d_r, d_v other than it; a layer that is not there, twice, or no plain attention with rotary
    positions and without biases; an energy outside (0, 1]; a missing rank or key.
    """
    chosen = _checked_layers(model, mla_layers)
    words = (("rope_layout", rope_layout, LAYOUTS), ("init", init, INITS), ("decode", decode, DECODE))
    for name, value, known in words:
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    if rank_divisor < 1:
        raise ValueError(f"rank_divisor: expected 1 or more, got {rank_divisor}")
    if (key is None) == (init == "random"):
        raise ValueError("key: init='random' draws with it, init='svd' draws nothing")
    for name, energy in (("kv_energy", kv_energy), ("query_energy", query_energy)):
        if energy is not None and not 0 < energy <= 1:
            raise ValueError(f"{name}: expected a share in (0, 1], got {energy}")
        if energy is not None and init == "random":
            raise ValueError(f"{name}: there is no energy to choose by when init='random'; give the rank")
    last = len(model.layers) - 1
    plans = {}
    for i in chosen:
        attention = model.layers[i].attention
        _check_attention(f"layers.{i}.attention", attention, d_n, d_r, d_v, model.config)
        fixed = fixed_ends and i in (0, last)
        limits = _limits(attention)
        plans[i] = (
            None if query_energy is not None and not fixed else
            _checked_rank("query_rank", query_rank, limits[0], rank_divisor, needed=query_energy is not None, layer=i),
            None if kv_energy is not None and not fixed else
            _checked_rank("kv_rank", kv_rank, limits[1], rank_divisor, needed=True, layer=i),
        )  # fmt: skip

    ranks, values = {}, {}
    for i in chosen:
        attention, (r_q, r_kv) = model.layers[i].attention, plans[i]
        W_q, W_k, W_v = (matrix(getattr(attention, name)) for name in ("query", "key", "value"))
        sizes = Sizes(attention.heads, attention.kv_heads, attention.size, d_n, d_r)
        if init == "svd":
            fixed = fixed_ends and i in (0, last)
            r_q, query = svd_query(W_q, sizes, r_q, None if fixed else query_energy, rank_divisor)
            r_kv, kv = svd_kv(W_k, W_v, sizes, r_kv, None if fixed else kv_energy, rank_divisor)
            new = query | kv
        else:
            new = random_matrices(sizes, W_q.shape[1], r_q, r_kv, jax.random.fold_in(key, i))
        dtype = attention.query.kernel.get_value().dtype
        ranks[str(i)], values[i] = [r_q, r_kv], {name: W.T.astype(dtype) for name, W in new.items()}
        if report is not None:
            report.append(_report(i, sizes, r_q, r_kv, new, (W_q, W_k, W_v)))

    rotary = _rotary(model.config.rope, d_r, rope_layout == "interleaved", original_length)
    settings = {"nope": d_n, "rope": d_r, "rotary": dataclasses.asdict(rotary), "latent_norm": latent_norm}
    new_model = _with_latent(surgery.copy(model), ranks, decode=decode, **settings)
    for i, arrays in values.items():
        attention = new_model.layers[i].attention
        for name, kernel in arrays.items():
            getattr(attention, name).kernel.set_value(kernel)
        for norm in (attention.query_norm, attention.kv_norm):
            if norm is not None:
                norm.scale.set_value(jnp.ones(norm.scale.get_value().shape, kernel.dtype))
    return surgery.record(surgery.named(new_model), RECORD, ranks=ranks, **settings)


def with_decode(model: nnx.Module, decode: str) -> nnx.Module:
    """A copy of ``model`` whose latent attention caches ``"absorbed"``, the latent and one rotary key a token, or
    ``"expanded"``, every head's keys and values. Outputs are the same; it is a choice of a run and is not saved.

    Raises ValueError for another word, or a model without latent attention.
    """
    if decode not in DECODE:
        raise ValueError(f"decode: expected one of {', '.join(DECODE)}, got {decode!r}")
    model = surgery.copy(model)
    found = [module for _, module in nnx.iter_modules(model) if isinstance(module, nn.LatentAttention)]
    if not found:
        raise ValueError("model: it has no latent attention")
    for module in found:
        module.decode = decode
    return model


def cache_bytes(model: nnx.Module, dtype: Any = "bfloat16") -> int:
    """Bytes a token that generation with ``model`` keeps, over all layers and whatever attention they have."""
    cache = jax.eval_shape(lambda: model.layers.empty_cache(1, 1, jnp.dtype(dtype)))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache))


# ---- checks ----------------------------------------------------------------------------------------------------------


def _checked_layers(model: nnx.Module, asked: Sequence[int] | None) -> list[int]:
    if not hasattr(model, "layers") or getattr(model.config, "rope", None) is None:
        raise ValueError(f"model: expected a decoder with rotary positions (llama), got {type(model).__name__}")
    depth = len(model.layers)
    chosen = list(range(depth)) if asked is None else [int(i) for i in asked]
    for i in chosen:
        if not 0 <= i < depth:
            raise ValueError(f"mla_layers: the model has layers 0 to {depth - 1}, got {i}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"mla_layers: expected different layers, at least one, got {chosen}")
    return sorted(chosen)


def _check_attention(path: str, attention: Any, d_n: int, d_r: int, d_v: int | None, config: Any) -> None:
    if not isinstance(attention, nn.Attention):
        raise ValueError(f"mla_layers: {path} is {type(attention).__name__}, no standard attention")
    odd = ("window", attention.window), ("relative bias", attention.relative), ("reduction", attention.reduce)
    for name, value in (*odd, ("scale of its own", attention.scale)):
        if value is not None:
            raise ValueError(f"mla_layers: {path} has a {name}, which latent attention would lose")
    for name in ("query", "key", "value"):
        linear = getattr(attention, name)
        if linear.bias is not None or linear.adapter is not None:
            what = "an adapter" if linear.bias is None else "a bias"
            raise ValueError(f"mla_layers: {path}.{name} has {what}, which latent attention would lose")
    if config.rope.size != attention.size:
        raise ValueError(f"mla_layers: {path} rotates {config.rope.size} of the {attention.size} dimensions of a head")
    for name, value in (("d_n", d_n), ("d_r", d_r)):
        if not 1 <= value <= attention.size:
            raise ValueError(f"{name}: expected 1 to {attention.size}, the size of a head, got {value}")
    if d_r % 2:
        raise ValueError(f"d_r: rotary positions turn pairs of dimensions, got {d_r}")
    if d_v is not None and d_v != attention.size:
        raise ValueError(f"d_v: values keep the size of the source's heads, {attention.size}, got {d_v}")


def _limits(attention: Any) -> tuple[int, int]:
    """The largest ranks of W_q and of [K; V]."""
    width, outputs = attention.query.kernel.get_value().shape
    return min(outputs, width), min(2 * outputs, width)


def _checked_rank(name: str, rank: int | None, limit: int, divisor: int, *, needed: bool, layer: int) -> int | None:
    if rank is None and needed:
        raise ValueError(f"{name}: layer {layer} has a fixed rank; give it (or, at the ends, fixed_ends=False)")
    if rank is not None and not 1 <= rank <= limit:
        raise ValueError(f"{name}: expected 1 to {limit}, the smaller side of its matrix, got {rank}")
    if rank is not None and rank % divisor:
        raise ValueError(f"{name}: expected a multiple of {divisor} (rank_divisor), got {rank}")
    return rank


def _report(i: int, sizes: Sizes, r_q: int | None, r_kv: int, new: Matrices, source: Any) -> LayerReport:
    W_q, W_k, W_v = source
    dot = functools.partial(jnp.matmul, precision="highest")
    error = lambda found, rows: float(jnp.linalg.norm(found - rows) / jnp.linalg.norm(rows))
    query = new["query"] if r_q is None else dot(new["query_up"], new["query_down"])
    kv, rows = dot(new["kv_up"], new["kv_down"][:r_kv]), sizes.kv_rows(W_k, W_v)
    keys, values = (
        [W.reshape(sizes.heads, sizes.nope + sizes.head, -1)[:, part] for W in (kv, rows)]
        for part in (slice(sizes.nope), slice(sizes.nope, None))
    )
    errors = error(query, sizes.query_rows(W_q)), error(*keys), error(*values), error(kv, rows)
    return LayerReport(i, r_q, r_kv, *errors, r_kv + sizes.rope, 2 * sizes.kv_heads * sizes.head)


# ---- the new modules -------------------------------------------------------------------------------------------------


def _rotary(source: nn.Rotary, d_r: int, interleaved: bool, original_length: int) -> nn.Rotary:
    """Rotation of d_r dimensions with the source's base; stretched by YaRN where the source is stretched."""
    if source.kind == "default":
        return nn.Rotary(d_r, source.theta, trained_length=source.trained_length, interleaved=interleaved)
    magnitude = 0.1 * math.log(source.factor) + 1.0 if source.factor > 1 else 1.0
    return nn.Rotary(
        d_r, source.theta, "yarn", source.factor, original_length, magnitude=magnitude, interleaved=interleaved
    )


def _with_latent(
    model: nnx.Module,
    ranks: dict[str, list[int | None]],
    *,
    nope: int,
    rope: int,
    rotary: dict[str, Any],
    latent_norm: bool,
    decode: str = "absorbed",
) -> nnx.Module:
    """``model`` with new, abstract latent attention in the layers ``ranks`` names; changed in place."""
    turns = nn.Rotary(**rotary)
    for i, (query_rank, rank) in ranks.items():
        if not 0 <= int(i) < len(model.layers):
            raise ValueError(f"ranks: the model has layers 0 to {len(model.layers) - 1}, got {i}")
        old = model.layers[int(i)].attention
        if not isinstance(old, nn.Attention):
            raise ValueError(f"ranks: layers.{i}.attention is {type(old).__name__}, no standard attention")

        def build(old: nn.Attention = old, query_rank: int | None = query_rank, rank: int = rank) -> nnx.Module:
            return nn.LatentAttention(
                old.query.kernel.get_value().shape[0],
                old.heads,
                query_rank=query_rank,
                rank=rank,
                nope=nope,
                rope=rope,
                value_size=old.size,
                latent_norm=latent_norm,
                rotary=turns,
                decode=decode,
                rate=old.rate,
                rngs=Keys(0),
            )

        new = nnx.eval_shape(build)
        new.out = old.out
        model.layers[int(i)].attention = new
    return model


def abstract_mla(model: nnx.Module, *, ranks: dict[str, list[int | None]], **settings: Any) -> nnx.Module:
    """The structure that `upcycle_mla` made, on an abstract model: what `jf.load` replays."""
    whole = lambda n: isinstance(n, int) and not isinstance(n, bool) and n > 0
    if (
        not isinstance(ranks, dict)
        or not ranks
        or not all(
            isinstance(pair, list) and len(pair) == 2 and whole(pair[1]) and (pair[0] is None or whole(pair[0]))
            for pair in ranks.values()
        )
    ):
        raise ValueError("config.json: ranks of x_ecomla must be {layer: [query rank or null, kv rank]}")
    model = _with_latent(model, ranks, **settings)
    return surgery.record(surgery.named(model), RECORD, ranks=ranks, **settings)
