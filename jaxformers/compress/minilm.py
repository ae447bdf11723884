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
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformers.losses import kl_divergence

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
    batch, heads, length, _ = q_s.shape
    real = jnp.ones((batch, length), bool) if mask is None else mask.astype(bool)
    if real.shape != (batch, length):
        raise ValueError(f"mask: expected shape {(batch, length)}, got {real.shape}")

    visible = real[:, None, None, :]  # (batch, 1, 1, key)
    if causal:
        visible = visible & jnp.tril(jnp.ones((length, length), bool))
    teacher = jax.lax.stop_gradient(_logits(q_t, k_t))
    kl = kl_divergence(teacher, _logits(q_s, k_s), where=visible)  # (batch, heads, query)
    per_example = jnp.sum(jnp.where(real[:, None, :], kl, 0.0), axis=(1, 2))
    return jnp.mean(per_example / (heads * jnp.maximum(jnp.sum(real, axis=1), 1)))


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
