"""Zero-TPrune against the float64 reference of its equations, in single stages and whole models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers as jf
from jaxformers.compress import zero_tprune as zt
from jaxformers.compress import zero_tprune_graph as graphs
from jaxformers.compress.zero_tprune import Options, Stage

CASES = (
    "default", "uniform_init", "deit_two_special", "no_vhf", "mean_heads", "duplicates", "all_heads_filtered", "noop",
)  # fmt: skip


@pytest.fixture(scope="module")
def layers(oracles):
    with np.load(oracles / "zero_tprune" / "pruning_layer.npz") as z:
        return dict(z)


def case(layers, name):
    arrays = {key.split("/")[1]: value for key, value in layers.items() if key.startswith(name + "/")}
    given = json.loads(str(layers["options_json"]))[name]
    options = Options(
        cls_weighting=given.get("cls", "sqrtN"), vhf=given.get("vhf", True), eir=given.get("eir", True), graph="matrix"
    )
    return arrays, options, Stage(1, given["r"], given["rho"], given["T"]), given.get("special", 1)


def steps(attention, keys, options, stage, specials):
    """What the stages of a pruning layer find on the way, and what it keeps."""
    graph = graphs.Graph(keys[None], matrix=attention[None])
    length = keys.shape[0]
    alive = jnp.ones((1, length), bool)
    pre = graphs.importance(graph, alive, 1, options)
    image = alive & (jnp.arange(length) >= specials)
    a, most = graphs.similar(graph.features, pre[0], image, length - specials, options)
    left = alive & ~graphs.removed(a, most, stage.remove, length)
    last = graphs.importance(graph, left, stage.votes, options, subgraph=True)
    keep, _ = graphs.choose(graph, specials, stage, options)
    return jax.tree.map(lambda x: x[0], {"pre": pre, "a": a, "most": most, "left": left, "last": last, "keep": keep})


@pytest.mark.parametrize(
    ("name", "wide"),
    [*((name, True) for name in CASES), ("default", False), ("deit_two_special", False), ("duplicates", False)],
)
def test_every_step_of_a_pruning_layer(layers, name, wide):
    arrays, options, stage, specials = case(layers, name)
    with jax.enable_x64(wide):
        dtype, tolerance = (np.float64, 1e-10) if wide else (np.float32, 1e-5)
        close = lambda found, expected: np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
        run = jax.jit(steps, static_argnums=(2, 3, 4))
        found = run(arrays["attention"].astype(dtype), arrays["keys"].astype(dtype), options, stage, specials)
        found = jax.tree.map(np.asarray, found)
    score, eta, heads = found["pre"]
    close(heads, arrays["pre_head_scores"])
    close(score, arrays["pre_score"])
    assert (eta == arrays["pre_eta"]).all()
    assert (found["a"] == arrays["group_A"]).all()
    close(found["most"], arrays["max_sim_A"])
    if wide:  # equal keys are equally similar; in float32 that depends on how a product is summed
        order = found["a"][np.argsort(-found["most"], kind="stable")][: stage.remove]
        assert (order == arrays["s_removed"]).all()
    survivors = arrays["after_s"]
    assert (np.flatnonzero(found["left"]) == survivors).all()
    score, eta, heads = found["last"]
    close(heads[:, survivors], arrays["head_scores"])
    close(score[survivors], arrays["score"])
    assert (eta == arrays["eta"]).all()
    assert (np.flatnonzero(found["keep"]) == arrays["kept"]).all()
    assert found["keep"].sum() - specials == arrays["k"] == graphs.kept_patches(stage, len(arrays["keys"]) - specials)


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_a_pruned_model(oracles, kind):
    with np.load(oracles / "zero_tprune" / f"{kind}_pruned.npz") as z:
        arrays = dict(z)
    given = json.loads(str(arrays["options_json"]))["schedule"]
    schedule = tuple(Stage(int(block), s["r"], s["keep_rate"], s["votes"]) for block, s in given.items())
    directory = oracles / "backbones" / kind
    images = arrays["pixel_values"].astype(np.float32)
    found = zt.prune(directory, images, schedule)
    for block in (1, 2):
        expected = arrays[f"kept_after_block_{block}"]
        assert (found.kept[block] == expected).all() and found.scores[block].shape == expected.shape
    np.testing.assert_allclose(found.output.logits, arrays["pruned_logits"], rtol=0, atol=2e-4)
    hidden = arrays["pruned_last_hidden_after_layernorm"]
    np.testing.assert_allclose(found.output.last_hidden_state, hidden, rtol=0, atol=2e-4)
    both = np.take_along_axis(arrays["kept_after_block_1"], arrays["kept_after_block_2"], 1)
    assert (found.tokens == both).all()
    dense = zt.prune(jf.load(directory), images, ())
    np.testing.assert_allclose(dense.output.logits, arrays["dense_logits"], rtol=0, atol=2e-4)
