"""The k smallest by bisection against a stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformers.compress import threshold

SHAPES = ((3, 5), (4, 2), (1, 7), (6, 6))


def by_sorting(arrays, k):
    """The definition: a stable sort of everything in the order (out, in)."""
    flat = np.concatenate([np.asarray(a).T.ravel() for a in arrays])
    out = np.zeros(len(flat), bool)
    out[np.argsort(flat, kind="stable")[:k]] = True
    cuts = np.cumsum([a.size for a in arrays])[:-1]
    return [part.reshape(a.shape[::-1]).T for part, a in zip(np.split(out, cuts), arrays, strict=True)]


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 1000]), st.integers(0, 72))
def test_of_all_matrices_with_ties(seed, levels, k):
    rng = np.random.default_rng(seed)
    arrays = [(rng.integers(-levels, levels + 1, s) / 4).astype(np.float32) for s in SHAPES]
    found = threshold.smallest_of_all([threshold.keys(jnp.asarray(a)) for a in arrays], k)
    for mine, theirs in zip(found, by_sorting([np.abs(a) for a in arrays], k), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_magnitudes_of_every_type(dtype):
    """A type of 16 bits has many equal magnitudes; the count is exact all the same."""
    w = (jax.random.normal(jax.random.key(0), (64, 48)) * 10.0 ** jnp.arange(-24, 24)).astype(dtype)
    w = w.at[0, :3].set(jnp.asarray([0.0, -0.0, 1e-40], dtype))
    wide = np.abs(np.asarray(w, np.float32))
    for k in (0, 1, 1000, w.size):
        (found,) = threshold.smallest_of_all([threshold.keys(w)], k)
        assert int(found.sum()) == k
        np.testing.assert_array_equal(found, by_sorting([wide], k)[0])


def test_what_is_gone_goes_first():
    w, kept = np.asarray([[0.0, 5.0], [1.0, 2.0]], np.float32), np.asarray([[True, False], [True, True]])
    (found,) = threshold.smallest_of_all([threshold.keys(w, kept)], 2)
    np.testing.assert_array_equal(found, [[True, True], [False, False]])


@given(st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_of_each_column(seed, k):
    w = np.random.default_rng(seed).integers(0, 4, (9, 4)).astype(np.float32)
    found = np.asarray(threshold.smallest_of_columns(threshold.keys(jnp.asarray(w)), k))
    expected = np.zeros_like(found)
    np.put_along_axis(expected, np.argsort(w, axis=0, kind="stable")[:k], True, axis=0)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("rows", "drop", "m"), [(16, 1, 2), (14, 1, 2), (16, 3, 4), (14, 2, 4), (14, 4, 8)])
def test_of_each_group(rows, drop, m):
    w = np.random.default_rng(0).integers(0, 4, (rows, 5)).astype(np.float32)
    found = np.asarray(threshold.smallest_of_groups(threshold.keys(jnp.asarray(w)), drop, m))
    for start in range(0, rows, m):
        for o in range(5):
            order = np.argsort(w[start : start + m, o], kind="stable")
            assert set(np.flatnonzero(found[start : start + m, o])) == set(order[:drop])


def test_counts_beyond_31_bits_are_added_by_the_host(monkeypatch):
    """Matrices that say they have 2^30 entries more each: four of them are more than 32 bits can count."""
    counts = threshold._below
    monkeypatch.setattr(threshold, "_below", lambda a, limit: np.int64(counts(a, limit)) + 2**30)
    arrays = [jnp.arange(4 * i, 4 * i + 4, dtype=jnp.uint32).reshape(2, 2) for i in range(4)]
    found = threshold.smallest_of_all(arrays, 2**32 + 6)
    assert [int(f.sum()) for f in found] == [4, 2, 0, 0]


def test_one_program_for_every_k_and_all_matrices_of_a_shape():
    arrays = [threshold.keys(jax.random.normal(jax.random.key(i), (32, 16))) for i in range(3)]
    threshold.smallest_of_all(arrays, 5)
    before = threshold._below._cache_size(), threshold._removed._cache_size()
    threshold.smallest_of_all([*arrays, *arrays], 700)
    assert (threshold._below._cache_size(), threshold._removed._cache_size()) == before


def test_sharded_matrices_stay_where_they_are():
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    w = np.random.default_rng(0).standard_normal((8, 16 * jax.device_count())).astype(np.float32)
    placed = threshold.keys(jax.device_put(w, spread))
    (found,) = threshold.smallest_of_all([placed], 100)
    np.testing.assert_array_equal(found, by_sorting([np.abs(w)], 100)[0])
    for program in (threshold._below.lower(placed, np.uint32(7)), threshold._removed.lower(placed, np.uint32(7), 3)):
        assert f"u32[8,{w.shape[1]}]" not in program.compile().as_text()  # nowhere is the whole matrix gathered
