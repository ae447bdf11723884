"""VTrans: masks over every part of a transformer that are random variables, pushed to a budget by a Lagrangian.

"VTrans: Accelerating Transformer Compression with Variational Information Bottleneck based Pruning" (arXiv 2406.05276).
A unit j (head, feed-forward unit, sub-layer, hidden unit) is multiplied by z_j ~ N(mu_j, exp(logD_j)), drawn anew for
every row of activations; the KL of that to an uninformative prior says what the unit costs, and s what is expected to
be gone. With p_j = sigmoid(-k log alpha_j), log alpha_j = logD_j - log mu_j^2, P a sum of p, H heads, h hidden units,
f feed-forward units, q the p of a sub-layer, d_h the size of a head:

    KL  = 1/2 m sum_j log(1 + mu_j^2 / exp(logD_j))
    R   = sum_layers [4 d_h P_H q P_h + n_mats P_f q P_h] + (rows of the tables) P_h          parameters that are left
    s   = 1 - R / N,   N = R where all p = 1
    L_s = lambda_1 (s - t) + lambda_2 (s - t)^2,   lambda by gradient ascent,   t = the target, reached step by step
    L   = L_task or L_distillation + kl_factor sum KL + L_s

A unit stays where log alpha_j < 0, and its mean goes into the weights. Training is in `vtrans_prune`, the distillation
losses in `vtrans_distil`; the masks act at `jaxformers.gates`, and `jf.compact` takes away what they leave.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxformers import gates, nn, units

TINY = 1e-8  # the published code's, under both logarithms
Gate = dict[str, jax.Array]  # "mu", "logD": (units,), or () for a sub-layer
is_gate = lambda x: isinstance(x, dict) and set(x) == {"mu", "logD"}


def init_gates(model: nnx.Module, kinds: tuple[str, ...], key: jax.Array) -> dict[str, Any]:
    """A gate for each unit of ``kinds``: mu ~ N(1, 0.01), logD ~ N(-9, 0.01), standard deviations.

    In the structure of :func:`jaxformers.gates.ones`, a ``{"mu", "logD"}`` in the place of each array. Raises
    ValueError for kinds that the model does not carry.
    """
    ones, treedef = jax.tree.flatten(gates.ones(model, kinds))
    keys = jax.random.split(key, 2 * len(ones))
    draw = lambda like, mean, key: mean + 0.01 * jax.random.normal(key, like.shape)
    made = [
        {"mu": draw(like, 1.0, keys[2 * i]), "logD": draw(like, -9.0, keys[2 * i + 1])} for i, like in enumerate(ones)
    ]
    return treedef.unflatten(made)


def sample(x: Float[Array, "*rows units"], gate: Gate, key: jax.Array | None) -> Float[Array, "*rows units"]:
    """``x · z`` with a z for each row and unit; without a key ``x`` times the mean of what is kept."""
    if key is None:
        return x * hard(gate).astype(x.dtype)
    noise = jax.random.normal(key, (*x.shape[:-1], x.shape[-1] if gate["mu"].ndim else 1))
    return times(x, gate, noise)


def times(
    x: Float[Array, "*rows units"], gate: Gate, noise: Float[Array, "*rows units"]
) -> Float[Array, "*rows units"]:
    """``x (mu + noise exp(logD / 2))``."""
    return (x * (gate["mu"] + noise * jnp.exp(gate["logD"] / 2))).astype(x.dtype)


def log_alpha(gate: Gate) -> Float[Array, "units"]:
    """log(sigma^2 / mu^2): a unit stays where it is below 0."""
    return gate["logD"] - jnp.log(jnp.square(gate["mu"]) + TINY)


def hard(gate: Gate, *, threshold: float = 0.0) -> Float[Array, "units"]:
    """The mask of evaluation: the mean where the unit stays, else 0."""
    return jnp.where(log_alpha(gate) < threshold, gate["mu"], 0.0)


def stays(gate: Gate) -> Float[Array, "units"]:
    """1 where the unit stays, else 0; without gradient: how norms count it."""
    return jax.lax.stop_gradient((log_alpha(gate) < 0).astype(jnp.float32))


def keep_probability(gate: Gate, steepness: float = 10.0) -> Float[Array, "units"]:
    """p = sigmoid(-steepness log alpha)."""
    return jax.nn.sigmoid(-steepness * log_alpha(gate))


def kl(gate: Gate, multiplier: float = 1.0) -> Float[Array, ""]:
    """½ m Σ log(1 + mu² / (exp(logD) + 1e-8))."""
    return 0.5 * multiplier * jnp.sum(jnp.log1p(jnp.square(gate["mu"]) / (jnp.exp(gate["logD"]) + TINY)))


# ---- budgets -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Term:
    """What a sub-layer costs: ``units`` gates of ``kind``, each ``each`` for every hidden unit and ``alone`` besides
    (attention's scores and context, in FLOPs); ``shared`` for every hidden unit whatever the gates (a single key head).
    """

    path: str
    kind: str
    units: int
    each: float
    shared: float = 0.0
    alone: float = 0.0


@dataclasses.dataclass(frozen=True)
class Costs:
    """``total`` N; ``hidden`` units; ``tables`` and ``norms``: what else costs for every hidden unit (the latter
    without gradient, as the published code has it)."""

    terms: tuple[Term, ...]
    hidden: int
    tables: float = 0.0
    norms: float = 0.0

    @property
    def total(self) -> float:
        each = sum(term.units * term.each + term.shared for term in self.terms) + self.tables + self.norms
        return each * self.hidden + sum(term.units * term.alone for term in self.terms)

    def left(self, p: Mapping[str, Any]) -> jax.Array:
        """R: what is expected to be left with the keep-probabilities ``p``, in the structure of the gates; a kind or
        a sub-layer that ``p`` leaves out stays whole."""
        hidden = jnp.sum(p["hidden"]) if "hidden" in p else jnp.asarray(float(self.hidden))
        left = self.tables * hidden + self.norms * jax.lax.stop_gradient(hidden)
        for term in self.terms:
            mine = p.get(term.kind, {}).get(term.path)
            count = float(term.units) if mine is None else jnp.sum(mine)
            there = p.get("sublayers", {}).get(term.path, 1.0)
            left = left + there * (count * (term.each * hidden + term.alone) + term.shared * hidden)
        return left

    def sparsity(self, p: Mapping[str, Any]) -> jax.Array:
        """s = 1 - R / N."""
        return 1.0 - self.left(p) / self.total


def costs(
    model: nnx.Module, kind: str = "params", *, length: int | None = None, embeddings: bool | None = None
) -> Costs:
    """What the units of ``model`` cost, in ``kind`` "params" (matrices and tables, without biases) or "flops" of one
    sequence of ``length`` tokens (two a multiply-add; tables cost none, scores and context do).

    ``embeddings``: whether the tables count, by default in models with LayerNorm; llama and its descendants (RMSNorm)
    count their norms instead, as the paper's formulas do. An output projection of its own never counts. Raises
    ValueError for another kind, a missing length, or a model without one residual stream over token tables.
    """
    if kind not in ("params", "flops"):
        raise ValueError(f"budget: expected 'params' or 'flops', got {kind!r}")
    if kind == "flops" and (length is None or length < 1):
        raise ValueError(f"length: a budget of FLOPs needs the length of a sequence, got {length}")
    hidden = units.units(model, ("hidden", "heads", "ffn"))["hidden"]
    if not isinstance(model.embeddings, nn.Embeddings) or units.bridge(model) is not None:
        raise ValueError(f"model: VTrans counts token tables as wide as the model; {type(model).__name__} has others")
    per = 1.0 if kind == "params" else 2.0 * length
    scores = 0.0 if kind == "params" else 4.0 * length**2
    terms = []
    for path, attention in units.attentions(model):
        query, shared = units.head_blocks(attention)
        n = attention.heads * attention.size // query
        each, rest = (2 * (query + shared), 0) if shared else (2 * query, 2 * attention.size)
        terms.append(Term(path, "heads", n, per * each, per * rest, scores * query))
    for path, mlp in units.mlps(model):
        matrices = 2 if mlp.gate is None else 3
        terms.append(Term(path, "ffn", mlp.down.kernel.get_value().shape[0], per * matrices))
    rms = any(isinstance(block.attention_norm, nn.RMSNorm) for _, block in units.blocks(model))
    counted = not rms if embeddings is None else embeddings
    tables = [getattr(model.embeddings, name) for name in ("token", "position", "token_type")]
    rows = sum(table.embedding.get_value().shape[0] for table in tables if table is not None)
    norms = 2.0 * sum(1 for _ in units.blocks(model)) if rms and kind == "params" else 0.0
    return Costs(tuple(terms), hidden, float(rows) if counted and kind == "params" else 0.0, norms)


def floor(cost: Costs, kinds: tuple[str, ...]) -> float:
    """The share of N that is left when everything of ``kinds`` is gone but one hidden unit."""
    p: dict[str, Any] = {kind: {t.path: jnp.zeros(()) for t in cost.terms if t.kind == kind}
                         for kind in kinds if kind in ("heads", "ffn")}  # fmt: skip
    p |= {"hidden": jnp.ones(1)} if "hidden" in kinds else {}
    p |= {"sublayers": {t.path: jnp.zeros(()) for t in cost.terms}} if "sublayers" in kinds else {}
    return float(cost.left(p)) / cost.total


# ---- the Lagrangian ------------------------------------------------------------------------------------------------


def warmed_target(step: Any, start: float, target: float, warmup: float) -> jax.Array:
    """The target sparsity at ``step``: from ``start`` to ``target`` over ``warmup`` steps, linearly."""
    return start + (target - start) * jnp.minimum(1.0, step / max(warmup, 1))


def lagrangian(sparsity: Any, target: Any, lambda_1: Any, lambda_2: Any) -> jax.Array:
    """λ1 (s − t) + λ2 (s − t)²."""
    return lambda_1 * (sparsity - target) + lambda_2 * jnp.square(sparsity - target)


# ---- from gates to masks -------------------------------------------------------------------------------------------


def masks_within(
    found: Mapping[str, Any], cost: Costs, keep: float, *, slack: float = 0.005, multiple: int | None = None
) -> dict[str, Any]:
    """The hard masks of ``found`` gates, within a budget: {kind: {path: (units,)}} for `jf.compact`.

    Units stay where log α < 0. If what is left then differs from ``keep`` · N by more than ``slack`` · N, the threshold
    moves, the same for all, until it fits; units that still fit follow in the order of their log α. A sub-layer without
    heads or units goes, and with it its bias. ``multiple``: hidden and feed-forward widths are rounded to it first (see
    :func:`rounded`), and budgets that this breaks stay broken. Raises ValueError when no masks fit.
    """
    flat = {name: (np.asarray(log_alpha(g), np.float64), np.asarray(g["mu"], np.float64)) for name, g in _named(found)}
    alive = {name: alpha < 0 for name, (alpha, _) in flat.items()}
    limit = keep * cost.total
    if abs(_left(cost, alive) - limit) > slack * cost.total:
        alive = _fit(cost, {name: alpha for name, (alpha, _) in flat.items()}, limit)
    if multiple is not None:
        for name, (alpha, _) in flat.items():
            if name[0] in ("hidden", "ffn") and alive[name].any():
                chosen = np.zeros(alpha.size, bool)
                chosen[rounded(alpha, int(alive[name].sum()), multiple)] = True
                alive[name] = chosen
    masks = {name: np.where(alive[name], mu, 0.0).astype(np.float32) for name, (_, mu) in flat.items()}
    for (kind, path), mask in list(masks.items()):
        if kind in ("heads", "ffn") and not mask.any() and ("sublayers", path) in masks:
            masks["sublayers", path] = np.zeros((), np.float32)
    return _unnamed(masks)


def rounded(alpha: Float[np.ndarray, "units"], count: int, multiple: int) -> np.ndarray:
    """Which units stay when ``count`` of them is rounded to the nearest multiple (up where as far): those of smallest
    log α, ascending indices. At least one multiple, at most all."""
    down = count // multiple * multiple
    up = down + multiple
    n = count if down == count else up if up - count <= count - down else down
    n = min(max(n, multiple), alpha.size)
    return np.sort(np.argsort(alpha, kind="stable")[:n])


def _named(found: Mapping[str, Any]) -> list[tuple[tuple[str, str], Gate]]:
    pairs = [(kind, "", mine) for kind, mine in found.items() if is_gate(mine)]
    pairs += [(kind, path, gate) for kind, mine in found.items() if not is_gate(mine) for path, gate in mine.items()]
    return [((kind, path), gate) for kind, path, gate in pairs]


def _unnamed(masks: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for (kind, path), mask in masks.items():
        if path:
            out.setdefault(kind, {})[path] = jnp.asarray(mask)
        else:
            out[kind] = jnp.asarray(mask)
    return out


def _left(cost: Costs, alive: Mapping[tuple[str, str], np.ndarray]) -> float:
    """R of hard masks, by NumPy in float64: it is asked for many times."""
    hidden = float(alive["hidden", ""].sum()) if ("hidden", "") in alive else float(cost.hidden)
    left = (cost.tables + cost.norms) * hidden
    for term in cost.terms:
        count = alive[term.kind, term.path].sum() if (term.kind, term.path) in alive else term.units
        there = bool(alive.get(("sublayers", term.path), True)) and (count > 0 or not term.shared)
        left += there * (count * (term.each * hidden + term.alone) + term.shared * hidden)
    return left


def _fit(cost: Costs, alpha: Mapping[tuple[str, str], np.ndarray], limit: float) -> dict[tuple[str, str], np.ndarray]:
    every = np.unique(np.concatenate([a.reshape(-1) for a in alpha.values()]))
    at = lambda i: {name: a <= every[i] for name, a in alpha.items()}
    low, high = -1, every.size - 1  # the largest threshold whose masks fit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _left(cost, at(middle)) <= limit else (low, middle - 1)
    if low < 0:
        raise ValueError("budget: not even the unit of smallest log alpha fits into it")
    alive = at(low)
    if ("hidden", "") in alpha and not alive["hidden", ""].any():
        raise ValueError("budget: the gates rank no hidden unit among what fits; train them longer")
    _fill(cost, alpha, alive, limit)
    return alive


def _fill(cost: Costs, alpha: Mapping, alive: dict, limit: float) -> None:
    """Add what still fits, in the order of log alpha; of a sub-layer that does not fit whole, the units that do."""
    terms = {(t.kind, t.path): t for t in cost.terms}
    waiting = [(a, name, j) for name, values in alpha.items() for j, a in enumerate(values.reshape(-1))]
    waiting = sorted((item for item in waiting if not alive[item[1]].reshape(-1)[item[2]]), key=lambda item: item[0])
    room = limit - _left(cost, alive)
    for _, name, j in waiting:
        hidden = float(alive["hidden", ""].sum()) if ("hidden", "") in alive else float(cost.hidden)
        if name[0] in ("heads", "ffn"):
            term = terms[name]
            price = term.each * hidden + term.alone
            if not alive.get(("sublayers", name[1]), True) or not alive[name].any() or price > room:
                continue  # its sub-layer is gone, or it does not fit
            alive[name][j] = True
            room -= price
            continue
        before = {key: value.copy() for key, value in alive.items()}
        alive[name] = alive[name] | (np.arange(alive[name].size) == j).reshape(alive[name].shape)
        if name[0] == "sublayers" and _left(cost, alive) > limit:
            term = next(t for t in cost.terms if t.path == name[1])
            key = (term.kind, term.path)
            if key in alive:
                order = np.argsort(alpha[key], kind="stable")
                fits = int((room - term.shared * hidden) // (term.each * hidden + term.alone))
                alive[key] = np.isin(np.arange(term.units), order[: max(fits, 0)])
        left = _left(cost, alive)
        if left > limit:
            alive.update(before)
        else:
            room = limit - left
