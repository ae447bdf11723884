"""Models as pure functions: loop, scan and remat agree; weights go out and come back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxformers as jf
from jaxformers import weights

WAYS = [{"scan_layers": True}, {"remat": "full"}, {"scan_layers": True, "remat": "dots_no_batch"}]


def key(seed):
    """A key for dropout that compiles faster than threefry's."""
    return jax.random.key(seed, impl="unsafe_rbg")


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_loop_scan_and_remat_agree(name):
    model, batch, rngs = tiny.model(name, num_hidden_layers=2), tiny.batch(), key(3)

    def results(**settings):
        apply, params = jf.functional(model, **settings)

        def loss(params, rngs):
            return jnp.square(apply(params, batch, rngs=rngs).logits).mean()

        both = jax.jit(lambda params: (apply(params, batch), jax.value_and_grad(loss)(params, rngs)))
        out, (value, grads) = both(params)
        return out, value, jf.functional(jf.with_params(model, grads))[1]

    out, value, grads = results()
    clean = jnp.square(out.logits).mean()
    assert name == "llama" or abs(float(value - clean)) > 1e-3  # dropout is on where the architecture has it
    for settings in WAYS if name == "gpt2" else WAYS[-1:]:
        again, value_again, grads_again = results(**settings)
        assert tiny.largest_difference(again, out) < 1e-5
        assert abs(float(value_again - value)) < 1e-5 * abs(float(value))
        scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(grads))
        assert tiny.largest_difference(grads_again, grads) < 1e-5 * scale


def test_params_are_a_plain_dict_of_module_paths():
    model = tiny.model("bert")
    apply, params = jf.functional(model)
    flat = jf.paths.flatten(params)
    assert flat["layers.2.attention.query.kernel"].shape == (8, 8)
    assert flat["embeddings.token.embedding"].shape == (20, 8)
    assert set(params["layers"]) == {"0", "1", "2"}
    assert all(type(node) is dict for node in (params, params["layers"], params["layers"]["0"]))
    _, stacked = jf.functional(model, scan_layers=True)
    assert list(stacked["layers"]) == ["*"]
    assert stacked["layers"]["*"]["attention"]["query"]["kernel"].shape == (3, 8, 8)
    assert jax.eval_shape(apply, params, tiny.batch()).logits.shape == (2, 6, 20)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_with_params_is_the_way_back(scan_layers):
    model = tiny.model("llama")
    apply, params = jf.functional(model, scan_layers=scan_layers)
    doubled = jax.tree.map(lambda a: 2 * a, params)
    other = jf.with_params(model, doubled)
    again, _ = jf.functional(other)
    found = jax.jit(again)(jf.functional(other)[1], tiny.batch())
    assert np.allclose(found.logits, jax.jit(apply)(doubled, tiny.batch()).logits, atol=1e-4)
    assert tiny.largest_difference(jf.functional(model, scan_layers=scan_layers)[1], params) == 0  # untouched
    assert other.layers[1].attention.query.path == "layers.1.attention.query"


def test_with_params_refuses_what_does_not_fit():
    model = tiny.model("bert")
    _, params = jf.functional(model)
    with pytest.raises(ValueError, match="the tree does not fit"):
        jf.with_params(model, {**params, "extra": jnp.zeros(1)})
    head = {**params["head"], "bias": jnp.zeros(21)}
    with pytest.raises(ValueError, match=r"head\.bias has shape \(21,\), the model's has \(20,\)"):
        jf.with_params(model, {**params, "head": head})


def test_dropout_follows_the_key():
    apply, params = jf.functional(tiny.model("bert", num_hidden_layers=1))
    run = jax.jit(lambda rngs: apply(params, tiny.batch(), rngs=rngs).logits)
    one, other, clean = run(key(0)), run(key(1)), run(None)
    assert np.array_equal(one, run(key(0))) and np.array_equal(clean, run(None))
    assert not np.allclose(one, other) and not np.allclose(one, clean)


def test_what_the_batch_may_hold():
    apply, params = jf.functional(tiny.model("llama"))
    batch = tiny.batch()
    plain = jax.jit(apply)(params, batch).logits
    typed = jax.jit(apply)(params, {**batch, "token_type_ids": np.ones_like(batch["input_ids"])}).logits
    assert np.array_equal(plain, typed)  # tokenizers make token types for every architecture
    with pytest.raises(ValueError, match="'labels' is no input of Llama; it takes input_ids, attention_mask"):
        apply(params, {**batch, "labels": batch["input_ids"]})


def test_absent_parts_of_the_output_are_none():
    model = tiny.model("bert", head=None)
    apply, params = jf.functional(model)
    out = jax.jit(apply)(params, tiny.batch())
    assert out.logits is None and out.cache is None and out.pooled.shape == (2, 8)
    assert len(jax.tree.leaves(out)) == 2


def test_unequal_layers_run_as_a_loop_only():
    model = weights.add_lora(tiny.model("bert"), "layers.1.mlp.up", rank=2, key=jax.random.key(0))
    apply, params = jf.functional(model)
    assert jax.eval_shape(apply, params, tiny.batch()).logits.shape == (2, 6, 20)
    with pytest.raises(ValueError, match="layer 1 differs from layer 0"):
        jf.functional(model, scan_layers=True)
    with pytest.raises(ValueError, match="remat: expected None or one of full, dots, dots_no_batch, got 'all'"):
        jf.functional(model, remat="all")


def test_typed_weights_stack():
    model = weights.add_lora(tiny.model("bert"), "layers.*.attention.query", rank=2, key=jax.random.key(0))
    loop, params = jf.functional(model)
    params = jax.tree.map(lambda a: a + 0.1, params)  # the update is no longer zero
    scan, stacked = jf.functional(jf.with_params(model, params), scan_layers=True)
    assert stacked["layers"]["*"]["attention"]["query"]["kernel"].a.shape == (3, 8, 2)
    one, other = jax.jit(loop)(params, tiny.batch()), jax.jit(scan)(stacked, tiny.batch())
    assert np.allclose(one.logits, other.logits, atol=1e-4)


def test_one_compilation_serves_all_batches_of_a_shape():
    apply, params = jf.functional(tiny.model("gpt2"))
    traces = []

    @jax.jit
    def run(params, batch):
        traces.append(1)
        return apply(params, batch).logits

    for seed in range(3):
        run(params, {"input_ids": np.random.default_rng(seed).integers(0, 20, (2, 5))})
    assert len(traces) == 1
