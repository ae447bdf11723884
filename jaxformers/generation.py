"""Text from a decoder: `generate`, greedy or sampled.

Prompts are padded on the left to a bucket of lengths, run once (prefill) and then continued token by token with a
key/value cache of static shape. Prefill and the loop over tokens are one compiled program per structure of model and
(batch, prompt length, new tokens) bucket. Whatever else changes is an argument of it and compiles nothing: temperature,
top-k, top-p, key, end tokens, the number of new tokens within its bucket, the weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxformers import surgery

if TYPE_CHECKING:
    from jaxformers.data.tokenizers import Tokenizer

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # rows that are compiled for; more in steps of 64


class Sampler(NamedTuple):
    """How the next token is chosen: traced scalars."""

    temperature: Float[Array, ""]  # 0: the most likely token
    top_k: Int[Array, ""]  # the vocabulary's size: all
    top_p: Float[Array, ""]  # 1: all
    key: jax.Array


def generate(
    model: nnx.Module,
    prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | np.ndarray,
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    tokenizer: Tokenizer | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    batch_size: int = 64,
    pixel_values: Float[Array, "images channels height width"] | None = None,
) -> Any:
    """Continue each prompt by at most ``max_new_tokens`` tokens.

    ``prompts``: a text or several, or the token ids of one or several. Returns what was generated, without the prompt,
    in the same form: str for a str, a list of str for several, and a list of ids, or a list of such, for ids. Ids end
    with the end token where one was reached; texts leave special tokens out.

    Without ``temperature``, or with 0, the most likely token is taken (greedy). Otherwise a token is drawn from
    softmax(logits / temperature) with ``key``, after restriction to the ``top_k`` most likely tokens (ties with the
    last of them stay) and then to the smallest set of most likely tokens whose probability reaches ``top_p``
    (arXiv 1904.09751). Row i draws with its own key: its text does not depend on the batch's size or padding.

    ``eos_token_id``: the token, or tokens, at which a row stops; by default those of ``generation_config.json``, else
    of ``config.json``, else the tokenizer's. ``()`` never stops. ``tokenizer`` defaults to the one in the directory the
    model came from, and is not needed for ids. ``batch_size`` prompts run at a time, the longest first.

    ``pixel_values``: the images of all prompts, for a model that reads images (LLaVA), in the order of their image
    tokens.

    Raises ValueError: a model without a causal language model's head; images that do not match the prompts' image
    tokens; an empty prompt, ids outside the vocabulary, or a
    prompt that with ``max_new_tokens`` exceeds the model's positions; settings out of range; sampling without a key; no
    tokenizer for a text.
    """
    if getattr(model, "head_name", None) != "causal_lm":
        raise ValueError(
            f"model: head {getattr(model, 'head_name', None)!r} predicts no next token; load it with head='causal_lm'"
        )
    sampler = _sampler(model.config.vocab_size, temperature, top_k, top_p, key)
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r}: expected a whole number of 1 or more")
    single, texts = _form(prompts)
    if texts and tokenizer is None:
        tokenizer = _tokenizer(model)
    rows = _rows(prompts, single, texts, tokenizer, model.config, max_new_tokens)
    ends = _end_tokens(model, tokenizer, eos_token_id)
    images = _images(model, rows, pixel_values)
    program = _Program.of(model)
    found: list[list[int]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        first = {} if images is None else _padded_images([images[i] for i in chunk])
        new = program.run([rows[i] for i in chunk], chunk, max_new_tokens, ends, sampler, first)
        for i, ids in zip(chunk, new, strict=True):
            found[i] = ids
    if texts:
        found = [_continuation(tokenizer, row, ids) for row, ids in zip(rows, found, strict=True)]
    return found[0] if single else found


# ---- the compiled part ---------------------------------------------------------------------------------------------


class _Program(NamedTuple):
    graph: Any  # hashable structure: the key under which jit keeps what it compiled
    params: dict[str, Any]
    positions: int | None

    @classmethod
    def of(cls, model: nnx.Module) -> _Program:
        model = surgery.copy(model)
        model.source = None  # where weights came from makes no difference to the program
        graph, state = nnx.split(model)
        return cls(graph, nnx.to_pure_dict(state), getattr(model.config, "max_position_embeddings", None))

    def run(
        self,
        rows: list[list[int]],
        numbers: list[int],
        max_new_tokens: int,
        ends: tuple[int, ...],
        sampler: Sampler,
        first: dict[str, Any],
    ) -> list[list[int]]:
        """The new ids of each of ``rows``; ``numbers`` are their places in the user's list. ``first``: what else the
        model reads with the prompts."""
        from jaxformers.data.padding import bucket, length_buckets, pad_rows

        # of the positions, max_new_tokens are spoken for; padding takes slots of the cache, never more than positions
        room = None if self.positions is None else self.positions - max_new_tokens
        length = bucket(rows, length_buckets(room or 1 << 30))
        new_slots = next(n for n in length_buckets(1 << 30) if n >= max_new_tokens)
        new_slots = new_slots if self.positions is None else min(new_slots, self.positions - length)
        size = next((n for n in BATCHES if n >= len(rows)), -(-len(rows) // 64) * 64)
        filled = [*rows, *[[0]] * (size - len(rows))]
        stop = np.full(max(4, len(ends)), -1, np.int32)  # few counts of end tokens, few shapes
        stop[: len(ends)] = ends
        tokens = _decode(
            self.graph,
            self.params,
            pad_rows(filled, length, 0, "left"),
            pad_rows([[1] * len(row) for row in filled], length, 0, "left"),
            np.arange(size) >= len(rows),
            np.asarray([*numbers, *[0] * (size - len(rows))], np.int32),
            np.int32(max_new_tokens),
            stop,
            sampler,
            first,
            new_slots=new_slots,
        )
        return [_cut(row.tolist(), ends, max_new_tokens) for row in np.asarray(tokens)[: len(rows)]]


@partial(jax.jit, static_argnums=0, static_argnames="new_slots")
def _decode(
    graph: Any,
    params: dict[str, Any],
    input_ids: Int[Array, "batch length"],
    attention_mask: Int[Array, "batch length"],
    done: Bool[Array, "batch"],
    numbers: Int[Array, "batch"],
    max_new_tokens: Int[Array, ""],
    stop: Int[Array, "ends"],
    sampler: Sampler,
    first: dict[str, Any],
    *,
    new_slots: int,
) -> Int[Array, "batch new"]:
    model = nnx.merge(graph, params)
    batch, length = input_ids.shape
    keys = jax.vmap(jax.random.fold_in, (None, 0))(sampler.key, numbers)

    def forward(
        ids: jax.Array, mask: jax.Array | None, positions: jax.Array, cache: Any, **first: Any
    ) -> tuple[jax.Array, Any]:
        out = model(ids, mask, position_ids=positions, cache=cache, logits_to_keep=1, **first)
        return out.logits[:, -1].astype(jnp.float32), out.cache

    def choose(logits: jax.Array, step: jax.Array) -> jax.Array:
        return next_token(logits, sampler._replace(key=jax.vmap(jax.random.fold_in, (0, None))(keys, step)))

    cache = model.empty_cache(batch, length + new_slots)
    positions = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
    logits, cache = forward(input_ids, attention_mask, positions, cache, **first)
    token = choose(logits, 0)
    tokens = jnp.zeros((batch, new_slots), jnp.int32).at[:, 0].set(token)
    done = done | jnp.isin(token, stop)

    def unfinished(state: tuple) -> jax.Array:
        step, _, _, done, _, _ = state
        return (step < max_new_tokens) & ~done.all()

    def advance(state: tuple) -> tuple:
        step, token, position, done, tokens, cache = state
        logits, cache = forward(token[:, None], None, position[:, None], cache)
        token = choose(logits, step)
        tokens = tokens.at[:, step].set(token)
        return step + 1, token, position + 1, done | jnp.isin(token, stop), tokens, cache

    state = (jnp.int32(1), token, positions[:, -1] + 1, done, tokens, cache)
    return jax.lax.while_loop(unfinished, advance, state)[4]


def next_token(logits: Float[Array, "batch vocab"], sampler: Sampler) -> Int[Array, "batch"]:
    """One token a row; ``sampler.key`` holds one key a row. Sorting happens only when top-k or top-p ask for it."""
    vocab = logits.shape[-1]

    def greedy(logits: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(logits: jax.Array) -> jax.Array:
        logits = logits / sampler.temperature
        all_of_them = (sampler.top_k >= vocab) & (sampler.top_p >= 1)
        logits = jax.lax.cond(all_of_them, lambda x: x, lambda x: restrict(x, sampler.top_k, sampler.top_p), logits)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocab,)))(sampler.key)
        return greedy(logits + noise)  # the Gumbel-max trick: a draw from softmax(logits)

    return jax.lax.cond(sampler.temperature > 0, draw, greedy, logits)


def restrict(
    logits: Float[Array, "batch vocab"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """-inf for all but the ``top_k`` largest logits and, of these, those that reach probability ``top_p``.

    A token stays when the tokens before it, in falling order, have less than ``top_p`` together: at least one always.
    Tokens equal to the last one that stays, stay too.
    """
    vocab = logits.shape[-1]
    falling = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    last = jnp.take(falling, jnp.minimum(top_k, vocab) - 1, axis=-1)[:, None]
    probability = jax.nn.softmax(jnp.where(falling >= last, falling, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    stays = (falling >= last) & ((before < top_p) | (top_p >= 1))
    least = jnp.min(jnp.where(stays, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


# ---- the user's words to arrays and back ---------------------------------------------------------------------------


def _sampler(vocab: int, temperature: Any, top_k: Any, top_p: Any, key: jax.Array | None) -> Sampler:
    if temperature is None and (top_k is not None or top_p is not None or key is not None):
        raise ValueError("temperature: top_k, top_p and key act on sampling; give a temperature, as 1.0")
    temperature = 0.0 if temperature is None else temperature
    if not _number(temperature) or not 0 <= temperature < np.inf:
        raise ValueError(f"temperature={temperature!r}: expected a number of 0 or more; 0 takes the most likely token")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int | np.integer) or top_k < 1):
        raise ValueError(f"top_k={top_k!r}: expected a whole number of 1 or more, or None for all tokens")
    if top_p is not None and (not _number(top_p) or not 0 < top_p <= 1):
        raise ValueError(f"top_p={top_p!r}: expected a number above 0 and up to 1, or None for all tokens")
    if temperature > 0 and key is None:
        raise ValueError("key: sampling needs a PRNG key, as in key=jax.random.key(0)")
    key = jax.random.key(0) if key is None else key
    if not jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(jnp.asarray(key))
    k = vocab if top_k is None else min(int(top_k), vocab)
    return Sampler(np.float32(temperature), np.int32(k), np.float32(1 if top_p is None else top_p), key)


def _number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _form(prompts: Any) -> tuple[bool, bool]:
    """(is it one prompt?, are they texts?)."""
    if isinstance(prompts, str):
        return True, True
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence | np.ndarray | jax.Array):
        raise ValueError(f"prompts: expected text or token ids, got {type(prompts).__name__}")
    texts = [isinstance(p, str) for p in prompts]
    if any(texts) and not all(texts):
        raise ValueError("prompts: expected texts or token ids, not both in one list")
    if texts and texts[0]:
        return False, True
    return len(prompts) > 0 and all(np.ndim(p) == 0 for p in prompts), False


def _rows(
    prompts: Any, single: bool, texts: bool, tokenizer: Tokenizer | None, config: Any, max_new_tokens: int
) -> list[list[int]]:
    prompts = [prompts] if single else list(prompts)
    limit = getattr(config, "max_position_embeddings", None)
    rows = []
    for i, prompt in enumerate(prompts):
        if texts:
            ids = tokenizer.encode(prompt)
        else:
            array = np.asarray(prompt)
            if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
                raise ValueError(f"prompts: item {i} is {array.dtype} of shape {array.shape}; expected token ids")
            ids = array.tolist()
        if not ids:
            raise ValueError(f"prompts: item {i} is empty; give at least one token to go on from")
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            raise ValueError(f"prompts: item {i} has ids from {min(ids)} to {max(ids)}; the model knows 0 to "
                             f"{config.vocab_size - 1}")  # fmt: skip
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"prompts: item {i} has {len(ids)} tokens, with max_new_tokens={max_new_tokens} more than the {limit} "
                "positions of this model; shorten it or ask for fewer"
            )
        rows.append(ids)
    return rows


def _images(model: nnx.Module, rows: list[list[int]], pixel_values: Any) -> list[np.ndarray] | None:
    """The images of each prompt."""
    if not hasattr(model, "count_images"):
        if pixel_values is not None:
            raise ValueError(f"pixel_values: {type(model).__name__} reads no images")
        return None
    if pixel_values is None:
        token = model.config.image_token_index
        i = next((i for i, row in enumerate(rows) if token in row), None)
        if i is not None:
            raise ValueError(f"pixel_values: prompts item {i} has image tokens ({token}); give the images")
        return None
    pixel_values = np.asarray(pixel_values)
    if pixel_values.ndim != 4 or pixel_values.dtype.kind != "f":
        raise ValueError(
            f"pixel_values: expected floating-point numbers (images, channels, height, width), got "
            f"{pixel_values.dtype} of shape {pixel_values.shape}"
        )
    counts = model.count_images(rows, pixel_values)
    return np.split(pixel_values, np.cumsum(counts)[:-1])


def _padded_images(images: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The images of several prompts as one array of a size that is compiled for, and which of it are real."""
    real = np.concatenate(images)
    size = next((n for n in BATCHES if n >= len(real)), -(-len(real) // 64) * 64)
    padding = np.zeros((size - len(real), *real.shape[1:]), real.dtype)
    return {"pixel_values": np.concatenate([real, padding]), "image_mask": (np.arange(size) < len(real)).astype(int)}


def _tokenizer(model: nnx.Module) -> Tokenizer:
    from jaxformers.data.tokenizers import load_tokenizer

    if getattr(model, "source", None) is None:
        raise ValueError("tokenizer: needed for texts, since the model does not come from a directory that holds one")
    return load_tokenizer(model.source)


def _end_tokens(model: nnx.Module, tokenizer: Tokenizer | None, given: Any) -> tuple[int, ...]:
    """The ids at which a row stops: as given, else by generation_config.json, config.json, the tokenizer."""
    found = given
    if found is None and model.source is not None and (file := Path(model.source) / "generation_config.json").is_file():
        from jaxformers.safetensors_io import read_json

        found = read_json(file).get("eos_token_id")
    if found is None:
        hf = json.loads(model.config.hf)
        found = hf.get("eos_token_id", (hf.get("text_config") or {}).get("eos_token_id"))
    if found is None and tokenizer is not None:
        found = tokenizer.eos_id
    ends = () if found is None else tuple(np.atleast_1d(np.asarray(found)).tolist())
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ends):
        raise ValueError(f"eos_token_id={found!r}: expected a token id or a list of them")
    return ends


def _cut(ids: list[int], ends: tuple[int, ...], max_new_tokens: int) -> list[int]:
    """Up to and with the first end token."""
    ids = ids[:max_new_tokens]
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: stop + 1]


def _continuation(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    """The text of ``new`` as it goes on from the prompt: some tokenizers drop a leading space when decoded alone."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *new])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new)
