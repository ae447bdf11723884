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
from jaxformers.compress.block import Batch, LayerReport, Settings, forward, linears_of, quantize_block, unwrap
from jaxformers.safetensors_io import SafetensorsFile
from jaxformers.weights.packed import from_gptq
from jaxformers.weights.ternary import TernaryWeight

log = logging.getLogger(__name__)


def first_inputs(model: nnx.Module, calibration: Mapping[str, np.ndarray], batch_size: int) -> list[Batch]:
    """The inputs of block 0: the embeddings are run, the blocks and the head are not."""
    model = surgery.copy(model)
    model.layers = nnx.data(_Recorder())
    graph, state = nnx.split(model)

    @jax.jit
    def embed(state: Any, batch: Mapping[str, jax.Array]) -> Any:
        model = nnx.merge(graph, state)
        model(**batch)
        return model.layers.seen[0]

    items = []
    for start in range(0, len(calibration["input_ids"]), batch_size):
        batch = {name: array[start : start + batch_size] for name, array in calibration.items()}
        x, context = embed(state, batch)
        items.append((np.asarray(x), jax.tree.map(np.asarray, context), batch.get("attention_mask")))
    return items


class _Recorder(nnx.Module):
    """Stands for the blocks of a model: notes what they would be given."""

    def __init__(self):
        self.path, self.seen = "", nnx.static(None)

    def __call__(self, x: jax.Array, *, cache: Any = None, key: Any = None, **context: Any) -> tuple[jax.Array, None]:
        self.seen = nnx.static([(x, context)])
        return x, None


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
    new = surgery.copy(model)
    batches = None if calibration is None else first_inputs(model, calibration, batch_size)
    key = "" if work is None else _fingerprint(json.dumps(dataclasses.asdict(settings)), calibration)
    for i in range(len(new.layers)):
        path, target = f"layers.{i}", new.layers[i]
        block = surgery.named(nnx.clone(target))  # paths within the block: equal blocks share their compiled code
        graph, state = nnx.split(block)
        block = surgery.named(nnx.merge(graph, jax.tree.map(jnp.asarray, state)))
        file = None if work is None else work / f"block-{i:05d}.safetensors"
        if file is not None:
            key = _fingerprint(key, nnx.to_pure_dict(state))
        found = None if file is None else _read_block(file, key, settings, linears_of(block))
        if found is None:
            done, reports = quantize_block(block, batches, settings, path)
            if file is not None:
                _write_block(file, key, done, reports)
                if keep_on_disk:
                    done, _ = _read_block(file, key, settings, linears_of(target))
        else:
            done, reports = found
            for name, module in linears_of(block).items():
                if name in done:
                    module.kernel.set_value(jax.tree.map(jnp.asarray, done[name]))
            if not keep_on_disk:
                done = {name: jax.tree.map(jnp.asarray, kernel) for name, kernel in done.items()}
        for name, module in linears_of(target).items():
            if name in done:
                module.kernel.set_value(done[name])
        for report in reports:
            on_layer(report)
        if batches is not None and i + 1 < len(new.layers):
            graph, state = nnx.split(block)
            batches = [(np.asarray(forward(graph, state, x, context)), context, mask) for x, context, mask in batches]
    return surgery.named(new)


def _fingerprint(before: str, tree: Any) -> str:
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
