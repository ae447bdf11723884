"""Optional dependencies, imported where they are used and named with their extra when they are missing."""

import importlib
from types import ModuleType

EXTRAS = ("demo", "data", "audio", "link", "plot", "vision", "tpu", "gpu", "docs", "test", "all", "oracle")


def require(module: str, extra: str) -> ModuleType:
    """Import `module` ("pandas", "sklearn.metrics", ...), which the optional dependency group `extra` installs.

    Raises:
        ValueError: `extra` is no extra of this package.
        ImportError: the module is not installed; the message says which extra brings it. An installed module that
            fails while it is imported raises its own error, which says more.
    """
    if extra not in EXTRAS:
        raise ValueError(f"extra={extra!r}: expected one of {', '.join(EXTRAS)}")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # the module is there, something that it imports is not
        raise ImportError(
            f"{top} is not installed; it comes with the extra {extra!r}: pip install 'jaxformers[{extra}]'", name=top
        ) from error
