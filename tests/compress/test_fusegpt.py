"""FuseGPT: the official code's influence, groups, gradients, training and weights; then what must hold anyway."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import jaxformers as jf
from jaxformers import paths, surgery, weights
from jaxformers.compress import depth, fusegpt, fusegpt_group
from jaxformers.compress.depth import block_influence, macro_influence, remove_layers
from jaxformers.compress.fusegpt import FuseConfig, fuse_layers, group_of
from jaxformers.compress.fusegpt_group import graft, group_loss, merged, train_group
from jaxformers.evaluation import perplexity
from jaxformers.models import llama
from jaxformers.weights import Grafted, LowRank

KEY = jax.random.key(0)
IDS = np.random.default_rng(0).integers(0, 40, (16, 8))
QUICK = FuseConfig(
    rate=None, layers=2, group_size=4, rank=3, lora_rank=4, epochs=2, batch_size=4, influence_sequences=16,
    learning_rate=1e-4,
)  # fmt: skip

QUICKEST = dataclasses.replace(QUICK, layers=1, epochs=1, group_size=2)  # one layer is trained, once


def tiny(depth=4, **changes):
    config = llama.Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=depth, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=28, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return jf.init(dataclasses.replace(config, **changes), head="causal_lm", key=KEY)


@pytest.fixture(scope="module")
def model():
    return tiny()


def logits(model, ids):
    apply, params = jf.functional(model)
    return np.asarray(apply(params, {"input_ids": ids}).logits)


# --- against the official code --------------------------------------------------------------------------------------

THEIRS = {
    ours.removeprefix("layers.{}."): t.removeprefix("layers.{}.") for ours, t in llama.KEYS.items() if "{}" in ours
}


def loaded(oracle, folder):
    said = json.loads(str(oracle["options"]))
    tensors = {k.removeprefix("model."): np.array(oracle[k]) for k in oracle if k.startswith("model.")}
    save_file(tensors, folder / "model.safetensors")
    hf = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, **said["config"]}
    (folder / "config.json").write_text(json.dumps(hf))
    return jf.load(folder), said


def with_initial(layer, oracle, round_, place):
    """`layer` whose newest random factors are the oracle's; those of earlier rounds stay as they were trained."""
    flat = paths.flatten(layer.params)
    for path, w in flat.items():
        if not path.endswith(".kernel"):
            continue
        name = f"r{round_}.init.{place}.{THEIRS[path.removesuffix('.kernel')]}"
        new = jnp.asarray(oracle[f"{name}.coef_list.{fusegpt_group._grafts(w) - 1}.1"].T)
        if not isinstance(w.base, Grafted):
            w = dataclasses.replace(w, base=dataclasses.replace(w.base, a=jnp.asarray(oracle[f"{name}.lora_A"].T)))
        flat[path] = dataclasses.replace(w, d=new)
    return layer._replace(params=paths.unflatten(flat))


def named(layers):
    """{the oracle's name: array as torch lays it out} of what is trained in `layers`, and of its gradients alike."""
    found = {}
    for place, layer in enumerate(layers):
        for path, w in paths.flatten(layer.params).items():
            parent, _, leaf = path.rpartition(".")
            name = f"{place}.{THEIRS[parent]}"
            if leaf == "scale":
                found[f"{name}.weight"] = w
            while isinstance(w, Grafted):
                j = fusegpt_group._grafts(w) - 1
                found |= {f"{name}.coef_list.{j}.0": w.c.T, f"{name}.coef_list.{j}.1": w.d.T}
                w = w.base
            if isinstance(w, LowRank):
                found |= {f"{name}.lora_A": w.a.T, f"{name}.lora_B": w.b.T}
    return {name: np.asarray(array) for name, array in found.items()}


def gradients(layers, u, y, context, kind, dtypes):
    program, trained, _, frozen = fusegpt_group.begun(layers, FuseConfig(loss=kind), dtypes)
    slopes = jax.jit(jax.grad(fusegpt_group._loss, argnums=1), static_argnums=0)
    found = slopes(program, trained, frozen, context, u, y)
    whole = paths.combine(found, frozen)
    return named([layer._replace(params=whole[str(i)]) for i, layer in enumerate(layers)])


def close(ours, oracle, prefix, **tolerance):
    """Every array of the oracle under `prefix` is there and close."""
    names = [k.removeprefix(prefix) for k in oracle if k.startswith(prefix)]
    assert len(names) >= 7
    for name in names:
        np.testing.assert_allclose(ours[name], oracle[prefix + name], err_msg=name, **tolerance)


@pytest.mark.parametrize("kind", ["feature", "batch"])
def test_the_official_rounds(kind, oracles, request, tmp_path):
    """Influence, groups, the loss before and after, gradients, trained and folded weights, logits: one round with the
    feature axis; two with the official one, the second with layers that were fused before."""
    if kind == "feature":
        oracle = {
            **np.load(oracles / "fusegpt" / "rounds_feature.npz"),
            **np.load(oracles / "fusegpt" / "rounds_feature_init.npz"),
        }
    else:
        oracle = dict(np.load(request.getfixturevalue("shared") / "oracles" / "fusegpt" / "rounds_official.npz"))
    model, said = loaded(oracle, tmp_path)
    ids = oracle["input_ids"]
    np.testing.assert_allclose(logits(model, ids[0]), oracle["logits_dense"], atol=1e-5)
    config = FuseConfig(
        rank=said["coef_rank"], lora_rank=said["lora_rank"], epochs=said["epochs"], batch_size=said["batch"],
        group_size=said["group_size"], loss=kind, influence_sequences=4 * said["batch"],
    )  # fmt: skip
    layers, inputs = depth.opened(model, ids.reshape(-1, ids.shape[-1]), said["batch"])
    dtypes = {path: leaf.dtype for path, leaf in paths.flatten(layers[0].params).items()}
    for r, told in enumerate(said["rounds"]):
        plain = [merged(layer, dtypes) for layer in layers]
        influence = depth.influence_of(plain, inputs)
        np.testing.assert_allclose(1 - influence, oracle[f"r{r}.sim"], atol=1e-5)
        victim, _ = fusegpt._victim(plain, inputs, config, [])
        assert victim == told["victim_original_id"]
        first, last = group_of(told["victim_index"], len(layers), config.group_size)
        assert list(range(first, last + 1)) == told["group"]
        u = depth.run(plain[:first], inputs.x, inputs.context)
        y = depth.run(plain[first : last + 1], u, inputs.context)
        np.testing.assert_allclose(u, oracle[f"r{r}.group_input"], atol=1e-5)
        np.testing.assert_allclose(y, oracle[f"r{r}.target"], atol=2e-5)
        donor = paths.flatten(plain[told["victim_index"]].params)
        students = [graft(layer, donor, config, KEY) for layer in layers[first : last + 1] if layer.number != victim]
        students = [with_initial(layer, oracle, r, place) for place, layer in enumerate(students)]
        out = depth.run([merged(layer, dtypes) for layer in students], u, inputs.context)
        np.testing.assert_allclose(out, oracle[f"r{r}.out_before"], atol=2e-5)
        if r == 0:
            same = depth.run([l for l in plain[first : last + 1] if l.number != victim], u, inputs.context)
            np.testing.assert_array_equal(out, same)  # plain removal, bit by bit
        slopes = gradients(students, u[0], y[0], inputs.context, kind, dtypes)
        scale = max(np.abs(v).max() for v in slopes.values())
        close(slopes, oracle, f"r{r}.grad.", rtol=1e-4, atol=1e-5 * scale)
        students, before, after = train_group(students, u, y, inputs.context, config, dtypes)
        np.testing.assert_allclose(before, oracle[f"r{r}.loss_before"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(after, oracle[f"r{r}.loss_after"], rtol=1e-3, atol=1e-5)
        layers = [*layers[:first], *students, *layers[last + 1 :]]
        if r == len(said["rounds"]) - 1:  # what the file keeps of earlier rounds was trained on in later ones
            close(named(students), oracle, f"r{r}.trained.", rtol=0, atol=1e-4)
    folded = [merged(layer, dtypes) for layer in layers]
    for i, layer in enumerate(folded):
        flat = paths.flatten(layer.params)
        for ours, theirs in THEIRS.items():
            if (name := f"folded.{i}.{theirs}") in oracle:
                np.testing.assert_allclose(flat[f"{ours}.kernel"].T, oracle[name], atol=2e-5)
    small = depth.with_layers(model, folded, [layer.number for layer in folded])
    np.testing.assert_allclose(logits(small, ids[0]), oracle["logits_fused"], atol=1e-3)


def test_the_official_groups(oracles):
    table = np.load(oracles / "fusegpt" / "groups.npz")["table"]
    assert len(table) > 50
    for layers, size, victim, first, last in table.tolist():
        assert group_of(victim, layers, size) == (first, last)
    assert group_of(1, 3, 8) == (0, 2)  # the official code breaks here


# --- influence and removal ------------------------------------------------------------------------------------------


def abstract(hf):
    """A model without weights."""
    arch = jf.models.architecture(hf["model_type"])
    return surgery.named(nnx.eval_shape(lambda: arch.Model(arch.Config.from_hf(hf), rngs=nnx.Rngs(0))))


def outputs_of_last_layer(model, ids):
    apply, params = jf.functional(model)
    name = f"layers.{len(model.layers) - 1}.output"
    return np.asarray(jf.reap(apply, name)(params, {"input_ids": ids})[1][name], np.float64)


def cosine(x, y):
    return ((x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)).mean()


def test_influence_is_what_removal_does(model):
    """The cached suffixes give what whole passes of the model without the layer give."""
    found = macro_influence(model, IDS, batch_size=4)
    whole = outputs_of_last_layer(model, IDS)
    for i in range(4):
        without = outputs_of_last_layer(remove_layers(model, [i]), IDS)
        assert found[i] == pytest.approx(1 - cosine(whole, without), abs=2e-6)


def test_block_influence_is_local(model):
    apply, params = jf.functional(model)
    _, seen = jf.reap(apply, "layers.*.{input,output}")(params, {"input_ids": IDS})
    found = block_influence(model, IDS, batch_size=4)
    for i in range(4):
        x, y = (np.asarray(seen[f"layers.{i}.{s}"], np.float64) for s in ("input", "output"))
        assert found[i] == pytest.approx(1 - cosine(x, y), abs=2e-6)


def test_a_shallower_model_is_an_ordinary_checkpoint(model, tmp_path):
    small = remove_layers(model, [1, 2])
    jf.save(small, tmp_path)
    again = jf.load(tmp_path)
    assert again.config.num_hidden_layers == 2 and "jaxformers" not in json.loads(
        (tmp_path / "config.json").read_text()
    )
    np.testing.assert_array_equal(logits(again, IDS), logits(small, IDS))
    for new, old in ((0, 0), (1, 3)):
        assert jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(small.layers[new]), nnx.state(model.layers[old])))
    assert len(model.layers) == 4


def test_what_configs_say_of_single_layers_goes_along():
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "initializer_range": 0.2}
    neo = {"model_type": "gpt_neo", "num_layers": 4, "num_heads": 2, "attention_types": [[["global", "local"], 2]],
           "window_size": 3, "max_position_embeddings": 32}  # fmt: skip
    qwen = {"model_type": "qwen2", "num_hidden_layers": 4, "num_key_value_heads": 1, "intermediate_size": 28,
            "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}  # fmt: skip
    typed = {**qwen, "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]}
    for hf, windows in ((neo, [None, 3]), (qwen, [None, 3]), (typed, [None, 3])):
        small = remove_layers(abstract({**sizes, **hf}), [1, 2] if hf is neo else [1, 3])
        again = jf.models.architecture(hf["model_type"]).Config.from_hf(small.config.to_hf())
        rebuilt = abstract(again.to_hf())
        assert [layer.attention.window for layer in small.layers] == windows
        assert [layer.attention.window for layer in rebuilt.layers] == windows
    scaled = {"model_type": "gpt2", "n_layer": 4, "n_head": 2, "n_embd": 16, "vocab_size": 40,
              "scale_attn_by_inverse_layer_idx": True}  # fmt: skip
    with pytest.raises(ValueError, match="layer 2 would be another one as layer 1"):
        remove_layers(abstract(scaled), [1])


# --- fusion ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fused(model, tmp_path_factory):
    work = tmp_path_factory.mktemp("fuse")
    return fuse_layers(model, IDS, QUICK, key=KEY, evaluation=IDS, work_directory=work), work


def test_a_fused_model(model, fused, tmp_path):
    """Fewer layers, no more parameters than removal leaves, losses that fall, and a checkpoint like any other."""
    found, _ = fused
    assert len(found.rounds) == len(set(found.victims)) == 2 and len(found.model.layers) == 2
    removed = remove_layers(model, found.victims)
    ours, theirs = (paths.flatten(jf.functional(m)[1]) for m in (found.model, removed))
    assert {p: a.shape for p, a in ours.items()} == {p: a.shape for p, a in theirs.items()}
    assert not any(weights.is_typed(leaf) for leaf in ours.values())
    for round_ in found.rounds:
        assert round_.loss_after < round_.loss_before
        assert round_.victim in round_.group
        assert round_.victim == round_.layers[int(np.argmin(round_.influence))]
    assert found.rounds[0].layers == (0, 1, 2, 3) and set(found.rounds[1].layers) == {0, 1, 2, 3} - {found.victims[0]}
    np.testing.assert_allclose(found.rounds[0].influence, macro_influence(model, IDS, batch_size=4), atol=1e-7)
    assert found.perplexity_before == pytest.approx(perplexity(model, IDS, 8))
    assert found.perplexity_after == pytest.approx(perplexity(found.model, IDS, 8))
    assert f"{found.rounds[1].loss_after:.4g}" in str(found) and "perplexity" in str(found)
    jf.save(found.model, tmp_path)
    np.testing.assert_array_equal(logits(jf.load(tmp_path), IDS), logits(found.model, IDS))


def grafted(model, config):
    """Layer 0 with layer 1 grafted into it, and what that rests on."""
    layers, inputs = depth.opened(model, IDS, config.batch_size)
    dtypes = {path: leaf.dtype for path, leaf in paths.flatten(layers[0].params).items()}
    student = graft(layers[0], paths.flatten(layers[1].params), config, KEY)
    return layers, inputs, dtypes, student


@pytest.mark.parametrize("kind", ["lowrank", "full", "row", "none"])
def test_grafts_start_as_removal_and_leave_the_frozen_alone(model, kind):
    config = dataclasses.replace(QUICKEST, coefficient=kind, coefficient_learning_rate=1e-2)
    layers, inputs, dtypes, student = grafted(model, config)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, merged(student, dtypes).params, layers[0].params))
    y = depth.run(layers[:2], inputs.x, inputs.context)
    (trained,), before, after = train_group([student], inputs.x, y, inputs.context, config, dtypes)
    assert after.mean() < before.mean()
    old, donor = (paths.flatten(layers[i].params) for i in (0, 1))
    for path, w in paths.flatten(trained.params).items():
        if not path.endswith("kernel"):
            assert not jnp.array_equal(w, old[path]), path  # the norms are trained
            continue
        assert isinstance(w, LowRank if kind == "none" else Grafted)
        if kind != "none":
            assert w.c.shape == {"lowrank": (3, w.shape[1]), "full": w.shape, "row": (1, w.shape[1])}[kind]
            np.testing.assert_array_equal(w.donor, donor[path])
            assert np.any(w.c)
            w = w.base
        np.testing.assert_array_equal(w.base, old[path])
        assert np.any(w.b)


def test_biases_are_grafted_and_norms_trained():
    """GPT-2: every linear has a bias. One number per output of each victim's, over all victims."""
    hf = {"model_type": "gpt2", "n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 40, "n_positions": 16}
    model = jf.init({**hf, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, head="causal_lm", key=KEY)
    for i, (_, linear) in enumerate(jf.surgery.find_linears(model.layers, "**")):
        linear.bias.set_value(jax.random.normal(jax.random.key(i), linear.bias.get_value().shape))
    layers, _, _, student = grafted(model, QUICK)
    flat = paths.flatten(student.params)
    first, victims = paths.flatten(layers[0].params), [paths.flatten(layers[i].params) for i in (1, 2)]
    twice = paths.flatten(graft(student, victims[1], QUICK, KEY).params)
    assert "attention_norm.bias" in flat and not weights.is_typed(flat["attention_norm.bias"])
    bias = twice["mlp.up.bias"]
    bias = dataclasses.replace(bias, c=bias.c + 2.0, base=dataclasses.replace(bias.base, c=bias.base.c + 3.0))
    want = first["mlp.up.bias"] + 3 * victims[0]["mlp.up.bias"] + 2 * victims[1]["mlp.up.bias"]
    np.testing.assert_allclose(bias.dense(), want, rtol=1e-6)
    small = fuse_layers(model, IDS, QUICKEST, key=KEY).model
    kept = paths.flatten(jf.functional(small)[1])["layers.0.mlp.up.bias"]
    assert not any(jnp.array_equal(kept, paths.flatten(layer.params)["mlp.up.bias"]) for layer in layers)


def test_llava_loses_layers_of_its_decoder_alone(tmp_path):
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    text = json.loads(tiny(4).config.hf) | tiny(4).config.to_hf()
    hf = {"model_type": "llava", "vision_config": vision, "text_config": text, "image_token_index": 39}
    model = jf.init({**hf, "image_seq_length": 4}, head="causal_lm", key=KEY)
    found = fuse_layers(model, IDS % 39, QUICKEST, key=KEY, evaluation=IDS % 39)
    small = found.model
    assert len(small.text.layers) == small.config.text.num_hidden_layers == 3 and len(model.text.layers) == 4
    assert jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(small.vision), nnx.state(model.vision)))
    jf.save(small, tmp_path)
    batch = {"input_ids": np.array([[1, 39, 39, 39, 39, 2]]), "pixel_values": np.ones((1, 3, 8, 8), np.float32)}
    ours, theirs = (
        (lambda a, p: np.asarray(a(p, batch).logits))(*jf.functional(m)) for m in (small, jf.load(tmp_path))
    )
    np.testing.assert_array_equal(ours, theirs)


def test_a_bfloat16_model_stays_one():
    """Coefficients and moments are float32 on the way; the result has the model's dtype, rounded once."""
    model = jf.init(tiny(4).config, head="causal_lm", key=KEY, dtype="bfloat16")
    config = QUICKEST
    _, _, _, student = grafted(model, config)
    trained = paths.partition({"0": student.params}, fusegpt_group.FROZEN)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    small = fuse_layers(model, IDS, config, key=KEY).model
    assert {leaf.dtype for leaf in jax.tree.leaves(jf.functional(small)[1])} == {jnp.dtype("bfloat16")}


def test_an_interrupted_run_goes_on(model, fused, tmp_path, monkeypatch):
    whole, _ = fused
    real, calls = fusegpt.train_group, []

    def failing(*args):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(fusegpt, "train_group", failing)
    with pytest.raises(KeyboardInterrupt):
        fuse_layers(model, IDS, QUICK, key=KEY, work_directory=tmp_path)
    resumed = fuse_layers(model, IDS, QUICK, key=KEY, work_directory=tmp_path)
    assert len(calls) == 3 and resumed.rounds == whole.rounds
    ours, theirs = (jf.functional(m)[1] for m in (resumed.model, whole.model))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, ours, theirs))
    other = fuse_layers(model, IDS, dataclasses.replace(QUICK, rank=2, layers=1), key=KEY, work_directory=tmp_path)
    assert len(calls) == 4 and len(other.rounds) == 1  # another configuration starts anew


def test_options_that_change_the_order_and_the_memory(model):
    once = fuse_layers(model, IDS, dataclasses.replace(QUICK, iterative=False, epochs=1), key=KEY)
    ranking = np.argsort(macro_influence(model, IDS, batch_size=4), kind="stable")
    assert once.victims == tuple(ranking[:2])
    _, _, _, student = grafted(model, QUICK)
    donor = paths.flatten(depth.layers_of(model)[2].params)
    moved = jax.tree.map(lambda leaf: leaf + 0.01, student.params)
    folded = graft(student._replace(params=moved), donor, dataclasses.replace(QUICK, max_grafts=1), KEY)
    ours, theirs = (paths.flatten(p)["mlp.up.kernel"] for p in (folded.params, moved))
    assert fusegpt_group._grafts(ours) == 1 and not np.any(ours.c)
    np.testing.assert_allclose(ours.dense(), theirs.dense(), atol=1e-6)  # nothing learned is lost


def test_losses_by_hand():
    rng = np.random.default_rng(0)
    y, out = rng.normal(size=(2, 3, 4, 5))
    softmax = lambda a, axis: np.exp(a) / np.exp(a).sum(axis, keepdims=True)
    terms = lambda axis: softmax(y, axis) * np.log(softmax(y, axis) / softmax(out, axis))
    assert float(group_loss("feature", y, out)) == pytest.approx(terms(-1).sum() / 12, rel=1e-5)
    assert float(group_loss("batch", y, out)) == pytest.approx(terms(0).sum() / 3, rel=1e-5)
    assert float(group_loss("mse", y, out)) == pytest.approx(((y - out) ** 2).mean(), rel=1e-5)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 1.0, "layers": None}, "rate=1.0: must lie between 0 and 1"),
        ({"rate": 0.2, "layers": 1}, "rate, layers: give one"),
        ({"group_size": 3}, "group_size=3: must be even"),
        ({"group_size": 0}, "group_size=0: must be even"),
        ({"coefficient": "half"}, "coefficient='half': must be one of"),
        ({"loss": "kl"}, "loss='kl': must be one of"),
        ({"rank": 0}, "rank=0: must be 1 or more"),
        ({"influence_sequences": 6}, "influence_sequences=6: must be a multiple of batch_size=4"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: must be a number"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(QUICK, **changes)


@pytest.mark.parametrize(
    ("ids", "changes", "message"),
    [
        (IDS[:7], {}, "7 sequences are not a multiple of batch_size=4"),
        (IDS[:8], {}, "8 sequences, influence_sequences=16"),
        (np.zeros((16, 40), int), {}, "sequences of 40 tokens exceed the model's 32 positions"),
        (IDS + 20, {}, "vocabulary has 40"),
        (IDS * 1.0, {}, "expected integer token ids"),
        (IDS, {"layers": 3}, "layers=3: removing 3 of 4 layers leaves fewer than 2"),
        (IDS, {"layers": None, "rate": 0.6}, "rate=0.6: removing 3 of 4 layers leaves fewer than 2"),
    ],
)
def test_calibration_and_depth_that_do_not_fit(model, ids, changes, message):
    with pytest.raises(ValueError, match=message):
        fuse_layers(model, ids, dataclasses.replace(QUICK, **changes), key=KEY)


def test_models_that_cannot_be_fused(model):
    wide = jf.surgery.copy(model)
    for name, axis in (("up", 1), ("gate", 1), ("down", 0)):
        kernel = getattr(wide.layers[2].mlp, name).kernel
        kernel.set_value(jnp.concatenate([kernel.get_value()] * 2, axis))
    t5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 4, "num_heads": 2, "vocab_size": 40}
    bert = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
            "intermediate_size": 24, "vocab_size": 40}  # fmt: skip
    adapted = jf.weights.add_lora(model, rank=2, key=KEY)
    for other, message in (
        (wide, r"layers 1 and 2 differ in mlp\.\w+\.kernel: \(\d+, \d+\) and"),
        (adapted, "is a LowRank.*call merge_lora first"),
        (abstract(t5), "T5 is no decoder"),
        (abstract(bert), "Bert is no decoder"),
    ):
        with pytest.raises(ValueError, match=message):
            fuse_layers(other, IDS, QUICK, key=KEY)
    packed = jf.compress.gptq(tiny(4, hidden_size=32, intermediate_size=64), bits=4, method="rtn")
    with pytest.raises(ValueError, match="is a PackedWeight.*call compress.dequantize first"):
        fuse_layers(packed, IDS, QUICK, key=KEY)
    with pytest.raises(ValueError, match="not finite after training"):
        fuse_layers(model, IDS, dataclasses.replace(QUICK, coefficient_learning_rate=1e30), key=KEY)
    for numbers, message in (([0, 0], "different numbers"), ([4], "from 0 to 3"), ([0, 1, 2], "fewer than 2")):
        with pytest.raises(ValueError, match=message):
            remove_layers(model, numbers)
