"""LinkTransformer's per-row functions: classify the rows of a table, or rewrite their texts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxformers.tasks.linktransformer_rows import (
    DEFAULT_SEP,
    Columns,
    check_new_column,
    is_module,
    on_columns,
    row_texts,
    unique_texts,
)

if TYPE_CHECKING:
    from pandas import DataFrame


def classify_rows(
    df: DataFrame,
    on: Columns | None = None,
    model: Any = None,
    num_labels: int = 2,
    label_map: Mapping[str, int] | None = None,
    batch_size: int = 128,
) -> DataFrame:
    """df with `clf_preds_<on>` (several names joined by "-"): the class of highest logit for the text of each row.

    `model`: the directory of a sequence classifier (from `train_clf_model`), a loaded one, or a function from n texts
    to (n, num_labels) logits. The classes are integers, or names where `label_map` (name -> integer) is given or the
    directory holds a label_map.json. ValueError when its size, or the model's, is not `num_labels`.
    """
    on = on_columns(df, on)
    name = f"clf_preds_{on if isinstance(on, str) else '-'.join(on)}"
    check_new_column(df, name)
    if model is None:
        raise ValueError("model must be the directory of a classifier, a loaded one, or a function texts -> logits")
    if label_map is not None:
        _check_label_map(label_map, num_labels)
    classifier = load_classifier(model)
    if label_map is None and classifier.label_map is not None:
        label_map = classifier.label_map
        _check_label_map(label_map, num_labels)
    distinct, inverse = unique_texts(row_texts(df, on, classifier.sep_token))
    logits = classifier.logits(distinct, batch_size) if distinct else np.zeros((0, num_labels), np.float32)
    if logits.shape != (len(distinct), num_labels):
        raise ValueError(f"num_labels is {num_labels}, but the model gave logits of shape {logits.shape}")
    label = logits.argmax(1)[inverse]
    if label_map is None:
        return df.assign(**{name: label})
    names = {number: text for text, number in label_map.items()}
    return df.assign(**{name: np.array([names[int(i)] for i in label], object)})


def transform_rows(
    df: DataFrame,
    on: Columns | None = None,
    model: Callable[[list[str]], Sequence[str]] | None = None,
    batch_size: int = 50,
    output_column: str | None = None,
) -> DataFrame:
    """df without the rows that hold a null in `on`, with `transformed_<on>`: model(texts), `batch_size` at a time.

    `model` is any function from a list of texts to as many texts; the values of several columns are joined by a blank
    (and the names by "-" in the new column's name). Local sequence-to-sequence models come with a later architecture;
    until then a path raises NotImplementedError.
    """
    on = on_columns(df, on)
    columns = [on] if isinstance(on, str) else list(on)
    name = output_column or f"transformed_{'-'.join(columns)}"
    check_new_column(df, name)
    if isinstance(model, str):
        raise NotImplementedError(
            "model: no sequence-to-sequence model can be loaded yet; pass a function texts -> texts"
        )
    if not callable(model):
        raise ValueError(f"model must be a function from texts to as many texts, got {type(model).__name__}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    kept = df.dropna(subset=columns)
    texts = row_texts(kept, columns, " ")
    out: list[str] = []
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        answer = list(model(part))
        if len(answer) != len(part):
            raise ValueError(f"model returned {len(answer)} texts for {len(part)}")
        out += answer
    return kept.assign(**{name: np.array(out, object)})


def _check_label_map(label_map: Mapping[str, int], num_labels: int) -> None:
    if len(label_map) != num_labels:
        raise ValueError(f"label_map has {len(label_map)} labels, but num_labels is {num_labels}")
    if sorted(label_map.values()) != list(range(num_labels)):
        raise ValueError(f"label_map must map names to 0..{num_labels - 1}, each once, got {dict(label_map)}")


class Classifier:
    """A row classifier: texts -> (n, labels) logits, with the names of its labels where it has any."""

    def __init__(self, model: Any):
        self.model, self.tokenizer, self.label_map = model, None, None
        if isinstance(model, (str, os.PathLike)):
            from jaxformers import hub

            self.model = hub.load(os.fspath(model), head="sequence_classification")
        if is_module(self.model):
            from jaxformers.data.tokenizers import load_tokenizer

            source = getattr(self.model, "source", None)
            if source is None:
                raise ValueError("model has no directory to read its tokenizer from; save it first, or pass a function")
            self.tokenizer = load_tokenizer(source)
            names = Path(source) / "label_map.json"
            if names.is_file():
                self.label_map = {str(name): int(i) for name, i in json.loads(names.read_text("utf-8")).items()}
        elif not callable(model):
            kind = type(model).__name__
            raise ValueError(f"model must be a directory, a loaded classifier or a function of texts, got {kind}")
        self.sep_token: str = getattr(self.tokenizer or self.model, "sep_token", None) or DEFAULT_SEP

    def logits(self, texts: list[str], batch_size: int) -> np.ndarray:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if self.tokenizer is not None:
            from jaxformers.embedding import forward_texts

            return forward_texts(self.model, texts, "logits", tokenizer=self.tokenizer, batch_size=batch_size)
        parts = [np.asarray(self.model(texts[i : i + batch_size])) for i in range(0, len(texts), batch_size)]
        return np.concatenate(parts)


def load_classifier(model: Any) -> Classifier:
    return model if isinstance(model, Classifier) else Classifier(model)
