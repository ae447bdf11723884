"""GPTQ: one-shot quantisation of a transformer's linear layers to 2, 3, 4 or 8 bits, without training.

Source: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323. For each
linear layer with weights W (in, out) and calibration inputs X (tokens, in), find Q on a uniform grid that minimises

    ‖X W - X Q‖²,   a quadratic in W - Q with the Hessian H = 2 · mean over sequences of Xᵀ X        (hessian.py)

by rounding the inputs of the layer one after the other, each time moving the weights of the inputs still to come so
that they make up for the error: with inv(H) = Uᵀ U, after rounding input i,

    w_j <- w_j - U_ij (w_i - q_i) / U_ii   for j > i                                                  (columns.py)

Grids are uniform per output or per output and group of inputs (grids.py). Blocks are done in order, each on what the
quantised blocks before it put out, so that one block at a time needs memory (block.py, sweep.py). `method="rtn"`,
rounding to nearest on the same grid, is the baseline; `method="ternary"` runs GPTQ on a three-valued grid.

    small = jf.compress.gptq(model, calibration, bits=4, group_size=128)
    jf.save(small, "model-4bit")           # GPTQ's layout: Hugging Face, AutoGPTQ and GPTQModel read it
"""

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from jaxformers import hub, surgery, weights
from jaxformers.compress.block import LayerReport, Settings
from jaxformers.compress.calibration import checked_calibration
from jaxformers.compress.sweep import sweep
from jaxformers.data import text
from jaxformers.models.config import positions_of
from jaxformers.models.keymap import all_keys, lookup, own_name, prefix_of
from jaxformers.weights.base import innermost, rebase
from jaxformers.weights.masked import settle_masks
from jaxformers.weights.packed import PackedWeight
from jaxformers.weights.ternary import TernaryWeight

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Report:
    """The layers of one run, in order. As text: a table."""

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        table = Table(title="quantised layers", title_justify="left")
        for column in ("layer", "loss", "relative output error", "of rtn", "seconds", "note"):
            table.add_column(column, justify="left" if column in ("layer", "note") else "right", no_wrap=True)
        for r in self.layers:
            numbers = ("–",) * 4 if r.note.startswith("kept dense") else None
            numbers = numbers or (f"{r.loss:.4g}", f"{r.error:.3e}", f"{r.rtn_error:.3e}", f"{r.seconds:.2f}")
            table.add_row(r.path, *numbers, r.note)
        console = Console(width=160)
        with console.capture() as capture:
            console.print(table)
        return capture.get().rstrip()


def gptq(
    model: nnx.Module,
    calibration: np.ndarray | Mapping[str, np.ndarray] | None = None,
    *,
    bits: int | None = None,
    group_size: int = -1,
    sym: bool = False,
    act_order: bool = False,
    static_groups: bool = False,
    true_sequential: bool = False,
    damp: float = 0.01,
    mse: bool = False,
    method: str = "gptq",
    blocksize: int = 128,
    scale_dtype: str = "float16",
    checkpoint_format: str = "gptq",
    batch_size: int = 8,
    work_directory: str | Path | None = None,
    report: list[LayerReport] | None = None,
) -> nnx.Module:
    """A copy of ``model`` whose blocks' linear kernels are packed weights; the old model is untouched.

    ``calibration``: token ids (samples, length), or a batch with ``input_ids`` and what else the model takes
    (``attention_mask``: padding does not count). ``method`` "gptq", "rtn" (calibration optional: it is only measured
    on) or "ternary". ``bits`` 2, 3, 4 (default) or 8. ``group_size``: inputs that share a scale, -1 for all. ``sym``:
    grids around zero, as AutoGPTQ's default; the official scripts use asymmetric ones. ``act_order``: inputs by
    decreasing activation (AutoGPTQ's desc_act). ``static_groups``: all groups' scales before the first rounding.
    ``true_sequential``: layers within a block see the rounding of those before them. ``damp``: share of the Hessian's
    mean diagonal added to it. ``mse``: search for clipping. ``blocksize``: inputs between two updates of the rest.
    ``scale_dtype``: scales are rounded to what is stored in it before weights are rounded to them ("float16" is the
    files' type; "float32" reproduces the official code's numbers). ``checkpoint_format``: "gptq" (version 1) or
    "gptq_v2", for :func:`jaxformers.save`.
    ``batch_size``: calibration sequences a step. ``work_directory``: finished blocks are kept there, and an interrupted
    call goes on where it stopped. ``report`` receives one :class:`LayerReport` per layer.

    Embeddings, norms, biases, poolers and heads stay as they are, as do layers whose size the packed layout cannot
    hold (reported). Masked kernels keep their zeros exactly; low-rank updates stay on top of their quantised base.

    Raises ValueError: an option out of range, ids outside the vocabulary, a model that is quantised already, inputs
    that are not finite (naming the layer).
    """
    bits = (2 if method == "ternary" else 4) if bits is None else bits
    settings = Settings(
        method, bits, group_size, sym, act_order, static_groups, true_sequential, damp, mse, blocksize, scale_dtype,
        checkpoint_format,
    )  # fmt: skip
    work = None if work_directory is None else Path(work_directory)
    return _quantized(model, calibration, settings, batch_size, work, [] if report is None else report)


def _quantized(
    model: nnx.Module,
    calibration: Any,
    settings: Settings,
    batch_size: int,
    work: Path | None,
    report: list[LayerReport],
    keep_on_disk: bool = False,
) -> nnx.Module:
    if not hasattr(model, "layers"):
        raise ValueError(f"model: {type(model).__name__} has no stack of blocks called layers")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be positive")
    if calibration is None and settings.method != "rtn":
        raise ValueError(f"calibration: method={settings.method!r} needs token ids (samples, length)")
    batch = None if calibration is None else checked_calibration(model, calibration)
    new = sweep(
        model,
        batch,
        settings,
        batch_size=batch_size,
        work=work,
        keep_on_disk=keep_on_disk,
        on_layer=report.append,
    )
    return _recorded(new, settings, batch, report)


def _recorded(
    model: nnx.Module, settings: Settings, batch: Mapping[str, np.ndarray] | None, report: list[LayerReport]
) -> nnx.Module:
    """Note in the model what files of it must say: ``quantization_config``, or the surgery of ternary kernels."""
    settle_masks(model)  # a mask over a kernel that is packed now is in its codes
    ternary = [
        (path, weight)
        for path, linear in surgery.with_kernels(model)
        if isinstance(weight := innermost(linear.kernel.get_value()), TernaryWeight)
    ]
    if ternary:
        return surgery.record(
            model,
            "jaxformers.weights.ternary:abstract_ternary",
            targets=[path for path, _ in ternary],
            sorted_groups=[path for path, weight in ternary if weight.g_idx is not None],
            group_size=settings.group_size,
        )
    config = {
        "sym": settings.sym,
        "desc_act": settings.act_order,
        "static_groups": settings.static_groups,
        "true_sequential": settings.true_sequential,
        "damp_percent": settings.damp,
        "model_name_or_path": None if model.source is None else Path(model.source).name,
        "model_file_base_name": "model",
        "meta": {"quantizer": "jaxformers", "method": settings.method, "mse": settings.mse},
    }
    dense = [_name_in_file(model, r.path) for r in report if r.note.startswith("kept dense")]
    if dense:  # GPTQModel's way to say that a layer is not packed
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in dense}
    hf = {**json.loads(model.config.hf), "quantization_config": config}
    model.config = dataclasses.replace(model.config, hf=json.dumps(hf, sort_keys=True))
    return model


def _name_in_file(model: nnx.Module, path: str) -> str:
    arch = hub.module_of(model.config)
    found = lookup(all_keys(model, arch), f"{path}.kernel")
    return own_name(f"{path}.kernel")[0].name if found is None else prefix_of(arch, model.head_name) + found[0].name


def dequantize(model: nnx.Module, dtype: Any = None) -> nnx.Module:
    """A copy of ``model`` with plain arrays in place of packed and ternary kernels (in ``dtype``; default: as the
    embeddings). Low-rank updates on top of them stay. The copy saves as an ordinary checkpoint.
    """
    model = surgery.copy(model)
    if dtype is None:
        dtype = next(leaf.dtype for leaf in jax.tree.leaves(nnx.state(model.embeddings)))

    def plain(kernel: Any) -> Any:
        packed = isinstance(kernel, PackedWeight | TernaryWeight | weights.ArrangedWeight)
        return jnp.asarray(kernel.dense(), dtype) if packed else kernel

    for _, linear in surgery.with_kernels(model):
        linear.kernel.set_value(rebase(linear.kernel.get_value(), plain))
    hf = json.loads(model.config.hf)
    hf.pop("quantization_config", None)
    model.config = dataclasses.replace(model.config, hf=json.dumps(hf, sort_keys=True))
    return surgery.forget(model, "jaxformers.weights.ternary:abstract_ternary")


# ---- from checkpoint to checkpoint ---------------------------------------------------------------------------------


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    calibration: str | Path | np.ndarray | Mapping[str, np.ndarray] | None = None,
    *,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    batch_size: int = 8,
    **options: Any,
) -> Report:
    """Quantise the checkpoint ``model`` (directory or hub id) into the directory ``out``, one block at a time.

    ``calibration``: token ids as for :func:`gptq`, or a file: ``.txt`` (``samples`` random windows of ``length``
    tokens, drawn with ``seed`` as the paper does), ``.jsonl``, ``.csv``, ``.tsv`` (column ``text``: a random window of
    a random document long enough) or ``.npy`` of token ids (samples, length). ``length`` is cut to the model's
    positions.
    ``options``: those of :func:`gptq` but ``work_directory`` and ``report``. Finished blocks are kept beside ``out``
    until the end, so that the same call goes on where an interrupted one stopped. Tokenizer files come along.

    Raises ValueError as :func:`gptq` does, and where the calibration file has too little text.
    """
    out = Path(out)
    known = {f.name for f in dataclasses.fields(Settings)}
    unknown = set(options) - known
    if unknown:
        raise ValueError(f"{min(unknown)}: no such option; there are {', '.join(sorted(known))}")
    if options.get("bits") is None:
        options["bits"] = 2 if options.get("method") == "ternary" else 4
    settings = Settings(**options)
    if calibration is None and settings.method != "rtn":
        raise ValueError(f"calibration: method={settings.method!r} needs text or token ids; give a file")
    loaded = hub.load(model, mapped=True)
    if isinstance(calibration, str | Path):
        calibration = calibration_ids(loaded, Path(calibration), samples=samples, length=length, seed=seed)
    work = out.with_name(f".{out.name}.blocks")
    layers: list[LayerReport] = []
    small = _quantized(loaded, calibration, settings, batch_size, work, layers, keep_on_disk=True)
    hub.save(small, out, tokenizer=None)
    shutil.rmtree(work, ignore_errors=True)
    return Report(tuple(layers))


def calibration_ids(model: nnx.Module, file: Path, *, samples: int, length: int, seed: int) -> np.ndarray:
    """Token ids int32 (samples, length) from a file, by the tokenizer of the checkpoint that ``model`` came from."""
    from jaxformers.data.tokenizers import load_tokenizer

    if not file.is_file():
        raise ValueError(f"calibration: {file} does not exist")
    if file.suffix == ".npy":
        return text.read_token_ids(file)
    tokenizer = load_tokenizer(model.source)
    positions = positions_of(model.config)
    length = length if positions is None else min(length, positions)
    kind = [suffix for suffix in file.suffixes if suffix != ".gz"][-1:]
    if kind and kind[0] in (".jsonl", ".ndjson", ".csv", ".tsv"):
        return text.random_document_windows(text.read_texts(file), tokenizer.encode, samples, length, seed=seed)
    return text.random_windows(tokenizer.encode(text.read_text(file)), samples, length, seed=seed)
