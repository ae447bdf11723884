"""Losses that several systems share: pure functions of arrays, computed in float32 or wider.

Every function takes plain arrays, returns a scalar (or a per-row array where it says so) and can be jitted,
differentiated and sharded. Similarities are computed at `precision="highest"`: a contrastive loss multiplies them by
up to 100, which bfloat16 passes of an accelerator would turn into noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

IGNORE = -100  # the label that Hugging Face and torch leave out of a cross-entropy
MAX_SCALE = 100.0  # CLIP's bound on a learnable similarity scale
MASKED = -1e30  # finite, so that differences of masked logits are 0 and not NaN


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, ignore_index: int = IGNORE, class_weights: jax.Array | None = None
) -> jax.Array:
    """Mean negative log-likelihood over the labels that are not `ignore_index`.

    logits (..., classes), labels (...) int -> scalar in nats; 0 when every label is ignored (torch gives NaN there).
    `class_weights` (classes,): sum w_label nll / sum w_label, as torch weighs; 0 when the weights add up to 0.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels: expected shape {logits.shape[:-1]} for logits {logits.shape}, got {labels.shape}")
    kept = labels != ignore_index
    inside = jnp.where(kept, labels, 0)
    log_p = jax.nn.log_softmax(_wide(logits), axis=-1)
    picked = jnp.take_along_axis(log_p, inside[..., None], axis=-1)[..., 0]
    if class_weights is None:
        return -jnp.sum(jnp.where(kept, picked, 0.0)) / jnp.maximum(jnp.sum(kept), 1)
    weights = jnp.asarray(class_weights, log_p.dtype)
    if weights.shape != logits.shape[-1:]:
        raise ValueError(f"class_weights: expected one for each of {logits.shape[-1]} classes, got {weights.shape}")
    weight = jnp.where(kept, weights[inside], 0.0)
    total = jnp.sum(weight)
    return -jnp.sum(weight * picked) / jnp.where(total > 0, total, 1.0)


def sample_losses(output: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The loss of each sample (B,) of a model's output with logits, by the targets that ``batch`` has.

    "labels" (B,): cross-entropy of classes, or of numbers (floating) the squared error; (B, L): of tokens, a mean over
    those with a label from 0 on; "start_positions" and "end_positions" (B,): of a span's ends, the mean of the two.
    """
    logits = output.logits.astype(jnp.float32)
    picked = lambda scores, at: -jnp.take_along_axis(jax.nn.log_softmax(scores), at[..., None], -1)[..., 0]
    if "start_positions" in batch:
        ends = [batch["start_positions"], batch["end_positions"]]
        return sum(picked(logits[..., i], end.clip(0, logits.shape[1] - 1)) for i, end in enumerate(ends)) / 2
    labels = batch["labels"]
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return jnp.square(logits.reshape(len(labels), -1) - labels.reshape(len(labels), -1)).mean(-1)
    if labels.ndim == 1:
        return picked(logits, labels)
    real = labels >= 0
    return jnp.where(real, picked(logits, jnp.maximum(labels, 0)), 0).sum(-1) / jnp.maximum(real.sum(-1), 1)


def kl_divergence(
    teacher_logits: jax.Array, student_logits: jax.Array, *, where: jax.Array | None = None, temperature: float = 1.0
) -> jax.Array:
    """KL(softmax(teacher) || softmax(student)) over the last axis, in nats.

    (..., classes) twice -> (...). `where` (broadcastable, bool) restricts both distributions to its True classes; a row
    without any gives 0. `temperature` divides both logits (the usual T^2 factor is left to the caller). Works on
    log-softmaxes alone, so a class of probability 0 contributes 0 and not NaN. The teacher gets a gradient like any
    other argument: stop it outside where that is not wanted.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: must be > 0, got {temperature}")
    t, s = _wide(teacher_logits) / temperature, _wide(student_logits) / temperature
    if where is not None:
        t, s = jnp.where(where, t, MASKED), jnp.where(where, s, MASKED)
    log_t, log_s = jax.nn.log_softmax(t, axis=-1), jax.nn.log_softmax(s, axis=-1)
    terms = jnp.exp(log_t) * (log_t - log_s)
    return jnp.sum(terms if where is None else jnp.where(where, terms, 0.0), axis=-1)


def supcon_loss(
    features: jax.Array,
    labels: jax.Array,
    *,
    temperature: float | None = None,
    log_scale: jax.Array | None = None,
    eps: float = 1e-12,
    compat: str | None = None,
    block_rows: int | None = None,
) -> jax.Array:
    """Supervised contrastive loss over all views (Khosla et al. 2020, eq. 2; as STAR and LinkTransformer use it).

    features (rows, width), or (batch, views, width) whose views share their row's label; labels (rows,) or (batch,).
    With cosine similarities S = s * z z^T, positives P(i) = the other rows of i's label:

        L = - mean_i  1/|P(i)|  sum_{j in P(i)}  ( S_ij - m_i - log( sum_{a != i} exp(S_ia - m_i) + eps ) )

    with m_i = max_j S_ij (the anchor's own entry included), over the anchors that have a positive; 0 when none has
    (check the labels with `has_positives` first where that matters). The scale s is 1/temperature (default 1/0.07), or
    min(exp(log_scale), 100) with `log_scale` learnable; giving both is an error. `eps` is STAR's: a floor under the
    sum, which tells at scale 100, where m_i is the anchor's own 100; eps=0 gives the plain log-sum-exp of the paper
    (LinkTransformer).

    `compat="star"` computes what the published STAR code computes: the second factor is normalised per feature
    *dimension over the batch* (S is then no cosine and not symmetric), the scale is max(exp(log_scale), 100) with
    log_scale 0.07 (so constantly 100, without gradient), and an anchor without a positive makes the loss NaN.

    `block_rows` bounds memory to block_rows * rows: similarities are formed for that many anchors at a time and formed
    again on the way back, so that the full matrix never exists. The default takes blocks above 4096 rows.
    """
    z, labels = _views_to_rows(features, labels)
    if temperature is not None and log_scale is not None:
        raise ValueError("temperature: give either temperature or log_scale, not both")
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature: must be > 0, got {temperature}")
    if compat not in (None, "star"):
        raise ValueError(f"compat: must be None or 'star', got {compat!r}")
    if compat == "star" and temperature is not None:
        raise ValueError("temperature: the published STAR loss has none (its scale is clamped from below at 100)")
    if eps < 0:
        raise ValueError(f"eps: must be >= 0, got {eps}")
    if block_rows is not None and block_rows < 1:
        raise ValueError(f"block_rows: must be >= 1, got {block_rows}")

    z = _wide(z)
    n = z.shape[0]
    if compat == "star":
        log_scale = 0.07 if log_scale is None else log_scale
        scale, other = jnp.maximum(jnp.exp(log_scale), MAX_SCALE), normalize(z, axis=0)
    else:
        scale = 1.0 / (temperature or 0.07) if log_scale is None else jnp.minimum(jnp.exp(log_scale), MAX_SCALE)
        other = normalize(z)

    def anchor(z_i, label_i, i):
        s = scale * jnp.matmul(other, z_i, precision="highest")  # (n,)
        rest = jnp.arange(n) != i
        positive = rest & (labels == label_i)
        if eps:
            top = jax.lax.stop_gradient(jnp.max(s))
            log_z = top + jnp.log(jnp.sum(jnp.where(rest, jnp.exp(s - top), 0.0)) + eps)
        else:
            log_z = jax.nn.logsumexp(jnp.where(rest, s, MASKED))
        return jnp.sum(jnp.where(positive, s - log_z, 0.0)), jnp.sum(positive)

    rows = (normalize(z), labels, jnp.arange(n))
    block_rows = block_rows or (n if n <= 4096 else 1024)
    if block_rows >= n:
        total, count = jax.vmap(anchor)(*rows)
    else:  # checkpointed: the way back forms each block again
        total, count = jax.lax.map(lambda row: jax.checkpoint(anchor)(*row), rows, batch_size=block_rows)
    if compat == "star":
        return -jnp.mean(total / count)
    has = count > 0
    return -jnp.sum(jnp.where(has, total / jnp.maximum(count, 1), 0.0)) / jnp.maximum(jnp.sum(has), 1)


def has_positives(labels) -> jax.Array:
    """(rows,) labels -> (rows,) bool: does another row carry the same label?"""
    labels = jnp.asarray(labels)
    order = jnp.argsort(labels)
    s = labels[order]
    same = jnp.concatenate([s[1:] == s[:-1], jnp.zeros((1,), bool)])
    either = same | jnp.concatenate([jnp.zeros((1,), bool), same[:-1]])
    return jnp.zeros(labels.shape, bool).at[order].set(either)


def info_nce(
    anchors: jax.Array, replicas: jax.Array, *, log_scale: float | jax.Array = 0.07, compat: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Symmetric InfoNCE of paired rows (the CLIP loss) and its accuracy.

    anchors, replicas (batch, width); row i of one belongs to row i of the other. Scale min(exp(log_scale), 100).
    Returns (loss, accuracy): accuracy is the mean share of rows and of columns whose largest entry is the diagonal.
    `compat="star"` normalises the replicas per feature dimension over the batch, as the published STAR code does.
    """
    if anchors.shape != replicas.shape or anchors.ndim != 2:
        raise ValueError(f"replicas: shape {replicas.shape} must equal that of anchors {anchors.shape}, (batch, width)")
    if compat not in (None, "star"):
        raise ValueError(f"compat: must be None or 'star', got {compat!r}")
    a, r = normalize(_wide(anchors)), normalize(_wide(replicas), axis=0 if compat == "star" else -1)
    s = jnp.minimum(jnp.exp(log_scale), MAX_SCALE) * jnp.matmul(a, r.T, precision="highest")  # (batch, batch)
    own = jnp.arange(s.shape[0])
    loss = (cross_entropy(s, own) + cross_entropy(s.T, own)) / 2
    return loss, (jnp.mean(jnp.argmax(s, 1) == own) + jnp.mean(jnp.argmax(s, 0) == own)) / 2


def online_contrastive_loss(u: jax.Array, v: jax.Array, labels: jax.Array, *, margin: float = 0.5) -> jax.Array:
    """Contrastive loss on the hard pairs of a batch (sentence-transformers' OnlineContrastiveLoss, cosine distance).

    u, v (pairs, width), labels (pairs,) 0/1 -> scalar, summed over pairs. With d = 1 - cos(u, v): a negative is hard if
    d < max of the positives' d (or < mean of the negatives' d when there is at most one positive); a positive is hard
    if d > min of the negatives' d (or > mean of the positives' d when there is at most one negative).
    L = sum_{hard pos} d^2 + sum_{hard neg} relu(margin - d)^2; an empty set adds 0.
    """
    if u.shape != v.shape or u.ndim != 2 or labels.shape != u.shape[:1]:
        shapes = (u.shape, v.shape, labels.shape)
        raise ValueError(f"u, v, labels: expected (pairs, width) twice and (pairs,), got {shapes}")
    d = 1.0 - jnp.sum(normalize(_wide(u)) * normalize(_wide(v)), axis=-1)
    pos = labels.astype(bool)
    neg = ~pos
    n_pos, n_neg = jnp.sum(pos), jnp.sum(neg)
    mean_pos = jnp.sum(jnp.where(pos, d, 0.0)) / jnp.maximum(n_pos, 1)
    mean_neg = jnp.sum(jnp.where(neg, d, 0.0)) / jnp.maximum(n_neg, 1)
    hard_neg = neg & (d < jnp.where(n_pos > 1, jnp.max(jnp.where(pos, d, -jnp.inf)), mean_neg))
    hard_pos = pos & (d > jnp.where(n_neg > 1, jnp.min(jnp.where(neg, d, jnp.inf)), mean_pos))
    return jnp.sum(jnp.where(hard_pos, d**2, 0.0)) + jnp.sum(jnp.where(hard_neg, jax.nn.relu(margin - d) ** 2, 0.0))


def normalize(x: jax.Array, axis: int = -1, eps: float = 1e-12) -> jax.Array:
    """x / max(||x||_2, eps) along `axis`; a zero vector stays zero and has a finite gradient."""
    square = jnp.sum(x * x, axis=axis, keepdims=True)
    return x * jnp.where(square > eps * eps, jax.lax.rsqrt(jnp.maximum(square, eps * eps)), 1.0 / eps)


def _wide(x: jax.Array) -> jax.Array:
    """At least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _views_to_rows(features: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    if features.ndim not in (2, 3) or labels.shape != features.shape[:1]:
        raise ValueError(
            "features: expected (rows, width) or (batch, views, width) with labels of the first axis; "
            f"got features {features.shape}, labels {labels.shape}"
        )
    if features.ndim == 2:
        return features, labels
    batch, views, width = features.shape
    return features.swapaxes(0, 1).reshape(views * batch, width), jnp.tile(labels, views)  # view-major
