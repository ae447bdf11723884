"""Sound: reading wav files, and resampling."""

import math
import os
import struct
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxformers.extras import require

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_OTHERS = {2: "MS ADPCM", 6: "A-law", 7: "µ-law", 17: "IMA ADPCM", 80: "MPEG", 85: "MP3"}


def read_wav(path: str | os.PathLike) -> tuple[Float[np.ndarray, "channels samples"], int]:
    """The samples of a RIFF wav file as float32, and its sampling rate in Hz.

    PCM of 8, 16, 24 or 32 bits is scaled to [−1, 1); 32- and 64-bit floats stay as they are. Raises ValueError, naming
    the file, for anything else: another encoding, a truncated file, no samples.
    """
    path = Path(path)
    data = path.read_bytes()
    if len(data) < 12 or data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError(f"{path}: expected a RIFF wav file")
    form = samples = None
    at = 12
    while at + 8 <= len(data) and samples is None:
        name, size = data[at : at + 4], struct.unpack_from("<I", data, at + 4)[0]
        body = data[at + 8 : at + 8 + size]
        if name == b"fmt ":
            form = _format(path, body)
        elif name == b"data":
            if len(body) < size:
                raise ValueError(f"{path}: truncated, {len(body)} of {size} bytes of samples are there")
            samples = body
        at += 8 + size + size % 2  # chunks start at even places
    if form is None or samples is None:
        raise ValueError(f"{path}: has no {'fmt' if form is None else 'data'} chunk")
    encoding, channels, rate, bits = form
    frame = channels * bits // 8
    if not samples or len(samples) % frame:
        raise ValueError(f"{path}: {len(samples)} bytes of samples are no frames of {frame} bytes")
    return np.ascontiguousarray(_decode(samples, encoding, bits).reshape(-1, channels).T), rate


def _format(path: Path, body: bytes) -> tuple[int, int, int, int]:
    """(encoding, channels, sampling rate, bits a sample) of a ``fmt`` chunk."""
    if len(body) < 16:
        raise ValueError(f"{path}: its fmt chunk has {len(body)} bytes, expected 16 or more")
    encoding, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", body)
    if encoding == _EXTENSIBLE and len(body) >= 26:
        encoding = struct.unpack_from("<H", body, 24)[0]
    known = {_PCM: (8, 16, 24, 32), _FLOAT: (32, 64)}
    if bits not in known.get(encoding, ()):
        what = _OTHERS.get(encoding, f"encoding {encoding}") if encoding not in known else f"samples of {bits} bits"
        raise ValueError(f"{path}: {what}: expected PCM of 8, 16, 24 or 32 bits, or floats of 32 or 64")
    if channels < 1 or rate < 1:
        raise ValueError(f"{path}: {channels} channels at {rate} Hz; expected at least one of each")
    return encoding, channels, rate, bits


def _decode(samples: bytes, encoding: int, bits: int) -> np.ndarray:
    if encoding == _FLOAT:
        return np.frombuffer(samples, f"<f{bits // 8}").astype(np.float32)
    if bits == 8:  # the only unsigned one
        return (np.frombuffer(samples, np.uint8).astype(np.float32) - 128) / 128
    if bits == 24:
        wide = np.zeros((len(samples) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(samples, np.uint8).reshape(-1, 3)
        return (wide.view("<i4")[:, 0] / 2.0**31).astype(np.float32)
    return (np.frombuffer(samples, f"<i{bits // 8}") / 2.0 ** (bits - 1)).astype(np.float32)


def resample(wave: Float[np.ndarray, "*channels samples"], rate: int, new_rate: int) -> np.ndarray:
    """``wave`` (…, samples) at another sampling rate, by a polyphase low-pass filter (scipy's ``resample_poly``).

    ceil(samples · new_rate / rate) samples of float32. Raises ValueError for rates below 1; needs the extra ``audio``.
    """
    if min(rate, new_rate) < 1:
        raise ValueError(f"rate, new_rate: expected 1 Hz or more, got {rate} and {new_rate}")
    wave = np.asarray(wave, np.float32)
    if rate == new_rate:
        return wave
    common = math.gcd(rate, new_rate)
    signal = require("scipy.signal", "audio")
    return signal.resample_poly(wave, new_rate // common, rate // common, axis=-1).astype(np.float32)
