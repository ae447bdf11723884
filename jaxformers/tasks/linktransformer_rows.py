"""What every LinkTransformer function does with tables: choose columns, make row texts, embed them, join two frames."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxformers import search
from jaxformers.extras import require

if TYPE_CHECKING:
    from pandas import DataFrame

logger = logging.getLogger("jaxformers.link")

Columns = str | Sequence[str]
Model = Any  # a name, a directory, a loaded model, a LinkTransformer, or a function from n texts to an (n, D) array

DEFAULT_MODEL = "all-MiniLM-L6-v2"
DEFAULT_SEP = "</s>"  # between columns where the tokenizer is unknown
ID = "id_lt"


# --------------------------------------------------------------------------------------------------------- columns


def as_columns(argument: str, columns: Columns) -> list:
    """A column name or a list of them -> a list. ValueError when it is empty."""
    out = list(columns) if isinstance(columns, (list, tuple)) else [columns]
    if not out:
        raise ValueError(f"{argument} must name at least one column")
    return out


def check_frame(df: DataFrame, name: str) -> None:
    pd = require("pandas", extra="link")
    if not isinstance(df, pd.DataFrame):
        raise ValueError(f"{name} must be a pandas DataFrame, got {type(df).__name__}")
    if not df.columns.is_unique:
        raise ValueError(f"{name} has the column {df.columns[df.columns.duplicated()][0]!r} twice; rename one")


def check_columns(df: DataFrame, columns: Columns, argument: str, frame: str) -> None:
    missing = [c for c in as_columns(argument, columns) if c not in df.columns]
    if missing:
        raise ValueError(f"{argument}: {frame} has no column {missing[0]!r}; it has {list(df.columns)}")


def check_new_column(df: DataFrame, name: str) -> None:
    if name in df.columns:
        raise ValueError(f"df already has a column {name!r}, which this function adds; rename or drop it")


def join_columns(
    df1: DataFrame, df2: DataFrame, on: Columns | None, left_on: Columns | None, right_on: Columns | None
) -> tuple[Columns, Columns]:
    """The checked text columns of both sides. All three None: the columns in common, in df1's order."""
    for df, name in ((df1, "df1"), (df2, "df2")):
        check_frame(df, name)
        if ID in df.columns:
            raise ValueError(f"{name} has a column {ID!r}, which the result adds; rename or drop it")
    if on is None and left_on is None and right_on is None:
        on = [c for c in df1.columns if c in df2.columns]
        if not on:
            raise ValueError("on: df1 and df2 have no column in common; give left_on and right_on")
    left_on, right_on = on if left_on is None else left_on, on if right_on is None else right_on
    if left_on is None or right_on is None:
        missing = "left_on" if left_on is None else "right_on"
        raise ValueError(f"{missing} is missing: give `on`, or both left_on and right_on")
    check_columns(df1, left_on, "left_on", "df1")
    check_columns(df2, right_on, "right_on", "df2")
    return left_on, right_on


def on_columns(df: DataFrame, on: Columns | None) -> Columns:
    """`on`, checked; required where there is no second frame to have columns in common with."""
    check_frame(df, "df")
    if on is None:
        raise ValueError(f"on must name the column(s) to read; df has {list(df.columns)}")
    check_columns(df, on, "on", "df")
    return on


def pair_columns(df: DataFrame, left_on: Columns | None, right_on: Columns | None) -> tuple[Columns, Columns]:
    check_frame(df, "df")
    for argument, columns in (("left_on", left_on), ("right_on", right_on)):
        if columns is None:
            raise ValueError(f"{argument} must name the column(s) to read; df has {list(df.columns)}")
        check_columns(df, columns, argument, "df")
    return left_on, right_on


def block_rows(df: DataFrame, columns: list) -> dict[tuple, np.ndarray]:
    """Row numbers by the values of `columns`, blocks in order of first appearance; rows with a null are in none."""
    rows: dict[tuple, list[int]] = {}
    whole = df[columns].notna().all(axis=1).to_numpy()
    for i, key in enumerate(zip(*(df[c] for c in columns), strict=True)):
        if whole[i]:
            rows.setdefault(key, []).append(i)
    return {key: np.array(found, np.int64) for key, found in rows.items()}


# ----------------------------------------------------------------------------------------------------- text of a row


def serialize_columns(
    df: DataFrame, columns: Columns, sep_token: str | None = None, model: Model | None = None
) -> list[str]:
    """One text per row: str(value) of each column, null as empty, joined by `sep_token` without blanks.

    Without `sep_token` it is that of `model`'s tokenizer ("[SEP]" for BERT, "</s>" for RoBERTa and MPNet), else "</s>".
    """
    check_frame(df, "df")
    columns = as_columns("columns", columns)
    check_columns(df, columns, "columns", "df")
    if sep_token is None:
        sep_token = DEFAULT_SEP if model is None else load_model(model).sep_token
    return [sep_token.join(row) for row in zip(*(_column_texts(df, c) for c in columns), strict=True)]


def row_texts(df: DataFrame, columns: Columns, sep_token: str) -> list[str]:
    """The texts that are compared: one column as it stands (nulls as empty texts, with a logged warning), or several
    serialised."""
    if isinstance(columns, (list, tuple)):
        return serialize_columns(df, columns, sep_token)
    nulls = int(df[columns].isna().sum())
    if nulls:
        logger.warning("column %r holds %d nulls; they are read as empty texts", columns, nulls)
    return _column_texts(df, columns)


def _column_texts(df: DataFrame, column: Hashable) -> list[str]:
    series = df[column]
    # numpy prints a float32 by its own digits; everything else prints as Python (dates without a time zone letter)
    values = series.to_numpy() if getattr(series.dtype, "kind", "O") == "f" else series
    return ["" if null else str(v) for v, null in zip(values, series.isna(), strict=True)]


def unique_texts(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """(distinct texts in order of first appearance, for each text its place among them)."""
    place: dict[str, int] = {}
    inverse = np.array([place.setdefault(t, len(place)) for t in texts], np.int64)
    return list(place), inverse


# ------------------------------------------------------------------------------------------------------------ models


class LinkTransformer:
    """A sentence encoder with the separator of its tokenizer.

    LinkTransformer("all-MiniLM-L6-v2"), a directory, a model from `jf.load`, any object with `encode(texts)`, or a
    function from n texts to an (n, D) array (whose attribute `sep_token`, if it has one, joins columns).
    """

    def __init__(self, model: Model = DEFAULT_MODEL, sep_token: str | None = None):
        self.model, self.tokenizer, self.source = model, None, None
        if isinstance(model, (str, os.PathLike)):
            from jaxformers import hub

            self.model = hub.load(os.fspath(model))
        if is_module(self.model):
            from jaxformers.data.tokenizers import load_tokenizer

            self.source = getattr(self.model, "source", None)
            if self.source is None:
                raise ValueError("model has no directory to read its tokenizer from; save it first, or pass a function")
            self.tokenizer = load_tokenizer(self.source)
        elif not callable(getattr(self.model, "encode", None)) and not callable(self.model):
            kind = type(model).__name__
            raise ValueError(f"model must be a name, a path, a model or a function of texts, got {kind}")
        owner = getattr(self.model, "tokenizer", None) or self.model if self.tokenizer is None else self.tokenizer
        self.sep_token: str = sep_token or getattr(owner, "sep_token", None) or DEFAULT_SEP

    def encode(self, texts: Sequence[str], batch_size: int = 128) -> np.ndarray:
        """n texts -> (n, D) float32 embeddings, as the checkpoint pools and normalises them."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        texts = list(texts)
        if self.tokenizer is not None:
            from jaxformers.embedding import embed

            return embed(self.model, texts, tokenizer=self.tokenizer, batch_size=batch_size)
        encode = getattr(self.model, "encode", self.model)
        parts = []
        for start in range(0, len(texts), batch_size):
            part = texts[start : start + batch_size]
            z = np.asarray(encode(part), np.float32)
            if z.ndim != 2 or len(z) != len(part):
                raise ValueError(f"model must return ({len(part)}, D) for {len(part)} texts, got shape {z.shape}")
            parts.append(z)
        return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)


def load_model(model: Model) -> LinkTransformer:
    """Any kind of `model` as a `LinkTransformer`; one that is loaded already is returned as it is."""
    return model if isinstance(model, LinkTransformer) else LinkTransformer(model)


def is_module(model: Any) -> bool:
    from flax import nnx

    return isinstance(model, nnx.Module)


def embed_rows(model: LinkTransformer, df: DataFrame, columns: Columns, batch_size: int) -> np.ndarray:
    """(n, D) unit vectors of the rows' texts."""
    return _embed(model, row_texts(df, columns, model.sep_token), batch_size)


def embed_sides(
    model: LinkTransformer, df1: DataFrame, left_on: Columns, df2: DataFrame, right_on: Columns, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of both sides; a text that occurs on both is embedded once."""
    left = row_texts(df1, left_on, model.sep_token)
    z = _embed(model, left + row_texts(df2, right_on, model.sep_token), batch_size)
    return z[: len(left)], z[len(left) :]


def _embed(model: LinkTransformer, texts: list[str], batch_size: int) -> np.ndarray:
    distinct, inverse = unique_texts(texts)
    z = model.encode(distinct, batch_size)
    bad = np.flatnonzero(~np.isfinite(z).all(1))
    if len(bad):
        raise ValueError(f"model gave a NaN or infinite embedding for the text {distinct[bad[0]]!r}")
    return search.normalize(z)[inverse]


# --------------------------------------------------------------------------------------------------------- joined rows


def joined_frame(
    df1: DataFrame, df2: DataFrame, left: np.ndarray, right: np.ndarray, scores: np.ndarray, suffixes: tuple[str, str]
) -> DataFrame:
    """Rows `left` of df1 beside rows `right` of df2 (-1: nulls), each side with its row number, and `score`.

    Columns on both sides get the suffixes. Dtypes are kept, but for pandas' own promotion where nulls come in.
    """
    pd = require("pandas", extra="link")
    left, right = np.asarray(left, np.int64), np.asarray(right, np.int64)
    if len(suffixes) != 2:
        raise ValueError(f"suffixes must be two texts, got {suffixes!r}")
    both = [c for c in [*df1.columns, ID] if c in df2.columns or c == ID]
    names1 = {c: f"{c}{suffixes[0] or ''}" for c in both}
    names2 = {c: f"{c}{suffixes[1] or ''}" for c in both}
    a = df1.reset_index(drop=True).assign(**{ID: np.arange(len(df1))}).rename(columns=names1)
    b = df2.reset_index(drop=True).assign(**{ID: np.arange(len(df2))}).rename(columns=names2)
    columns = [*a.columns, *b.columns, "score"]
    twice = [c for c in columns if columns.count(c) > 1]
    if twice:
        raise ValueError(f"suffixes: the result would have two columns {twice[0]!r}; rename it or change the suffixes")
    a = a.take(left).reset_index(drop=True)
    b = (b.reindex(right) if (right < 0).any() else b.take(right)).reset_index(drop=True)
    return pd.concat([a, b], axis=1).assign(score=np.asarray(scores, np.float32))
