"""LinkTransformer's per-row functions: classify the rows of a table (and train for it), or rewrite their texts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxformers import atomic, metrics
from jaxformers.tasks.linktransformer_rows import (
    DEFAULT_SEP,
    Columns,
    as_columns,
    check_columns,
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
    name = f"clf_preds_{'-'.join(map(str, as_columns('on', on)))}"
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
    if label_map is None or label_map == {str(i): i for i in range(num_labels)}:
        return df.assign(**{name: label})
    names = {number: text for text, number in label_map.items()}
    return df.assign(**{name: np.array([names[int(i)] for i in label], object)})


def transform_rows(
    df: DataFrame,
    on: Columns | None = None,
    model: Any = None,
    batch_size: int = 50,
    output_column: str | None = None,
    max_new_tokens: int = 64,
) -> DataFrame:
    """df without the rows that hold a null in `on`, with `transformed_<on>`: what `model` makes of each text.

    `model` is any function from a list of texts to as many texts, called with `batch_size` at a time, or a
    sequence-to-sequence model (T5, say): a directory, a hub id or a loaded one, which answers greedily with at most
    `max_new_tokens` tokens, each distinct text once. The values of several columns are joined by a blank (and the names
    by "-" in the new column's name).

    Raises ValueError when `model` is neither, has no sequence-to-sequence head, or gives another number of texts.
    """
    on = on_columns(df, on)
    columns = as_columns("on", on)
    name = output_column or f"transformed_{'-'.join(map(str, columns))}"
    check_new_column(df, name)
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    kept = df.dropna(subset=columns)
    texts = row_texts(kept, columns, " ")
    if isinstance(model, str | Path) or is_module(model):
        distinct, inverse = unique_texts(texts)
        answers = _answers(model, distinct, batch_size, max_new_tokens)
        return kept.assign(**{name: np.array([answers[i] for i in inverse], object)})
    if not callable(model):
        raise ValueError(
            "model must be a function from texts to as many texts, or a sequence-to-sequence model, got "
            f"{type(model).__name__}"
        )
    out: list[str] = []
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        answer = list(model(part))
        if len(answer) != len(part):
            raise ValueError(f"model returned {len(answer)} texts for {len(part)}")
        out += answer
    return kept.assign(**{name: np.array(out, object)})


def _answers(model: Any, texts: list[str], batch_size: int, max_new_tokens: int) -> list[str]:
    from jaxformers.generation import generate
    from jaxformers.hub import load

    model = model if is_module(model) else load(model)
    if model.head_name != "seq2seq_lm":
        raise ValueError(f"model: head {model.head_name!r} writes no text; expected a sequence-to-sequence model")
    return generate(model, texts, max_new_tokens=max_new_tokens, batch_size=batch_size) if texts else []


def train_clf_model(
    data: Any = None,
    model: Any = "distilroberta-base",
    on: Columns | None = None,
    label_col_name: str = "label",
    train_data: Any = None,
    val_data: Any = None,
    test_data: Any = None,
    eval_steps: int = 30,
    batch_size: int = 8,
    lr: float = 2e-5,
    epochs: int = 1,
    model_save_dir: str = "models",
    model_save_name: str = "classification_model",
    weighted_loss: bool = False,
    weight_list: Sequence[float] | None = None,
    max_length: int | None = None,
    seed: int = 22,
    progress: bool = False,
) -> str:
    """Train a classifier of rows from the texts in `on`; returns the directory of the saved model.

    `data` (a DataFrame, or a .csv or .xlsx file) is split 70/15/15, or `train_data` and `val_data` (and perhaps
    `test_data`) are given. Labels become integers in the order they first appear in the training part (0, 1, … stay
    what they are) and are saved as label_map.json, which `classify_rows` reads. AdamW with a linear schedule, without
    warm-up, minimises cross-entropy; `weighted_loss` weighs each class by 1 - its share of the training rows, or by
    `weight_list` (in the order of the label map). Every `eval_steps` steps and at the end the validation part is
    scored; the parameters of best F1 (of class 1 where there are two classes, else the mean weighted by class size) are
    saved, with all metrics in LT_evaluation.json.
    """
    from jaxformers.tasks.linktransformer_data import read_table, split_rows

    if (data is None) == (train_data is None) or (train_data is not None and val_data is None):
        raise ValueError("data: give either data (to be split), or train_data and val_data")
    tables = {"data": data} if data is not None else {"train_data": train_data, "val_data": val_data}
    if test_data is not None:
        if data is not None:
            raise ValueError("test_data goes with train_data, not with data (which is split here)")
        tables["test_data"] = test_data
    for name, least in (("eval_steps", eval_steps), ("batch_size", batch_size), ("epochs", epochs)):
        if least < 1:
            raise ValueError(f"{name} must be >= 1, got {least}")
    if weight_list is not None and not weighted_loss:
        raise ValueError("weight_list needs weighted_loss=True")
    if on is None:
        raise ValueError("on must name the column(s) to read")
    frames = {name: read_table(table, name) for name, table in tables.items()}
    for name, df in frames.items():
        check_columns(df, on, "on", name)
        check_columns(df, label_col_name, "label_col_name", name)
    frames = {name: df.dropna(subset=[label_col_name]) for name, df in frames.items()}
    if data is not None:
        parts = split_rows(len(frames["data"]), (0.7, 0.15, 0.15), seed)
        frames = {n: frames["data"].iloc[rows] for n, rows in zip(("train", "val", "test"), parts, strict=True)}
    train_df, val_df, *rest = frames.values()
    found = list(train_df[label_col_name].unique())
    if all(isinstance(v, (int, np.integer)) for v in found) and sorted(found) == list(range(len(found))):
        found = sorted(found)  # numbered already
    label_map = {str(v): i for i, v in enumerate(found)}
    if len(label_map) < 2:
        raise ValueError(f"label_col_name: the training part holds {len(label_map)} class, two are needed")
    labels = [_label_ids(df, label_col_name, label_map) for df in (train_df, val_df, *rest)]
    weights = _class_weights(labels[0], len(label_map), weight_list) if weighted_loss else None

    classifier = Classifier(model, num_labels=len(label_map), seed=seed)
    texts = [row_texts(df, on, classifier.sep_token) for df in (train_df, val_df, *rest)]
    trained, evaluation = _fit_classifier(
        classifier, list(zip(texts, labels, strict=True)), weights, eval_steps, batch_size, lr, epochs, max_length,
        seed, progress,
    )  # fmt: skip
    from jaxformers import hub

    directory = Path(model_save_dir) / model_save_name
    hub.save(trained, directory, classifier.tokenizer)
    atomic.write_json_atomic(directory / "label_map.json", label_map)
    atomic.write_json_atomic(directory / "LT_evaluation.json", evaluation)
    return str(directory)


def _fit_classifier(
    classifier: Classifier, parts: list, weights: np.ndarray | None, eval_steps: int, batch_size: int, lr: float,
    epochs: int, max_length: int | None, seed: int, progress: bool,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """(model of best validation F1, evaluation); parts = (texts, labels) of training, validation and perhaps test."""
    import jax
    import jax.numpy as jnp

    from jaxformers import train
    from jaxformers.data.batches import own_rows
    from jaxformers.embedding import forward_texts
    from jaxformers.functional import with_params
    from jaxformers.tasks.linktransformer_data import tokenize

    model, tokenizer = classifier.model, classifier.tokenizer
    (texts, labels), (val_texts, val_labels), *test = parts
    class_weights = None if weights is None else jnp.asarray(weights, jnp.float32)
    size = min(batch_size, len(texts))

    def batches():
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(len(texts))
            for start in range(0, len(order) - size + 1, size):
                rows = order[start : start + size]
                part = [texts[i] for i in rows]
                batch = {"inputs": tokenize(model, tokenizer, part, max_length), "labels": labels[rows]}
                yield own_rows(batch)

    def objective(apply, params, batch, key):
        logits = apply(params, batch["inputs"], rngs=key).logits
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), batch["labels"][:, None], 1)[:, 0]
        weight = jnp.ones_like(nll) if class_weights is None else class_weights[batch["labels"]]
        return jnp.sum(weight * nll) / jnp.maximum(jnp.sum(weight), 1e-9), {}

    def score(current: Any, texts: list[str], labels: np.ndarray) -> dict[str, float]:
        logits = forward_texts(current, texts, "logits", tokenizer=tokenizer, max_length=max_length)
        average = "binary" if logits.shape[1] == 2 else "weighted"
        precision, recall, f1 = metrics.precision_recall_f1(labels, logits.argmax(1), average)
        accuracy = metrics.accuracy(labels, logits.argmax(1))
        return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}

    best: dict[str, Any] = {"f1": -1.0, "params": None}

    def evaluate(params: Any, step: int) -> dict[str, float]:
        found = score(with_params(model, params), val_texts, val_labels)
        if found["f1"] > best["f1"]:  # copied: the next step reuses the memory
            best.update(f1=found["f1"], params=jax.tree.map(jnp.copy, params), step=step)
        return {f"eval_{name}": value for name, value in found.items()}

    config = train.TrainConfig(
        steps=epochs * max(1, len(texts) // size),
        optim=train.OptimConfig(learning_rate=lr, schedule="linear"),
        eval_every=eval_steps,
        progress=progress,
    )
    result = train.fit(objective, model, batches(), config, key=jax.random.key(seed), evaluate=evaluate)
    trained = with_params(model, best["params"])
    evaluation = {"best_step": best["step"], "val": score(trained, val_texts, val_labels), "history": result.history}
    evaluation["test"] = score(trained, *test[0]) if test else None
    return trained, evaluation


def _label_ids(df: DataFrame, column: str, label_map: Mapping[str, int]) -> np.ndarray:
    unknown = [v for v in df[column].unique() if str(v) not in label_map]
    if unknown:
        raise ValueError(f"label_col_name: the label {unknown[0]!r} does not occur in the training part")
    if not len(df):
        raise ValueError("data: a part of the split is empty; there are too few rows")
    return np.array([label_map[str(v)] for v in df[column]], np.int32)


def _class_weights(labels: np.ndarray, n: int, given: Sequence[float] | None) -> np.ndarray:
    if given is None:
        return 1 - np.bincount(labels, minlength=n) / len(labels)
    if len(given) != n or min(given) < 0 or not max(given) > 0:
        raise ValueError(f"weight_list must hold {n} weights >= 0, one per class, got {list(given)}")
    return np.asarray(given, np.float32)


def _check_label_map(label_map: Mapping[str, int], num_labels: int) -> None:
    if len(label_map) != num_labels:
        raise ValueError(f"label_map has {len(label_map)} labels, but num_labels is {num_labels}")
    if sorted(label_map.values()) != list(range(num_labels)):
        raise ValueError(f"label_map must map names to 0..{num_labels - 1}, each once, got {dict(label_map)}")


class Classifier:
    """A row classifier: texts -> (n, labels) logits, with the names of its labels where it has any."""

    def __init__(self, model: Any, num_labels: int | None = None, seed: int = 0):
        """`num_labels`: to be trained on that many labels, with a new head where the checkpoint has none."""
        self.model, self.tokenizer, self.label_map = model, None, None
        if isinstance(model, (str, os.PathLike)):
            import jax

            from jaxformers import hub

            new = {} if num_labels is None else {"num_labels": num_labels, "key": jax.random.key(seed)}
            self.model = hub.load(os.fspath(model), head="sequence_classification", **new)
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
