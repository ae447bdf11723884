"""Evaluation metrics shared by several systems, in float64 numpy.

Retrieval (who is the right neighbour), pair scores (same or not), classification, regression, segmentation,
and clustering. Every function takes array-likes, checks them, and returns Python floats, or counts; nothing here needs
scikit-learn.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

# ------------------------------------------------------------------------------------------------------- retrieval


def rank(scores: ArrayLike, depth: int | None = None) -> np.ndarray:
    """(queries, candidates) scores -> (queries, depth) candidate indices, best first, ties to the lower index."""
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2:
        raise ValueError(f"scores must be (queries, candidates), got shape {scores.shape}")
    return np.argsort(-scores, axis=1, kind="stable")[:, :depth]


def retrieval_metrics(
    ranked: ArrayLike,
    relevant: Sequence[Collection[int]],
    *,
    at: Sequence[int] = (1, 3, 5, 10),
    mrr_at: int | None = 10,
    ndcg_at: int = 10,
    map_at: int = 100,
) -> dict[str, float]:
    """Means over queries of the usual retrieval metrics with binary relevance.

    ranked: (queries, depth) candidate indices, best first (from `rank` or `search.topk`; -1 fills an empty place).
    relevant: for each query the candidate indices that are right (at least one each).
    Returns `accuracy@k` (a hit within k), `precision@k` (hits / k), `recall@k` (hits / relevant), `mrr@k` (1 / place of
    the first hit; `mrr_at=None` looks at the whole ranking and is called `mrr`), `ndcg@k` (gains 1 / log2(place + 1),
    ideal of min(relevant, k) ones) and `map@k` (sum of precisions at hits / min(k, relevant)).
    """
    ranked = np.asarray(ranked)
    if ranked.ndim != 2:
        raise ValueError(f"ranked must be (queries, depth), got shape {ranked.shape}")
    if len(ranked) != len(relevant) or not len(ranked):
        raise ValueError(f"relevant must hold one set for each of {len(ranked)} > 0 queries, got {len(relevant)}")
    empty = [i for i, r in enumerate(relevant) if len(r) == 0]
    if empty:
        raise ValueError(f"relevant: query {empty[0]} has no relevant candidate ({len(empty)} such queries)")

    hits = np.array([np.isin(row, list(r)) for row, r in zip(ranked, relevant, strict=True)])  # (queries, depth)
    n_relevant = np.array([len(set(r)) for r in relevant], np.float64)
    found = np.cumsum(hits, axis=1, dtype=np.float64)
    place = np.arange(1, hits.shape[1] + 1)

    out: dict[str, float] = {}
    for k in at:
        within = hits[:, :k].sum(1)
        out[f"accuracy@{k}"] = float((within > 0).mean())
        out[f"precision@{k}"] = float((within / k).mean())
        out[f"recall@{k}"] = float((within / n_relevant).mean())
    first = np.where(hits.any(1), hits.argmax(1) + 1, np.inf)
    if mrr_at is not None:
        first = np.where(first <= mrr_at, first, np.inf)
    out["mrr" if mrr_at is None else f"mrr@{mrr_at}"] = float((1 / first).mean())

    gain = 1 / np.log2(np.arange(2, ndcg_at + 2))
    ideal = np.array([gain[: int(min(n, ndcg_at))].sum() for n in n_relevant])
    top = hits[:, :ndcg_at]
    out[f"ndcg@{ndcg_at}"] = float(((top * gain[: top.shape[1]]).sum(1) / ideal).mean())

    precision_at_hits = np.where(hits, found / place, 0.0)[:, :map_at]
    out[f"map@{map_at}"] = float((precision_at_hits.sum(1) / np.minimum(map_at, n_relevant)).mean())
    return out


# ------------------------------------------------------------------------------------------------ scores of pairs


def _scores_and_labels(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, np.float64).ravel(), np.asarray(labels).ravel()
    if scores.shape != labels.shape or len(scores) < 2:
        raise ValueError(f"scores and labels must be equally long, at least 2; got {len(scores)} and {len(labels)}")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    if np.isnan(scores).any():
        raise ValueError("scores must not be NaN")
    return scores, labels.astype(np.float64)


def _cuts(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every realisable cut between neighbouring scores: (threshold, true positives, predicted positives, labels)."""
    scores, labels = _scores_and_labels(scores, labels)
    order = np.argsort(-scores, kind="stable")
    scores, labels = scores[order], labels[order]
    cut = np.flatnonzero(scores[:-1] > scores[1:])  # a cut inside a run of equal scores does not exist
    if not len(cut):
        raise ValueError("scores must hold at least two different values to place a threshold between")
    return (scores[cut] + scores[cut + 1]) / 2, np.cumsum(labels)[cut], cut + 1.0, labels


def best_threshold_f1(scores: ArrayLike, labels: ArrayLike) -> tuple[float, float, float, float]:
    """(f1, precision, recall, threshold) of the cut with the best F1; the highest such threshold among equals.

    A pair counts as positive above the threshold, which is the mean of the two scores around the cut.
    """
    threshold, true_positive, predicted, labels = _cuts(scores, labels)
    if not labels.any():
        raise ValueError("labels must hold at least one positive")
    precision, recall = true_positive / predicted, true_positive / labels.sum()
    f1 = np.where(true_positive > 0, 2 * precision * recall / np.maximum(precision + recall, 1e-300), 0.0)
    i = int(f1.argmax())
    return float(f1[i]), float(precision[i]), float(recall[i]), float(threshold[i])


def best_threshold_accuracy(scores: ArrayLike, labels: ArrayLike) -> tuple[float, float]:
    """(accuracy, threshold) of the cut with the best accuracy; the highest such threshold among equals."""
    threshold, true_positive, predicted, labels = _cuts(scores, labels)
    true_negative = (len(labels) - predicted) - (labels.sum() - true_positive)
    accuracy = (true_positive + true_negative) / len(labels)
    i = int(accuracy.argmax())
    return float(accuracy[i]), float(threshold[i])


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the precision-recall steps: sum of precision x gain in recall; equal scores enter together."""
    scores, labels = _scores_and_labels(scores, labels)
    if not labels.any():
        raise ValueError("labels must hold at least one positive")
    order = np.argsort(-scores, kind="stable")
    scores, labels = scores[order], labels[order]
    last = np.append(np.flatnonzero(scores[:-1] > scores[1:]), len(scores) - 1)  # the last of each run of equals
    true_positive = np.cumsum(labels)[last]
    recall_gain = np.diff(true_positive, prepend=0.0) / labels.sum()
    return float((true_positive / (last + 1) * recall_gain).sum())


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: P(positive scored above negative) + 1/2 P(equal)."""
    scores, labels = _scores_and_labels(scores, labels)
    positive = labels.sum()
    negative = len(labels) - positive
    if not positive or not negative:
        raise ValueError("labels must hold both a 0 and a 1")
    _, run, count = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(count) - (count - 1) / 2  # 1-based, shared by equal scores
    return float((mean_rank[run][labels == 1].sum() - positive * (positive + 1) / 2) / (positive * negative))


# ------------------------------------------------------------------------ verification (PAN): 0.5 means "no answer"


def c_at_1(p: ArrayLike, labels: ArrayLike) -> float:
    """(n_correct + n_unanswered n_correct / n) / n: an answer left out earns the accuracy of the others."""
    p, labels = _scores_and_labels(p, labels)
    n, unanswered = len(p), (p == 0.5).sum()
    correct = (((p > 0.5) == (labels == 1)) & (p != 0.5)).sum()
    return float((correct + unanswered * correct / n) / n)


def f05u(p: ArrayLike, labels: ArrayLike) -> float:
    """F0.5 with unanswered pairs as misses: 1.25 TP / (1.25 TP + 0.25 (FN + unanswered) + FP)."""
    p, labels = _scores_and_labels(p, labels)
    true_positive = ((p > 0.5) & (labels == 1)).sum()
    missed = ((p < 0.5) & (labels == 1)).sum() + (p == 0.5).sum()
    false_positive = ((p > 0.5) & (labels == 0)).sum()
    denominator = 1.25 * true_positive + 0.25 * missed + false_positive
    return float(1.25 * true_positive / denominator) if denominator else 0.0


def brier_complement(p: ArrayLike, labels: ArrayLike) -> float:
    """1 - mean (p - y)^2."""
    p, labels = _scores_and_labels(p, labels)
    return float(1 - ((p - labels) ** 2).mean())


def verification_metrics(p: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """All verification metrics of PAN: auc, c@1, f0.5u, f1 (of the answered pairs) and brier, p in [0, 1]."""
    p, labels = _scores_and_labels(p, labels)
    if (p < 0).any() or (p > 1).any():
        raise ValueError("p must lie in [0, 1]")
    answered = p != 0.5
    f1 = precision_recall_f1(labels[answered], p[answered] > 0.5)[2] if answered.any() else 0.0
    return {
        "auc": auc(p, labels),
        "c@1": c_at_1(p, labels),
        "f0.5u": f05u(p, labels),
        "f1": f1,
        "brier": brier_complement(p, labels),
    }


# -------------------------------------------------------------------------------------------------- classification


def _paired(true: ArrayLike, predicted: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    true, predicted = np.asarray(true).ravel(), np.asarray(predicted).ravel()
    if true.shape != predicted.shape or not len(true):
        raise ValueError(f"true and predicted must be equally long and not empty, got {len(true)} and {len(predicted)}")
    return true, predicted


def accuracy(true: ArrayLike, predicted: ArrayLike) -> float:
    """Share of equal labels."""
    true, predicted = _paired(true, predicted)
    return float((true == predicted).mean())


def precision_recall_f1(true: ArrayLike, predicted: ArrayLike, average: str = "binary") -> tuple[float, float, float]:
    """(precision, recall, f1): "binary" of class 1, "macro" plain mean over classes, "weighted" by true class size.

    Classes are those in `true` or `predicted`; a ratio with nothing below counts 0.
    """
    true, predicted = _paired(true, predicted)
    if average not in ("binary", "macro", "weighted"):
        raise ValueError(f"average must be 'binary', 'macro' or 'weighted', got {average!r}")
    classes = np.array([1]) if average == "binary" else np.unique(np.concatenate([true, predicted]))
    hit = np.array([((true == c) & (predicted == c)).sum() for c in classes], np.float64)
    said = np.array([(predicted == c).sum() for c in classes], np.float64)
    real = np.array([(true == c).sum() for c in classes], np.float64)
    precision, recall = hit / np.maximum(said, 1), hit / np.maximum(real, 1)
    f1 = 2 * hit / np.maximum(said + real, 1)
    weight = real / max(real.sum(), 1) if average == "weighted" else np.full(len(classes), 1 / len(classes))
    return float(precision @ weight), float(recall @ weight), float(f1 @ weight)


def macro_f1(true: ArrayLike, predicted: ArrayLike) -> float:
    """Mean over classes of F1."""
    return precision_recall_f1(true, predicted, "macro")[2]


def matthews(true: ArrayLike, predicted: ArrayLike) -> float:
    """Matthews' correlation of two lists of classes: cov(t, p) / sqrt(cov(t, t) cov(p, p)) of their one-hot rows.

    In -1..1, for any number of classes (Gorodkin 2004); 0 where all true or all predicted labels are one class.
    """
    true, predicted = _paired(true, predicted)
    classes = np.unique(np.concatenate([true, predicted]))
    t, p = ((labels[:, None] == classes).astype(np.float64) for labels in (true, predicted))
    cov = lambda a, b: ((a - a.mean(0)) * (b - b.mean(0))).sum()
    spread = np.sqrt(cov(t, t) * cov(p, p))
    return float(cov(t, p) / spread) if spread else 0.0


# ----------------------------------------------------------------------------------------------------- regression


def pearson(true: ArrayLike, predicted: ArrayLike) -> float:
    """Pearson's correlation of two lists of numbers; 0 where one of them is constant. ValueError for NaN."""
    true, predicted = (np.asarray(x, np.float64) for x in _paired(true, predicted))
    if not (np.isfinite(true).all() and np.isfinite(predicted).all()):
        raise ValueError("true and predicted must be finite")
    t, p = true - true.mean(), predicted - predicted.mean()
    spread = np.sqrt((t @ t) * (p @ p))
    return float(t @ p / spread) if spread else 0.0


def spearman(true: ArrayLike, predicted: ArrayLike) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal numbers sharing the mean of theirs."""

    def ranks(x: np.ndarray) -> np.ndarray:
        _, run, count = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[run]

    true, predicted = (np.asarray(x, np.float64) for x in _paired(true, predicted))
    if not (np.isfinite(true).all() and np.isfinite(predicted).all()):
        raise ValueError("true and predicted must be finite")
    return pearson(ranks(true), ranks(predicted))


# ---------------------------------------------------------------------------------------------------- segmentation


def confusion_matrix(true: ArrayLike, predicted: ArrayLike, classes: int, *, void: int | None = None) -> np.ndarray:
    """(classes, classes) int64: how many pixels of class `true` (rows) were `predicted` as which (columns).

    Labels of any equal shape, whole numbers from 0 to classes - 1; pixels whose true label is `void` (any number) are
    left out. Matrices of the parts of a data set add up to that of the whole.
    """
    true, predicted = np.asarray(true), np.asarray(predicted)
    if true.shape != predicted.shape:
        raise ValueError(f"predicted: expected the shape of the true labels, {true.shape}, got {predicted.shape}")
    kept = np.ones(true.shape, bool) if void is None else true != void
    true, predicted = true[kept].astype(np.int64), predicted[kept].astype(np.int64)
    for name, labels in (("true", true), ("predicted", predicted)):
        if labels.size and not (labels.min() >= 0 and labels.max() < classes):
            raise ValueError(f"{name}: labels must be from 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    return np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)


def intersection_over_union(confusion: ArrayLike, *, void: int | None = None) -> dict[str, np.ndarray | float]:
    """Of a :func:`confusion_matrix`: "iou" (classes,) = tp / (tp + fp + fn), their mean "miou", and the counts.

    A class neither there nor predicted has IoU 0 and counts in "miou", as in the evaluation of many published figures;
    "miou_present" leaves it out. A `void` class has no IoU: predicting it counts as a miss of the true class. Further
    "tp", "fp", "fn" (classes,), and "accuracy", the share of pixels that are right.
    """
    counts = np.asarray(confusion, np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"confusion: expected (classes, classes), got {counts.shape}")
    named = [c for c in range(len(counts)) if c != void]
    tp = np.diag(counts)[named]
    fn, fp = counts[named].sum(1) - tp, counts[named][:, named].sum(0) - tp
    union = tp + fp + fn
    iou = tp / np.maximum(union, 1)
    seen = union > 0
    return {
        "iou": iou, "miou": float(iou.mean()), "miou_present": float(iou[seen].mean()) if seen.any() else 0.0,
        "tp": tp, "fp": fp, "fn": fn, "accuracy": float(tp.sum() / max(counts[named].sum(), 1)),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ clustering


def bcubed(true: Sequence[Hashable], clusters: Sequence[Hashable]) -> tuple[float, float, float]:
    """BCubed (precision, recall, f1 of the two means).

    Precision of an item is the share of its cluster that has its class, recall the share of its class that sits in its
    cluster; both are averaged over items.
    """
    if len(true) != len(clusters) or not len(true):
        raise ValueError(f"true and clusters must be equally long and not empty, got {len(true)} and {len(clusters)}")
    _, t = np.unique(np.asarray(true), return_inverse=True)
    _, c = np.unique(np.asarray(clusters), return_inverse=True)
    _, cell, both = np.unique(t * (c.max() + 1) + c, return_inverse=True, return_counts=True)
    shared = both[cell]
    precision = float((shared / np.bincount(c)[c]).mean())
    recall = float((shared / np.bincount(t)[t]).mean())
    return precision, recall, 2 * precision * recall / (precision + recall)


def pair_f1(true: Sequence[Hashable], clusters: Sequence[Hashable]) -> tuple[float, float, float]:
    """(precision, recall, f1) over the pairs of items put together by `clusters` against those of `true`."""
    if len(true) != len(clusters) or not len(true):
        raise ValueError(f"true and clusters must be equally long and not empty, got {len(true)} and {len(clusters)}")
    _, t = np.unique(np.asarray(true), return_inverse=True)
    _, c = np.unique(np.asarray(clusters), return_inverse=True)

    def pairs(labels: np.ndarray) -> float:
        n = np.unique(labels, return_counts=True)[1].astype(np.float64)
        return float((n * (n - 1) / 2).sum())

    both, in_clusters, in_true = pairs(t * (c.max() + 1) + c), pairs(c), pairs(t)
    precision, recall = both / max(in_clusters, 1.0), both / max(in_true, 1.0)
    return precision, recall, 2 * both / max(in_clusters + in_true, 1.0)
