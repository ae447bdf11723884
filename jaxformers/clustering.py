"""Clustering of embeddings with scikit-learn's algorithms, and DBSCAN for tables too large for them.

`cluster` speaks LinkTransformer's names (arXiv 2309.00789): "SLINK" is DBSCAN on cosine distance (with "min
cluster size" 1 or 2 it equals single linkage cut at the threshold), "agglomerative" is Ward linkage unless told
otherwise, "HDBScan" is HDBSCAN. All three see unit vectors. `dbscan_blocked` gives DBSCAN's labels from a neighbour
graph that is walked block by block: memory grows with the rows, never with their square.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from jaxformers import search
from jaxformers.extras import require

# The parameters each method reads; the first three names are LinkTransformer's, blanks included.
DEFAULTS = {
    "SLINK": {"threshold": 0.5, "min cluster size": 2, "metric": "cosine"},
    "agglomerative": {"threshold": 0.5, "clustering linkage": "ward", "metric": "euclidean"},
    "HDBScan": {"min cluster size": 5, "min samples": 1, "metric": "euclidean"},
}
# What a caller gets who passes a SLINK dictionary without a threshold, as in the original package.
SLINK_PARTIAL_THRESHOLD = 0.1
ROUNDING = 1e-6  # what float32 makes of the distance between equal vectors; thresholds below it mean "equal"
BLOCKED_ABOVE = 4096  # rows from which SLINK walks the neighbour graph in blocks


def cluster_params(cluster_type: str, params: Mapping[str, object] | None = None) -> dict[str, object]:
    """The full, checked parameters of a method; `params` is read, never written.

    Raises ValueError for an unknown method, a key the method does not read, or a value out of range.
    """
    if cluster_type not in DEFAULTS:
        raise ValueError(f"cluster_type must be one of {sorted(DEFAULTS)}, got {cluster_type!r}")
    known = DEFAULTS[cluster_type]
    unknown = [key for key in params or {} if key not in known]
    if unknown:
        raise ValueError(f"cluster_params: {cluster_type} does not read {unknown}; it reads {list(known)}")
    full = dict(known) | dict(params or {})
    if cluster_type == "SLINK" and params is not None and "threshold" not in params:
        full["threshold"] = SLINK_PARTIAL_THRESHOLD

    if "threshold" in full and not (_is_number(full["threshold"]) and full["threshold"] >= 0):
        raise ValueError(f"cluster_params['threshold'] must be a distance >= 0, got {full['threshold']!r}")
    for key, least in (("min cluster size", 2 if cluster_type == "HDBScan" else 1), ("min samples", 1)):
        if key in full and not (isinstance(full[key], (int, np.integer)) and full[key] >= least):
            raise ValueError(f"cluster_params[{key!r}] must be an integer >= {least}, got {full[key]!r}")
    linkage, metric = full.get("clustering linkage"), full["metric"]
    if linkage not in (None, "ward", "average", "complete", "single"):
        raise ValueError(f"cluster_params['clustering linkage']: ward, average, complete or single, got {linkage!r}")
    metrics = ("euclidean",) if cluster_type == "HDBScan" else ("cosine", "euclidean")
    if metric not in metrics:
        raise ValueError(f"cluster_params['metric'] must be one of {metrics} for {cluster_type}, got {metric!r}")
    if linkage == "ward" and metric == "cosine":
        raise ValueError("cluster_params: linkage 'ward' needs metric 'euclidean'; 'cosine' needs another linkage")
    return full


def cluster(
    embeddings: ArrayLike, cluster_type: str = "SLINK", params: Mapping[str, object] | None = None
) -> np.ndarray:
    """(n, D) embeddings, normalised here -> (n,) int64 labels; -1 marks noise (SLINK, HDBScan)."""
    full = cluster_params(cluster_type, params)
    x = np.asarray(embeddings, np.float32)
    if x.ndim != 2:
        raise ValueError(f"embeddings must be (n, D), got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("embeddings must be finite")
    if not len(x):
        return np.zeros(0, np.int64)
    x = search.normalize(x)
    sk = require("sklearn.cluster", extra="link")
    if cluster_type == "SLINK":
        eps, least = float(full["threshold"]), int(full["min cluster size"])
        if len(x) > BLOCKED_ABOVE:
            # unit vectors: |u - v|^2 = 2 (1 - cos)
            return dbscan_blocked(x, eps if full["metric"] == "cosine" else eps * eps / 2, least)
        labels = sk.DBSCAN(eps=max(eps, ROUNDING), min_samples=least, metric=full["metric"]).fit(x).labels_
    elif cluster_type == "agglomerative":
        if len(x) == 1:
            return np.zeros(1, np.int64)
        linkage, metric = full["clustering linkage"], full["metric"]
        method = sk.AgglomerativeClustering(
            n_clusters=None, distance_threshold=full["threshold"], linkage=linkage, metric=metric
        )
        labels = method.fit(x).labels_
    else:
        size, samples = full["min cluster size"], full["min samples"]
        if len(x) < max(size, samples + 1):
            return np.full(len(x), -1, np.int64)  # too few rows for any cluster
        # "min samples" are neighbours beside the point itself, as in the paper's package; scikit-learn counts the point
        labels = sk.HDBSCAN(min_cluster_size=size, min_samples=samples + 1, copy=True).fit(x).labels_
    return np.asarray(labels, np.int64)


def dbscan_blocked(x: ArrayLike, eps: float, min_samples: int = 2, *, block: int = 2048) -> np.ndarray:
    """DBSCAN labels (n,) of unit vectors (n, D) at cosine distance <= eps: scikit-learn's, in O(n + block^2) memory.

    Passes over the similarities: the first counts neighbours (a point counts itself; min_samples make a core point),
    the second joins core points that are neighbours, and a third, over the other points alone, finds the earliest
    cluster that reaches each. Clusters are numbered by their first core point; -1 is noise.
    """
    sparse = require("scipy.sparse", extra="link")
    connected_components = require("scipy.sparse.csgraph", extra="link").connected_components
    x = np.asarray(x, np.float32)
    n = len(x)

    def pairs(queries):
        return search.range_blocks(queries, x, 1 - max(eps, ROUNDING), query_block=block, key_block=block)

    neighbours = np.zeros(n, np.int64)
    for q, _, _ in pairs(x):
        neighbours += np.bincount(q, minlength=n)
    core = neighbours >= min_samples

    component = np.arange(n)
    for q, i, _ in pairs(x):
        joined = core[q] & core[i]
        a, b = component[q[joined]], component[i[joined]]
        graph = sparse.coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(n, n))
        component = connected_components(graph, directed=False)[1][component]
    number: dict[int, int] = {}
    labels = np.full(n, n, np.int64)  # n: none so far
    for point in np.flatnonzero(core):
        labels[point] = number.setdefault(int(component[point]), len(number))

    border = np.flatnonzero(~core & (neighbours > 1))
    if len(border):
        earliest = np.full(len(border), n, np.int64)
        for q, i, _ in pairs(x[border]):
            np.minimum.at(earliest, q[core[i]], labels[i[core[i]]])
        labels[border] = earliest
    return np.where(labels == n, -1, labels)


def kmeans(x: ArrayLike, n_clusters: int, *, seed: int = 0, n_init: int = 10) -> np.ndarray:
    """(n, D) -> (n,) labels by scikit-learn's k-means on unit vectors."""
    x = search.normalize(x)
    if not 1 <= n_clusters <= len(x):
        raise ValueError(f"n_clusters must be in 1..{len(x)} (the number of rows), got {n_clusters}")
    model = require("sklearn.cluster", extra="link").KMeans(n_clusters, n_init=n_init, random_state=seed)
    return np.asarray(model.fit(x).labels_, np.int64)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and bool(np.isfinite(value))
