"""Adapters and PEFT files on a small random llama."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers as jf
from jaxformers import nn, paths
from jaxformers.models import gpt2, llama
from jaxformers.safetensors_io import CheckpointError
from jaxformers.weights import peft

IDS = np.arange(20).reshape(2, 10)


@pytest.fixture(scope="module")
def model():
    config = llama.Config(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=32,
    )  # fmt: skip
    return jf.init(config, head="causal_lm", key=jax.random.key(0))


def logits(model):
    apply, params = jf.functional(model)
    return apply(params, {"input_ids": IDS}).logits


def moved(model, pattern):
    """The model with the arrays at ``pattern`` shifted, so that an update is not the zero it starts as."""
    _, params = jf.functional(model)
    shifted = jax.tree.map(lambda a, hit: a + 0.02 if hit else a, params, paths.mask(params, pattern))
    return jf.with_params(model, shifted)


def test_an_adapter_starts_as_nothing_and_survives_saving(model, tmp_path):
    adapted = nn.add_adapters(model, size=4, key=jax.random.key(1))
    np.testing.assert_array_equal(logits(adapted), logits(model))
    trained = moved(adapted, "**.adapter.**")
    assert np.abs(logits(trained) - logits(model)).max() > 1e-3
    jf.save(trained, tmp_path / "adapted")
    np.testing.assert_array_equal(logits(jf.load(tmp_path / "adapted")), logits(trained))
    names = set(json.loads((tmp_path / "adapted" / "config.json").read_text())["jaxformers"]["surgery"][0])
    assert names == {"function", "arguments"}


def test_an_adapter_computes_the_published_form(model):
    adapted = moved(nn.add_adapters(model, "layers.0.mlp.down", size=4, key=jax.random.key(1)), "**.adapter.**")
    apply, params = jf.functional(adapted)
    _, seen = jf.reap(apply, ["layers.0.mlp.down.{input,output}"])(params, {"input_ids": IDS})
    down = params["layers"]["0"]["mlp"]["down"]
    y = seen["layers.0.mlp.down.input"] @ down["kernel"]
    a = down["adapter"]
    hidden = jax.nn.gelu(y @ a["down"]["kernel"] + a["down"]["bias"], approximate=False)
    expected = y + hidden @ a["up"]["kernel"] + a["up"]["bias"]
    np.testing.assert_allclose(seen["layers.0.mlp.down.output"], expected, atol=1e-6)


def test_adapter_errors(model):
    with pytest.raises(ValueError, match="size"):
        nn.add_adapters(model, size=0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="no linear layer matches"):
        nn.add_adapters(model, "layers.9.mlp.down", key=jax.random.key(0))
    once = nn.add_adapters(model, size=2, key=jax.random.key(0))
    with pytest.raises(ValueError, match="already"):
        nn.add_adapters(once, size=2, key=jax.random.key(0))


def test_lora_through_peft_files(model, tmp_path):
    updated = moved(jf.weights.add_lora(model, rank=2, alpha=8, key=jax.random.key(0)), "**.kernel.b")
    assert np.abs(logits(updated) - logits(model)).max() > 1e-4
    peft.save_adapter(updated, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 8.0)
    assert "model.layers.1.self_attn.v_proj" in config["target_modules"]
    np.testing.assert_array_equal(logits(peft.load_adapter(model, tmp_path / "lora")), logits(updated))


def test_peft_refuses_what_it_cannot_say(model, tmp_path):
    with pytest.raises(ValueError, match="found none"):
        peft.save_adapter(model, tmp_path / "none")
    fused = jf.init(gpt2.Config(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                max_position_embeddings=16), head="causal_lm", key=jax.random.key(0))  # fmt: skip
    with pytest.raises(ValueError, match="no layer of its own"):
        peft.save_adapter(jf.weights.add_lora(fused, rank=2, key=jax.random.key(0)), tmp_path / "fused")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "biases"),
        ({"r": 0}, "r=0"),
        ({"r": 3}, "expected shape"),
    ],
)
def test_peft_files_that_are_something_else(model, tmp_path, change, message):
    peft.save_adapter(jf.weights.add_lora(model, rank=2, key=jax.random.key(0)), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        peft.load_adapter(model, tmp_path)


def test_peft_layers_that_the_model_lacks(model, tmp_path):
    peft.save_adapter(jf.weights.add_lora(model, rank=2, key=jax.random.key(0)), tmp_path)
    shallow = jf.init(model.config.__class__(**{**vars(model.config), "num_hidden_layers": 1}), head="causal_lm",
                      key=jax.random.key(0))  # fmt: skip
    with pytest.raises(CheckpointError, match=r"no layer model\.layers\.1"):
        peft.load_adapter(shallow, tmp_path)


def test_adapters_run_in_bfloat16(model):
    half = jf.init(model.config, head="causal_lm", key=jax.random.key(0), dtype=jnp.bfloat16)
    assert logits(nn.add_adapters(half, size=4, key=jax.random.key(1))).dtype == jnp.bfloat16
