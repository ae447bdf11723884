"""Uniform quantisation grids: which float values a low-bit weight may take, and the nearest of them.

Source: GPTQ, arXiv 2210.17323, and the quantiser of its official code. A grid belongs to a slice `x` of a weight (one
output unit, or one output unit within one group of inputs). With `maxq = 2^bits - 1` and zero always representable,

    xmin = min(min x, 0), xmax = max(max x, 0);    symmetric: xmax = max(|xmin|, xmax), xmin = -xmax where xmin < 0
    scale = (xmax - xmin) / maxq,   zero = (maxq + 1) / 2 if symmetric else round(-xmin / scale)
    code = clip(round(x / scale) + zero, 0, maxq),   value = scale * (code - zero)

Ternary grids have three values, `zero <= 0 <= scale` (here `zero` is a value, not a code). Kernels are (in, out), so a
slice runs along the second axis from the end: parameters of an (..., columns, out) array have shape (..., out).
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

BITS = (2, 3, 4, 8)
SCALE_DTYPES = ("float32", "float16", "bfloat16")
# The clipping search of the official quantiser: shrink both ends by 0 %, 1 %, ... 79 %; error |value - x|^2.4.
MSE_STEPS, MSE_GRID, MSE_NORM = 80, 100, 2.4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Grid:
    """What kind of grid. A pytree: `bits` is traced under jit (other bits, same compiled code), the rest is static.

    `sym` reproduces the official quirk: a slice without negative entries keeps `scale = xmax / maxq` but places zero in
    the middle, so its upper half clips. `scale_dtype` rounds each scale to the type it will be stored in before any
    weight is rounded, so what is solved for is exactly what a file holds ("float32": as the official code).
    """

    bits: int = 4
    sym: bool = field(metadata={"static": True}, default=False)
    mse: bool = field(metadata={"static": True}, default=False)
    ternary: bool = field(metadata={"static": True}, default=False)
    scale_dtype: str = field(metadata={"static": True}, default="float32")

    def __post_init__(self):
        if isinstance(self.bits, int) and self.bits not in BITS:
            raise ValueError(f"bits={self.bits}: must be one of {BITS}")
        if self.ternary and self.mse:
            raise ValueError("mse=True has no meaning for a ternary grid, whose levels are the extremes of the slice")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype={self.scale_dtype!r}: must be one of {SCALE_DTYPES}")

    @property
    def maxq(self) -> int | Array:
        return (1 << self.bits) - 1


def _divide(a: Array, b: Array | float) -> Array:
    """`a / b` for b > 0, correctly rounded under XLA.

    XLA turns a / constant and a / broadcast(b) into products with a reciprocal, and a / (b / c) into a c / b: an ulp
    off, which matters because the extreme of a symmetric slice lies on a rounding tie. The maximum changes no value and
    makes the divisor too opaque for that.
    """
    return a / jnp.maximum(b, jnp.minimum(a, 0.0))


def _stored(scale: Array, dtype: str) -> Array:
    """`scale` rounded to what `dtype` can hold, never to 0 or infinity (magnitude clipped to the finite range)."""
    if dtype == "float32":
        return scale
    info = jnp.finfo(dtype)
    tiny = float(info.smallest_subnormal) if dtype == "float16" else float(info.tiny)
    size = jnp.clip(jnp.abs(scale), tiny, float(info.max))
    return jnp.where(scale == 0, 0.0, jnp.sign(scale) * size).astype(dtype).astype(jnp.float32)


def quantize(grid: Grid, x: Float[Array, "... n out"], scale: Array, zero: Array) -> UInt8[Array, "... n out"]:
    """Codes of the grid values nearest to `x`; `scale` and `zero` broadcast against it. Rounds half to even.

    Ternary codes are 0 (zero), 1 (the positive level `scale`), 2 (the negative level `zero`).
    """
    if grid.ternary:
        return jnp.where(x > scale / 2, 1, jnp.where(x < zero / 2, 2, 0)).astype(jnp.uint8)
    return jnp.clip(jnp.round(_divide(x, scale)) + zero, 0, grid.maxq).astype(jnp.uint8)


def dequantize(grid: Grid, codes: UInt8[Array, "... n out"], scale: Array, zero: Array) -> Float[Array, "... n out"]:
    """The float32 values that `codes` stand for."""
    if grid.ternary:
        return jnp.where(codes == 1, scale, jnp.where(codes == 2, zero, 0.0))
    return scale * (codes.astype(jnp.float32) - zero)


def zero_code(grid: Grid, zero: Array) -> Array:
    """The code whose value is exactly 0."""
    return jnp.zeros(zero.shape, jnp.uint8) if grid.ternary else zero.astype(jnp.uint8)


def fit(grid: Grid, x: Float[Array, "... n out"]) -> tuple[Float[Array, "... out"], Float[Array, "... out"]]:
    """(scale, zero) in float32 for each slice `x[..., :, o]`; rows of zeros appended to `x` change nothing."""
    x = x.astype(jnp.float32)
    xmin, xmax = jnp.minimum(x.min(-2), 0.0), jnp.maximum(x.max(-2), 0.0)
    if grid.sym:
        xmax = jnp.maximum(-xmin, xmax)
        xmin = jnp.where(xmin < 0, -xmax, xmin)
    empty = (xmin == 0) & (xmax == 0)
    xmin, xmax = jnp.where(empty, -1.0, xmin), jnp.where(empty, 1.0, xmax)
    if grid.ternary:
        return _stored(xmax, grid.scale_dtype), _stored(xmin, grid.scale_dtype)

    def between(low, high):
        scale = _stored(_divide(high - low, grid.maxq), grid.scale_dtype)
        middle = jnp.full_like(scale, (grid.maxq + 1) / 2)
        return scale, middle if grid.sym else jnp.clip(jnp.round(_divide(-low, scale)), 0, grid.maxq)

    scale, zero = between(xmin, xmax)
    if not grid.mse:
        return scale, zero

    shrinkage = jnp.asarray([1 - i / MSE_GRID for i in range(MSE_STEPS)], jnp.float32)

    def shrink(i, best):
        error, scale, zero = best
        scale_i, zero_i = between(shrinkage[i] * xmin, shrinkage[i] * xmax)
        s, z = scale_i[..., None, :], zero_i[..., None, :]
        error_i = jnp.sum(jnp.abs(dequantize(grid, quantize(grid, x, s, z), s, z) - x) ** MSE_NORM, axis=-2)
        better = error_i < error
        pick = lambda new, old: jnp.where(better, new, old)  # noqa: E731
        return pick(error_i, error), pick(scale_i, scale), pick(zero_i, zero)

    return jax.lax.fori_loop(0, MSE_STEPS, shrink, (jnp.full_like(scale, jnp.inf), scale, zero))[1:]
