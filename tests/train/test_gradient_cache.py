import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers
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
        rows = [jnp.arange(0, 24, 2), jnp.arange(1, 24, 2), jnp.arange(24, 32)]
        parts = [encode(params, {"x": inputs["x"][r]}, jax.random.fold_in(key, c)) for c, r in enumerate(rows)]
        return jnp.concatenate(parts)[jnp.argsort(jnp.concatenate(rows))]

    expected_value, expected = jax.jit(jax.value_and_grad(loss(by_hand, key)))(params)
    value, grads = jax.jit(jax.value_and_grad(loss(gradient_cache(encode, chunk), key)))(params)
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


def test_sharded_rows_stay_where_they_are():
    """Data-parallel over four devices: each chunk takes rows of every device, and only the loss needs all of them."""
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    mesh = jaxformers.mesh("data=4")
    by_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = {"W1": jax.random.normal(jax.random.key(1), (24, 8)), "W2": jnp.ones((4, 24))}
    x = jax.device_put(jax.random.normal(jax.random.key(0), (64, 8)), by_rows)
    labels = jnp.arange(64) // 4
    loss = lambda params, x: supcon_loss(gradient_cache(encode, 16)(params, {"x": x}, None), labels)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, x).compile()
    text = compiled.as_text()
    assert "f32[16,24]" not in text and "f32[4,24]" in text  # hidden states: 4 of a chunk's 16 texts on each device
    value, grads = compiled(params, x)
    expected, expected_grads = jax.jit(jax.value_and_grad(loss))(params, jnp.array(np.asarray(x)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grads["W1"], expected_grads["W1"], rtol=1e-4, atol=1e-6)


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
