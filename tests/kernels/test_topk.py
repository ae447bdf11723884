"""Running top-k against a sort of all scores, with many ties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import aot

from jaxformers.kernels import topk

KERNELS = {"pallas_gpu": topk.Tile(16, 16, 16, 2), "pallas_tpu": topk.Tile(16, 128)}


def whole(shape, seed):
    """Small whole numbers: exact in any precision, and full of ties."""
    return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, shape), jnp.float32)


def expected(queries, keys, k, count):
    """By a stable sort: equal scores in the order of their indices."""
    scores = np.asarray(queries) @ np.asarray(keys)[:count].T
    indices = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, indices, 1), indices


@settings(max_examples=5)
@given(
    how=st.sampled_from(["xla", *KERNELS]),
    n=st.integers(1, 40),
    m=st.integers(1, 300),
    width=st.sampled_from([3, 16, 33]),
    k=st.sampled_from([1, 2, 5, 16]),
    padding=st.integers(0, 20),
)
def test_equals_a_stable_sort(how, n, m, width, k, padding):
    k = min(k, m)
    queries, keys = whole((n, width), 0), whole((m + padding, width), 1)
    keys = keys.at[m:].set(100.0)  # would win if it were looked at
    found = topk.topk(queries, keys, k, count=m, implementation=how, tile=KERNELS.get(how), interpret=True)
    for a, b in zip(found, expected(queries, keys, k, m), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("how", KERNELS)
def test_ascending_scores_replace_every_candidate(how):
    """The worst case: each tile of keys beats all that came before it."""
    queries, keys = jnp.ones((3, 2)), jnp.arange(300.0)[:, None] * jnp.ones((1, 2))
    scores, indices = topk.topk(queries, keys, 16, implementation=how, tile=KERNELS[how], interpret=True)
    assert np.array_equal(indices, np.tile(np.arange(299, 283, -1), (3, 1)))
    assert np.array_equal(scores, 2.0 * indices)


def test_lowers_for_cuda():
    args = jax.ShapeDtypeStruct((1000, 384), jnp.float32), jax.ShapeDtypeStruct((100_000, 384), jnp.float32)
    for k in (1, 10, 64):
        f = functools.partial(topk.topk, k=k, implementation="pallas_gpu")
        assert "topk_kernel" in aot.lower_for_cuda(f, *args)


def test_the_choice(monkeypatch):
    for where, how in (("cpu", "xla"), ("tpu", "xla"), ("gpu", "pallas_gpu")):
        monkeypatch.setattr(topk, "platform", lambda where=where: where)
        monkeypatch.setattr(topk, "partitioned", lambda: False)
        assert [topk.choose(100_000, 10), topk.choose(100, 10), topk.choose(100_000, 500)] == [how, "xla", "xla"]


def test_what_does_not_fit_is_refused():
    q, keys = jnp.zeros((3, 4)), jnp.zeros((5, 4))
    for args, message in (
        ((q, keys[:, :3], 1), "one width"),
        ((q, keys, 6), "k: expected 1..5"),
        ((q, keys, 0), "k: expected 1..5"),
    ):
        with pytest.raises(ValueError, match=message):
            topk.topk(*args)
    with pytest.raises(ValueError, match="implementation: expected"):
        topk.topk(q, keys, 1, implementation="faiss")
