"""Losses over a vocabulary, formed for a few positions at a time: no model's logits are ever there as a whole.

Logits of B sequences of L tokens over V entries take 4 B L V bytes in float32: 12.6 GB for 12 x 2048 x 128k, and
distillation wants those of two models. What both functions here take instead is the last hidden states and a ``head``
that makes logits of them. Positions are gone through in pieces of ``chunk``; the way back forms each piece again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformers.losses import IGNORE, kl_divergence

Head = Callable[[jax.Array], jax.Array]  # hidden states (B, l, D) -> logits (B, l, V)
AT_ONCE = 2**28  # numbers that a piece of logits may have when nobody says: 1 GiB in float32, over all devices


def by_chunks(f: Callable[[Any], Any], rows: Any, chunk: int) -> Any:
    """``f(rows)`` for a tree of arrays (B, L, …) and a function that treats positions alike, ``chunk`` of them at a
    time along L; what ``f`` returns, a tree of (B, l, …), is put together. Gradients recompute ``f``.

    The batch stays whole, so that it may be cut over devices. Raises ValueError for a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk: expected 1 or more positions, got {chunk}")
    length = jax.tree.leaves(rows)[0].shape[1]
    f = jax.checkpoint(f)
    if length <= chunk:
        return f(rows)
    pieces = -(-length // chunk)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, pieces * chunk - length), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(len(x), pieces, chunk, *x.shape[2:]).swapaxes(0, 1)

    def join(y: jax.Array) -> jax.Array:
        y = y.swapaxes(0, 1)
        return y.reshape(len(y), pieces * chunk, *y.shape[3:])[:, :length]

    return jax.tree.map(join, jax.lax.map(f, jax.tree.map(cut, rows)))


def token_terms(
    hidden: Float[Array, "batch length width"],
    head: Head,
    *,
    labels: Int[Array, "batch length"] | None = None,
    teacher: Float[Array, "batch length teacher_width"] | None = None,
    teacher_head: Head | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> dict[str, Float[Array, "batch length"]]:
    """What each position's logits ``head(hidden)`` cost, float32, in nats: ``nll`` with ``labels``, ``kl`` with
    ``teacher``, hidden states whose logits are ``teacher_head(teacher)``.

    ``nll`` = -log softmax(head(hidden))[label], 0 where the label is -100. ``kl`` = T^2 KL(teacher || student) of the
    distributions at temperature T (arXiv 1503.02531, section 2: gradients keep their size). No gradient reaches the
    teacher. ``chunk``: positions of each sequence at a time; None takes as many as make 2^28 logits of the whole batch,
    which is few on a mesh: say there what one device may hold of its part.

    Raises ValueError: the vocabularies differ, a temperature of 0 or less, or neither labels nor teacher.
    """
    if labels is None and teacher is None:
        raise ValueError("labels, teacher: give at least one of the two")
    if (teacher is None) != (teacher_head is None):
        raise ValueError("teacher, teacher_head: they go together")
    if not temperature > 0:
        raise ValueError(f"temperature: must be > 0, got {temperature}")
    vocab = jax.eval_shape(head, hidden[:, :1]).shape[-1]
    if teacher is not None:
        theirs = jax.eval_shape(teacher_head, teacher[:, :1]).shape[-1]
        if theirs != vocab:
            raise ValueError(f"teacher: its vocabulary has {theirs} entries, the student's {vocab}; they must be one")
    chunk = max(1, AT_ONCE // (hidden.shape[0] * vocab)) if chunk is None else chunk

    def terms(part: dict[str, Array]) -> dict[str, Array]:
        logits = head(part["hidden"]).astype(jnp.float32)
        found = {}
        if labels is not None:
            kept = part["labels"] != IGNORE
            picked = jnp.take_along_axis(logits, jnp.where(kept, part["labels"], 0)[..., None], axis=-1)[..., 0]
            found["nll"] = jnp.where(kept, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
        if teacher is not None:
            other = jax.lax.stop_gradient(teacher_head(part["teacher"]).astype(jnp.float32))
            found["kl"] = temperature**2 * kl_divergence(other, logits, temperature=temperature)
        return found

    rows = {"hidden": hidden}
    rows |= {} if labels is None else {"labels": labels}
    rows |= {} if teacher is None else {"teacher": jax.lax.stop_gradient(teacher)}
    return by_chunks(terms, rows, chunk)


def next_labels(
    input_ids: Int[Array, "batch length"], attention_mask: Int[Array, "batch length"] | None = None
) -> Int[Array, "batch length"]:
    """Each position's next token; -100 at the last position, and where this token or the next is padding."""
    labels = jnp.pad(input_ids[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
    if attention_mask is None:
        return labels
    real = attention_mask.astype(bool)
    both = real & jnp.pad(real[:, 1:], ((0, 0), (0, 1)))
    return jnp.where(both, labels, IGNORE)


def dpo_loss(
    chosen: Float[Array, "*pairs"],
    rejected: Float[Array, "*pairs"],
    reference_chosen: Float[Array, "*pairs"],
    reference_rejected: Float[Array, "*pairs"],
    *,
    beta: float,
) -> Float[Array, "*pairs"]:
    """Direct preference optimisation (arXiv 2305.18290, equation 7), of each pair of answers y_w over y_l:

        -log sigmoid( beta [ (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) ] )

    from the log-probabilities of whole answers, in nats. No gradient reaches the reference's. Raises ValueError for a
    beta of 0 or less.
    """
    if not beta > 0:
        raise ValueError(f"beta: must be > 0, got {beta}")
    reference = jax.lax.stop_gradient(reference_chosen - reference_rejected)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected - reference))
