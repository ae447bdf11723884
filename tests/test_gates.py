"""Gates against an independent implementation, what each kind removes, one compilation, errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxformers as jf
from jaxformers import gates, sites, units
from jaxformers.models import bert, swin


@pytest.fixture(scope="module")
def masked_bert(oracles):
    """(model, its inputs, masks, arrays) of a post-norm encoder whose every kind of unit is masked."""
    with np.load(oracles / "vtrans" / "masked_bert.npz") as z:
        a = {name: z[name] for name in z.files}
    o = json.loads(str(a["options"]))
    config = bert.Config(
        vocab_size=o["V"], hidden_size=o["d"], num_hidden_layers=o["L"], num_attention_heads=o["H"],
        intermediate_size=o["f"], max_position_embeddings=len(a["P_pos"]), num_labels=o["C"],
        layer_norm_eps=o["ln_eps"],
    )  # fmt: skip
    model = jf.init(config, head="sequence_classification", key=jax.random.key(0))
    _, params = jf.functional(model)
    flat = {path: np.zeros(leaf.shape) for path, leaf in jf.paths.flatten(params).items()}
    named = {"embeddings.token.embedding": "word", "embeddings.position.embedding": "pos"}
    pairs = {"embeddings.norm": "el", "pooler": "p", "head.classifier": "c"}
    for i in range(o["L"]):
        pairs |= {f"layers.{i}.attention.{ours}": f"{i}{ours[0]}" for ours in ("query", "key", "value", "out")}
        pairs |= {f"layers.{i}.mlp.up": f"{i}1", f"layers.{i}.mlp.down": f"{i}2"}
        pairs |= {f"layers.{i}.attention_norm": f"{i}l1", f"layers.{i}.mlp_norm": f"{i}l2"}
    for ours, theirs in pairs.items():
        named[f"{ours}.{'scale' if 'norm' in ours else 'kernel'}"] = f"{theirs}w"
        named[f"{ours}.bias"] = f"{theirs}b"
    flat |= {ours: a[f"P_{theirs}"] for ours, theirs in named.items()}
    model = jf.with_params(model, jf.paths.unflatten({path: jnp.asarray(x, jnp.float32) for path, x in flat.items()}))
    per_layer = lambda name, part: {f"layers.{i}.{part}": jnp.asarray(a[name][i]) for i in range(o["L"])}
    masks = {
        "heads": per_layer("heads", "attention"),
        "ffn": per_layer("ints", "mlp"),
        "sublayers": per_layer("att", "attention") | per_layer("ffn", "mlp"),
        "hidden": jnp.asarray(a["hid"]),
    }
    return model, {"input_ids": a["ids"], "attention_mask": a["attention_mask"]}, masks, a


def test_a_masked_post_norm_encoder_is_that_of_an_independent_one(masked_bert):
    model, batch, masks, expected = masked_bert
    apply, params = jf.functional(model)
    out = jax.jit(gates.gated(apply, model))(params, batch, masks)
    assert np.abs(out.logits - expected["logits"]).max() < 1e-5 * np.abs(expected["logits"]).max()
    real = expected["attention_mask"] == 1
    assert np.abs(out.last_hidden_state - expected["last_hidden"])[real].max() < 1e-4
    assert np.abs(jax.jit(apply)(params, batch).logits - expected["logits"]).max() > 0.01  # masks change it


def test_the_encoder_without_what_was_masked_is_that_one_too(masked_bert):
    model, batch, masks, expected = masked_bert
    small = jf.compact(model, masks)
    apply, params = jf.functional(small)
    out = jax.jit(apply)(params, batch)
    assert np.abs(out.logits - expected["logits"]).max() < 1e-5 * np.abs(expected["logits"]).max()
    matrices = ("embedding", "kernel")
    ours = {p: x.size for p, x in jf.paths.flatten(params).items() if p.endswith(matrices)}
    counted = sum(n for p, n in ours.items() if not p.startswith(("pooler", "head", "embeddings.token_type")))
    assert counted == json.loads(str(expected["options"]))["kept_matrix_params"]


WAYS = {"loop": {}, "scan": {"scan_layers": True}, "remat": {"remat": "full"}}


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_masks_act_alike_however_layers_run_and_nothing_compiles_anew(name):
    model, batch = tiny.model(name), tiny.batch()
    random = np.random.default_rng(0)
    some = lambda a: jnp.asarray(random.uniform(0, 1, a.shape).round(1), jnp.float32)
    many, reference = [jax.tree.map(some, gates.ones(model)) for _ in range(3)], None
    for options in WAYS.values():
        apply, params = jf.functional(model, **options)
        run = jax.jit(gates.gated(apply, model))
        with jax.checking_leaks():
            found = [run(params, batch, masks).logits for masks in many]
        assert run._cache_size() == 1
        reference = found if reference is None else reference
        assert max(float(np.abs(a - b).max()) for a, b in zip(found, reference, strict=True)) < 1e-5
        kept = run(params, batch, gates.ones(model)).logits
        assert np.abs(kept - jax.jit(apply)(params, batch).logits).max() < 1e-5
    assert np.abs(reference[0] - reference[1]).max() > 1e-2


def test_gradients_reach_every_mask():
    model, batch = tiny.model("bert"), tiny.batch()
    apply, params = jf.functional(model, scan_layers=True)
    run = gates.gated(apply, model)
    grads = jax.jit(jax.grad(lambda m: jnp.square(run(params, batch, m).logits).mean()))(gates.ones(model))
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def reaped(model, masks, patterns):
    apply, params = jf.functional(model)
    run = gates.gated(apply, model, tuple(masks))
    return jax.jit(jf.reap(lambda p, b: run(p, b, masks), patterns))(params, tiny.batch())[1]


def test_a_removed_sub_layer_leaves_the_norm_of_a_post_norm_block_and_nothing_of_a_pre_norm_one():
    off = {"sublayers": {f"layers.1.{part}": jnp.zeros(()) for part in ("attention", "mlp")}}
    model = tiny.model("bert")
    block = model.layers[1]
    block.attention_norm.scale.set_value(jnp.linspace(0.5, 1.5, 8))
    seen = reaped(model, off, "layers.1.{input,output}")
    expected = block.mlp_norm(block.attention_norm(seen["layers.1.input"]))
    assert np.abs(seen["layers.1.output"] - expected).max() < 1e-5
    assert np.abs(expected - seen["layers.1.input"]).max() > 1e-3
    seen = reaped(tiny.model("llama"), off, "layers.1.{input,output}")
    assert np.array_equal(seen["layers.1.output"], seen["layers.1.input"])


@pytest.mark.parametrize(("kv_heads", "gone"), [(2, [2, 3]), (1, [1]), (4, [1])])
def test_a_head_gate_takes_all_queries_of_a_key_head(kv_heads, gone):
    model = tiny.model("llama", num_attention_heads=4, num_key_value_heads=kv_heads)
    n = 2 if kv_heads == 2 else 4  # a single key head is shared by all queries: they go one by one
    assert units.units(model, ("heads",)) == {"heads": {f"layers.{i}.attention": n for i in range(3)}}
    mask = gates.ones(model, ("heads",))
    mask["heads"]["layers.2.attention"] = jnp.ones(n).at[1].set(0)
    apply, params = jf.functional(model)
    by_hand = {"layers.2.attention.context": lambda c: c.at[:, :, jnp.asarray(gone)].set(0)}
    expected = jax.jit(jf.edit(apply, by_hand))(params, tiny.batch()).logits
    assert np.array_equal(jax.jit(gates.gated(apply, model))(params, tiny.batch(), mask).logits, expected)


def test_a_removed_head_keeps_the_output_bias_and_a_removed_sub_layer_does_not():
    model = tiny.model("bert")
    model.layers[0].attention.out.bias.set_value(jnp.arange(8.0))
    none = {"heads": {"layers.0.attention": jnp.zeros(2)}}
    seen = reaped(model, none, "layers.0.attention.out.output")["layers.0.attention.out.output"]
    assert np.array_equal(seen, np.broadcast_to(np.arange(8.0), seen.shape))
    seen = reaped(model, {"sublayers": {"layers.0.attention": jnp.zeros(())}}, "layers.0.attention.out.output")
    assert not seen["layers.0.attention.out.output"].any()


def test_norms_count_the_kept_units_only():
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    mask = np.array([1, 0, 1, 1, 0, 1, 1, 0], bool)
    for norm in (jf.nn.LayerNorm(8), jf.nn.RMSNorm(8)):
        norm.path = "norm"
        out = sites.edit(norm, {"norm.weights": lambda w: w * mask})(x)
        narrow = type(norm)(5)(x[:, mask])
        assert np.abs(out[:, mask] - narrow).max() < 1e-6 and not out[:, ~mask].any()


def test_a_gate_may_be_a_distribution_and_draws_anew_at_each_place():
    model, batch = tiny.model("llama", num_hidden_layers=1), tiny.batch()
    apply, params = jf.functional(model)
    seen, keys = [], set()

    def noisy(x, mask, key):
        seen.append(x.shape)
        jax.debug.callback(lambda k: keys.add(tuple(k.tolist())), jax.random.key_data(key))
        return x * (mask["mean"] + 0.1 * jax.random.normal(key, (*x.shape[:-1], 1)))

    run = jax.jit(gates.gated(apply, model, ("heads", "hidden"), multiply=noisy, kept=lambda mask: mask["mean"]))
    masks = jax.tree.map(lambda a: {"mean": a}, gates.ones(model, ("heads", "hidden")))
    out = [run(params, batch, masks, key=jax.random.key(k)).logits for k in (0, 0, 1)]
    assert np.array_equal(out[0], out[1]) and np.abs(out[0] - out[2]).max() > 1e-3
    assert set(seen) == {(2, 6, 4, 2), (2, 6, 8)}  # heads last: (B, L, entries of a head, H)
    jax.effects_barrier()
    assert len(keys) == 2 * len(seen)  # two keys were given, and each place has its own


def test_what_an_architecture_does_not_carry_is_said():
    model = jf.init(swin.Config(embed_dim=8, depths=(1, 1), num_heads=(2, 2), window_size=2, image_size=(16, 16),
                                patch_size=(2, 2)), key=jax.random.key(0))  # fmt: skip
    assert set(units.units(model)) == {"heads", "ffn", "sublayers"}
    with pytest.raises(ValueError, match=r"hidden: Swin has 2 widths, \[8, 16\]"):
        units.units(model, ("hidden",))
    with pytest.raises(ValueError, match="kinds: 'neurons' is unknown; there are heads, ffn"):
        gates.ones(model, ("neurons",))
    with pytest.raises(ValueError, match="embeddings: the table of Bert is as wide as the model"):
        units.units(tiny.model("bert"), ("embeddings",))


def test_mixed_and_latent_models_say_why(oracles):
    mla = jf.load(oracles / "backbones" / "deepseek_v3" / "dense_mla")
    with pytest.raises(ValueError, match="heads: layers.0.attention is a LatentAttention"):
        units.units(mla, ("heads",))
    moe = jf.load(oracles / "backbones" / "deepseek_v3" / "moe_mla")
    with pytest.raises(ValueError, match=r"ffn: layers.\d.mlp is a MoE"):
        units.units(moe, ("ffn",))
    clip = jf.load(oracles / "backbones" / "clip")
    assert "hidden" not in units.units(clip) and "heads" in units.units(clip)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, "masks: expected"),
        ({"heads": jnp.ones(2)}, r"masks\['heads'\]: expected \{module path: array\}"),
        ({"heads": {"layers.7.attention": jnp.ones(2)}}, r"masks\['heads'\]: the model has no 'layers.7.attention'"),
        ({"heads": {"layers.0.attention": jnp.ones(3)}}, r"expected shape \(2,\), got \(3,\)"),
        ({"sublayers": {"layers.0.mlp": jnp.ones(1)}}, r"expected shape \(\), got \(1,\)"),
        ({"hidden": {"a": jnp.ones(8)}}, r"masks\['hidden'\]: expected one array"),
        ({"embeddings": jnp.ones(8)}, "there are no gates of kind 'embeddings' here; there are heads"),
    ],
)
def test_masks_that_do_not_fit_are_named(masks, message):
    model = tiny.model("bert")
    apply, params = jf.functional(model)
    with pytest.raises(ValueError, match=message):
        gates.gated(apply, model)(params, tiny.batch(), masks)


def test_masks_are_kept_in_a_file(tmp_path):
    model = tiny.model("bert")
    masks = jax.tree.map(lambda m: m.at[..., :1].set(0) if m.ndim else m * 0, gates.ones(model))
    gates.write(masks, tmp_path / "masks.npz")
    again = gates.read(tmp_path / "masks.npz", model)
    assert jax.tree.structure(again) == jax.tree.structure(masks)
    assert tiny.largest_difference(again, masks) == 0
    with pytest.raises(ValueError, match=r"masks\['heads'\]\['layers.0.attention'\]: expected shape"):
        gates.read(tmp_path / "masks.npz", tiny.model("bert", num_attention_heads=4))
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    with pytest.raises(ValueError, match="are no kinds of gates"):
        gates.read(tmp_path / "other.npz", model)
    (tmp_path / "text").write_text("no masks")
    with pytest.raises(ValueError, match="expected masks as gates.write keeps them"):
        gates.read(tmp_path / "text", model)
