"""jaxformers: pretrained transformers in JAX.

A pretrained transformer is a pure function over a pytree of typed weights; every system here transforms the one or the
other. ``import jaxformers as jf`` gives the verbs below; sub-packages load when they are first used.
"""

import importlib  # noqa: E402
from typing import Any  # noqa: E402

from jaxformers import _platform  # noqa: F401  (sets what libtpu reads before JAX is imported)

__version__ = "0.1.0"

# Imported at once, since each shares its name with its module; the rest waits until it is asked for.
from jaxformers.cost import cost  # noqa: E402
from jaxformers.functional import functional, with_params  # noqa: E402
from jaxformers.mesh import mesh  # noqa: E402

_VERBS = {
    "load": "hub", "save": "hub", "init": "hub", "info": "describe", "latency": "cost", "Output": "nn.output",
    "reap": "sites", "edit": "sites", "site": "sites",
    "load_tokenizer": "data.tokenizers", "generate": "generation", "embed": "embedding",
    "load_feature_extractor": "data.features", "load_image_processor": "data.images",
    "compact": "compaction", "fit": "train", "TrainConfig": "train",
}  # fmt: skip
_PACKAGES = (
    "compress", "data", "fake_quant", "gates", "image_losses", "losses", "metrics", "models", "nn", "paths", "pretrain",
    "residual", "surgery", "tasks", "token_losses", "train", "weights",
)  # fmt: skip

__all__ = ["cost", "functional", "mesh", "with_params", *_VERBS, *_PACKAGES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return getattr(importlib.import_module(f"jaxformers.{_VERBS[name]}"), name)
    if name in _PACKAGES or name == "link":
        return importlib.import_module(f"jaxformers.{name}")
    raise AttributeError(f"module 'jaxformers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
