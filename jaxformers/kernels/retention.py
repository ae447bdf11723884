"""Retention: attention without softmax, whose decay makes it a linear recurrence (arXiv 2307.08621, 2312.00817).

    o_n = s Σ_{m ≤ n} γ^{t_n − t_m} keep_m ⟨q_n, k_m⟩ v_m,    ⟨q_n, k_m⟩ = Σ_j β_j^{n − m} Re(q_nj k̄_mj e^{i(n−m)ω_j})

γ a head's decay, t the times (the indices, when events come regularly), the products over pairs of dimensions being
xPos (arXiv 2212.10554; without it plain dot products), whose β ≤ 1 and ω depend on the dimension. Three forms, equal to
rounding: ``parallel`` (quadratic, the definition), ``recurrent`` (one step after the other) and ``chunkwise``: with S
the state before a chunk, d_i = ln γ · (t_i − time of S) ≤ 0 inside it, and positions counted from the state's,

    o_i = s [ Σ_{m ≤ i} e^{d_i − d_m} ⟨q_i, k_m⟩ v_m + e^{d_i} q_i S ]
    S' = F (e^{d_last} S + Σ_m e^{d_last − d_m} k_m v_mᵀ).

F turns and shrinks the state into the frame of its own last position, so that no power of β ever grows with the
length, and neither queries nor states know absolute positions. The states come from an associative scan over chunks.

Chunk by chunk a length L costs 2·L·c·(K+V) + 4·L·K·V FLOPs a head, c the chunk, and moves L·(2K+2V) elements and one
state of K·V floats a chunk. On a GPU from ``WORTH`` steps on all of it but xPos is Pallas-Triton (``retention_gpu``):
three kernels each way, which write no c×c scores, in bfloat16 in a fifth of XLA's time or less (one H100). On a
TPU what lies inside the chunks is a kernel; elsewhere XLA runs it.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.kernels import retention_gpu, retention_tpu
from jaxformers.kernels.tiles import partitioned, platform

KERNELS = {"pallas_gpu": retention_gpu, "pallas_tpu": retention_tpu}
WORTH = 512  # steps from which a kernel beats XLA


@dataclasses.dataclass(frozen=True, eq=False)
class XPos:
    """xPos of each head's pairs of dimensions (2j, 2j+1): ``angle`` radians and ``log_scale`` = ln β, (heads, K/2)."""

    angle: np.ndarray
    log_scale: np.ndarray


def xpos(width: int, heads: int, *, theta: float = 10000.0, span: float = 512.0, smooth: float = 0.4) -> XPos:
    """xPos over a query of ``width`` before it is cut into heads: pair j turns by θ^(−2j/width) a step and shrinks by
    ((2j + smooth·width) / ((1 + smooth)·width))^(1/span). Raises ValueError for a width that the heads do not cut into
    pairs.
    """
    if width % (2 * heads):
        raise ValueError(f"width: {heads} heads of pairs need a multiple of {2 * heads}, got {width}")
    j = np.arange(width // 2, dtype=np.float64)
    base = (2 * j + smooth * width) / ((1 + smooth) * width)
    split = lambda a: a.reshape(heads, width // 2 // heads)
    return XPos(split(theta ** (-2 * j / width)), split(np.log(base) / span))


def retention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    *,
    times: jax.Array | None = None,
    keep: jax.Array | None = None,
    positions: XPos | None = None,
    state: jax.Array | None = None,
    state_time: jax.Array | None = None,
    scale: float | None = None,
    form: str = "chunkwise",
    chunk: int | None = None,
    implementation: str | None = None,
    tiles: Any = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(outputs (B, L, H, V), state (B, H, K, V) after the last step, float32) of q, k (B, L, H, K) and v (B, L, H, V).

    ``log_decay`` (H,): ln γ ≤ 0. ``times`` (B, L) must not decrease. ``keep`` (B, L): steps that leave something in the
    state. ``state`` stands one index before the first step, or at ``state_time`` if ``times`` are given; what is
    returned stands at the last step, in the frame of its position, and continues the sequence (:func:`rebase` moves it
    to another frame). A gap of 0 does not decay. ``scale`` defaults to K^(−1/2).

    ``form``: "chunkwise", "parallel" or "recurrent". ``chunk``: steps a chunk, a power of two (None: 256 on a GPU, else
    128). ``implementation`` of the chunks: None (by platform and length),
    "xla", "pallas_gpu" or "pallas_tpu". Differentiable in q, k, v, log_decay, times and state.

    Raises ValueError for shapes that do not fit, or a state with times but without its own.
    """
    batch, length, heads, size = q.shape
    if k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3] or log_decay.shape != (heads,):
        raise ValueError(
            f"expected k like q {q.shape}, v of a size, log_decay ({heads},); "
            f"got {k.shape}, {v.shape}, {log_decay.shape}"
        )
    for name, a in (("times", times), ("keep", keep)):
        if a is not None and a.shape != (batch, length):
            raise ValueError(f"{name}: expected ({batch}, {length}), got {a.shape}")
    if positions is not None and positions.angle.shape != (heads, size // 2):
        raise ValueError(f"positions: made for {positions.angle.shape}, q has ({heads}, {size // 2}) heads and pairs")
    if state is not None and state.shape != (batch, heads, size, v.shape[3]):
        raise ValueError(f"state: expected {(batch, heads, size, v.shape[3])}, got {state.shape}")
    if state is not None and times is not None and state_time is None:
        raise ValueError("state_time: a state that irregular times follow needs the time it stands at")
    implementation = implementation or choose(length, chunk, max(size, v.shape[3]), q.dtype)
    if chunk is None:
        chunk = 256 if implementation == "pallas_gpu" else 128
    if chunk < 16 or chunk & (chunk - 1):
        raise ValueError(f"chunk: expected a power of two from 16 on, got {chunk}")
    scale = size**-0.5 if scale is None else float(scale)
    # float32 gaps, from the state's time (or the first step's, when there is none to decay)
    if times is None:
        gaps = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=jnp.float32), (batch, length))
    else:
        gaps = times - (times[:, :1] if state_time is None else state_time[:, None])
    if keep is not None:
        k = k * keep[..., None, None].astype(k.dtype)
    if state is None:
        state = jnp.zeros((batch, heads, size, v.shape[3]), jnp.float32)
    x = (q, k, v, log_decay.astype(jnp.float32), gaps.astype(jnp.float32), positions, state.astype(jnp.float32), scale)
    if form == "parallel":
        return _parallel(*x)
    if form == "recurrent":
        return _recurrent(*x)
    if form != "chunkwise":
        raise ValueError(f"form: expected chunkwise, parallel or recurrent, got {form!r}")
    run = partial(_chunkwise, *x, chunk)
    if implementation == "xla":
        return run(inside=_inside)
    if implementation not in KERNELS:
        raise ValueError(f"implementation: expected xla, {', '.join(KERNELS)}, got {implementation!r}")
    kernels = KERNELS[implementation]
    settings = {"tiles": tiles or kernels.default_tiles(max(size, v.shape[3]), q.dtype), "interpret": interpret}
    if implementation == "pallas_gpu":
        return run(whole=partial(kernels.chunkwise, **settings))
    return run(inside=partial(kernels.inside, **settings))


def choose(length: int, chunk: int | None, size: int, dtype: Any = jnp.bfloat16) -> str:
    """The implementation of the chunks on the platform that is compiled for, by steps and the larger size of a head."""
    where = platform()
    # a GPU's kernel holds a state in registers
    largest = 256 if where != "gpu" else 64 if dtype == jnp.float32 else 128
    if length < WORTH or size > largest or partitioned():
        return "xla"
    if where == "tpu" and (chunk or 128) % 128 == 0:
        return "pallas_tpu"
    return "pallas_gpu" if where == "gpu" else "xla"


def step(q, k, v, state, log_decay, gap, *, positions: XPos | None = None, scale: float | None = None):
    """One step of the recurrence: q, k (B, H, K), v (B, H, V), ``gap`` (B,) since the state; (output, new state)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    state = rebase(state, positions, 1) * jnp.exp(log_decay * gap[:, None])[..., None, None]
    state = state + k[..., :, None] * v[..., None, :]
    return jnp.einsum("bhk,bhkv->bhv", q, state, precision="highest") * scale, state


def rebase(state: jax.Array, positions: XPos | None, steps: int) -> jax.Array:
    """A state in the frame of the position ``steps`` later (or earlier: then xPos' scales grow again)."""
    if positions is None or steps == 0:
        return state
    return _turn(state, _multiplier(positions, steps))


# ---------------------------------------------------------------------------------------------------------- forms


def _apply(x: jax.Array, positions: XPos | None, index: np.ndarray, sign: int):
    """x in xPos at the positions ``index``: turned, and scaled by β^(sign · index)."""
    if positions is None:
        return x
    angle, size = index[:, None, None] * positions.angle, np.exp(sign * index[:, None, None] * positions.log_scale)
    cos, sin = (jnp.asarray(f(angle) * size, jnp.float32) for f in (np.cos, np.sin))
    a, b = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x.dtype)


def _multiplier(positions: XPos, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Real and imaginary part of β^steps e^(−i·steps·ω), (heads, K/2): what moves keys to a later frame."""
    size, angle = np.exp(steps * positions.log_scale), steps * positions.angle
    return (size * np.cos(angle)).astype(np.float32), (-size * np.sin(angle)).astype(np.float32)


def _turn(state, multiplier):
    """Multiply pairs of rows of a state (…, heads, K, V) by complex numbers (…, heads, K/2)."""
    real, imaginary = (m[..., None] for m in multiplier)
    a, b = state[..., 0::2, :], state[..., 1::2, :]
    turned = jnp.stack([a * real - b * imaginary, b * real + a * imaginary], axis=-2)
    return turned.reshape(state.shape)


def _parallel(q, k, v, log_decay, gaps, positions, state, scale):
    length = q.shape[1]
    index = np.arange(1, length + 1) - length / 2  # centred: the scales stay near one; only differences count
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    scores = jnp.einsum(
        "bnhk,bmhk->bhnm", _apply(q, positions, index, 1), _apply(k, positions, index, -1), precision="highest"
    )
    delta = gaps[:, :, None] - gaps[:, None, :]
    below = np.tril(np.ones((length, length), bool))
    decay = jnp.exp(jnp.where(below, log_decay[:, None, None] * delta[:, None], -jnp.inf))
    out = jnp.einsum("bhnm,bmhv->bnhv", scores * decay, v, precision="highest")
    reach = jnp.exp(log_decay * gaps[..., None])  # (B, L, H)
    ahead = _apply(q, positions, np.arange(1.0, length + 1), 1) * reach[..., None]
    out = out + jnp.einsum("bnhk,bhkv->bnhv", ahead, state, precision="highest")
    rest = jnp.exp(log_decay * (gaps[:, -1:] - gaps)[..., None])
    keys = _apply(k, positions, np.arange(1.0, length + 1) - length, -1) * rest[..., None]
    last = rebase(state, positions, length) * reach[:, -1][..., None, None]
    return out * scale, last + jnp.einsum("bmhk,bmhv->bhkv", keys, v, precision="highest")


def _recurrent(q, k, v, log_decay, gaps, positions, state, scale):
    gap = jnp.diff(gaps, axis=1, prepend=jnp.zeros_like(gaps[:, :1]))

    def one(state, item):
        out, state = step(*item[:3], state, log_decay, item[3], positions=positions, scale=scale)
        return state, out

    items = tuple(jnp.moveaxis(a, 1, 0) for a in (q, k, v, gap))
    state, out = jax.lax.scan(one, state, items)
    return jnp.moveaxis(out, 0, 1), state


def _chunkwise(q, k, v, log_decay, gaps, positions, state, scale, chunk, *, inside=None, whole=None):
    """Chunk by chunk: ``whole`` does all that follows xPos, or ``inside`` what happens within the chunks."""
    batch, length, heads, size = q.shape
    chunks = -(-length // chunk)
    pad = chunks * chunk - length  # steps behind the end: they keep nothing, and time stands still
    if pad:
        q, k, v = (jnp.pad(a, ((0, 0), (0, pad), (0, 0), (0, 0))) for a in (q, k, v))
        gaps = jnp.pad(gaps, ((0, 0), (0, pad)), mode="edge")
    index = np.tile(np.arange(1.0, chunk + 1), chunks)
    q, k = _apply(q, positions, index, 1), _apply(k, positions, index, -1)
    ends = gaps.reshape(batch, chunks, chunk)[:, :, -1]
    starts = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))  # a chunk's state stands where the chunk before ends
    since = gaps.reshape(batch, chunks, chunk) - starts[..., None]  # differences of times before anything is multiplied
    steps = length - chunk * (chunks - 1)  # of the last chunk, which may be shorter
    if whole is not None:
        frames = None if positions is None else np.stack([_multiplier(positions, n) for n in (chunk, steps)])
        out, state = whole(q, k, v, since, log_decay, state, frames, scale=scale)
        return out[:, :length], state
    rest = jnp.exp((since[..., -1:] - since)[..., None] * log_decay)  # (B, chunks, chunk, H)
    split = lambda a: a.reshape(batch, chunks, chunk, heads, -1)
    exact = "highest" if k.dtype == jnp.float32 else None
    kept = (split(k).astype(jnp.float32) * rest[..., None]).astype(k.dtype)
    added = jnp.einsum("bcihk,bcihv->cbhkv", kept, split(v), precision=exact, preferred_element_type=jnp.float32)
    states = _states(state, added, jnp.exp(since[..., -1].T[..., None] * log_decay), positions, chunk, length)
    before = jnp.concatenate([state[None], states[:-1]])
    out = inside(q, k, v, since.reshape(batch, -1), log_decay, jnp.moveaxis(before, 0, 2)) * scale
    return out[:, :length].astype(v.dtype), states[-1]


def _states(state, added, decay, positions, chunk, length):
    """States after each chunk (C, B, H, K, V): S_c = F_c (decay_c S_{c−1} + added_c), by an associative scan."""
    chunks = len(added)
    if positions is None:
        multiplier = (decay[..., None],)
        turn = lambda m, s: m[0][..., None] * s
        product = lambda m, n: (m[0] * n[0],)
    else:
        steps = [chunk] * (chunks - 1) + [length - chunk * (chunks - 1)]  # the last chunk may be shorter
        frames = [np.stack(f)[:, None] for f in zip(*(_multiplier(positions, n) for n in steps), strict=True)]
        added = _turn(added, frames)
        multiplier = tuple(f * decay[..., None] for f in frames)
        turn = lambda m, s: _turn(s, m)
        product = lambda m, n: (m[0] * n[0] - m[1] * n[1], m[0] * n[1] + m[1] * n[0])

    def combine(first, second):
        return product(first[0], second[0]), turn(second[0], first[1]) + second[1]

    added = added.at[0].add(turn(tuple(m[0] for m in multiplier), state))
    return jax.lax.associative_scan(combine, (multiplier, added))[1]


def _inside(q, k, v, since, log_decay, state):
    """The chunks' own part and what their first states give, unscaled: the reference of the kernels, float32.

    q, k (B, L, H, K) with the chunk's positions applied, v (B, L, H, V), ``since`` (B, L) the time since the chunk's
    state, log_decay (H,), state (B, H, chunks, K, V).
    """
    batch, length, heads, _ = q.shape
    chunks = state.shape[2]
    split = lambda a: a.reshape(batch, chunks, length // chunks, heads, -1)
    exact = "highest" if q.dtype == jnp.float32 else None
    dots = dict(precision=exact, preferred_element_type=jnp.float32)
    since = since.reshape(batch, 1, chunks, -1)
    below = np.tril(np.ones((since.shape[-1],) * 2, bool))
    gap = since[..., :, None] - since[..., None, :]
    decay = jnp.exp(jnp.where(below, gap * log_decay[:, None, None, None], -jnp.inf))
    scores = (jnp.einsum("bcihk,bcmhk->bhcim", split(q), split(k), **dots) * decay).astype(v.dtype)
    out = jnp.einsum("bhcim,bcmhv->bcihv", scores, split(v), **dots)
    ahead = (split(q).astype(jnp.float32) * reach(since[:, 0], log_decay)).astype(q.dtype)
    out = out + jnp.einsum("bcihk,bhckv->bcihv", ahead, state.astype(q.dtype), **dots)
    return out.reshape(v.shape)


def reach(since, log_decay):
    """What is left of a chunk's first state: times since it (B, chunks, chunk) to (B, chunks, chunk, H, 1)."""
    return jnp.exp(since[..., None] * log_decay)[..., None]
