"""Optimisers and learning-rate schedules over parameters held as one flat ``{dotted path: array}`` dict.

AdamW (arXiv 1711.05101), BERT's Adam, Lion (arXiv 2302.06675) and Adafactor (arXiv 1804.04235, with the semantics of
fairseq and Hugging Face) behind one frozen config. Which parameters decay is said by path patterns.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxformers import paths

Schedule = Callable[[Any], Any]  # update count (0, 1, …) -> learning rate


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """What updates the parameters. A field that the chosen optimiser does not have is an error, not ignored.

    ``warmup`` is a number of updates, or below 1 a share of all updates. ``final`` is the share of the peak rate that
    "linear" and "cosine" end at. ``no_decay`` are patterns of paths that weight decay leaves alone. ``b1``, ``b2`` and
    ``eps`` default to AdamW's 0.9, 0.999, 1e-8 and Lion's 0.9, 0.99; Adafactor has no momentum unless ``b1`` is given.
    ``scale_parameter`` and ``relative_step`` are Adafactor's; with ``relative_step`` the rate is its own,
    min(1e-2, 1/sqrt(t)), and ``learning_rate`` must be None. "bert_adam" is :func:`bert_adam`: there ``clip_norm`` is
    each tensor's own, and ``eps`` defaults to 1e-6.
    """

    name: Literal["adamw", "bert_adam", "lion", "adafactor"] = "adamw"
    learning_rate: float | None = 1e-3
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "linear"
    warmup: float = 0.0
    final: float = 0.0
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = ("**.bias", "**.scale")
    clip_norm: float | None = 1.0
    scale_parameter: bool = False
    relative_step: bool = False

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "bert_adam", "lion", "adafactor"):
            raise ValueError(f"name: expected adamw, bert_adam, lion or adafactor, got {self.name!r}")
        if self.schedule not in ("constant", "linear", "cosine", "inverse_sqrt"):
            raise ValueError(f"schedule: expected constant, linear, cosine or inverse_sqrt, got {self.schedule!r}")
        if self.relative_step:
            if self.learning_rate is not None or self.warmup or self.schedule != "constant":
                raise ValueError(
                    "relative_step: Adafactor then makes its own rate; set learning_rate=None, schedule='constant', "
                    "warmup=0"
                )
        elif self.learning_rate is None or not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected a number above 0, got {self.learning_rate}")
        if self.warmup < 0:
            raise ValueError(f"warmup: expected 0 or more updates (or a share below 1), got {self.warmup}")
        if not 0 <= self.final <= 1:
            raise ValueError(f"final: expected a share of the peak rate in [0, 1], got {self.final}")
        if self.final and self.schedule not in ("linear", "cosine"):
            raise ValueError(f"final: only the linear and cosine schedules end at a chosen rate, not {self.schedule}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay: expected 0 or more, got {self.weight_decay}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm: expected a norm above 0, or None for no clipping, got {self.clip_norm}")
        for field, low in (("b1", 0.0), ("b2", 0.0)):
            value = getattr(self, field)
            if value is not None and not low <= value < 1:
                raise ValueError(f"{field}: expected a number in [0, 1), got {value}")
        if self.name != "adafactor" and (self.scale_parameter or self.relative_step):
            raise ValueError(f"scale_parameter, relative_step: only Adafactor has them, not {self.name}")
        if self.name == "adafactor" and (self.b2 is not None or self.eps is not None):
            raise ValueError("b2, eps: Adafactor's are 1 - t^-0.8 and (1e-30, 1e-3); call optim.adafactor for others")
        if self.name == "lion" and self.eps is not None:
            raise ValueError("eps: Lion has none")


def schedule(config: OptimConfig, steps: int) -> Schedule | None:
    """Learning rate by update count, rising linearly from 0 over the warm-up; None where Adafactor makes its own.

    After W warm-up updates of T: "linear" falls to ``final`` at T, "cosine" follows half a cosine to it, "inverse_sqrt"
    is peak · sqrt(W / t) (with W = 10,000 shifted to start at the peak when there is no warm-up). The conventions, the
    first update at rate 0 included, are those of Hugging Face's schedules of the same names.
    """
    if config.relative_step:
        return None
    peak, warmup = config.learning_rate, config.warmup
    warmup = warmup * steps if warmup < 1 else warmup
    if warmup > steps:
        raise ValueError(f"warmup: {warmup:g} updates are more than the {steps} of the whole run")
    timescale = warmup or 10_000.0

    def rate(count: Any) -> Any:
        t = jnp.asarray(count, jnp.float32)
        done = jnp.clip((t - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        if config.schedule == "linear":
            after = 1.0 - (1.0 - config.final) * done
        elif config.schedule == "cosine":
            after = config.final + (1.0 - config.final) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        elif config.schedule == "inverse_sqrt":
            after = jnp.sqrt(timescale / jnp.maximum(t + timescale - warmup, 1.0))
        else:
            after = jnp.float32(1.0)
        return peak * jnp.where(t < warmup, t / max(warmup, 1e-9), after)

    return rate


class AdafactorState(NamedTuple):
    count: jax.Array
    row: Any  # mean of squares over the last axis, (…, rows), or a scalar 0 where the leaf is not factored
    col: Any  # mean of squares over the second last axis, (…, columns), likewise
    full: Any  # second moment of vectors, likewise
    momentum: Any  # first moment, or None without b1


def adafactor(
    learning_rate: float | Schedule | None,
    *,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    b1: float | None = None,
    weight_decay: float = 0.0,
    decay_mask: Any = True,
    scale_parameter: bool = True,
    warmup_init: bool = False,
    stacked: Any = False,
) -> optax.GradientTransformation:
    """Adafactor as fairseq and Hugging Face have it (arXiv 1804.04235, algorithms 4 and 5).

    It differs from ``optax.adafactor`` in three ways: every leaf of two or more axes is factored over its *last two*
    (optax: the two largest, and only from 128 on), weight decay is multiplied by the rate, and momentum runs over the
    updates already multiplied by the rate. With U = g / sqrt(V), V = row · col / mean(row):

        p <- p - rate · scale · U / max(1, RMS(U) / clip_threshold),   scale = max(eps[1], RMS(p)) or 1

    Args:
        learning_rate: a number, a schedule of the update count (0, 1, …), or None for the relative step
            min(1e-2 or, with ``warmup_init``, 1e-6 · t, 1 / sqrt(t)).
        decay_mask: a bool, or a tree of bools shaped like the parameters: which leaves decay.
        stacked: a bool, or a tree of bools: leaves whose first axis counts layers (`scan_layers`). Each layer is then
            updated as if it stood alone.

    Raises ValueError for ``warmup_init`` together with a learning rate.
    """
    if warmup_init and learning_rate is not None:
        raise ValueError("warmup_init: it belongs to the relative step; set learning_rate=None")

    def rate_at(count: jax.Array) -> jax.Array:
        if callable(learning_rate):
            return learning_rate(count)
        if learning_rate is not None:
            return jnp.float32(learning_rate)
        t = (count + 1).astype(jnp.float32)
        return jnp.minimum(1e-6 * t if warmup_init else 1e-2, t**-0.5)

    def factored(p: jax.Array, is_stacked: bool) -> bool:
        return p.ndim - is_stacked >= 2

    def init(params: Any) -> AdafactorState:
        stack = _broadcast(stacked, params)
        zero = jnp.zeros((), jnp.float32)

        def make(shape: Callable, wanted: bool) -> Any:
            return jax.tree.map(
                lambda p, s: jnp.zeros(shape(p.shape), jnp.float32) if factored(p, s) == wanted else zero, params, stack
            )

        return AdafactorState(
            jnp.zeros((), jnp.int32),
            make(lambda s: s[:-1], True),
            make(lambda s: s[:-2] + s[-1:], True),
            make(lambda s: s, False),
            None if b1 is None else jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
        )

    def leaf(g, p, row, col, full, momentum, rate, beta2, decays, is_factored):  # noqa: ANN001, ANN202
        g, p32 = g.astype(jnp.float32), p.astype(jnp.float32)
        square = g * g + eps[0]
        if is_factored:
            row = beta2 * row + (1 - beta2) * square.mean(-1)
            col = beta2 * col + (1 - beta2) * square.mean(-2)
            u = g * jax.lax.rsqrt(row / row.mean(-1, keepdims=True))[..., None] * jax.lax.rsqrt(col)[..., None, :]
        else:
            full = beta2 * full + (1 - beta2) * square
            u = g * jax.lax.rsqrt(full)
        u = u / jnp.maximum(1.0, _rms(u) / clip_threshold)
        rate = rate * jnp.maximum(eps[1], _rms(p32)) if scale_parameter else rate
        u = rate * u
        if b1 is not None:
            u = momentum = b1 * momentum + (1 - b1) * u
        if decays and weight_decay:
            u = u + weight_decay * rate * p32
        return (-u).astype(p.dtype), row, col, full, momentum

    def update(grads: Any, state: AdafactorState, params: Any = None) -> tuple[Any, AdafactorState]:
        if params is None:
            raise ValueError("params: Adafactor's update needs the parameters as well as the gradients")
        leaves, treedef = jax.tree.flatten(params)
        decays = jax.tree.leaves(_broadcast(decay_mask, params))
        stack = jax.tree.leaves(_broadcast(stacked, params))
        rate = rate_at(state.count)
        beta2 = 1.0 - (state.count + 1).astype(jnp.float32) ** decay_rate
        columns = [treedef.flatten_up_to(t) for t in (grads, state.row, state.col, state.full)]
        columns.append(leaves if b1 is None else treedef.flatten_up_to(state.momentum))
        out = []
        for p, g, row, col, full, momentum, d, s in zip(leaves, *columns, decays, stack, strict=True):
            is_factored = factored(p, s)
            f = lambda *a, d=d, k=is_factored: leaf(*a, rate, beta2, d, k)
            if s:  # the state that this leaf does not have is a scalar, shared by the layers
                axes = (0, 0, 0 if is_factored else None, 0 if is_factored else None, None if is_factored else 0, 0)
                f = jax.vmap(f, in_axes=axes, out_axes=(0, *axes[2:]))
            out.append(f(g, p, row, col, full, momentum))
        parts = [treedef.unflatten(column) for column in zip(*out, strict=True)]
        momentum = None if b1 is None else parts[4]
        return parts[0], AdafactorState(state.count + 1, parts[1], parts[2], parts[3], momentum)

    return optax.GradientTransformation(init, update)


class BertAdamState(NamedTuple):
    count: Any  # updates that each tensor has had, () or (layers,) where it is stacked
    first: Any
    second: Any


def bert_adam(
    learning_rate: float | Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    clip_norm: float | None = 1.0,
    decay_mask: Any = True,
    stacked: Any = False,
) -> optax.GradientTransformation:
    """The Adam that BERT was trained with, as its PyTorch ports have it: no bias correction, and each tensor by itself.

        g <- g · min(1, clip_norm / (|g| + 1e-6)) of each tensor;   m, v: averages of g and g²
        p <- p - rate · (m / (sqrt(v) + eps) + weight_decay · p)

    A tensor that nothing reaches (each entry of its gradient is exactly 0) is passed over, as PyTorch does where there
    is no gradient: no decay, no change of its averages, and its own count of updates, which the schedule is asked with,
    stands still. ``decay_mask``, ``stacked``: as in :func:`adafactor`.
    """

    def leaf(g, p, n, m, v, decays):  # noqa: ANN001, ANN202
        rate = learning_rate(n) if callable(learning_rate) else learning_rate
        g, p32, reached = g.astype(jnp.float32), p.astype(jnp.float32), jnp.any(g != 0)
        if clip_norm is not None:
            g = g * jnp.minimum(1.0, clip_norm / (jnp.sqrt(jnp.sum(g * g)) + 1e-6))
        first, second = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        u = first / (jnp.sqrt(second) + eps) + (weight_decay * p32 if decays else 0.0)
        keep = lambda new, old: jnp.where(reached, new, old)
        return keep(-rate * u, 0.0).astype(p.dtype), n + reached, keep(first, m), keep(second, v)

    def init(params: Any) -> BertAdamState:
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        count = jax.tree.map(
            lambda p, s: jnp.zeros(p.shape[:1] if s else (), jnp.int32), params, _broadcast(stacked, params)
        )
        return BertAdamState(count, zeros(), zeros())

    def update(grads: Any, state: BertAdamState, params: Any = None) -> tuple[Any, BertAdamState]:
        if params is None:
            raise ValueError("params: BERT's Adam decays them; it needs the parameters as well as the gradients")
        leaves, treedef = jax.tree.flatten(params)
        columns = [treedef.flatten_up_to(t) for t in (grads, state.count, state.first, state.second)]
        flags = [jax.tree.leaves(_broadcast(flag, params)) for flag in (decay_mask, stacked)]
        out = []
        for p, g, n, m, v, decays, is_stacked in zip(leaves, *columns, *flags, strict=True):
            rule = lambda *a, d=decays: leaf(*a, d)
            out.append((jax.vmap(rule) if is_stacked else rule)(g, p, n, m, v))
        updates, count, first, second = (treedef.unflatten(column) for column in zip(*out, strict=True))
        return updates, BertAdamState(count, first, second)

    return optax.GradientTransformation(init, update)


def make_optimizer(
    config: OptimConfig, steps: int, params: Mapping[str, Any], owners: Mapping[str, str] | None = None
) -> optax.GradientTransformation:
    """The optax transformation for ``config``: clipping by global norm, the optimiser, decay, the schedule.

    ``params`` is the flat dict of *trainable* parameters, ``steps`` the number of updates of the whole run, ``owners``
    the path of the typed weight around each array, where that is another. Raises ValueError for a pattern in
    ``config.no_decay``, other than the default ones, that matches nothing.
    """
    rate = schedule(config, steps)
    owners = owners or {}
    hit = lambda patterns, path: paths.matches(patterns, path) or paths.matches(patterns, owners.get(path, path))
    for pattern in set(config.no_decay) - set(OptimConfig.no_decay):
        if not any(hit(pattern, path) for path in params):
            raise ValueError(f"no_decay: {pattern!r} matches none of the trained {', '.join(list(params)[:8])}, …")
    decays = {path: not hit(config.no_decay, path) for path in params}
    stacked = {path: "*" in path.split(".") for path in params}
    if config.name == "bert_adam":
        given = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
        return bert_adam(
            rate,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            decay_mask=decays,
            stacked=stacked,
            **{name: value for name, value in given.items() if value is not None},
        )
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    if config.name == "adafactor":
        rule = adafactor(
            rate,
            b1=config.b1,
            weight_decay=config.weight_decay,
            decay_mask=decays,
            scale_parameter=config.scale_parameter,
            stacked=stacked,
        )
        return optax.chain(*clip, rule)
    b1 = 0.9 if config.b1 is None else config.b1
    if config.name == "lion":
        rule = optax.scale_by_lion(b1, 0.99 if config.b2 is None else config.b2)
    else:
        rule = optax.scale_by_adam(
            b1, 0.999 if config.b2 is None else config.b2, 1e-8 if config.eps is None else config.eps
        )
    decay = [optax.add_decayed_weights(config.weight_decay, decays)] if config.weight_decay else []
    return optax.chain(*clip, rule, *decay, optax.scale_by_learning_rate(rate))


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(x * x))


def _broadcast(flag: Any, tree: Any) -> Any:
    return jax.tree.map(lambda _: flag, tree) if isinstance(flag, bool) else flag
