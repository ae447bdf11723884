"""Metrics against independent references and hand-made cases."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformers import metrics


@pytest.fixture(scope="module")
def ir(oracles):
    return json.loads((oracles / "linktransformer" / "ir_metrics.json").read_text())


@pytest.fixture(scope="module")
def star(oracles):
    return json.loads((oracles / "star" / "metrics.json").read_text())


def test_retrieval_metrics_equal_the_reference(ir):
    got = metrics.retrieval_metrics(metrics.rank(ir["scores"]), ir["relevant"])
    for name in ("accuracy", "precision", "recall"):
        for k in (1, 3, 5, 10):
            assert got[f"{name}@{k}"] == pytest.approx(ir[f"{name}_at"][str(k)], abs=1e-9)
    assert got["mrr@10"] == pytest.approx(ir["mrr_at_10"], abs=1e-9)
    assert got["ndcg@10"] == pytest.approx(ir["ndcg_at_10"], abs=1e-9)
    assert got["map@100"] == pytest.approx(ir["map_at_100"], abs=1e-9)


def test_pair_score_metrics_equal_the_reference(ir):
    scores, labels = ir["pair_scores"], ir["pair_labels"]
    assert metrics.best_threshold_f1(scores, labels) == pytest.approx(ir["best_f1"], abs=1e-9)
    assert metrics.best_threshold_accuracy(scores, labels) == pytest.approx(ir["best_accuracy"], abs=1e-9)
    assert metrics.average_precision(scores, labels) == pytest.approx(ir["average_precision"], abs=1e-9)


def test_verification_metrics_equal_the_reference(star):
    got = metrics.verification_metrics(star["p"], star["y"])
    for ours, theirs in (("auc", "auc"), ("c@1", "c_at_1"), ("f0.5u", "f05u"), ("brier", "brier_complement")):
        assert got[ours] == pytest.approx(star[theirs], abs=1e-9)


def test_bcubed_equals_the_reference(star):
    expected = [star[f"bcubed_{name}"] for name in ("precision", "recall", "f1")]
    assert metrics.bcubed(star["authors"], star["clusters"]) == pytest.approx(expected, abs=1e-9)


def test_attribution_metrics_equal_the_reference(oracles):
    z = np.load(oracles / "star" / "attribution.npz")
    sim = z["sim"].reshape(-1, z["sim"].shape[-1])
    author = np.repeat(np.arange(z["query"].shape[0]), z["query"].shape[1])
    got = metrics.retrieval_metrics(metrics.rank(sim), [[a] for a in author], at=(1, 5), mrr_at=None)
    assert got["accuracy@1"] == pytest.approx(float(z["acc1"]), rel=1e-6)
    assert got["accuracy@5"] == pytest.approx(float(z["acc5"]), rel=1e-6)
    assert got["mrr"] == pytest.approx(float(z["mrr"]), rel=1e-6)
    assert metrics.macro_f1(author, sim.argmax(1)) == pytest.approx(float(z["macro_f1"]), rel=1e-6)


def test_retrieval_by_hand():
    got = metrics.retrieval_metrics([[2, 0, 1], [0, 1, 2]], [{0, 1}, {0}], at=(1, 2), ndcg_at=2, map_at=2)
    assert got["accuracy@1"] == 0.5 and got["accuracy@2"] == 1.0
    assert got["recall@2"] == pytest.approx((0.5 + 1) / 2)
    assert got["mrr@10"] == pytest.approx((0.5 + 1) / 2)
    assert got["map@2"] == pytest.approx((0.5 / 2 + 1) / 2)
    assert got["ndcg@2"] == pytest.approx(((1 / np.log2(3)) / (1 + 1 / np.log2(3)) + 1) / 2)


def test_thresholds_never_cut_a_run_of_equal_scores():
    f1, precision, recall, threshold = metrics.best_threshold_f1([0.9, 0.5, 0.5, 0.5, 0.1], [1, 1, 1, 0, 0])
    assert threshold == pytest.approx(0.3)  # not inside the three 0.5
    assert (precision, recall, f1) == pytest.approx((0.75, 1.0, 6 / 7))
    with pytest.raises(ValueError, match="two different values"):
        metrics.best_threshold_f1([0.5, 0.5], [1, 0])


pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1)), min_size=2, max_size=30)


@given(pairs)
def test_pair_metrics_agree_with_scikit_learn(items):
    sk = pytest.importorskip("sklearn.metrics")
    scores, labels = np.array([s / 7 for s, _ in items]), np.array([y for _, y in items])
    if 0 < labels.sum() < len(labels):
        assert metrics.auc(scores, labels) == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-9)
    if labels.any():
        assert metrics.average_precision(scores, labels) == pytest.approx(sk.average_precision_score(labels, scores))
    predicted = scores.round(1)
    for average in ("macro", "weighted"):
        expected = sk.precision_recall_fscore_support(
            np.char.mod("%s", labels), np.char.mod("%s", predicted > 0.5).astype(str), average=average, zero_division=0
        )[:3]
        got = metrics.precision_recall_f1(np.char.mod("%s", labels), np.char.mod("%s", predicted > 0.5), average)
        assert got == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=25))
def test_clusterings_by_counting(items):
    true, found = [a for a, _ in items], [b for _, b in items]
    n = range(len(items))
    same = [[true[i] == true[j] for j in n] for i in n]
    together = [[found[i] == found[j] for j in n] for i in n]
    p = np.mean([sum(same[i][j] and together[i][j] for j in n) / sum(together[i]) for i in n])
    r = np.mean([sum(same[i][j] and together[i][j] for j in n) / sum(same[i]) for i in n])
    assert metrics.bcubed(true, found) == pytest.approx((p, r, 2 * p * r / (p + r)))
    both = sum(same[i][j] and together[i][j] for i in n for j in range(i))
    said, real = (sum(m[i][j] for i in n for j in range(i)) for m in (together, same))
    assert metrics.pair_f1(true, found) == pytest.approx(
        (both / max(said, 1), both / max(real, 1), 2 * both / max(said + real, 1))
    )


def test_perfect_and_unanswered():
    assert metrics.c_at_1([0.9, 0.1], [1, 0]) == 1.0
    assert metrics.c_at_1([0.5, 0.5], [1, 0]) == 0.0
    assert metrics.f05u([0.5, 0.5], [1, 0]) == 0.0
    assert metrics.brier_complement([1, 0], [1, 0]) == 1.0
    assert metrics.accuracy(["a", "b"], ["a", "c"]) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.rank([1.0, 2.0]), "scores must be"),
        (lambda: metrics.retrieval_metrics([[0]], []), "relevant must hold"),
        (lambda: metrics.retrieval_metrics([[0], [1]], [[0], []]), "query 1 has no relevant"),
        (lambda: metrics.auc([0.1, 0.2], [1, 1]), "both a 0 and a 1"),
        (lambda: metrics.auc([0.1, 0.2], [1, 2]), "labels must be 0 or 1"),
        (lambda: metrics.auc([0.1], [1, 0]), "equally long"),
        (lambda: metrics.auc([0.1, np.nan], [1, 0]), "NaN"),
        (lambda: metrics.average_precision([0.1, 0.2], [0, 0]), "at least one positive"),
        (lambda: metrics.best_threshold_f1([0.1, 0.2], [0, 0]), "at least one positive"),
        (lambda: metrics.verification_metrics([0.1, 1.2], [0, 1]), r"\[0, 1\]"),
        (lambda: metrics.precision_recall_f1([1], [1], "micro"), "average must be"),
        (lambda: metrics.bcubed([1], [1, 2]), "equally long"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
