"""Hugging Face loads what a config can say of a pruned model, and gives the same logits."""

import jax
import numpy as np
import pytest
import tiny
from test_compaction import half

import jaxformers as jf

torch = pytest.importorskip("torch", reason="live comparison: pip install 'jaxformers[oracle]'")
transformers = pytest.importorskip("transformers", reason="live comparison: pip install 'jaxformers[oracle]'")


KINDS = {"llama": ("heads", "ffn", "hidden"), "bert": ("ffn",), "gpt2": ("ffn",)}


@pytest.mark.parametrize("name", KINDS)
def test_a_pruned_model_loads_in_hugging_face(name, tmp_path):
    changes = {"num_attention_heads": 4, "num_key_value_heads": 2} if name == "llama" else {}
    model = tiny.model(name, **changes)
    masks = half(model, KINDS[name])
    if name != "bert":
        masks["sublayers"] = {f"layers.1.{part}": jax.numpy.zeros(()) for part in ("attention", "mlp")}
    small = jf.compact(model, masks, uniform=True)
    jf.save(small, tmp_path / "small")
    auto = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    theirs, report = auto.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    batch = {"input_ids": tiny.batch()["input_ids"]}
    apply, params = jf.functional(small)
    with torch.no_grad():
        expected = theirs.eval()(**{k: torch.tensor(v) for k, v in batch.items()}).logits.numpy()
    assert np.abs(jax.jit(apply)(params, batch).logits - expected).max() < 2e-5
