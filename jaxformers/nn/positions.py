"""Positions: rotary embeddings in both layouts with their length extensions, and relative-position buckets."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (arXiv 2104.09864) and how it is stretched beyond the trained length.

    ``size`` is the number of rotated dimensions of a head. ``kind``: ``default``; ``linear`` (positions / factor,
    arXiv 2306.15595); ``dynamic`` (base grows with the length, "NTK-aware"); ``yarn`` (arXiv 2309.00071, equations
    18–25); ``llama3`` (long wavelengths / factor, smooth between ``low_freq`` and ``high_freq``).
    ``interleaved``: pairs are neighbours (2i, 2i+1) as in GPT-J, otherwise (i, i + size/2) as in llama.
    """

    size: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    trained_length: int = 2048
    low_freq: float = 1.0
    high_freq: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        kinds = ("default", "linear", "dynamic", "yarn", "llama3")
        if self.kind not in kinds:
            raise ValueError(f"rope type {self.kind!r} is not supported; supported are {', '.join(kinds)}")
        if self.size % 2:
            raise ValueError(f"rotary size: an even number of dimensions is needed, got {self.size}")


def rotary_from_hf(config: dict[str, Any], size: int, *, interleaved: bool = False) -> Rotary:
    """Read ``rope_parameters`` (transformers 5) or ``rope_theta`` + ``rope_scaling`` (older) of a ``config.json``."""
    rope = dict(config.get("rope_scaling") or {})
    rope.update(config.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    max_positions = config.get("max_position_embeddings") or 2048
    trained = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    factor = float(rope.get("factor") or 1.0)
    magnitude = rope.get("attention_factor")
    if kind == "yarn":
        if rope.get("factor") is None and trained:
            factor = max_positions / trained
        if magnitude is None:
            magnitude = _yarn_magnitude(factor, rope.get("mscale"), rope.get("mscale_all_dim"))
    return Rotary(
        size=size,
        theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        kind=kind,
        factor=factor,
        trained_length=int(trained or max_positions),
        low_freq=float(rope.get("low_freq_factor") or 1.0),
        high_freq=float(rope.get("high_freq_factor") or 4.0),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        truncate=bool(rope.get("truncate", True)),
        magnitude=None if magnitude is None else float(magnitude),
        interleaved=interleaved,
    )


def rotary_to_hf(rotary: Rotary) -> dict[str, Any]:
    """``rope_parameters`` for ``config.json``; the inverse of :func:`rotary_from_hf`."""
    rope: dict[str, Any] = {"rope_type": rotary.kind, "rope_theta": rotary.theta}
    if rotary.kind == "default":
        return rope
    rope["factor"] = rotary.factor
    if rotary.kind != "linear":
        rope["original_max_position_embeddings"] = rotary.trained_length
    if rotary.kind == "llama3":
        rope |= {"low_freq_factor": rotary.low_freq, "high_freq_factor": rotary.high_freq}
    if rotary.kind == "yarn":
        rope |= {"beta_fast": rotary.beta_fast, "beta_slow": rotary.beta_slow, "truncate": rotary.truncate}
        rope["attention_factor"] = 1.0 if rotary.magnitude is None else rotary.magnitude
    return rope


def _yarn_magnitude(factor: float, mscale: float | None, mscale_all: float | None) -> float:
    def grow(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    return grow(mscale) / grow(mscale_all) if mscale and mscale_all else grow(1.0)


class Turns(NamedTuple):
    """What rotary attention is given: the tables of the model's own rotation, and the positions, for a layer that
    rotates in another way."""

    cos: Float[Array, "#batch length half"]
    sin: Float[Array, "#batch length half"]
    positions: Int[Array, "#batch length"]


def rotary_table(
    rotary: Rotary, positions: Int[Array, "batch length"]
) -> tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]:
    """Cosine and sine (B, L, size/2) of every position, float32; made once per forward pass for all layers."""
    half = np.arange(0, rotary.size, 2, dtype=np.float32) / rotary.size
    inverse = 1.0 / (np.float32(rotary.theta) ** half)  # (size/2,) radians per position
    if rotary.kind == "linear":
        inverse = inverse / rotary.factor
    elif rotary.kind == "llama3":
        inverse = _llama3(rotary, inverse)
    elif rotary.kind == "yarn":
        inverse = _yarn(rotary, inverse)
    elif rotary.kind == "dynamic":
        length = jnp.maximum(positions.max() + 1, rotary.trained_length).astype(jnp.float32)
        stretch = rotary.factor * length / rotary.trained_length - (rotary.factor - 1)
        inverse = 1.0 / ((rotary.theta * stretch ** (rotary.size / (rotary.size - 2))) ** half)
    angles = positions[..., None].astype(jnp.float32) * inverse
    magnitude = 1.0 if rotary.magnitude is None else rotary.magnitude
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def _llama3(rotary: Rotary, inverse: np.ndarray) -> np.ndarray:
    wavelength = 2 * np.pi / inverse
    cycles = rotary.trained_length / wavelength
    smooth = (cycles - rotary.low_freq) / (rotary.high_freq - rotary.low_freq)
    smooth = np.clip(smooth, 0, 1)
    return (1 - smooth) * inverse / rotary.factor + smooth * inverse


def _yarn(rotary: Rotary, inverse: np.ndarray) -> np.ndarray:
    def dimension(rotations: float) -> float:  # the dimension that turns so many times over the trained length
        return rotary.size * math.log(rotary.trained_length / (rotations * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low, high = dimension(rotary.beta_fast), dimension(rotary.beta_slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.size - 1)
    ramp = np.clip((np.arange(rotary.size // 2, dtype=np.float32) - low) / max(high - low, 1e-3), 0, 1)
    return inverse / rotary.factor * ramp + inverse * (1 - ramp)


def rotate(
    x: Float[Array, "batch length heads size"],
    table: Turns | tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]],
    interleaved: bool,
) -> Float[Array, "batch length heads size"]:
    """Rotate the first ``2 · half`` dimensions of each head by its position's angle; the rest passes through."""
    cos, sin = (t[:, :, None, :].astype(x.dtype) for t in table[:2])
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def relative_buckets(
    query: Int[Array, "q"], key: Int[Array, "k"], *, buckets: int = 32, max_distance: int = 128, bidirectional: bool
) -> Int[Array, "q k"]:
    """T5's buckets of the distance key − query (arXiv 1910.10683): exact when near, logarithmic when far.

    The logarithm is taken on the host, once per distance: an accelerator's rounding would move distances between
    buckets.
    """
    signed = buckets // 2 if bidirectional else buckets
    exact = signed // 2
    near = np.arange(max_distance + 1)
    far = np.log(np.maximum(near, 1).astype(np.float32) / np.float32(exact))
    far = far / np.float32(math.log(max_distance / exact))
    far = np.minimum(exact + (far * np.float32(signed - exact)).astype(np.int32), signed - 1)
    table = jnp.asarray(np.where(near < exact, near, far), jnp.int32)  # |distance| -> bucket
    distance = key[None, :] - query[:, None]
    if not bidirectional:
        return table[jnp.clip(-distance, 0, max_distance)]
    return jnp.where(distance > 0, signed, 0) + table[jnp.clip(jnp.abs(distance), 0, max_distance)]
