"""MiniLM: a small encoder that imitates the self-attention of one layer of a large one, on unlabelled text.

"MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers" (arXiv 2002.10957)
and "MiniLMv2: Multi-Head Self-Attention Relation Distillation" (arXiv 2012.15828). Q, K, V are the projections of a
layer's input, split into A heads of size d_k; |x| is an example's number of real tokens. For a pair of them (X, Y)

    R = softmax( X Y^T / sqrt(d_k) )                                  rows are distributions over the real tokens
    L_XY = 1/(A |x|) sum_{a,t} KL( R_teacher[a,t] || R_student[a,t] )      then the mean over the examples
    L = sum_XY weight_XY L_XY

v1 takes QK (the attention distribution) and VV (the value relation) with the models' own heads, which must be equally
many; v2 takes QQ, KK and VV, re-split into relation heads, so that head counts and layers are free. A relation is
length x length whatever the width: no projection between the widths, no map between layers, no labels.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers import paths
from jaxformers.losses import kl_divergence
from jaxformers.train import distil

PROJECTIONS = {"Q": "query", "K": "key", "V": "value"}


@dataclasses.dataclass(frozen=True)
class MiniLMConfig:
    """Which relations of which layers the student imitates.

    `relations`: ((pair, weight), ...), a pair being two of Q, K, V, such as "QK". `relation_heads`: how many heads the
    concatenated projections are re-split into; None keeps the attention's own (v1). Layers are 1-based; None is the
    last. `causal`: the models are decoders, a token's relation reaches no later token.
    """

    relations: tuple[tuple[str, float], ...] = (("QK", 1.0), ("VV", 1.0))
    relation_heads: int | None = None
    teacher_layer: int | None = None
    student_layer: int | None = None
    causal: bool = False

    def __post_init__(self):
        names = [name for name, _ in self.relations]
        for name, weight in self.relations:
            if len(name) != 2 or set(name) - set(PROJECTIONS):
                raise ValueError(f"relations: a pair is two of Q, K, V such as 'QK', got {name!r}")
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"relations: the weight of {name} must be > 0 (or leave the pair out), got {weight}")
        if not names or len(set(names)) != len(names):
            raise ValueError(f"relations: at least one pair, each once; got {names}")
        if self.relation_heads is not None and self.relation_heads < 1:
            raise ValueError(f"relation_heads: must be >= 1 or None, got {self.relation_heads}")


def v1(*, attention: float = 1.0, value: float = 1.0, **options) -> MiniLMConfig:
    """MiniLM's loss: `attention` and `value` weigh its two terms; 0 switches one off."""
    pairs = (("QK", attention), ("VV", value))
    return MiniLMConfig(relations=tuple((name, w) for name, w in pairs if w != 0), **options)


def v2(*, relation_heads: int = 48, teacher_layer: int | None = None, **options) -> MiniLMConfig:
    """MiniLMv2's loss: QQ, KK and VV at 1/3 each. 48 relation heads for 768-wide teachers, 64 for 1024-wide ones."""
    options = {"relations": (("QQ", 1 / 3), ("KK", 1 / 3), ("VV", 1 / 3)), **options}
    return MiniLMConfig(relation_heads=relation_heads, teacher_layer=teacher_layer, **options)


def attention_distillation(
    q_t: Float[Array, "batch heads length size_t"],
    k_t: Float[Array, "batch heads length size_t"],
    q_s: Float[Array, "batch heads length size_s"],
    k_s: Float[Array, "batch heads length size_s"],
    mask: Int[Array, "batch length"] | None = None,
    *,
    causal: bool = False,
) -> Float[Array, ""]:
    """KL of the teacher's and the student's softmax(q k^T / sqrt(size)); with values in both places the value relation.

    `mask`: 1 = real token (None: all are). Each example weighs the same, whatever its length; one without a real token
    adds 0 and counts. Logits and KL are float32 (or wider). No gradient flows into the teacher.
    Raises ValueError when head counts or lengths differ.
    """
    for name, x, y in (("k_t", q_t, k_t), ("k_s", q_s, k_s)):
        if x.shape != y.shape:
            raise ValueError(f"{name}: shape {y.shape} differs from the other side of its relation, {x.shape}")
    if q_t.shape[1] != q_s.shape[1]:
        raise ValueError(
            f"MiniLM v1 needs equal head counts: teacher {q_t.shape[1]}, student {q_s.shape[1]}; use relation heads"
        )
    if (q_t.shape[0], q_t.shape[2]) != (q_s.shape[0], q_s.shape[2]):
        raise ValueError(f"q_s: batch and length of {q_s.shape} differ from the teacher's {q_t.shape}")
    return _relation_kl(_logits(q_t, k_t), _logits(q_s, k_s), mask, causal)


def relation_distillation(
    x_t: Float[Array, "batch length width_t"],
    y_t: Float[Array, "batch length width_t"],
    x_s: Float[Array, "batch length width_s"],
    y_s: Float[Array, "batch length width_s"],
    heads: int,
    mask: Int[Array, "batch length"] | None = None,
    *,
    causal: bool = False,
) -> Float[Array, ""]:
    """`attention_distillation` of whole projections, split here into `heads` relation heads (v2's loss of one pair).

    Raises ValueError when `heads` does not divide a width.
    """
    return attention_distillation(*(_split(x, heads) for x in (x_t, y_t, x_s, y_s)), mask, causal=causal)


def _relation_kl(teacher: Array, student: Array, mask: Array | None, causal: bool) -> Array:
    """Relation logits (batch, heads, query, key) of both models -> L_XY of the module's first paragraph."""
    batch, heads, length, _ = student.shape
    real = jnp.ones((batch, length), bool) if mask is None else mask.astype(bool)
    if real.shape != (batch, length):
        raise ValueError(f"mask: expected shape {(batch, length)}, got {real.shape}")
    visible = real[:, None, None, :]  # (batch, 1, 1, key)
    if causal:
        visible = visible & jnp.tril(jnp.ones((length, length), bool))
    kl = kl_divergence(jax.lax.stop_gradient(teacher), student, where=visible)  # (batch, heads, query)
    per_example = jnp.sum(jnp.where(real[:, None, :], kl, 0.0), axis=(1, 2))
    return jnp.mean(per_example / (heads * jnp.maximum(jnp.sum(real, axis=1), 1)))


def _logits(x: Array, y: Array) -> Array:
    """(batch, heads, length, size) twice -> (batch, heads, query, key) in float32 at least."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    s = jnp.einsum("bhqd,bhkd->bhqk", x, y, precision="highest", preferred_element_type=wide)
    return s / math.sqrt(x.shape[-1])


def _split(x: Array, heads: int) -> Array:
    """(batch, length, width) -> (batch, heads, length, width / heads)"""
    batch, length, width = x.shape
    if width % heads:
        raise ValueError(f"heads: {heads} relation heads do not divide the width {width}")
    return x.reshape(batch, length, heads, width // heads).swapaxes(1, 2)


# ---- whole models ----------------------------------------------------------------------------------------------------


def minilm_objective(
    teacher: nnx.Module, student: nnx.Module, config: MiniLMConfig = MiniLMConfig(), **options: Any
) -> tuple[Callable, dict[str, Any], tuple[str, ...]]:
    """What `jaxformers.train.fit` needs to make `student` imitate `teacher`: (objective, params, freeze).

        objective, params, freeze = minilm_objective(teacher, student)
        result = fit(objective, params, batches, TrainConfig(steps=..., freeze=freeze), key=key)
        student = jf.with_params(student, result.params["student"])

    `params` is {"student": ..., "teacher": ...}; the teacher runs without dropout and without gradient. `freeze` names
    the teacher and the parts of the student that the loss does not reach (of a BERT: what comes after the projections
    of the chosen layer), so that weight decay leaves them alone too. Batches hold input_ids and attention_mask (B, L),
    and may hold what `teacher_rows` adds; the teacher is then not run. Metrics: each relation under its pair's name.
    `options` (scan_layers, remat) go to `jaxformers.functional` for the student; stacked layers cannot be frozen one by
    one and are left to the optimiser.

    Raises ValueError where layers, head counts, relation heads and widths of the two models do not fit together.
    """
    layers = check_models(teacher, student, config)
    own = [model.layers[layer - 1].attention for model, layer in zip((teacher, student), layers, strict=True)]

    def loss(above: distil.View, below: distil.View, batch: Mapping[str, Array]):
        terms = {}
        for pair, _ in config.relations:
            t = _relation_logits(config, pair, above.seen, layers[0], own[0])
            s = _relation_logits(config, pair, below.seen, layers[1], own[1])
            terms[pair] = _relation_kl(t, s, batch.get("attention_mask"), config.causal)
        return sum(weight * terms[pair] for pair, weight in config.relations), terms

    sites = {"teacher_sites": _sites(config, layers[0]), "student_sites": _sites(config, layers[1])}
    objective, params, frozen = distil.imitation(teacher, student, loss, **sites, **options)
    if not options.get("scan_layers"):
        reached = _reached(student, config, layers[1])
        frozen += tuple(f"student.{p}" for p in paths.flatten(params["student"]) if not paths.matches(reached, p))
    return objective, params, frozen


def teacher_rows(
    teacher: nnx.Module,
    rows: Mapping[str, Any],
    configs: Iterable[MiniLMConfig],
    *,
    batch_size: int = 32,
    dtype: str = "float16",
) -> dict[str, np.ndarray]:
    """`rows`, and what students by any of `configs` need to see of `teacher` there, computed once and for all.

    See `jaxformers.train.distil.teacher_rows`. `rows`: input_ids, attention_mask (n, L); added are arrays
    "teacher.<site>" in `dtype`: (n, L, width) for a projection, (n, heads, L, L) for v1's scores. All of them are kept
    in memory. Raises ValueError when `configs` is empty.
    """
    chosen = [(config, len(teacher.layers) if config.teacher_layer is None else config.teacher_layer)
              for config in configs]  # fmt: skip
    if not chosen:
        raise ValueError("configs: at least one is needed")
    sites = sorted({site for config, layer in chosen for site in _sites(config, layer)})
    return distil.teacher_rows(teacher, rows, sites, batch_size=batch_size, dtype=dtype)


def check_models(teacher: nnx.Module, student: nnx.Module, config: MiniLMConfig) -> tuple[int, int]:
    """The 1-based layers of (teacher, student) that `config` means. Raises ValueError where they cannot be compared."""
    layers = []
    for name, model, layer in (("teacher", teacher, config.teacher_layer), ("student", student, config.student_layer)):
        if not hasattr(model, "layers"):
            raise ValueError(f"{name}: expected a model with .layers of attention blocks, got {type(model).__name__}")
        layer = len(model.layers) if layer is None else layer
        if not 1 <= layer <= len(model.layers):
            raise ValueError(f"{name}_layer: {layer} is not in 1..{len(model.layers)}")
        layers.append(layer)
        if is_causal(model) != config.causal:
            kind = "a decoder" if is_causal(model) else "an encoder"
            raise ValueError(f"causal: the {name} is {kind}, the relations are to be causal={config.causal}")
    own = [model.layers[layer - 1].attention for model, layer in zip((teacher, student), layers, strict=True)]
    for name, attention in zip(("teacher", "student"), own, strict=True):
        for projection in PROJECTIONS.values():
            if not hasattr(attention, projection):
                kind = type(attention).__name__
                raise ValueError(f"{name}: relations compare queries, keys and values; its {kind} has no {projection}")
    for pair, _ in config.relations:
        for name, attention in zip(("teacher", "student"), own, strict=True):
            widths = [_width(attention, letter) for letter in pair]
            if config.relation_heads is None and pair == "QK":
                continue  # read as scores, whatever the keys' own width
            if widths[0] != widths[1]:
                raise ValueError(f"relations: {pair} of the {name} compares widths {widths[0]} and {widths[1]}")
            if config.relation_heads is not None and widths[0] % config.relation_heads:
                n = config.relation_heads
                raise ValueError(f"relation_heads: {n} do not divide the {name}'s width {widths[0]} of {pair}")
        if config.relation_heads is None:
            counts = [_own_heads(attention, pair) for attention in own]
            if counts[0] != counts[1]:
                raise ValueError(
                    f"MiniLM v1 needs equal head counts: teacher {counts[0]}, student {counts[1]}; use relation heads"
                )
    return layers[0], layers[1]


def is_causal(model: nnx.Module) -> bool:
    """Is it a decoder, whose tokens see nothing to their right?"""
    heads = importlib.import_module(type(model.config).__module__).HEADS
    return "causal_lm" in heads and getattr(model.config, "is_decoder", True)  # a BERT may be either


def _own_heads(attention: Any, pair: str) -> int:
    return attention.heads if "Q" in pair else attention.kv_heads


def _width(attention: Any, letter: str) -> int:
    return attention.size * (attention.heads if letter == "Q" else attention.kv_heads)


def _sites(config: MiniLMConfig, layer: int) -> list[str]:
    """The sites that hold what the relations compare."""
    prefix, names = f"layers.{layer - 1}.attention", set()
    for pair, _ in config.relations:
        if pair == "QK" and config.relation_heads is None:
            names.add(f"{prefix}.scores")  # the model's own attention, rotary positions and biases included
        else:
            names |= {f"{prefix}.{PROJECTIONS[letter]}.output" for letter in pair}
    return sorted(names)


def _relation_logits(config: MiniLMConfig, pair: str, seen: Mapping[str, Array], layer: int, attention: Any) -> Array:
    """(batch, heads, query, key) before the mask."""
    prefix = f"layers.{layer - 1}.attention"
    if pair == "QK" and config.relation_heads is None:
        scores = seen[f"{prefix}.scores"]
        return scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    heads = config.relation_heads or _own_heads(attention, pair)
    return _logits(*(_split(seen[f"{prefix}.{PROJECTIONS[letter]}.output"], heads) for letter in pair))


def _reached(model: nnx.Module, config: MiniLMConfig, layer: int) -> list[str]:
    """Patterns of the parameters below the relations of `layer`."""
    used = sorted({PROJECTIONS[letter] for pair, _ in config.relations for letter in pair})
    reached = ["embeddings.**", *(f"layers.{i}.**" for i in range(layer - 1))]
    reached += [f"layers.{layer - 1}.attention.{name}.**" for name in used]
    if model.layers[layer - 1].prenorm:
        reached.append(f"layers.{layer - 1}.attention_norm.**")
    return reached
