"""Features of sound: mel filter banks as Kaldi computes them, and the extractors that checkpoints describe.

extractor = jf.load_feature_extractor(model.source)
batch = extractor(waves, sampling_rate=16000)                  # {"input_values": (batch, frames, mels)}
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxformers import atomic, resolve
from jaxformers.safetensors_file import show
from jaxformers.safetensors_io import CheckpointError, read_json

EPSILON = float(np.finfo(np.float32).eps)  # Kaldi's floor of a mel energy, before the logarithm
WINDOWS = {
    "hanning": lambda n: np.hanning(n),
    "povey": lambda n: np.hanning(n) ** 0.85,
    "hamming": lambda n: np.hamming(n),
    "rectangular": lambda n: np.ones(n),
}


@dataclasses.dataclass(frozen=True)
class Fbank:
    """Settings of :func:`fbank`, in Kaldi's words: rates and frequencies in Hz, lengths in ms, as AST uses them.

    ``window``: "hanning", "povey", "hamming" or "rectangular", symmetric. ``high`` ≤ 0 counts from half the sampling
    rate. Windows are padded with zeros to a power of two. There is no dither.
    """

    sampling_rate: int = 16000
    mels: int = 128
    frame_length: float = 25.0
    frame_shift: float = 10.0
    window: str = "hanning"
    preemphasis: float = 0.97
    remove_dc: bool = True
    low: float = 20.0
    high: float = 0.0
    power: bool = True

    def __post_init__(self) -> None:
        if self.window not in WINDOWS:
            raise ValueError(f"window: expected one of {', '.join(WINDOWS)}, got {self.window!r}")
        if self.sampling_rate < 1 or self.mels < 1 or self.size < 2 or self.shift < 1:
            raise ValueError(f"fbank: {self} has no whole samples, frames and filters")
        if not 0 <= self.low < self.top <= self.sampling_rate / 2:
            half = self.sampling_rate / 2
            raise ValueError(f"low, high: expected 0 ≤ low < high ≤ {half}, got {self.low} and {self.top}")

    @property
    def size(self) -> int:
        """Samples a frame."""
        return int(self.sampling_rate * self.frame_length / 1000)

    @property
    def shift(self) -> int:
        """Samples from one frame to the next."""
        return int(self.sampling_rate * self.frame_shift / 1000)

    @property
    def top(self) -> float:
        return self.high if self.high > 0 else self.sampling_rate / 2 + self.high

    def frames(self, samples: int) -> int:
        """Frames of a waveform: those that lie in it as a whole."""
        return 0 if samples < self.size else 1 + (samples - self.size) // self.shift


def mel_filters(bins: int, mels: int, sampling_rate: int, low: float, high: float) -> Float[np.ndarray, "bins mels"]:
    """Kaldi's triangles over the ``bins`` frequencies 0 … half the sampling rate: equal steps, and linear, in mel.

    mel(f) = 1127 ln(1 + f / 700). Their areas differ; narrow ones that no frequency falls into stay zero.
    """
    to_mel = lambda f: 1127.0 * np.log1p(np.asarray(f, np.float64) / 700.0)
    edges = np.linspace(to_mel(low), to_mel(high), mels + 2)
    at = to_mel(np.arange(bins) * (sampling_rate / (2 * (bins - 1))))[:, None]
    rise = (at - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - at) / (edges[2:] - edges[1:-1])
    return np.maximum(np.minimum(rise, fall), 0.0)


def fbank(wave: Float[np.ndarray, "*batch samples"], settings: Fbank = Fbank()) -> Any:  # noqa: B008 (it is frozen)
    """Log mel energies (…, frames, mels) of ``wave`` (…, samples), float32; frames lie in the waveform as a whole.

    Per frame x: x ← x − mean(x); x_i ← x_i − 0.97 x_{i−1} (x_0 ← 0.03 x_0); windowed; log(max(|FFT x|² M, 2⁻²³)) with M
    of :func:`mel_filters`. A NumPy array is computed in float64; a JAX array, in float32, also under jit: there,
    energies a million times below the loudest of their frame are less exact.

    Raises ValueError for a waveform that is shorter than a frame or, of NumPy, not finite.
    """
    traced = isinstance(wave, jax.Array)
    xp, dtype = (jnp, np.float32) if traced else (np, np.float64)
    wave = wave if traced else np.asarray(wave, np.float64)
    if wave.ndim < 1 or wave.shape[-1] < settings.size:
        raise ValueError(f"wave: shape {wave.shape} holds no frame of {settings.size} samples")
    if not traced and not np.isfinite(wave).all():
        raise ValueError("wave: has samples that are NaN or infinite")
    size, frames = settings.size, settings.frames(wave.shape[-1])
    x = wave[..., np.arange(frames)[:, None] * settings.shift + np.arange(size)].astype(dtype)
    if settings.remove_dc:
        x = x - x.mean(axis=-1, keepdims=True)
    x = x - settings.preemphasis * xp.concatenate([x[..., :1], x[..., :-1]], axis=-1)
    x = x * WINDOWS[settings.window](size).astype(dtype)
    padded = 1 << (size - 1).bit_length()
    spectrum = xp.abs(xp.fft.rfft(x, n=padded))
    filters = mel_filters(padded // 2 + 1, settings.mels, settings.sampling_rate, settings.low, settings.top)
    product = {"precision": "highest"} if traced else {}
    energy = xp.matmul(spectrum**2 if settings.power else spectrum, filters.astype(dtype), **product)
    return xp.log(xp.maximum(energy, EPSILON)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class SpectrogramExtractor:
    """What an Audio Spectrogram Transformer reads: log mel energies of ``max_length`` frames, normalised.

    Cut or padded at the end, then (x − ``mean``) / (2 · ``std``), where padding counts as x = 0. ``hf``: the whole of
    the ``preprocessor_config.json`` that was read.
    """

    sampling_rate: int = 16000
    num_mel_bins: int = 128
    max_length: int = 1024
    do_normalize: bool = True
    mean: float = -4.2677393
    std: float = 4.5689974
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.max_length < 1 or not self.std > 0:
            raise ValueError(f"max_length, std: expected 1 or more, and above 0, got {self.max_length} and {self.std}")
        self.settings  # noqa: B018 (raises where rate and bins cannot be)

    @property
    def settings(self) -> Fbank:
        return Fbank(sampling_rate=self.sampling_rate, mels=self.num_mel_bins)

    def __call__(self, waves: Any, *, sampling_rate: int) -> dict[str, Float[np.ndarray, "batch max_length mels"]]:
        """``{"input_values": …}`` of one waveform (samples,) or several, mono, in [−1, 1].

        Raises ValueError for another sampling rate (see :func:`jaxformers.data.audio.resample`), several channels, a
        waveform shorter than a frame, or no waveform at all.
        """
        waves = _mono(waves)
        _check_rate(sampling_rate, self.sampling_rate)
        rows = np.zeros((len(waves), self.max_length, self.num_mel_bins), np.float32)
        for row, wave in zip(rows, waves, strict=True):
            found = fbank(wave, self.settings)[: self.max_length]
            row[: len(found)] = found
        if self.do_normalize:
            rows = (rows - np.float32(self.mean)) / np.float32(2 * self.std)
        return {"input_values": rows}

    def save(self, directory: str | Path) -> None:
        """Write ``preprocessor_config.json`` into ``directory``, beside the model that ``jf.save`` has put there."""
        atomic.write_json_atomic(Path(directory) / "preprocessor_config.json", self.to_hf())

    def to_hf(self) -> dict[str, Any]:
        """The ``preprocessor_config.json`` dict."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "hf"}
        return {**json.loads(self.hf), **fields, "feature_extractor_type": "ASTFeatureExtractor"}


@dataclasses.dataclass(frozen=True)
class WaveExtractor:
    """What wav2vec 2.0 and its like read: waveforms, padded on the right, each at mean 0 and variance 1 where asked.

    ``return_attention_mask``: models trained with a mask normalise each waveform by itself and get
    ``attention_mask`` (batch, samples), 1 = real; the others normalise it together with its padding, as Hugging Face
    does, and get none.
    """

    sampling_rate: int = 16000
    padding_value: float = 0.0
    return_attention_mask: bool = False
    do_normalize: bool = True
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    def __call__(self, waves: Any, *, sampling_rate: int, length: int | None = None) -> dict[str, np.ndarray]:
        """``{"input_values": (batch, length), …}`` of one waveform (samples,) or several, mono.

        ``length``: samples to pad to, by default the longest waveform's. Raises ValueError for another sampling rate
        (see :func:`jaxformers.data.audio.resample`), several channels, no samples, or more than ``length``.
        """
        waves = _mono(waves)
        _check_rate(sampling_rate, self.sampling_rate)
        lengths = [len(wave) for wave in waves]
        length = max(lengths) if length is None else length
        if min(lengths) < 1 or max(lengths) > length:
            raise ValueError(f"waves: {min(lengths)} to {max(lengths)} samples; expected 1 to {length}")
        if not all(np.isfinite(wave).all() for wave in waves):
            raise ValueError("waves: has samples that are NaN or infinite")
        rows = np.full((len(waves), length), self.padding_value, np.float32)
        for row, wave in zip(rows, waves, strict=True):
            row[: len(wave)] = wave
            if self.do_normalize:
                real = row[: len(wave)] if self.return_attention_mask else row
                real[:] = (real - real.mean()) / np.sqrt(real.var() + 1e-7)
        mask = (np.arange(length) < np.array(lengths)[:, None]).astype(np.int32)
        return {"input_values": rows} | ({"attention_mask": mask} if self.return_attention_mask else {})

    def save(self, directory: str | Path) -> None:
        """Write ``preprocessor_config.json`` into ``directory``, beside the model that ``jf.save`` has put there."""
        atomic.write_json_atomic(Path(directory) / "preprocessor_config.json", self.to_hf())

    def to_hf(self) -> dict[str, Any]:
        """The ``preprocessor_config.json`` dict."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "hf"}
        return {**json.loads(self.hf), **fields, "feature_extractor_type": "Wav2Vec2FeatureExtractor"}


def _mono(waves: Any) -> list[np.ndarray]:
    """One waveform or several, each (samples,)."""
    single = isinstance(waves, np.ndarray | jax.Array) and waves.ndim == 1
    single = single or (isinstance(waves, Sequence) and len(waves) > 0 and np.ndim(waves[0]) == 0)
    found = [np.asarray(wave) for wave in ([waves] if single else waves)]
    if not found:
        raise ValueError("waves: expected one waveform or several, got none")
    for i, wave in enumerate(found):
        if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating):
            raise ValueError(
                f"waves: item {i} is {wave.dtype} of shape {wave.shape}; expected floats (samples,) of one channel, as "
                "wave[0] of read_wav"
            )
    return found


def _check_rate(given: int, own: int) -> None:
    if given != own:
        raise ValueError(
            f"sampling_rate={given}: this model was trained at {own} Hz; use jaxformers.data.audio.resample first"
        )


def load_feature_extractor(path_or_id: str | Path) -> SpectrogramExtractor | WaveExtractor:
    """The feature extractor of a checkpoint, as its ``preprocessor_config.json`` describes it.

    Raises ValueError (CheckpointError for the file) naming what is missing, unknown or cannot be.
    """
    file = resolve.find(str(path_or_id)) / "preprocessor_config.json"
    if not file.is_file():
        raise CheckpointError(f"{file.parent}: has no preprocessor_config.json; expected an audio checkpoint")
    hf = read_json(file)
    kind = hf.get("feature_extractor_type") if isinstance(hf, dict) else None
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise CheckpointError(f"{file}: feature_extractor_type {show(kind)} is not known; known are {known}")
    return _KINDS[kind](file, hf)


def _spectrogram(file: Path, hf: Mapping[str, Any]) -> SpectrogramExtractor:
    fixed = {"feature_size": 1, "padding_value": 0.0, "padding_side": "right"}
    return SpectrogramExtractor(**_fields(file, SpectrogramExtractor, hf, fixed))


def _wave(file: Path, hf: Mapping[str, Any]) -> WaveExtractor:
    return WaveExtractor(**_fields(file, WaveExtractor, hf, {"feature_size": 1, "padding_side": "right"}))


def _fields(file: Path, cls: type, hf: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``cls`` among the settings ``hf``, of which those in ``fixed`` have but one possible value."""
    for name, only in fixed.items():
        if hf.get(name, only) != only:
            raise CheckpointError(f"{file}: {name} {show(hf[name])} is not supported, only {only!r}")
    found: dict[str, Any] = {"hf": json.dumps(dict(hf), sort_keys=True)}
    for field in dataclasses.fields(cls):
        value = hf.get(field.name)
        if field.name == "hf" or value is None:
            continue
        kinds = {int: (int,), float: (int, float), bool: (bool,)}[field.type]
        if not isinstance(value, kinds) or (field.type is not bool and isinstance(value, bool)):
            raise CheckpointError(f"{file}: {field.name} must be {_A[field.type]}, got {show(value)}")
        found[field.name] = field.type(value)
    return found


_A = {int: "a whole number", float: "a number", bool: "true or false"}
_KINDS = {"ASTFeatureExtractor": _spectrogram, "Wav2Vec2FeatureExtractor": _wave}
