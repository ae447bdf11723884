"""What a checkpoint holds and how much memory it will take, from its headers alone: no weight is read.

print(jf.info("meta-llama/Llama-3.1-8B", mesh="fsdp=4,tensor=2"))
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from jaxformers import hub, paths, weights
from jaxformers.mesh import mesh_sizes, spec


@dataclasses.dataclass(frozen=True)
class Part:
    """Equal parameters: those of one path, or of one path in all layers (``layers.*.mlp.up.kernel``)."""

    path: str
    times: int
    shape: tuple[int, ...]
    dtype: str
    parameters: int  # of all of them together
    bytes: int  # in memory, likewise
    device_bytes: int  # on the fullest device of the mesh


@dataclasses.dataclass(frozen=True)
class Info:
    """A checkpoint. ``file_bytes`` on disk; ``mesh`` None is one device. As text: a table."""

    source: str
    model: str
    head: str | None
    file_bytes: int
    files: int
    parts: tuple[Part, ...]
    surgery: tuple[tuple[str, str], ...]
    mesh: dict[str, int] | None

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def bytes(self) -> int:
        """Of the weights in memory, all devices' distinct parts together."""
        return sum(part.bytes for part in self.parts)

    @property
    def device_bytes(self) -> int:
        """Of the weights on the fullest device."""
        return sum(part.device_bytes for part in self.parts)

    @property
    def training_bytes(self) -> int:
        """On the fullest device, to train every floating-point weight by AdamW: float32 master, two moments and
        gradient, and what is not trained; without activations."""
        total = 0
        for part in self.parts:
            item = np.dtype(part.dtype).itemsize
            trained = jnp.issubdtype(np.dtype(part.dtype), jnp.floating)
            total += part.device_bytes // item * 16 if trained else part.device_bytes
        return total

    def __str__(self) -> str:
        rows = [
            f"{p.path:<54} {f'{p.times} ×' if p.times > 1 else '':>6} {p.shape!s:>20} {p.dtype:>9} {p.parameters:>16,}"
            for p in self.parts
        ]
        rows.append(f"{self.parameters:,} parameters, {self.bytes:,} bytes in memory")
        rows.append(f"{self.model}, head: {self.head or 'none'}, from {self.source}")
        rows.append(f"{self.file_bytes:,} bytes in {self.files} file(s)")
        if self.mesh is not None:
            told = ",".join(f"{name}={size}" for name, size in self.mesh.items())
            rows.append(
                f"mesh {told}: {self.device_bytes:,} bytes of weights a device; to train all of them by AdamW "
                f"{self.training_bytes:,}, without activations"
            )
        rows += [f"surgery: {function} {arguments}" for function, arguments in self.surgery]
        return "\n".join(rows)


def info(
    path_or_id: str | Path,
    *,
    head: str | None = None,
    dtype: Any = None,
    mesh: Mesh | str | None = None,
    **overrides: Any,
) -> Info:
    """Describe a checkpoint without reading a weight. Arguments and errors as for `jaxformers.load`.

    ``mesh`` may be text such as "fsdp=64,tensor=4": the devices need not be there.
    """
    found = hub.outline(path_or_id, head=head, dtype=dtype, **overrides)
    if isinstance(mesh, str):
        sizes = mesh_sizes(mesh)
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    stored = stored_dtype(found.checkpoint)
    grouped: dict[tuple, list[int]] = {}
    for path, leaf in paths.flatten(nnx.to_pure_dict(nnx.state(found.model))).items():
        typed = weights.is_typed(leaf)
        for keys, array in jax.tree_util.tree_flatten_with_path(leaf)[0] if typed else [((), leaf)]:
            inside = f"{path}{jax.tree_util.keystr(keys)}"
            floating = jnp.issubdtype(array.dtype, jnp.floating) and not typed
            kind = np.dtype(hub.dtype_of(found.arch, path, dtype) or stored) if floating else np.dtype(array.dtype)
            device = math.prod(shard_shape(mesh, inside, array.shape)) * kind.itemsize
            # a typed weight counts the weights that it stands for, once: with its first array
            count = 0 if keys and keys != jax.tree_util.tree_flatten_with_path(leaf)[0][0][0] else paths.count(leaf)
            general = ".".join("*" if part.isdigit() else part for part in inside.split("."))
            entry = grouped.setdefault((general, tuple(array.shape), str(kind)), [0, 0, 0, 0])
            for i, value in enumerate((1, count, math.prod(array.shape) * kind.itemsize, device)):
                entry[i] += value
    parts = tuple(
        Part(path, times, shape, kind, count, size, device)
        for (path, shape, kind), (times, count, size, device) in grouped.items()
    )
    directory = Path(found.model.source)
    files = [f for f in sorted(directory.glob("*.safetensors")) if not f.name.startswith("adapter_model")]
    return Info(
        str(directory), type(found.model).__name__, found.model.head_name, sum(os.path.getsize(f) for f in files),
        len(files), parts, tuple(found.model.surgery), None if mesh is None else dict(mesh.shape),
    )  # fmt: skip


def stored_dtype(checkpoint: Any) -> np.dtype:
    """The floating-point dtype that most of the checkpoint's bytes have."""
    sizes: dict[np.dtype, int] = {}
    for name in checkpoint:
        kind = np.dtype(checkpoint[name].dtype)
        if jnp.issubdtype(kind, jnp.floating):
            sizes[kind] = sizes.get(kind, 0) + math.prod(checkpoint[name].shape)
    return max(sizes, key=sizes.get, default=np.dtype(np.float32))


def shard_shape(mesh: Any, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What one device holds of the array at ``path``."""
    if mesh is None:
        return shape
    cut = (*spec(mesh, path, shape), *[None] * len(shape))
    ways = lambda names: math.prod(mesh.shape[n] for n in ((names,) if isinstance(names, str) else names or ()))
    return tuple(-(-size // ways(names)) for size, names in zip(shape, cut, strict=False))
