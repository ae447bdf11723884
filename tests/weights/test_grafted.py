"""Grafted weights: values, the gradients of the paper, one rounding, checkpoint tensors, what is trained of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import weights
from jaxformers.train.state import trained_by_default
from jaxformers.weights import Grafted, LowRank


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


W, W1, W2 = (draw(6, 4, seed=i) for i in range(3))
C, D, X = draw(2, 4, seed=3), draw(6, 2, seed=4), draw(3, 5, 6, seed=5)
LORA = LowRank(W, draw(6, 3, seed=6), draw(3, 4, seed=7), 1.0)
WANT = {
    "low rank": (Grafted(W, W1, C, D), W + (D @ C) * W1),
    "full": (Grafted(W, W1, W2), W + W2 * W1),
    "one per output": (Grafted(W, W1, C[:1]), W + C[:1] * W1),
    "over low rank, twice": (Grafted(Grafted(LORA, W1, C, D), W2, 2 * C, D), LORA.dense() + (D @ C) * (W1 + 2 * W2)),
}


@pytest.mark.parametrize("name", WANT)
def test_values_products_and_tensors(name):
    weight, want = WANT[name]
    assert weights.is_typed(weight) and isinstance(weight, weights.Weight) and weight.shape == (6, 4)
    np.testing.assert_allclose(weight.dense(), want, atol=1e-5)
    np.testing.assert_allclose(jax.jit(weights.matmul)(X, weight), X @ want, atol=1e-4)
    tensors = weight.to_tensors()
    assert len(tensors) == len(jax.tree.leaves(weight))
    again = weight.from_tensors(tensors.__getitem__)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, weight))


def test_the_gradients_of_the_paper():
    """dC = Dᵀ (dW ⊙ W_f), dD = (dW ⊙ W_f) Cᵀ, with dW the gradient by the effective weight."""
    loss = lambda w: jnp.sum(jnp.sin(weights.matmul(X, w)))
    weight = Grafted(W, W1, C, D)
    ours, by = jax.grad(loss)(weight), jax.grad(loss)(weight.dense()) * W1
    np.testing.assert_allclose(ours.c, D.T @ by, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours.d, by @ C.T, rtol=1e-4, atol=1e-4)


def test_the_sum_is_rounded_once():
    base = W.astype(jnp.bfloat16)
    lora = LowRank(base, LORA.a * 1e-2, LORA.b, 1.0)
    weight = Grafted(Grafted(lora, W1, C * 1e-2, D), W2, C * 1e-2, D)
    wide = base.astype(jnp.float32) + lora.a @ lora.b + (D @ (C * 1e-2)) * (W1 + W2)
    assert weight.dtype == weight.dense().dtype == jnp.bfloat16
    np.testing.assert_array_equal(weight.dense(), wide.astype(jnp.bfloat16))
    step = lambda w: w.astype(jnp.bfloat16)
    twice = step(step(lora.dense() + (D @ (C * 1e-2)) * W1) + (D @ (C * 1e-2)) * W2)
    assert np.any(twice != weight.dense())  # which rounding at every graft would not give


def test_training_takes_the_factors_alone():
    params = {"up": {"kernel": Grafted(Grafted(LORA, W1, C, D), W2, C, D), "bias": jnp.zeros(4)}}
    found = trained_by_default(params)
    assert found == {f"up.kernel.{n}" for n in ("c", "d", "base.c", "base.d", "base.base.a", "base.base.b")}
