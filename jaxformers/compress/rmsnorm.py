"""Pre-RMSNorm and Pre-CRMSNorm: any Pre-LN transformer with RMSNorm in the place of LayerNorm, computing the same.

Source: "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers", arXiv 2305.14858.
With x in R^d a vector of the residual stream,

    LN(x)   = (x − mean x) / sqrt(var x + eps)
    RMS(x)  = x / sqrt(mean x² + eps)
    CRMS(x̃) = x̃ / sqrt((Σ x̃² + (Σ x̃)²) / d + eps),    x̃ in R^(d−1) the first coordinates of an x with Σ x = 0

LN(x + c·1) = LN(x): the mean of the stream is never seen where everything reads it through an LN. So take it out of
everything that writes there (section 3.2: W ← W − mean over outputs, b ← b − mean b); then LN(x) = RMS(x), and one
coordinate says nothing that the others do not (section 3.3). No data, no training: an equality, up to rounding.

    small = jf.compress.convert_norm(model, "crms")             # or "rms"; jf.save and jf.load know both
    plain = jf.compress.convert_norm(model, "zero-mean-ln")     # an ordinary checkpoint of its class
    train = jf.compress.convert_norm(model, "rms", on_the_fly=True)            # trains as the Pre-LN model would

The arithmetic is in rmsnorm_fold.py, what does not go in rmsnorm_checks.py; which weights write and read is told by
:mod:`jaxformers.residual`.
"""

import dataclasses
import inspect
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxformers import hub, paths, residual, surgery
from jaxformers.compress import rmsnorm_checks as checks
from jaxformers.compress import rmsnorm_fold as folding
from jaxformers.compress.rmsnorm_fold import Form
from jaxformers.functional import functional
from jaxformers.models.config import positions_of

log = logging.getLogger(__name__)
RECORD = "jaxformers.compress.rmsnorm:abstract_norms"


def convert_norm(
    model: nnx.Module,
    target: str = "rms",
    *,
    fold_affine: bool | None = None,
    pad: bool = False,
    on_the_fly: bool = False,
    streams: paths.Patterns = "**",
    verify: bool | Mapping[str, Any] = False,
) -> nnx.Module:
    """A copy of the Pre-LN ``model`` that computes the same with other norms; the old model is untouched.

    ``target``: "rms" (RMSNorm, the stream's width d unchanged), "crms" (width d − 1), or "zero-mean-ln": LayerNorm with
    weights that keep the stream's mean at 0, which is an ordinary checkpoint of its class. A model that was converted
    before goes from any form to any other. ``fold_affine``: whether γ and β move into the linear maps behind each norm;
    by default for "crms", which needs it. Where something else than linear maps reads a norm's output (it is a feature
    that leaves the model), γ and β stay there, and "crms" gives the full width there. ``pad``: "crms" keeps the width d
    with a zero in the last place, for tiles, meshes and packed layouts that d − 1 does not fit. ``on_the_fly``: the
    form for training, "rms" with everything recentred in every pass: parameters, losses and gradients are those of the
    Pre-LN model, so that any optimiser takes the same path. (Converted models may be trained as well, but there Adam
    leaves that path, since elementwise steps give the stream a mean again.)
    ``streams``: which residual streams, where a model has several (``"text"``, ``"encoder"``): patterns of the paths
    that :func:`jaxformers.residual.streams` tells. ``verify``: compare outputs with the source's by
    :func:`verify_norm`, on this batch or (True) on a random one.

    A tied output projection becomes a matrix of its own (the table's rows are recentred, the projection is not), with
    the bias β Eᵀ where β is folded. eps stays the checkpoint's. Arrays are computed in float64 and rounded to their
    dtype. Merge low-rank updates before; quantise and prune afterwards. Un-normalised states that leave the model
    (CLIP's last hidden state) change by one number a token; that is logged.

    Raises ValueError, naming the reason: post-norm models, RMSNorm models, a stream that something reads without a norm
    (LLaVA's tower) or several vectors at a time (Swin), no residual stream, adapters or typed weights on what is to
    change, dropout on the stream or layer scale in the form for training, options that do not go together, outputs that
    differ.
    """
    wanted = norm_form(target, fold_affine, pad, on_the_fly)
    found = residual.streams(model)
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no residual stream")
    chosen = [stream.path for stream in found if paths.matches(streams, stream.path)]
    if not chosen:
        known = ", ".join(repr(stream.path) for stream in found)
        raise ValueError(f"streams: {streams!r} matches none of the model's residual streams; there are {known}")
    new, before = surgery.copy(model), forms(model)
    _refuse(checks.changed(new, stream) for stream in found if stream.path in chosen or stream.path in before)
    for path, form in before.items():
        folding.undo(new, path, form)
    _refuse(checks.refusal(new, folding.stream_at(new, path), wanted) for path in chosen)
    after = {path: form for path, form in before.items() if path not in chosen}
    for path in chosen:
        stream, form = folding.stream_at(new, path), wanted
        if path in before and before[path].fold:  # biases that took up β stay
            form = dataclasses.replace(form, fold=True)
        after[path] = folding.original(new, stream, form)
        _say_what_leaves(new, stream, wanted)
    new = _converted(surgery.forget(new, RECORD), after)
    if verify is not False:
        verify_norm(model, new, None if verify is True else verify)
    return new


def norm_form(
    target: str = "rms", fold_affine: bool | None = None, pad: bool = False, on_the_fly: bool = False
) -> Form:
    """The options of :func:`convert_norm`, checked. Raises ValueError for those that do not go together."""
    return Form(target, target == "crms" if fold_affine is None else fold_affine, pad, on_the_fly)


def _refuse(reasons: Iterable[str]) -> None:
    if found := [reason for reason in reasons if reason]:
        raise ValueError("model: " + "; ".join(found))


def forms(model: nnx.Module) -> dict[str, Form]:
    """{path of the stream: the form that :func:`convert_norm` gave it}."""
    found = {}
    for function, arguments in model.surgery:
        if function == RECORD:
            settings = json.loads(arguments)
            for path in settings.pop("streams"):
                found[path] = Form(**settings)
    return found


def _converted(model: nnx.Module, wanted: Mapping[str, Form]) -> nnx.Module:
    """Apply a form to each stream, and note those that a checkpoint of the model's class would not show."""
    for path, form in wanted.items():
        folding.apply(model, path, form)
    groups: dict[Form, list[str]] = {}
    for path, form in wanted.items():
        if form.target != "zero-mean-ln" or form.fold:
            groups.setdefault(form, []).append(path)
    for form, where in groups.items():
        surgery.record(model, RECORD, streams=where, **dataclasses.asdict(form))
    return surgery.named(model)


def abstract_norms(model: nnx.Module, *, streams: list[str], **settings: Any) -> nnx.Module:
    """Rebuild the structure that :func:`convert_norm` made; the checkpoint fills the values."""
    form = Form(**settings)
    # folded LayerNorms have biases that their class has not: what was converted back keeps them
    asked = dataclasses.replace(form, target="rms") if form.target == "zero-mean-ln" else form
    _refuse(checks.refusal(model, folding.stream_at(model, path), asked) for path in streams)
    return _converted(surgery.copy(model), dict.fromkeys(streams, form))


def _say_what_leaves(model: nnx.Module, stream: residual.Stream, form: Form) -> None:
    if any(way.norm is None and way.leaves for way in stream.exits):
        less = " and one coordinate less" if form.target == "crms" and not form.pad else ""
        name = stream.path or type(model).__name__
        log.warning("%s: its un-normalised states are an output; they have mean 0 now%s", name, less)


# ---- the same, or not ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    """Between the outputs of two models: the largest ``absolute`` one, and that relative to the largest output."""

    absolute: float
    relative: float


def verify_norm(
    source: nnx.Module, converted: nnx.Module, batch: Mapping[str, Any] | None = None, *, tolerance: float | None = None
) -> Difference:
    """The largest difference between what two models put out for ``batch``, by default a random one.

    Compared are the logits, without them the pooled states, without these the last hidden states. ``tolerance``:
    relative to the largest output; by default 2e-4 in float32, 1e-9 in float64, 0.05 in 16 bits. Raises ValueError when
    it is exceeded, or when the two have other shapes.
    """
    batch = random_batch(source) if batch is None else batch
    outputs = []
    for model in (source, converted):
        apply, params = functional(model)
        out = jax.jit(apply)(params, batch)
        name = next(n for n in ("logits", "pooled", "last_hidden_state") if getattr(out, n) is not None)
        outputs.append(getattr(out, name))
    if outputs[0].shape != outputs[1].shape:
        raise ValueError(f"verify: {name} has shape {outputs[0].shape} before and {outputs[1].shape} after")
    first, second = (np.asarray(out, np.float64) for out in outputs)
    gap, largest = float(np.abs(first - second).max()), max(float(np.abs(first).max()), 1e-30)
    usual = {8: 1e-9, 4: 2e-4}.get(np.dtype(outputs[0].dtype).itemsize, 0.05)
    limit = usual if tolerance is None else tolerance
    if not gap <= limit * largest:  # NaN too
        share = gap / largest
        raise ValueError(f"verify: {name} differ by {gap:.3g}, {share:.3g} of the largest; the limit is {limit:g}")
    log.info("%s differ by %.3g at most, %.3g of the largest", name, gap, gap / largest)
    return Difference(gap, gap / largest)


def random_batch(model: nnx.Module, *, rows: int = 2, length: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs for ``model``: token ids, pixels, or both. Raises ValueError for a model that takes others."""
    rng, config = np.random.default_rng(seed), model.config
    names = list(inspect.signature(type(model).__call__).parameters)[1:]
    batch: dict[str, np.ndarray] = {}
    if "pixel_values" in names and not hasattr(model, "projector"):
        part = next((p for p in (config, getattr(config, "vision", None), getattr(config, "encoder", None))
                     if hasattr(p, "num_channels")), None)  # fmt: skip
        size = getattr(part, "image_size", (64, 64))
        batch["pixel_values"] = rng.standard_normal((rows, part.num_channels, *size), dtype=np.float32)
    for name in ("input_ids", "decoder_input_ids"):
        if name in names:
            vocab = getattr(config, "vocab_size", None) or config.text.vocab_size
            longest = positions_of(config) or length
            batch[name] = rng.integers(3 if vocab > 8 else 0, vocab, (rows, min(length, longest - 4)))
    if not batch:
        raise ValueError(f"verify: no random inputs are known for {type(model).__name__}; give a batch")
    return batch


# ---- from checkpoint to checkpoint ---------------------------------------------------------------------------------


def convert_norm_checkpoint(
    model: str | Path,
    out: str | Path,
    target: str = "rms",
    *,
    fold_affine: bool | None = None,
    pad: bool = False,
    streams: str = "**",
    verify: bool = True,
) -> Difference | None:
    """Convert the checkpoint ``model`` (directory or hub id) into the directory ``out``; see :func:`convert_norm`.

    The weights stay in the files and are read one array at a time. Returns the difference that ``verify`` found, on
    random inputs, of what was written; None without. Raises ValueError as :func:`convert_norm`.
    """
    loaded = hub.load(model, mapped=True)
    converted = convert_norm(loaded, target, fold_affine=fold_affine, pad=pad, streams=streams)
    hub.save(converted, out)
    return verify_norm(hub.load(model), hub.load(out)) if verify else None
