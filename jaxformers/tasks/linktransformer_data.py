"""Labelled tables for LinkTransformer's training: from rows to classes or labelled pairs, splits, and their evaluation.

Matching pairs are edges between left and right ids; connected components of that graph are classes, and a class holds
the distinct texts of both sides. Classes, not rows, are split into training, validation and test parts, so that no
entity is seen on both sides of a split.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxformers import embedding, metrics, search
from jaxformers.data.tokenizers import length_buckets
from jaxformers.extras import require
from jaxformers.tasks.linktransformer_rows import as_columns, check_columns, check_frame, row_texts, unique_texts

if TYPE_CHECKING:
    from pandas import DataFrame

Encode = Callable[[list[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Entity:
    """One class of equivalent texts. Where sides are known, `left` are queries and `right` is the corpus."""

    texts: tuple[str, ...]  # distinct
    left: tuple[str, ...]
    right: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LabelledPairs:
    """n pairs of texts with labels 0/1. As an evaluation: best-threshold metrics over the cosine."""

    left: tuple[str, ...]
    right: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def score(self, encode: Encode) -> dict[str, float]:
        """accuracy, f1, precision, recall, the two thresholds, and average precision."""
        distinct, inverse = unique_texts([*self.left, *self.right])
        z = search.normalize(encode(distinct))[inverse]
        cosine = np.einsum("nd,nd->n", z[: len(self)], z[len(self) :])
        accuracy, accuracy_threshold = metrics.best_threshold_accuracy(cosine, self.labels)
        f1, precision, recall, threshold = metrics.best_threshold_f1(cosine, self.labels)
        return {
            "accuracy": accuracy, "accuracy_threshold": accuracy_threshold, "f1": f1, "f1_threshold": threshold,
            "precision": precision, "recall": recall, "ap": metrics.average_precision(cosine, self.labels),
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Queries, a corpus, and for each query the right corpus places. The main metric is accuracy@1."""

    queries: tuple[str, ...]
    corpus: tuple[str, ...]
    relevant: tuple[tuple[int, ...], ...]

    def score(self, encode: Encode) -> dict[str, float]:
        """accuracy, precision and recall @ 1, 3, 5, 10, mrr@10, ndcg@10, map@100, by cosine."""
        distinct, inverse = unique_texts([*self.queries, *self.corpus])
        z = search.normalize(encode(distinct))[inverse]
        queries, corpus = z[: len(self.queries)], z[len(self.queries) :]
        _, ranked = search.topk(queries, corpus, min(100, len(corpus)))
        return metrics.retrieval_metrics(ranked, self.relevant)


@dataclasses.dataclass(frozen=True)
class Split:
    """What training reads: classes of texts or labelled pairs, and the evaluations of the parts that were held out."""

    train: list[tuple[str, ...]] | LabelledPairs
    val: Retrieval | LabelledPairs | None
    test: Retrieval | LabelledPairs | None


def load_splits(
    data: Any, train_data: Any, val_data: Any, test_data: Any, left_col_names: Sequence[str] | None,
    right_col_names: Sequence[str] | None, left_id_name: Any, right_id_name: Any, label_col_name: str | None,
    clus_id_col_name: Any, clus_text_col_names: Sequence[str] | None, *, val_perc: float, test_at_end: bool,
    val_query_prop: float, large_val: bool, seed: int, positives_only: bool, sep_token: Callable[[], str],
) -> Split:  # fmt: skip
    """Read, check and split the tables of `train_model`; its arguments.

    `positives_only`: train on classes (supcon, triplet) even where the pairs have labels. `sep_token` is asked for only
    when several columns make one text. Raises ValueError naming the argument: no table or two kinds of table, both
    label and cluster columns, one cluster argument without the other, missing columns, labels that are not 0/1, no
    class with two texts.
    """
    if (data is None) == (train_data is None):
        raise ValueError("data: give either data (to be split) or train_data")
    if data is not None and (val_data is not None or test_data is not None):
        raise ValueError("val_data and test_data go with train_data, not with data (which is split here)")
    clusters = clus_id_col_name is not None or clus_text_col_names is not None
    if clusters and (clus_id_col_name is None or clus_text_col_names is None):
        raise ValueError("clus_id_col_name and clus_text_col_names must be given together")
    if clusters and label_col_name is not None:
        raise ValueError("label_col_name and clus_id_col_name exclude each other: pairs with labels, or clusters")
    if clusters and (left_col_names is not None or right_col_names is not None):
        raise ValueError("left_col_names and right_col_names do not go with cluster columns")
    if not clusters and (left_col_names is None or right_col_names is None):
        raise ValueError("left_col_names and right_col_names are needed (or the two cluster arguments)")

    def read(table: Any, name: str) -> Any:
        df = read_table(table, name)
        if clusters:
            return _clusters(df, clus_id_col_name, clus_text_col_names, val_query_prop, sep_token, name)
        pairs = _pairs(
            df, left_col_names, right_col_names, left_id_name, right_id_name, label_col_name, sep_token, name
        )
        return pairs if label_col_name is not None else _entities(*pairs)

    parts = [None if t is None else read(t, n) for t, n in
             ((data if data is not None else train_data, "data" if data is not None else "train_data"),
              (val_data, "val_data"), (test_data, "test_data"))]  # fmt: skip
    train, val, test = parts
    rng = np.random.default_rng(seed)
    labelled = label_col_name is not None
    if data is not None:
        count = len(train[0]) if labelled else len(train)
        a, b, c = _split(count, val_perc, test_at_end, rng)
        pick = (lambda rows: tuple([part[i] for i in rows] for part in train)) if labelled else (
            lambda rows: [train[i] for i in rows])  # fmt: skip
        train, val, test = pick(a), pick(b) if len(b) else None, pick(c) if len(c) else None

    if labelled:
        val, test = (None if p is None else _labelled(p, n) for p, n in ((val, "val_data"), (test, "test_data")))
        if not positives_only:
            return Split(_labelled(train, "train_data"), val, test)
        positive = [i for i, label in enumerate(train[4]) if label]
        train = _entities(*([part[i] for i in positive] for part in train))
    classes = [e.texts for e in train if len(e.texts) >= 2]
    if not classes:
        raise ValueError("data: no class has two or more different texts to train on; check the columns and ids")
    if not labelled:
        distractors = [t for e in train for t in e.right] if large_val else []
        val, test = (None if part is None else retrieval(part, distractors) for part in (val, test))
    return Split(classes, val, test)


def retrieval(entities: list[Entity], distractors: Sequence[str]) -> Retrieval | None:
    """Left texts look for the right texts of their entity among those of all entities and the distractors."""
    corpus, place = [], {}
    for text in [*(t for e in entities for t in e.right), *distractors]:
        if text not in place:
            place[text] = len(corpus)
            corpus.append(text)
    queries = [(q, tuple(sorted({place[t] for t in e.right}))) for e in entities if e.right for q in e.left]
    if not queries:
        return None
    return Retrieval(tuple(q for q, _ in queries), tuple(corpus), tuple(r for _, r in queries))


def read_table(table: Any, name: str) -> DataFrame:
    """A DataFrame, or the one in a .csv or .xlsx file, with a fresh index. ValueError for anything else."""
    pd = require("pandas", extra="link")
    if isinstance(table, (str, Path)):
        path = Path(table)
        if path.suffix not in (".csv", ".xlsx"):
            raise ValueError(f"{name} must be a DataFrame or a .csv or .xlsx file, got {path.name!r}")
        if not path.is_file():
            raise ValueError(f"{name}: there is no file {path}")
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_excel(path)
    check_frame(table, name)
    return table.reset_index(drop=True)


def split_rows(n: int, shares: Sequence[float], seed: int) -> list[np.ndarray]:
    """n row numbers, shuffled and cut into parts of these shares (the last takes what is left), each in row order."""
    order = np.random.default_rng(seed).permutation(n)
    cuts = np.round(np.cumsum(shares[:-1]) * n).astype(int)
    return [np.sort(part) for part in np.split(order, cuts)]


def tokenize(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int | None) -> dict[str, np.ndarray]:
    """The inputs that `model` takes, padded to one of few lengths, so that few steps are compiled."""
    limit = embedding._limit(model, tokenizer, max_length)
    buckets = None if limit is None else length_buckets(limit, smallest=32)
    arrays = tokenizer(list(texts), max_length=limit, buckets=buckets, padding_side="right")
    taken = inspect.signature(type(model).__call__).parameters  # not every architecture has token types
    return {name: values for name, values in arrays.items() if name in taken}


# ------------------------------------------------------------------------------------------------------------ private


def _texts(df: DataFrame, columns: list, sep_token: Callable[[], str]) -> list[str]:
    return row_texts(df, columns, sep_token()) if len(columns) > 1 else row_texts(df, columns[0], "")


def _keys(df: DataFrame, columns: Any) -> list[tuple]:
    return list(zip(*(df[c] for c in as_columns("ids", columns)), strict=True))


def _pairs(
    df: DataFrame, left: Any, right: Any, left_id: Any, right_id: Any, label: str | None, sep_token: Callable[[], str],
    name: str,
) -> tuple[list[str], list[str], list, list, list[int]]:  # fmt: skip
    """(left texts, right texts, left ids, right ids, labels), cleaned: no row without text or id, no pair twice."""
    left, right = as_columns("left_col_names", left), as_columns("right_col_names", right)
    for columns, argument in ((left, "left_col_names"), (right, "right_col_names"), (left_id, "left_id_name"),
                              (right_id, "right_id_name"), (label, "label_col_name")):  # fmt: skip
        if columns is not None:
            check_columns(df, columns, argument, name)
    ids = [c for columns in (left_id, right_id, label) if columns is not None for c in as_columns("ids", columns)]
    whole = df[left].notna().any(axis=1) & df[right].notna().any(axis=1) & df[ids].notna().all(axis=1)
    df = df[whole].reset_index(drop=True)
    a, b = _texts(df, left, sep_token), _texts(df, right, sep_token)
    left_ids = a if left_id is None else _keys(df, left_id)
    right_ids = b if right_id is None else _keys(df, right_id)
    labels = [1] * len(df) if label is None else [_label(v, label) for v in df[label]]
    first: dict[tuple, int] = {}
    for i, pair in enumerate(zip(a, b, left_ids, right_ids, strict=True)):
        first.setdefault(pair, i)
    kept = list(first.values())
    return tuple([part[i] for i in kept] for part in (a, b, left_ids, right_ids, labels))


def _label(value: Any, column: str) -> int:
    known = {"same": 1, "different": 0, 1: 1, 0: 0, "1": 1, "0": 0}
    try:
        return known[value]
    except (KeyError, TypeError):
        raise ValueError(
            f"label_col_name: column {column!r} holds {value!r}; 0, 1, 'same' or 'different' is right"
        ) from None


def _labelled(parts: tuple, name: str) -> LabelledPairs:
    left, right, _, _, labels = parts
    if len(set(labels)) < 2:
        raise ValueError(f"label_col_name: {name} needs pairs of both labels, got {len(labels)} of one")
    return LabelledPairs(tuple(left), tuple(right), tuple(labels))


def _entities(left: list, right: list, left_ids: list, right_ids: list, labels: list) -> list[Entity]:
    """Connected components of the graph whose edges are the pairs, in order of first appearance."""
    parent: dict[tuple, tuple] = {}

    def root(node: tuple) -> tuple:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    for i, j in zip(left_ids, right_ids, strict=True):
        parent[root(("right", j))] = root(("left", i))
    sides: dict[tuple, tuple[dict, dict]] = {}
    for a, b, i in zip(left, right, left_ids, strict=True):
        found = sides.setdefault(root(("left", i)), ({}, {}))
        found[0][a] = found[1][b] = None
    return [Entity(tuple(a | b), tuple(a), tuple(b)) for a, b in sides.values()]


def _clusters(
    df: DataFrame, ids: Any, columns: Any, query_prop: float, sep_token: Callable[[], str], name: str
) -> list[Entity]:
    columns, ids = as_columns("clus_text_col_names", columns), as_columns("clus_id_col_name", ids)
    check_columns(df, ids, "clus_id_col_name", name)
    check_columns(df, columns, "clus_text_col_names", name)
    df = df[df[columns].notna().any(axis=1) & df[ids].notna().all(axis=1)].reset_index(drop=True)
    members: dict[tuple, dict[str, None]] = {}
    for key, text in zip(_keys(df, ids), _texts(df, columns, sep_token), strict=True):
        members.setdefault(key, {})[text] = None
    out = []
    for texts in map(tuple, members.values()):
        queries = int(len(texts) * query_prop)
        out.append(Entity(texts, texts[:queries], texts[queries:]))
    return out


def _split(n: int, val_perc: float, test_at_end: bool, rng: np.random.Generator) -> tuple:
    """Places of the training, validation and test parts."""
    everything = np.arange(n)
    if val_perc == 0:
        return everything, everything[:0], everything[:0]
    if val_perc == 1:
        return everything, everything, everything[:0]
    order = rng.permutation(n)
    held = min(max(1, round(val_perc * n)), n - 1)
    if held < 1:
        raise ValueError(f"val_perc: {n} classes or rows cannot be split; set it to 0 or 1, or give val_data")
    tested = held // 2 if test_at_end else 0
    return np.sort(order[held:]), np.sort(order[tested:held]), np.sort(order[:tested])
