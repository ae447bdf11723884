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


def test_counts_beyond_32_bits():
    """The two-part arithmetic against Python's whole numbers."""
    parts = lambda n: jnp.asarray([n >> 16, n & 0xFFFF], jnp.uint32)  # noqa: E731
    whole = lambda p: (int(p[0]) << 16) + int(p[1])  # noqa: E731
    counts = [2**31 - 1, 2**30 + 5, 2**31 - 1, 65535, 65535, 1]
    assert whole(threshold._total([jnp.int32(c) for c in counts])) == sum(counts)
    pairs = [(2**33 + 7, 2**33 + 7), (2**33, 2**33 + 1), (2**33 + 65536, 2**33 + 1), (2**34, 3), (2**31, 5)]
    for a, b in [*pairs, (2**31 - 2, 0)]:
        assert bool(threshold._less(parts(a), parts(b))) == (a < b)
        assert int(threshold._difference(parts(a), parts(b))) == min(max(a - b, 0), 2**31 - 1)


def test_one_program_for_every_k_and_no_sort_nor_concatenation():
    arrays = [threshold.keys(jax.random.normal(jax.random.key(i), (32, 16))) for i in range(3)]
    threshold.smallest_of_all(arrays, 5)
    before = threshold._smallest_of_all._cache_size()
    threshold.smallest_of_all(arrays, 700)
    assert threshold._smallest_of_all._cache_size() == before
    program = str(jax.make_jaxpr(threshold._smallest_of_all)(arrays, jnp.zeros(2, jnp.uint32)))
    assert " sort" not in program and "[1536]" not in program


def test_sharded_matrices_stay_where_they_are():
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    w = np.random.default_rng(0).standard_normal((8, 16 * jax.device_count())).astype(np.float32)
    placed = threshold.keys(jax.device_put(w, spread))
    (found,) = threshold.smallest_of_all([placed], 100)
    np.testing.assert_array_equal(found, by_sorting([np.abs(w)], 100)[0])
    text = threshold._smallest_of_all.lower([placed], jnp.zeros(2, jnp.uint32)).compile().as_text()
    assert f"u32[8,{w.shape[1]}]" not in text  # nowhere is the whole matrix gathered
