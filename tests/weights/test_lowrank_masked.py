"""Low-rank updates and masks: values, gradients, nesting, surgery that leaves the old model alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxformers as jf
from jaxformers import paths, weights
from jaxformers.weights import LowRank, Masked


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


BASE, A, B, X = draw(6, 4), draw(6, 2, seed=1), draw(2, 4, seed=2), draw(3, 5, 6, seed=3)
MASK = jnp.asarray(np.random.default_rng(4).integers(0, 2, (6, 4)).astype(bool))


@pytest.mark.parametrize(
    "weight",
    [
        LowRank(BASE, A, B, 0.5),
        Masked(BASE, MASK),
        LowRank(Masked(BASE, MASK), A, B, 0.5),
        Masked(LowRank(BASE, A, B, 0.5), MASK),
        LowRank(LowRank(BASE, A, B, 0.5), 2 * A, B, 0.1),
    ],
    ids=["lowrank", "masked", "lowrank over masked", "masked lowrank", "twice"],
)
def test_matmul_is_multiplication_by_dense(weight):
    dense = weights.dense(weight)
    assert weights.is_typed(weight) and isinstance(weight, weights.Weight)
    assert weight.shape == dense.shape == (6, 4) and weight.dtype == dense.dtype
    assert np.allclose(weights.matmul(X, weight), X @ dense, atol=1e-5)
    assert np.allclose(jax.jit(weights.matmul)(X, weight), X @ dense, atol=1e-5)
    half = weights.matmul(X.astype(jnp.bfloat16), weight)
    assert half.dtype == jnp.bfloat16
    tensors = weight.to_tensors()
    again = weight.from_tensors(tensors.__getitem__)
    if len(set(tensors)) == len(jax.tree.leaves(weight)):  # nested weights of one kind share names
        assert np.array_equal(again.dense(), dense)


def test_values():
    assert np.allclose(LowRank(BASE, A, B, 0.5).dense(), BASE + 0.5 * (A @ B), atol=1e-6)
    assert np.array_equal(Masked(BASE, MASK).dense(), np.where(MASK, BASE, 0))
    assert np.array_equal(weights.matmul(X, BASE), X @ BASE) and not weights.is_typed(BASE)


def test_no_gradient_reaches_a_masked_entry():
    grads = jax.grad(lambda base: jnp.square(Masked(base, MASK).matmul(X)).sum())(BASE)
    assert not np.any(np.where(MASK, 0, grads)) and np.any(grads)


def test_lora_starts_as_the_identity_and_trains_alone():
    model = tiny.model("bert")
    before = jf.functional(model)[1]
    adapted = weights.add_lora(model, "layers.{0,2}.attention.{query,value}", rank=2, alpha=6, key=jax.random.key(0))
    apply, params = jf.functional(adapted)
    batch = tiny.batch()
    reference = jax.jit(jf.functional(model)[0])(before, batch).logits
    assert np.allclose(jax.jit(apply)(params, batch).logits, reference, atol=1e-6)
    kernel = params["layers"]["2"]["attention"]["value"]["kernel"]
    assert isinstance(kernel, LowRank) and kernel.scale == 3.0 and kernel.a.shape == (8, 2)
    assert not np.any(kernel.b) and np.any(kernel.a)
    assert paths.select(params, "**.kernel.{a,b}") == [
        f"layers.{i}.attention.{name}.kernel.{part}" for i in (0, 2) for name in ("query", "value") for part in "ab"
    ]
    assert type(model.layers[0].attention.query.kernel.get_value()) is not LowRank  # the old model is untouched
    assert tiny.largest_difference(jf.functional(model)[1], before) == 0

    ours, rest = paths.partition(params, "**.kernel.{a,b}")

    def loss(ours):
        return jnp.square(apply(paths.combine(ours, rest), batch).logits - 1).mean()

    step = jax.jit(jax.value_and_grad(loss))
    first, grads = step(ours)
    assert len(jax.tree.leaves(grads)) == 8
    ours = jax.tree.map(lambda p, g: p - 0.05 * g, ours, grads)
    assert float(step(ours)[0]) < float(first)


def test_merging_gives_plain_kernels():
    adapted = weights.add_lora(tiny.model("llama"), rank=2, key=jax.random.key(0))
    apply, params = jf.functional(adapted)
    params = jax.tree.map(lambda a: a + 0.05, params)
    merged = weights.merge_lora(jf.with_params(adapted, params))
    assert merged.surgery == () and adapted.surgery != ()
    again, plain = jf.functional(merged)
    assert all(not weights.is_typed(leaf) for leaf in paths.flatten(plain).values())
    one, other = jax.jit(again)(plain, tiny.batch()), jax.jit(apply)(params, tiny.batch())
    assert np.allclose(one.logits, other.logits, atol=1e-4)


def test_refusals():
    model = tiny.model("bert")
    with pytest.raises(ValueError, match="rank: expected 1 or more, got 0"):
        weights.add_lora(model, rank=0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="no linear layer matches; there are"):
        weights.add_lora(model, "layers.*.attention.q_proj", key=jax.random.key(0))
