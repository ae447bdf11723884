"""Weights that are rounded as they are used: quantisation-aware training, and what is served after it.

:class:`FakeQuant` keeps a full-precision kernel (the "shadow" that the optimiser moves) and multiplies by its rounded
values; it may round the inputs of the product too. Its checkpoint tensors are those of the kernel below, so that other
tools read a model in training as an ordinary one. With packed codes below and nothing left to round but the inputs it
is what :func:`pack_ternary` makes for serving.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers import paths, surgery
from jaxformers.fake_quant import Quantiser, lsq_scale
from jaxformers.weights import base as weights
from jaxformers.weights.ternary_codes import TernaryCodes

Rule = Quantiser | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FakeQuant:
    """A kernel (in, out), or with ``table`` an embedding table (rows, width), that is rounded where it is used.

    ``base``: the array or typed weight below. ``weight``, ``inputs``: how it and the inputs of its product are rounded,
    None for not at all. A "row" is one of PyTorch's: an output of a kernel, a row of a table. ``scale``: what "lsq"
    learns, None for other kinds. Leaves may carry leading axes (stacked layers); each layer then has its own scales.
    """

    base: Any
    scale: jax.Array | None = None
    weight: Rule = dataclasses.field(metadata={"static": True}, default=None)
    inputs: Rule = dataclasses.field(metadata={"static": True}, default=None)
    table: bool = dataclasses.field(metadata={"static": True}, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def dense(self) -> jax.Array:
        base = weights.dense(self.base)
        return base if self.weight is None else oriented(self.weight, self.table)(base, self.scale)

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        if self.inputs is not None:
            x = self.inputs(x)
        return weights.matmul(x, self.base if self.weight is None else self.dense())

    def take(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch width"]:
        """Rows of a table; where each row has its own scale only those are rounded."""
        if self.weight is None or (self.weight.granularity == "row" and self.scale is None):
            rows = weights.take(self.base, ids)
            return rows if self.weight is None else self.weight(rows)
        return jnp.take(self.dense(), ids, axis=0, mode="clip")

    def to_tensors(self) -> dict[str, np.ndarray]:
        own = {} if self.scale is None else {"weight_scale": np.asarray(self.scale)}
        plain = self.table and not weights.is_typed(self.base)  # a table is not transposed in the file
        return {**({"weight": np.asarray(self.base)} if plain else weights.to_tensors(self.base)), **own}

    def from_tensors(self, read: weights.Read) -> "FakeQuant":
        plain = self.table and not weights.is_typed(self.base)
        base = read("weight") if plain else weights.from_tensors(self.base, read)
        if tuple(base.shape) != self.shape:
            raise ValueError(f"weight: expected shape {self.shape}, found {tuple(base.shape)}")
        scale = None if self.scale is None else read("weight_scale")
        return dataclasses.replace(self, base=base, scale=scale)


def oriented(rule: Quantiser, table: bool) -> Quantiser:
    """``rule`` for arrays as they lie here: a kernel's (in, out) has PyTorch's rows as columns, and a stack of layers
    one tensor each."""
    there = {"tensor": "head"} if table else {"tensor": "head", "row": "column", "column": "row"}
    if rule.kind == "lsq":  # its scale is there already, in its shape
        return rule
    return dataclasses.replace(rule, granularity=there.get(rule.granularity, rule.granularity))


def fake_quantise(
    model: nnx.Module,
    kernels: Mapping[str, Rule],
    *,
    inputs: Rule | Mapping[str, Rule] = None,
    attention: Rule = None,
) -> nnx.Module:
    """A copy of ``model`` whose weights are rounded as they are used.

    Args:
        kernels: {pattern of module paths: how}: linear layers and tables of tokens; the first pattern that matches
            decides, None leaves a weight as it is.
        inputs: how the inputs of those linear layers are rounded, one rule for all or by pattern.
        attention: how queries, keys, values (after the split into heads) and probabilities (after dropout) are rounded
            before their products; ``granularity="head"`` gives each head its own scale.

    Raises ValueError for a pattern that matches no weight, a weight that is rounded already or no matrix, for inputs of
    kind "twn" or "lsq", and where ``attention`` is asked of an attention that cannot round.
    """
    inputs_by = dict(inputs) if isinstance(inputs, Mapping) else {"**": inputs}
    for rule in (*inputs_by.values(), attention):
        if rule is not None and rule.kind not in ("symmetric", "asymmetric"):
            raise ValueError(f"inputs, attention: activations are rounded symmetric or asymmetric, not by {rule.kind}")
    model = surgery.copy(model)
    found = _weights(model)
    _check_patterns("kernels", kernels, found)
    _check_patterns("inputs", {p: r for p, r in inputs_by.items() if p != "**"}, found)
    for path, (module, name) in found.items():
        weight = _first(kernels, path)
        if weight is None:
            continue
        value = getattr(module, name).get_value()
        if isinstance(value, FakeQuant):
            raise ValueError(f"kernels: {path} is rounded already")
        if len(value.shape) != 2:
            raise ValueError(f"kernels: {path} has shape {tuple(value.shape)}, no matrix; leave it out")
        table, scale = name == "embedding", None
        if weight.kind == "lsq":
            there = {"row": "column", "column": "row"} if not table else {}
            granularity = there.get(weight.granularity, weight.granularity)
            scale = lsq_scale(weights.dense(value), weight.bits, granularity)
        rule = None if table else _first(inputs_by, path)
        getattr(module, name).set_value(FakeQuant(value, scale, weight, rule, table))
    if attention is not None:
        able = [module for _, module in nnx.iter_modules(model) if hasattr(module, "operands")]
        if not able:
            raise ValueError("attention: no attention of this model rounds its operands; leave it None")
        for module in able:
            module.operands = attention
    return surgery.record(
        model,
        _FAKE,
        kernels=_to_json(kernels),
        inputs=_to_json(inputs_by),
        attention=None if attention is None else dataclasses.asdict(attention),
    )


_FAKE = "jaxformers.weights.fake:_abstract_fake"
_PACKED = "jaxformers.weights.fake:_abstract_packed"


def _abstract_fake(model: nnx.Module, *, kernels: Any, inputs: Any, attention: Any) -> nnx.Module:
    """Rebuild the structure that :func:`fake_quantise` made; the checkpoint fills the values."""
    rule = None if attention is None else Quantiser(**attention)
    return fake_quantise(model, _from_json(kernels), inputs=_from_json(inputs), attention=rule)


def full_precision(model: nnx.Module) -> nnx.Module:
    """A copy of ``model`` with the weights below the rounding, the shadow, and nothing rounded any more.

    Raises ValueError when nothing in it is rounded, or its weights were packed: what was below is gone then.
    """
    model, found = surgery.copy(model), 0
    for path, (module, name) in _weights(model).items():
        value = getattr(module, name).get_value()
        if isinstance(value, FakeQuant):
            if isinstance(value.base, TernaryCodes):
                raise ValueError(f"model: {path} is packed; its full-precision weights are gone")
            getattr(module, name).set_value(value.base)
            found += 1
    if not found:
        raise ValueError("model: none of its weights is rounded; fake_quantise makes one whose weights are")
    for _, module in nnx.iter_modules(model):
        if getattr(module, "operands", None) is not None:
            module.operands = None
    return surgery.forget(model, _FAKE)


def pack_ternary(model: nnx.Module) -> nnx.Module:
    """A copy of ``model`` in which every weight that is rounded to ternary values has become its 2-bit codes.

    What it computes stays the same; inputs and attention are rounded as before. Other weights stay as they are.
    `jaxformers.save` writes the codes, `jaxformers.load` reads them. Raises ValueError when no weight is ternary, or
    its scales are neither one per tensor nor one per row.
    """
    model, found = surgery.copy(model), 0
    for path, (module, name) in _weights(model).items():
        value = getattr(module, name).get_value()
        if not isinstance(value, FakeQuant) or value.weight is None or value.weight.kind != "twn":
            continue
        if value.weight.granularity not in ("tensor", "row"):
            raise ValueError(f"model: {path} has a ternary scale per {value.weight.granularity}; packed are those per "
                             "tensor or row")  # fmt: skip
        shared = value.weight.granularity == "tensor"
        codes = TernaryCodes.from_dense(_as_compiled(value), table=value.table, shared=shared)
        getattr(module, name).set_value(FakeQuant(codes, None, None, value.inputs, value.table))
        found += 1
    if not found:
        raise ValueError("model: none of its weights is rounded to ternary values; see fake_quantise")
    return surgery.record(model, _PACKED)


@jax.jit
def _as_compiled(w: FakeQuant) -> jax.Array:
    """What the weight is inside a compiled model: op by op XLA adds up in another order, and a scale that differs in
    its last bits takes some 8-bit input to the level beside."""
    return w.dense()


def _abstract_packed(model: nnx.Module) -> nnx.Module:
    """Rebuild the structure that :func:`pack_ternary` made."""
    return pack_ternary(model)


def zero_fraction(params: Any) -> jax.Array:
    """The share of zeros among the rounded values of all :class:`FakeQuant` in ``params`` (or a model's); scalar."""
    params = nnx.to_pure_dict(nnx.state(params)) if isinstance(params, nnx.Module) else params
    found = [w.dense() for w in paths.flatten(params).values() if isinstance(w, FakeQuant)]
    if not found:
        raise ValueError("params: none of these weights is rounded")
    return sum(jnp.sum(w == 0) for w in found) / sum(w.size for w in found)


def _weights(model: nnx.Module) -> dict[str, tuple[Any, str]]:
    """{path: (module, "kernel" or "embedding")} of linear layers and tables of tokens; other tables are not only looked
    up, and small."""
    found = {}
    for path, module in nnx.iter_modules(model):
        name = "embedding" if path and path[-1] == "token" else "kernel"
        if isinstance(getattr(module, name, None), nnx.Variable):
            found[".".join(map(str, path))] = (module, name)
    return found


def _first(rules: Mapping[str, Rule], path: str) -> Rule:
    return next((rule for pattern, rule in rules.items() if paths.matches(pattern, path)), None)


def _check_patterns(argument: str, rules: Mapping[str, Rule], found: Mapping[str, Any]) -> None:
    if argument == "kernels" and not any(rule is not None for rule in rules.values()):
        raise ValueError("kernels: nothing is to be rounded; give {pattern: Quantiser}")
    for pattern in rules:
        if not any(paths.matches(pattern, path) for path in found):
            raise ValueError(f"{argument}: {pattern!r} matches no weight; there are {', '.join(list(found)[:6])}, …")


def _to_json(rules: Mapping[str, Rule]) -> list[Any]:
    return [[pattern, None if rule is None else dataclasses.asdict(rule)] for pattern, rule in rules.items()]


def _from_json(rules: list[Any]) -> dict[str, Rule]:
    return {pattern: None if rule is None else Quantiser(**rule) for pattern, rule in rules}
