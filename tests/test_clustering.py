"""Clustering against scikit-learn itself, and its parameter checks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformers import clustering, search

cluster_module = pytest.importorskip("sklearn.cluster")


def unit(n, width, seed, spread=1.0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(6, width))
    return search.normalize(centres[rng.integers(0, 6, n)] + spread * rng.normal(size=(n, width)))


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from([0.02, 0.1, 0.2, 0.35, 0.6]))
def test_blocked_dbscan_equals_scikit_learn(seed, min_samples, eps):
    x = unit(70, 5, seed, 0.5)
    expected = cluster_module.DBSCAN(eps=eps, min_samples=min_samples, metric="cosine").fit(x).labels_
    np.testing.assert_array_equal(clustering.dbscan_blocked(x, eps, min_samples, block=16), expected)


def test_large_tables_take_the_blocked_path_and_agree(monkeypatch):
    x = unit(300, 8, 0, 0.3)
    for metric, eps in (("cosine", 0.05), ("euclidean", 0.3)):
        params = {"threshold": eps, "min cluster size": 3, "metric": metric}
        small = clustering.cluster(x, "SLINK", params)
        monkeypatch.setattr(clustering, "BLOCKED_ABOVE", 10)
        np.testing.assert_array_equal(clustering.cluster(x, "SLINK", params), small)
        monkeypatch.undo()


@pytest.mark.parametrize("min_samples", [1, 2])
def test_slink_is_connected_components(min_samples):
    from scipy.sparse.csgraph import connected_components

    x = unit(120, 6, 3, 0.4)
    labels = clustering.cluster(x, "SLINK", {"threshold": 0.1, "min cluster size": min_samples})
    _, component = connected_components(x @ x.T >= 0.9)
    size = np.bincount(component)[component]
    assert ((labels == -1) == (size < min_samples)).all()
    kept = labels >= 0
    assert (
        len(set(zip(labels[kept], component[kept], strict=True))) == len(set(labels[kept])) == len(set(component[kept]))
    )


def test_equal_vectors_cluster_at_threshold_zero():
    x = np.repeat(unit(40, 384, 0), 2, axis=0)
    for above in (10, 10_000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clustering, "BLOCKED_ABOVE", above)
            labels = clustering.cluster(x, "SLINK", {"threshold": 0})
        np.testing.assert_array_equal(labels, np.repeat(np.arange(40), 2))


def test_parameters_are_copied_and_defaults_filled():
    mine = {"threshold": 0.3}
    assert clustering.cluster_params("SLINK", mine) == {"threshold": 0.3, "min cluster size": 2, "metric": "cosine"}
    assert clustering.cluster_params("SLINK")["threshold"] == 0.5
    assert clustering.cluster_params("SLINK", {})["threshold"] == 0.1  # as the original, for a partial dictionary
    assert clustering.cluster_params("agglomerative", mine)["clustering linkage"] == "ward"
    assert mine == {"threshold": 0.3}


@pytest.mark.parametrize("cluster_type", ["SLINK", "agglomerative", "HDBScan"])
def test_tiny_inputs(cluster_type):
    assert clustering.cluster(np.zeros((0, 3)), cluster_type).shape == (0,)
    assert clustering.cluster(np.ones((1, 3)), cluster_type).shape == (1,)


def test_kmeans_finds_separated_groups():
    x = np.concatenate([np.eye(3)[i] + 0.01 * np.random.default_rng(i).normal(size=(10, 3)) for i in range(3)])
    labels = clustering.kmeans(x, 3)
    assert len({*labels[:10]}) == len({*labels[10:20]}) == len({*labels[20:]}) == 1 and len({*labels}) == 3


@pytest.mark.parametrize(
    ("cluster_type", "params", "message"),
    [
        ("kmeans", None, "cluster_type must be"),
        ("SLINK", {"eps": 0.1}, "does not read"),
        ("SLINK", {"threshold": -0.1}, "threshold"),
        ("SLINK", {"threshold": float("nan")}, "threshold"),
        ("SLINK", {"min cluster size": 0}, "min cluster size"),
        ("SLINK", {"metric": "manhattan"}, "metric"),
        ("agglomerative", {"metric": "cosine"}, "ward"),
        ("agglomerative", {"clustering linkage": "median"}, "linkage"),
        ("HDBScan", {"metric": "cosine"}, "metric"),
        ("HDBScan", {"min cluster size": 1}, "min cluster size"),
    ],
)
def test_errors(cluster_type, params, message):
    with pytest.raises(ValueError, match=message):
        clustering.cluster(np.ones((4, 2)), cluster_type, params)
