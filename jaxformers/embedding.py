"""Texts to sentence embeddings, fast: `embed`; images too.

Every distinct text is encoded once. Texts are sorted by their length in tokens and cut into batches, each padded to one
of a few bucket lengths, so that little is computed on padding and few shapes are compiled. Compiled programs belong to
the model's structure and a bucket: a second call, and another model of the same structure, compile nothing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from jaxformers import surgery
from jaxformers.mesh import batch_sharding
from jaxformers.models.config import positions_of
from jaxformers.nn import SentenceHead, new_sentence_head
from jaxformers.nn.pooling import MODES
from jaxformers.nn.pooling import normalize as unit_rows

if TYPE_CHECKING:
    from jaxformers.data.tokenizers import Tokenizer

FINELY = 64  # batches from which more bucket lengths, and programs to compile for them, pay
TEXTS_AT_A_TIME = 1 << 15  # tokenized together: sorting works within them, and memory is theirs


def embed(
    model: nnx.Module,
    texts: Sequence[str] | None = None,
    *,
    pixel_values: Float[Array, "images channels height width"] | None = None,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 128,
    max_length: int | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    dtype: Any = None,
) -> np.ndarray:
    """n texts -> (n, D) float32 sentence embeddings, in the order given; or images, given as ``pixel_values``.

    Pooling, projection and normalisation are those of the checkpoint (`1_Pooling/config.json` and its like); a model
    without a sentence head, encoder or decoder, gets the mean of the last hidden states over real tokens. `pooling`
    ("mean", "cls", "max" or "last") and `normalize` (unit length or not) override that. `tokenizer` defaults to the one
    in the directory the model came from. Texts are cut to `max_length` tokens, by default the tokenizer's own limit,
    and never more than the model has positions for. `dtype`, such as "bfloat16", is what is computed in; by default
    that of the weights.

    An image's embedding is what the model pools it to. CLIP embeds texts and images by its own poolings and
    projections, into one space and to unit length.

    Raises ValueError: texts that are no sequence of strings, images of another layout, a model that pools none,
    settings out of range, no tokenizer, or embeddings that are not finite.
    """
    if pooling is not None and pooling not in MODES:
        raise ValueError(f"pooling={pooling!r}: expected one of {', '.join(MODES)}")
    if (texts is None) == (pixel_values is None):
        raise ValueError("texts, pixel_values: give exactly one of the two")
    joint = getattr(model, "joint", False)
    if joint and (pooling is not None or normalize is not None):
        raise ValueError(
            f"pooling, normalize: {type(model).__name__} embeds by its own, to unit length; leave them out"
        )
    if pixel_values is not None:
        if pooling is not None:
            raise ValueError("pooling: for texts; a model of images has its own")
        found = forward_images(model, pixel_values, batch_size=batch_size, dtype=dtype)
        return _finite(np.array(unit_rows(found)) if normalize else found, "pixel_values")
    model = surgery.copy(model)
    if not joint:
        if model.head_name != "sentence":
            new_sentence_head(model, pooling="mean", rngs=nnx.Rngs(0))
        head: SentenceHead = model.head
        head.pooling = head.pooling if pooling is None else pooling
        head.normalize = head.normalize if normalize is None else bool(normalize)
    found = forward_texts(
        model, texts, "pooled", tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, dtype=dtype
    )
    return _finite(found, "texts")


def _finite(found: np.ndarray, what: str) -> np.ndarray:
    bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if len(bad):
        raise ValueError(f"model: the embedding of {what}[{bad[0]}] is not finite; the weights overflow or hold NaN")
    return found


def forward_images(
    model: nnx.Module,
    pixel_values: Float[Array, "images channels height width"],
    *,
    batch_size: int = 128,
    dtype: Any = None,
) -> np.ndarray:
    """(n, D) float32: what the model pools each image to. Raises ValueError as `embed` does."""
    if "pixel_values" not in inspect.signature(type(model).__call__).parameters:
        raise ValueError(f"pixel_values: {type(model).__name__} reads no images")
    pixel_values = np.asarray(pixel_values)
    if pixel_values.ndim != 4 or pixel_values.dtype.kind != "f":
        raise ValueError(
            f"pixel_values: expected floating-point numbers (images, channels, height, width), got "
            f"{pixel_values.dtype} of shape {pixel_values.shape}"
        )
    _check_batch_size(batch_size)
    graph, params, put, ways = _prepare(model, dtype)
    waiting = []  # the device works on while the next batches are cut
    for start in range(0, max(len(pixel_values), 1), batch_size):  # none: one batch tells the width
        part = pixel_values[start : start + batch_size]
        padded = np.zeros((_rows(len(part), batch_size, ways), *part.shape[1:]), part.dtype)
        padded[: len(part)] = part
        waiting.append((len(part), _forward(graph, params, put({"pixel_values": padded}), output="pooled")))
    if waiting[0][1] is None:
        raise ValueError(f"model: head {model.head_name!r} of {type(model).__name__} pools no image")
    return np.concatenate([np.asarray(values, np.float32)[:rows] for rows, values in waiting])


def _rows(rows: int, batch_size: int, ways: int) -> int:
    """The number of rows that is compiled for: every device gets as many."""
    size = min(max(8, 1 << max(rows - 1, 0).bit_length()), batch_size)
    return -(-size // ways) * ways


def _check_batch_size(batch_size: Any) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: expected a whole number of 1 or more")


def forward_texts(
    model: nnx.Module,
    texts: Sequence[str],
    output: Literal["pooled", "logits"],
    *,
    pairs: Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 128,
    max_length: int | None = None,
    dtype: Any = None,
) -> np.ndarray:
    """One row of `output` per text, or per pair of texts: (n, D) float32 `pooled` or (n, labels) `logits`.

    The machinery of `embed`, for any model whose output has one row per input: classifiers as well. Raises ValueError
    for a model without that output, and as `embed` does.
    """
    texts = _strings(texts, "texts")
    pairs = None if pairs is None else _strings(pairs, "pairs")
    if pairs is not None and len(pairs) != len(texts):
        raise ValueError(f"pairs: {len(pairs)} for {len(texts)} texts")
    _check_batch_size(batch_size)
    tokenizer = _tokenizer(model) if tokenizer is None else tokenizer
    limit = _limit(model, tokenizer, max_length)
    place: dict[Any, int] = {}
    items = texts if pairs is None else list(zip(texts, pairs, strict=True))
    inverse = np.array([place.setdefault(item, len(place)) for item in items], np.int64)
    distinct = list(place)

    graph, params, put, ways = _prepare(model, dtype)
    names = [name for name in _INPUTS if name in inspect.signature(type(model).__call__).parameters]
    if not texts:
        shapes = dict.fromkeys(names, jax.ShapeDtypeStruct((ways, 8), np.int32))
        return np.zeros(
            (0, jax.eval_shape(partial(_forward, graph, output=output), params, shapes).shape[-1]), np.float32
        )
    out = None
    for start in range(0, len(distinct), TEXTS_AT_A_TIME):
        part = distinct[start : start + TEXTS_AT_A_TIME]
        waiting = []  # the device works on while the next batches are cut
        for rows, batch in _batches(part, pairs is not None, tokenizer, limit, batch_size, ways):
            waiting.append((rows, _forward(graph, params, put({name: batch[name] for name in names}), output=output)))
        for rows, values in waiting:
            if values is None or values.ndim != 2:
                raise ValueError(f"model: head {model.head_name!r} gives no {output} with one row per text")
            values = np.asarray(values, np.float32)[: len(rows)]
            out = np.empty((len(distinct), values.shape[1]), np.float32) if out is None else out
            out[start + rows] = values
    return out[inverse]


_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@partial(jax.jit, static_argnums=0, static_argnames="output")
def _forward(graph: Any, params: Any, batch: dict[str, jax.Array], *, output: str) -> jax.Array | None:
    return getattr(nnx.merge(graph, params)(**batch), output)


def _prepare(model: nnx.Module, dtype: Any) -> tuple[Any, dict[str, Any], Any, int]:
    """The model's structure and weights, how to place a batch, and over how many devices it is cut."""
    model = surgery.copy(model)
    model.source = None  # where weights came from makes no difference to the program
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    if dtype is not None:
        floating = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
        params = jax.tree.map(lambda a: a.astype(dtype) if floating(a) else a, params)
    placed = (getattr(a, "sharding", None) for a in jax.tree.leaves(params))
    mesh = next((s.mesh for s in placed if isinstance(s, NamedSharding)), None)
    if mesh is None:
        return graph, params, lambda batch: batch, 1
    cut = batch_sharding(mesh)
    names = cut.spec[0] if cut.spec else ()
    ways = math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))
    return graph, params, partial(jax.device_put, device=cut), ways


def _batches(
    part: list[Any], paired: bool, tokenizer: Tokenizer, limit: int | None, batch_size: int, ways: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """(places in ``part``, batch of arrays) of similar length, longest first; rows and length padded to few sizes."""
    from jaxformers.data.tokenizers import length_buckets

    texts, pairs = zip(*part, strict=True) if paired else (part, None)
    arrays = tokenizer(texts, pairs, max_length=limit, padding_side="right")
    length = arrays["attention_mask"].sum(1)
    fine = 4 if len(part) >= FINELY * batch_size else 2
    buckets = np.array(length_buckets(max(limit or 0, int(length.max()), 1), smallest=8, per_doubling=fine))
    widths = buckets[np.searchsorted(buckets, length)]
    order = np.argsort(-length, kind="stable")
    while len(order):
        width = widths[order[0]]
        rows = order[:batch_size]
        rows = rows[2 * widths[rows] >= width]  # texts of less than half the length wait for a batch of their own
        order = order[len(rows) :]
        size = _rows(len(rows), batch_size, ways)
        batch = {}
        for name, values in arrays.items():
            padded = np.full((size, width), tokenizer.pad_id if name == "input_ids" else 0, np.int32)
            padded[: len(rows), : values.shape[1]] = values[rows, :width]
            batch[name] = padded
        batch["attention_mask"][len(rows) :, 0] = 1  # rows without any token would attend to nothing
        yield rows, batch


def _strings(texts: Sequence[str], argument: str) -> list[str]:
    if isinstance(texts, str | bytes):
        raise ValueError(f"{argument}: expected a sequence of strings, got one {type(texts).__name__}; pass [text]")
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{argument}: item {i} is {text!r}, a {type(text).__name__}; expected a string")
    return texts


def _tokenizer(model: nnx.Module) -> Tokenizer:
    from jaxformers.data.tokenizers import load_tokenizer

    if getattr(model, "source", None) is None:
        raise ValueError("tokenizer: needed, since the model does not come from a directory that holds one")
    return load_tokenizer(model.source)


def _limit(model: nnx.Module, tokenizer: Tokenizer, max_length: int | None) -> int | None:
    """How many tokens a text may have: what the user says, else the tokenizer; never more than there are positions."""
    if max_length is not None and (isinstance(max_length, bool) or max_length < 1):
        raise ValueError(f"max_length={max_length!r}: expected a whole number of 1 or more")
    config = model.config  # RoBERTa's first positions serve padding: its max_length is less than its positions
    positions = positions_of(config)
    known = [n for n in (max_length or tokenizer.max_length, positions) if n is not None]
    return min(known) if known else None
