"""LinkTransformer: link, aggregate, de-duplicate and classify the rows of pandas tables with sentence embeddings.

"LinkTransformer: A Unified Package for Record Linkage with Transformer Language Models", arXiv 2309.00789.

    text(row)   = the values of the chosen columns, joined by the tokenizer's separator token
    z           = encoder(text) / max(|encoder(text)|, 1e-12)
    score(i, j) = z_i . z_j                                  the cosine, in [-1, 1]

Two DataFrames go in, one DataFrame with a `score` column comes out:

    merge            every left row with its best right row (not an assignment: right rows may repeat or stay unused)
    merge_blocking   the same inside blocks of equal values
    merge_knn        every left row with its k best          merge_range   with all right rows at or above a threshold
    merge_k_judge    k best, each judged by a callable       aggregate_rows   fine rows onto a coarse reference table
    evaluate_pairs, all_pair_combos_evaluate                 scores of given or of all pairs
    cluster_rows, dedup_rows, classify_rows, transform_rows

`model` is a name ("all-MiniLM-L6-v2"), a directory, a model from `jf.load`, a `LinkTransformer`, or any function from a
list of n texts to an (n, D) array. Inputs are never changed, row order and dtypes are kept, every distinct text is
embedded once. `engine="exact"` compares each block of left rows with the whole right table; `engine="blocked"` also
streams the right table, so that memory depends on neither size. Both are exact and give equal results.
`train_model` (in `linktransformer_train.py`) and `train_clf_model` (in `linktransformer_classify.py`) make own models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxformers import clustering, search
from jaxformers.extras import require
from jaxformers.tasks.linktransformer_classify import classify_rows, train_clf_model, transform_rows
from jaxformers.tasks.linktransformer_rows import (
    DEFAULT_MODEL,
    Columns,
    LinkTransformer,
    Model,
    as_columns,
    block_rows,
    check_columns,
    check_new_column,
    embed_rows,
    embed_sides,
    join_columns,
    joined_frame,
    load_model,
    on_columns,
    pair_columns,
    row_texts,
    serialize_columns,
)
from jaxformers.tasks.linktransformer_train import train_model

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "LinkTransformer", "aggregate_rows", "all_pair_combos_evaluate", "classify_rows", "cluster_rows", "dedup_rows",
    "evaluate_pairs", "load_model", "merge", "merge_blocking", "merge_k_judge", "merge_knn", "merge_range",
    "serialize_columns", "train_clf_model", "train_model", "transform_rows",
]  # fmt: skip

logger = logging.getLogger("jaxformers.link")

# Judge(left texts, right texts) -> probability of "same" per pair, or one (is_match, confidence, raw response) per pair
Judge = Callable[[list[str], list[str]], Any]

# Rounding of the cosine of float32 unit vectors: within it, a score is returned as exactly 1 or -1, so that equal texts
# have score 1 and a range threshold of 1 or -1 means what it says.
ROUNDING = 1e-6


# --------------------------------------------------------------------------------------------------------- merging


def merge(
    df1: DataFrame,
    df2: DataFrame,
    merge_type: str | None = None,
    on: Columns | None = None,
    model: Model = DEFAULT_MODEL,
    left_on: Columns | None = None,
    right_on: Columns | None = None,
    suffixes: tuple[str, str] = ("_x", "_y"),
    batch_size: int = 128,
    engine: str = "exact",
) -> DataFrame:
    """Each row of df1, in order, with the row of df2 of highest cosine (the earlier one among equals).

    Columns: those of df1 and `id_lt` (its row number), those of df2 and `id_lt`, names on both sides with `suffixes`,
    and `score`. Without `on`, `left_on`, `right_on` the texts come from all columns that both frames have.
    `merge_type` ("1:1", "1:m", "m:1") only logs a warning where the key columns it calls unique are not.
    Raises ValueError for missing columns, an `id_lt` column, an unknown merge_type or engine, an empty df2.
    """
    left_on, right_on = join_columns(df1, df2, on, left_on, right_on)
    _check_merge_type(df1, df2, merge_type, left_on, right_on)
    return merge_knn(
        df1, df2, model=model, left_on=left_on, right_on=right_on, k=1, suffixes=suffixes, batch_size=batch_size,
        engine=engine,
    )  # fmt: skip


def merge_knn(
    df1: DataFrame,
    df2: DataFrame,
    on: Columns | None = None,
    model: Model = DEFAULT_MODEL,
    left_on: Columns | None = None,
    right_on: Columns | None = None,
    k: int = 1,
    suffixes: tuple[str, str] = ("_x", "_y"),
    batch_size: int = 128,
    drop_sim_threshold: float | None = None,
    engine: str = "exact",
) -> DataFrame:
    """Each row of df1 k times, with its k nearest rows of df2 in descending score; columns as in `merge`.

    `drop_sim_threshold` in [-1, 1] then drops the rows with a lower score; the index keeps its gaps. A k above len(df2)
    is clipped, with a logged warning.
    """
    left_on, right_on = join_columns(df1, df2, on, left_on, right_on)
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"k must be an integer >= 1, got {k!r}")
    if drop_sim_threshold is not None:
        _check_threshold("drop_sim_threshold", drop_sim_threshold)
    _key_block(engine)
    if not len(df2):
        raise ValueError("df2 is empty: there is no row to link to")
    if k > len(df2):
        logger.warning("k = %d is more than the %d rows of df2; k is clipped to that", k, len(df2))
        k = len(df2)
    joined_frame(df1, df2, [], [], [], suffixes)  # names that clash are found before anything is computed
    z1, z2 = embed_sides(load_model(model), df1, left_on, df2, right_on, batch_size)
    scores, right = _topk(z1, z2, int(k), engine)
    out = joined_frame(df1, df2, np.repeat(np.arange(len(df1)), k), right.ravel(), scores.ravel(), suffixes)
    return out if drop_sim_threshold is None else out[out["score"] >= drop_sim_threshold]


def merge_range(
    df1: DataFrame,
    df2: DataFrame,
    on: Columns | None = None,
    model: Model = DEFAULT_MODEL,
    left_on: Columns | None = None,
    right_on: Columns | None = None,
    sim_threshold: float = 0.5,
    suffixes: tuple[str, str] = ("_x", "_y"),
    batch_size: int = 128,
    engine: str = "exact",
) -> DataFrame:
    """Each row of df1 with all rows of df2 of cosine >= sim_threshold in [-1, 1], in descending score; columns as in
    `merge`. A row without any is kept once, with nulls for df2 and a NaN score."""
    left_on, right_on = join_columns(df1, df2, on, left_on, right_on)
    _check_threshold("sim_threshold", sim_threshold)
    _key_block(engine)
    if not len(df2):
        raise ValueError("df2 is empty: there is no row to link to")
    joined_frame(df1, df2, [], [], [], suffixes)
    z1, z2 = embed_sides(load_model(model), df1, left_on, df2, right_on, batch_size)
    left, right, scores = search.range_search(z1, z2, sim_threshold - ROUNDING, key_block=_key_block(engine))
    scores = _snap(scores)
    keep = scores >= np.float32(sim_threshold)
    left, right, scores = left[keep], right[keep], scores[keep]
    alone = np.setdiff1d(np.arange(len(df1)), left)
    left, right = np.concatenate([left, alone]), np.concatenate([right, np.full(len(alone), -1)])
    scores = np.concatenate([scores, np.full(len(alone), np.nan, np.float32)])
    order = np.argsort(left, kind="stable")
    return joined_frame(df1, df2, left[order], right[order], scores[order], suffixes)


def merge_blocking(
    df1: DataFrame,
    df2: DataFrame,
    merge_type: str | None = None,
    on: Columns | None = None,
    model: Model = DEFAULT_MODEL,
    left_on: Columns | None = None,
    right_on: Columns | None = None,
    blocking_vars: Columns | None = None,
    suffixes: tuple[str, str] = ("_x", "_y"),
    batch_size: int = 128,
    engine: str = "exact",
) -> DataFrame:
    """`merge` inside the blocks of rows that agree on `blocking_vars` (columns of both frames); None is plain `merge`.

    Blocks come in the order of their first row in df1 and `id_lt` counts inside a block. Then follow the unmatched rows
    of df1, then of df2, under their own column names: those of blocks that only one frame has, and those with a null in
    a blocking column.
    """
    if blocking_vars is None:
        return merge(df1, df2, merge_type, on, model, left_on, right_on, suffixes, batch_size, engine)
    pd = require("pandas", extra="link")
    left_on, right_on = join_columns(df1, df2, on, left_on, right_on)
    _check_merge_type(df1, df2, merge_type, left_on, right_on)
    _key_block(engine)
    blocking_vars = as_columns("blocking_vars", blocking_vars)
    check_columns(df1, blocking_vars, "blocking_vars", "df1")
    check_columns(df2, blocking_vars, "blocking_vars", "df2")
    blocks1, blocks2 = block_rows(df1, blocking_vars), block_rows(df2, blocking_vars)
    common = [key for key in blocks1 if key in blocks2]

    rows1 = np.concatenate([blocks1[key] for key in common] + [np.zeros(0, np.int64)])
    rows2 = np.concatenate([blocks2[key] for key in common] + [np.zeros(0, np.int64)])
    parts = [joined_frame(df1.iloc[:0], df2.iloc[:0], [], [], [], suffixes)]
    if common:
        z1, z2 = embed_sides(load_model(model), df1.iloc[rows1], left_on, df2.iloc[rows2], right_on, batch_size)
        parts, start1, start2 = [], 0, 0
        for key in common:
            b1, b2 = blocks1[key], blocks2[key]
            scores, right = _topk(z1[start1 : start1 + len(b1)], z2[start2 : start2 + len(b2)], 1, engine)
            start1, start2 = start1 + len(b1), start2 + len(b2)
            left = np.arange(len(b1))
            parts.append(joined_frame(df1.iloc[b1], df2.iloc[b2], left, right[:, 0], scores[:, 0], suffixes))
    for df, rows in ((df1, rows1), (df2, rows2)):
        unmatched = df.iloc[np.setdiff1d(np.arange(len(df)), rows)]
        if len(unmatched):
            parts.append(unmatched)
    return pd.concat(parts, ignore_index=True)


def merge_k_judge(
    df1: DataFrame,
    df2: DataFrame,
    on: Columns | None = None,
    model: Model = DEFAULT_MODEL,
    left_on: Columns | None = None,
    right_on: Columns | None = None,
    k: int = 3,
    suffixes: tuple[str, str] = ("_x", "_y"),
    batch_size: int = 128,
    drop_sim_threshold: float | None = None,
    *,
    judge: Judge,
    confidence_threshold: float | None = None,
    engine: str = "exact",
) -> DataFrame:
    """`merge_knn`, then `judge(left texts, right texts)` on every candidate pair, `batch_size` pairs at a time.

    The judge (a fine-tuned pair classifier, say) returns for each pair the probability in [0, 1] that both are the
    same, or a triple (is_match, confidence, raw response). Adds `llm_is_match` (0/1; for a probability, 1 from 0.5 on),
    `llm_confidence` in [0, 1] (of the verdict) and `llm_raw_response` (text). `confidence_threshold` keeps only matches
    of at least that confidence.
    """
    if not callable(judge):
        raise ValueError(f"judge must be a function (left texts, right texts), got {type(judge).__name__}")
    if confidence_threshold is not None and not 0 <= confidence_threshold <= 1:
        raise ValueError(f"confidence_threshold must be in [0, 1], got {confidence_threshold!r}")
    left_on, right_on = join_columns(df1, df2, on, left_on, right_on)
    encoder = load_model(model)
    out = merge_knn(
        df1, df2, model=encoder, left_on=left_on, right_on=right_on, k=k, suffixes=suffixes, batch_size=batch_size,
        drop_sim_threshold=drop_sim_threshold, engine=engine,
    )  # fmt: skip
    left_text, right_text = row_texts(df1, left_on, encoder.sep_token), row_texts(df2, right_on, encoder.sep_token)
    ids = (out[f"id_lt{suffix or ''}"] for suffix in suffixes)
    pairs = [(left_text[i], right_text[j]) for i, j in zip(*ids, strict=True)]
    verdicts: list[tuple[int, float, str]] = []
    for start in range(0, len(pairs), batch_size):
        left, right = zip(*pairs[start : start + batch_size], strict=True)
        verdicts += _verdicts(judge(list(left), list(right)), len(left))
    out = out.copy()
    out["llm_is_match"] = np.array([v[0] for v in verdicts], np.int64)
    out["llm_confidence"] = np.array([v[1] for v in verdicts], np.float64)
    out["llm_raw_response"] = np.array([v[2] for v in verdicts], object)
    if confidence_threshold is None:
        return out
    return out[(out["llm_is_match"] == 1) & (out["llm_confidence"] >= confidence_threshold)]


def aggregate_rows(
    df: DataFrame,
    ref_df: DataFrame,
    model: Model = DEFAULT_MODEL,
    left_on: Columns | None = None,
    right_on: Columns | None = None,
    engine: str = "exact",
) -> DataFrame:
    """Each (fine) row of df with its best (coarse) row of ref_df: `merge` of df onto ref_df."""
    return merge(df, ref_df, model=model, left_on=left_on, right_on=right_on, batch_size=128, engine=engine)


# ---------------------------------------------------------------------------------------------------- given pairs


def evaluate_pairs(
    df: DataFrame, model: Model = DEFAULT_MODEL, left_on: Columns | None = None, right_on: Columns | None = None,
    batch_size: int = 128,
) -> DataFrame:  # fmt: skip
    """df with `score`: the cosine of the texts in `left_on` and `right_on` of the same row."""
    left_on, right_on = pair_columns(df, left_on, right_on)
    check_new_column(df, "score")
    z1, z2 = embed_sides(load_model(model), df, left_on, df, right_on, batch_size)
    return df.assign(score=_snap(np.einsum("nd,nd->n", z1, z2)))


def all_pair_combos_evaluate(
    df: DataFrame, model: Model = DEFAULT_MODEL, left_on: Columns | None = None, right_on: Columns | None = None,
    batch_size: int = 128,
) -> DataFrame:  # fmt: skip
    """All n^2 pairs of a left and a right value of df: columns `left_on`, `right_on`, `score`, by left row.

    The values are the column's own, or the joined texts where several columns make one text.
    """
    pd = require("pandas", extra="link")
    left_on, right_on = pair_columns(df, left_on, right_on)
    encoder = load_model(model)
    z1, z2 = embed_sides(encoder, df, left_on, df, right_on, batch_size)
    n = len(df)

    def values(columns: Columns):
        several = isinstance(columns, (list, tuple))
        return pd.Series(row_texts(df, columns, encoder.sep_token)) if several else df[columns]

    return pd.DataFrame({
        "left_on": values(left_on).take(np.repeat(np.arange(n), n)).reset_index(drop=True),
        "right_on": values(right_on).take(np.tile(np.arange(n), n)).reset_index(drop=True),
        "score": _snap(z1 @ z2.T).ravel(),
    })  # fmt: skip


# -------------------------------------------------------------------------------------- clusters within one table


def cluster_rows(
    df: DataFrame,
    model: Model = DEFAULT_MODEL,
    on: Columns | None = None,
    cluster_type: str = "SLINK",
    cluster_params: Mapping[str, Any] | None = None,
    batch_size: int = 128,
) -> DataFrame:
    """df with `cluster`: an integer per row, -1 for noise (SLINK and HDBScan). Methods and keys: `clustering.DEFAULTS`.

    `cluster_params=None` means the method's defaults; SLINK's are threshold 0.5 and "min cluster size" 2. Large tables
    (over 4096 rows) go through a neighbour graph in blocks with SLINK; the other methods need n^2 memory or time.
    """
    on = on_columns(df, on)
    check_new_column(df, "cluster")
    params = clustering.cluster_params(cluster_type, cluster_params)
    z = embed_rows(load_model(model), df, on, batch_size)
    return df.assign(cluster=clustering.cluster(z, cluster_type, params))


def dedup_rows(
    df: DataFrame,
    model: Model = DEFAULT_MODEL,
    on: Columns | None = None,
    cluster_type: str = "SLINK",
    cluster_params: Mapping[str, Any] | None = None,
    batch_size: int = 128,
    compat: str | None = None,
) -> DataFrame:
    """The first row of every cluster, after dropping exact duplicates on `on`; rows keep their index.

    Noise rows are their own only duplicates: all are kept. `compat="linktransformer"` keeps only the first of them, as
    the original package does (all noise shares the label -1).
    """
    if compat not in (None, "linktransformer"):
        raise ValueError(f"compat must be None or 'linktransformer', got {compat!r}")
    on = on_columns(df, on)
    check_new_column(df, "cluster")
    distinct = df.drop_duplicates(subset=as_columns("on", on), keep="first")
    clustered = cluster_rows(distinct, model, on, cluster_type, cluster_params, batch_size)["cluster"]
    label, first = clustered.to_numpy(), ~clustered.duplicated().to_numpy()
    return distinct[first if compat else first | (label == -1)]


# ---------------------------------------------------------------------------------------------------------- private


def _topk(z1: np.ndarray, z2: np.ndarray, k: int, engine: str) -> tuple[np.ndarray, np.ndarray]:
    scores, right = search.topk(z1, z2, k, key_block=_key_block(engine))
    return _snap(scores), right


def _key_block(engine: str) -> int | None:
    if engine not in ("exact", "blocked"):
        raise ValueError(f"engine must be 'exact' or 'blocked', got {engine!r}")
    return None if engine == "exact" else 8192


def _snap(scores: np.ndarray) -> np.ndarray:
    return np.where(np.abs(scores) > 1 - ROUNDING, np.sign(scores), scores).astype(np.float32)


def _check_threshold(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not -1 <= value <= 1:
        raise ValueError(f"{name} must be a cosine in [-1, 1], got {value!r}")


def _check_merge_type(
    df1: DataFrame, df2: DataFrame, merge_type: str | None, left_on: Columns, right_on: Columns
) -> None:
    if merge_type not in (None, "1:1", "1:m", "m:1"):
        raise ValueError(f"merge_type must be None, '1:1', '1:m' or 'm:1', got {merge_type!r}")
    for side, df, columns in (("1:1 1:m", df1, left_on), ("1:1 m:1", df2, right_on)):
        if merge_type and merge_type in side and df.duplicated(subset=as_columns("on", columns)).any():
            logger.warning("merge_type %r, but the key columns %s hold duplicates", merge_type, columns)


def _verdicts(answer: Any, n: int) -> list[tuple[int, float, str]]:
    """A judge's answer as n tuples (is match, confidence, raw response)."""
    answer = list(answer)
    if len(answer) != n:
        raise ValueError(f"judge returned {len(answer)} verdicts for {n} pairs")
    out = []
    for verdict in answer:
        if np.ndim(verdict) == 0:
            p = float(verdict)
            match, confidence, raw = int(p >= 0.5), max(p, 1 - p), str(verdict)
        else:
            match, confidence, raw = int(verdict[0]), float(verdict[1]), str(verdict[2])
            p = confidence
        if not 0 <= p <= 1 or match not in (0, 1):
            raise ValueError(f"judge must give probabilities in [0, 1] or (0 or 1, confidence, text), got {verdict!r}")
        out.append((match, confidence, raw))
    return out
