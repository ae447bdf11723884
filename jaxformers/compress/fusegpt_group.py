"""What one round of FuseGPT trains: grafted layers, the loss of a group, and its updates. See `fusegpt.py`."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from jaxformers import losses, paths, weights
from jaxformers.compress.depth import Layer
from jaxformers.weights import Grafted, LowRank

COEFFICIENT = ("c", "d")
FROZEN = ("**.kernel.**.base", "**.donor")
ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}


@dataclasses.dataclass(frozen=True)
class FuseConfig:
    """How much to remove, and how to train what is left. Defaults are the official ones where they make sense.

    ``rate``: share of the layers to remove, rounded up; ``layers``: their number instead (then ``rate`` is None).
    ``group_size``: layers of a group, the victim included; even. ``coefficient``: "lowrank" (D C of ``rank``), "full"
    (one number per weight), "row" (one per output), or "none": nothing is grafted, low-rank updates alone are trained.
    ``lora_rank``: of A B. ``loss``: "feature", the KL divergence of softmaxes over the width, mean over tokens;
    "batch", over the sequences of a batch, as the released code has it; or "mse". ``epochs``: passes over the
    calibration data a round, one update per ``batch_size`` sequences. Both learning rates fall to 0 by a cosine in
    each round: ``coefficient_learning_rate`` for C, D and c, ``learning_rate`` for the rest. ``influence_sequences``:
    how many of the sequences MI is measured on. ``iterative``: measure anew each round; else rank once, at the start.
    ``max_grafts``: before a kernel gets more grafts than this, the learned ones are folded into its W, which saves
    memory; None never does.
    """

    rate: float | None = 0.25
    layers: int | None = None
    group_size: int = 8
    rank: int = 128
    lora_rank: int = 128
    coefficient: Literal["lowrank", "full", "row", "none"] = "lowrank"
    loss: Literal["feature", "batch", "mse"] = "feature"
    epochs: int = 20
    batch_size: int = 8
    learning_rate: float = 9.65e-6
    coefficient_learning_rate: float = 1e-3
    influence_sequences: int = 32
    iterative: bool = True
    max_grafts: int | None = None

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.layers is None):
            raise ValueError("rate, layers: give one of them and set the other to None")
        if self.rate is not None and not 0 < self.rate < 1:
            raise ValueError(f"rate={self.rate}: must lie between 0 and 1")
        if self.group_size < 2 or self.group_size % 2:
            raise ValueError(f"group_size={self.group_size}: must be even, 2 or more")
        choices = {"coefficient": ("lowrank", "full", "row", "none"), "loss": ("feature", "batch", "mse")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {allowed}")
        for name in ("layers", "rank", "lora_rank", "epochs", "batch_size", "influence_sequences", "max_grafts"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}: must be 1 or more")
        if self.influence_sequences % self.batch_size:
            told = f"influence_sequences={self.influence_sequences}"
            raise ValueError(f"{told}: must be a multiple of batch_size={self.batch_size}")
        for name in ("learning_rate", "coefficient_learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number of 0 or more")

    def removed(self, layers: int) -> int:
        """How many of ``layers`` go. Raises ValueError when fewer than two would be left."""
        count = self.layers if self.rate is None else math.ceil(layers * self.rate - 1e-9)
        if layers - count < 2:
            name = "layers" if self.rate is None else "rate"
            raise ValueError(f"{name}={getattr(self, name)}: removing {count} of {layers} layers leaves fewer than 2")
        return count


def graft(layer: Layer, donor: Mapping[str, Any], config: FuseConfig, key: jax.Array) -> Layer:
    """``layer`` with ``donor``, the victim's plain parameters by dotted path, grafted into its linear maps.

    At first every weight stands for what it stood for before. What will be trained is float32 from here on.
    """
    flat = paths.flatten(layer.params)
    grafted: dict[str, Any] = {}
    for i, (path, w) in enumerate(flat.items()):
        own = jax.random.fold_in(key, i)
        parent, _, name = path.rpartition(".")
        if name == "kernel":
            grafted[path] = _graft_kernel(w, donor[path], config, own, path)
        elif config.coefficient != "none" and name == "bias" and f"{parent}.kernel" in flat:
            grafted[path] = Grafted(_float32(w), donor[path], jnp.zeros(w.shape))
        else:
            grafted[path] = _float32(w)
    return layer._replace(params=paths.unflatten(grafted))


def _graft_kernel(w: Any, donor: Array, config: FuseConfig, key: jax.Array, path: str) -> Any:
    if len(w.shape) != 2:
        raise ValueError(f"model: {path} has shape {tuple(w.shape)}; only matrices can be grafted")
    d_in, d_out = w.shape
    a_key, d_key = jax.random.split(key)
    # torch's kaiming_uniform(a=√5) over the inputs
    uniform = lambda k, rank: jax.random.uniform(k, (d_in, rank), minval=-1.0, maxval=1.0) / math.sqrt(d_in)
    if config.max_grafts is not None and _grafts(w) >= config.max_grafts:
        w = weights.dense(w)
    if not weights.is_typed(w):
        w = LowRank(w, uniform(a_key, config.lora_rank), jnp.zeros((config.lora_rank, d_out)), 1.0)
    if config.coefficient == "none":
        return w
    if config.coefficient == "lowrank":
        return Grafted(w, donor, jnp.zeros((config.rank, d_out)), uniform(d_key, config.rank))
    return Grafted(w, donor, jnp.zeros((d_in if config.coefficient == "full" else 1, d_out)))


def _grafts(w: Any) -> int:
    return 1 + _grafts(w.base) if isinstance(w, Grafted) else 0


def _float32(w: Any) -> Any:
    return w if weights.is_typed(w) else w.astype(jnp.promote_types(w.dtype, jnp.float32))


def merged(layer: Layer, dtypes: Mapping[str, Any]) -> Layer:
    """``layer`` with plain arrays of the model's ``dtypes`` in place of its typed weights."""
    flat = {path: weights.dense(w).astype(dtypes[path]) for path, w in paths.flatten(layer.params).items()}
    return layer._replace(params=paths.unflatten(flat))


def group_loss(kind: str, y: Float[Array, "batch length width"], out: Float[Array, "batch length width"]) -> Array:
    """How far ``out`` is from the target ``y``; see `FuseConfig.loss`. The divergence is KL(y ‖ out), in nats."""
    wide = lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32))
    if kind == "mse":
        return jnp.mean(jnp.square(wide(out) - wide(y)))
    if kind == "feature":
        return jnp.mean(losses.kl_divergence(y, out))
    return jnp.sum(losses.kl_divergence(jnp.moveaxis(y, 0, -1), jnp.moveaxis(out, 0, -1))) / len(y)


def train_group(
    layers: Sequence[Layer],
    u: Sequence[np.ndarray],
    y: Sequence[np.ndarray],
    context: Any,
    config: FuseConfig,
    dtypes: Mapping[str, Any],
) -> tuple[list[Layer], np.ndarray, np.ndarray]:
    """The grafted ``layers`` trained to map each batch of ``u`` to ``y``; and the loss of each batch before and after.

    Adam without decay or clipping, one update a batch, always in the same order.
    """
    kind, trained, moments, frozen = begun(layers, config, dtypes)
    measured = lambda: np.array([
        float(_group_loss(kind, trained, frozen, context, *batch)) for batch in zip(u, y, strict=True)
    ])  # fmt: skip
    before = measured()
    rates = np.array([config.coefficient_learning_rate, config.learning_rate], np.float32)
    for step in range(config.epochs * len(u)):
        share = 0.5 * (1 + math.cos(math.pi * step / (config.epochs * len(u))))
        batch = u[step % len(u)], y[step % len(u)]
        now = jnp.asarray(share * rates, jnp.float32)
        trained, moments = update(kind, trained, moments, frozen, context, *batch, now)
    after = measured()
    if not np.all(np.isfinite(after)):
        raise ValueError(
            f"config: the loss of the group of layers {[layer.number for layer in layers]} is not finite after "
            "training; lower learning_rate and coefficient_learning_rate"
        )
    tree = paths.combine(trained, frozen)
    return [layer._replace(params=tree[str(i)]) for i, layer in enumerate(layers)], before, after


class Kind(NamedTuple):
    """What makes one program of an update: the layers' graphs, the loss, and each parameter's dtype by its path."""

    graphs: tuple[Any, ...]
    loss: str
    dtypes: tuple[tuple[str, Any], ...]


def begun(layers: Sequence[Layer], config: FuseConfig, dtypes: Mapping[str, Any]) -> tuple[Kind, Any, Any, Any]:
    """(kind, trained, moments, frozen) of grafted ``layers``, as :func:`update` takes them; ``trained`` is a copy."""
    kind = Kind(tuple(layer.graph for layer in layers), config.loss, tuple(dtypes.items()))
    frozen, trained = paths.partition({str(i): layer.params for i, layer in enumerate(layers)}, FROZEN)
    trained = jax.tree.map(lambda a: jnp.array(a, copy=True), trained)  # to be donated
    return kind, trained, optax.scale_by_adam(**ADAM).init(trained), frozen


def _loss(kind: Kind, trained: Any, frozen: Any, context: Any, u: Array, y: Array) -> Array:
    tree, x, dtypes = paths.combine(trained, frozen), u, dict(kind.dtypes)
    for i, graph in enumerate(kind.graphs):
        plain = merged(Layer(i, graph, tree[str(i)]), dtypes)
        x, _ = nnx.merge(graph, plain.params)(x, **context)
    return group_loss(kind.loss, y, x)


_group_loss = jax.jit(_loss, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def update(
    kind: Kind, trained: Any, moments: Any, frozen: Any, context: Any, u: Array, y: Array, rates: Array
) -> tuple[Any, Any]:
    """(trained, moments) after one batch; ``rates`` (2,): of coefficients, and of the rest."""
    gradient = jax.grad(_loss, argnums=1)(kind, trained, frozen, context, u, y)
    change, moments = optax.scale_by_adam(**ADAM).update(gradient, moments)

    def moved(keys: Any, old: Array, by: Array) -> Array:
        typed = [k.name for k in keys if isinstance(k, jax.tree_util.GetAttrKey)]
        return old - rates[0 if typed and typed[-1] in COEFFICIENT else 1] * by

    return jax.tree_util.tree_map_with_path(moved, trained, change), moments
