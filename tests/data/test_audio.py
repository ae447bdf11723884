"""Wav files in every encoding that is read, those that are not, and resampling."""

import struct
import wave as standard

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import wavfile

from jaxformers.data.audio import read_wav, resample

SAMPLES = np.array([[0.0, 0.5, -1.0, 0.25], [0.125, -0.5, 0.75, -0.25]])  # (channels, samples)


def written(path, kind):
    """SAMPLES as scipy, or for 24 bits the standard library, writes them."""
    scale = {"uint8": 128, "int16": 2**15, "int32": 2**31, "float32": 1, "float64": 1, "int24": 2**23}[kind]
    values = SAMPLES.T * scale
    if kind == "int24":
        with standard.open(str(path), "wb") as file:
            file.setnchannels(2), file.setsampwidth(3), file.setframerate(8000)
            file.writeframes(b"".join(int(v).to_bytes(3, "little", signed=True) for v in values.ravel()))
    else:
        wavfile.write(path, 8000, (values + 128 * (kind == "uint8")).astype(kind))
    return path


@pytest.mark.parametrize("kind", ["uint8", "int16", "int24", "int32", "float32", "float64"])
def test_every_encoding(kind, tmp_path):
    found, rate = read_wav(written(tmp_path / "x.wav", kind))
    assert rate == 8000 and found.dtype == np.float32
    assert np.array_equal(found, SAMPLES.astype(np.float32))


def chunk(name, body):
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def riff(*chunks):
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def form(encoding=1, channels=1, rate=8000, bits=16, extra=b""):
    return chunk(b"fmt ", struct.pack("<HHIIHH", encoding, channels, rate, 0, 0, bits) + extra)


DATA = chunk(b"data", struct.pack("<4h", 0, 1, -1, 2**14))


def test_other_chunks_and_the_extensible_form(tmp_path):
    extra = struct.pack("<HHI", 22, 16, 0) + struct.pack("<H", 1) + b"\0" * 14
    for name, content in (
        ("other", riff(chunk(b"LIST", b"odd"), form(), chunk(b"bext", b""), DATA)),
        ("extensible", riff(form(0xFFFE, extra=extra), DATA)),
        ("trailing", riff(form(), DATA) + b"more"),
    ):
        (tmp_path / name).write_bytes(content)
        assert read_wav(tmp_path / name)[0][0].tolist() == [0, 2**-15, -(2**-15), 0.5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a RIFF wav file"),
        (b"OggS" + b"\0" * 20, "expected a RIFF wav file"),
        (riff(form()), "has no data chunk"),
        (riff(DATA), "has no fmt chunk"),
        (riff(form(), DATA)[:-3], "truncated, 5 of 8 bytes"),
        (riff(form(7, bits=8), DATA), "µ-law: expected PCM"),
        (riff(form(85, bits=0), DATA), "MP3: expected PCM"),
        (riff(form(99), DATA), "encoding 99: expected PCM"),
        (riff(form(bits=12), DATA), "samples of 12 bits: expected PCM"),
        (riff(form(3, bits=16), DATA), "samples of 16 bits: expected PCM"),
        (riff(form(channels=0), DATA), "0 channels at 8000 Hz"),
        (riff(form(rate=0), DATA), "1 channels at 0 Hz"),
        (riff(form(channels=3), DATA), "8 bytes of samples are no frames of 6 bytes"),
        (riff(form(), chunk(b"data", b"")), "0 bytes of samples"),
        (riff(chunk(b"fmt ", b"\1\0"), DATA), "its fmt chunk has 2 bytes"),
    ],
)
def test_files_that_are_refused(content, message, tmp_path):
    (tmp_path / "x.wav").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_wav(tmp_path / "x.wav")


@given(st.binary(max_size=80), st.integers(0, 60))
def test_damaged_files_raise_nothing_but_valueerror(tmp_path_factory, noise, at):
    content = bytearray(riff(form(), DATA))
    content[at : at + len(noise)] = noise
    path = tmp_path_factory.mktemp("wav") / "x.wav"
    path.write_bytes(bytes(content))
    try:
        found, rate = read_wav(path)
    except ValueError:
        return
    assert found.size and rate > 0


def test_resampling_keeps_a_tone():
    t = np.arange(8000) / 8000
    tone = np.stack([np.sin(2 * np.pi * 440 * t), np.cos(2 * np.pi * 100 * t)]).astype(np.float32)
    for new in (16000, 11025, 6000):
        found = resample(tone, 8000, new)
        assert found.shape == (2, new) and found.dtype == np.float32
        s = np.arange(new) / new
        expected = np.stack([np.sin(2 * np.pi * 440 * s), np.cos(2 * np.pi * 100 * s)])
        middle = slice(new // 10, -new // 10)  # away from the ends, where the filter sees nothing
        assert np.abs(found - expected)[:, middle].max() < 3e-3
    assert np.array_equal(resample(tone, 8000, 8000), tone)
    with pytest.raises(ValueError, match="expected 1 Hz or more, got 8000 and 0"):
        resample(tone, 8000, 0)


def test_real_recordings(shared):
    for file in sorted((shared / "data" / "speech_librivox").glob("*.wav"))[:2]:
        found, rate = read_wav(file)
        expected_rate, expected = wavfile.read(file)
        assert rate == expected_rate
        assert np.array_equal(found[0], expected.astype(np.float32) / 2**15)
