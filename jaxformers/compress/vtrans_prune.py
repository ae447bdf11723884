"""Pruning by VTrans, start to end: train gates (and weights) to a budget, cut, fine-tune, report.

    done = jf.compress.vib_prune(model, rows, {"params": 0.2}, key=key)      # 20 % of the parameters stay
    done.model, done.masks, done.report

The equations are in `vtrans`. Three modes: "full" trains weights and gates on all rows; "fast" does on 3 % of them;
"faster" trains the gates alone, whose weights stay as they are until the smaller model is fine-tuned.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxformers import gates, units
from jaxformers.compaction import compact
from jaxformers.compress import vtrans, vtrans_distil
from jaxformers.compress.vtrans_distil import DistilConfig
from jaxformers.compress.vtrans_report import mean, report
from jaxformers.data.batches import array_batches
from jaxformers.functional import functional, with_params
from jaxformers.losses import cross_entropy
from jaxformers.sites import reap
from jaxformers.token_losses import next_labels
from jaxformers.train.config import TrainConfig
from jaxformers.train.loop import fit
from jaxformers.train.optim import OptimConfig

KINDS = ("hidden", "heads", "ffn", "layers")
Loss = Callable[[Any, Mapping[str, jax.Array]], jax.Array]  # (output, batch) -> scalar


class BudgetMissed(ValueError):
    """The gates did not come near the budget by the end of training."""


@dataclasses.dataclass(frozen=True)
class VTransConfig:
    """Steps are batches of ``batch`` rows. ``rate``: of the weights; ``mask_rate``, ``lambda_rate`` of the gates and of
    λ (by ascent, neither decays). ``warmup``: the share of the steps until the target stands at the budget; ``decay``:
    the gates' rate falls linearly to 0. ``head_kl``, ``ffn_kl``, ``layer_kl`` multiply the KL of these gates;
    the hidden gate's counts once for each place it acts at, and ``hidden_kl`` times more. ``tolerance``: how far below
    and above the target sparsity the expected one may be for a checkpoint to be taken (those last in training, the one
    of least validation loss); ``miss``: how far it may be in the end before it is an error. ``multiple``: widths are
    rounded to it. ``fast_share``, ``fast_steps``: rows that "fast" takes, and the steps it takes at least.
    """

    steps: int = 1000
    finetune_steps: int = 0
    batch: int = 32
    rate: float = 2e-5
    finetune_rate: float | None = None
    mask_rate: float = 0.05
    lambda_rate: float = 0.1
    warmup: float = 0.3
    decay: bool = False
    kl_factor: float = 1e-6
    head_kl: float = 256.0
    ffn_kl: float = 1.0
    layer_kl: float = 1.0
    hidden_kl: float = 30.0
    steepness: float = 10.0
    tolerance: tuple[float, float] = (0.008, 0.001)
    miss: float = 0.1
    slack: float = 0.005
    multiple: int | None = None
    fast_share: float = 0.03
    fast_steps: int = 100
    check_every: int = 20
    distil: DistilConfig = DistilConfig()

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("finetune_steps", 0), ("batch", 1), ("fast_steps", 1), ("check_every", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected {low} or more, got {getattr(self, name)}")
        for name in ("rate", "mask_rate", "lambda_rate", "steepness", "miss"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        for name in ("warmup", "fast_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in (0, 1], got {getattr(self, name)}")
        if self.multiple is not None and self.multiple < 1:
            raise ValueError(f"multiple: expected 1 or more, or None, got {self.multiple}")


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
            trains. ``loss(output, batch)``: the task's, by default cross-entropy of the labels, or of the next token.
        directory: receives the two runs' metrics and checkpoints, see `jaxformers.train.fit`.

    Returns a :class:`Pruned`. Raises ValueError for a budget that is no share, or below what the parts cost that may
    not go (the floor is stated), units or labels that do not fit; :class:`BudgetMissed` when the expected sparsity ends
    farther than ``config.miss`` from the target.
    """
    began = time.perf_counter()
    kinds, counted, keep = _checked(model, data, budget, units, mode, embeddings)
    if teacher is not None:
        vtrans_distil.check_teacher(teacher, model)
    task = loss or default_loss(model, data)
    gate_key, fit_key, tune_key, rows_key = jax.random.split(key, 4)
    rows, steps = dict(data), config.steps
    if mode == "fast":
        rows, steps = _share(rows, config, rows_key)
    objective, params = _objective(model, teacher, task, kinds, counted, keep, config, steps, gate_key)
    window = (1 - keep - config.tolerance[0], 1 - keep + (config.tolerance[1] if keep >= 0.3 else 0.006))
    best = _Best(counted, config, window, objective, val_data)
    frozen = (*(("teacher.**",) if teacher is not None else ()), *(("model.**",) if mode == "faster" else ()))
    train = TrainConfig(
        steps=steps, freeze=frozen, eval_every=config.check_every, log_every=config.check_every, progress=False
    )
    optimizer = _optimizer(config, steps, mode)
    batches = array_batches(rows, min(config.batch, len(rows["input_ids"])))
    where = None if directory is None else Path(directory) / "prune"
    done = fit(objective, params, batches, train, key=fit_key, optimizer=optimizer, evaluate=best, directory=where)
    chosen = done.params if best.params is None else best.params
    expected = float(counted.sparsity(_probabilities(chosen["gates"], config.steepness)))
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
            for kind, mine in _probabilities(chosen["gates"], config.steepness).items()
        },
    }  # fmt: skip
    numbers |= report(model, small, masks, counted, data if val_data is None else val_data)
    if val_data is not None:
        numbers["val_loss"] = mean(jax.jit(_loss_of(small, task)), functional(small)[1], val_data, config.batch)
    return Pruned(small, masks, chosen["gates"], trained, numbers, done.history)


def default_loss(model: nnx.Module, data: Mapping[str, Any]) -> Loss:
    """Cross-entropy of ``batch["labels"]``, or of the next token where there are none and ``model`` is causal.

    Raises ValueError where neither is there.
    """
    if "labels" in data:
        return lambda out, batch: cross_entropy(out.logits, batch["labels"])
    if model.head_name != "causal_lm":
        raise ValueError("data: no 'labels'; give them, or a loss")
    return lambda out, batch: cross_entropy(
        out.logits, next_labels(batch["input_ids"], batch.get("attention_mask"))
    )


# ---- before --------------------------------------------------------------------------------------------------------


def _checked(
    model: nnx.Module, data: Mapping, budget: Mapping, chosen: tuple[str, ...], mode: str, embeddings: bool | None
) -> tuple[tuple[str, ...], vtrans.Costs, float]:
    if len(budget) != 1 or set(budget) - {"params", "flops"}:
        raise ValueError(f"budget: expected {{'params': share}} or {{'flops': share}}, got {dict(budget)}")
    (kind, keep) = next(iter(budget.items()))
    if not 0 < keep < 1:
        raise ValueError(f"budget: the share of {kind} that stays must lie between 0 and 1, got {keep}")
    if not chosen or set(chosen) - set(KINDS):
        raise ValueError(f"units: expected some of {', '.join(KINDS)}, got {chosen}")
    if mode not in ("full", "fast", "faster"):
        raise ValueError(f"mode: expected full, fast or faster, got {mode!r}")
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


# ---- training ------------------------------------------------------------------------------------------------------


def _probabilities(found: Mapping[str, Any], steepness: float) -> Any:
    return jax.tree.map(lambda g: vtrans.keep_probability(g, steepness), found, is_leaf=vtrans.is_gate)


def _objective(
    model: nnx.Module,
    teacher: nnx.Module | None,
    task: Loss,
    kinds: tuple[str, ...],
    counted: vtrans.Costs,
    keep: float,
    config: VTransConfig,
    steps: int,
    key: jax.Array,
) -> tuple[Callable, dict[str, Any]]:
    """L of `vtrans`' first paragraph, and what it is a function of: model, gates, lambda, step (map, teacher)."""
    apply, weights = functional(model)
    found = vtrans.init_gates(model, kinds, key)
    run = gates.gated(apply, model, kinds, multiply=vtrans.sample, kept=vtrans.stays)
    params: dict[str, Any] = {
        "model": weights, "gates": found, "lambda": {"1": jnp.zeros(()), "2": jnp.zeros(())}, "step": jnp.zeros(()),
    }  # fmt: skip
    distil = None
    if teacher is not None:
        distil = _distillation(teacher, model, config.distil)
        params |= {"teacher": functional(teacher)[1], "map": vtrans_distil.new_map(counted.hidden)}
    times = {kind: getattr(config, f"{name}_kl") for kind, name in
             (("heads", "head"), ("ffn", "ffn"), ("sublayers", "layer"))}  # fmt: skip
    # the hidden gate's KL is added at every sub-layer that it follows
    times["hidden"] = config.hidden_kl + sum(1 for _ in units.sub_layers(model))
    start = float(counted.sparsity(jax.tree.map(vtrans.stays, found, is_leaf=vtrans.is_gate)))

    def objective(_: Any, params: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> tuple[jax.Array, dict]:
        inputs = _inputs(batch)
        noise, dropout = (None, None) if key is None else jax.random.split(key)
        seen: Any = {}
        forward = lambda p, b: run(p, b, params["gates"], rngs=dropout, key=noise)
        if distil is None:
            out = forward(params["model"], inputs)
            fitted = task(out, batch)
        else:
            out, seen = reap(forward, "layers.*.output")(params["model"], inputs)
            there = _existing(params["gates"], len(seen))
            fitted = distil(params, out, seen, inputs, there)
        s = counted.sparsity(_probabilities(params["gates"], config.steepness))
        t = vtrans.warmed_target(jax.lax.stop_gradient(params["step"]), start, 1 - keep, config.warmup * steps)
        pushed = vtrans.lagrangian(s, t, params["lambda"]["1"], params["lambda"]["2"])
        spread = jnp.asarray(0.0)
        for kind, mine in params["gates"].items():
            for gate in jax.tree.leaves(mine, is_leaf=vtrans.is_gate):
                spread = spread + vtrans.kl(gate, times[kind])
        total = fitted + config.kl_factor * spread + pushed
        return total, {"task": fitted, "sparsity": s, "target": t, "kl": spread, "lambda_2": params["lambda"]["2"]}

    return objective, params


def _existing(found: Mapping[str, Any], depth: int) -> jax.Array:
    """Which layers have a sub-layer left, by the gates of layers."""
    if "sublayers" not in found:
        return jnp.ones(depth, bool)
    parts = [[g for path, g in found["sublayers"].items() if path.startswith(f"layers.{i}.")] for i in range(depth)]
    return jnp.stack([jnp.stack([vtrans.stays(g) for g in mine]).max() > 0 for mine in parts])


def _distillation(teacher: nnx.Module, model: nnx.Module, config: DistilConfig) -> Callable:
    apply, _ = functional(teacher)
    chosen = config.chosen(len(teacher.layers))
    watch = reap(apply, "layers.{" + ",".join(map(str, chosen)) + "}.output")

    def loss(params: Any, out: Any, seen: Mapping[str, jax.Array], inputs: Any, existing: jax.Array) -> jax.Array:
        above, states = jax.lax.stop_gradient(watch(params["teacher"], inputs))
        student = jnp.stack([seen[f"layers.{i}.output"] for i in range(len(seen))])
        target = jnp.stack([states[f"layers.{i}.output"] for i in chosen])
        mask = inputs.get("attention_mask")
        errors = vtrans_distil.layer_errors(target, student, params["map"]["kernel"], params["map"]["bias"], mask)
        ce = vtrans_distil.ce_loss(above.logits, out.logits, config.temperature)
        return config.ce * ce + config.layer * vtrans_distil.layer_loss(errors, existing)

    return loss


def _optimizer(config: VTransConfig, steps: int, mode: str) -> optax.GradientTransformation:
    """Three groups: weights by clipped AdamW, gates by Adam, λ by ascent; and the count of steps."""
    rate = optax.linear_schedule(config.rate, 0.0, steps)
    mask_rate = optax.linear_schedule(config.mask_rate, 0.0, steps) if config.decay else config.mask_rate
    groups = {
        "weights": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0)),
        "gates": optax.adam(mask_rate),
        "lambda": optax.chain(optax.scale(-1.0), optax.adamw(config.lambda_rate, weight_decay=0.0)),
        "step": optax.stateless(lambda g, p: jax.tree.map(jnp.ones_like, g)),
    }
    first = {"model": "weights", "map": "weights", "gates": "gates", "lambda": "lambda", "step": "step"}
    return optax.multi_transform(groups, lambda flat: {path: first[path.partition(".")[0]] for path in flat})


class _Best:
    """Keeps the parameters whose expected sparsity is at the budget, of least loss on the validation rows where there
    are any, else the latest."""

    def __init__(self, counted: vtrans.Costs, config: VTransConfig, window: tuple, objective: Callable, rows: Any):
        self.counted, self.config, self.window = counted, config, window
        self.rows, self.params, self.loss = rows, None, float("inf")
        self.evaluate = jax.jit(lambda params, batch: objective(None, params, batch, None)[1]["task"])

    def __call__(self, params: Any, step: int) -> dict[str, float]:
        s = float(self.counted.sparsity(_probabilities(params["gates"], self.config.steepness)))
        if not self.window[0] <= s <= self.window[1]:
            return {"expected_sparsity": s}
        loss = -float(step) if self.rows is None else mean(self.evaluate, params, self.rows, self.config.batch)
        if loss < self.loss:
            self.loss, self.params = loss, jax.tree.map(jnp.array, params)
        return {"expected_sparsity": s, "selection_loss": loss}


# ---- after ---------------------------------------------------------------------------------------------------------


def _finetune(
    small: nnx.Module, masks: Mapping, chosen: Mapping, teacher: Any, task: Loss, data: Any, config: VTransConfig,
    key: jax.Array, directory: Any,
) -> nnx.Module:  # fmt: skip
    apply, weights = functional(small)
    params: dict[str, Any] = {"model": weights}
    distil = None
    if teacher is not None:
        distil = _distillation(teacher, small, config.distil)
        kept = np.flatnonzero(masks["hidden"]) if "hidden" in masks else np.arange(len(chosen["map"]["kernel"]))
        params |= {"teacher": chosen["teacher"], "map": vtrans_distil.narrowed(chosen["map"], kept)}

    def objective(_: Any, params: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> tuple[jax.Array, dict]:
        inputs = _inputs(batch)
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
    return lambda params, batch: task(apply(params, _inputs(batch)), batch)


def _inputs(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: x for name, x in batch.items() if name != "labels"}
