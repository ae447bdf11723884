"""Vision-encoder-decoders against Hugging Face on tiny models: every array, cached steps, gradients, files, errors."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from parity import assert_close, run
from safetensors.numpy import load_file, save_file

import jaxformers as jf
from jaxformers import nn
from jaxformers.losses import cross_entropy
from jaxformers.models import trocr
from jaxformers.models import vision_encoder_decoder as ved
from jaxformers.safetensors_io import CheckpointError

KINDS = ("deit_bert", "vit_trocr")
TOLERANCE = 5e-5  # absolute, by the oracle's README


@pytest.fixture(scope="module", params=KINDS)
def folder(request, oracles):
    return oracles / "backbones" / "vision_encoder_decoder" / request.param


@pytest.fixture(scope="module")
def model(folder):
    return jf.load(folder)


@pytest.fixture(scope="module")
def expected(folder):
    with np.load(folder / "io.npz") as z:
        return dict(z)


@pytest.fixture(scope="module")
def batch(model, expected):
    c = model.config
    inputs = nn.shift_right(expected["in/labels"], c.start_id, c.pad_token_id)
    return {"pixel_values": expected["in/pixel_values"], "decoder_input_ids": np.asarray(inputs)}


@pytest.mark.parametrize("scan_layers", [False, True])
def test_every_array(scan_layers, model, expected, batch):
    apply, params = jf.functional(model, scan_layers=scan_layers)
    patterns = ("*.embeddings", "*.layers.*.output", "decoder.layers.*.{attention,cross_attention}.probs")
    out, seen = jax.jit(jf.reap(apply, patterns))(params, batch)
    found = {
        "logits": out.logits,
        "loss": cross_entropy(out.logits, expected["in/labels"]),
        "encoder_last_hidden_state": out.extra["encoder_last_hidden_state"],
    }
    for stack in ("encoder", "decoder"):
        found[f"{stack}_hidden_0"] = seen[f"{stack}.embeddings"]
        for i in range(2):
            found[f"{stack}_hidden_{i + 1}"] = seen[f"{stack}.layers.{i}.output"]
    for i in range(2):
        found[f"decoder_attention_{i}"] = seen[f"decoder.layers.{i}.attention.probs"]
        found[f"cross_attention_{i}"] = seen[f"decoder.layers.{i}.cross_attention.probs"]
    masked = {name: expected[f"in/{name}"] for name in ("decoder_input_ids", "decoder_attention_mask")}
    found["logits_with_mask"] = jax.jit(apply)(params, {**batch, **masked}).logits
    names = {name.removeprefix("out/") for name in expected if name.startswith("out/")}
    assert names - set(found) == {"greedy_ids", "beam_ids", "beam_scores"}
    for name in names & set(found):
        assert_close(found[name], expected[f"out/{name}"], 1e-5 if name == "loss" else TOLERANCE)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_cached_steps(scan_layers, model, expected, batch):
    """One token at a time, from keys of the memory made once: the greedy ids, and the logits of the whole pass."""
    apply, params = jf.functional(model, scan_layers=scan_layers)
    step = jax.jit(lambda params, ids, cache: apply(params, {"decoder_input_ids": ids, "cache": cache}))
    ids = expected["out/greedy_ids"]
    memory = model.encode(batch["pixel_values"])
    cache = model.empty_cache(3, 14, memory)
    if scan_layers:
        cache = dataclasses.replace(cache, layers={"*": jax.tree.map(lambda *a: np.stack(a), *cache.layers.values())})
    steps = []
    for i in range(11):
        out = step(params, ids[:, i : i + 1], cache)
        cache = out.cache
        steps.append(out.logits)
    steps = np.concatenate(steps, axis=1)
    ended = np.cumsum(ids == 2, axis=1)[:, :-1] > 0
    assert np.array_equal(steps.argmax(-1)[~ended], ids[:, 1:][~ended])
    whole = run(model, {"memory": memory, "decoder_input_ids": ids[:, :-1]})
    assert_close(steps, whole.logits, TOLERANCE)
    assert out.extra is whole.extra is None


def test_greedy_and_beam_ids(model, expected):
    pixels = expected["in/pixel_values"]
    greedy = jf.generate(model, pixel_values=pixels, max_new_tokens=11)
    assert [[1, *ids] for ids in greedy] == [_ended(row) for row in expected["out/greedy_ids"].tolist()]
    assert jf.generate(model, pixel_values=pixels[1], max_new_tokens=11) == greedy[1]
    settings = {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True, "return_scores": True}
    found, scores = jf.generate(model, pixel_values=pixels, max_new_tokens=11, **settings)
    found = [[1, *ids] for row in found for ids in row]
    assert found == [_ended(row) for row in expected["out/beam_ids"].tolist()]
    assert_close(np.ravel(scores), expected["out/beam_scores"], 1e-4)


def _ended(ids):
    """Without what follows the end token, 2."""
    return ids[: ids.index(2) + 1] if 2 in ids else ids


def test_gradients_reach_every_part(model, expected, batch):
    apply, params = jf.functional(model, remat="dots")
    grads = jax.jit(jax.grad(lambda p: cross_entropy(apply(p, batch).logits, expected["in/labels"])))(params)
    silent = {
        path
        for path, g in jf.paths.flatten(grads).items()
        if not np.abs(g).max() > 1e-7 and not path.endswith("attention.key.bias")  # softmax does not see those
    }
    assert silent == {"encoder.pooler.kernel", "encoder.pooler.bias"}  # nobody reads the pooler


def test_rewriting_what_the_decoder_sees(model, batch):
    apply, params = jf.functional(model)
    plain = run(model, batch).logits
    blind = jf.edit(apply, {"decoder.layers.*.cross_attention.context": lambda c: 0 * c})
    other = {**batch, "pixel_values": batch["pixel_values"] + 1}
    assert np.abs(run(model, other).logits - plain).max() > 1e-3
    assert_close(jax.jit(blind)(params, batch).logits, jax.jit(blind)(params, other).logits, 1e-6)


def test_round_trip(folder, model, tmp_path):
    jf.save(model, tmp_path / "copy")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "copy"))
    assert set(before) == set(after) and all(np.array_equal(before[k], after[k]) for k in before)
    assert jf.load(tmp_path / "copy").config == model.config
    hf = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert hf["architectures"] == ["VisionEncoderDecoderModel"]


def test_files_that_keep_more_or_less(folder, model, batch, tmp_path):
    """A tied matrix stored twice, no pooler, no class named; but nothing else may be missing or left over."""
    tensors = load_file(folder / "model.safetensors")
    tied = "cls.predictions.decoder" if "bert" in folder.name else "output_projection"
    tensors |= {f"decoder.{tied}.weight": np.zeros((7, 32), np.float32)}
    tensors = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    hf = json.loads((folder / "config.json").read_text())
    hf.pop("architectures")
    (tmp_path / "config.json").write_text(json.dumps(hf))
    save_file(tensors, tmp_path / "model.safetensors")
    again = jf.load(tmp_path)
    assert again.head_name == "seq2seq_lm" and again.encoder.pooler is None
    assert_close(run(again, batch).logits, run(model, batch).logits, 1e-6)
    with pytest.raises(ValueError, match="head: a vision-encoder-decoder has the head seq2seq_lm and no other"):
        jf.load(tmp_path, head="none")
    save_file({**tensors, "enc_to_dec_proj.weight": np.zeros((32, 32), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no place in this model: enc_to_dec_proj.weight"):
        jf.load(tmp_path)
    del tensors[next(name for name in tensors if "rossatt" in name or "encoder_attn" in name)]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensors missing: decoder\..*layer.*0\.(crossattention|encoder_attn)"):
        jf.load(tmp_path)


def test_parts_lie_on_a_mesh_as_everywhere(folder, model, batch):
    cut = jf.load(folder, mesh=jf.mesh("data=2,tensor=2"))
    kernel = cut.decoder.layers[1].cross_attention.value.kernel.get_value()
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "tensor")
    assert_close(run(cut, batch).logits, run(model, batch).logits, TOLERANCE)


def test_inputs_that_cannot_be(model, batch):
    with pytest.raises(ValueError, match="pixel_values, memory, cache: give exactly one of the three"):
        model(decoder_input_ids=batch["decoder_input_ids"])
    with pytest.raises(ValueError, match="memory: encodes 3 sequences, the cache is for 2"):
        model.empty_cache(2, 4, model.encode(batch["pixel_values"]))
    too_long = {**batch, "decoder_input_ids": np.full((3, 65), 5)}
    with pytest.raises(ValueError, match="length 65 exceeds this model's 64 positions"):
        model(**too_long)


def test_settings_that_cannot_be():
    decoder = {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}
    image = {"model_type": "vit", "hidden_size": 24, "num_attention_heads": 2}
    for changed, message in (
        ({"decoder": {"model_type": "bert"}}, "decoder: expected a decoder with cross-attention"),
        ({"decoder": {"model_type": "llama"}}, "decoder: expected a decoder with cross-attention"),
        ({"decoder": {**decoder, "is_decoder": False}}, "add_cross_attention is for decoders"),
        ({"decoder": {**decoder, "cross_attention_hidden_size": 24}}, "only the hidden_size, 768"),
        ({"decoder": {"model_type": "trocr", "cross_attention_hidden_size": 9}}, "must be the encoder's .*, 24"),
        ({"decoder": {"model_type": "trocr", "decoder_layerdrop": 0.1}}, "decoder_layerdrop 0.1 is not supported"),
        ({"encoder": {"model_type": "bert"}}, "encoder: expected an encoder of images"),
        ({"encoder": {"model_type": "clip"}}, "encoder: expected an encoder of images"),
        ({"encoder": 3}, "encoder must hold the settings of a model"),
    ):
        with pytest.raises(ValueError, match=message):
            ved.Config.from_hf({"encoder": image, "decoder": decoder} | changed)
    config = ved.Config.from_hf({"encoder": image, "decoder": decoder})
    assert config.projects and not dataclasses.replace(config, encoder=ved.Config().encoder).projects
    with pytest.raises(ValueError, match="decoder_start_token_id missing"):
        _ = config.start_id
    assert ved.Config.from_hf({"decoder": {**decoder, "bos_token_id": 4}}).start_id == 4
    assert ved.Config.from_hf({"decoder": decoder, "decoder_start_token_id": 7}).start_id == 7


def test_sines_skip_padding():
    table = np.asarray(trocr.sinusoids(np.array([[1, 2, 3]]), 6, pad=1))
    half = np.arange(3) / 2
    angles = np.array([2, 3])[:, None] / 10000.0**half
    np.testing.assert_allclose(table[0, 1:], np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=1e-6)
    assert not table[0, 0].any()
