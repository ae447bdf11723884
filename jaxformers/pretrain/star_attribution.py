"""What a style embedding is for: who wrote this, did one person write both, which texts belong together.

The downstream uses of STAR (arXiv 2310.11081). Everything here takes `encode`, a function from a list of n texts to an
(n, width) array, such as the `embed` of a trained `StyleModel`; nothing is trained but the one logistic layer of
`Verifier`. Tables may be pandas DataFrames, dicts of columns or lists of rows; where a DataFrame goes in, a DataFrame
comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxformers.extras import require

Encode = Callable[[list[str]], Any]


def columns(table: Any, required: Sequence[str], optional: Sequence[str] = (), name: str = "table") -> dict[str, list]:
    """`table` (DataFrame, mapping of columns, or sequence of row mappings) -> {column: list}, optional ones if present.

    Raises ValueError naming the missing column, unequal column lengths, or an empty table.
    """
    if hasattr(table, "to_dict") and hasattr(table, "columns"):
        found = {c: table[c].tolist() for c in (*required, *optional) if c in table.columns}
    elif isinstance(table, Mapping):
        found = {c: list(table[c]) for c in (*required, *optional) if c in table}
    else:
        rows = list(table)
        if not all(isinstance(row, Mapping) for row in rows):
            raise ValueError(f"{name}: expected a DataFrame, a dict of columns, or a list of dicts")
        partly = [c for c in (*required, *optional) if 0 < sum(c in row for row in rows) < len(rows)]
        if partly:
            raise ValueError(f"{name}: some rows have no {partly[0]!r}")
        found = {c: [row[c] for row in rows] for c in (*required, *optional) if rows and c in rows[0]}
    missing = [c for c in required if c not in found]
    if missing:
        raise ValueError(f"{name}: no column {missing[0]!r}; needed are {', '.join(required)}")
    lengths = {c: len(values) for c, values in found.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{name}: columns of unequal length {lengths}")
    if not next(iter(lengths.values()), 0):
        raise ValueError(f"{name}: it has no rows")
    return found


def checked_texts(texts: Any, name: str = "texts") -> list[str]:
    """A list of non-empty strings, unchanged (case, punctuation and emoji are the signal). Raises ValueError."""
    if isinstance(texts, str):
        raise ValueError(f"{name}: expected a list of texts, got one string")
    texts = texts.tolist() if hasattr(texts, "tolist") else list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}: text {i} is {'empty' if isinstance(text, str) else repr(text)}")
    return texts


def unit(x: Any) -> np.ndarray:
    """Rows of length 1; a zero row stays zero. float64 input stays float64, everything else becomes float32."""
    x = np.asarray(x)
    x = x if x.dtype == np.float64 else x.astype(np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class AuthorIndex:
    """Known authors, each the normalised mean of the normalised embeddings of the texts known to be theirs.

    `support`: table with columns author, text. `authors`: who is to be told apart (default: all of the table); each
    needs a text. `.authors` lists them in order of first appearance, `.centroids` is (authors, width).
    """

    def __init__(self, support: Any, encode: Encode, *, authors: Sequence | None = None):
        found = columns(support, ("author", "text"), name="support")
        texts = checked_texts(found["text"], "support")
        self.authors = list(dict.fromkeys(found["author"] if authors is None else authors))
        missing = [a for a in self.authors if a not in set(found["author"])]
        if missing:
            raise ValueError(f"support: no text of author {missing[0]!r} ({len(missing)} such authors asked for)")
        place = {a: i for i, a in enumerate(self.authors)}
        kept = [i for i, a in enumerate(found["author"]) if a in place]
        owner = np.array([place[found["author"][i]] for i in kept])
        z = unit(encode([texts[i] for i in kept]))
        self.centroids = unit(np.stack([z[owner == a].mean(0) for a in range(len(self.authors))]))
        self._encode = encode

    def similarities(self, queries: Any) -> np.ndarray:
        """n texts -> (n, authors) cosine of each with each author's centroid."""
        return unit(self._encode(checked_texts(queries, "queries"))) @ self.centroids.T

    def predict(self, queries: Any, k: int = 1) -> Any:
        """The `k` likeliest authors of each text, best first, ties to the earlier author.

        A list of texts gives n lists of (author, cosine). A DataFrame with a column text gives one with k rows for each
        of its own, in order, with the columns rank (from 1), author and score added; an author column that is already
        there goes along as true_author.
        """
        if not 1 <= k <= len(self.authors):
            raise ValueError(f"k: must be in 1..{len(self.authors)} (the number of authors), got {k}")
        frame = queries if hasattr(queries, "columns") else None
        sim = self.similarities(queries if frame is None else columns(frame, ("text",), name="queries")["text"])
        best = np.argsort(-sim, axis=1, kind="stable")[:, :k]
        scores = np.take_along_axis(sim, best, axis=1)
        if frame is None:
            pairs = np.stack([best, scores], axis=-1)  # (n, k, 2)
            return [[(self.authors[int(a)], float(s)) for a, s in row] for row in pairs]
        taken = [c for c in ("rank", "score", "true_author") if c in frame.columns]
        if taken:
            raise ValueError(f"queries: the column {taken[0]!r} is taken by the result; rename it")
        out = frame.rename(columns={"author": "true_author"}).loc[frame.index.repeat(k)].copy()
        out["rank"] = np.tile(np.arange(1, k + 1), len(frame))
        out["author"] = [self.authors[a] for a in best.ravel()]
        out["score"] = scores.ravel()
        return out


class Verifier:
    """Did one author write both texts? A score in [0, 1]; exactly 0.5 leaves the pair unanswered.

    `features="difference"` (|u - v|), `"product"` (u * v) or `"both"`: one logistic layer fitted to labelled pairs, on
    features of normalised embeddings, with weight decay `l2` (of the summed loss). `features="cosine"`: no layer; the
    cosine, mapped piecewise linearly to [0, 1] such that the cut with the best accuracy on the labelled pairs falls on
    0.5. Scores within `undecided` of 0.5 become 0.5 (c@1 and F0.5u count them as left out).
    """

    def __init__(self, encode: Encode, *, features: str = "both", l2: float = 1.0, undecided: float = 0.0):
        if features not in ("difference", "product", "both", "cosine"):
            raise ValueError(f"features: must be 'difference', 'product', 'both' or 'cosine', got {features!r}")
        if not l2 > 0:
            raise ValueError(f"l2: must be > 0 (separable pairs have no finite solution without), got {l2}")
        if not 0 <= undecided < 0.5:
            raise ValueError(f"undecided: must be in [0, 0.5), got {undecided}")
        self._encode, self._features, self._l2, self._undecided = encode, features, l2, undecided
        self._threshold: float | None = None
        self._layer: tuple[np.ndarray, float] | None = None
        self._spread: tuple[np.ndarray, np.ndarray] | None = None

    def fit(self, pairs: Any, labels: Any = None) -> Verifier:
        """Learn from pairs [(text, text), ...] and `labels` 0/1, or a table of text_a, text_b, label. Returns self."""
        left, right, own = _pairs(pairs, with_labels=labels is None)
        y = np.asarray(own if labels is None else labels)
        if y.shape != (len(left),) or not np.isin(y, (0, 1)).all() or len(np.unique(y)) < 2:
            raise ValueError(f"labels: expected {len(left)} values 0 or 1, with both among them")
        x = self._pair_features(left, right)
        if self._features == "cosine":
            from jaxformers.metrics import best_threshold_accuracy

            self._threshold = best_threshold_accuracy(x[:, 0], y)[1]
            return self
        self._spread = x.mean(0), np.maximum(x.std(0), 1e-6)
        self._layer = _logistic(self._standardised(x), y.astype(np.float32), self._l2)
        return self

    def score(self, pairs: Any) -> Any:
        """(n,) scores of the pairs; for a DataFrame with text_a, text_b a copy of it with the column score added."""
        if self._threshold is None and self._layer is None:
            raise ValueError("score: call fit with labelled pairs first")
        left, right, _ = _pairs(pairs, with_labels=False)
        x = self._pair_features(left, right)
        if self._features == "cosine":
            s, cut = x[:, 0].astype(np.float64), self._threshold
            p = np.interp(s, [-1.0, cut, 1.0], [0.0, 0.5, 1.0])
        else:
            weights, bias = self._layer
            p = 1.0 / (1.0 + np.exp(-(self._standardised(x).astype(np.float64) @ weights + bias)))
        p = np.where(np.abs(p - 0.5) <= self._undecided, 0.5, p)
        return _with(pairs, "score", p) if hasattr(pairs, "columns") else p

    def _pair_features(self, left: list[str], right: list[str]) -> np.ndarray:
        texts = list(dict.fromkeys(left + right))  # each distinct text once
        place = {t: i for i, t in enumerate(texts)}
        z = unit(self._encode(texts))
        u, v = z[[place[t] for t in left]], z[[place[t] for t in right]]
        parts = {
            "difference": lambda: np.abs(u - v),
            "product": lambda: u * v,
            "both": lambda: np.concatenate([np.abs(u - v), u * v], 1),
            "cosine": lambda: (u * v).sum(1, keepdims=True),
        }
        return parts[self._features]().astype(np.float32)

    def _standardised(self, x: np.ndarray) -> np.ndarray:
        mean, spread = self._spread
        return (x - mean) / spread


def verify(pairs: Any, encode: Encode) -> Any:
    """Zero-shot verification: the cosine in [-1, 1] of the two texts of each pair (`Verifier` makes it a decision).

    `pairs` as for `Verifier.score`, which also says what comes back.
    """
    left, right, _ = _pairs(pairs, with_labels=False)
    cosine = Verifier(encode, features="cosine")._pair_features(left, right)[:, 0]
    return _with(pairs, "score", cosine) if hasattr(pairs, "columns") else cosine


def cluster(
    texts: Any,
    encode: Encode,
    *,
    n_clusters: int | None = None,
    threshold: float | None = None,
    method: str = "agglomerative",
    seed: int = 0,
) -> Any:
    """Texts of one author together. n texts -> (n,) int labels from 0; a DataFrame comes back with the column cluster.

    `method="agglomerative"`: average linkage on cosine distance, cut at `n_clusters` or at the distance `threshold`
    (one of the two). `method="kmeans"`: on unit vectors, needs `n_clusters`; `seed` is its. Needs scikit-learn.
    """
    if method not in ("agglomerative", "kmeans"):
        raise ValueError(f"method: must be 'agglomerative' or 'kmeans', got {method!r}")
    if (n_clusters is None) == (threshold is None):
        raise ValueError("n_clusters, threshold: give exactly one of the two")
    if method == "kmeans" and n_clusters is None:
        raise ValueError("n_clusters: k-means needs it")
    frame = texts if hasattr(texts, "columns") else None
    given = checked_texts(texts if frame is None else columns(frame, ("text",), name="texts")["text"])
    if n_clusters is not None and not 1 <= n_clusters <= len(given):
        raise ValueError(f"n_clusters: must be in 1..{len(given)} (the number of texts), got {n_clusters}")
    sk = require("sklearn.cluster", extra="link")
    z = unit(encode(given))
    if method == "kmeans":
        labels = sk.KMeans(n_clusters, n_init=10, random_state=seed).fit(z).labels_
    elif len(given) == 1:
        labels = np.zeros(1)
    else:
        options = {"n_clusters": n_clusters, "distance_threshold": threshold, "metric": "cosine", "linkage": "average"}
        labels = sk.AgglomerativeClustering(**options).fit(z).labels_
    labels = np.asarray(labels, np.int64)
    return labels if frame is None else _with(frame, "cluster", labels)


def _with(frame: Any, column: str, values: np.ndarray) -> Any:
    if column in frame.columns:
        raise ValueError(f"the column {column!r} is taken by the result; rename it")
    return frame.assign(**{column: values})


def _pairs(pairs: Any, *, with_labels: bool) -> tuple[list[str], list[str], list | None]:
    if hasattr(pairs, "columns") or isinstance(pairs, Mapping):
        found = columns(pairs, ("text_a", "text_b", *(["label"] if with_labels else [])), name="pairs")
        left, right, labels = found["text_a"], found["text_b"], found.get("label")
    elif with_labels:
        raise ValueError("labels: needed unless pairs is a table with a column label")
    else:
        pairs = list(pairs)
        if not pairs or any(isinstance(p, str) or len(p) != 2 for p in pairs):
            raise ValueError("pairs: expected a non-empty list of two texts each, or a table with text_a and text_b")
        left, right, labels = [p[0] for p in pairs], [p[1] for p in pairs], None
    return checked_texts(left, "pairs"), checked_texts(right, "pairs"), labels


def _logistic(x: np.ndarray, y: np.ndarray, l2: float, steps: int = 200) -> tuple[np.ndarray, float]:
    """Minimises sum log-loss + l2/2 |w|^2 (bias free) by L-BFGS. (n, features), (n,) -> weights (features,), bias."""

    def loss(p):
        logits = jnp.matmul(x, p["w"], precision="highest") + p["b"]
        return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, y)) + 0.5 * l2 * jnp.sum(p["w"] ** 2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    @jax.jit
    def run(p):
        def step(carry, _):
            p, state = carry
            value, grad = value_and_grad(p, state=state)
            updates, state = solver.update(grad, state, p, value=value, grad=grad, value_fn=loss)
            return (optax.apply_updates(p, updates), state), None

        return jax.lax.scan(step, (p, solver.init(p)), length=steps)[0][0]

    p = run({"w": jnp.zeros(x.shape[1]), "b": jnp.zeros(())})
    return np.asarray(p["w"], np.float64), float(p["b"])
