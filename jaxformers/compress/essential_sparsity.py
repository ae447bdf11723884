"""Essential sparsity: how much of a pretrained transformer can be removed at once, for free, and what is removed.

Source: "The Emergence of Essential Sparsity in Large Pre-trained Models: The Weights that Matter", arXiv 2306.03805.
Weights are removed once, on the pretrained model, before any downstream step. The prunable set is every matrix of the
blocks' linear layers, n weights together; embeddings, norms, biases, poolers and heads stay. With the sparsity s,

    magnitude   the k = round(s · n) smallest |w| of all matrices together (global), or of each (layer)
    random      k weights at random; ERK: w survives with probability ε · (in + out) / (in · out), capped at 1
    N:M         all but the keep_n largest of every m consecutive inputs of an output
    wanda       |w| · sqrt(mean ‖X_j‖²), int(s · in) inputs of each output, by calibration inputs X         (pruning.py)
    sparsegpt   w² / U_ii² in blocks of 128 inputs, made up for by GPTQ's column solver     (pruning.py, columns.py)

What is removed is found by bisection on the device, never by sorting the model (threshold.py); of equal magnitudes the
first goes. sparsity_curve.py draws quality over s, says where it falls, and has the lottery ticket to compare with.

    pruned = jf.compress.prune(model, sparsity=0.5)
    jf.save(pruned.model, "half")                                    # an ordinary checkpoint, with zeros
    tuned = jf.fit(objective, jf.weights.add_masks(pruned.model, pruned.masks), data, …).model     # zeros stay zeros
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import paths, surgery, weights
from jaxformers.compress import hessian, pruning, threshold
from jaxformers.compress.calibration import (
    Batch,
    checked_calibration,
    collect,
    first_inputs,
    linears_of,
    shared_inputs,
    through_blocks,
    unwrap,
)
from jaxformers.weights.masked import settle_masks

METHODS = ("magnitude", "random", "erk", "wanda", "sparsegpt")
BLOCKS = "**.layers.**"
Masks = dict[str, jax.Array]  # path of a linear layer -> bool (in, out), True = kept


@dataclasses.dataclass(frozen=True)
class MatrixReport:
    """``removed`` of the ``size`` weights of the layer ``path``, of ``shape`` (in, out)."""

    path: str
    shape: tuple[int, int]
    removed: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Report:
    """The pruned matrices in order; as text, a table. ``parameters``: of the whole model."""

    matrices: tuple[MatrixReport, ...]
    parameters: int

    @property
    def sparsity(self) -> float:
        """The share removed of the prunable weights."""
        return sum(m.removed for m in self.matrices) / sum(m.size for m in self.matrices)

    @property
    def model_sparsity(self) -> float:
        """The share removed of all parameters of the model."""
        return sum(m.removed for m in self.matrices) / self.parameters

    def __str__(self) -> str:
        rows = [f"{m.path:<48} {m.shape!s:>16} {m.removed:>12,} {m.removed / m.size:>8.2%}" for m in self.matrices]
        whole = f"{self.model_sparsity:.2%} of {self.parameters:,} parameters"
        return "\n".join([*rows, f"{self.sparsity:.2%} of the prunable weights, {whole}"])


@dataclasses.dataclass(frozen=True)
class Pruned:
    """``model``: plain kernels with zeros, which every tool reads. ``masks``: {path: bool (in, out), True = kept}."""

    model: nnx.Module
    masks: Masks
    report: Report


def prune(
    model: nnx.Module,
    method: str = "magnitude",
    *,
    sparsity: float | None = None,
    keep_n: int | None = None,
    m: int | None = None,
    scope: str | None = None,
    include: paths.Patterns = BLOCKS,
    exclude: paths.Patterns = (),
    calibration: Any = None,
    key: jax.Array | None = None,
    damp: float = 0.01,
    blocksize: int = 128,
    batch_size: int = 8,
    strict: bool = True,
) -> Pruned:
    """Remove weights of ``model`` at once, without training; the old model is untouched.

    ``method``: "magnitude", "random", "erk", "wanda" or "sparsegpt", see the module. ``sparsity``: the share to remove,
    in [0, 1): exactly round(s · n) weights by magnitude and at random (half to even); in expectation by ERK; per output
    and per block of inputs as their papers have it by the last two. Or ``keep_n`` and ``m``: what *stays* of every
    ``m`` consecutive inputs (the official code counts what goes: its 1:4 is keep_n=3, m=4). ``strict`` False lets a
    last group of fewer than ``m`` inputs lose ``m - keep_n`` as well. ``scope`` "global" (default) or "layer": what
    magnitude and random compare. ``include``, ``exclude``: patterns of linear layers; no matrix, no part in it.
    ``calibration``: for wanda and sparsegpt, token ids (samples, length) or a batch by name (padding that its
    attention_mask tells of does not count), run through the model one block at a time, ``batch_size`` sequences a
    step; each block sees what the pruned blocks before it put out. ``damp``, ``blocksize``: SparseGPT's. ``key``: for
    the random methods.

    A mask that a kernel carries already is obeyed: what is gone stays gone, and counts. Low-rank updates stay on top.

    Raises ValueError: an option out of range, missing, or of another method; patterns that match nothing; m that does
    not divide the inputs; kernels that are quantised; weights or inputs that are not finite (naming the layer).
    """
    check_options(method, sparsity, keep_n, m, scope, calibration, key, damp, blocksize)
    targets = prunable(model, include, exclude)
    for path, (kernel, _) in targets.items():
        _check_groups(path, kernel.shape[0], keep_n, m, strict)
    if method in ("wanda", "sparsegpt"):
        batch = checked_calibration(model, calibration)
        outside = [path for path in targets if not path.startswith("layers.")]
        if outside:
            raise ValueError(f"include: {method} calibrates the model's layers, and {outside[0]} is not among them")
        options = {"sparsity": sparsity, "keep_n": keep_n, "m": m, "damp": damp, "blocksize": blocksize}
        new, masks = _by_calibration(model, targets, first_inputs(model, batch, batch_size), method, options)
        return _finished(new, masks)
    if method == "erk":
        masks = _erk_masks({path: kernel.shape for path, (kernel, _) in targets.items()}, sparsity, key)
    else:
        found = _keys(targets, key if method == "random" else None)
        masks = _smallest_removed(found, sparsity, keep_n, m, scope or "global")
    return apply_masks(model, masks)


def check_options(
    method: str, sparsity: Any, keep_n: Any, m: Any, scope: Any, calibration: Any, key: Any, damp: float, blocksize: int
) -> None:
    """Refuse what :func:`prune` cannot do, before anything is computed."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {METHODS}")
    if (sparsity is None) == (keep_n is None and m is None):
        raise ValueError("sparsity, keep_n, m: give either a sparsity or both keep_n and m")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: must be a share in [0, 1)")
    if sparsity is None and (keep_n is None or m is None or not 1 <= keep_n <= m):
        raise ValueError(f"keep_n={keep_n}, m={m}: of every m inputs keep_n stay, so 1 <= keep_n <= m")
    if method == "erk" and m is not None:
        raise ValueError("m: the densities of erk know no groups; give a sparsity")
    if scope not in (None, "global", "layer"):
        raise ValueError(f"scope={scope!r}: must be 'global' or 'layer'")
    if scope is not None and (method not in ("magnitude", "random") or m is not None):
        raise ValueError(f"scope={scope!r}: {method if m is None else 'N:M'} has a scope of its own; leave it out")
    calibrated = method in ("wanda", "sparsegpt")
    if calibrated and calibration is None:
        raise ValueError(f"calibration: method={method!r} needs token ids (samples, length)")
    if not calibrated and calibration is not None:
        raise ValueError(f"calibration: method={method!r} looks at the weights alone")
    if (method in ("random", "erk")) != (key is not None):
        raise ValueError("key: the random methods need one, jax.random.key(…), and only they")
    if not 0 < damp < 1:
        raise ValueError(f"damp={damp}: must lie between 0 and 1")
    if blocksize < 1:
        raise ValueError(f"blocksize={blocksize}: must be positive")


def _check_groups(path: str, inputs: int, keep_n: int | None, m: int | None, strict: bool) -> None:
    if m is None or inputs % m == 0:
        return
    if strict:
        raise ValueError(f"m={m}: it does not divide the {inputs} inputs of {path}; strict=False prunes the rest too")
    if inputs % m < m - keep_n:
        raise ValueError(f"m={m}: the last {inputs % m} inputs of {path} are fewer than the {m - keep_n} to remove")


def prunable(
    model: nnx.Module, include: paths.Patterns = BLOCKS, exclude: paths.Patterns = ()
) -> dict[str, tuple[jax.Array, jax.Array | None]]:
    """{path: (kernel (in, out), its mask or None)} of the linear layers that are pruned: matrices inside of blocks.

    Found by their place in the model, whatever its architecture and depth; a module that stands in two places counts
    once. Convolutions and the stacked matrices of experts are no linear layers and are not among them.

    Raises ValueError when nothing is left, for patterns of ``exclude`` that match nothing, and quantised kernels.
    """
    modules = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(getattr(module, "kernel", None), nnx.Variable) and len(module.kernel.get_value().shape) == 2
    }
    for pattern in paths.as_tuple(exclude):
        if not any(paths.matches(pattern, path) for path in modules):
            raise ValueError(f"exclude: {pattern!r} matches no linear layer; there are {', '.join([*modules][:6])}, …")
    found = {}
    for path, module in modules.items():
        if paths.matches(include, path) and not paths.matches(exclude, path):
            try:
                kernel, mask, _ = unwrap(module.kernel.get_value())
            except ValueError as error:
                raise ValueError(f"model: {path} is {error}; prune before that") from None
            found[path] = jnp.asarray(kernel), mask
    if not found:
        raise ValueError(f"include: no linear layer matches {paths.as_tuple(include)}; there are {[*modules][:6]}, …")
    return dict(sorted(found.items(), key=lambda item: surgery.natural(item[0])))


def apply_masks(model: nnx.Module, masks: Mapping[str, Any]) -> Pruned:
    """``model`` with zeros where ``masks`` {path: bool (in, out), True = kept} say so, for good: plain kernels.

    Masks that kernels carried are multiplied in. Raises ValueError as :func:`jaxformers.weights.add_masks` does.
    """
    weights.add_masks(model, masks)  # its checks
    new, both = surgery.copy(model), {}
    for path, linear in surgery.find_linears(new, tuple(masks)):
        kernel, own, rebuild = unwrap(linear.kernel.get_value())
        both[path] = jnp.asarray(masks[path]) if own is None else own & masks[path]
        linear.kernel.set_value(rebuild(jnp.where(both[path], kernel, jnp.zeros((), kernel.dtype))))
    return _finished(new, both)


def _finished(model: nnx.Module, masks: Masks) -> Pruned:
    flat = paths.flatten(nnx.to_pure_dict(nnx.state(model)))
    rows = tuple(MatrixReport(path, tuple(mask.shape), int(jnp.sum(~mask))) for path, mask in masks.items())
    return Pruned(settle_masks(model), masks, Report(rows, sum(paths.count(leaf) for leaf in flat.values())))


# ---- by the weights alone ------------------------------------------------------------------------------------------


def _keys(targets: Mapping[str, tuple], key: jax.Array | None) -> dict[str, jax.Array]:
    """What is removed first has the smallest key: by magnitude, or with a PRNG ``key`` by lot."""
    found = {}
    for i, (path, (kernel, mask)) in enumerate(targets.items()):
        if not bool(jnp.all(jnp.isfinite(kernel))):
            raise ValueError(f"model: {path} holds weights that are not finite")
        if key is not None:
            kernel = jax.random.uniform(jax.random.fold_in(key, i), kernel.shape)
        found[path] = threshold.keys(kernel, None if mask is None else jnp.asarray(mask))
    return found


def _smallest_removed(
    keys: Mapping[str, jax.Array], sparsity: float | None, keep_n: int | None, m: int | None, scope: str
) -> Masks:
    if m is not None:
        return {path: ~threshold.smallest_of_groups(k, m - keep_n, m) for path, k in keys.items()}
    groups = [[*keys]] if scope == "global" else [[path] for path in keys]
    masks = {}
    for group in groups:
        k = round(sparsity * sum(keys[path].size for path in group))
        found = threshold.smallest_of_all([keys[path] for path in group], k)
        masks |= {path: ~gone for path, gone in zip(group, found, strict=True)}
    return masks


def erk_densities(shapes: list[tuple[int, int]], sparsity: float) -> np.ndarray:
    """Erdős–Rényi-kernel densities, float64, one per matrix of ``shapes``; together they keep 1 - ``sparsity``.

    Raw densities are Σ shape / Π shape. ε solves Σ_sparse ε · raw · n = (1 - s) · Σ n - Σ_dense n; matrices whose
    ε · raw exceeds 1 are dense, and ε is computed anew (arXiv 1911.11134, as the official code has it).
    """
    sizes = np.asarray([math.prod(shape) for shape in shapes], np.float64)
    raw = np.asarray([sum(shape) for shape in shapes], np.float64) / sizes
    dense = np.zeros(len(sizes), bool)
    while True:
        wanted = ((1 - sparsity) * sizes[~dense]).sum() - (sparsity * sizes[dense]).sum()
        epsilon = wanted / (raw * sizes)[~dense].sum()
        density = np.where(dense, 1.0, epsilon * raw)
        if not (density > 1).any():
            return density
        dense |= raw == raw[~dense].max()


def _erk_masks(shapes: Mapping[str, tuple[int, int]], sparsity: float, key: jax.Array) -> Masks:
    density = erk_densities([*shapes.values()], sparsity)
    return {
        path: jax.random.uniform(jax.random.fold_in(key, i), shape) < float(p)
        for i, ((path, shape), p) in enumerate(zip(shapes.items(), density, strict=True))
    }


# ---- by calibration inputs -----------------------------------------------------------------------------------------


def _by_calibration(
    model: nnx.Module, targets: Mapping[str, Any], batches: list[Batch], method: str, options: dict[str, Any]
) -> tuple[nnx.Module, Masks]:
    """Wanda or SparseGPT, one block at a time: all linears of a block are judged by the same pass."""
    masks: Masks = {}

    def change(i: int, block: nnx.Module, batches: list[Batch] | None) -> dict[str, Any]:
        linears = {name: linear for name, linear in linears_of(block).items() if f"layers.{i}.{name}" in targets}
        if not linears:
            return {}
        groups = shared_inputs(block, *batches[0][:2], [*linears])
        unused = set(linears) - {name for group in groups for name in group}
        if unused:
            raise ValueError(f"layers.{i}.{min(unused)}: the block's forward pass never used this layer")
        measure = (hessian.accumulate_norms, 1) if method == "wanda" else (hessian.accumulate, 2)
        done = {}
        for group, statistic in zip(groups, collect(block, batches, groups, *measure), strict=True):
            if not bool(jnp.all(jnp.isfinite(statistic))):
                raise ValueError(f"layers.{i}.{group[0]}: its inputs are not finite on the calibration data")
            for name in group:
                kernel, own, rebuild = unwrap(linears[name].kernel.get_value())
                solve = _wanda if method == "wanda" else _sparsegpt
                values, masks[f"layers.{i}.{name}"] = solve(kernel, own, statistic, f"layers.{i}.{name}", options)
                done[name] = rebuild(values.astype(kernel.dtype))
        for name, kernel in done.items():
            linears[name].kernel.set_value(kernel)
        return done

    new = through_blocks(model, batches, change)
    return new, {path: masks[path] for path in targets}


def _wanda(kernel: Any, own: Any, norms: jax.Array, path: str, options: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    m, sparsity = options["m"], options["sparsity"]
    how = {"drop": int(kernel.shape[0] * sparsity)} if m is None else {"keep_n": options["keep_n"], "m": m}
    mask = pruning.wanda(kernel, norms, own, **how)
    return jnp.where(mask, kernel, jnp.zeros((), kernel.dtype)), mask


def _sparsegpt(kernel: Any, own: Any, H: jax.Array, path: str, options: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    if options["sparsity"] == 0:  # the rule `<= the int(0)-th score` would remove one
        mask = jnp.ones(kernel.shape, bool) if own is None else own
        return jnp.where(mask, kernel, jnp.zeros((), kernel.dtype)), mask
    found = pruning.sparsegpt(kernel, H, kept=own, **options)
    if not np.isfinite(float(found.loss)):
        raise ValueError(
            f"{path}: the Hessian cannot be factorised even with damp={float(found.damp):.3g}; "
            "use more calibration tokens or a larger damp"
        )
    return found.values, found.mask
