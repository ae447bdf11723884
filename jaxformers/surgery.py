"""Surgery: functions ``model -> model`` that leave the old model untouched and say in the new one what they did.

A function that changes a model's structure works on :func:`copy`, and ends with :func:`record`. The record is saved in
``config.json`` (under ``jaxformers``), and ``jf.load`` replays it on the abstract model before it reads any weight.
"""

import importlib
import json
from typing import Any

from flax import nnx

from jaxformers import paths


def named(model: nnx.Module) -> nnx.Module:
    """Write every module's own dotted path into its ``path`` attribute, in place: site names come from there."""
    for path, module in nnx.iter_modules(model):
        if hasattr(module, "path"):
            module.path = ".".join(str(part) for part in path)
    return model


def copy(model: nnx.Module) -> nnx.Module:
    """A model with modules of its own that shares the arrays (they are immutable) of ``model``."""
    return named(nnx.clone(model))


def find_linears(model: nnx.Module, patterns: paths.Patterns) -> list[tuple[str, Any]]:
    """``[(path, Linear)]`` in the model's order, those whose path matches. Raises ValueError when none does."""
    found = [
        (".".join(map(str, path)), module) for path, module in nnx.iter_modules(model) if hasattr(module, "kernel")
    ]
    hits = [(path, module) for path, module in found if paths.matches(patterns, path)]
    if not hits:
        known = ", ".join(path for path, _ in found[:6])
        raise ValueError(f"targets {paths.as_tuple(patterns)}: no linear layer matches; there are {known}, …")
    return sorted(hits, key=lambda hit: _natural(hit[0]))


def _natural(path: str) -> tuple:
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split("."))


def record(model: nnx.Module, function: str, **arguments: Any) -> nnx.Module:
    """Note that ``function`` ("package.module:name") with JSON ``arguments`` rebuilds the structure made here."""
    model.surgery = (*model.surgery, (function, json.dumps(arguments)))
    return model


def forget(model: nnx.Module, function: str) -> nnx.Module:
    """Drop the records of ``function``: its change has been undone."""
    model.surgery = tuple(entry for entry in model.surgery if entry[0] != function)
    return model


def replay(model: nnx.Module, records: list[dict[str, Any]]) -> nnx.Module:
    """Rebuild recorded surgery on an (abstract) model. Raises ValueError for a function outside jaxformers."""
    for entry in records:
        module_name, _, name = str(entry.get("function", "")).partition(":")
        if not module_name.startswith("jaxformers.") or not name.isidentifier():
            raise ValueError(f"config.json: surgery {entry.get('function')!r} is no function of jaxformers")
        try:
            function = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"config.json: this version of jaxformers has no {module_name}:{name}") from error
        model = function(model, **entry.get("arguments", {}))
    return model


def to_json(model: nnx.Module) -> list[dict[str, Any]]:
    """The model's records as ``config.json`` holds them."""
    return [{"function": function, "arguments": json.loads(arguments)} for function, arguments in model.surgery]
