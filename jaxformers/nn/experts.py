"""Mixture of experts: routers, stacked expert MLPs without capacity limits, and the load-balancing loss.

    p = softmax(W_r x) or sigmoid(W_r x)                          scores of the E experts, float32
    ids = the k largest of p + correction                         correction: chooses, but does not weigh
    y = Σ_{e ∈ ids} g_e · MLP_e(x) + MLP_shared(x)                g = p[ids], normalised and scaled where asked

(arXiv 2101.03961 with k = 1; Mixtral, arXiv 2401.04088; DeepSeek-V3, arXiv 2412.19437, equations 12–16.)
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxformers.kernels.grouped import grouped_matmul
from jaxformers.mesh import current, cut
from jaxformers.nn.linear import Linear
from jaxformers.nn.mlp import MLP, activation
from jaxformers.sites import site, wanted

SCORES = ("softmax", "sigmoid")


def route(
    logits: Float[Array, "*batch experts"],
    k: int,
    *,
    score: str = "softmax",
    correction: Float[Array, "experts"] | None = None,
    groups: int = 1,
    top_groups: int = 1,
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[Int[Array, "*batch k"], Float[Array, "*batch k"]]:
    """The ``k`` experts of each token, best first, and their weights.

    ``correction`` is added to the scores that choose, not to the weights (balance without a loss, arXiv 2408.15664).
    With ``groups`` > 1 only the ``top_groups`` best groups of neighbouring experts take part; a group is as good as
    the sum of its two best. ``normalize``: weights sum to 1, before ``scale``. Of equal scores the first counts.

    Raises ValueError for an unknown ``score``, or numbers of experts and groups that do not fit.
    """
    experts = logits.shape[-1]
    check_routing(experts, k, score=score, groups=groups, top_groups=top_groups)
    logits = logits.astype(jnp.float32)
    p = jax.nn.softmax(logits, axis=-1) if score == "softmax" else jax.nn.sigmoid(logits)
    choose = p if correction is None else p + correction.astype(jnp.float32)
    if groups > 1:
        grouped = choose.reshape(*choose.shape[:-1], groups, -1)
        value = jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
        best = jax.nn.one_hot(jax.lax.top_k(value, top_groups)[1], groups, dtype=bool).any(axis=-2)
        choose = jnp.where(best[..., None], grouped, -jnp.inf).reshape(choose.shape)
    ids = jax.lax.top_k(choose, k)[1]
    gates = jnp.take_along_axis(p, ids, axis=-1)
    if normalize:
        gates = gates / (gates.sum(axis=-1, keepdims=True) + 1e-20)
    return ids, gates * scale


def check_routing(experts: int, k: int, *, score: str, groups: int, top_groups: int) -> None:
    """Raise ValueError when :func:`route` cannot choose ``k`` of ``experts``."""
    if score not in SCORES:
        raise ValueError(f"score: expected one of {', '.join(SCORES)}, got {score!r}")
    if groups < 1 or experts % groups or (groups > 1 and experts // groups < 2):
        raise ValueError(f"groups: {experts} experts do not form {groups} equal groups of two or more")
    if not 1 <= top_groups <= groups:
        raise ValueError(f"top_groups: expected 1 to {groups}, got {top_groups}")
    if not 1 <= k <= experts // groups * top_groups:
        raise ValueError(f"k: expected 1 to {experts // groups * top_groups} experts a token, got {k}")


def balance_loss(
    probs: Float[Array, "batch length experts"],
    ids: Int[Array, "batch length k"],
    valid: Bool[Array, "batch length"] | None = None,
    *,
    per_sequence: bool = False,
) -> Float[Array, ""]:
    """``Σ_e f_e P_e``: 1 when all experts are used alike, up to E when one of them is used alone.

    f_e = (E / k) · share of the ``valid`` tokens that chose e, P_e = their mean probability for e, over the whole batch
    (arXiv 2101.03961, equations 4–6) or, ``per_sequence``, in each sequence and then averaged (arXiv 2412.19437,
    equations 17–20). Probabilities that do not sum to 1 (sigmoid) are normalised first. Gradients flow through P only.
    """
    experts, k = probs.shape[-1], ids.shape[-1]
    probs = probs.astype(jnp.float32)
    probs = probs / probs.sum(axis=-1, keepdims=True)
    real = jnp.ones(ids.shape[:2]) if valid is None else valid.astype(jnp.float32)
    if not per_sequence:
        probs, ids, real = (a.reshape(1, -1, *a.shape[2:]) for a in (probs, ids, real))
    tokens = jnp.maximum(real.sum(axis=1), 1)[:, None]
    chosen = jax.nn.one_hot(ids, experts).sum(axis=2)
    f = experts / k * jnp.einsum("ble,bl->be", chosen, real, precision="highest") / tokens
    p = jnp.einsum("ble,bl->be", probs, real, precision="highest") / tokens
    rows = (real.sum(axis=1) > 0).astype(jnp.float32)  # a sequence of padding alone says nothing
    return ((f * p).sum(axis=-1) * rows).sum() / jnp.maximum(rows.sum(), 1)


class ExpertLinear(nnx.Module):
    """``kernel`` (experts, in, out) and perhaps ``bias`` (experts, out): one linear map an expert, in one array."""

    def __init__(self, experts: int, d_in: int, d_out: int, *, bias: bool = False, std: float = 0.02, rngs: Any):
        self.path = ""
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (experts, d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros((experts, d_out))) if bias else None

    def arrays(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
        """Kernel and bias as ``dtype``."""
        bias = None if self.bias is None else self.bias.get_value().astype(dtype)
        return self.kernel.get_value().astype(dtype), bias


class Experts(nnx.Module):
    """E MLPs ``up``, ``down`` and perhaps ``gate`` (as in :class:`jaxformers.nn.MLP`) of which each token uses a few.

    No token is ever dropped. Three ways give the same sum: the weights of the chosen experts are gathered (few tokens:
    a decoding step); or tokens are sorted by expert and each expert multiplies its own (``kernels/grouped.py``); or all
    experts see all tokens and the rest is masked, on CPUs, which have no fast ragged product, and wherever
    the site is used. Site ``hidden`` (B, L, k, hidden): what enters the chosen experts' ``down``.

    Under :func:`jaxformers.mesh.constrained` each device takes the tokens of its part of the batch, the experts of its
    part of the mesh axis "expert" and the hidden units of its part of "tensor"; what they give is summed over those
    two, and no expert moves along them.
    """

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        *,
        act: str,
        gated: bool = True,
        bias: bool = False,
        std: float = 0.02,
        rngs: Any,
    ):
        self.path = ""
        self.act = act
        activation(act)
        linear = lambda d_in, d_out: ExpertLinear(experts, d_in, d_out, bias=bias, std=std, rngs=rngs)
        self.gate = linear(width, hidden) if gated else None
        self.up = linear(width, hidden)
        self.down = linear(hidden, width)

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        ids: Int[Array, "batch length k"],
        gates: Float[Array, "batch length k"],
    ) -> Float[Array, "batch length width"]:
        """``Σ_j gates[…, j] · MLP_{ids[…, j]}(x)``; the ids of one token differ from each other."""
        layers = {"gate": self.gate, "up": self.up, "down": self.down}
        kernels = {name: layer.arrays(x.dtype) for name, layer in layers.items() if layer is not None}
        gates = gates.astype(x.dtype)
        if not wanted(f"{self.path}.hidden"):
            return _spread(lambda *part: _flat(_fastest, *part, self.act), x, ids, gates, kernels)
        offer = lambda h: site(f"{self.path}.hidden", h.reshape(*ids.shape, -1)).reshape(h.shape)
        return _flat(partial(_masked, offer=offer), x, ids, gates, kernels, self.act)


class MoE(nnx.Module):
    """What stands where a block's MLP stood: ``router``, ``experts`` and, with ``shared`` > 0, a ``shared`` MLP.

    ``correction`` (experts,): see :func:`route`, which explains the other settings too. Router and choice are float32
    at the highest precision. Sites: ``router.output`` (B, L, E), the logits; ``ids`` and ``gates`` (B, L, k), the
    choice and its weights; those of ``experts`` and ``shared``. :func:`balance_loss` takes what was read there.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        experts: int,
        k: int,
        act: str,
        score: str = "softmax",
        correction: bool = False,
        groups: int = 1,
        top_groups: int = 1,
        normalize: bool = False,
        scale: float = 1.0,
        shared: int = 0,
        std: float = 0.02,
        rngs: Any,
    ):
        check_routing(experts, k, score=score, groups=groups, top_groups=top_groups)
        self.path = ""
        self.k, self.score, self.normalize, self.scale = k, score, normalize, scale
        self.groups, self.top_groups = groups, top_groups
        self.router = Linear(width, experts, bias=False, std=std, rngs=rngs)
        self.correction = nnx.Param(jnp.zeros(experts)) if correction else None
        self.experts = Experts(experts, width, hidden, act=act, std=std, rngs=rngs)
        self.shared = MLP(width, shared, act=act, gated=True, bias=False, std=std, rngs=rngs) if shared else None

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        with jax.default_matmul_precision("highest"):
            logits = self.router(x.astype(jnp.float32))
        ids, gates = route(
            logits,
            self.k,
            score=self.score,
            correction=None if self.correction is None else self.correction.get_value(),
            groups=self.groups,
            top_groups=self.top_groups,
            normalize=self.normalize,
            scale=self.scale,
        )
        y = self.experts(x, site(f"{self.path}.ids", ids), site(f"{self.path}.gates", gates))
        return y if self.shared is None else y + self.shared(x)


def _spread(compute: Any, x: Array, ids: Array, gates: Array, kernels: dict[str, Any]) -> Array:
    """``compute`` on each device's own tokens, experts and hidden units, where a mesh is known.

    Of a token's ids those of other devices' experts become E, one beyond the last, with a gate of 0.
    """
    mesh, (kernel, _) = current(), kernels["up"]
    batch, expert, mlp = cut("batch", x.shape[0]), cut("expert", kernel.shape[0]), cut("mlp", kernel.shape[2])
    mlp = mlp if kernels["down"][1] is None else ()  # a bias of the sum must not be added by each
    if not (batch or expert or mlp):
        return compute(x, ids, gates, kernels)

    def own(x: Array, ids: Array, gates: Array, kernels: dict[str, Any]) -> Array:
        if expert:
            held = kernels["up"][0].shape[0]
            ids = ids - jax.lax.axis_index(expert) * held
            mine = (ids >= 0) & (ids < held)
            ids, gates = jnp.where(mine, ids, held), jnp.where(mine, gates, 0)
        y = compute(x, ids, gates, kernels)
        return jax.lax.psum(y, (*expert, *mlp)) if expert or mlp else y

    tokens, e, h = (PartitionSpec(axes or None) for axes in (batch, expert, mlp))
    into, out = (PartitionSpec(*e, None, *h), PartitionSpec(*e, *h)), (PartitionSpec(*e, *h, None), e)
    layers = {name: out if name == "down" else into for name in kernels}
    single = (name for name, size in mesh.shape.items() if size == 1)  # or no kernel could run, which XLA cannot cut
    axes = {*batch, *expert, *mlp, *single}
    specs = (tokens, tokens, tokens, layers)
    return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=tokens, axis_names=axes, check_vma=False)(
        x, ids, gates, kernels
    )


def _flat(compute: Any, x: Array, ids: Array, gates: Array, kernels: dict[str, Any], act: str) -> Array:
    """``compute`` with batch and length as one axis of tokens."""
    k = ids.shape[-1]
    return compute(x.reshape(-1, x.shape[-1]), ids.reshape(-1, k), gates.reshape(-1, k), kernels, act).reshape(x.shape)


def _fastest(x: Array, ids: Array, gates: Array, kernels: dict[str, Any], act: str) -> Array:
    if ids.size * 4 <= kernels["up"][0].shape[0]:
        return _gathered(x, ids, gates, kernels, act)
    ways = {"cpu": lambda *a: _masked(*a, act), "default": lambda *a: _sorted(*a, act)}
    return jax.lax.platform_dependent(x, ids, gates, kernels, **ways)


# ---- three ways to the same sum; x (T, width), ids and gates (T, k), kernels {name: (kernel, bias)} ------------------
# An id of E, one beyond the last expert, stands for one that is not here; its gate is 0.


def _hidden(kernels: dict[str, Any], act: str, product: Any) -> Array:
    """``act(gate(x)) · up(x)`` or ``act(up(x))``, with ``product(kernel, bias)`` for the linear maps."""
    if "gate" not in kernels:
        return activation(act)(product(*kernels["up"]))
    return activation(act)(product(*kernels["gate"])) * product(*kernels["up"])


def _gathered(x: Array, ids: Array, gates: Array, kernels: dict[str, Any], act: str) -> Array:
    ids = jnp.minimum(ids, kernels["up"][0].shape[0] - 1)

    def product(kernel: Array, bias: Array | None) -> Array:
        y = jnp.einsum("td,tkdh->tkh", x, kernel[ids])
        return y if bias is None else y + bias[ids]

    hidden = _hidden(kernels, act, product) * gates[..., None]
    kernel, bias = kernels["down"]
    y = jnp.einsum("tkh,tkhd->td", hidden, kernel[ids])
    return y if bias is None else y + jnp.einsum("tk,tkd->td", gates, bias[ids])


def _masked(x: Array, ids: Array, gates: Array, kernels: dict[str, Any], act: str, offer: Any = None) -> Array:
    experts = kernels["up"][0].shape[0]

    def product(kernel: Array, bias: Array | None) -> Array:
        y = jnp.einsum("td,edh->teh", x, kernel)
        return y if bias is None else y + bias

    hidden = _hidden(kernels, act, product)
    chosen = jax.nn.one_hot(ids, experts, dtype=x.dtype)  # (T, k, E)
    if offer is not None:
        own = offer(jnp.take_along_axis(hidden, ids[..., None], axis=1))
        hidden = jnp.einsum("tke,tkh->teh", chosen, own)
    gate = jnp.einsum("tke,tk->te", chosen, gates)
    kernel, bias = kernels["down"]
    y = jnp.einsum("teh,ehd->td", hidden * gate[..., None], kernel)
    return y if bias is None else y + gate @ bias


def _sorted(x: Array, ids: Array, gates: Array, kernels: dict[str, Any], act: str) -> Array:
    k, experts = ids.shape[1], kernels["up"][0].shape[0]
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = (flat[:, None] == jnp.arange(experts)).sum(axis=0, dtype=jnp.int32)

    def linear(x: Array, kernel: Array, bias: Array | None) -> Array:
        y = grouped_matmul(x, kernel, sizes)
        return y if bias is None else y + bias[jnp.minimum(flat[order], experts - 1)]

    own = x[order // k]
    hidden = _hidden(kernels, act, lambda *layer: linear(own, *layer))
    y = linear(hidden, *kernels["down"]) * gates.reshape(-1)[order, None]
    return jnp.zeros_like(x).at[order // k].add(y)
