"""Pallas, imported when a kernel is first traced: it brings a compiler, which would double the time of an import.

    from jaxformers.kernels.lazy import pl, plgpu, plmgpu, pltpu

in place of `from jax.experimental import pallas as pl` and the like.
"""

import importlib
from typing import Any


class Lazy:
    """The module `name`, imported at the first use of one of its attributes."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


pl = Lazy("jax.experimental.pallas")
plgpu = Lazy("jax.experimental.pallas.triton")
plmgpu = Lazy("jax.experimental.pallas.mosaic_gpu")
pltpu = Lazy("jax.experimental.pallas.tpu")
