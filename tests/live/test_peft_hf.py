"""LoRA files against the PEFT library itself."""

import jax
import numpy as np
import pytest

import jaxformers as jf
from jaxformers import paths
from jaxformers.weights import peft as ours

torch = pytest.importorskip("torch", reason="live comparison: needs torch")
transformers = pytest.importorskip("transformers", reason="live comparison: needs transformers")
peft = pytest.importorskip("peft", reason="live comparison: needs peft")


def test_lora_both_ways(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    ids = np.arange(20).reshape(2, 10)
    model = jf.load(tmp_path / "base")
    updated = jf.weights.add_lora(model, "layers.*.{attention,mlp}.*", rank=2, alpha=8, key=jax.random.key(0))
    apply, params = jf.functional(updated)
    params = jax.tree.map(lambda a, hit: a + 0.02 if hit else a, params, paths.mask(params, "**.kernel.b"))
    ours.save_adapter(jf.with_params(updated, params), tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora"
    ).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(apply(params, {"input_ids": ids}).logits, expected, atol=2e-5)
    theirs.save_pretrained(tmp_path / "back")
    apply, params = jf.functional(ours.load_adapter(model, tmp_path / "back"))
    np.testing.assert_allclose(apply(params, {"input_ids": ids}).logits, expected, atol=2e-5)
