"""Which layers of a transformer matter, and the same model without some of them.

Two measures of a layer i, both from hidden states h of calibration sequences; cos runs along the width, and means over
batches, sequences and positions:

    block influence  BI_i = 1 - mean cos(input of layer i, output of layer i)       ShortGPT, arXiv 2403.03853, local
    macro influence  MI_i = 1 - mean cos(h, h without layer i),                     FuseGPT, arXiv 2411.14507, global
                            h the last layer's output, before the final norm

A layer is held here as its graph and its parameters, apart from any model: the layers of one model share their compiled
code, and one may be skipped, changed or left out without building a model around it.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxformers import models, nn, paths, surgery, weights
from jaxformers.compress.calibration import checked_calibration, first_inputs, forward
from jaxformers.models.config import positions_of

EPS = 1e-8
PER_LAYER = ("layer_types", "attention_layers")  # fields of configs that say one thing of each layer


class Layer(NamedTuple):
    """One block: its ``number`` in the model it came from, what nnx keeps of its structure, its nested parameters."""

    number: int
    graph: Any
    params: dict[str, Any]


class Inputs(NamedTuple):
    """What the first layer is given: ``x``, one (batch, length, width) array on the host a batch, and the rest, which
    is the same for all batches: every sequence has the full length."""

    x: list[np.ndarray]
    context: Any


def macro_influence(model: nnx.Module, calibration: np.ndarray, *, batch_size: int = 8) -> Float[np.ndarray, "layers"]:
    """MI of every layer of a decoder (a multimodal model's decoder), float64 from 0 to 2; the least matters least.

    ``calibration``: token ids (sequences, length), a multiple of ``batch_size`` of them, all of full length. The
    passes that skip a layer start from the cached input of the next one: layers · (layers + 1) / 2 block passes in all.
    Everything runs at the highest matmul precision. Raises ValueError for other models and for ids that do not fit.
    """
    layers, inputs = opened(model, calibration, batch_size)
    return influence_of(layers, inputs)


def block_influence(model: nnx.Module, calibration: np.ndarray, *, batch_size: int = 8) -> Float[np.ndarray, "layers"]:
    """BI of every layer, as :func:`macro_influence`; one pass."""
    layers, inputs = opened(model, calibration, batch_size)
    similarity = np.zeros(len(layers))
    with jax.default_matmul_precision("highest"):
        for x in inputs.x:
            for i, layer in enumerate(layers):
                y = forward(layer.graph, layer.params, x, inputs.context)
                similarity[i] += float(_mean_cosine(x, y))
                x = y
    return 1 - similarity / len(inputs.x)


def influence_of(layers: Sequence[Layer], inputs: Inputs) -> Float[np.ndarray, "layers"]:
    """:func:`macro_influence` of layers that hold plain arrays."""
    similarity = np.zeros(len(layers))
    with jax.default_matmul_precision("highest"):
        for x in inputs.x:
            reached = [x]
            for layer in layers:
                reached.append(forward(layer.graph, layer.params, reached[-1], inputs.context))
            for i in range(len(layers)):
                skipped = reached[i]
                for layer in layers[i + 1 :]:
                    skipped = forward(layer.graph, layer.params, skipped, inputs.context)
                similarity[i] += float(_mean_cosine(reached[-1], skipped))
    return 1 - similarity / len(inputs.x)


@jax.jit
def _mean_cosine(h: Array, g: Array) -> Array:
    h, g = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (h, g))
    size = lambda a: jnp.maximum(jnp.sqrt(jnp.sum(a * a, -1)), EPS)
    return jnp.mean(jnp.sum(h * g, -1) / (size(h) * size(g)))


def run(layers: Sequence[Layer], xs: Sequence[np.ndarray], context: Any) -> list[np.ndarray]:
    """The outputs of ``layers``, which hold plain arrays, batch by batch; on the host."""
    outputs = []
    for x in xs:
        for layer in layers:
            x = forward(layer.graph, layer.params, x, context)
        outputs.append(np.asarray(x))
    return outputs


def opened(model: nnx.Module, calibration: np.ndarray, batch_size: int) -> tuple[list[Layer], Inputs]:
    """The layers of the decoder in ``model`` and the calibration sequences as the first of them gets them."""
    decoder = decoder_of(model)
    ids = checked_ids(decoder, calibration, batch_size)
    batches = first_inputs(decoder, {"input_ids": ids}, batch_size)
    return layers_of(decoder), Inputs([x for x, _, _ in batches], batches[0][1])


def decoder_of(model: nnx.Module) -> nnx.Module:
    """``model``, or the decoder within a multimodal one (LLaVA). Raises ValueError where there is none."""
    decoder = getattr(model, "text", model)
    if not hasattr(decoder, "layers") or not models.decodes(decoder.config):
        raise ValueError(
            f"model: {type(model).__name__} is no decoder of texts; expected one such as llama, GPT-2 or LLaVA"
        )
    return decoder


def checked_ids(decoder: nnx.Module, calibration: Any, batch_size: int) -> np.ndarray:
    """``calibration`` as int32 (sequences, length). Raises ValueError saying what does not fit."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be positive")
    ids = checked_calibration(decoder, np.asarray(calibration))["input_ids"]
    if len(ids) % batch_size:
        raise ValueError(f"calibration: {len(ids)} sequences are not a multiple of batch_size={batch_size}")
    positions = positions_of(decoder.config)
    if positions is not None and ids.shape[1] > positions:
        raise ValueError(f"calibration: sequences of {ids.shape[1]} tokens exceed the model's {positions} positions")
    return ids


def layers_of(decoder: nnx.Module) -> list[Layer]:
    """The blocks of ``decoder`` apart. Their sites are named from within the block, so that equal blocks are equal.

    Raises ValueError for weights that are no plain arrays, and for layers that differ in what they hold, naming both.
    """
    found: list[Layer] = []
    shapes: list[dict[str, tuple[int, ...]]] = []
    for i in range(len(decoder.layers)):
        graph, state = nnx.split(surgery.named(nnx.clone(decoder.layers[i])))
        found.append(Layer(i, graph, nnx.to_pure_dict(state)))
        flat = paths.flatten(found[-1].params)
        for path, leaf in flat.items():
            if weights.is_typed(leaf):
                hints = dict.fromkeys(("PackedWeight", "ArrangedWeight"), "compress.dequantize") | {
                    "LowRank": "merge_lora"
                }
                hint = hints.get(type(leaf).__name__)
                raise ValueError(
                    f"model: layers.{i}.{path} is a {type(leaf).__name__}; whole layers are dropped and fused as plain "
                    f"arrays{f': call {hint} first' if hint else ', before anything else is done to them'}"
                )
        shapes.append({path: tuple(leaf.shape) for path, leaf in flat.items()})
    for i, (one, other) in enumerate(zip(shapes, shapes[1:], strict=False)):
        for path in dict.fromkeys([*one, *other]):
            if one.get(path) != other.get(path):
                raise ValueError(
                    f"model: layers {i} and {i + 1} differ in {path}: {one.get(path)} and {other.get(path)}"
                )
    return found


def remove_layers(model: nnx.Module, layers: Sequence[int]) -> nnx.Module:
    """A copy of ``model`` without the layers of these numbers (0 the first): an ordinary, shallower checkpoint.

    Of a multimodal model the decoder loses them. Raises ValueError for numbers that are not there or twice, when fewer
    than two layers are left, and where the architecture's config cannot say what is left.
    """
    part = getattr(model, "text", model)
    depth = len(part.layers)
    numbers = sorted({int(i) for i in layers})
    if len(numbers) != len(list(layers)) or any(not 0 <= i < depth for i in numbers):
        raise ValueError(f"layers: expected different numbers from 0 to {depth - 1}, got {list(layers)}")
    if depth - len(numbers) < 2:
        raise ValueError(f"layers: removing {len(numbers)} of {depth} leaves fewer than 2")
    return with_layers(model, layers_of(part), [i for i in range(depth) if i not in numbers])


def with_layers(model: nnx.Module, layers: Sequence[Layer], kept: Sequence[int]) -> nnx.Module:
    """A copy of ``model`` whose decoder has the layers numbered ``kept``, with the parameters that ``layers`` hold.

    Raises ValueError for a model that other surgery has changed, and where the shallower config would build other
    layers than those kept (a scale by the layer's number, for example).
    """
    if model.surgery:
        raise ValueError(
            f"model: it was changed by {', '.join(function for function, _ in model.surgery)}, which speaks of layers "
            "by number; remove layers first"
        )
    new = surgery.copy(model)
    part = getattr(new, "text", new)
    by_number = {layer.number: layer for layer in layers}
    chosen = [by_number[i] for i in kept]
    part.config = _config_of(part.config, list(kept))
    architecture = models.module_of(part.config)
    wanted = nnx.eval_shape(lambda: architecture.Model(part.config, head=None, rngs=nn.Keys(0)))
    for place, layer in enumerate(chosen):
        graph, _ = nnx.split(surgery.named(nnx.clone(wanted.layers[place])))
        if graph != layer.graph:
            raise ValueError(
                f"model: layer {layer.number} would be another one as layer {place}; {type(part).__name__}'s config "
                "cannot say what it is there"
            )
    part.layers = nn.Layers([nnx.merge(layer.graph, layer.params) for layer in chosen])
    if part is not new:
        new.config = dataclasses.replace(new.config, text=part.config)
    return surgery.named(new)


def _config_of(config: Any, kept: list[int]) -> Any:
    """``config`` with as many layers as are ``kept``, and what it says of single ones."""
    depth, changed = config.num_hidden_layers, {"num_hidden_layers": len(kept)}
    for name in PER_LAYER:
        said = getattr(config, name, None)
        if said is not None:
            changed[name] = tuple(said[i] for i in kept)
    if getattr(config, "max_window_layers", None) is not None:  # the first so many see everything
        changed["max_window_layers"] = sum(i < config.max_window_layers for i in kept)
    hf = json.loads(config.hf)
    for name in PER_LAYER:
        if isinstance(hf.get(name), list) and len(hf[name]) == depth:
            hf[name] = [hf[name][i] for i in kept]
    return dataclasses.replace(config, hf=json.dumps(hf, sort_keys=True), **changed)
