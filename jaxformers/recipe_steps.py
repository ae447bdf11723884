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
from jaxformers.compress import essential_sparsity, vtrans_prune
from jaxformers.compress.block import Settings
from jaxformers.compress.rmsnorm import norm_form


@dataclasses.dataclass(frozen=True)
class Data:
    """What a step may use: ``calibration`` (token ids, or the model's inputs by name; None without), the ``labels`` of
    its rows where there are any, a ``key`` of its own, and a directory ``work`` for what it wants to keep until it has
    ended."""

    calibration: Any
    labels: np.ndarray | None
    key: jax.Array
    work: Path


@dataclasses.dataclass(frozen=True)
class Method:
    """``apply(model, options, data) -> model``; the ``options`` it knows, and ``check(options)``, which raises for
    those that cannot be. ``calibrated``: it needs calibration data; ``trains``: it learns from them, the next token or
    their labels."""

    options: tuple[str, ...]
    check: Callable[[dict[str, Any]], Any]
    apply: Callable[[nnx.Module, dict[str, Any], Data], nnx.Module]
    calibrated: Callable[[dict[str, Any]], bool] = lambda options: False
    trains: bool = False


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


def _gating(options: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """What :func:`jaxformers.compress.vib_prune` is called with, and whether the model as it was teaches."""
    own = {"units": vtrans_prune.KINDS, "mode": "full"} | {name: options[name] for name in GATED if name in options}
    own["units"] = tuple(own["units"])
    if "budget" not in own:
        raise ValueError("budget is missing, such as {params = 0.5}")
    vtrans_prune.check_options(own["budget"], own["units"], own["mode"])
    given = {name: value for name, value in options.items() if name not in GATED}
    distil = given.pop("distil", False)
    if not isinstance(distil, bool | Mapping):
        raise ValueError(f"distil: expected true, false or a table of {', '.join(_fields(compress.DistilConfig))}")
    if isinstance(distil, Mapping):
        unknown = set(distil) - set(_fields(compress.DistilConfig))
        if unknown:
            raise ValueError(f"distil: no option {sorted(unknown)[0]!r}; {', '.join(_fields(compress.DistilConfig))}")
        given["distil"] = compress.DistilConfig(**distil)
    return own | {"config": compress.VTransConfig(**given, timed=False)}, distil is not False


GATED = ("budget", "units", "mode", "embeddings")


def _gate(model: nnx.Module, options: dict[str, Any], data: Data) -> nnx.Module:
    given, distil = _gating(options)
    rows = dict(data.calibration) if isinstance(data.calibration, Mapping) else {"input_ids": data.calibration}
    rows |= {} if data.labels is None else {"labels": data.labels}
    teacher = model if distil else None
    return compress.vib_prune(model, rows, given.pop("budget"), teacher=teacher, key=data.key, **given).model


def _upcycle(model: nnx.Module, options: dict[str, Any], data: Data) -> nnx.Module:
    key = data.key if options.get("init") == "random" else None
    return compress.upcycle_mla(model, key=key, **options)


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


def _complete(function: Callable) -> Callable[[dict[str, Any]], None]:
    """A check that options have the arguments which ``function`` cannot do without; the others it checks itself."""
    _, *rest = inspect.signature(function).parameters.values()
    needed = [p.name for p in rest if p.default is inspect.Parameter.empty]

    def check(options: dict[str, Any]) -> None:
        for name in needed:
            if name not in options:
                raise ValueError(f"{name} is missing")

    return check


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
    "upcycle_mla": Method(_keywords(compress.upcycle_mla, "report", "key"), _complete(compress.upcycle_mla), _upcycle),
    "vtrans": Method(
        (*GATED, *(name for name in _fields(compress.VTransConfig) if name != "timed")),
        _gating,
        _gate,
        ALWAYS,
        trains=True,
    ),
}
