"""The batches of STAR: which texts train, and B authors with V texts each, drawn anew for every step."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxformers.data.tokenizers import Tokenizer, length_buckets
from jaxformers.pretrain.star_attribution import checked_texts, columns


def author_table(table: Any) -> dict[str, list]:
    """The texts to train on: {"author", "text", "source", "doc"} in the order given.

    `table`: DataFrame, dict of columns or list of rows with author, text and optionally source and doc. A text that
    occurs more than once in a source is dropped with all its copies; authors left with fewer than two texts are dropped
    with a warning that counts them. Raises ValueError for an empty text and when fewer than two authors remain.
    """
    found = columns(table, ("author", "text"), ("source", "doc"))
    checked_texts(found["text"], "table")
    rows = len(found["text"])
    found = {"source": [None] * rows, "doc": [None] * rows, **found}
    copies = Counter(zip(found["source"], found["text"], strict=True))
    kept = [i for i in range(rows) if copies[found["source"][i], found["text"][i]] == 1]
    texts_of = Counter(found["author"][i] for i in kept)
    few = {a for a in found["author"] if texts_of[a] < 2}
    if few:
        everyone = len(set(found["author"]))
        warnings.warn(f"{len(few)} of {everyone} authors have fewer than two texts: dropped", stacklevel=2)
    kept = [i for i in kept if found["author"][i] not in few]
    if len({found["author"][i] for i in kept}) < 2:
        raise ValueError("table: fewer than two authors with two different texts each; nothing can be told apart")
    return {name: [values[i] for i in kept] for name, values in found.items()}


class AuthorBatches:
    """Batches {"input_ids", "attention_mask" (B, V, L) int32, "labels" (B,) int32} of B authors with V texts each.

    Authors are drawn without replacement, texts too (with replacement from an author of fewer than V). Where an
    author's documents are known (`doc`) the views of one with several come from two at least: what they share is then
    not the topic. Batch i depends on (seed, i) alone, so an iterator's state is one number; `batches` ends the
    iteration. Several processes get their own authors of every batch. L is the same for all batches.
    """

    def __init__(
        self,
        table: dict[str, list],
        authors: int,
        views: int,
        *,
        tokenizer: Tokenizer,
        max_length: int,
        seed: int = 0,
        batches: int | None = None,
    ):
        if views < 2:
            raise ValueError(f"views: must be >= 2 (a text and its positive), got {views}")
        self.authors = list(dict.fromkeys(table["author"]))
        if not 2 <= authors <= len(self.authors):
            known = len(self.authors)
            raise ValueError(f"authors_per_batch: must be in 2..{known} (the authors there are), got {authors}")
        if authors % jax.process_count():
            raise ValueError(f"authors_per_batch: {authors} do not divide over {jax.process_count()} processes")
        self.batch, self.views, self.seed, self.batches = authors, views, seed, batches
        ids = tokenizer(table["text"], max_length=max_length, padding_side="right", buckets=length_buckets(max_length))
        self.ids, self.mask = ids["input_ids"], ids["attention_mask"]
        place = {a: i for i, a in enumerate(self.authors)}
        owner = np.array([place[a] for a in table["author"]])
        self.rows = [np.flatnonzero(owner == a) for a in range(len(self.authors))]
        number = {d: i for i, d in enumerate(dict.fromkeys(zip(owner.tolist(), table["doc"], strict=True)))}
        self.doc = np.array([number[d] for d in zip(owner.tolist(), table["doc"], strict=True)])

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch number `step`: authors (B,) and the rows of their texts (B, V)."""
        rng = np.random.default_rng((self.seed, step))
        authors = rng.choice(len(self.authors), self.batch, replace=False)
        return authors, np.stack([self._views(rng, self.rows[a]) for a in authors])

    def _views(self, rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        chosen = rng.choice(rows, self.views, replace=len(rows) < self.views)
        if (self.doc[chosen] == self.doc[chosen[0]]).all():
            elsewhere = rows[self.doc[rows] != self.doc[chosen[0]]]
            if len(elsewhere):
                chosen[rng.integers(self.views)] = rng.choice(elsewhere)
        return chosen

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return _Position(self)


class _Position:
    def __init__(self, batches: AuthorBatches):
        self.batches, self.step = batches, 0

    def __iter__(self) -> _Position:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self.batches.batches is not None and self.step >= self.batches.batches:
            raise StopIteration
        authors, rows = self.batches.draw(self.step)
        self.step += 1
        share = len(authors) // jax.process_count()
        mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        labels, rows = authors[mine].astype(np.int32), rows[mine]
        return {"input_ids": self.batches.ids[rows], "attention_mask": self.batches.mask[rows], "labels": labels}

    def get_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]
