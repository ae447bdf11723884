"""The loss of a transducer (RNN-T): −log Σ over all alignments of a label sequence with the frames (arXiv 1211.3711).

A path through the lattice of T frames and U labels emits at each node (t, u) either a blank, which moves on to frame
t + 1, or label u + 1. With log-probabilities b(t, u) of the blank and l(t, u) of the next label,

    α(0, 0) = 0,   α(t, u) = logaddexp(α(t−1, u) + b(t−1, u), α(t, u−1) + l(t, u−1)),
    log P = α(T−1, U) + b(T−1, U),
    β(T, U) = 0,   β(t, u) = logaddexp(b(t, u) + β(t+1, u), l(t, u) + β(t, u+1)),
    ∂(−log P)/∂b(t, u) = −exp(α(t, u) + b(t, u) + β(t+1, u) − log P), and so for l with β(t, u+1).

All nodes of an anti-diagonal t + u are independent: both recursions are scans over T + U diagonals of U + 1 nodes, in
float32, and this is the implementation on all platforms. Every path crosses every diagonal once. So each diagonal is
kept relative to its largest entry, and what the gradient needs, exp(α + β − log P), is normalised by its own sum over
the diagonal: no difference of large numbers is ever taken.

About 4·B·T·U logaddexps and 6·B·(T+U)·(U+1) floats moved, next to B·T·(U+1)·V logits: the joint network that makes
those, not the recursion, is what takes time and memory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

NEVER = -1e30  # log-probability of what cannot be: finite, so that differences are never NaN


def transducer_loss(
    logits: jax.Array, labels: jax.Array, frames: jax.Array, lengths: jax.Array, *, blank: int = 0
) -> jax.Array:
    """Losses (B,) in nats, float32.

    ``logits`` (B, T, U+1, V) before softmax; ``labels`` (B, U) ids, none of them ``blank`` where it counts; ``frames``
    (B,) in 1..T and ``lengths`` (B,) in 0..U. What lies behind them may be anything, NaN included: neither losses nor
    gradients see it. Differentiable in ``logits``; the gradient is made in one pass over them.

    Raises ValueError for shapes that do not fit or a blank outside the vocabulary.
    """
    if logits.ndim != 4 or labels.ndim != 2 or labels.shape != (logits.shape[0], logits.shape[2] - 1):
        raise ValueError(f"expected logits (B, T, U + 1, V) and labels (B, U), got {logits.shape} and {labels.shape}")
    if not 0 <= blank < logits.shape[3]:
        raise ValueError(f"blank: expected an id in 0..{logits.shape[3] - 1}, got {blank}")
    _check_lengths(logits.shape[:3], frames, lengths)
    return _logits_loss(blank, logits, labels, frames, lengths)


def lattice_loss(blank: jax.Array, label: jax.Array, frames: jax.Array, lengths: jax.Array) -> jax.Array:
    """The same of a lattice: log-probabilities of the blank (B, T, U+1) and of the next label (B, T, U+1), whose last
    column does not matter. For joint networks that never hold all logits at once (:func:`columns` by parts).

    Differentiable in both. Raises ValueError for shapes that do not fit.
    """
    if blank.ndim != 3 or blank.shape != label.shape:
        raise ValueError(f"blank and label: expected (B, T, U + 1) both, got {blank.shape} and {label.shape}")
    _check_lengths(blank.shape, frames, lengths)
    return _lattice(blank, label, frames, lengths)


def columns(logits: jax.Array, labels: jax.Array, *, blank: int = 0) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities (…, U+1) of the blank and of the next label, float32, of ``logits`` (…, U+1, V); ``labels``
    (…, U) broadcast. The last label column is :data:`NEVER`."""
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1)
    padded = jnp.pad(labels, [(0, 0)] * (labels.ndim - 1) + [(0, 1)])
    padded = jnp.broadcast_to(padded, total.shape)[..., None]  # fillers behind a short sequence may be no ids
    picked = jnp.take_along_axis(logits, padded, axis=-1, mode="clip")[..., 0]
    last = jnp.arange(total.shape[-1]) == labels.shape[-1]
    return logits[..., blank] - total, jnp.where(last, NEVER, picked - total)


def _check_lengths(shape: tuple[int, ...], frames: jax.Array, lengths: jax.Array) -> None:
    for name, a, low, high in (("frames", frames, 1, shape[1]), ("lengths", lengths, 0, shape[2] - 1)):
        if a.shape != shape[:1]:
            raise ValueError(f"{name}: expected ({shape[0]},), got {a.shape}")
        if not isinstance(a, jax.core.Tracer) and not ((np.asarray(a) >= low) & (np.asarray(a) <= high)).all():
            raise ValueError(f"{name}: expected numbers in {low}..{high}, got {np.asarray(a).tolist()}")


# ----------------------------------------------------------------------------------------------------- recursions


def _skewed(x: jax.Array) -> jax.Array:
    """(B, T, U+1) by diagonals: (T+U, B, U+1), entry (n, b, u) being node (n − u, u); NEVER off the lattice."""
    _, length, width = x.shape
    t = np.arange(length + width - 1)[:, None] - np.arange(width)[None, :]
    inside = (t >= 0) & (t < length)
    picked = x[:, np.clip(t, 0, length - 1), np.arange(width)[None, :]]
    return jnp.moveaxis(jnp.where(inside, picked, NEVER), 1, 0)


def _straight(x: jax.Array, length: int) -> jax.Array:
    """The inverse of :func:`_skewed`."""
    width = x.shape[2]
    n = np.arange(length)[:, None] + np.arange(width)[None, :]
    return jnp.moveaxis(x, 0, 1)[:, n, np.arange(width)[None, :]]


def _shift(x: jax.Array, by: int) -> jax.Array:
    """Entries u + by along the last axis, NEVER where there is none."""
    side = (1, 0) if by < 0 else (0, 1)
    padded = jnp.pad(x, ((0, 0), side), constant_values=NEVER)
    return padded[:, :-1] if by < 0 else padded[:, 1:]


def _real(shape: tuple[int, ...], frames: jax.Array, lengths: jax.Array) -> jax.Array:
    """Which nodes (B, T, U+1) belong to each sample's lattice."""
    t, u = jnp.arange(shape[1])[None, :, None], jnp.arange(shape[2])[None, None, :]
    return (t < frames[:, None, None]) & (u <= lengths[:, None, None])


def _relative(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A diagonal (B, U+1) minus its largest entry (B,), which counts as 0 where nothing is reached."""
    top = x.max(axis=1)
    top = jnp.where(top > NEVER / 2, top, 0.0)
    return jnp.maximum(x - top[:, None], NEVER), top


def _forward(blank: jax.Array, label: jax.Array, frames: jax.Array, lengths: jax.Array):
    """(log P (B,), α by diagonals, each relative to its largest) of masked log-probabilities."""
    first = jnp.where(jnp.arange(blank.shape[2]) == 0, 0.0, NEVER) + jnp.zeros((blank.shape[0], 1))

    def step(carry, item):
        alpha, offset = carry
        b, l = item
        following, top = _relative(jnp.logaddexp(alpha + b, _shift(alpha + l, -1)))
        return (following, offset + top), (alpha, offset)

    carry = first, jnp.zeros(len(frames), jnp.float32)
    _, (alphas, offsets) = jax.lax.scan(step, carry, (_skewed(blank), _skewed(label)))
    last, sample = frames - 1 + lengths, jnp.arange(len(frames))
    return alphas[last, sample, lengths] + offsets[last, sample] + blank[sample, frames - 1, lengths], alphas


def _occupied(blank, label, frames, lengths, alphas):
    """Expected numbers of blanks and of labels emitted at each node, (B, T, U+1) both: minus the gradients."""
    b, l = _skewed(blank), _skewed(label)
    # the end, (T, U), lies on the diagonal behind the last node, and stands for itself alone
    ends = (jnp.arange(1, len(b) + 1)[:, None] == (frames + lengths)[None])[..., None]
    ends = ends & (jnp.arange(blank.shape[2])[None, None] == lengths[None, :, None])

    def step(beta, item):
        alpha, b, l, end = item
        beta = jnp.where(end, 0.0, beta)  # of the diagonal behind
        after_blank, after_label = b + beta, l + _shift(beta, 1)
        beta = jnp.logaddexp(after_blank, after_label)
        total = jax.nn.logsumexp(alpha + beta, axis=1, keepdims=True)  # log P, relative to both
        counts = [jnp.where(total > NEVER / 2, jnp.exp(alpha + a - total), 0.0) for a in (after_blank, after_label)]
        return _relative(beta)[0], counts

    start = jnp.full(blank.shape[::2], NEVER, jnp.float32)
    _, counts = jax.lax.scan(step, start, (alphas, b, l, ends), reverse=True)
    return tuple(_straight(c, blank.shape[1]) for c in counts)


def _masked(blank, label, frames, lengths):
    real = _real(blank.shape, frames, lengths)
    last = jnp.arange(blank.shape[2]) == lengths[:, None, None]
    blank, label = (jnp.where(real, x.astype(jnp.float32), NEVER) for x in (blank, label))
    return jnp.maximum(blank, NEVER), jnp.maximum(jnp.where(last, NEVER, label), NEVER)


@jax.custom_vjp
def _lattice(blank, label, frames, lengths):
    return -_forward(*_masked(blank, label, frames, lengths), frames, lengths)[0]


def _lattice_forward(blank, label, frames, lengths):
    masked = _masked(blank, label, frames, lengths)
    total, alphas = _forward(*masked, frames, lengths)
    like = tuple(jnp.zeros((0,), x.dtype) for x in (blank, label))
    return -total, (masked, frames, lengths, alphas, like)


def _lattice_backward(saved, grad):
    masked, frames, lengths, alphas, like = saved
    counts = _occupied(*masked, frames, lengths, alphas)
    return (*(-(grad[:, None, None] * c).astype(a.dtype) for c, a in zip(counts, like, strict=True)), None, None)


_lattice.defvjp(_lattice_forward, _lattice_backward)


def _logits_parts(blank_id, logits, labels, frames, lengths):
    real = _real(logits.shape[:3], frames, lengths)
    logits = jnp.where(real[..., None], logits, 0.0)  # before the softmax: what lies behind may be NaN
    return logits, _masked(*columns(logits, labels[:, None, :], blank=blank_id), frames, lengths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logits_loss(blank_id, logits, labels, frames, lengths):
    _, parts = _logits_parts(blank_id, logits, labels, frames, lengths)
    return -_forward(*parts, frames, lengths)[0]


def _logits_forward(blank_id, logits, labels, frames, lengths):
    _, parts = _logits_parts(blank_id, logits, labels, frames, lengths)
    total, alphas = _forward(*parts, frames, lengths)
    return -total, (logits, labels, frames, lengths, parts, alphas)


def _logits_backward(blank_id, saved, grad):
    """∂/∂z_k = p_k · (blanks + labels emitted) − [k = blank] blanks − [k = label] labels, at each node."""
    logits, labels, frames, lengths, parts, alphas = saved
    blanks, emitted = _occupied(*parts, frames, lengths, alphas)
    z, _ = _logits_parts(blank_id, logits, labels, frames, lengths)
    k = jnp.arange(logits.shape[3])
    padded = jnp.pad(labels, ((0, 0), (0, 1)))[:, None, :, None]
    dz = jax.nn.softmax(z.astype(jnp.float32), axis=-1) * (blanks + emitted)[..., None]
    dz = dz - jnp.where(k == blank_id, blanks[..., None], 0.0) - jnp.where(k == padded, emitted[..., None], 0.0)
    return (dz * grad[:, None, None, None]).astype(logits.dtype), None, None, None


_logits_loss.defvjp(_logits_forward, _logits_backward)
