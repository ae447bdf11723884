"""Short texts with labels, and classifiers of them, for the experiments that compare classifiers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxformers as jf
from experiments import common
from jaxformers.data.batches import array_batches
from jaxformers.data.text import python_sources, read_labelled
from jaxformers.data.tokenizers import Tokenizer
from jaxformers.losses import cross_entropy
from jaxformers.models import bert
from jaxformers.train import TrainConfig, fit

PARTS = ("train", "val", "test")
Texts = tuple[Sequence[Any], np.ndarray]  # texts, or pairs of them, and their labels


def labelled_texts(given: Path | None, rows: int) -> dict[str, Any]:
    """{"task": its name, "train": (texts, labels), "dev": (texts, labels)}, `rows` of each at most.

    `given`: a directory with train.tsv and dev.tsv (.gz allowed), sentence and label; by default SST-2 where
    sst2_small lies beside the repository, else: from which package of the standard library is this line of code?
    """
    root = common.shared_data("sst2_small", given)
    if root is not None:
        found = {part: _read(root, part, ("tsv",), "sentence") for part in ("train", "dev")}
        return {"task": "SST-2", **{part: _first(texts, rows) for part, texts in found.items()}}
    lines, labels = lines_of_code("asyncio", "email", "tkinter", "xml", "multiprocessing", "distutils")
    cut = min(len(lines) * 9 // 10, rows)
    end = cut + min(cut, 2000)
    parts = {"train": (lines[:cut], labels[:cut]), "dev": (lines[cut:end], labels[cut:end])}
    return {"task": "package of a line of code", **parts}


def parted_texts(given: Path | None, rows: int | None, packages: Sequence[str]) -> dict[str, Texts]:
    """{"train", "val", "test": (texts, labels)}, `rows` of each at most (None: all).

    `given`: a directory with these as .jsonl, .tsv or .csv (.gz allowed), text (text2 for pairs) and label; by default
    sentiment_sentences beside the repository, else: from which of the `packages` is this line of code?
    """
    root = common.shared_data("sentiment_sentences", given)
    if root is not None:
        found = {part: _read(root, part, ("jsonl", "tsv", "csv"), "text") for part in PARTS}
    else:
        lines, labels = lines_of_code(*packages)
        ends = {"train": (0, 2000), "val": (2000, 2500), "test": (2500, 3000)}
        found = {part: (lines[a:b], labels[a:b]) for part, (a, b) in ends.items()}
    return {part: _first(texts, rows) for part, texts in found.items()}


def lines_of_code(*packages: str) -> tuple[list[str], np.ndarray]:
    """Lines of these packages of Python's standard library, shuffled; a package's number is the label."""
    lines, labels = [], []
    for name, source in python_sources().items():
        package = name.split("/")[0]
        if package in packages:
            kept = [line.strip() for line in source.splitlines() if len(line.split()) > 3]
            lines += kept
            labels += [packages.index(package)] * len(kept)
    order = np.random.default_rng(0).permutation(len(lines))
    return [lines[i] for i in order], np.asarray(labels, np.int32)[order]


def encoded(tokenizer: Tokenizer, part: Texts, length: int, *, padded: bool = True) -> dict[str, np.ndarray]:
    """Rows of tokens and "labels": of `length` tokens each, or where not `padded` of as many as the longest has."""
    texts, labels = part
    columns = zip(*texts, strict=True) if isinstance(texts[0], tuple) else (texts,)
    rows = tokenizer(*map(list, columns), max_length=length, buckets=(length,) if padded else None)
    return {**rows, "labels": labels}


# ---- classifiers ---------------------------------------------------------------------------------------------------


def new_classifier(
    tokenizer: Tokenizer, labels: int, *, width: int, layers: int, heads: int, length: int, inner: int | None = None,
    dropout: float = 0.1, attention_dropout: float | None = None, head: str = "sequence_classification", key: jax.Array,
) -> nnx.Module:  # fmt: skip
    """A BERT of random weights; by default with four times its width inside, and the same dropout everywhere."""
    size = bert.Config(
        tokenizer.vocab_size, width, layers, heads, 4 * width if inner is None else inner, num_labels=labels,
        max_position_embeddings=length, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout if attention_dropout is None else attention_dropout,
    )  # fmt: skip
    return jf.init(size, head=head, key=key)


def label_loss(apply: Any, params: Any, batch: Any, key: Any) -> tuple[jax.Array, dict[str, Any]]:
    """The objective of classification."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return cross_entropy(apply(params, inputs, rngs=key).logits, batch["labels"]), {}


def trained(
    model: nnx.Module, rows: dict[str, np.ndarray], batch: int, config: TrainConfig, *, key: jax.Array, seed: int = 0,
    loss: Any = label_loss,
) -> nnx.Module:  # fmt: skip
    """``model`` trained on labelled rows; ``seed``: of their order."""
    data = array_batches(rows, min(batch, len(rows["input_ids"])), seed=seed)
    return fit(loss, model, data, config, key=key).model


def _read(root: Path, part: str, kinds: Sequence[str], field: str) -> Texts:
    names = [f"{part}.{kind}{gz}" for kind in kinds for gz in ("", ".gz")]
    file = next((root / name for name in names if (root / name).exists()), None)
    if file is None:
        raise ValueError(f"data: {root} has none of {', '.join(names)}")
    found = read_labelled(file, field)
    if not found[0]:
        raise ValueError(f"data: {file} has no rows")
    return found


def _first(part: Texts, rows: int | None) -> Texts:
    return part[0][:rows], part[1][:rows]
