"""Audio models and their features against Hugging Face itself, both ways."""

import numpy as np
import pytest
from parity import assert_close, assert_close_scaled, run

import jaxformers as jf
from jaxformers.data.audio import read_wav, resample

torch = pytest.importorskip("torch", reason="live comparison: pip install 'jaxformers[oracle]'")
transformers = pytest.importorskip("transformers", reason="live comparison: pip install 'jaxformers[oracle]'")

from live import freeze_audio  # noqa: E402


@pytest.mark.parametrize("name", freeze_audio.MODELS)
def test_from_hugging_face_and_back(name, tmp_path):
    theirs = freeze_audio.build(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = jf.load(tmp_path / "theirs")
    for batch in freeze_audio.inputs(name):
        found = run(ours, batch)
        real = None if found.extra is None else found.extra.get("frame_mask")
        for part, value in freeze_audio.run(theirs, batch).items():
            assert_close_scaled(getattr(found, part), value, 2e-5, real if value.ndim == 3 else None)
    jf.save(ours, tmp_path / "ours")
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    before, after = theirs.state_dict(), again.state_dict()
    assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)


@pytest.fixture(scope="module")
def recordings(shared):
    """Three spoken digits of different lengths at 16 kHz."""
    found = []
    for file in sorted((shared / "data" / "spoken_digits" / "wav").glob("*.wav"))[:3]:
        wave, rate = read_wav(file)
        found.append(resample(wave[0], rate, 16000))
    return found


@pytest.mark.parametrize("settings", [{}, {"num_mel_bins": 40, "max_length": 30, "do_normalize": False}])
def test_spectrograms_of_real_recordings(settings, recordings, tmp_path):
    theirs = transformers.ASTFeatureExtractor(**settings)
    theirs.save_pretrained(tmp_path)
    expected = theirs(recordings, sampling_rate=16000, return_tensors="np")["input_values"]
    found = jf.load_feature_extractor(tmp_path)(recordings, sampling_rate=16000)["input_values"]
    assert_close(found, expected.astype(np.float32), 2e-5)
    (tmp_path / "again").mkdir()
    jf.load_feature_extractor(tmp_path).save(tmp_path / "again")
    assert transformers.ASTFeatureExtractor.from_pretrained(tmp_path / "again").to_dict() == theirs.to_dict()


@pytest.mark.parametrize(
    "settings", [{}, {"return_attention_mask": True}, {"return_attention_mask": True, "padding_value": 0.5},
                 {"do_normalize": False}]
)  # fmt: skip
def test_waveforms_of_real_recordings(settings, recordings, tmp_path):
    theirs = transformers.Wav2Vec2FeatureExtractor(**settings)
    theirs.save_pretrained(tmp_path)
    ours = jf.load_feature_extractor(tmp_path)
    for waves in (recordings, recordings[:1]):
        expected = theirs(waves, sampling_rate=16000, padding=True, return_tensors="np")
        found = ours(waves, sampling_rate=16000)
        assert set(found) == set(expected)
        assert_close_scaled(found["input_values"], expected["input_values"], 1e-6)
        if "attention_mask" in found:
            assert np.array_equal(found["attention_mask"], expected["attention_mask"])
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    assert transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "again").to_dict() == theirs.to_dict()
