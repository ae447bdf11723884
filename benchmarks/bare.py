"""`jaxformers.kernels` on a machine that has jax and none of the library's other dependencies.

Importing a sub-package runs the package's own ``__init__`` first, which imports flax and more. Here the two packages
above the kernels are made by hand, without running those files; nothing below them needs more than jax.
"""

import importlib
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def kernel(name: str) -> types.ModuleType:
    """The module ``jaxformers.kernels.<name>``."""
    for package in ("jaxformers", "jaxformers.kernels"):
        if package not in sys.modules:
            module = types.ModuleType(package)
            module.__path__ = [str(ROOT.joinpath(*package.split(".")))]
            sys.modules[package] = module
    return importlib.import_module(f"jaxformers.kernels.{name}")
