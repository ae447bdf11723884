"""A fused checkpoint is an ordinary one: Hugging Face loads it and says the same."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxformers as jf
from jaxformers.compress import FuseConfig, fuse_layers, remove_layers
from jaxformers.models import llama, qwen2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
IDS = np.random.default_rng(0).integers(0, 40, (8, 12))


def same_in_hugging_face(model, folder):
    jf.save(model, folder)
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(IDS)).logits.numpy()
    apply, params = jf.functional(model)
    np.testing.assert_allclose(apply(params, {"input_ids": IDS}).logits, expected, atol=2e-5 * np.abs(expected).max())


def test_a_fused_llama(tmp_path):
    config = llama.Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=28, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    how = FuseConfig(
        layers=1, rate=None, group_size=2, rank=2, lora_rank=2, epochs=2, batch_size=4, influence_sequences=8
    )
    model = jf.init(config, head="causal_lm", key=jax.random.key(0))
    small = fuse_layers(model, IDS, how, key=jax.random.key(0)).model
    assert small.config == dataclasses.replace(config, num_hidden_layers=3)
    same_in_hugging_face(small, tmp_path)


def test_windows_of_the_layers_that_stay(tmp_path):
    """A Qwen2 whose second and fourth layer see three tokens, without its first two layers."""
    types = ("full_attention", "sliding_attention") * 2
    config = qwen2.Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=28, max_position_embeddings=32, initializer_range=0.2, use_sliding_window=True,
        sliding_window=3, max_window_layers=2, layer_types=types,
    )  # fmt: skip
    small = remove_layers(jf.init(config, head="causal_lm", key=jax.random.key(0)), [0, 2])
    assert small.config.layer_types == ("sliding_attention",) * 2
    same_in_hugging_face(small, tmp_path)
