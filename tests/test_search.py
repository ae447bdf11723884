"""Exact blocked search against the full matrix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformers import search
from jaxformers.mesh import mesh as make_mesh


def brute(queries, keys, k):
    scores = queries.astype(np.float64) @ keys.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


@pytest.mark.parametrize("blocks", [(1024, 8192), (1024, None), (16, 8), (5, 3), (1, 1), (7, None)])
@pytest.mark.parametrize("shape", [(37, 53, 5), (1, 1, 1), (3, 20, 20), (20, 3, 3)])
def test_topk_equals_the_full_matrix(shape, blocks):
    n, m, k = shape
    rng = np.random.default_rng(0)
    queries, keys = (search.normalize(rng.normal(size=(rows, 24))) for rows in (n, m))
    scores, indices = search.topk(queries, keys, k, query_block=blocks[0], key_block=blocks[1])
    expected_scores, expected = brute(queries, keys, k)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)


@settings(max_examples=25)
@given(st.data())
def test_ties_go_to_the_lower_index(data):
    # small integers: products are exact, so equal means equal and the order is decided by the index alone
    n, m = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    k = data.draw(st.integers(1, m))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    queries, keys = rng.integers(-1, 2, (n, 3)), rng.integers(-1, 2, (m, 3))
    for key_block in (8, None):
        scores, indices = search.topk(queries, keys, k, query_block=4, key_block=key_block)
        expected_scores, expected = brute(queries, keys, k)
        np.testing.assert_array_equal(indices, expected)
        np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("shape", ["data=8", "data=2,fsdp=4", "data=3"])
@pytest.mark.parametrize("key_block", [16, None])
def test_keys_over_a_mesh(shape, key_block):
    mesh = make_mesh(shape)
    rng = np.random.default_rng(3)
    queries, keys = rng.integers(-3, 4, (19, 4)), rng.integers(-3, 4, (301, 4))  # exact products, many ties
    scores, indices = search.topk(queries, keys, 7, query_block=8, key_block=key_block, mesh=mesh)
    expected_scores, expected = brute(queries, keys, 7)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(scores, expected_scores)
    _, indices = search.topk(queries, keys[:2], 2, mesh=mesh)  # most devices hold nothing
    np.testing.assert_array_equal(indices, brute(queries, keys[:2], 2)[1])


def test_equal_rows_in_different_blocks_tie_exactly():
    rng = np.random.default_rng(1)
    keys = search.normalize(rng.normal(size=(60, 384)))
    keys = np.concatenate([keys, keys, keys])
    _, indices = search.topk(keys[:60], keys, 3, query_block=16, key_block=32)
    np.testing.assert_array_equal(indices, np.arange(60)[:, None] + [[0, 60, 120]])


@pytest.mark.parametrize("key_block", [8, 64, None])
@pytest.mark.parametrize("threshold", [-2.0, 0.0, 0.3, 0.99, 2.0])
def test_range_search_equals_the_full_matrix(threshold, key_block):
    rng = np.random.default_rng(2)
    queries, keys = (search.normalize(rng.normal(size=(rows, 16))) for rows in (23, 31))
    q, i, s = search.range_search(queries, keys, threshold, query_block=10, key_block=key_block)
    full = queries @ keys.T
    assert set(zip(q, i, strict=True)) == set(zip(*np.nonzero(full >= threshold), strict=True))
    np.testing.assert_allclose(s, full[q, i], atol=1e-6)
    assert (np.diff(q) >= 0).all()
    assert all((np.diff(s[q == row]) <= 0).all() for row in set(q))


def test_reference_top_k_and_threshold_pairs(shared):
    z = np.load(shared / "oracles" / "ditto" / "blocking.npz")
    # there the right rows ask and the left rows answer
    scores, indices = search.topk(z["right"], z["left"], int(z["k"]), key_block=16)
    np.testing.assert_array_equal(indices, z["topk_left_index"])
    np.testing.assert_allclose(scores, z["topk_score"], atol=1e-5)
    left, right, _ = search.range_search(z["left"], z["right"], float(z["threshold"]), key_block=16)
    expected = z["threshold_pairs_left_right"]
    assert sorted(zip(left, right, strict=True)) == sorted(map(tuple, expected))


def test_normalize_keeps_zero_rows():
    out = search.normalize([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(out, [[0.6, 0.8], [0.0, 0.0]], atol=1e-7)


def test_no_queries():
    scores, indices = search.topk(np.zeros((0, 4)), np.ones((3, 4)), 2)
    assert scores.shape == indices.shape == (0, 2)
    assert all(len(part) == 0 for part in search.range_search(np.zeros((0, 4)), np.ones((3, 4)), 0.0))


def test_the_full_matrix_is_never_built():
    """40 000 x 40 000 scores would be 6.4 GB; the compiled step holds a block of them."""
    keys = np.zeros((5, 8192, 4), np.float32)
    memory = search._topk_block.lower(np.zeros((1024, 4), np.float32), keys, 40_000, k=3).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 1024 * 8192 * 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: search.topk(a, a, 0), "k must be"),
        (lambda a: search.topk(a, a, 4), "k must be"),
        (lambda a: search.topk(a, a[:, :1], 1), "one width"),
        (lambda a: search.topk(a, a * np.nan, 1), "keys must be finite"),
        (lambda a: search.topk(a, a, 1, key_block=0), "key_block"),
        (lambda a: search.range_search(a[0], a, 0.1), "one width"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.ones((3, 2)))
