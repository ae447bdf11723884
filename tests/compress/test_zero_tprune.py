"""Zero-TPrune against the float64 reference of its equations, in single stages and whole models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
    keep, _ = graphs.choose(graph, specials, graphs.Counts.of(stage, length - specials), options)
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
    found = zt.prune_tokens(directory, images, schedule)
    for block in (1, 2):
        expected = arrays[f"kept_after_block_{block}"]
        assert (found.kept[block] == expected).all() and found.scores[block].shape == expected.shape
    np.testing.assert_allclose(found.output.logits, arrays["pruned_logits"], rtol=0, atol=2e-4)
    hidden = arrays["pruned_last_hidden_after_layernorm"]
    np.testing.assert_allclose(found.output.last_hidden_state, hidden, rtol=0, atol=2e-4)
    both = np.take_along_axis(arrays["kept_after_block_1"], arrays["kept_after_block_2"], 1)
    assert (found.tokens == both).all()
    dense = zt.prune_tokens(jf.load(directory), images, ())
    np.testing.assert_allclose(dense.output.logits, arrays["dense_logits"], rtol=0, atol=2e-4)


# ---- invariants ------------------------------------------------------------------------------------------------------


def tiny(kind="vit", head="image_classification", depth=3, **changes):
    """36 patches of 4 pixels, 16 wide; weights large enough that attention is not flat."""
    config = {
        "model_type": kind, "hidden_size": 16, "num_hidden_layers": depth, "num_attention_heads": 2,
        "intermediate_size": 24, "image_size": 24, "patch_size": 4, "num_labels": 5, "initializer_range": 0.3,
    }  # fmt: skip
    return jf.init({**config, **changes}, head=head, key=jax.random.key(1))


def abstract(kind, head, **changes):
    """The same without arrays: for shapes and refusals."""
    return jf.surgery.named(nnx.eval_shape(lambda: tiny(kind, head, **changes)))


IMAGES = np.random.default_rng(0).standard_normal((3, 3, 24, 24)).astype(np.float32)
SCHEDULE = (Stage(1, 4, 0.9, 8), Stage(2, 3, 0.6, 2))


@pytest.fixture(scope="module")
def vit():
    return tiny()


@pytest.fixture(scope="module")
def pruned(vit):
    return zt.prune_tokens(vit, IMAGES, SCHEDULE, Options(graph="matrix"))


@pytest.fixture(scope="module")
def first_block(vit):
    """What a pruning layer behind the first block sees: 37 tokens, one of them special."""
    apply, params = jf.functional(vit)
    _, seen = jax.jit(jf.reap(apply, "layers.0.attention.{probs,key.output}"))(params, {"pixel_values": IMAGES})
    return graphs.Graph(seen["layers.0.attention.key.output"], matrix=seen["layers.0.attention.probs"])


def random_graph(seed=0, batch=2, heads=3, length=20, width=6):
    """An attention matrix with peaked and flat heads, and features."""
    rng = np.random.default_rng(seed)
    e = np.exp(np.linspace(0.5, 3, heads)[None, :, None, None] * rng.standard_normal((batch, heads, length, length)))
    matrix, features = e / e.sum(-1, keepdims=True), rng.standard_normal((batch, length, width))
    return graphs.Graph(jnp.asarray(features, jnp.float32), matrix=jnp.asarray(matrix, jnp.float32))


@pytest.mark.parametrize("subgraph", [False, True])
def test_votes_are_conserved(subgraph):
    graph, options = random_graph(), Options()
    alive = np.ones((2, 20), bool)
    alive[:, 5:9] = not subgraph
    for votes in (1, 7):
        run = jax.jit(lambda votes=votes: graphs.importance(graph, alive, votes, options, subgraph=subgraph))
        _, _, s = run()
        s = np.asarray(s)
        np.testing.assert_allclose(s.sum(-1), 1, rtol=1e-5)
        assert (s >= 0).all() and (s * ~alive[:, None] == 0).all()


def test_votes_end_early_when_nothing_changes():
    graph, alive = random_graph(), jnp.ones((2, 20), bool)
    run = jax.jit(
        lambda votes, epsilon: graphs.importance(graph, alive, votes, Options(epsilon=epsilon))[2], static_argnums=1
    )
    at = lambda votes, epsilon: np.asarray(run(votes, epsilon))
    assert (at(9, 1.0) == at(1, None)).all() and (at(9, 0.0) == at(9, None)).all()
    assert np.abs(at(200, 1e-4) - at(200, None)).max() < 1e-2


def test_scores_from_queries_and_keys_are_those_of_the_matrix():
    """Aᵀ s by the kernel's reference, which never keeps A, on all tokens and on survivors."""
    q, k = np.random.default_rng(0).standard_normal((2, 2, 20, 3, 8)).astype(np.float32)
    e = np.exp(np.einsum("bqhe,bkhe->bhqk", q, k) * 8**-0.5)
    matrix = jnp.asarray(e / e.sum(-1, keepdims=True))
    features = random_graph().features
    both = graphs.Graph(features, matrix=matrix), graphs.Graph(features, query=jnp.asarray(q), key=jnp.asarray(k))
    alive = np.ones((2, 20), bool)
    alive[:, 3:9] = False
    for subgraph, mask in ((False, np.ones_like(alive)), (True, alive)):
        run = jax.jit(lambda g, m, subgraph=subgraph: graphs.importance(g, m, 4, Options(), subgraph=subgraph))
        a, b = (run(g, mask) for g in both)
        np.testing.assert_allclose(a[2], b[2], rtol=0, atol=1e-6)


def test_a_model_pruned_by_column_sums_is_the_same(vit, pruned):
    sums = zt.prune_tokens(vit, IMAGES, SCHEDULE, Options(graph="column_sums"))
    assert (pruned.tokens == sums.tokens).all()
    np.testing.assert_allclose(pruned.output.logits, sums.output.logits, atol=1e-5)


def test_nothing_to_prune_changes_nothing(vit):
    dense = jax.jit(jf.functional(vit)[0])(jf.functional(vit)[1], {"pixel_values": IMAGES})
    found = zt.prune_tokens(vit, IMAGES, (Stage(1, 0, 1.0, 30), Stage(3, 0, 1.0, 1)))
    np.testing.assert_allclose(found.output.logits, dense.logits, rtol=0, atol=1e-5)
    assert (found.tokens == np.arange(37)).all()


def test_permuted_patches_permute_what_is_kept(vit, pruned):
    """Patches with their positions in another order: the same tokens stay, the same class comes out."""
    order = np.random.default_rng(1).permutation(36)
    blocks = IMAGES.reshape(3, 3, 6, 4, 6, 4).transpose(0, 2, 4, 1, 3, 5).reshape(3, 36, 3, 4, 4)[:, order]
    moved = blocks.reshape(3, 6, 6, 3, 4, 4).transpose(0, 3, 1, 4, 2, 5).reshape(IMAGES.shape)
    apply, params = zt.pruner(vit)
    run = jax.jit(apply, static_argnames=("schedule", "options"))
    table = params["embeddings"]["position"]["embedding"]
    other = jax.tree.map(lambda x: x, params)
    other["embeddings"]["position"]["embedding"] = jnp.concatenate([table[:1], table[1:][order]])
    a, b = pruned, run(other, {"pixel_values": moved}, schedule=SCHEDULE)
    np.testing.assert_allclose(a.output.logits, b.output.logits, atol=1e-5)
    for ours, theirs in zip(a.tokens, b.tokens, strict=True):
        assert set(ours[1:].tolist()) == {1 + order[t - 1] for t in theirs[1:].tolist()}


def test_a_schedule_of_plain_tuples():
    given = ((3, 2), (1, 4, 0.9, 8))
    assert zt.check_schedule(given, 3, 36, Options()) == {1: Stage(1, 4, 0.9, 8), 3: Stage(3, 2)}


def test_only_pruning_blocks_form_probabilities(vit, monkeypatch):
    from jaxformers.nn import attention

    formed = []
    real = attention.needs_only_context
    spy = lambda path, rate, key: formed.append((path, not real(path, rate, key))) or real(path, rate, key)
    monkeypatch.setattr(attention, "needs_only_context", spy)
    apply, params = zt.pruner(vit)
    jax.eval_shape(lambda p, b: apply(p, b, (Stage(2, 4),)), params, {"pixel_values": IMAGES})
    assert formed == [(f"layers.{i}.attention", i == 1) for i in range(3)]


def naive_similar(features, score, specials, options):
    """{position: similarity} of group A, by loops."""
    n = len(score) - specials
    order = sorted(range(specials, len(score)), key=lambda i: (-score[i], i))
    up, down = order[: (n + 1) // 2], order[(n + 1) // 2 :]
    groups = {
        "sequential_u": (down, up), "sequential_i": (order[: n // 2], order[n // 2 :]),
        "alternate": (order[1::2], order[0::2]), "none": (order, order),
    }  # fmt: skip
    similarity = {
        "cosine": lambda x, y: x @ y / (np.linalg.norm(x) * np.linalg.norm(y)),
        "dot": lambda x, y: x @ y,
        "manhattan": lambda x, y: -np.abs(x - y).sum(),
        "euclidean": lambda x, y: -np.sqrt(((x - y) ** 2).sum()),
        "minkowski": lambda x, y: -((np.abs(x - y) ** options.p).sum() ** (1 / options.p)),
    }[options.metric]
    a, b = groups[options.partition]
    return [(i, max(similarity(features[i], features[j]) for j in b if j != i)) for i in a]


@pytest.mark.parametrize(
    ("partition", "metric"),
    [("sequential_u", "dot"), ("sequential_i", "cosine"), ("alternate", "manhattan"), ("none", "euclidean"),
     ("sequential_u", "minkowski")],
)  # fmt: skip
def test_partitions_and_metrics_by_loops(partition, metric):
    graph, options, specials = random_graph(length=17), Options(partition=partition, metric=metric), 2
    score = jnp.asarray(np.random.default_rng(5).random((2, 17)), jnp.float32)
    image = np.broadcast_to(np.arange(17) >= specials, (2, 17))
    a, most = jax.jit(lambda: graphs.similar(graph.features, score, image, 15, options))()
    for row in range(2):
        expected = naive_similar(np.asarray(graph.features[row], np.float64), np.asarray(score[row]), specials, options)
        assert a[row].tolist() == [i for i, _ in expected]
        np.testing.assert_allclose(most[row], [m for _, m in expected], rtol=1e-5)


def test_a_random_partition_has_the_same_sizes_and_another_half():
    graph, image = random_graph(), np.broadcast_to(np.arange(20) >= 1, (2, 20))
    score = jnp.asarray(np.random.default_rng(5).random((2, 20)), jnp.float32)
    run = jax.jit(lambda key: graphs.similar(graph.features, score, image, 19, Options(partition="random"), key)[0])
    halves = [np.asarray(run(jax.random.key(i))) for i in range(2)]
    assert halves[0].shape == (2, 9) and (halves[0] >= 1).all()
    assert set(halves[0][0].tolist()) != set(halves[1][0].tolist())


@pytest.mark.parametrize("method", ["i_stage", "s_stage", "cls_attention", "random"])
def test_baselines_keep_as_many_tokens_by_their_own_rule(first_block, method):
    graph, counts, alive = first_block, graphs.Counts.of(Stage(1, 4, 0.8, 3), 36), np.ones((3, 37), bool)

    @jax.jit
    def run(key):
        own = None
        if method == "cls_attention":
            own = graph.matrix[:, :, 0].mean(1)
        elif method == "i_stage":
            own = graphs.importance(graph, alive, 3, Options())[0]
        elif method == "s_stage":
            pre = graphs.importance(graph, alive, 1, Options())[0]
            a, most = graphs.similar(graph.features, pre, alive & (jnp.arange(37) >= 1), 36, Options())
            own = jnp.zeros((3, 37)).at[jnp.arange(3)[:, None], a].set(-1e3 - most)
        return graphs.choose(graph, 1, counts, Options(method=method), key)[0], own

    keep, own = jax.tree.map(np.asarray, run(jax.random.key(0)))
    assert keep[:, 0].all() and (keep[:, 1:].sum(1) == 25).all()
    if method == "random":
        assert (keep != run(jax.random.key(1))[0]).any() and (keep[0] != keep[1]).any()
        return
    best = np.argsort(-own[:, 1:], axis=1, kind="stable")[:, :25] + 1
    assert all(set(np.flatnonzero(row[1:]) + 1) == set(expected) for row, expected in zip(keep, best, strict=True))


@pytest.mark.parametrize(
    ("kind", "head", "specials", "changes"),
    [("deit", "image_classification_with_teacher", 2, {}), ("dinov2", "image_classification", 1, {"mlp_ratio": 2}),
     ("dinov2_with_registers", None, 5, {"mlp_ratio": 2})],
)  # fmt: skip
def test_special_tokens_always_stay(kind, head, specials, changes):
    apply, params = zt.pruner(abstract(kind, head, depth=2, **changes))
    schedule = (Stage(1, 10, 0.3, 2),)
    found = jax.eval_shape(lambda p, b: apply(p, b, schedule), params, {"pixel_values": IMAGES})
    assert found.tokens.shape == (3, specials + 7) and found.output.last_hidden_state.shape[1] == specials + 7
    graph = random_graph(length=specials + 12)
    counts = graphs.Counts.of(Stage(1, 4, 0.3, 2), 12)
    keep = np.asarray(jax.jit(lambda: graphs.choose(graph, specials, counts, Options())[0])())
    assert keep[:, :specials].all() and (keep[:, specials:].sum(1) == 2).all()


def test_prompt_tokens_count_as_special():
    """Whatever stands before the patches: here the class token and three prompts that surgery has put behind it."""
    model = abstract("vit", None)
    inner = type(model.embeddings)

    class Prompted(inner):
        def __call__(self, pixels, mask=None, *, key=None):
            x, grid = inner.__call__(self, pixels, mask, key=key)
            prompts = jnp.ones((x.shape[0], 3, x.shape[2]))
            return jnp.concatenate([x[:, :1], prompts, x[:, 1:]], 1), grid

    model.embeddings.__class__ = Prompted
    apply, params = zt.pruner(model)
    found = jax.eval_shape(lambda p, b: apply(p, b, (Stage(2, 10, 0.3, 2),)), params, {"pixel_values": IMAGES})
    assert found.kept[2].shape == (3, 4 + 7)


def test_adapted_models_are_pruned_too(vit, pruned):
    """A low-rank update and adapters that start at zero."""
    changed = jf.weights.add_lora(vit, rank=2, key=jax.random.key(0))
    changed = jf.nn.add_adapters(changed, "layers.1.mlp.down", size=4, key=jax.random.key(1))
    other = zt.prune_tokens(changed, IMAGES, SCHEDULE)
    assert (pruned.tokens == other.tokens).all()
    np.testing.assert_allclose(pruned.output.logits, other.output.logits, atol=1e-5)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        ((Stage(4),), {}, "block 4 is not among the model's, 1 to 3"),
        ((Stage(0),), {}, "block 0 is not among"),
        ((Stage(2), Stage(2, 3)), {}, "block 2 is named twice"),
        ((Stage(1, 18),), {}, "block 1: of 36 image tokens fewer than 18 can be removed by similarity, not 18"),
        ((Stage(1, 0, 0.3), Stage(2, 5)), {}, "block 2: of 10 image tokens fewer than 5"),
        ((Stage(1, -1),), {}, "not -1"),
        ((Stage(1, 0, 0.4),), {"method": "s_stage"}, "by similarity, not 22"),
        ((Stage(1, 0, 0.0),), {}, "0 < keep_rate ≤ 1"),
        ((Stage(1, 0, 1.1),), {}, "0 < keep_rate ≤ 1"),
        ((Stage(1, 0, 1.0, 0),), {}, "votes ≥ 1"),
        ((Stage(1, 1),), {"method": "random"}, "key: random choices need a PRNG key"),
        ((Stage(1, 1),), {"partition": "random"}, "key: random"),
    ],
)
def test_schedules_that_do_not_fit(vit, schedule, options, message):
    with pytest.raises(ValueError, match=message):
        zt.prune_tokens(vit, IMAGES, schedule, Options(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"method": "tome"}, "method: expected one of zero_tprune"), ({"metric": "l1"}, "metric"), ({"p": 0.5}, "p ≥ 1"),
     ({"partition": "odd"}, "partition"), ({"feature": "keys"}, "feature"), ({"v_min": 1.0}, "0 ≤ v_min ≤ v_max"),
     ({"cls_weighting": "n"}, "cls_weighting"), ({"vhf_scale": "one"}, "vhf_scale"), ({"epsilon": -1.0}, "epsilon ≥ 0"),
     ({"method": "cls_attention", "graph": "column_sums"}, "graph: the class token's")],
)  # fmt: skip
def test_options_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


@pytest.mark.parametrize(
    ("config", "head", "message"),
    [
        ({"model_type": "swin", "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1],
          "num_heads": [1, 2], "window_size": 4}, "image_classification", "Swin.* is no ViT"),
        ({"model_type": "beit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "intermediate_size": 16, "image_size": 32, "use_relative_position_bias": True}, None, "whole grid"),
        ({"model_type": "bert", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
          "intermediate_size": 8}, None, "Bert is no ViT"),
    ],
)  # fmt: skip
def test_models_that_are_no_vit(config, head, message):
    with pytest.raises(ValueError, match=message):
        zt.pruner(nnx.eval_shape(lambda: jf.init(config, head=head, key=jax.random.key(0))))


def test_other_models_and_inputs_are_refused(vit):
    with pytest.raises(ValueError, match="predicts pixels of the whole grid"):
        zt.pruner(abstract("vit", "masked_image_modeling"))
    apply, params = zt.pruner(vit)
    with pytest.raises(ValueError, match="'pixel_mask' says that images are padded"):
        apply(params, {"pixel_values": IMAGES, "pixel_mask": np.ones((3, 24, 24))})
    with pytest.raises(ValueError, match="images of several sizes"):
        zt.prune_tokens(vit, [IMAGES[0], IMAGES[0, :, :12]], SCHEDULE)
    with pytest.raises(ValueError, match="pixel_values: expected"):
        zt.prune_tokens(vit, IMAGES[0], SCHEDULE)
