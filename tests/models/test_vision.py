"""ViT and its descendants against Hugging Face on tiny models: every layer, head and loss; masks; other image sizes."""

import json

import jax
import numpy as np
import pytest
from parity import assert_close, assert_close_scaled, read, run
from safetensors.numpy import load_file

import jaxformers as jf

FLAT = ("vit", "deit", "dinov2")
LOGITS = 2e-5  # relative to the output's scale


def load(oracles, folder):
    folder = oracles / "backbones" / folder
    arrays = {name.removeprefix("in/").removeprefix("out/"): value for name, value in read(folder).items()}
    return jf.load(folder), arrays


def layers(model, batch):
    """(Output, the embeddings and each block's output, each block's attention) of a model without stages."""
    apply, params = jf.functional(model)
    out, seen = jax.jit(jf.reap(apply, ("embeddings", "layers.*.output", "layers.*.attention.probs")))(params, batch)
    depth = model.config.num_hidden_layers
    hidden = [seen["embeddings"], *(seen[f"layers.{i}.output"] for i in range(depth))]
    return out, hidden, [seen[f"layers.{i}.attention.probs"] for i in range(depth)]


def assert_same_tensors(folder, copy):
    before, after = load_file(folder / "model.safetensors"), load_file(copy / "model.safetensors")
    before = {name: tensor for name, tensor in before.items() if not name.endswith("num_batches_tracked")}
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


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("older", [False, True], ids=["as written", "older layout"])
def test_save_and_load(name, older, oracles, tmp_path):
    source = oracles / "backbones" / name
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    config = json.loads((source / "config.json").read_text())
    if older:  # sizes as pairs, torch_dtype, and none of the keys that version 5 added
        size, patch = config["image_size"], config["patch_size"]
        config |= {"image_size": [size, size], "patch_size": [patch, patch], "torch_dtype": config.pop("dtype")}
        for key in ("pooler_act", "pooler_output_size", "use_mask_token", "transformers_version"):
            config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    model, expected = jf.load(folder), read(source)
    jf.save(model, tmp_path / "copy")
    assert_same_tensors(source, tmp_path / "copy")
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    unchanged = set(config) - {"torch_dtype", "dtype"}
    assert {key: written[key] for key in unchanged} == {key: config[key] for key in unchanged}
    again = run(jf.load(tmp_path / "copy"), {"pixel_values": expected["pixel_values"]})
    assert np.array_equal(again.logits, run(model, {"pixel_values": expected["pixel_values"]}).logits)
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


@pytest.mark.parametrize("name", FLAT)
def test_scanned_layers_give_the_same(name, oracles):
    model, expected = load(oracles, name)
    apply, params = jf.functional(model, scan_layers=True)
    patterns = ("layers.*.output", "layers.*.attention.probs")
    out, seen = jax.jit(jf.reap(apply, patterns))(params, {"pixel_values": expected["pixel_values"]})
    assert_close(seen["layers.1.output"], expected["hidden_states/2"], 1e-5)
    assert_close(seen["layers.1.attention.probs"], expected["attentions/1"], 1e-5)
    assert_close_scaled(out.logits, expected["logits"], LOGITS)


@pytest.mark.parametrize("name", FLAT)
def test_wrong_pixels_are_refused(name, oracles):
    apply, params = jf.functional(jf.load(oracles / "backbones" / name))
    for shape in ((3, 32, 32), (2, 32, 32, 3), (2, 1, 32, 32)):
        with pytest.raises(ValueError, match=r"pixel_values: expected \(batch, 3, height, width\)"):
            apply(params, {"pixel_values": np.zeros(shape, np.float32)})
