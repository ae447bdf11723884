"""What a step of a recipe can be: public functions of `jaxformers.compress` that need no loss of the user's, by name.

A dictionary, METHODS: how each is called, which options it takes, and what refuses options before anything runs.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxformers import compress, weights
from jaxformers.compress import essential_sparsity
from jaxformers.compress.block import Settings
from jaxformers.compress.rmsnorm import norm_form


@dataclasses.dataclass(frozen=True)
class Data:
    """What a step may use: ``calibration`` (token ids, or the model's inputs by name; None without), a ``key`` of its
    own, and a directory ``work`` for what it wants to keep until it has ended."""

    calibration: Any
    key: jax.Array
    work: Path


@dataclasses.dataclass(frozen=True)
class Method:
    """``apply(model, options, data) -> model``; the ``options`` it knows, and ``check(options)``, which raises for
    those that cannot be. ``calibrated``: it needs calibration data."""

    options: tuple[str, ...]
    check: Callable[[dict[str, Any]], Any]
    apply: Callable[[nnx.Module, dict[str, Any], Data], nnx.Module]
    calibrated: Callable[[dict[str, Any]], bool] = lambda options: False


def _fuse_config(options: dict[str, Any]) -> compress.FuseConfig:
    return compress.FuseConfig(**({"rate": None} if "layers" in options else {}), **options)


def _fuse(model: nnx.Module, options: dict[str, Any], data: Data) -> nnx.Module:
    ids = _ids(data.calibration, "fusegpt")
    return compress.fuse_layers(model, ids, _fuse_config(options), key=data.key, work_directory=data.work).model


def _quantize(model: nnx.Module, options: dict[str, Any], data: Data) -> nnx.Module:
    return compress.gptq(model, data.calibration, work_directory=data.work, **options)


@dataclasses.dataclass(frozen=True)
class Removal:
    """``count`` layers go, those of the least influence ``by``: "macro" (measured anew after each) or "block"."""

    count: int
    by: str = "macro"
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.by not in ("macro", "block"):
            raise ValueError(f"by={self.by!r}: must be 'macro' or 'block'")
        if not self.count >= 1:
            raise ValueError(f"count={self.count}: must be 1 or more")


def _remove(model: nnx.Module, options: dict[str, Any], data: Data) -> nnx.Module:
    config, ids = Removal(**options), _ids(data.calibration, "remove_layers")
    if config.by == "block":
        ranked = np.argsort(compress.block_influence(model, ids, batch_size=config.batch_size), kind="stable")
        return compress.remove_layers(model, ranked[: config.count].tolist())
    for _ in range(config.count):
        least = int(np.argmin(compress.macro_influence(model, ids, batch_size=config.batch_size)))
        model = compress.remove_layers(model, [least])
    return model


@dataclasses.dataclass(frozen=True)
class Pruning:
    """What :func:`jaxformers.compress.prune` takes, its method as ``by``. ``masks``: kernels keep their masks, so that
    later steps keep the zeros; False leaves plain kernels, for steps that refuse masks."""

    by: str = "magnitude"
    sparsity: float | None = None
    keep_n: int | None = None
    m: int | None = None
    scope: str | None = None
    include: str | Sequence[str] = essential_sparsity.BLOCKS
    exclude: str | Sequence[str] = ()
    damp: float = 0.01
    blocksize: int = 128
    batch_size: int = 8
    strict: bool = True
    masks: bool = True

    def __post_init__(self) -> None:
        calibration, key = self.by in CALIBRATED or None, self.by in ("random", "erk") or None  # there will be some
        essential_sparsity.check_options(
            self.by, self.sparsity, self.keep_n, self.m, self.scope, calibration, key, self.damp, self.blocksize
        )


CALIBRATED = ("wanda", "sparsegpt")


def _prune(model: nnx.Module, options: dict[str, Any], data: Data) -> nnx.Module:
    given = dataclasses.asdict(Pruning(**options))
    by, keep = given.pop("by"), given.pop("masks")
    given |= {"calibration": data.calibration} if by in CALIBRATED else {}
    given |= {"key": data.key} if by in ("random", "erk") else {}
    pruned = compress.prune(model, by, **given)
    return weights.add_masks(pruned.model, pruned.masks) if keep else pruned.model


def _ids(calibration: Any, method: str) -> np.ndarray:
    ids = calibration.get("input_ids") if isinstance(calibration, Mapping) else calibration
    if ids is None or (isinstance(calibration, Mapping) and len(calibration) > 1):
        raise ValueError(f"calibration: {method} needs token ids (sequences, length) of full length, and nothing else")
    return ids


def _fields(config: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(config))


def _keywords(function: Callable, *without: str) -> tuple[str, ...]:
    """The arguments of ``function`` behind the model, but those that the recipe gives itself."""
    _, *found = inspect.signature(function).parameters
    return tuple(name for name in found if name not in without)


def _plain(function: Callable, *without: str) -> Method:
    """A function of the model and of options that it checks itself."""
    names = _keywords(function, *without)
    needed = [n for n in names if inspect.signature(function).parameters[n].default is inspect.Parameter.empty]

    def check(options: dict[str, Any]) -> None:
        for name in needed:
            if name not in options:
                raise ValueError(f"{name} is missing")

    return Method(names, check, lambda model, options, data: function(model, **options))


ALWAYS = lambda options: True  # noqa: E731
METHODS: dict[str, Method] = {
    "convert_norm": Method(
        ("target", "fold_affine", "pad", "streams"),
        lambda options: norm_form(**{name: value for name, value in options.items() if name != "streams"}),
        lambda model, options, data: compress.convert_norm(model, **options),
    ),
    "dequantize": Method((), lambda options: None, lambda model, options, data: compress.dequantize(model)),
    "fusegpt": Method(_fields(compress.FuseConfig), _fuse_config, _fuse, ALWAYS),
    "gptq": Method(
        _fields(Settings),
        lambda options: Settings(**options),
        _quantize,
        lambda options: options.get("method", "gptq") != "rtn",
    ),
    "prune": Method(
        _fields(Pruning), lambda options: Pruning(**options), _prune, lambda options: options.get("by") in CALIBRATED
    ),
    "remove_layers": Method(_fields(Removal), lambda options: Removal(**options), _remove, ALWAYS),
    "upcycle_mla": _plain(compress.upcycle_mla, "report", "key"),
}
