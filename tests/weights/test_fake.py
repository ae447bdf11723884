"""Weights that are rounded as they are used: products, gradients, nesting, scans, files, packed codes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxformers as jf
from jaxformers import paths, weights
from jaxformers.fake_quant import EIGHT_BITS, TERNARY, Quantiser, lsq, lsq_scale, symmetric, twn
from jaxformers.weights import FakeQuant, LowRank, Masked, TernaryCodes
from jaxformers.weights.packed import PackedWeight

ROWS = Quantiser("twn", 2, "row")
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 20)), jnp.float32)
W = jnp.asarray(np.random.default_rng(1).standard_normal((20, 6)), jnp.float32)


def ternary(model, **options):
    kernels = {"layers.*.{attention,mlp}.*": TERNARY, "embeddings.token": ROWS}
    return weights.fake_quantise(model, kernels, inputs=EIGHT_BITS, attention=EIGHT_BITS, **options)


def test_products_of_rounded_operands():
    w = FakeQuant(W, None, TERNARY, EIGHT_BITS)
    assert weights.is_typed(w) and isinstance(w, weights.Weight) and w.shape == (20, 6)
    np.testing.assert_allclose(jax.jit(weights.matmul)(X, w), symmetric(X) @ twn(W), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(w.dense(), twn(W))
    by_output = FakeQuant(W, None, ROWS)  # a row of PyTorch's (out, in) matrix
    np.testing.assert_array_equal(by_output.dense(), twn(W.T, "row").T)
    grad = jax.grad(lambda w: weights.matmul(X, w).sum())(w).base
    want = np.broadcast_to(symmetric(X).sum((0, 1))[:, None], W.shape) * (np.abs(W) < 2.5)
    np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-5)
    scale = lsq_scale(W, 4, "column")
    learnt = FakeQuant(W, scale, Quantiser("lsq", 4, "row"))
    np.testing.assert_array_equal(learnt.dense(), lsq(W, scale, 4))
    assert np.any(jax.grad(lambda w: jnp.square(weights.matmul(X, w)).sum())(learnt).scale)


def test_they_nest():
    low = LowRank(W, W[:, :2], W[:2], 0.5)
    np.testing.assert_array_equal(FakeQuant(low, None, TERNARY).dense(), twn(low.dense()))
    mask = W > 0
    both = Masked(FakeQuant(W, None, TERNARY), mask)
    np.testing.assert_array_equal(both.dense(), np.where(mask, twn(W), 0))
    over = LowRank(FakeQuant(W, None, TERNARY, EIGHT_BITS), W[:, :2], W[:2], 0.5)
    np.testing.assert_allclose(over.matmul(X), symmetric(X) @ twn(W) + 0.5 * X @ W[:, :2] @ W[:2], rtol=1e-4, atol=1e-4)


def test_each_stacked_layer_has_its_own_scales():
    stack = jnp.stack([W, 3 * W])
    for rule in (TERNARY, ROWS):
        whole = FakeQuant(stack, None, rule).dense()
        for i in range(2):
            np.testing.assert_array_equal(whole[i], FakeQuant(stack[i], None, rule).dense())
        codes = TernaryCodes.from_dense(whole, table=False, shared=rule is TERNARY)
        assert codes.shape == (2, 20, 6)
        np.testing.assert_array_equal(codes.dense(), whole)


@pytest.mark.parametrize("shared", [True, False])
def test_codes_are_the_rounded_weight(shared):
    """Of a kernel and a table of 20: no multiple of 16."""
    kernel = FakeQuant(W, None, TERNARY if shared else ROWS).dense()
    codes = TernaryCodes.from_dense(kernel, table=False, shared=shared)
    assert codes.codes.shape == (2, 6) and codes.scale.shape == ((1,) if shared else (6,))
    np.testing.assert_array_equal(codes.dense(), kernel)
    np.testing.assert_allclose(jax.jit(weights.matmul)(X, codes), X @ kernel, rtol=1e-6, atol=1e-6)
    values = twn(W.T, "tensor" if shared else "row")  # (6, 20)
    table = TernaryCodes.from_dense(values, table=True, shared=shared)
    ids = np.array([[0, 5], [3, 99]])
    np.testing.assert_array_equal(table.dense(), values)
    np.testing.assert_array_equal(weights.take(table, ids), values[np.minimum(ids, 5)])
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), table)
    np.testing.assert_array_equal(abstract.from_tensors(table.to_tensors().get).dense(), values)
    zeros = TernaryCodes.from_dense(jnp.zeros((16, 2)), table=False, shared=shared)
    assert not np.any(zeros.dense())
    for name, bad in (("codes", np.full((6, 2), -1, np.int32)), ("codes", np.zeros((6, 3), np.int32)),
                      ("scale", np.zeros(7, np.float32))):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: "):
            abstract.from_tensors({**table.to_tensors(), name: bad}.get)


@pytest.fixture(scope="module")
def model():
    return ternary(tiny.model("bert", hidden_size=24, num_hidden_layers=2))


def logits(model, **options):
    apply, params = jf.functional(model, **options)
    return np.asarray(jax.jit(apply)(params, tiny.batch()).logits)


def test_a_model_is_what_its_rounded_weights_make_of_rounded_operands(model):
    """By hand: twn in the arrays, the inputs and the attention's operands rounded at their sites."""
    params = paths.flatten(jf.functional(model)[1])
    dense = {p: w.dense() if isinstance(w, FakeQuant) else w for p, w in params.items()}
    plain = jf.with_params(weights.full_precision(model), paths.unflatten(dense))
    apply, params = jf.functional(plain)
    edits = {"layers.*.{attention,mlp}.*.input": symmetric, "layers.*.attention.{query,key,value}.output": symmetric,
             "layers.*.attention.probs": symmetric}  # fmt: skip
    by_hand = jax.jit(jf.edit(apply, edits))(params, tiny.batch()).logits
    np.testing.assert_allclose(logits(model), by_hand, rtol=1e-5, atol=1e-5)
    assert np.abs(by_hand - logits(plain)).max() > 1e-3, "the operands' rounding shows"
    np.testing.assert_allclose(logits(model, scan_layers=True), by_hand, rtol=1e-5, atol=1e-5)


def test_files(model, tmp_path):
    """The shadow is an ordinary checkpoint; the record brings the rounding back; codes are small."""
    jf.save(model, tmp_path / "fake")
    again = jf.load(tmp_path / "fake")
    kernel = again.layers[0].attention.query.kernel.get_value()
    assert (
        isinstance(kernel, FakeQuant) and kernel.weight == TERNARY and again.layers[1].attention.operands == EIGHT_BITS
    )
    assert tiny.largest_difference(jf.functional(again)[1], jf.functional(model)[1]) == 0
    plain = weights.full_precision(model)
    assert plain.surgery == () and plain.layers[0].attention.operands is None
    jf.save(plain, tmp_path / "plain")
    assert "jaxformers" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    tables = [jf.load(tmp_path / name).embeddings.token.embedding.get_value() for name in ("plain", "fake")]
    np.testing.assert_array_equal(tables[0], tables[1].base)

    packed = weights.pack_ternary(model)
    jf.save(packed, tmp_path / "packed")
    served = jf.load(tmp_path / "packed")
    kernel = served.layers[0].mlp.up.kernel.get_value()
    assert isinstance(kernel.base, TernaryCodes) and kernel.inputs == EIGHT_BITS and kernel.weight is None
    expected = logits(model)
    np.testing.assert_allclose(logits(served), expected, atol=1e-5)
    np.testing.assert_allclose(logits(served, scan_layers=True), expected, atol=1e-5)
    with pytest.raises(ValueError, match="is packed; its full-precision weights are gone"):
        weights.full_precision(served)
    share = weights.zero_fraction(model)
    assert 0.2 < share < 0.7 and np.isclose(weights.zero_fraction(jf.functional(packed)[1]), share)


def test_rules_by_pattern(tmp_path):
    rules = {"layers.0.attention.query": None, "layers.*.attention.*": TERNARY, "layers.*.mlp.up": Quantiser("lsq", 4),
             "layers.*.mlp.down": Quantiser("symmetric", 4, "row", None)}  # fmt: skip
    inputs = {"layers.*.mlp.*": Quantiser("asymmetric", 8)}
    model = weights.fake_quantise(tiny.model("gpt2"), rules, inputs=inputs)
    found = paths.flatten(jf.functional(model)[1])
    assert not weights.is_typed(found["layers.0.attention.query.kernel"])
    assert found["layers.1.attention.query.kernel"].inputs is None
    up, down = found["layers.1.mlp.up.kernel"], found["layers.1.mlp.down.kernel"]
    assert up.scale.shape == (1, 1) and up.inputs.kind == "asymmetric" and down.weight.bits == 4 and down.scale is None
    jf.save(model, tmp_path)
    assert tiny.largest_difference(jf.functional(jf.load(tmp_path))[1], jf.functional(model)[1]) == 0
    tied = weights.fake_quantise(tiny.model("gpt2"), {"embeddings.token": ROWS})  # the table is the output layer too
    apply, params = jf.functional(tied)
    dense = {**paths.flatten(params), "embeddings.token.embedding": tied.embeddings.token.embedding.get_value().dense()}
    expected = jax.jit(jf.functional(tiny.model("gpt2"))[0])(paths.unflatten(dense), tiny.batch()).logits
    np.testing.assert_allclose(jax.jit(apply)(params, tiny.batch()).logits, expected, rtol=1e-5, atol=1e-5)


def test_bad_input(model):
    bert, swap = tiny.model("bert"), weights.fake_quantise
    for call, match in (
        (lambda: swap(bert, {"layers.*.atention.*": TERNARY}), "kernels: 'layers.*.atention.*' matches no weight"),
        (lambda: swap(bert, {"embeddings.position": TERNARY}), "matches no weight"),
        (lambda: swap(bert, {"**": None}), "kernels: nothing is to be rounded"),
        (lambda: swap(bert, {"layers.**": TERNARY}, inputs={"x": EIGHT_BITS}), "inputs: 'x' matches no weight"),
        (lambda: swap(bert, {"layers.**": TERNARY}, inputs=TERNARY), "activations are rounded symmetric or asymmetric"),
        (lambda: swap(model, {"layers.**": TERNARY}), "is rounded already"),
        (lambda: weights.pack_ternary(bert), "none of its weights is rounded to ternary"),
        (lambda: weights.full_precision(bert), "none of its weights is rounded"),
        (lambda: weights.zero_fraction(bert), "none of these weights is rounded"),
        (lambda: weights.pack_ternary(swap(bert, {"layers.**": Quantiser("twn", 2, "column")})), "per tensor or row"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match.replace("*", r"\*")):
            call()


def test_packed_kernels_may_lie_below():
    """8-bit inputs before 4-bit packed weights."""
    rng = np.random.default_rng(3)
    words = rng.integers(-(2**31), 2**31 - 1, (2, 8), np.int64).astype(np.int32)
    below = PackedWeight(jnp.asarray(words), jnp.full((1, 1), 0x77777777, jnp.int32), jnp.full((1, 8), 0.1), None, 4)
    w = FakeQuant(below, None, None, EIGHT_BITS)
    x = X[..., :16]
    np.testing.assert_allclose(w.matmul(x), symmetric(x) @ below.dense(), rtol=1e-5, atol=1e-5)
