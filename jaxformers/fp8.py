"""Checkpoints in 8-bit floating point: each weight times its scale, as wide as asked for, when it is read.

    W[o, i] = fp8[o, i] · scale[o // b_o, i // b_i]      blocks (b_o, b_i) of quantization_config's weight_block_size;
    W[o, i] = fp8[o, i] · scale[o]  or  · scale          one scale an output, or one for the tensor

DeepSeek-V3 (arXiv 2412.19437, section 3.3) ships the first with ``weight_scale_inv``, which despite its name is
multiplied; compressed-tensors, FBGEMM and ModelOpt the others with ``weight_scale``. Types e4m3 and e5m2; scales may be
float32, bfloat16 or powers of two (e8m0). Scales of activations are left out: activations are not quantised here.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxformers.safetensors_file import CheckpointError, show

FP8 = tuple(np.dtype(getattr(ml_dtypes, name)) for name in
            ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"))  # fmt: skip
METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
_SCALES = ("weight_scale_inv", "weight_scale")
_ACTIVATIONS = ("input_scale", "activation_scale", "k_scale", "v_scale", "output_scale")


@dataclasses.dataclass(frozen=True, eq=False)
class WideTensor:
    """An 8-bit tensor on the disk and its scale, read as ``dtype``; what `LazyTensor` is for plain ones."""

    name: str
    narrow: Any  # LazyTensor
    scale: Any | None
    block: tuple[int, int] | None
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.narrow.shape

    @property
    def ndim(self) -> int:
        return self.narrow.ndim

    @property
    def nbytes(self) -> int:
        """On the disk."""
        return self.narrow.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def read(self) -> np.ndarray:
        return self[...]

    def __getitem__(self, index: Any) -> np.ndarray:
        out = np.empty(self.shape, self.dtype)
        rows = self.shape[0] if self.ndim else 1
        scale = None if self.scale is None else self.scale.read().astype(np.float32)
        step = max(1, (1 << 22) // max(1, out.size // max(1, rows)))  # float32 copies of so many rows at a time
        if self.block is not None:
            step = -(-step // self.block[0]) * self.block[0]
        values = self.narrow.read()
        for start in range(0, rows, step):
            part = values[start : start + step].astype(np.float32)
            out[start : start + step] = part if scale is None else part * self._spread(scale, start, part.shape)
        return out[index]

    def _spread(self, scale: np.ndarray, start: int, shape: tuple[int, ...]) -> np.ndarray:
        """The scales of the rows from ``start`` on, in a shape that multiplies them."""
        if scale.size == 1:
            return scale.reshape(())
        if self.block is None:  # one an output
            return scale.reshape(self.shape[0], *[1] * (self.ndim - 1))[start : start + shape[0]]
        rows, columns = self.block
        own = scale[start // rows : -(-(start + shape[0]) // rows)]
        return np.repeat(np.repeat(own, rows, 0)[: shape[0]], columns, 1)[:, : shape[1]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


class WideCheckpoint(Mapping[str, Any]):
    """A checkpoint whose 8-bit weights are :class:`WideTensor`; their scales are no tensors of their own any more."""

    def __init__(self, checkpoint: Any, wide: Mapping[str, WideTensor], hidden: set[str]):
        self._plain, self._wide = checkpoint, wide
        self._names = [name for name in checkpoint if name not in hidden]
        self.directory: Path = checkpoint.directory

    def __getitem__(self, name: str) -> Any:
        return self._wide[name] if name in self._wide else self._plain[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def nbytes(self) -> int:
        return self._plain.nbytes

    def release(self) -> None:
        self._plain.release()


def widened(checkpoint: Any, hf: Mapping[str, Any], dtype: Any) -> tuple[Any, dict[str, Any]]:
    """(checkpoint, config.json) with 8-bit weights as floating point of ``dtype`` (None: what config.json says the
    model's dtype is, else bfloat16); both as they are where there are no such weights.

    Raises CheckpointError naming a weight whose scale does not fit it, or a method that is not known.
    """
    narrow = [name for name in checkpoint if np.dtype(checkpoint[name].dtype) in FP8]
    if not narrow:
        return checkpoint, dict(hf)
    settings = hf.get("quantization_config") or {}
    method = settings.get("quant_method", "fp8")
    if method not in METHODS:
        raise CheckpointError(
            f"{checkpoint.directory}: 8-bit floats of quant_method {show(method)}; supported are {', '.join(METHODS)}"
        )
    said = hf.get("dtype") or hf.get("torch_dtype") or "bfloat16"
    said = said if said in ("float32", "bfloat16", "float16") else "bfloat16"
    wide, hidden = {}, {n for n in checkpoint if n.rpartition(".")[2] in _ACTIVATIONS}
    for name in narrow:
        module = name.rpartition(".")[0]
        scales = [f"{module}.{s}" for s in _SCALES if f"{module}.{s}" in checkpoint]
        if name.endswith(".weight") and len(scales) > 1:
            raise CheckpointError(f"{checkpoint.directory}: {show(name)} has both {_SCALES[0]} and {_SCALES[1]}")
        scale = checkpoint[scales[0]] if scales and name.endswith(".weight") else None
        hidden |= set(scales)
        block = _block(name, checkpoint[name], scale, settings.get("weight_block_size"), checkpoint.directory)
        wide[name] = WideTensor(name, checkpoint[name], scale, block, np.dtype(dtype or said))
    return WideCheckpoint(checkpoint, wide, hidden), {k: v for k, v in hf.items() if k != "quantization_config"}


def _block(name: str, weight: Any, scale: Any | None, given: Any, directory: Path) -> tuple[int, int] | None:
    """The block that one entry of ``scale`` serves, or None where it serves the tensor or an output."""
    shape = None if scale is None else tuple(scale.shape)
    if shape is None or int(np.prod(shape)) == 1 or shape in ((weight.shape[0],), (weight.shape[0], 1)):
        return None
    pair = isinstance(given, list | tuple) and len(given) == 2 and all(isinstance(n, int) and n > 0 for n in given)
    block = tuple(given) if pair else None
    if block and weight.ndim == 2 and shape == tuple(-(-n // b) for n, b in zip(weight.shape, block, strict=True)):
        return block
    raise CheckpointError(
        f"{directory}: {show(name)} of shape {weight.shape} has a scale of shape {shape}, which is one of no tensor, "
        f"no output and no block of {show(given)}"
    )
