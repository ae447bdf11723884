"""Perplexity of causal language models, by the protocols that published numbers use, and accuracy of classifiers.

Source: GPTQ, arXiv 2210.17323, and its official code. A text is tokenised as a whole and cut into
n = floor(N / length) disjoint windows, the tail dropped; with the cross-entropy of the length - 1 predictions of each,

    perplexity = exp(mean over windows of the mean over predictions)

Numbers from different protocols differ by more than 4-bit quantisation costs: compare like with like.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers.data import text
from jaxformers.functional import functional
from jaxformers.models.config import positions_of

PROTOCOLS = ("wikitext2", "ptb", "ptb_new", "c4", "c4_new")


def perplexity(model: nnx.Module, ids: Sequence[int] | np.ndarray, length: int, *, batch_size: int = 8) -> float:
    """Perplexity of ``model`` (causal head) on a stream of token ids, or on windows (n, length) that are cut already.

    Raises ValueError for a model without a causal head, ids outside its vocabulary, fewer than one window, or
    ``length`` below 2.
    """
    if model.head_name != "causal_lm":
        raise ValueError(f"model: perplexity needs a causal_lm head, this one has {model.head_name or 'none'}")
    if length < 2:
        raise ValueError(f"length={length}: a window needs at least one prediction, so 2 tokens")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be positive")
    ids = np.asarray(ids)
    windows = ids.astype(np.int32) if ids.ndim == 2 else text.windows(ids, length)
    if windows.shape[1] != length or not len(windows):
        raise ValueError(f"ids: expected windows of length={length}, got shape {windows.shape}")
    rows = model.config.vocab_size
    if windows.min() < 0 or windows.max() >= rows:
        raise ValueError(f"ids: token ids from {windows.min()} to {windows.max()}, but the vocabulary has {rows}")
    apply, params = functional(model)
    step = _step(apply)
    total = 0.0
    for start in range(0, len(windows), batch_size):
        part = windows[start : start + batch_size]
        padded = np.pad(part, ((0, min(batch_size, len(windows)) - len(part)), (0, 0)))  # one shape, one compile
        total += float(np.asarray(step(params, padded), np.float64)[: len(part)].sum())
    return float(np.exp(total / len(windows)))


def accuracy(model: nnx.Module, rows: Mapping[str, np.ndarray], *, batch_size: int = 8) -> float:
    """Share of labels that are their row's largest logit.

    ``rows``: the model's inputs by name, and "labels" in the logits' shape without its last axis: (n,) for classes of
    sequences, images and clips, (n, L) for those of tokens, where negative ones do not count. The last batch holds what
    is left and no padding: the rows of a batch share a scale where a model rounds its activations.

    Raises ValueError for rows without labels, of unequal numbers, or none, and for labels of another shape.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be positive")
    if "labels" not in rows:
        raise ValueError(f"rows: expected inputs by name and 'labels', got {', '.join(rows)}")
    counts = {name: len(array) for name, array in rows.items()}
    n = counts["labels"]
    if n == 0 or set(counts.values()) != {n}:
        raise ValueError(f"rows: expected as many of each and at least one, got {counts}")
    apply, params = functional(model)
    predict = jax.jit(lambda params, batch: apply(params, batch).logits.argmax(-1))
    hits, counted = 0, 0
    for start in range(0, n, batch_size):
        batch = {name: array[start : start + batch_size] for name, array in rows.items()}
        labels = np.asarray(batch.pop("labels"))
        predicted = np.asarray(predict(params, batch))
        if labels.shape != predicted.shape:
            raise ValueError(f"rows: labels have shape {labels.shape}, expected {predicted.shape} as the logits say")
        hits, counted = hits + int((predicted == labels).sum()), counted + int((labels >= 0).sum())
    if not counted:
        raise ValueError("rows: no label is at least 0")
    return hits / counted


def _step(apply: Callable[..., Any]) -> Callable[..., jax.Array]:
    @jax.jit
    def step(params: Any, ids: jax.Array) -> jax.Array:
        """(B, L) ids -> (B,) mean cross-entropy of each window."""
        logits = apply(params, {"input_ids": ids}).logits[:, :-1].astype(jnp.float32)
        picked = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked, axis=-1)

    return step


def protocol_windows(
    protocol: str, rows: Sequence[str], encode: Callable[[str], Sequence[int]], length: int
) -> np.ndarray:
    """Token ids int32 (n, length) of an evaluation text, cut as published numbers were.

    ``rows``: what the protocol starts from. "wikitext2": the rows of the raw test split, each with its own newline,
    blank ones empty; joined by two newlines. "ptb": the validation sentences, joined by two newlines; "ptb_new": the
    test sentences, joined by a space. "c4": the documents of validation shard 0, of which 256 random windows are taken
    (seed 0); "c4_new": the first 1100 of them, joined by a space, the first 256 windows.

    Raises ValueError for an unknown protocol, or too little text.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r}: must be one of {PROTOCOLS}")
    if protocol == "c4":
        return text.random_document_windows(rows, encode, 256, length, seed=0)
    if protocol == "c4_new":
        return text.windows(encode(" ".join(rows[:1100])), length)[:256]
    joint = " " if protocol == "ptb_new" else "\n\n"
    return text.windows(encode(joint.join(rows)), length)


def perplexity_of_file(
    model: str | Path | nnx.Module, file: str | Path, *, length: int | None = None, batch_size: int = 8
) -> dict[str, Any]:
    """Perplexity on a file: ``.npy`` of token ids (samples, length), or text, tokenised as a whole.

    A table's column ``text`` (``.jsonl``, ``.csv``, ``.tsv``) is joined by two newlines first. ``length``: default what
    the model's positions allow, at most 2048. Returns ``perplexity``, ``windows``, ``length`` and ``tokens`` (of the
    whole file, the dropped tail included).
    """
    from jaxformers import hub

    loaded = hub.load(model) if isinstance(model, str | Path) else model
    windows, tokens = _windows_and_tokens(loaded, Path(file), length)
    found = perplexity(loaded, windows, windows.shape[1], batch_size=batch_size)
    return {"perplexity": round(found, 4), "windows": len(windows), "length": windows.shape[1], "tokens": tokens}


def windows_of_file(model: nnx.Module, file: str | Path, length: int | None = None) -> np.ndarray:
    """Token ids int32 (n, length) of a file, as :func:`perplexity_of_file` takes them. Raises ValueError as there."""
    return _windows_and_tokens(model, Path(file), length)[0]


def _windows_and_tokens(model: nnx.Module, file: Path, length: int | None) -> tuple[np.ndarray, int]:
    """(windows, tokens of the whole file)."""
    from jaxformers.data.tokenizers import load_tokenizer

    if not file.is_file():
        raise ValueError(f"text: {file} does not exist")
    if file.suffix == ".npy":
        windows = text.read_token_ids(file)
        if length is not None and windows.shape[1] != length:
            raise ValueError(f"ids: expected windows of length={length}, got shape {windows.shape}")
        return windows, windows.size
    positions = positions_of(model.config) or 2048
    length = min(positions, 2048) if length is None else length
    table = [suffix for suffix in file.suffixes if suffix != ".gz"][-1:]
    whole = table and table[0] in (".jsonl", ".ndjson", ".csv", ".tsv")
    content = "\n\n".join(text.read_texts(file)) if whole else text.read_text(file)
    ids = load_tokenizer(model.source).encode(content)
    return text.windows(ids, length), len(ids)
