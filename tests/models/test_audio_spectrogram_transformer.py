"""AST against Hugging Face on a tiny model, from the waveform to the logits; other lengths."""

import json

import jax
import numpy as np
import pytest
from parity import assert_close, assert_close_scaled, run
from safetensors.numpy import load_file

import jaxformers as jf
from jaxformers.models import audio_spectrogram_transformer as ast


@pytest.fixture
def folder(oracles):
    return oracles / "backbones" / "audio-spectrogram-transformer"


def read(folder):
    with np.load(folder / "io.npz") as z:
        return {name: z[name] for name in z.files}


@pytest.mark.parametrize("scan_layers", [False, True])
def test_every_layer(folder, scan_layers):
    model, expected = jf.load(folder), read(folder)
    apply, params = jf.functional(model, scan_layers=scan_layers)
    patterns = ("embeddings", "layers.*.output", "layers.*.attention.probs")
    out, seen = jax.jit(jf.reap(apply, patterns))(params, {"input_values": expected["input_values"]})
    assert_close(seen["embeddings"], expected["hidden_states/0"], 1e-5)
    for i in range(3):
        assert_close(seen[f"layers.{i}.output"], expected[f"hidden_states/{i + 1}"], 1e-5)
        assert_close(seen[f"layers.{i}.attention.probs"], expected[f"attentions/{i}"], 1e-5)
    assert_close(out.last_hidden_state, expected["last_hidden_state_after_layernorm"], 1e-5)
    assert_close(out.pooled, expected["pooler_output"], 1e-5)
    assert_close(out.logits, expected["logits"], 1e-5)


def test_from_the_waveform(folder):
    model, expected = jf.load(folder), read(folder)
    batch = jf.load_feature_extractor(model.source)([expected["wave/0"], expected["wave/1"]], sampling_rate=16000)
    assert_close_scaled(run(model, batch).logits, expected["logits"], 2e-5)


def test_save_and_load(folder, tmp_path):
    model = jf.load(folder)
    jf.save(model, tmp_path / "copy")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "copy"))
    assert set(before) == set(after)
    assert all(np.array_equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    assert jf.load_feature_extractor(tmp_path / "copy") == jf.load_feature_extractor(folder)
    body = jf.load(folder, head="none")
    assert body.head is None and run(body, {"input_values": read(folder)["input_values"]}).logits is None


def test_dropout_needs_a_key(folder):
    model = jf.load(folder, hidden_dropout_prob=0.5)
    apply, params = jf.functional(model)
    batch = {"input_values": read(folder)["input_values"]}
    step = jax.jit(lambda key: apply(params, batch, rngs=key).logits)
    one, other = step(jax.random.key(0)), step(jax.random.key(1))
    assert np.array_equal(one, step(jax.random.key(0))) and np.abs(one - other).max() > 0.01


@pytest.mark.parametrize("shape", [(2, 64, 16), (2, 63, 32), (64, 32), (2, 1, 64, 32)])
def test_wrong_spectrograms_are_refused(folder, shape):
    apply, params = jf.functional(jf.load(folder))
    with pytest.raises(ValueError, match=r"input_values: expected \(batch, 64, 32\), got "):
        apply(params, {"input_values": np.zeros(shape, np.float32)})


def test_another_length(folder, tmp_path):
    model, frames = jf.load(folder), read(folder)["input_values"]
    table = np.asarray(model.embeddings.position.embedding.get_value())  # 2 special rows, then 2 × 5 patches
    short = ast.with_length(model, 40)
    found = np.asarray(short.embeddings.position.embedding.get_value())
    assert short.config.grid == (2, 3) and model.config.grid == (2, 5)
    expected = np.concatenate([table[:2], table[3:6], table[8:11]])  # the middle three columns of five
    assert np.array_equal(found, expected)
    assert run(short, {"input_values": frames[:, :40]}).logits.shape == (2, 6)
    longer = ast.with_length(model, 106)
    stretched = np.asarray(longer.embeddings.position.embedding.get_value())[2:].reshape(2, 10, -1)
    at = np.clip((np.arange(10) + 0.5) * 5 / 10 - 0.5, 0, 4)
    for row in range(2):
        by_hand = np.stack([np.interp(at, np.arange(5), column) for column in table[2:].reshape(2, 5, -1)[row].T], -1)
        assert_close(stretched[row], by_hand.astype(np.float32), 1e-5)
    assert not np.any(ast.with_length(model, 40, positions="zero").embeddings.position.embedding.get_value())
    jf.save(longer, tmp_path / "long")
    assert jf.load(tmp_path / "long").config.max_length == 106
    with pytest.raises(ValueError, match="hold no patch of 16 × 16"):
        ast.with_length(model, 15)
    with pytest.raises(ValueError, match="positions: expected 'fit' or 'zero'"):
        ast.with_length(model, 40, positions="crop")
