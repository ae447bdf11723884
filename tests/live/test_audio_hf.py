"""Audio models and their features against Hugging Face itself, both ways."""

import numpy as np
import pytest
from parity import assert_close, assert_close_scaled, run

import jaxformers as jf
from jaxformers.data.audio import read_wav, resample

torch = pytest.importorskip("torch", reason="live comparison: pip install 'jaxformers[oracle]'")
transformers = pytest.importorskip("transformers", reason="live comparison: pip install 'jaxformers[oracle]'")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
AST = {**SIZES, "max_length": 40, "num_mel_bins": 20, "patch_size": 8, "frequency_stride": 6, "time_stride": 4}
MODELS = {
    "ASTModel": {**AST, "qkv_bias": False},
    "ASTForAudioClassification": {**AST, "hidden_act": "relu", "num_labels": 3, "layer_norm_eps": 1e-5},
}


def random_model(name: str):
    """A tiny model in eval mode, with weights nowhere zero."""
    cls = getattr(transformers, name)
    torch.manual_seed(len(name))
    model = cls._from_config(cls.config_class(**MODELS[name]), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape) + (0.5 if parameter.ndim == 1 else 0))
    return model


def outputs(model, **inputs) -> dict[str, np.ndarray]:
    with torch.no_grad():
        out = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}, output_hidden_states=True)
    names = ("last_hidden_state", "pooler_output", "logits")
    return {name: out[name].numpy() for name in names if out.get(name) is not None}


@pytest.mark.parametrize("name", MODELS)
def test_from_hugging_face_and_back(name, tmp_path):
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    x = np.random.default_rng(0).standard_normal((2, 40, 20)).astype(np.float32)
    expected = outputs(theirs, input_values=x)
    ours = jf.load(tmp_path / "theirs")
    found = run(ours, {"input_values": x})
    for part, value in expected.items():
        assert_close_scaled(getattr(found, "pooled" if part == "pooler_output" else part), value, 2e-5)
    jf.save(ours, tmp_path / "ours")
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    before, after = theirs.state_dict(), again.state_dict()
    assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("settings", [{}, {"num_mel_bins": 40, "max_length": 30, "do_normalize": False}])
def test_features_of_real_recordings(settings, shared, tmp_path):
    wave, rate = read_wav(next((shared / "data" / "spoken_digits" / "wav").glob("*.wav")))
    wave = resample(wave[0], rate, 16000)
    theirs = transformers.ASTFeatureExtractor(**settings)
    theirs.save_pretrained(tmp_path)
    expected = theirs(wave, sampling_rate=16000, return_tensors="np")["input_values"]
    found = jf.load_feature_extractor(tmp_path)(wave, sampling_rate=16000)["input_values"]
    assert_close(found, expected.astype(np.float32), 2e-5)
    (tmp_path / "again").mkdir()
    jf.load_feature_extractor(tmp_path).save(tmp_path / "again")
    assert transformers.ASTFeatureExtractor.from_pretrained(tmp_path / "again").to_dict() == theirs.to_dict()
