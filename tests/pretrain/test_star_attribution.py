import numpy as np
import pytest

from jaxformers import metrics
from jaxformers.pretrain.star_attribution import AuthorIndex, Verifier, _logistic, cluster, columns, verify


def table_of(vectors):
    """An encoder that looks texts up, and the texts: vectors (…, width) get the texts "0", "1", …"""
    flat = vectors.reshape(-1, vectors.shape[-1])
    return lambda texts: np.stack([flat[int(t)] for t in texts])


@pytest.fixture
def attribution(oracles):
    return np.load(oracles / "star" / "attribution.npz")


@pytest.fixture
def styles():
    """Ten authors with eight texts each around their own direction: (encode, texts, authors)."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, 12))
    vectors = np.repeat(centres, 8, axis=0) + 0.6 * rng.normal(size=(80, 12))
    return table_of(vectors), [str(i) for i in range(80)], np.repeat(np.arange(10), 8)


def test_attribution_oracle(attribution):
    support, query = attribution["support"], attribution["query"]
    n, k, width = support.shape
    encode = table_of(np.concatenate([support.reshape(-1, width), query.reshape(-1, width)]))
    index = AuthorIndex({"author": np.repeat(np.arange(n), k), "text": [str(i) for i in range(n * k)]}, encode)
    queries = [str(n * k + i) for i in range(query.shape[0] * query.shape[1])]
    sim = index.similarities(queries)
    np.testing.assert_allclose(sim, attribution["sim"], rtol=1e-9, atol=1e-12)
    predicted = np.array([top[0][0] for top in index.predict(queries)])
    np.testing.assert_array_equal(predicted, attribution["pred"])

    truth = np.repeat(np.arange(n), query.shape[1])
    ranked = np.array([[a for a, _ in top] for top in index.predict(queries, k=n)])
    found = metrics.retrieval_metrics(ranked, [{t} for t in truth], at=(1, 5), mrr_at=None)
    np.testing.assert_allclose(found["accuracy@1"], attribution["acc1"], rtol=1e-9)
    np.testing.assert_allclose(found["accuracy@5"], attribution["acc5"], rtol=1e-9)
    np.testing.assert_allclose(found["mrr"], attribution["mrr"], rtol=1e-9)
    np.testing.assert_allclose(metrics.macro_f1(truth, predicted), attribution["macro_f1"], rtol=1e-9)


def test_pandas_in_pandas_out(styles):
    pd = pytest.importorskip("pandas")
    encode, texts, authors = styles
    names = [f"a{a}" for a in authors]
    frame = pd.DataFrame({"author": names, "text": texts, "note": range(80)}, index=range(100, 180))
    index = AuthorIndex(frame[frame.note % 2 == 0], encode)
    queries = frame[frame.note % 2 == 1]
    before = queries.copy()
    out = index.predict(queries, k=3)
    assert len(out) == 3 * len(queries)
    assert list(out.columns) == ["true_author", "text", "note", "rank", "author", "score"]
    assert (out.index[::3] == queries.index).all() and (out["rank"].to_numpy() == np.tile([1, 2, 3], 40)).all()
    assert (out["score"].to_numpy().reshape(-1, 3)[:, 0] >= out["score"].to_numpy().reshape(-1, 3)[:, 2]).all()
    best = out[out["rank"] == 1]
    assert (best.author == best.true_author).mean() > 0.9
    pd.testing.assert_frame_equal(queries, before)
    assert cluster(frame, encode, n_clusters=10).columns[-1] == "cluster"
    pairs = pd.DataFrame({"text_a": texts[:8], "text_b": texts[1:9]})
    assert verify(pairs, encode).columns[-1] == "score" and "score" not in pairs.columns
    with pytest.raises(ValueError, match="'score' is taken"):
        verify(pairs.assign(score=0.0), encode)


def test_index_of_chosen_authors(styles):
    encode, texts, authors = styles
    support = [{"author": int(a), "text": t} for a, t in zip(authors, texts, strict=True)]
    assert AuthorIndex(support, encode, authors=[3, 1]).authors == [3, 1]
    with pytest.raises(ValueError, match="no text of author 77"):
        AuthorIndex(support, encode, authors=[3, 77])
    with pytest.raises(ValueError, match="k: must be in 1..10"):
        AuthorIndex(support, encode).predict(texts, k=11)


def pairs_of(texts, authors, seed, n=300):
    rng = np.random.default_rng(seed)
    pairs, labels = [], []
    while len(pairs) < n:
        i, j = rng.integers(0, len(texts), 2)
        same = len(pairs) % 2
        if i != j and (authors[i] == authors[j]) == same:
            pairs.append((texts[i], texts[j]))
            labels.append(same)
    return pairs, np.array(labels)


@pytest.mark.parametrize("features", ["difference", "product", "both", "cosine"])
def test_verifier_learns_from_other_authors(styles, features):
    encode, texts, authors = styles
    seen = authors < 6
    train = pairs_of([t for t, s in zip(texts, seen, strict=True) if s], authors[seen], 0)
    test = pairs_of([t for t, s in zip(texts, seen, strict=True) if not s], authors[~seen], 1)
    verifier = Verifier(encode, features=features, l2=10.0).fit(*train)
    p = verifier.score(test[0])
    assert ((p >= 0) & (p <= 1)).all()
    assert metrics.verification_metrics(p, test[1])["auc"] > 0.85
    np.testing.assert_array_equal(p, verifier.score([(b, a) for a, b in test[0]]))
    unsure = Verifier(encode, features=features, l2=10.0, undecided=0.2).fit(*train).score(test[0])
    near = np.abs(p - 0.5) <= 0.2
    assert near.any() and (unsure[near] == 0.5).all() and (unsure[~near] == p[~near]).all()
    table = {"text_a": [a for a, _ in train[0]], "text_b": [b for _, b in train[0]], "label": train[1]}
    np.testing.assert_array_equal(Verifier(encode, features=features, l2=10.0).fit(table).score(test[0]), p)


def test_logistic_equals_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 30)).astype(np.float32)
    y = (x @ rng.normal(size=30) + rng.normal(size=200) > 0).astype(np.float32)
    weights, bias = _logistic(x, y, l2=0.5)
    expected = linear_model.LogisticRegression(C=2.0, tol=1e-10, max_iter=10000).fit(x, y)
    np.testing.assert_allclose(weights, expected.coef_[0], atol=2e-3)
    np.testing.assert_allclose(bias, expected.intercept_[0], atol=2e-3)


def test_clusters_find_authors(styles):
    pytest.importorskip("sklearn")
    encode, texts, authors = styles
    for options in ({"n_clusters": 10}, {"n_clusters": 10, "method": "kmeans"}, {"threshold": 0.5}):
        labels = cluster(texts, encode, **options)
        assert metrics.bcubed(authors, labels)[2] > 0.8
    assert cluster(texts[:1], encode, threshold=0.1).tolist() == [0]
    for bad, match in [
        ({}, "exactly one"),
        ({"n_clusters": 2, "threshold": 0.1}, "exactly one"),
        ({"threshold": 0.1, "method": "kmeans"}, "k-means needs"),
        ({"n_clusters": 81}, "1..80"),
        ({"n_clusters": 2, "method": "optics"}, "method"),
    ]:
        with pytest.raises(ValueError, match=match):
            cluster(texts, encode, **bad)


def test_errors_name_what_is_wrong(styles):
    encode, texts, _ = styles
    with pytest.raises(ValueError, match="no column 'author'"):
        AuthorIndex({"text": texts}, encode)
    with pytest.raises(ValueError, match="support: text 1 is empty"):
        AuthorIndex({"author": [0, 0], "text": ["0", " "]}, encode)
    with pytest.raises(ValueError, match="unequal length"):
        columns({"author": [1], "text": ["a", "b"]}, ("author", "text"))
    with pytest.raises(ValueError, match="no rows"):
        columns({"author": [], "text": []}, ("author", "text"))
    with pytest.raises(ValueError, match="some rows have no 'text'"):
        columns([{"author": 1, "text": "a"}, {"author": 1}], ("author", "text"))
    with pytest.raises(ValueError, match="features"):
        Verifier(encode, features="sum")
    with pytest.raises(ValueError, match="call fit"):
        Verifier(encode).score([("0", "1")])
    with pytest.raises(ValueError, match="labels"):
        Verifier(encode).fit([("0", "1")], [1])
    with pytest.raises(ValueError, match="labels"):
        Verifier(encode).fit([("0", "1")])
    with pytest.raises(ValueError, match="pairs"):
        verify(["0", "1"], encode)
