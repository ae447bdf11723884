"""Ternary weights with two levels per output and group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import weights
from jaxformers.weights.ternary import TernaryWeight


def random_ternary(d_in=64, d_out=24, group_size=16, seed=0, order=None):
    rng = np.random.default_rng(seed)
    groups = 1 if group_size == -1 else -(-d_in // group_size)
    codes = rng.integers(0, 3, (d_in, d_out)).astype(np.uint8)
    positive = rng.uniform(0.1, 1, (groups, d_out)).astype(np.float32)
    negative = -rng.uniform(0.1, 1, (groups, d_out)).astype(np.float32)
    g_idx = np.arange(d_in) // (d_in if group_size == -1 else group_size)
    g_idx = g_idx if order is None else g_idx[np.random.default_rng(order).permutation(d_in)]
    dense = np.where(codes == 1, positive[g_idx], np.where(codes == 2, negative[g_idx], 0))
    made = TernaryWeight.from_codes(jnp.asarray(codes), jnp.asarray(positive), jnp.asarray(negative), g_idx, group_size)
    return made, dense


@pytest.mark.parametrize(("group_size", "order"), [(-1, None), (16, None), (16, 3), (24, None), (24, 3)])
def test_dense_matmul_and_file(group_size, order):
    w, dense = random_ternary(group_size=group_size, order=order)
    assert w.shape == (64, 24) and weights.is_typed(w) and isinstance(w, weights.Weight)
    np.testing.assert_array_equal(w.dense(), dense)
    x = jax.random.normal(jax.random.key(0), (3, 64))
    np.testing.assert_allclose(jax.jit(weights.matmul)(x, w), x @ dense, rtol=1e-5, atol=1e-5)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), w)
    np.testing.assert_array_equal(abstract.from_tensors(w.to_tensors().get).dense(), dense)
    _, pull = jax.vjp(lambda x: w.matmul(x), x)
    assert all(leaf.size < 64 * 24 for leaf in jax.tree.leaves(pull))


def test_stacked_layers():
    made = [random_ternary(seed=i) for i in range(2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *[w for w, _ in made])
    assert stacked.shape == (2, 64, 24)
    np.testing.assert_array_equal(stacked.dense(), np.stack([d for _, d in made]))


def test_bad_input():
    with pytest.raises(ValueError, match="multiple of 16"):
        TernaryWeight.from_codes(np.zeros((20, 4), np.uint8), np.ones((1, 4)), -np.ones((1, 4)), np.zeros(20), -1)
    w, _ = random_ternary()
    with pytest.raises(ValueError, match="expected a ternary weight of shape"):
        w.from_tensors(random_ternary(d_in=64, d_out=32)[0].to_tensors().get)
    with pytest.raises(ValueError, match="positive"):
        TernaryWeight.from_file(w.to_tensors(), -1)
