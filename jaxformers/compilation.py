"""The persistent compilation cache: a program compiled once is read back by later runs on the same machine.

`jaxformers.train.fit`, the command line and the experiments switch it on; importing the package does not.
`JAXFORMERS_NO_CACHE=1` keeps it off. Whoever has configured JAX's own cache keeps that configuration.
"""

import os
from pathlib import Path

import jax


def enable_cache(directory: str | os.PathLike | None = None) -> Path | None:
    """Keep compiled programs in ``directory`` (default: ``$XDG_CACHE_HOME/jaxformers/xla``, else under ``~/.cache``).

    Only programs that took half a second or more are kept. Returns the directory in use, or None where the cache stays
    off: `JAXFORMERS_NO_CACHE` is set, or the default directory cannot be written. A cache that JAX already has
    (`JAX_COMPILATION_CACHE_DIR`, `jax.config`) is left as it is unless ``directory`` is given.

    Raises ValueError when ``directory`` is given and cannot be made or written.
    """
    if os.environ.get("JAXFORMERS_NO_CACHE", "0") not in ("", "0"):
        return None
    configured = jax.config.jax_compilation_cache_dir
    if directory is None and configured:
        return Path(configured)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(directory if directory is not None else Path(base) / "jaxformers" / "xla").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):
        writable = False
    if not writable:
        if directory is not None:
            raise ValueError(f"directory: the compilation cache cannot be written to {path}")
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return path
