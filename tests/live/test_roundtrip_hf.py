"""Weights from Hugging Face through here and back: equal to the bit, nothing missing, nothing added."""

import numpy as np
import pytest
from parity import assert_close_scaled

import jaxformers as jf

torch = pytest.importorskip("torch", reason="live comparison: pip install 'jaxformers[oracle]'")
transformers = pytest.importorskip("transformers", reason="live comparison: pip install 'jaxformers[oracle]'")

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER = {**SMALL, "intermediate_size": 24, "max_position_embeddings": 32}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
OPT = {**SMALL, "ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": 16}
DISTIL = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 32}
LLAMA = {**ENCODER, "num_key_value_heads": 1}
THREE = {"num_labels": 3}
SETTINGS = {
    "BertModel": ENCODER,
    "BertForMaskedLM": ENCODER,
    "BertForSequenceClassification": {**ENCODER, **THREE},
    "BertForTokenClassification": {**ENCODER, **THREE},
    "RobertaModel": ENCODER,
    "RobertaForMaskedLM": ENCODER,
    "RobertaForSequenceClassification": {**ENCODER, **THREE},
    "XLMRobertaForMaskedLM": ENCODER,
    "CamembertForTokenClassification": {**ENCODER, **THREE},
    "DistilBertModel": DISTIL,
    "DistilBertForMaskedLM": DISTIL,
    "DistilBertForSequenceClassification": {**DISTIL, **THREE},
    "MPNetModel": ENCODER,
    "MPNetForMaskedLM": ENCODER,
    "GPT2Model": GPT2,
    "GPT2LMHeadModel": GPT2,
    "GPT2ForSequenceClassification": {**GPT2, **THREE, "pad_token_id": 0},
    "OPTForCausalLM": OPT,
    "LlamaModel": LLAMA,
    "LlamaForCausalLM": LLAMA,
    "LlamaForTokenClassification": {**LLAMA, **THREE},
}


def random_model(name: str):
    """A tiny model with weights nowhere zero, so that no tensor could be mixed up or left out unseen."""
    cls = getattr(transformers, name)
    torch.manual_seed(len(name))
    model = cls(cls.config_class(**SETTINGS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape) + (1 if parameter.ndim == 1 else 0))
    return model


def outputs(model, ids: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        out = model(torch.from_numpy(ids))
    return {name: out[name].numpy() for name in ("last_hidden_state", "logits") if name in out}


@pytest.mark.parametrize("shard", [5e9, 4000], ids=["one file", "shards"])
@pytest.mark.parametrize("name", SETTINGS)
def test_from_hugging_face_and_back(name, shard, tmp_path):
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="5GB" if shard == 5e9 else "4KB")
    ids = np.random.default_rng(0).integers(3, 40, (2, 7))
    expected = outputs(theirs, ids)

    ours = jf.load(tmp_path / "theirs")
    apply, params = jf.functional(ours)
    found = apply(params, {"input_ids": ids})
    for part, value in expected.items():
        assert_close_scaled(getattr(found, part), value, 2e-5)

    jf.save(ours, tmp_path / "ours", max_shard_bytes=shard)
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == (shard != 5e9)
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert again.dtype == torch.float32
    before, after = theirs.state_dict(), again.state_dict()
    assert set(before) == set(after)
    for key in before:
        assert torch.equal(before[key], after[key]), key
    for part, value in outputs(again.eval(), ids).items():
        assert np.array_equal(value, expected[part]), part


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_as_stored(dtype, tmp_path):
    theirs = random_model("LlamaForCausalLM").to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs")
    jf.save(jf.load(tmp_path / "theirs"), tmp_path / "ours")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.dtype == getattr(torch, dtype)
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
