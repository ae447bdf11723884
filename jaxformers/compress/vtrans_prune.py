"""Pruning by VTrans, start to end: train gates (and weights) to a budget, cut, fine-tune, report.

    done = jf.compress.vib_prune(model, rows, {"params": 0.2}, key=key)      # 20 % of the parameters stay
    done.model, done.masks, done.report

The equations are in `vtrans`. Three modes: "full" trains weights and gates on all rows; "fast" does on 3 % of them;
"faster" trains the gates alone, whose weights stay as they are until the smaller model is fine-tuned.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import units
from jaxformers.compaction import compact
from jaxformers.compress import vtrans, vtrans_distil
from jaxformers.compress.vtrans_report import mean, report
from jaxformers.compress.vtrans_train import (
    Best,
    Loss,
    VTransConfig,
    distillation,
    frozen,
    inputs_of,
    make_objective,
    make_optimizer,
    probabilities,
)
from jaxformers.data.batches import array_batches
from jaxformers.functional import functional, with_params
from jaxformers.losses import cross_entropy, sample_losses
from jaxformers.sites import reap
from jaxformers.token_losses import next_labels
from jaxformers.train.config import TrainConfig
from jaxformers.train.loop import fit
from jaxformers.train.optim import OptimConfig

KINDS = ("hidden", "heads", "ffn", "layers")


class BudgetMissed(ValueError):
    """The gates did not come near the budget by the end of training."""


class Pruned(NamedTuple):
    """``model``: the smaller one; ``masks``: what was cut out of ``trained``, the model before; ``gates``: their mu and
    logD; ``report``: plain numbers; ``history``: the records of training, expected sparsity and λ2 among them."""

    model: nnx.Module
    masks: dict[str, Any]
    gates: dict[str, Any]
    trained: nnx.Module
    report: dict[str, Any]
    history: list[dict[str, Any]]


def vib_prune(
    model: nnx.Module,
    data: Mapping[str, np.ndarray],
    budget: Mapping[str, float],
    *,
    units: tuple[str, ...] = KINDS,
    mode: Literal["full", "fast", "faster"] = "full",
    teacher: nnx.Module | None = None,
    loss: Loss | None = None,
    config: VTransConfig = VTransConfig(),
    key: jax.Array,
    val_data: Mapping[str, np.ndarray] | None = None,
    embeddings: bool | None = None,
    directory: str | Path | None = None,
) -> Pruned:
    """Prune ``model`` (a fine-tuned BERT, RoBERTa, GPT-2 or llama, or one built alike) to a budget.

    Args:
        data: rows {"input_ids": (n, L), "attention_mask", …} with "labels" where the loss needs them; ``val_data``
            likewise: it chooses among checkpoints at the budget, and is reported on.
        budget: {"params": share that stays} or {"flops": share}, of matrices and tables; see `vtrans.costs`, also for
            ``embeddings``. FLOPs are those of one sequence of the rows' length.
        units: what may go, of hidden, heads, ffn, layers.
        teacher: a model of the same labels to distil from, such as ``model`` itself; without it the loss of the task
            trains. ``loss(output, batch)``: the task's, by default as :func:`default_loss`.
        directory: receives the two runs' metrics and checkpoints, see `jaxformers.train.fit`.

    Returns a :class:`Pruned`. Raises ValueError for a budget that is no share, or below what the parts cost that may
    not go (the floor is stated), units or labels that do not fit; :class:`BudgetMissed` when the expected sparsity ends
    farther than ``config.miss`` from the target.
    """
    began = time.perf_counter()
    kinds, counted, keep = checked(model, data, budget, units, mode, embeddings)
    if teacher is not None:
        vtrans_distil.check_teacher(teacher, model)
    task = loss or default_loss(model, data)
    gate_key, fit_key, tune_key, rows_key = jax.random.split(key, 4)
    rows, steps = dict(data), config.steps
    if mode == "fast":
        rows, steps = _share(rows, config, rows_key)
    objective, params = make_objective(model, teacher, task, kinds, counted, keep, config, steps, gate_key)
    above = config.tolerance[1] if keep >= 0.3 else max(config.tolerance[1], 0.006)  # as published, of high sparsities
    window = (1 - keep - config.tolerance[0], 1 - keep + above)
    best = Best(counted, config, window, objective, val_data)
    train = TrainConfig(
        steps=steps, freeze=frozen(params, mode), eval_every=config.check_every, log_every=config.check_every,
        progress=False,
    )  # fmt: skip
    optimizer = make_optimizer(config, steps)
    batches = array_batches(rows, min(config.batch, len(rows["input_ids"])))
    where = None if directory is None else Path(directory) / "prune"
    done = fit(objective, params, batches, train, key=fit_key, optimizer=optimizer, evaluate=best, directory=where)
    chosen = done.params if best.params is None else best.params
    expected = float(counted.sparsity(probabilities(chosen["gates"], config.steepness)))
    if abs(expected - (1 - keep)) > config.miss:
        raise BudgetMissed(
            f"budget: the gates expect a sparsity of {expected:.3f}, the target is {1 - keep:.3f}; train for more "
            "steps, raise mask_rate or lambda_rate, or allow more kinds of units to go"
        )
    masks = vtrans.masks_within(chosen["gates"], counted, keep, slack=config.slack, multiple=config.multiple)
    trained = with_params(model, jax.tree.map(lambda new, old: new.astype(old.dtype), chosen["model"], params["model"]))
    small = compact(trained, masks)
    pruned_at = time.perf_counter()
    if config.finetune_steps:
        small = _finetune(small, masks, chosen, teacher, task, data, config, tune_key, directory)
    numbers = {
        "mode": mode, "steps": steps, "target_sparsity": 1 - keep, "expected_sparsity": expected,
        "prune_seconds": pruned_at - began, "seconds": time.perf_counter() - began,
        "lambda": [float(x) for x in chosen["lambda"].values()],
        "expected_kept": {
            kind: float(sum(jnp.sum(p) for p in jax.tree.leaves(mine)))
            for kind, mine in probabilities(chosen["gates"], config.steepness).items()
        },
    }  # fmt: skip
    numbers |= report(model, small, masks, counted, data if val_data is None else val_data, config.timed)
    if val_data is not None:
        numbers["val_loss"] = mean(jax.jit(_loss_of(small, task)), functional(small)[1], val_data, config.batch)
    return Pruned(small, masks, chosen["gates"], trained, numbers, done.history)


def default_loss(model: nnx.Module, data: Mapping[str, Any]) -> Loss:
    """The error of ``batch["labels"]``, cross-entropy of classes and squared error of numbers (floating), or where
    there are none and ``model`` is causal cross-entropy of the next token.

    Raises ValueError where neither is there.
    """
    if "labels" in data and jnp.issubdtype(data["labels"].dtype, jnp.floating):
        return lambda out, batch: sample_losses(out, batch).mean()
    if "labels" in data:
        return lambda out, batch: cross_entropy(out.logits, batch["labels"])
    if model.head_name != "causal_lm":
        raise ValueError("data: no 'labels'; give them, or a loss")
    return lambda out, batch: cross_entropy(out.logits, next_labels(batch["input_ids"], batch.get("attention_mask")))


def check_options(budget: Mapping[str, float], units: tuple[str, ...], mode: str) -> tuple[str, float]:
    """The kind of a budget and the share that stays. Raises ValueError for what :func:`vib_prune` cannot do, whatever
    the model."""
    if not isinstance(budget, Mapping) or len(budget) != 1 or set(budget) - {"params", "flops"}:
        raise ValueError(f"budget: expected {{'params': share}} or {{'flops': share}}, got {budget!r}")
    ((kind, keep),) = budget.items()
    if not 0 < keep < 1:
        raise ValueError(f"budget: the share of {kind} that stays must lie between 0 and 1, got {keep}")
    if not units or set(units) - set(KINDS):
        raise ValueError(f"units: expected some of {', '.join(KINDS)}, got {units}")
    if mode not in ("full", "fast", "faster"):
        raise ValueError(f"mode: expected full, fast or faster, got {mode!r}")
    return kind, keep


# ---- before --------------------------------------------------------------------------------------------------------


def checked(
    model: nnx.Module, data: Mapping, budget: Mapping, chosen: tuple[str, ...], mode: str, embeddings: bool | None
) -> tuple[tuple[str, ...], vtrans.Costs, float]:
    """(kinds of gates, what they cost, the share that stays) of :func:`vib_prune`'s arguments, which it checks.

    Shapes will do for ``data``, and an abstract ``model``. Raises ValueError as there.
    """
    kind, keep = check_options(budget, chosen, mode)
    if getattr(model, "decoder", None) is not None:
        raise ValueError("model: VTrans prunes one stack; an encoder-decoder ties both sides to one residual width")
    if "input_ids" not in data or len(data["input_ids"]) == 0:
        raise ValueError("data: expected rows with 'input_ids'")
    kinds = tuple("sublayers" if name == "layers" else name for name in chosen)
    units.units(model, kinds)
    counted = vtrans.costs(model, kind, length=data["input_ids"].shape[1], embeddings=embeddings)
    least = vtrans.floor(counted, kinds)
    if keep < least:
        raise ValueError(
            f"budget: {kind} {keep:g} is below {least:.4f}, what is left when all of {', '.join(chosen)} that may go "
            "is gone; ask for more, or let other units go"
        )
    return kinds, counted, keep


def _share(rows: dict[str, np.ndarray], config: VTransConfig, key: jax.Array) -> tuple[dict[str, np.ndarray], int]:
    """A share of the rows, and of the steps."""
    n = len(rows["input_ids"])
    some = np.asarray(jax.random.permutation(key, n))[: max(1, round(n * config.fast_share))]
    return {name: x[some] for name, x in rows.items()}, max(config.fast_steps, round(config.steps * config.fast_share))


# ---- after ---------------------------------------------------------------------------------------------------------


def _finetune(
    small: nnx.Module, masks: Mapping, chosen: Mapping, teacher: Any, task: Loss, data: Any, config: VTransConfig,
    key: jax.Array, directory: Any,
) -> nnx.Module:  # fmt: skip
    apply, weights = functional(small)
    params: dict[str, Any] = {"model": weights}
    distil = None
    if teacher is not None:
        distil = distillation(teacher, small, config.distil)
        kept = np.flatnonzero(masks["hidden"]) if "hidden" in masks else np.arange(len(chosen["map"]["kernel"]))
        params |= {"teacher": chosen["teacher"], "map": vtrans_distil.narrowed(chosen["map"], kept)}

    def objective(_: Any, params: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> tuple[jax.Array, dict]:
        inputs = inputs_of(batch)
        forward = lambda p, b: apply(p, b, rngs=key)
        if distil is None:
            return task(forward(params["model"], inputs), batch), {}
        out, seen = reap(forward, "layers.*.output")(params["model"], inputs)
        return distil(params, out, seen, inputs, jnp.ones(len(seen), bool)), {}

    rate = config.finetune_rate or config.rate
    train = TrainConfig(
        steps=config.finetune_steps, freeze=("teacher.**",) if teacher is not None else (), progress=False,
        log_every=config.check_every,
        optim=OptimConfig(learning_rate=rate, weight_decay=0.0),
    )  # fmt: skip
    batches = array_batches(dict(data), min(config.batch, len(data["input_ids"])))
    where = None if directory is None else Path(directory) / "finetune"
    done = fit(objective, params, batches, train, key=key, directory=where)
    return with_params(small, jax.tree.map(lambda new, old: new.astype(old.dtype), done.params["model"], weights))


def _loss_of(model: nnx.Module, task: Loss) -> Callable[[Any, Mapping[str, jax.Array]], jax.Array]:
    apply, _ = functional(model)
    return lambda params, batch: task(apply(params, inputs_of(batch)), batch)
