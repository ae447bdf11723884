"""Packed weights in planes: exact both ways, in models, in files, under low-rank updates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from kernels import aot

import jaxformers as jf
from jaxformers.compress import dequantize, gptq
from jaxformers.weights import ArrangedWeight, LowRank, PackedWeight, TernaryWeight, add_lora, arrange
from jaxformers.weights.arranged import arranged, restored
from jaxformers.weights.packed import pack_codes


def weight(bits, group_size, act_order, d_in=544, d_out=64, scale_dtype=np.float16, seed=0):
    rng = np.random.default_rng(seed)
    groups = 1 if group_size == -1 else -(-d_in // group_size)
    g_idx = np.arange(d_in) // (d_in if group_size == -1 else group_size)
    g_idx = rng.permutation(g_idx) if act_order else g_idx
    scales = rng.uniform(0.01, 0.1, (groups, d_out)).astype(scale_dtype)
    if bits == "ternary":
        levels = scales, -scales * np.asarray(0.5, scale_dtype)
        codes = rng.integers(0, 3, (d_in, d_out)).astype(np.uint8)
        return TernaryWeight.from_codes(jnp.asarray(codes), *map(jnp.asarray, levels), g_idx, group_size)
    codes, zeros = (rng.integers(0, 2**bits, shape).astype(np.uint8) for shape in ((d_in, d_out), (groups, d_out)))
    return pack_codes(codes, zeros, scales, g_idx, bits=bits, group_size=group_size, checkpoint_format="gptq_v2")


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("group_size", "act_order"), [(-1, False), (32, False), (96, True), (128, True)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, "ternary"])
def test_exact_both_ways(bits, group_size, act_order):
    w = weight(bits, group_size, act_order)
    made = arranged(w)
    assert isinstance(made, ArrangedWeight) and (made.shape, made.dtype) == (w.shape, w.dtype)
    assert (made.order is not None) == (w.g_idx is not None)
    assert_same(made.packed(), w)
    np.testing.assert_array_equal(made.dense(), w.dense())
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 544)), jnp.float32)
    np.testing.assert_allclose(made.matmul(x), np.asarray(x) @ np.asarray(w.dense()), rtol=1e-4, atol=1e-4)


def test_stacked_layers():
    made = [arranged(weight(4, 32, True, seed=i)) for i in range(2)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *made)
    assert stack.shape == (2, 544, 64)
    np.testing.assert_array_equal(stack.dense(), np.stack([w.dense() for w in made]))
    with pytest.raises(ValueError, match="expected one layer"):
        stack.packed()
    x = jnp.ones((3, 544))
    _, found = jax.lax.scan(lambda _, w: (None, w.matmul(x)), None, stack)
    np.testing.assert_allclose(found, np.stack([w.matmul(x) for w in made]), rtol=1e-5)


@pytest.mark.parametrize(
    "w",
    [weight(4, 40, False), weight(4, 32, False, scale_dtype=np.float32), weight("ternary", 16, False)],
    ids=["groups of no whole planes", "scales of 32 bits", "groups of 16"],
)
def test_what_cannot_lie_in_planes_stays(w):
    assert arranged(w) is w


def test_bfloat16_scales_and_tensors():
    w = weight(4, 32, True, scale_dtype=jnp.bfloat16)
    made = arranged(w)
    assert made.dtype == jnp.bfloat16
    assert_same(made.packed(), w)
    w = weight(4, 32, True)
    tensors = arranged(w).to_tensors()
    assert_same(tensors, w.to_tensors())
    other = arranged(weight(4, 32, False, seed=3))
    assert_same(other.from_tensors(tensors.get), arranged(w))


def test_the_kernel_is_taken_on_a_gpu_only():
    made = arranged(weight(4, 32, True))
    x = jnp.ones((2, 544), jnp.bfloat16)
    assert "mosaic_gpu" in aot.lower_for_cuda(lambda w, x: w.matmul(x), made, x)
    assert "mosaic_gpu" not in jax.jit(lambda w, x: w.matmul(x)).lower(made, x).as_text()


@pytest.fixture(scope="module")
def quantised():
    model = tiny.model("llama", hidden_size=64, intermediate_size=96, max_position_embeddings=32)
    ids = np.random.default_rng(0).integers(0, 20, (4, 32))
    return gptq(model, ids, bits=4, group_size=32, act_order=True), ids


def logits(model, ids):
    apply, params = jf.functional(model)
    return np.asarray(apply(params, {"input_ids": ids}).logits)


def kernels(model):
    found = [m.kernel.get_value() for m in (model.layers[0].attention.query, model.layers[1].mlp.down)]
    return [kernel.base if isinstance(kernel, LowRank) else kernel for kernel in found]


def test_a_model_computes_and_saves_the_same(quantised, tmp_path, monkeypatch):
    model, ids = quantised
    made = arrange(model)
    assert all(isinstance(k, ArrangedWeight) for k in kernels(made))
    assert all(isinstance(k, PackedWeight) for k in kernels(model))  # the caller's model stays
    assert restored(model) is model
    outputs = [logits(m, ids) for m in (model, made)]
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    jf.save(model, tmp_path / "a")
    jf.save(made, tmp_path / "b")
    for name in ("config.json", "model.safetensors", "quantize_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again = jf.load(tmp_path / "b", arrange=True)
    assert all(isinstance(k, ArrangedWeight) for k in kernels(again))
    np.testing.assert_array_equal(logits(again, ids), outputs[1])
    assert all(isinstance(k, PackedWeight) for k in kernels(jf.load(tmp_path / "b")))  # no GPU here
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(jf.hub.lowbit, "platform", lambda: "gpu")
        assert all(isinstance(k, ArrangedWeight) for k in kernels(jf.load(tmp_path / "b")))
        for change in ({"arrange": False}, {"mapped": True}, {"mesh": jf.mesh("data=1")}):
            assert all(isinstance(k, PackedWeight) for k in kernels(jf.load(tmp_path / "b", **change)))
    for change in ({"mapped": True}, {"mesh": jf.mesh("data=1")}):
        with pytest.raises(ValueError, match="arrange: the layout is one device's"):
            jf.load(tmp_path / "b", arrange=True, **change)


def test_low_rank_updates_stay(quantised):
    model, ids = quantised
    tuned = add_lora(model, targets="**.{query,down}", rank=2, key=jax.random.key(0))
    made = arrange(tuned)
    assert all(isinstance(k, ArrangedWeight) for k in kernels(made))
    np.testing.assert_allclose(logits(made, ids), logits(tuned, ids), rtol=1e-4, atol=1e-4)
    plain = dequantize(made)
    assert isinstance(plain.layers[0].attention.query.kernel.get_value().base, jax.Array)
    np.testing.assert_array_equal(logits(plain, ids), logits(dequantize(tuned), ids))
