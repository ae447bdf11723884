"""Reading and rewriting named points of the forward pass: loop, scan, remat, jit, grad and vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import jaxformers as jf
from jaxformers import sites

WAYS = {
    "loop": {},
    "scan": {"scan_layers": True},
    "remat": {"remat": "full"},
    "scan+remat": {"scan_layers": True, "remat": "dots"},
}
PATTERNS = ("embeddings", "layers.*.{input,output}", "layers.*.attention.{scores,probs,context}", "layers.1.mlp.hidden")


@pytest.fixture(scope="module", params=["bert", "llama"])
def ways(request):
    """{way: (apply, params)} of one model."""
    model = tiny.model(request.param)
    return {name: jf.functional(model, **settings) for name, settings in WAYS.items()}


def test_reap_is_the_same_however_layers_run(ways):
    batch, reference = tiny.batch(), None
    for apply, params in ways.values():
        with jax.checking_leaks():
            out, seen = jax.jit(jf.reap(apply, PATTERNS))(params, batch)
        plain = jax.jit(apply)(params, batch)
        assert tiny.largest_difference(out, plain) < 1e-5  # reading changes nothing but the fused attention
        reference = seen if reference is None else reference
        assert set(seen) == set(reference)
        assert tiny.largest_difference(dict(sorted(seen.items())), dict(sorted(reference.items()))) < 1e-5
    assert reference["layers.2.attention.scores"].shape == (2, 2, 6, 6)
    assert reference["layers.2.attention.context"].shape == (2, 6, 2, 4)
    assert reference["layers.1.mlp.hidden"].shape == (2, 6, 12) and "layers.0.mlp.hidden" not in reference
    assert np.allclose(reference["layers.0.output"], reference["layers.1.input"])
    assert np.allclose(reference["layers.0.attention.probs"].sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize(
    "pattern",
    ["layers.1.mlp.hidden", "layers.{0,2}.attention.probs", "layers.*.output", "layers.1.attention.query.input"],
)
def test_edit_is_the_same_however_layers_run(ways, pattern):
    batch, reference = tiny.batch(), None
    for apply, params in ways.values():
        with jax.checking_leaks():
            out = jax.jit(jf.edit(apply, {pattern: lambda x: x * 0.3}))(params, batch)
        assert tiny.largest_difference(out, jax.jit(apply)(params, batch)) > 1e-3
        reference = out if reference is None else reference
        assert tiny.largest_difference(out, reference) < 1e-5


def test_gradients_pass_through_edits_and_reaped_values(ways):
    batch, reference = tiny.batch(), None
    for name, (apply, params) in ways.items():

        def loss(params, apply=apply):
            edited = jf.edit(apply, {"layers.1.mlp.hidden": lambda h: 2 * h})
            out, seen = jf.reap(edited, "layers.*.attention.probs")(params, batch)
            return jnp.square(out.logits).mean() + jnp.square(seen["layers.2.attention.probs"]).sum()

        grads = jax.jit(jax.grad(loss))(params)
        grads = jf.functional(jf.with_params(tiny_of(grads), grads))[1] if "scan" in name else grads
        reference = grads if reference is None else reference
        assert tiny.largest_difference(grads, reference) < 1e-4


def tiny_of(params):
    return tiny.model("llama" if "final_norm" in params else "bert")


@pytest.mark.parametrize("way", ["loop", "scan+remat"])
def test_vmap_of_reap(ways, way):
    apply, params = ways[way]
    batch = tiny.batch(rows=3)
    together, seen = jax.jit(jf.reap(apply, "layers.*.output"))(params, batch)
    rows = jax.tree.map(lambda a: a[:, None], batch)
    alone, one_by_one = jax.jit(jax.vmap(jf.reap(apply, "layers.*.output"), (None, 0)))(params, rows)
    assert np.allclose(alone.logits[:, 0], together.logits, atol=1e-5)
    for name, value in seen.items():
        assert np.allclose(one_by_one[name][:, 0], value, atol=1e-5)


def test_every_linear_and_block_has_its_sites(ways):
    apply, params = ways["loop"]
    out, seen = jax.jit(jf.reap(apply, "**"))(params, tiny.batch())
    expected = {"embeddings"}
    for path, module in nnx.iter_modules(tiny_of(params)):
        path = ".".join(map(str, path))
        if hasattr(module, "kernel"):
            expected |= {f"{path}.input", f"{path}.output"}
        elif path.endswith("norm"):
            expected.add(f"{path}.weights")
        elif path.endswith(".attention"):
            expected |= {f"{path}.{part}" for part in ("scores", "probs", "context")}
        elif path.endswith(".mlp"):
            expected.add(f"{path}.hidden")
        elif path.startswith("layers.") and path.count(".") == 1:
            expected |= {f"{path}.input", f"{path}.output"}
    assert set(seen) == expected
    assert seen["layers.0.attention.query.output"].shape == (2, 6, 8)  # before the split into heads
    width = {name: seen[name].shape[-1] for name in ("layers.0.mlp.up.output", "layers.0.mlp.down.input")}
    assert set(width.values()) == {12}


def test_reap_around_edit_reads_the_edited_value(ways):
    for way in ("loop", "scan"):
        apply, params = ways[way]
        zero = {"layers.1.mlp.hidden": jnp.zeros_like}
        _, seen = jax.jit(jf.reap(jf.edit(apply, zero), "layers.*.mlp.hidden"))(params, tiny.batch())
        assert not np.any(seen["layers.1.mlp.hidden"]) and np.any(seen["layers.0.mlp.hidden"])

        def inner(params, batch, apply=apply):
            out, seen = jf.reap(apply, "layers.1.mlp.hidden")(params, batch)
            return seen["layers.1.mlp.hidden"]

        before = jax.jit(jf.edit(inner, zero))(params, tiny.batch())  # the inner reap acts first
        assert np.any(before)


def test_edits_act_in_order_and_keep_shape_and_dtype(ways):
    apply, params = ways["loop"]
    edits = {"layers.0.output": lambda x: x + 1, "layers.*.output": lambda x: x * 2}
    _, seen = jax.jit(jf.reap(jf.edit(apply, edits), "layers.0.output"))(params, tiny.batch())
    _, plain = jax.jit(jf.reap(apply, "layers.0.output"))(params, tiny.batch())
    assert np.allclose(seen["layers.0.output"], (plain["layers.0.output"] + 1) * 2, atol=1e-5)
    out = jax.eval_shape(jf.edit(apply, {"layers.0.output": lambda x: x.astype(jnp.bfloat16)}), params, tiny.batch())
    assert out.logits.dtype == jnp.float32
    for bad in (lambda x: x[:1], lambda x: None):
        with pytest.raises(ValueError, match=r"edit of layers\.0\.output: the function must return shape \(2, 6, 8\)"):
            jax.eval_shape(jf.edit(apply, {"layers.0.output": bad}), params, tiny.batch())


def test_masking_keys_through_scores_equals_the_attention_mask(ways):
    apply, params = ways["loop"]
    batch = tiny.batch()
    hide = jnp.where(batch["attention_mask"], 0.0, -jnp.inf)[:, None, None, :]
    hidden = jf.edit(apply, {"layers.*.attention.scores": lambda s: s + hide})
    masked = jax.jit(hidden)(params, {"input_ids": batch["input_ids"]})
    assert np.allclose(masked.last_hidden_state, jax.jit(apply)(params, batch).last_hidden_state, atol=1e-5)


def test_refusals(ways):
    apply, params = ways["loop"]
    with pytest.raises(ValueError, match="already jitted"):
        jf.reap(jax.jit(apply), "**")
    with pytest.raises(ValueError, match="already jitted"):
        jf.edit(jax.jit(apply), {"**": lambda x: x})
    for way in ("loop", "scan"):
        apply, params = ways[way]
        with pytest.raises(ValueError, match=r"no site of this model matches 'layers\.9\.output'"):
            jax.eval_shape(jf.reap(apply, ("embeddings", "layers.9.output")), params, tiny.batch())
        with pytest.raises(ValueError, match=r"no site of this model matches 'layer\.0'"):
            jax.eval_shape(jf.edit(apply, {"layer.0": lambda x: x}), params, tiny.batch())
    with pytest.raises(ValueError, match="expected a function"):
        jf.edit(apply, {"embeddings": 3})

    def twice(x):
        return jf.site("a", jf.site("a", x))

    with pytest.raises(ValueError, match="site a was passed twice"):
        jf.reap(twice, "a")(jnp.ones(2))


def test_an_error_inside_leaves_no_reader_behind(ways):
    apply, params = ways["loop"]

    def fail(x):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        jax.eval_shape(jf.reap(jf.edit(apply, {"embeddings": fail}), "**"), params, tiny.batch())
    assert not sites._local.stack
