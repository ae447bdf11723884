"""What VTrans trains: the loss of weights, gates, λ and the count of steps, and how each of them is updated.

L = L_task or L_distillation + kl_factor Σ KL + L_s, see `vtrans` for the symbols and `vtrans_prune` for the whole.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxformers import gates, units
from jaxformers.compress import vtrans, vtrans_distil
from jaxformers.compress.vtrans_distil import DistilConfig
from jaxformers.compress.vtrans_report import mean
from jaxformers.functional import functional
from jaxformers.sites import reap

Loss = Callable[[Any, Mapping[str, jax.Array]], jax.Array]  # (output, batch) -> scalar


@dataclasses.dataclass(frozen=True)
class VTransConfig:
    """Steps are batches of ``batch`` rows. ``rate``: of the weights; ``mask_rate``, ``lambda_rate`` of the gates and of
    λ (by ascent, neither decays). ``warmup``: the share of the steps until the target stands at the budget; ``decay``:
    the gates' rate falls linearly to 0. ``head_kl``, ``ffn_kl``, ``layer_kl`` multiply the KL of these gates;
    the hidden gate's counts once for each place it acts at, and ``hidden_kl`` times more. ``tolerance``: how far below
    and above the target sparsity the expected one may be for a checkpoint to be taken (those last in training, the one
    of least validation loss); ``miss``: how far it may be in the end before it is an error. ``slack``: how far what is
    cut may be from the budget before the threshold moves. ``multiple``: widths are rounded to it. ``timed``: whether
    the report has the latency of both models. ``fast_share``, ``fast_steps``: rows that "fast" takes, and the steps it
    takes at least. ``check_every``: steps between looks at the expected sparsity.
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
    timed: bool = True
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


def probabilities(found: Mapping[str, Any], steepness: float) -> Any:
    return jax.tree.map(lambda g: vtrans.keep_probability(g, steepness), found, is_leaf=vtrans.is_gate)


def make_objective(
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
    """L of `vtrans`' first paragraph, and what it is a function of: model, gates, lambda, step (map, teacher).

    ``model`` and ``teacher`` may be abstract.
    """
    apply, weights = functional(model)
    found = vtrans.init_gates(model, kinds, key)
    run = gates.gated(apply, model, kinds, multiply=vtrans.sample, kept=vtrans.stays)
    params: dict[str, Any] = {
        "model": weights, "gates": found, "lambda": {"1": jnp.zeros(()), "2": jnp.zeros(())}, "step": jnp.zeros(()),
    }  # fmt: skip
    distil = None
    if teacher is not None:
        distil = distillation(teacher, model, config.distil)
        params |= {"teacher": functional(teacher)[1], "map": vtrans_distil.new_map(counted.hidden)}
    times = {kind: getattr(config, f"{name}_kl") for kind, name in
             (("heads", "head"), ("ffn", "ffn"), ("sublayers", "layer"))}  # fmt: skip
    # the hidden gate's KL is added at every sub-layer that it follows
    times["hidden"] = config.hidden_kl + sum(1 for _ in units.sub_layers(model))
    start = float(counted.sparsity(jax.tree.map(vtrans.stays, found, is_leaf=vtrans.is_gate)))

    def objective(_: Any, params: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> tuple[jax.Array, dict]:
        inputs = inputs_of(batch)
        noise, dropout = (None, None) if key is None else jax.random.split(key)
        seen: Any = {}
        forward = lambda p, b: run(p, b, params["gates"], rngs=dropout, key=noise)
        if distil is None:
            out = forward(params["model"], inputs)
            fitted = task(out, batch)
        else:
            out, seen = reap(forward, "layers.*.output")(params["model"], inputs)
            there = existing(params["gates"], len(seen))
            fitted = distil(params, out, seen, inputs, there)
        s = counted.sparsity(probabilities(params["gates"], config.steepness))
        t = vtrans.warmed_target(jax.lax.stop_gradient(params["step"]), start, 1 - keep, config.warmup * steps)
        pushed = vtrans.lagrangian(s, t, params["lambda"]["1"], params["lambda"]["2"])
        spread = jnp.asarray(0.0)
        for kind, mine in params["gates"].items():
            for gate in jax.tree.leaves(mine, is_leaf=vtrans.is_gate):
                spread = spread + vtrans.kl(gate, times[kind])
        total = fitted + config.kl_factor * spread + pushed
        return total, {"task": fitted, "sparsity": s, "target": t, "kl": spread, "lambda_2": params["lambda"]["2"]}

    return objective, params


def frozen(params: Mapping[str, Any], mode: str) -> tuple[str, ...]:
    """Paths of ``params`` that are not trained."""
    return (*(("teacher.**",) if "teacher" in params else ()), *(("model.**",) if mode == "faster" else ()))


def existing(found: Mapping[str, Any], depth: int) -> jax.Array:
    """Which layers have a sub-layer left, by the gates of layers."""
    if "sublayers" not in found:
        return jnp.ones(depth, bool)
    parts = [[g for path, g in found["sublayers"].items() if path.startswith(f"layers.{i}.")] for i in range(depth)]
    return jnp.stack([jnp.stack([vtrans.stays(g) for g in mine]).max() > 0 for mine in parts])


def distillation(teacher: nnx.Module, model: nnx.Module, config: DistilConfig) -> Callable:
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


def make_optimizer(config: VTransConfig, steps: int) -> optax.GradientTransformation:
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


class Best:
    """Keeps the parameters whose expected sparsity is at the budget, of least loss on the validation rows where there
    are any, else the latest."""

    def __init__(self, counted: vtrans.Costs, config: VTransConfig, window: tuple, objective: Callable, rows: Any):
        self.counted, self.config, self.window = counted, config, window
        self.rows, self.params, self.loss = rows, None, float("inf")
        self.evaluate = jax.jit(lambda params, batch: objective(None, params, batch, None)[1]["task"])

    def __call__(self, params: Any, step: int) -> dict[str, float]:
        s = float(self.counted.sparsity(probabilities(params["gates"], self.config.steepness)))
        if not self.window[0] <= s <= self.window[1]:
            return {"expected_sparsity": s}
        loss = -float(step) if self.rows is None else mean(self.evaluate, params, self.rows, self.config.batch)
        if loss < self.loss:
            self.loss, self.params = loss, jax.tree.map(jnp.array, params)
        return {"expected_sparsity": s, "selection_loss": loss}


def inputs_of(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: x for name, x in batch.items() if name != "labels"}
