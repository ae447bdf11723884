import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.losses import supcon_loss
from jaxformers.train.gradient_cache import gradient_cache


def encode(params, inputs, key):
    """tanh(x W1^T) W2^T, with dropout where there is a key."""
    h = jnp.tanh(inputs["x"] @ params["W1"].T)
    if key is not None:
        h = h * jax.random.bernoulli(key, 0.5, h.shape) * 2
    return h @ params["W2"].T


@pytest.fixture
def case(oracles):
    d = np.load(oracles / "star" / "gradcache_8x4_chunk8.npz")
    params = {"W1": jnp.array(d["W1"]), "W2": jnp.array(d["W2"])}

    def loss(encoder, key=None):
        def of(params):
            z = encoder(params, {"x": jnp.array(d["x"])}, key)
            return supcon_loss(z.reshape(8, 4, -1), jnp.array(d["labels"]), compat="star")

        return of

    return d, params, loss


@pytest.mark.parametrize("chunk", [1, 5, 8, 24, 32])  # 5 and 24 leave a ragged last chunk
def test_equals_the_published_procedure_and_the_full_batch(case, chunk):
    d, params, loss = case
    value, grads = jax.jit(jax.value_and_grad(loss(gradient_cache(encode, chunk))))(params)
    np.testing.assert_allclose(value, d["loss"], rtol=1e-5)
    for name in ("W1", "W2"):
        scale = np.abs(d[f"grad_{name}"]).max()
        np.testing.assert_allclose(grads[name], d[f"grad_{name}"], rtol=1e-4, atol=1e-5 * scale)
        np.testing.assert_allclose(grads[name], d[f"cached_grad_{name}"], rtol=1e-4, atol=1e-5 * scale)


def test_both_passes_draw_the_same_dropout(case):
    d, params, loss = case
    key = jax.random.key(3)
    chunk = 12  # 12 + 12 + 8

    def by_hand(params, inputs, key):
        parts = [{"x": inputs["x"][start : start + chunk]} for start in range(0, 32, chunk)]
        return jnp.concatenate([encode(params, part, jax.random.fold_in(key, c)) for c, part in enumerate(parts)])

    expected_value, expected = jax.value_and_grad(loss(by_hand, key))(params)
    value, grads = jax.value_and_grad(loss(gradient_cache(encode, chunk), key))(params)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    for name in ("W1", "W2"):
        scale = float(jnp.abs(expected[name]).max())
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-4, atol=1e-5 * scale)
    assert not np.allclose(grads["W1"], d["grad_W1"], rtol=1e-2)


def test_keeps_the_activations_of_one_chunk():
    rows, inner = 512, 1024
    params = {"W1": jnp.ones((inner, 8)), "W2": jnp.ones((4, inner))}
    inputs = {"x": jnp.ones((rows, 8))}

    def temporary(encoder):
        loss = lambda params: jnp.sum(encoder(params, inputs, None) ** 2)
        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    full = temporary(encode)
    assert full > rows * inner * 4 / 2
    assert temporary(gradient_cache(encode, 16)) < full / 4


def test_pytrees_of_outputs_and_integer_inputs():
    both = lambda params, inputs, key: {"a": params[inputs["ids"]], "b": inputs["x"] * 2}
    inputs = {"ids": jnp.array([2, 0, 1, 1, 2]), "x": jnp.arange(5.0)}
    params = jnp.arange(3.0)
    out = gradient_cache(both, 2)(params, inputs, None)
    np.testing.assert_array_equal(out["a"], [2, 0, 1, 1, 2])
    np.testing.assert_array_equal(out["b"], inputs["x"] * 2)
    grad = jax.grad(lambda p: jnp.sum(gradient_cache(both, 2)(p, inputs, None)["a"]))(params)
    np.testing.assert_array_equal(grad, [1, 2, 2])


def test_errors():
    with pytest.raises(ValueError, match="chunk"):
        gradient_cache(encode, 0)
    params = {"W1": jnp.ones((3, 2)), "W2": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="chunk: 9 is larger"):
        gradient_cache(encode, 9)(params, {"x": jnp.ones((4, 2))}, None)
    with pytest.raises(ValueError, match="inputs"):
        gradient_cache(encode, 2)(params, {"x": jnp.ones((4, 2)), "y": jnp.ones((3,))}, None)
