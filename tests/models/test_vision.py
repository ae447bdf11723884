"""ViT and its descendants against Hugging Face on tiny models: every layer, head and loss; masks; other image sizes."""

import json
import re

import jax
import numpy as np
import pytest
from parity import assert_close, assert_close_scaled, grads_by_hf_name, run
from safetensors.numpy import load_file, save_file

import jaxformers as jf
from jaxformers import image_losses
from jaxformers.losses import cross_entropy

FLAT = ("vit", "deit", "dinov2")
FOLDERS = (*FLAT, "beit/tiny_cls", "beit/tiny_mim", "swin", "vit_mae/tiny")
LOGITS = 2e-5  # relative to the output's scale


def arrays(folder):
    """An oracle's arrays, whether or not their names say which is input and which output."""
    with np.load(next(folder.glob("*.npz"))) as z:
        return {re.sub("^(in/|out/)", "", name).replace("grad/", "grad."): z[name] for name in z.files}


def load(oracles, folder):
    folder = oracles / "backbones" / folder
    return jf.load(folder), arrays(folder)


def layers(model, batch):
    """(Output, the embeddings and each block's output, each block's attention) of a model without stages."""
    apply, params = jf.functional(model)
    out, seen = jax.jit(jf.reap(apply, ("embeddings", "layers.*.output", "layers.*.attention.probs")))(params, batch)
    depth = model.config.num_hidden_layers
    hidden = [seen["embeddings"], *(seen[f"layers.{i}.output"] for i in range(depth))]
    return out, hidden, [seen[f"layers.{i}.attention.probs"] for i in range(depth)]


def assert_same_tensors(folder, copy, renamed=()):
    """The same names, but for parts of names that are ``renamed``, dtypes and bits; buffers are left out."""
    before, after = load_file(folder / "model.safetensors"), load_file(copy / "model.safetensors")
    buffers = ("num_batches_tracked", "relative_position_index")
    before = {name: tensor for name, tensor in before.items() if not name.endswith(buffers)}
    for old, new in dict(renamed).items():
        before = {name.replace(old, new): tensor for name, tensor in before.items()}
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and np.array_equal(tensor, after[name]), name


@pytest.mark.parametrize("name", FLAT)
def test_every_layer_and_output(name, oracles):
    model, expected = load(oracles, name)
    out, hidden, attentions = layers(model, {"pixel_values": expected["pixel_values"]})
    for i, value in enumerate(hidden):
        assert_close(value, expected[f"hidden_states/{i}"], 1e-5)
    for i, value in enumerate(attentions):
        assert_close(value, expected[f"attentions/{i}"], 1e-5)
    assert f"attentions/{len(attentions)}" not in expected
    assert_close(out.last_hidden_state, expected["last_hidden_state_after_layernorm"], 1e-5)
    assert_close_scaled(out.logits, expected["logits"], LOGITS)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("older", [False, True], ids=["as written", "older layout"])
def test_save_and_load(name, older, oracles, tmp_path):
    source = oracles / "backbones" / name
    folder = tmp_path / "source"
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    if name == "vit_mae/tiny":  # as the hub has it; transformers 5.23 writes another name, which is read too
        tensors = {key.replace("decoder_encoder.layer", "decoder_layers"): value for key, value in tensors.items()}
    config = json.loads((source / "config.json").read_text())
    if older:  # sizes as pairs, torch_dtype, none of the keys that version 5 added, and buffers that it left out
        size, patch = config["image_size"], config["patch_size"]
        config |= {"image_size": [size, size], "patch_size": [patch, patch], "torch_dtype": config.pop("dtype")}
        for key in ("pooler_act", "pooler_output_size", "use_mask_token", "transformers_version"):
            config.pop(key, None)
        config |= {"use_mask_token": True} if name == "beit/tiny_mim" else {}
        for key in [key for key in tensors if key.endswith("relative_position_bias_table")]:
            tensors[key.replace("bias_table", "index")] = np.zeros((16, 16), np.int64)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    model, expected = jf.load(folder), arrays(source)
    jf.save(model, tmp_path / "copy")
    assert_same_tensors(folder, tmp_path / "copy")
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    unchanged = set(config) - {"torch_dtype", "dtype"}
    assert {key: written[key] for key in unchanged} == {key: config[key] for key in unchanged}
    inputs = ("pixel_values",) if name == "dinov2" else ("pixel_values", "noise", "bool_masked_pos")
    batch = {key: expected[key] for key in inputs if key in expected}
    again = run(jf.load(tmp_path / "copy"), batch)
    assert np.array_equal(again.logits, run(model, batch).logits)
    assert_close_scaled(again.logits, expected["logits"], LOGITS)


def test_both_classifiers_of_deit(oracles):
    model, expected = load(oracles, "deit")
    out = run(model, {"pixel_values": expected["pixel_values"]})
    for part in ("cls_logits", "distillation_logits"):
        assert_close_scaled(out.extra[part], expected[part], LOGITS)
    assert_close_scaled(expected["single_head_logits"], expected["cls_logits"], LOGITS)


def test_masked_patches_of_dinov2(oracles):
    model, expected = load(oracles, "dinov2")
    out = run(model, {name: expected[name] for name in ("pixel_values", "bool_masked_pos")})
    assert_close(out.last_hidden_state, expected["masked_last_hidden_state"], 1e-5)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_scanned_layers_give_the_same(name, training, oracles):
    """Also where the layers differ: in the rate of their stochastic depth, and in how their windows are shifted."""
    deep = {} if name in ("vit", "deit", "vit_mae/tiny") else {"drop_path_rate": 0.5}
    model = jf.load(oracles / "backbones" / name, hidden_dropout_prob=0.1, **deep)
    expected = arrays(oracles / "backbones" / name)
    inputs = ("pixel_values",) if name == "dinov2" else ("pixel_values", "noise", "bool_masked_pos")
    batch = {key: expected[key] for key in inputs if key in expected}
    found = []
    for scan_layers in (False, True):
        apply, params = jf.functional(model, scan_layers=scan_layers)
        reaped = jf.reap(apply, ("**layers.1.output", "**layers.1.attention.probs"))
        found.append(jax.jit(reaped)(params, batch, rngs=jax.random.key(3) if training else None))
    (out, seen), (scanned, scanned_seen) = found
    assert seen.keys() == scanned_seen.keys() and len(seen) >= 2
    for site, value in seen.items():
        assert_close_scaled(scanned_seen[site], value, 2e-6)
    assert_close_scaled(scanned.logits, out.logits, 2e-6)
    assert (np.abs(np.asarray(out.logits) - expected["logits"]).max() > 0.1) == training
    again = jf.with_params(model, params)  # taken apart again: layers have their own numbers
    assert_close_scaled(run(again, batch).logits, run(model, batch).logits, 1e-6)


@pytest.mark.parametrize("name", FLAT)
def test_wrong_pixels_are_refused(name, oracles):
    apply, params = jf.functional(jf.load(oracles / "backbones" / name))
    for shape in ((3, 32, 32), (2, 32, 32, 3), (2, 1, 32, 32)):
        with pytest.raises(ValueError, match=r"pixel_values: expected \(batch, 3, height, width\)"):
            apply(params, {"pixel_values": np.zeros(shape, np.float32)})


@pytest.mark.parametrize("case", ["tiny_cls", "tiny_mim"])
def test_beit(case, oracles):
    model, expected = load(oracles, f"beit/{case}")
    batch = {name: expected[name] for name in ("pixel_values", "bool_masked_pos") if name in expected}
    out, hidden, attentions = layers(model, batch)
    for i, value in enumerate(hidden):
        assert_close(value, expected[f"hidden_{i}"], 2e-5)
    for i, value in enumerate(attentions):
        assert_close(value, expected[f"attention_{i}"], 2e-5)
    assert_close_scaled(out.logits, expected["logits"], LOGITS)
    logits = out.logits[batch["bool_masked_pos"]] if case == "tiny_mim" else out.logits
    assert_close(cross_entropy(logits, expected["labels"]), expected["loss"], 1e-5)


def stages(model, batch):
    """(Output, {site: value}) of a hierarchical model: embeddings, stages' outputs, attentions."""
    apply, params = jf.functional(model)
    patterns = ("**embeddings", "stages.*.output", "stages.*.layers.*.attention.probs")
    return jax.jit(jf.reap(apply, patterns))(params, batch)


def test_swin(oracles):
    model, expected = load(oracles, "swin")
    out, seen = stages(model, {"pixel_values": expected["pixel_values"]})
    assert_close(seen["embeddings"], expected["hidden_states/0"], 1e-5)
    for i in (0, 1):
        assert_close(seen[f"stages.{i}.output"], expected[f"hidden_states/{i + 1}"], 1e-5)
    # Hugging Face lists the attention of each stage's last layer
    for i in (0, 1):
        assert_close(seen[f"stages.{i}.layers.1.attention.probs"], expected[f"attentions/{i}"], 1e-5)
    assert_close(out.last_hidden_state, expected["last_hidden_state_after_layernorm"], 1e-5)
    assert_close(out.pooled, expected["pooler_output"], 1e-5)
    assert_close_scaled(out.logits, expected["logits"], LOGITS)
    reshaped = np.moveaxis(expected["reshaped_hidden_states/2"], 1, -1)
    assert_close(seen["stages.1.output"], reshaped.reshape(2, 64, -1), 1e-5)


def test_segformer(shared):
    folder = shared / "oracles" / "backbones" / "segformer" / "b0like_64"
    model, expected = jf.load(folder), arrays(folder)
    out, seen = stages(model, {"pixel_values": expected["pixel_values"]})
    depths, flat = model.config.depths, iter(range(9))
    for i, depth in enumerate(depths):
        assert_close(seen[f"stages.{i}.embeddings"], expected[f"patch_embed_{i}"], 3e-5)
        assert_close(np.moveaxis(seen[f"stages.{i}.output"], -1, 1), expected[f"hidden_{i}"], 3e-5)
        for layer in range(depth):
            assert_close(seen[f"stages.{i}.layers.{layer}.attention.probs"], expected[f"attn_{next(flat)}"], 3e-5)
    assert_close_scaled(out.logits, expected["logits"], LOGITS)

    apply, params = jf.functional(model)

    def loss(params):
        out = apply(params, {"pixel_values": expected["pixel_values"]})
        return image_losses.segmentation(out.logits, expected["labels"])

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert_close(value, expected["loss"], 1e-5)
    found = grads_by_hf_name(model, grads)
    for leaf in ("weight", "bias"):
        name = f"decode_head.linear_projections.0.proj.{leaf}"
        assert_close_scaled(found[name.replace("linear_projections", "linear_c")], expected[f"grad.{name}"], 1e-4)
    assert not np.any(found["decode_head.batch_norm.running_mean"])


def test_mae(oracles):
    model, expected = load(oracles, "vit_mae/tiny")
    apply, params = jf.functional(model)
    batch = {name: expected[name] for name in ("pixel_values", "noise")}
    patterns = ("layers.0.input", "layers.*.output", "layers.*.attention.probs")
    out, seen = jax.jit(jf.reap(apply, patterns))(params, batch)
    assert_close(seen["layers.0.input"], expected["hidden_0"], 2e-5)
    for i in (0, 1):
        assert_close(seen[f"layers.{i}.output"], expected[f"hidden_{i + 1}"], 2e-5)
        assert_close(seen[f"layers.{i}.attention.probs"], expected[f"attention_{i}"], 2e-5)
    assert_close(out.last_hidden_state, expected["encoder_last"], 2e-5)
    assert_close_scaled(out.logits, expected["logits"], LOGITS)
    assert np.array_equal(out.extra["mask"], expected["mask"])
    assert np.array_equal(out.extra["ids_restore"], expected["ids_restore"])
    assert np.array_equal(image_losses.patchify(batch["pixel_values"], (8, 8)), expected["patchified"])

    def loss(params):
        out = apply(params, batch)
        return image_losses.masked_patches(out.logits, batch["pixel_values"], out.extra["mask"], patch=(8, 8))

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert_close(value, expected["loss"], 1e-5)
    found = grads_by_hf_name(model, grads)
    names = [name for name in expected if name.startswith("grad.")]
    assert len(names) == 5
    for name in names:
        assert_close_scaled(found[name.removeprefix("grad.")], expected[name], 1e-4)
    assert not np.any(found["vit.embeddings.position_embeddings"])
    assert not np.any(found["decoder.decoder_pos_embed"])
