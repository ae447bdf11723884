"""Fake quantisation: round values to few levels going forward, and let the gradient pass as if nothing had happened.

What quantisation-aware training needs. A quantiser's result is an array of its argument's shape and dtype whose entries
take few values; the straight-through gradient (arXiv 1308.3432) is that of the identity, less what the clipping at
``[-clip, clip]`` cuts off: 0 at and beyond the clip. Scales are constants to it, but for :func:`lsq`, which learns one.

``granularity`` says which entries share a scale: ``"tensor"`` all of them, ``"row"`` those along the last axis,
``"column"`` those along the last but one, ``"head"`` those of the last two axes (one scale per batch element and head
of (B, H, L, size)). Scales are computed in float32 at least.

Typed weights that quantise as they are used are in :mod:`jaxformers.weights.fake`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

AXES = {"tensor": None, "row": (-1,), "column": (-2,), "head": (-2, -1)}
CLIP = 2.5  # of TernaryBERT and Teacher Intervention
KINDS = ("twn", "symmetric", "asymmetric", "lsq")
Granularity = Literal["tensor", "row", "column", "head"]


@dataclasses.dataclass(frozen=True)
class Quantiser:
    """A quantiser as data: what a model keeps and ``config.json`` records. Call it on an array.

    ``kind``: "twn" (ternary; ``bits`` is 2), "symmetric", "asymmetric" or "lsq" (whose learnt scale is given at each
    call; it clips by that scale, ``clip`` is not used). Raises ValueError for what the kind does not have.
    """

    kind: Literal["twn", "symmetric", "asymmetric", "lsq"]
    bits: int = 8
    granularity: Granularity = "tensor"
    clip: float | None = CLIP

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: a quantiser is one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "twn" and self.bits != 2:
            raise ValueError(f"bits: ternary weights take 2, got {self.bits}")
        _check_bits(self.bits, 1 if self.kind == "asymmetric" else 2, self.kind)
        _axes(self.granularity)
        _check_clip(self.clip)
        if self.kind == "lsq" and self.granularity == "head":
            raise ValueError("granularity: lsq learns a scale per tensor, row or column, not per head")

    def __call__(self, x: Float[Array, "*shape"], scale: jax.Array | None = None) -> Float[Array, "*shape"]:
        """``x`` rounded. ``scale``: the learnt one of "lsq", which needs it; nothing else takes one."""
        if (scale is not None) != (self.kind == "lsq"):
            raise ValueError(f"scale: {'lsq needs one' if scale is None else f'{self.kind} makes its own'}")
        if self.kind == "twn":
            return twn(x, self.granularity, clip=self.clip)
        if self.kind == "lsq":
            return lsq(x, scale, self.bits)
        rule = symmetric if self.kind == "symmetric" else asymmetric
        return rule(x, self.bits, self.granularity, clip=self.clip)


def twn(
    w: Float[Array, "*shape"],
    granularity: Granularity = "tensor",
    *,
    clip: float | None = CLIP,
    mean_scale: float = 0.7,
) -> Float[Array, "*shape"]:
    """Ternary weights (TWN, arXiv 1605.04711): 0 or ± the mean magnitude of what exceeds a threshold.

    With w clipped, ``Δ = mean_scale · mean|w|``, ``m = |w| > Δ``: ``α sign(w) m`` with ``α = Σ|w|m / Σm`` over each
    group. A group of zeros gives zeros. Raises ValueError for an unknown granularity or a clip that is not positive.
    """
    axes = _axes(granularity)
    _check_clip(clip)

    def rounded(w: jax.Array) -> jax.Array:
        size = jnp.abs(w)
        kept = size > mean_scale * size.mean(axes, keepdims=True)
        count = kept.sum(axes, keepdims=True)
        total = jnp.where(kept, size, 0).sum(axes, keepdims=True)
        return jnp.where(kept, jnp.sign(w) * (total / jnp.maximum(count, 1)), 0)

    return _straight_through(rounded, clip, w)


def symmetric(
    x: Float[Array, "*shape"], bits: int = 8, granularity: Granularity = "tensor", *, clip: float | None = CLIP
) -> Float[Array, "*shape"]:
    """Uniform levels around 0: ``round(x s) / s``, ``s = (2^(bits-1) − 1) / max|x|`` of each group, halves to even.

    Computed in float32 at least. Zeros give zeros, and so do groups whose s float32 cannot hold. Raises ValueError for
    fewer than 2 bits (there is no level but 0), and as :func:`twn`.
    """
    _check_bits(bits, 2, "symmetric")
    axes, levels = _axes(granularity), 2 ** (bits - 1) - 1
    _check_clip(clip)

    def rounded(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # in float16 s would be infinite from 0.002 down
        largest = jnp.abs(wide).max(axes, keepdims=True)
        s = levels / jnp.where(largest > levels * jnp.finfo(wide.dtype).tiny, largest, 1)
        return (jnp.round(wide * s) / s).astype(x.dtype)

    return _straight_through(rounded, clip, x)


def asymmetric(
    x: Float[Array, "*shape"], bits: int = 8, granularity: Granularity = "tensor", *, clip: float | None = CLIP
) -> Float[Array, "*shape"]:
    """Uniform levels from the smallest to the largest value of each group:

    ``round((x − min) / (max − min + 1e-8) · n) / n · (max − min + 1e-8) + min``, ``n = 2^bits − 1``. Raises ValueError
    for fewer than 1 bit, and as :func:`twn`.
    """
    _check_bits(bits, 1, "asymmetric")
    axes, n = _axes(granularity), 2**bits - 1
    _check_clip(clip)

    def rounded(x: jax.Array) -> jax.Array:
        low = x.min(axes, keepdims=True)
        span = x.max(axes, keepdims=True) - low + 1e-8
        return jnp.round((x - low) / span * n) / n * span + low

    return _straight_through(rounded, clip, x)


def lsq(
    x: Float[Array, "*shape"], scale: Float[Array, "*group"], bits: int = 8, *, signed: bool = True
) -> Float[Array, "*shape"]:
    """Uniform levels of a learnt step (LSQ, arXiv 1902.08153, equations 1 to 3): ``s clip(round(x / s), −Qn, Qp)``.

    Qn = 2^(bits−1), Qp = 2^(bits−1) − 1, or 0 and 2^bits − 1 where not ``signed``. ``scale`` s > 0 broadcasts to x. Its
    gradient is ``round(x/s) − x/s`` inside of (−Qn, Qp), −Qn and Qp outside, times ``1 / sqrt(N Qp)`` with N entries of
    x a scale (section 2.2); that of x is 1 inside and 0 outside. :func:`lsq_scale` is where s begins.

    Raises ValueError for fewer than 2 bits (1 where not signed).
    """
    low, high = _lsq_levels(bits, signed)
    return _lsq(low, high, x, scale).astype(x.dtype)


def lsq_scale(x: Float[Array, "*shape"], bits: int = 8, granularity: Granularity = "tensor", *, signed: bool = True):
    """LSQ's first step, ``2 mean|x| / sqrt(Qp)`` of each group (arXiv 1902.08153, section 2.1); axes of x are kept."""
    _, high = _lsq_levels(bits, signed)
    size = jnp.abs(x.astype(_wide(x))).mean(_axes(granularity), keepdims=True)
    return jnp.maximum(2 * size / math.sqrt(high), 1e-8)  # zeros would leave nothing to divide by


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _straight_through(rounded: Callable, clip: float | None, x: jax.Array) -> jax.Array:
    wide = x.astype(_wide(x))
    return rounded(wide if clip is None else jnp.clip(wide, -clip, clip)).astype(x.dtype)


@_straight_through.defjvp
def _(rounded, clip, primals, tangents):
    (x,), (t,) = primals, tangents
    return _straight_through(rounded, clip, x), t if clip is None else jnp.where(jnp.abs(x) < clip, t, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _lsq(low: int, high: int, x: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * jnp.clip(jnp.round(x / scale), low, high)


@_lsq.defjvp
def _(low, high, primals, tangents):
    (x, scale), (dx, ds) = primals, tangents
    ratio = x / scale
    inside = (ratio > low) & (ratio < high)
    by_scale = jnp.where(inside, jnp.round(ratio) - ratio, jnp.clip(ratio, low, high))
    damp = 1 / math.sqrt(x.size / scale.size * high)
    return _lsq(low, high, x, scale), jnp.where(inside, dx, 0) + by_scale * damp * ds


def _lsq_levels(bits: int, signed: bool) -> tuple[int, int]:
    _check_bits(bits, 2 if signed else 1, "lsq")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def _check_bits(bits: Any, least: int, kind: str) -> None:
    if type(bits) is not int or not least <= bits <= 16:
        raise ValueError(f"bits: {kind} takes {least} to 16, got {bits!r}")


def _check_clip(clip: float | None) -> None:
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: expected a number above 0, or None for no clipping, got {clip}")


def _axes(granularity: str) -> tuple[int, ...] | None:
    if granularity not in AXES:
        raise ValueError(f"granularity: expected one of {', '.join(AXES)}, got {granularity!r}")
    return AXES[granularity]


def _wide(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


# Teacher Intervention's: ternary weights, 8-bit activations
TERNARY = Quantiser("twn", 2)
EIGHT_BITS = Quantiser("symmetric", 8)
