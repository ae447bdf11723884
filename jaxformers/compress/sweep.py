"""Quantising a transformer block by block: only one block and the Hessians of its layers are held at a time.

The calibration sequences are run through the embeddings once. Then, for each block: run it and add up the Hessian of
each linear's inputs; solve; run it again with the rounded weights, whose outputs are the next block's inputs.
"""

import dataclasses
import json
import logging
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import atomic, surgery, weights
from jaxformers.compress.block import LayerReport, Settings, quantize_block
from jaxformers.compress.calibration import Batch, first_inputs, linears_of, through_blocks, unwrap
from jaxformers.safetensors_io import SafetensorsFile
from jaxformers.weights.packed import from_gptq
from jaxformers.weights.ternary import TernaryWeight

log = logging.getLogger(__name__)


def sweep(
    model: nnx.Module,
    calibration: Mapping[str, np.ndarray] | None,
    settings: Settings,
    *,
    batch_size: int,
    work: Path | None,
    keep_on_disk: bool = False,
    on_layer: Callable[[LayerReport], None],
) -> nnx.Module:
    """A copy of ``model`` with the linears of all blocks quantised; ``model`` may hold views of a file.

    With the directory ``work`` each finished block is written there at once, and read instead of solved again by the
    next call with the same settings, calibration and weights; ``keep_on_disk`` leaves the quantised weights in those
    files (as views), so that never more than one block is in memory.
    """
    for path, linear in surgery.find_linears(model.layers, "**"):
        try:
            unwrap(linear.kernel.get_value())
        except ValueError as error:
            raise ValueError(f"model: layers.{path} is {error}; dequantize it first") from None
    batches = None if calibration is None else first_inputs(model, calibration, batch_size)
    key = "" if work is None else fingerprint(json.dumps(dataclasses.asdict(settings)), calibration)

    def change(i: int, block: nnx.Module, batches: list[Batch] | None) -> dict[str, Any]:
        """Quantise block i, or read what an earlier call has made of it."""
        nonlocal key
        file = None if work is None else work / f"block-{i:05d}.safetensors"
        found, places = None, linears_of(model.layers[i])
        if file is not None:
            key = fingerprint(key, nnx.to_pure_dict(nnx.state(block)))
            found = _read_block(file, key, settings, places)
        if found is None:
            done, reports = quantize_block(block, batches, settings, f"layers.{i}")
            if file is not None:
                _write_block(file, key, done, reports)
            if keep_on_disk:
                done, _ = _read_block(file, key, settings, places)
        else:
            done, reports = found
            for name, module in linears_of(block).items():
                if name in done:
                    module.kernel.set_value(jax.tree.map(jnp.asarray, done[name]))
            if not keep_on_disk:
                done = {name: jax.tree.map(jnp.asarray, kernel) for name, kernel in done.items()}
        for report in reports:
            on_layer(report)
        return done

    return through_blocks(model, batches, change)


def fingerprint(before: str, tree: Any) -> str:
    """A checksum of all arrays of ``tree``, chained to ``before``."""
    crc = zlib.crc32(before.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(np.asarray(leaf))
        crc = zlib.crc32(f"{jax.tree_util.keystr(path)}{array.dtype}{array.shape}".encode(), crc)
        crc = zlib.crc32(array.reshape(-1).view(np.uint8), crc)
    return f"{before[-8:]}{crc:08x}"


def _write_block(file: Path, key: str, done: dict[str, Any], reports: list[LayerReport]) -> None:
    from safetensors.numpy import save

    tensors = {f"{n}/{s}": np.ascontiguousarray(a) for n, w in done.items() for s, a in _base(w).to_tensors().items()}
    metadata = {"key": key, "reports": json.dumps([dataclasses.asdict(r) for r in reports])}
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes_atomic(file, save(tensors, metadata=metadata))


def _base(kernel: Any) -> Any:
    return _base(kernel.base) if isinstance(kernel, weights.LowRank) else kernel


def _read_block(
    file: Path, key: str, settings: Settings, linears: dict[str, Any]
) -> tuple[dict[str, Any], list[LayerReport]] | None:
    """A finished block, as views of its file; None when there is none for this ``key``."""
    if not file.is_file():
        return None
    found = SafetensorsFile(file)
    if found.metadata.get("key") != key:
        log.warning("%s: from other settings, calibration data or weights; the block is quantised anew", file)
        return None
    done = {}
    for name in dict.fromkeys(tensor.split("/")[0] for tensor in found):
        read = {tensor.split("/")[1]: found[tensor].read() for tensor in found if tensor.split("/")[0] == name}
        _, _, rebuild = unwrap(linears[name].kernel.get_value())
        if "codes" in read:
            done[name] = rebuild(TernaryWeight.from_file(read, settings.group_size))
        else:
            packed = from_gptq(read, settings.bits, settings.group_size, settings.checkpoint_format)
            done[name] = rebuild(dataclasses.replace(packed, scales=packed.scales.astype(settings.scale_dtype)))
    return done, [LayerReport(**report) for report in json.loads(found.metadata["reports"])]
