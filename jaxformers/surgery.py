"""Surgery: functions ``model -> model`` that leave the old model untouched and say in the new one what they did.

A function that changes a model's structure works on :func:`copy`, and ends with :func:`record`. The record is saved in
``config.json`` (under ``jaxformers``), and ``jf.load`` replays it on the abstract model before it reads any weight.
"""

import functools
import importlib
import json
import re
from typing import Any

from flax import nnx

from jaxformers import paths
from jaxformers.safetensors_file import show


def named(model: nnx.Module) -> nnx.Module:
    """Write every module's own dotted path into its ``path`` attribute, in place: site names come from there."""
    for path, module in nnx.iter_modules(model):
        if hasattr(module, "path"):
            module.path = ".".join(str(part) for part in path)
    return model


def copy(model: nnx.Module) -> nnx.Module:
    """A model with modules of its own that shares the arrays (they are immutable) of ``model``."""
    return named(nnx.clone(model))


def with_kernels(model: nnx.Module) -> list[tuple[str, Any]]:
    """``[(path, module)]`` of everything that has a kernel, convolutions and experts too, in the model's order."""
    found = [(".".join(map(str, path)), module) for path, module in nnx.iter_modules(model)]
    held = [(path, m) for path, m in found if isinstance(getattr(m, "kernel", None), nnx.Variable)]
    return sorted(held, key=lambda hit: natural(hit[0]))


def find_linears(model: nnx.Module, patterns: paths.Patterns) -> list[tuple[str, Any]]:
    """``[(path, Linear)]`` in the model's order, those whose path matches. Raises ValueError when none does,
    or when one has no matrix as kernel."""
    found = [
        (".".join(map(str, path)), module) for path, module in nnx.iter_modules(model) if hasattr(module, "kernel")
    ]
    hits = [(path, module) for path, module in found if paths.matches(patterns, path)]
    if not hits:
        known = ", ".join(path for path, _ in found[:6])
        raise ValueError(f"targets {paths.as_tuple(patterns)}: no linear layer matches; there are {known}, …")
    for path, module in hits:
        if len(shape := module.kernel.get_value().shape) != 2:
            raise ValueError(
                f"targets {paths.as_tuple(patterns)}: {path} has a kernel of shape {tuple(shape)}, no matrix (it is a "
                "convolution, or the experts of a mixture); leave it out"
            )
    return sorted(hits, key=lambda hit: natural(hit[0]))


def natural(path: str) -> tuple:
    """A key that sorts dotted paths with numbers in them as numbers."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split("."))


def record(model: nnx.Module, function: str, **arguments: Any) -> nnx.Module:
    """Note that ``function`` ("package.module:name") with JSON ``arguments`` rebuilds the structure made here."""
    model.surgery = (*model.surgery, (function, json.dumps(arguments)))
    return model


def forget(model: nnx.Module, function: str) -> nnx.Module:
    """Drop the records of ``function``: its change has been undone."""
    model.surgery = tuple(entry for entry in model.surgery if entry[0] != function)
    return model


def replay(model: nnx.Module, section: Any) -> nnx.Module:
    """Rebuild on an (abstract) model the surgery recorded in ``section``: what ``config.json`` has as ``jaxformers``.

    A configuration comes from anywhere: it may name only functions of this package that are called ``abstract_…`` (with
    or without an underscore before), which rebuild a structure and do nothing else. Raises ValueError for all others.
    """
    records = ((section or {}).get("surgery") or []) if isinstance(section, dict | None) else section
    if not isinstance(records, list) or not all(isinstance(entry, dict) for entry in records):
        raise ValueError("config.json: jaxformers.surgery must be a list of records")
    for entry in records:
        function, arguments = entry.get("function"), entry.get("arguments") or {}
        module_name, _, name = str(function).partition(":")
        allowed = re.fullmatch(r"jaxformers(\.\w+)+", module_name) and re.fullmatch(r"_?abstract_\w+", name)
        if not allowed or not isinstance(arguments, dict):
            raise ValueError(f"config.json: {show(function)} is no surgery of jaxformers that can be replayed")
        try:
            rebuild = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"config.json: this version of jaxformers has no {module_name}:{name}") from error
        try:
            model = nnx.eval_shape(functools.partial(rebuild, **arguments), model)  # whatever size is asked for
        except TypeError as error:
            raise ValueError(f"config.json: surgery {module_name}:{name}: {show(str(error), 200)}") from error
    return model


def to_json(model: nnx.Module) -> list[dict[str, Any]]:
    """The model's records as ``config.json`` holds them."""
    return [{"function": function, "arguments": json.loads(arguments)} for function, arguments in model.surgery]
