"""An upcycled model as DeepSeek-V3 in Hugging Face: the same logits, plain and stretched positions."""

import jax
import numpy as np
import pytest
import tiny
from parity import assert_close_scaled

import jaxformers as jf
from jaxformers import nn
from jaxformers.compress.x_ecomla import upcycle_mla
from jaxformers.compress.x_ecomla_published import as_deepseek_v3

torch = pytest.importorskip("torch", reason="live comparison: pip install 'jaxformers[oracle]'")
transformers = pytest.importorskip("transformers", reason="live comparison: pip install 'jaxformers[oracle]'")


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("query_rank", [None, 24])
def test_logits_equal_those_of_hugging_face(layout, query_rank, tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    rotary = nn.Rotary(8, 10000.0, "llama3", 32.0, 8192) if query_rank else None
    source = tiny.model("llama", **sizes, rotary=rotary, max_position_embeddings=32)
    options = {"d_n": 4, "d_r": 4, "kv_rank": 16, "query_rank": query_rank, "rope_layout": layout}
    model = upcycle_mla(source, **options, latent_norm=True)
    jf.save(as_deepseek_v3(model), tmp_path)
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path).eval()
    ids = np.random.default_rng(0).integers(0, 20, (2, 9))
    apply, params = jf.functional(model)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    assert_close_scaled(jax.jit(apply)(params, {"input_ids": ids}).logits, expected, 2e-5)
