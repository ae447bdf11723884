"""Teacher Intervention: ternary weights that converge, as the full-precision teacher lends the student its attention.

"Teacher Intervention: Improving Convergence of Quantization Aware Training for Ultra-Low Precision Transformers" (arXiv
2302.11812). Student and teacher are one encoder; the student's linear layers compute TWN(W) · Q8(x) + b, its word
embeddings are ternary row by row, and Q, K, V and P are rounded to 8 bits before their products. With the signals of
each layer, S = QKᵀ/√d masked, P = softmax(S), C = PV, H = C W_O + b and A = LayerNorm(dropout(H) + X), it learns

    L = L_pred + L_rep + L_out + L_score                                                  (knowledge distillation)
    L_pred = −Σ softmax(z_T) log softmax(z_S), or MSE of z (regression);   L_rep = Σ MSE of embeddings, layer outputs;
    L_out = Σ_layers MSE(A_S, A_T);   L_score = Σ_layers MSE(S_S, S_T), entries ≤ −100 set to 0

For the first s steps an intervention puts the teacher's signal where the student would use its own, in every layer:

    map (TI-M)      P := P_T      no gradient through the layer's input of Q, K
    context (TI-C)  C := C_T      nor through that of V
    output (TI-O)   H := H_T      likewise

so that the error of one layer's attention reaches neither the layers above nor those below. ``gradual`` (TI-G) takes
output, context, map in turn: less and less help. Then plain training, with a new optimiser, for the remaining steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import paths
from jaxformers.fake_quant import EIGHT_BITS, TERNARY, Quantiser
from jaxformers.functional import functional
from jaxformers.losses import cross_entropy
from jaxformers.sites import edit, reap

MODES = ("none", "map", "context", "output")
INTERVENTIONS = (*MODES, "gradual", "inverted", "stochastic")
SITE = {"map": "attention.probs", "context": "attention.context", "output": "attention.out.output"}
CUT = {"map": "{query,key}", "context": "{query,key,value}", "output": "{query,key,value}"}
MARK = "intervention."  # before the mode's name: an array of a batch that says which intervention is on
SEEN = {  # the sites that each term of the loss compares; A is what enters the MLP, in pre- and post-norm blocks alike
    "rep": ("embeddings", "layers.*.output"),
    "out": ("layers.*.mlp.up.input",),
    "score": ("layers.*.attention.scores",),
}
MASKED = -100.0  # scores from here down are masked ones
EMBEDDINGS = dataclasses.replace(TERNARY, granularity="row")


@dataclasses.dataclass(frozen=True)
class TIConfig:
    """`intervention` of the first `step1` optimiser steps (the paper: 60; 120 for CoLA and TinyBERT of 4 layers).

    The loss's weights, 0 leaves a term out; `truth`: of the cross-entropy with the labels (regression: of the MSE to
    the teacher's prediction, as in the authors' code). `kernels`: ((pattern, Quantiser), ...) in place of
    :func:`ternary_kernels`; `inputs` and `attention`: how activations are rounded.
    """

    intervention: str = "gradual"
    step1: int = 60
    pred: float = 1.0
    rep: float = 1.0
    out: float = 1.0
    score: float = 1.0
    truth: float = 0.0
    kernels: tuple[tuple[str, Quantiser], ...] | None = None
    inputs: Quantiser | None = EIGHT_BITS
    attention: Quantiser | None = EIGHT_BITS

    def __post_init__(self):
        if self.intervention not in INTERVENTIONS:
            raise ValueError(
                f"intervention: exactly one of {', '.join(INTERVENTIONS)} (two at once are undefined), "
                f"got {self.intervention!r}"
            )
        if self.step1 < 1:
            raise ValueError(f"step1: expected 1 step or more, got {self.step1}; 'none' does without")
        terms = {name: getattr(self, name) for name in ("pred", "rep", "out", "score", "truth")}
        for name, weight in terms.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name}: a loss's weight is 0 or more, got {weight}")
        if not any(terms.values()):
            raise ValueError("pred, rep, out, score, truth: at least one loss must have a weight above 0")


def ternary_kernels(model: nnx.Module) -> dict[str, Quantiser]:
    """What is ternary in the paper: all linear layers of the blocks and the pooler, one scale each; word embeddings,
    one scale a row. The head's last layer, position and type embeddings and norms are not. {pattern: Quantiser}"""
    rules = {"layers.*.attention.{query,key,value,out}": TERNARY, "layers.*.mlp.{up,gate,down}": TERNARY}
    if getattr(model, "pooler", None) is not None:
        rules["pooler"] = TERNARY
    if getattr(model.head, "dense", None) is not None:
        rules["head.dense"] = TERNARY  # where a RoBERTa has its pooler
    if getattr(model.embeddings, "token", None) is not None:
        rules["embeddings.token"] = EMBEDDINGS
    return rules


def mode_schedule(intervention: str, steps: int, key: jax.Array) -> tuple[str, ...]:
    """The mode of each of the `steps` steps of step 1; none for the intervention "none".

    "gradual": output before steps/6, context before steps/3, then map. "inverted": map before steps/3, context before
    2 steps/3, then output. "stochastic": one of the three at random in each step, by `key`.
    """
    t = range(steps)
    if intervention == "none":
        return ()
    if intervention == "gradual":
        return tuple("output" if 6 * i < steps else "context" if 3 * i < steps else "map" for i in t)
    if intervention == "inverted":
        return tuple("map" if 3 * i < steps else "context" if 3 * i < 2 * steps else "output" for i in t)
    if intervention == "stochastic":
        return tuple(MODES[1 + i] for i in np.asarray(jax.random.randint(key, (steps,), 0, 3)))
    if intervention not in MODES:
        raise ValueError(f"intervention: expected one of {', '.join(INTERVENTIONS)}, got {intervention!r}")
    return (intervention,) * steps


def intervene(apply: Callable, mode: str, signals: Mapping[str, jax.Array]) -> Callable:
    """`apply` in which the sites of `mode` have the teacher's values, and the gradient stops before Q, K (and V).

    `signals`: what `reap(teacher, "layers.*." + SITE[mode])` has read. With `apply` already a reap, that reads the
    student's own values: they are computed all the same, and learnt from.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "none":
        return apply
    lent = {name: (lambda _, value=value: value) for name, value in signals.items() if name.endswith(SITE[mode])}
    if not lent:
        raise ValueError(f"signals: none of the teacher's {SITE[mode]} is among {list(signals)[:4]}")
    return edit(apply, {f"layers.*.attention.{CUT[mode]}.input": jax.lax.stop_gradient, **lent})


def distillation_losses(
    teacher: tuple[jax.Array, Mapping[str, jax.Array]],
    student: tuple[jax.Array, Mapping[str, jax.Array]],
    attention_mask: jax.Array | None,
    *,
    regression: bool = False,
) -> dict[str, jax.Array]:
    """{"pred", "rep", "out", "score"} of two (logits (B, labels), seen sites); a term whose sites were not read is left
    out. Means run over padding too; keys that `attention_mask` (B, L) masks count as scores of 0."""
    (z_t, seen_t), (z_s, seen_s) = teacher, student
    soft = -jnp.mean(jnp.sum(jax.nn.softmax(z_t) * jax.nn.log_softmax(z_s), axis=-1))
    found = {"pred": _mse(z_s, z_t) if regression else soft}
    for term, patterns in SEEN.items():
        names = [name for name in seen_s if paths.matches(patterns, name)]
        view = (lambda x: _unmasked(x, attention_mask)) if term == "score" else (lambda x: x)
        if names:
            found[term] = sum(_mse(view(seen_s[name]), view(seen_t[name])) for name in names)
    return found


def _unmasked(scores: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    real = scores > MASKED
    if attention_mask is not None:
        real = real & (attention_mask[:, None, None, :] != 0)
    return jnp.where(real, scores, 0.0)


def _mse(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x - y))


def ti_objective(
    teacher: nnx.Module, student: nnx.Module, config: TIConfig = TIConfig(), **options: Any
) -> tuple[Callable, dict[str, Any], tuple[str, ...]]:
    """What `fit` needs: (objective, params, freeze), params being {"student": ..., "teacher": ...}.

    A batch holds the models' inputs, perhaps "labels", and perhaps one array MARK + mode (any values, (B,)): the
    intervention of this step. Metrics: the terms of the loss, and `mode`, the mode's place in MODES. `options`
    (scan_layers, remat) go to `functional` for the student. Raises ValueError as :func:`check_models`; when tracing,
    for a batch with two marks, and for `truth` without labels.
    """
    forward = forward_pass(teacher, student, config, options)

    def objective(apply: Any, params: dict[str, Any], batch: Mapping[str, jax.Array], key: jax.Array | None):
        loss, found, _ = forward(params, batch, key)
        return loss, found

    params = {"student": functional(student, **options)[1], "teacher": functional(teacher)[1]}
    return objective, params, ("teacher.**",)


def forward_pass(teacher: nnx.Module, student: nnx.Module, config: TIConfig, options: Mapping[str, Any]) -> Callable:
    """(params, batch, key) -> (loss, its terms and the mode, the student's logits)"""
    check_models(teacher, student)
    teach, learn = functional(teacher)[0], functional(student, **options)[0]
    terms = {name: getattr(config, name) for name in ("pred", "rep", "out", "score", "truth")}
    common = tuple(site for term, sites in SEEN.items() if terms[term] for site in sites)
    regression = student.config.num_labels == 1
    watch = lambda apply, sites: reap(apply, sites) if sites else lambda *a, **k: (apply(*a, **k), {})

    def run(params: dict[str, Any], batch: Mapping[str, jax.Array], key: jax.Array | None):
        mode = mode_of(batch)
        inputs = {k: v for k, v in batch.items() if k != "labels" and not k.startswith(MARK)}
        lent = () if mode == "none" else (f"layers.*.{SITE[mode]}",)
        known, seen_t = watch(teach, (*common, *lent))(jax.lax.stop_gradient(params["teacher"]), inputs)
        learnt = _no_padding(params["student"], getattr(student.config, "pad_token_id", None))
        made, seen_s = intervene(watch(learn, common), mode, seen_t)(learnt, inputs, rngs=key)
        both = (known.logits, seen_t), (made.logits, seen_s)
        found = distillation_losses(*both, inputs.get("attention_mask"), regression=regression)
        if terms["truth"]:
            if not regression and "labels" not in batch:
                raise ValueError("batch: the loss's term `truth` needs labels")
            own, theirs = made.logits, known.logits
            found["truth"] = _mse(own, theirs) if regression else cross_entropy(own, batch["labels"])
        loss = sum(terms[name] * value for name, value in found.items())
        return loss, {**found, "mode": jnp.float32(MODES.index(mode))}, made.logits

    return run


def _no_padding(params: Any, pad: int | None) -> Any:
    """`params` whose token table learns nothing in the row of padding, as PyTorch's models have it: L_rep counts
    padding too, and would fill the table's gradient with it."""
    fixed = lambda x: jnp.asarray(x).at[pad].set(jax.lax.stop_gradient(x[pad]))
    table = lambda path: paths.matches("embeddings.token.embedding{,.base}", paths.dotted(path))
    if pad is None:
        return params
    return jax.tree_util.tree_map_with_path(lambda path, x: fixed(x) if table(path) else x, params)


def mode_of(batch: Mapping[str, Any]) -> str:
    """The intervention that a batch is marked with. Raises ValueError for two at once, and an unknown one."""
    marks = [name.removeprefix(MARK) for name in batch if name.startswith(MARK)]
    if len(marks) > 1:
        raise ValueError(f"batch: only one intervention may be on, it is marked with {marks}")
    if marks and marks[0] not in MODES:
        raise ValueError(f"batch: intervention {marks[0]!r} is unknown; there are {', '.join(MODES)}")
    return marks[0] if marks else "none"


def check_models(teacher: nnx.Module, student: nnx.Module) -> None:
    """Raises ValueError where the signals of one cannot stand for those of the other, or there are no logits."""
    shapes = {}
    for name, model in (("teacher", teacher), ("student", student)):
        if not hasattr(model, "layers") or not hasattr(model.layers[0], "attention"):
            raise ValueError(f"{name}: expected an encoder, layers of attention blocks, got {type(model).__name__}")
        if model.head_name not in ("sequence_classification", "image_classification"):
            raise ValueError(f"{name}: needs a classification or regression head, it has {model.head_name}")
        heads = {layer.attention.heads for layer in model.layers}
        shapes[name] = (len(model.layers), *sorted(heads), model.config.hidden_size, model.config.num_labels)
    if shapes["teacher"] != shapes["student"]:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"intervention needs equal shapes: (layers, heads, width, labels) are {told}")
