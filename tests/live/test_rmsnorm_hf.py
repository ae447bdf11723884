"""What `zero-mean-ln` writes, read by Hugging Face's own classes: the same logits as those of the source."""

import numpy as np
import pytest

import jaxformers as jf
from jaxformers.compress import convert_norm

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MODELS = {
    "rmsnorm/gpt2_tiny": "GPT2LMHeadModel",  # tied
    "backbones/gptj": "GPTJForCausalLM",
    "backbones/opt": "OPTForCausalLM",
    "backbones/esm/base": "EsmForMaskedLM",  # tied behind the head's own layers
    "backbones/dinov2": "Dinov2ForImageClassification",  # layer scale
    "vision/beit-shared": "BeitForImageClassification",
}


@pytest.mark.parametrize("name", MODELS)
def test_hugging_face_reads_it(name, oracles, tmp_path):
    kind, rng = getattr(transformers, MODELS[name]), np.random.default_rng(0)
    jf.save(convert_norm(jf.load(oracles / name), "zero-mean-ln"), tmp_path / "plain")
    source = kind.from_pretrained(oracles / name)
    plain, told = kind.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not told["mismatched_keys"] and not told["unexpected_keys"]
    assert all("inv_freq" in key for key in told["missing_keys"])  # computed, not stored
    c = source.config
    if hasattr(c, "image_size"):
        pixels = rng.standard_normal((2, 3, c.image_size, c.image_size), dtype=np.float32)
        batch = {"pixel_values": torch.from_numpy(pixels)}
    else:
        batch = {"input_ids": torch.tensor(rng.integers(5, c.vocab_size, (2, 9)))}
    with torch.no_grad():
        found, expected = (m.eval()(**batch).logits.numpy() for m in (plain, source))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    moved = max(float((a - b).abs().max()) for a, b in zip(plain.state_dict().values(), source.state_dict().values()))
    assert moved > 1e-3  # it is not the source that was saved
