"""Heads and settings that change the computation, against tiny models frozen by tests/live/freeze.py."""

import numpy as np
import pytest
from parity import assert_close_scaled, batch_of, read, run

import jaxformers as jf
from jaxformers.models.distilbert import sinusoids

NAMES = (
    "bert-base", "bert-decoder", "bert-mlm-untied", "bert-spans", "bert-tokens", "bigcode-mha", "bigcode-mqa",
    "bigcode-sequence", "bigcode-tokens", "camembert-mlm", "deberta-new-mlm", "deberta-sequence", "deberta-spans",
    "deberta-tokens", "deberta-unshared", "deberta-v2-conv", "deberta-v3-mlm", "deepseek-direct", "deepseek-sequence",
    "deepseek-tokens", "distilbert-mlm", "distilbert-mlm-untied", "distilbert-spans", "distilbert-tokens",
    "electra-mlm-untied", "electra-sequence", "electra-spans", "electra-tokens", "esm-absolute", "esm-sequence",
    "esm-tokens", "glm-sequence", "glm-tied", "gpt2-inverse", "gpt2-sequence", "gpt2-tokens", "gpt2-unscaled",
    "gptj-sequence", "llama-biased", "llama-sequence", "llama-tokens", "llama-yarn", "mistral-open",
    "mistral-sequence", "mpnet-mlm", "mpnet-sequence", "mpnet-spans", "mpnet-tokens", "mt5", "mt5-encoder",
    "neo-sequence", "neo-tokens", "neo-wide", "neox-linear", "neox-sequence", "neox-serial", "neox-tokens",
    "opt-bare", "opt-postnorm", "opt-sequence", "qwen2-sliding", "qwen2-tokens", "roberta-base", "roberta-decoder",
    "roberta-mlm-untied", "roberta-spans", "roberta-tokens", "t5-body", "t5-encoder", "t5-sequence", "t5-spans",
    "t5-tokens",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_equals_hugging_face_and_survives_a_round_trip(name, oracles, tmp_path):
    folder = oracles / "variants" / name
    model, expected = jf.load(folder), read(folder)
    out = run(model, batch_of(expected))
    real = expected.get("decoder_attention_mask", expected["attention_mask"]) == 1
    assert_close_scaled(out.last_hidden_state, expected["hidden"], 2e-5, real)
    for found, part in ((out.logits, "logits"), (out.pooled, "pooled")):
        if part in expected:
            assert_close_scaled(found, expected[part], 2e-5, real if expected[part].ndim == 3 else None)

    jf.save(model, tmp_path / "copy")
    before, after = tensors(folder), tensors(tmp_path / "copy")
    for extra in ("cls.predictions.bias", "lm_head.bias"):  # untied heads carry a second bias that nothing reads
        if extra.replace("bias", "decoder.bias") in before:
            before.pop(extra)
    before = {renamed(name): tensor for name, tensor in before.items() if not name.endswith("inv_freq")}
    assert set(before) == set(after)
    assert all(np.array_equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)


def renamed(name):
    """What Hugging Face writes in more than one way, in the older one."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    name = name.replace("lm_predictions.lm_head.bias", "cls.predictions.bias")
    return name.replace("lm_predictions.lm_head", "cls.predictions.transform")


def tensors(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def test_layers_with_scales_of_their_own_are_not_stacked(oracles):
    model = jf.load(oracles / "variants" / "gpt2-inverse")
    with pytest.raises(ValueError, match="layer 1 differs from layer 0"):
        jf.functional(model, scan_layers=True)


def test_untied_head_whose_bias_has_its_old_name(oracles, tmp_path):
    from safetensors.numpy import save_file

    folder = oracles / "variants" / "bert-mlm-untied"
    found = tensors(folder)
    found["cls.predictions.bias"] = found.pop("cls.predictions.decoder.bias")
    save_file(found, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    expected = read(folder)
    assert_close_scaled(run(jf.load(tmp_path), batch_of(expected)).logits, expected["logits"], 2e-5)


def test_sinusoidal_start_of_distilbert():
    import jax

    from jaxformers.models import distilbert

    config = distilbert.Config(
        vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=5, sinusoidal=True,
    )  # fmt: skip
    model = jf.init(config, key=jax.random.key(0))
    table = np.asarray(model.embeddings.position.embedding.get_value())
    expected = np.zeros((5, 8))
    for position in range(5):
        for i in range(4):
            angle = position / 10000 ** (2 * i / 8)
            expected[position, 2 * i : 2 * i + 2] = np.sin(angle), np.cos(angle)
    assert np.abs(table - expected).max() < 1e-6
    assert sinusoids(3, 4).dtype == "float32"
