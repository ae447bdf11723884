"""Quantising one block of a transformer: Hessians of its linears, their solution, and a report on each.

With `true_sequential` the layers of a block are solved in the order in which data reach them, and the block is run
again between. Which layers share an input (query, key and value; gate and up) is read from the forward pass itself.
"""

import dataclasses
import logging
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers.compress import columns, hessian
from jaxformers.compress.calibration import Batch, collect, linears_of, shared_inputs, unwrap
from jaxformers.compress.grids import BITS, Grid
from jaxformers.weights.packed import FORMATS, PackedWeight, pack_codes
from jaxformers.weights.ternary import TernaryWeight
from jaxformers.weights.words import n_words

log = logging.getLogger(__name__)
METHODS = ("gptq", "rtn", "ternary")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to make of each layer; see :func:`jaxformers.compress.gptq.gptq`. Checks itself."""

    method: str = "gptq"
    bits: int = 4
    group_size: int = -1
    sym: bool = False
    act_order: bool = False
    static_groups: bool = False
    true_sequential: bool = False
    damp: float = 0.01
    mse: bool = False
    blocksize: int = 128
    scale_dtype: str = "float16"
    checkpoint_format: str = "gptq"

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: must be one of {METHODS}")
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits}: must be one of {BITS}")
        if self.method == "ternary" and self.bits != 2:
            raise ValueError(f"bits={self.bits}: a ternary weight has 2; leave bits out")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size}: must be -1 (one grid per output) or positive")
        if self.static_groups and self.group_size == -1:
            raise ValueError("static_groups: there are no groups; give a group_size")
        if not 0 < self.damp < 1:
            raise ValueError(f"damp={self.damp}: must lie between 0 and 1")
        if self.blocksize < 1:
            raise ValueError(f"blocksize={self.blocksize}: must be positive")
        if self.checkpoint_format not in FORMATS:
            raise ValueError(f"checkpoint_format={self.checkpoint_format!r}: must be one of {FORMATS}")
        if self.method == "rtn":
            for name in ("act_order", "static_groups", "true_sequential"):
                if getattr(self, name):
                    raise ValueError(f"{name}: rtn rounds each weight by itself and knows no order; use method='gptq'")
        self.grid  # its own checks  # noqa: B018

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.sym, self.mse, self.method == "ternary", self.scale_dtype)


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What became of one linear layer.

    ``loss``: Σ e² / 2 of the column loop (NaN for rtn). ``error`` and ``rtn_error``: ‖X(Q - W)‖² / ‖X W‖² over the
    calibration inputs X, of the result and of plain rounding; without calibration those of the weights alone.
    ``damp``: the damping used. ``note``: what did not go as asked, if anything.
    """

    path: str
    loss: float
    error: float
    rtn_error: float
    damp: float
    seconds: float
    note: str = ""


@jax.jit
def _relative_errors(
    kernel: jax.Array, H: jax.Array | None, grid: Grid, solutions: tuple[columns.Solved, ...]
) -> jax.Array:
    """(n,): ‖X(Q - W)‖² / ‖X W‖² of each solution Q, with XᵀX in proportion to H (the identity when None)."""
    kernel = kernel.astype(jnp.float32)
    size = lambda D: jnp.sum(D * (D if H is None else jnp.matmul(H, D, precision="highest")))  # noqa: E731
    sizes = jnp.stack([size(columns.dense(grid, solved) - kernel) for solved in solutions])
    return sizes / jnp.maximum(size(kernel), jnp.finfo(jnp.float32).tiny)


def quantize_kernel(
    kernel: jax.Array, mask: jax.Array | None, H: jax.Array | None, settings: Settings, path: str
) -> tuple[Any, LayerReport]:
    """One (in, out) kernel as a packed weight, given the Hessian of its inputs (None only for rtn).

    Raises ValueError naming ``path`` when the inputs are not finite, or no damping makes the Hessian factorise.
    """
    began, note, grid = time.perf_counter(), "", settings.grid
    if H is not None and not bool(jnp.all(jnp.isfinite(H))):
        raise ValueError(f"{path}: its inputs are not finite on the calibration data")
    kernel = kernel if mask is None else jnp.where(mask, kernel, 0)
    options = {"grid": grid, "group_size": settings.group_size}
    rtn = columns.round_to_nearest(kernel, mask, **options)
    solved = rtn
    if settings.method != "rtn":
        if not bool(jnp.any(jnp.diagonal(H))):
            note = "no input in the calibration data (an unused expert?): rounded to nearest"
        else:
            extra = {"act_order": settings.act_order, "static_groups": settings.static_groups}
            solved = columns.solve(kernel, H, settings.damp, mask, blocksize=settings.blocksize, **options, **extra)
            if not np.isfinite(float(solved.loss)):
                raise ValueError(
                    f"{path}: the Hessian cannot be factorised even with damp={float(solved.damp):.3g}; "
                    "use more calibration tokens or a larger damp"
                )
            if float(solved.damp) > 1.5 * settings.damp:
                note = f"factorised only with damp={float(solved.damp):.3g}: more calibration tokens would help"
    errors = np.asarray(_relative_errors(kernel, H, grid, (rtn,) if solved is rtn else (rtn, solved)))
    packed = _pack(solved, settings)
    jax.block_until_ready(packed)
    if note:
        log.warning("%s: %s", path, note)
    seconds = time.perf_counter() - began
    rtn_error, error = float(errors[0]), float(errors[-1])
    return packed, LayerReport(path, float(solved.loss), error, rtn_error, float(solved.damp), seconds, note)


def _pack(solved: columns.Solved, settings: Settings) -> PackedWeight | TernaryWeight:
    codes, zeros, scales = solved.codes, solved.zeros, solved.scales.astype(settings.scale_dtype)
    if settings.method == "ternary":
        if not settings.sym:
            levels = (scales, zeros.astype(settings.scale_dtype))
            return TernaryWeight.from_codes(codes, *levels, solved.g_idx, settings.group_size)
        # -s, 0, s are the codes 0, 1, 2 of a 2-bit grid whose zero is 1: every GPTQ reader can hold them
        codes, zeros = jnp.asarray([1, 2, 0], jnp.uint8)[codes], jnp.ones_like(zeros)
    return pack_codes(
        codes,
        zeros,
        scales,
        solved.g_idx,
        bits=settings.bits,
        group_size=settings.group_size,
        checkpoint_format=settings.checkpoint_format,
    )


def unpackable(shape: tuple[int, ...], bits: int) -> str:
    """Why a kernel of this shape has no place in the packed layout; "" when it has."""
    if shape[0] % 32:
        return f"kept dense: {shape[0]} inputs are not a multiple of 32"
    if n_words(shape[1], bits) * 32 != shape[1] * bits:
        return f"kept dense: {shape[1]} outputs do not fill whole words of {bits}-bit codes"
    return ""


def quantize_block(
    block: nnx.Module, batches: list[Batch] | None, settings: Settings, path: str
) -> tuple[dict[str, Any], list[LayerReport]]:
    """Quantise the linears of ``block`` in place; returns {path within the block: quantised kernel} and the reports.

    ``batches`` hold the block's inputs; None for rtn without calibration.
    """
    linears = linears_of(block)
    done: dict[str, Any] = {}
    reports: list[LayerReport] = []
    for name in [n for n, m in linears.items() if unpackable(m.kernel.get_value().shape, settings.bits)]:
        note = unpackable(linears.pop(name).kernel.get_value().shape, settings.bits)
        log.warning("%s.%s: %s", path, name, note)
        reports.append(LayerReport(f"{path}.{name}", 0.0, 0.0, 0.0, 0.0, 0.0, note))

    def finish(name: str, H: jax.Array | None) -> None:
        kernel, mask, rebuild = unwrap(linears[name].kernel.get_value())
        packed, report = quantize_kernel(jnp.asarray(kernel), mask, H, settings, f"{path}.{name}")
        done[name] = rebuild(packed)
        reports.append(report)

    groups: list[tuple[str, ...]] = []
    if batches is not None:
        x, context, _ = batches[0]
        groups = shared_inputs(block, x, context, list(linears))
    for name in set(linears) - {n for group in groups for n in group}:
        if settings.method != "rtn":
            raise ValueError(f"{path}.{name}: the block's forward pass never used this layer")
        finish(name, None)
    for stage in [[group] for group in groups] if settings.true_sequential else [groups]:
        Hs = collect(block, batches, stage, hessian.accumulate, 2) if stage else ()
        for group, H in zip(stage, Hs, strict=True):
            for name in group:
                finish(name, H)
        for name in done:
            linears[name].kernel.set_value(done[name])
    return done, reports
