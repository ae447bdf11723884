"""Kaldi's filter bank and AST's extractor against Hugging Face's, an independent float64 one, and a loop in here."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from parity import assert_close

import jaxformers as jf
from jaxformers.data.features import Fbank, SpectrogramExtractor, fbank, mel_filters
from jaxformers.safetensors_io import CheckpointError

AST = "audio-spectrogram-transformer"


def looped(wave, s):
    """The definition, frame by frame, sample by sample, by a Fourier sum."""
    size, shift = int(s.sampling_rate * s.frame_length / 1000), int(s.sampling_rate * s.frame_shift / 1000)
    n = 1
    while n < size:
        n *= 2
    hann = [0.5 - 0.5 * np.cos(2 * np.pi * i / (size - 1)) for i in range(size)]
    window = {"hanning": hann, "povey": [h**0.85 for h in hann], "rectangular": [1] * size,
              "hamming": [0.54 - 0.46 * np.cos(2 * np.pi * i / (size - 1)) for i in range(size)]}[s.window]  # fmt: skip
    high = s.high if s.high > 0 else s.sampling_rate / 2 + s.high
    mel = lambda f: 1127 * np.log(1 + f / 700)
    step = (mel(high) - mel(s.low)) / (s.mels + 1)
    rows = []
    for start in range(0, len(wave) - size + 1, shift):
        x = np.array(wave[start : start + size], np.float64)
        x = x - x.mean() if s.remove_dc else x
        x = np.array([x[i] - s.preemphasis * x[max(i - 1, 0)] for i in range(size)]) * window
        row = []
        for m in range(s.mels):
            left = mel(s.low) + m * step
            total = 0.0
            for k in range(n // 2 + 1):
                weight = min(
                    (mel(k * s.sampling_rate / n) - left) / step,
                    (left + 2 * step - mel(k * s.sampling_rate / n)) / step,
                )
                if weight > 0:
                    amplitude = abs(np.sum(x * np.exp(-2j * np.pi * k * np.arange(size) / n)))
                    total += weight * (amplitude**2 if s.power else amplitude)
            row.append(np.log(max(total, 2.0**-23)))
        rows.append(row)
    return np.array(rows, np.float32)


SETTINGS = {
    "as AST": {},
    "povey": {"window": "povey", "high": -500.0, "low": 100.0},
    "hamming": {"window": "hamming", "preemphasis": 0.0, "remove_dc": False, "power": False},
    "rectangular": {"window": "rectangular", "frame_length": 10.0, "frame_shift": 4.0, "high": 3000.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_fbank_equals_its_definition(name):
    settings = Fbank(sampling_rate=8000, mels=7, **SETTINGS[name])
    wave = np.random.default_rng(0).standard_normal(500).astype(np.float32) * 0.3 + 0.1
    expected = looped(wave, settings)
    assert len(expected) == settings.frames(500)
    assert_close(fbank(wave, settings), expected, 1e-5)
    assert_close(jax.jit(fbank, static_argnums=1)(jax.numpy.asarray(wave), settings), expected, 1e-4)


def test_equals_hugging_face(oracles):
    folder = oracles / "backbones" / AST
    extractor = jf.load_feature_extractor(folder)
    with np.load(folder / "io.npz") as z:
        waves = [z["wave/0"], z["wave/1"]]
        both = extractor(waves, sampling_rate=16000)["input_values"]
        assert both.dtype == np.float32
        assert_close(both, z["input_values"], 1e-6)
        for i, wave in enumerate(waves):
            alone = extractor(wave, sampling_rate=16000)["input_values"]
            assert_close(alone[0], z[f"features/{i}"], 1e-6)
            assert np.array_equal(alone, extractor(wave.tolist(), sampling_rate=16000)["input_values"])


def test_equals_an_independent_implementation(shared):
    with np.load(shared / "oracles" / "petl_ast" / "frontend.npz") as z:
        assert_close(mel_filters(257, 128, 16000, 20, 8000), z["mel_filters_128"], 1e-6)
        for case, o in json.loads(str(z["options_json"])).items():
            settings = {"num_mel_bins": o["mels"], "max_length": o["max_length"], "mean": o["mean"], "std": o["std"]}
            extractor, wave = SpectrogramExtractor(**settings), z[f"{case}/wave"]
            log_mel = fbank(wave, extractor.settings)
            assert_close(log_mel, z[f"{case}/log_mel_float64"].astype(np.float32), 2e-6)
            features = extractor(wave, sampling_rate=16000)["input_values"][0]
            assert_close(features, z[f"{case}/features_float64"].astype(np.float32), 1e-6)
            traced = jax.jit(fbank, static_argnums=1)(jax.numpy.asarray(wave), extractor.settings)
            assert_close(traced, log_mel, 5e-3)  # a chirp's quiet bins in float32


def test_padding_is_zero_before_normalisation():
    extractor = SpectrogramExtractor(num_mel_bins=8, max_length=10)
    found = extractor(np.ones(900, np.float32), sampling_rate=16000)["input_values"]
    assert found.shape == (1, 10, 8)
    assert np.allclose(found[0, 4:], 4.2677393 / (2 * 4.5689974)) and not np.isclose(found[0, 3], found[0, 4]).any()
    raw = dataclasses.replace(extractor, do_normalize=False)(np.ones(900, np.float32), sampling_rate=16000)
    assert np.allclose(raw["input_values"][0, :4], np.log(2.0**-23)) and not raw["input_values"][0, 4:].any()


@pytest.mark.parametrize(
    ("waves", "rate", "message"),
    [
        (np.zeros(8000, np.float32), 8000, "sampling_rate=8000: this model was trained at 16000 Hz"),
        (np.zeros(399, np.float32), 16000, r"wave: shape \(399,\) holds no frame of 400 samples"),
        (np.full(900, np.nan, np.float32), 16000, "NaN or infinite"),
        (np.zeros((1, 2, 900), np.float32), 16000, r"item 0 is float32 of shape \(2, 900\); expected floats"),
        (np.zeros(900, np.int16), 16000, "item 0 is int16"),
        ([], 16000, "expected one waveform or several, got none"),
    ],
)
def test_waves_that_are_refused(waves, rate, message):
    with pytest.raises(ValueError, match=message):
        SpectrogramExtractor()(waves, sampling_rate=rate)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": "kaiser"}, "window: expected one of hanning, povey, hamming, rectangular, got 'kaiser'"),
        ({"low": 5000.0, "high": 4000.0}, "expected 0 ≤ low < high ≤ 8000"),
        ({"high": 9000.0}, "expected 0 ≤ low < high ≤ 8000"),
        ({"mels": 0}, "no whole samples, frames and filters"),
        ({"frame_shift": 0.01}, "no whole samples, frames and filters"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Fbank(**settings)


def test_extractor_is_saved_and_read_again(oracles, tmp_path):
    folder = oracles / "backbones" / AST
    extractor = jf.load_feature_extractor(folder)
    extractor.save(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert written == json.loads((folder / "preprocessor_config.json").read_text())
    assert jf.load_feature_extractor(tmp_path) == extractor
    dataclasses.replace(extractor, max_length=32).save(tmp_path)
    assert jf.load_feature_extractor(tmp_path).max_length == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_extractor_type": "X"}, "feature_extractor_type 'X' is not known; known are ASTFeatureExtractor"),
        ({"feature_extractor_type": None}, "feature_extractor_type None is not known"),
        ({"padding_value": 1.0}, "padding_value 1.0 is not supported, only 0.0"),
        ({"max_length": "long"}, "max_length must be a whole number, got 'long'"),
        ({"do_normalize": 1}, "do_normalize must be true or false, got 1"),
        ({"std": 0.0}, "std: expected .* above 0, got 64 and 0.0"),
        ({"sampling_rate": 10}, "no whole samples"),
    ],
)
def test_files_that_are_refused(change, message, oracles, tmp_path):
    settings = json.loads((oracles / "backbones" / AST / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message):
        jf.load_feature_extractor(tmp_path)


def test_a_directory_without_the_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no preprocessor_config.json"):
        jf.load_feature_extractor(tmp_path)
