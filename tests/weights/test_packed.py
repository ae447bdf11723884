"""Packed words and weights against files written by AutoGPTQ and by the official GPTQ code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxformers import weights
from jaxformers.weights import words
from jaxformers.weights.packed import PackedWeight, from_gptq, from_official_3bit, pack_codes, to_gptq

BITS = (2, 3, 4, 8)
KINDS = {"numpy": np.asarray, "jax": jnp.asarray}


def random_weight(bits, d_in=96, d_out=64, group_size=32, seed=0, order=None, **options):
    rng = np.random.default_rng(seed)
    groups = 1 if group_size == -1 else -(-d_in // group_size)
    codes = rng.integers(0, 2**bits, (d_in, d_out)).astype(np.uint8)
    zeros = rng.integers(0, 2**bits, (groups, d_out))
    scales = rng.uniform(0.01, 0.1, (groups, d_out)).astype(np.float16)
    g_idx = np.arange(d_in) // (d_in if group_size == -1 else group_size)
    if order is not None:
        g_idx = g_idx[np.random.default_rng(order).permutation(d_in)]
    dense = scales.astype(np.float32)[g_idx] * (codes.astype(np.float32) - zeros[g_idx])
    return pack_codes(codes, zeros, scales, g_idx, bits=bits, group_size=group_size, **options), dense


def read_field(row, i, bits):
    """One code of a row of words by the layout's description, bit by bit: an independent reader."""
    stream = "".join(f"{int(w) & 0xFFFFFFFF:032b}"[::-1] for w in row)
    return int(stream[i * bits : (i + 1) * bits][::-1], 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_words_equal_autogptq(oracles, bits, kind):
    z = np.load(oracles / f"gptq/pack_{bits}b.npz")
    array = KINDS[kind]
    codes, zeros = array(z["q_int"].T.astype(np.uint8)), array(z["zero"].astype(np.uint8))
    np.testing.assert_array_equal(words.pack(codes, bits), z["qweight"])
    np.testing.assert_array_equal(words.pack(zeros, bits, axis=-1), z["qzeros_v2"])
    np.testing.assert_array_equal(words.unpack(array(z["qweight"]), bits, len(codes)), codes)
    np.testing.assert_array_equal(words.shift_zeros(array(z["qzeros_v1"]), bits, 1), z["qzeros_v2"])
    np.testing.assert_array_equal(words.shift_zeros(array(z["qzeros_v2"]), bits, -1), z["qzeros_v1"])
    assert isinstance(words.pack(codes, bits), np.ndarray if kind == "numpy" else jax.Array)


@pytest.mark.parametrize("bits", BITS)
def test_a_zero_of_zero_survives_version_1(oracles, bits):
    z = np.load(oracles / "gptq/zero_point_zero.npz")
    v1, v2 = z[f"qzeros_v1_{bits}b"], z[f"qzeros_v2_{bits}b"]
    np.testing.assert_array_equal(words.pack(z["zero"].astype(np.uint8), bits, axis=-1), v2)
    np.testing.assert_array_equal(words.shift_zeros(v2, bits, -1), v1)
    np.testing.assert_array_equal(words.unpack(words.shift_zeros(v1, bits, 1), bits, 32, axis=-1), z["zero"])


@given(st.sampled_from(BITS), st.integers(1, 70), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_packing_is_the_documented_bit_stream(bits, n, columns, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (n, columns)).astype(np.uint8)
    packed = words.pack(codes, bits)
    assert packed.dtype == np.int32 and packed.shape == (words.n_words(n, bits), columns)
    np.testing.assert_array_equal(words.unpack(packed, bits, n), codes)
    for i in range(n):
        assert read_field(packed[:, 0], i, bits) == codes[i, 0]


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", BITS)
def test_a_file_by_autogptq(oracles, bits, version):
    z = np.load(oracles / f"gptq/pack_{bits}b.npz")
    qzeros = z["qzeros_v1" if version == "gptq" else "qzeros_v2"]
    tensors = {"qweight": z["qweight"], "qzeros": qzeros, "scales": z["scale"], "g_idx": z["g_idx"]}
    w = from_gptq(tensors, bits, 32, version)
    assert w.shape == (96, 64) and w.g_idx is None and weights.is_typed(w)
    np.testing.assert_array_equal(w.dense(), z["W_dense"].T)
    scale = np.abs(z["y"]).max()
    np.testing.assert_allclose(w.matmul(jnp.asarray(z["x"])) + z["bias"], z["y"], atol=1e-6 * scale + 1e-5)
    for name, array in to_gptq(w, version).items():
        if name != "scales":  # the oracle keeps them in float32
            np.testing.assert_array_equal(array, tensors[name])


def test_the_official_3_bit_layer(oracles):
    z = np.load(oracles / "gptq/official_quant3.npz")
    w = from_official_3bit(z["qweight"], z["scales"], z["zeros"])
    np.testing.assert_allclose(w.dense().T, z["W_dense"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(w.matmul(z["x"]) + z["bias"], z["y"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="zeros"):
        from_official_3bit(z["qweight"], z["scales"], z["zeros"] + 0.4 * z["scales"])


@pytest.mark.parametrize(
    ("group_size", "order"), [(-1, None), (32, None), (32, 1), (40, None), (40, 1), (96, None), (128, None)]
)
@pytest.mark.parametrize("bits", BITS)
def test_dense_and_file_round_trip(bits, group_size, order):
    w, dense = random_weight(bits, group_size=group_size, order=order)
    np.testing.assert_array_equal(w.dense(), dense)
    assert (w.g_idx is None) == (order is None)
    for version in ("gptq", "gptq_v2"):
        tensors = to_gptq(w, version)
        assert tensors["scales"].dtype == np.float16
        again = from_gptq(tensors, bits, group_size, version)
        np.testing.assert_array_equal(again.dense(), dense)
        # an independent reader of the layout
        i, o = 77, 41
        g = tensors["g_idx"][i]
        zero = (read_field(tensors["qzeros"][g], o, bits) + (version == "gptq")) % 2**bits
        value = np.float32(tensors["scales"][g, o]) * (read_field(tensors["qweight"][:, o], i, bits) - zero)
        assert np.float32(value) == dense[i, o]


def test_scales_that_float16_cannot_hold_stay_as_they_are():
    w, _ = random_weight(4)
    fine = dataclasses.replace(w, scales=w.scales.astype(jnp.float32) * 1.0001)
    assert to_gptq(fine)["scales"].dtype == np.float32
    assert to_gptq(w)["scales"].dtype == np.float16


@pytest.mark.parametrize("order", [None, 1])
def test_under_jit_grad_vmap_and_scan(order):
    layers = [random_weight(4, d_in=64, d_out=64, seed=i, order=order) for i in range(3)]
    x = jax.random.normal(jax.random.key(0), (5, 64))
    (w, dense), *_ = layers
    np.testing.assert_allclose(jax.jit(weights.matmul)(x, w), x @ dense, rtol=1e-5, atol=1e-5)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(w.matmul(x) ** 2)))(x)
    np.testing.assert_allclose(grad, 2 * (x @ dense) @ dense.T, rtol=1e-4, atol=1e-4)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *[w for w, _ in layers])
    assert stacked.shape == (3, 64, 64)
    np.testing.assert_array_equal(stacked.dense(), np.stack([d for _, d in layers]))
    mapped = jax.vmap(lambda w: w.matmul(x))(stacked)
    np.testing.assert_allclose(mapped, np.stack([x @ d for _, d in layers]), rtol=1e-5, atol=1e-5)
    last, _ = jax.jit(lambda s: jax.lax.scan(lambda h, w: (jnp.tanh(w.matmul(h)), None), x, s))(stacked)
    expected = x
    for _, d in layers:
        expected = jnp.tanh(expected @ d)
    np.testing.assert_allclose(last, expected, rtol=1e-4, atol=1e-4)


def test_backward_keeps_the_packed_words_not_the_dense_kernel():
    w, _ = random_weight(4, d_in=64, d_out=96)
    _, pull = jax.vjp(lambda x: w.matmul(x), jnp.ones((2, 64)))
    assert all(leaf.size < 64 * 96 for leaf in jax.tree.leaves(pull))


def test_abstract_leaves_and_dtypes():
    w, _ = random_weight(3)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), w)
    assert abstract.shape == (96, 64) and abstract.dtype == np.float32  # float16 is how scales are stored
    param = nnx.Param(w)
    assert param.get_value().shape == (96, 64)
    x = jnp.ones((2, 96), jnp.bfloat16)
    assert w.matmul(x).dtype == jnp.bfloat16
    assert jax.eval_shape(weights.matmul, x, abstract).shape == (2, 64)
    found = abstract.from_tensors(to_gptq(w).get)
    np.testing.assert_array_equal(found.dense(), w.dense())
    with pytest.raises(ValueError, match="qweight"):
        abstract.from_tensors(to_gptq(random_weight(3, d_in=64)[0]).get)


def test_lora_over_packed():
    w, dense = random_weight(4, group_size=-1)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((96, 4)).astype(np.float32), rng.standard_normal((4, 64)).astype(np.float32)
    nested = weights.LowRank(w, jnp.asarray(a), jnp.asarray(b), 0.5)
    x = jnp.asarray(rng.standard_normal((3, 96)), jnp.float32)
    np.testing.assert_allclose(nested.matmul(x), x @ (dense + 0.5 * a @ b), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(nested.dense(), dense + 0.5 * a @ b, rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda a: jnp.sum(dataclasses.replace(nested, a=a).matmul(x)))(nested.a)
    assert grads.shape == a.shape and bool(jnp.all(jnp.isfinite(grads)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ({"group_size": 16}, "qzeros: expected"),
        ({"qweight": None}, "qweight: missing"),
        ({"qweight": np.zeros((12, 64), np.int64)}, "qweight: expected a matrix of int32"),
        ({"scales": np.zeros((3, 64), np.int32)}, "scales: expected floating"),
        ({"scales": np.zeros((3, 32), np.float16)}, "scales: expected"),
        ({"g_idx": np.zeros(7, np.int32)}, "g_idx: expected shape"),
        ({"g_idx": np.full(96, 3, np.int32)}, "g_idx: expected values from 0 to 2"),
    ],
)
def test_malformed_tensors_are_named(change, message):
    tensors = to_gptq(random_weight(4)[0])
    settings = {"bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
    for name, value in change.items():
        target = settings if name in settings else tensors
        if value is None:
            del target[name]
        else:
            target[name] = value
    with pytest.raises(ValueError, match=message):
        from_gptq(tensors, **settings)


def test_sizes_outside_the_layout():
    codes, ones = np.zeros((40, 32), np.uint8), np.ones((1, 32))
    with pytest.raises(ValueError, match="40 inputs"):
        pack_codes(codes, ones, ones, np.zeros(40, np.int32), bits=4)
    w = PackedWeight(np.zeros((4, 20), np.int32), np.zeros((1, 3), np.int32), np.ones((1, 20), np.float32), None, 4)
    assert w.dense().shape == (32, 20)  # held, but
    with pytest.raises(ValueError, match="20 outputs"):
        to_gptq(w)
