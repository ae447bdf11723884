"""Small layers against numpy: norms, activations, MLPs, embeddings, pooling."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformers import nn
from jaxformers.nn import linear
from jaxformers.nn.keys import Keys

X = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)


def test_layer_norm():
    norm = nn.LayerNorm(8, eps=1e-5)
    norm.scale.set_value(jnp.arange(8.0))
    norm.bias.set_value(jnp.full(8, 0.5))
    x = X.astype(np.float64)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * np.arange(8) + 0.5
    assert np.abs(norm(X) - expected).max() < 1e-5
    assert np.abs(nn.LayerNorm(8, affine=False)(1e4 + X)).max() < 4  # the mean is taken off before squaring
    assert norm(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_rms_norm():
    norm = nn.RMSNorm(8, eps=1e-3)
    norm.scale.set_value(jnp.arange(8.0))
    x = X.astype(np.float64)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * np.arange(8)
    assert np.abs(norm(X) - expected).max() < 1e-5
    assert norm(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_activations():
    x = np.linspace(-4, 4, 33).astype(np.float32)
    erf = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])
    assert np.abs(nn.activation("gelu")(x) - erf).max() < 1e-6  # the exact one
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    assert np.abs(nn.activation("gelu_new")(x) - 0.5 * x * (1 + np.tanh(inner))).max() < 1e-6
    assert np.abs(nn.activation("silu")(x) - x / (1 + np.exp(-x))).max() < 1e-6
    assert np.abs(nn.activation("quick_gelu")(x) - x / (1 + np.exp(-1.702 * x))).max() < 1e-6
    assert np.array_equal(nn.activation("relu2")(x), np.maximum(x, 0) ** 2)
    with pytest.raises(ValueError, match="activation 'gleu' is unknown; there are gelu"):
        nn.activation("gleu")
    with pytest.raises(ValueError, match="unknown"):
        nn.MLP(4, 8, act="gleu", rngs=nnx.Rngs(0))


@pytest.mark.parametrize("gated", [False, True])
def test_mlp(gated):
    mlp = nn.MLP(8, 12, act="relu", gated=gated, std=0.3, rngs=nnx.Rngs(0))
    up, down = (np.asarray(getattr(mlp, n).kernel.get_value()) for n in ("up", "down"))
    hidden = np.maximum(X @ np.asarray(mlp.gate.kernel.get_value()), 0) * (X @ up) if gated else np.maximum(X @ up, 0)
    assert np.abs(mlp(X) - hidden @ down).max() < 1e-5


def test_embeddings_ask_for_exactly_one_input():
    embeddings = nn.Embeddings(10, 8, rngs=nnx.Rngs(0))
    for inputs in ({}, {"inputs_embeds": X}):
        with pytest.raises(ValueError, match="exactly one"):
            embeddings(None if not inputs else np.zeros((2, 5), int), **inputs)
    table = embeddings.token.embedding.get_value()
    assert np.array_equal(embeddings(np.array([[3, 9]])), table[np.array([[3, 9]])])
    assert np.allclose(embeddings.token.attend(X), X @ np.asarray(table).T, atol=1e-6)


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "last"])
@pytest.mark.parametrize("mask", [None, [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]])
def test_pooling(mode, mask):
    real = np.ones((2, 5), int) if mask is None else np.array(mask)
    rows = [x[m == 1] for x, m in zip(X, real, strict=True)]
    expected = {
        "mean": [r.mean(0) for r in rows],
        "max": [r.max(0) for r in rows],
        "last": [r[-1] for r in rows],
        "cls": X[:, 0],
    }[mode]
    found = nn.pool(X, None if mask is None else real, mode)
    assert np.abs(found - np.stack(expected)).max() < 1e-6


def test_pooling_of_nothing_and_unknown_modes():
    assert not np.any(nn.pool(X, np.zeros((2, 5), int), "mean"))
    with pytest.raises(ValueError, match="pooling 'median' is unknown; there are mean, cls, max, last"):
        nn.pool(X, None, "median")
    unit = nn.normalize(jnp.asarray(X[0]).at[0].set(0))
    assert not np.any(unit[0]) and np.allclose(np.linalg.norm(unit[1:], axis=-1), 1, atol=1e-6)


def test_classification_head_drops_before_its_dense_layer():
    head = nn.ClassificationHead(8, 3, dense="tanh", rate=0.0, dense_rate=0.9, std=1.0, rngs=nnx.Rngs(0))
    h = X[:, 0]
    dense, out = (np.asarray(getattr(head, n).kernel.get_value()) for n in ("dense", "classifier"))
    assert np.abs(head(h) - np.tanh(h @ dense) @ out).max() < 1e-5
    assert not np.allclose(head(h, jax.random.key(0)), head(h))
    calm = nn.ClassificationHead(8, 3, dense="tanh", rngs=nnx.Rngs(0))
    assert np.array_equal(calm(h, jax.random.key(0)), calm(h))


def test_the_bias_of_a_vocabulary():
    rng = np.random.default_rng(1)
    y, bias = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 3, linear.WIDE), linear.WIDE))
    weight = jnp.asarray(rng.standard_normal(y.shape), jnp.float32)
    assert np.array_equal(linear.add_bias(y, bias), y + bias)
    found = jax.jit(jax.grad(lambda bias: (weight * linear.add_bias(y, bias)).sum()))(bias)
    assert np.abs(found - weight.sum((0, 1))).max() < 1e-5
    assert linear.add_bias(y.astype(jnp.bfloat16), bias).dtype == jnp.bfloat16
    assert jax.vmap(linear.add_bias, (0, None))(y, bias).shape == y.shape


@pytest.mark.parametrize(("size", "padding"), [((3, 3), (1, 1)), ((2, 5), (0, 2)), ((4,), (2,))])
def test_one_filter_a_channel(size, padding):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((2, *range(6, 6 + len(size)), 8)), jnp.float32)
    conv = nn.Conv(8, 8, size, padding=padding, groups=8, bias=False, rngs=Keys(0))
    kernel = conv.kernel.get_value()
    axes = "HW"[: len(size)]
    names = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    ones, around = (1,) * len(size), [(p, p) for p in padding]
    expected = jax.lax.conv_general_dilated(x, kernel, ones, around, dimension_numbers=names, feature_group_count=8)
    assert np.abs(conv(x) - expected).max() < 1e-6
