"""What users give to `generate`, as arrays and as what ends a text; and token ids as text again."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxformers.data.padding import bucket, length_buckets, pad_rows
from jaxformers.models.config import positions_of

if TYPE_CHECKING:
    from jaxformers.data.tokenizers import Tokenizer

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # rows that are compiled for; more in steps of 64


class Request(NamedTuple):
    """``rows``: the decoder's prompts. ``lengths``: what each costs, to batch likes with likes. ``first(chunk, size)``:
    what the model reads with the prompts numbered ``chunk``, filled up to ``size`` rows. ``padded``: may they differ in
    length (decoders alone)?"""

    rows: list[list[int]]
    lengths: list[int]
    first: Callable[[list[int], int], dict[str, np.ndarray]]
    padded: bool


class Endings(NamedTuple):
    """What ends a row, in the user's words: tokens, sequences of tokens, and texts."""

    tokens: tuple[int, ...]
    sequences: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]


def batch_bucket(rows: int) -> int:
    """The number of rows that is compiled for."""
    return next((n for n in BATCHES if n >= rows), -(-rows // 64) * 64)


def form(prompts: Any) -> tuple[bool, bool]:
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


def request(
    model: nnx.Module,
    prompts: list[Any] | None,
    tokenizer: Tokenizer | None,
    pixel_values: Any,
    decoder_prompt: Sequence[int] | None,
    max_new_tokens: int,
) -> Request:
    """Check and convert ``prompts`` (a list, of texts where ``tokenizer`` is to encode them) for ``model``."""
    positions = positions_of(model.config)
    reads = inspect.signature(model.encode).parameters if hasattr(model, "encode") else None
    if reads is None:
        if decoder_prompt is not None:
            raise ValueError(f"decoder_prompt: {type(model).__name__} has no encoder; begin the prompts with it")
        if prompts is None:
            raise ValueError("prompts: give texts or token ids")
        if pixel_values is not None and hasattr(model, "expand_images"):
            rows = _rows(prompts, tokenizer, model.config.vocab_size, None, 0)
            prompts = model.expand_images(rows, _checked_images(pixel_values))
        rows = _rows(prompts, tokenizer, model.config.vocab_size, positions, max_new_tokens)
        images = _images_of(model, rows, pixel_values)
        first = lambda chunk, size: {} if images is None else _padded_images([images[i] for i in chunk])
        return Request(rows, [len(row) for row in rows], first, True)
    begin = _decoder_prompt(model, decoder_prompt, positions, max_new_tokens)
    if "pixel_values" in reads:
        if prompts is not None:
            raise ValueError(f"prompts: the encoder of {type(model).__name__} reads pixel_values alone")
        images = _checked_images(pixel_values)
        first = lambda chunk, size: {"pixel_values": images[(chunk * size)[:size]]}
        return Request([begin] * len(images), [1] * len(images), first, False)
    if pixel_values is not None:
        raise ValueError(f"pixel_values: {type(model).__name__} reads no images")
    if prompts is None:
        raise ValueError("prompts: give texts or token ids")
    rows = _rows(prompts, tokenizer, model.config.vocab_size, positions, 0)

    def encoder_inputs(chunk: list[int], size: int) -> dict[str, np.ndarray]:
        filled = [*(rows[i] for i in chunk), *[[0]] * (size - len(chunk))]
        length = bucket(filled, length_buckets(positions or 1 << 30))
        mask = pad_rows([[1] * len(row) for row in filled], length, 0, "right")
        return {"input_ids": pad_rows(filled, length, 0, "right"), "attention_mask": mask}

    return Request([begin] * len(rows), [len(row) for row in rows], encoder_inputs, False)


def _rows(
    prompts: list[Any], tokenizer: Tokenizer | None, vocab: int, limit: int | None, max_new_tokens: int
) -> list[list[int]]:
    rows = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt)
        else:
            array = np.asarray(prompt)
            if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
                raise ValueError(f"prompts: item {i} is {array.dtype} of shape {array.shape}; expected token ids")
            ids = array.tolist()
        if not ids:
            raise ValueError(f"prompts: item {i} is empty; give at least one token to go on from")
        _check_ids(f"prompts: item {i}", ids, vocab)
        if limit is not None and len(ids) + max_new_tokens > limit:
            new = f", with max_new_tokens={max_new_tokens} more than the" if max_new_tokens else "; there are"
            raise ValueError(
                f"prompts: item {i} has {len(ids)} tokens{new} {limit} positions of this model; shorten it or ask for "
                "fewer"
            )
        rows.append(ids)
    return rows


def _check_ids(what: str, ids: list[int], vocab: int) -> None:
    if min(ids) < 0 or max(ids) >= vocab:
        raise ValueError(f"{what} has ids from {min(ids)} to {max(ids)}; the model knows 0 to {vocab - 1}")


def _decoder_prompt(model: nnx.Module, given: Any, positions: int | None, max_new_tokens: int) -> list[int]:
    """The ids that an encoder–decoder's decoder starts from."""
    if given is None:
        found = _said(model, "decoder_start_token_id")
        found = getattr(model.config, "start_id", None) if found is None else found
        if found is None:
            raise ValueError(
                "decoder_prompt: the checkpoint names no decoder_start_token_id; give the ids to start from"
            )
        given = [found]
    array = np.asarray(given)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise ValueError(f"decoder_prompt={given!r}: expected a list of token ids")
    ids = array.tolist()
    _check_ids("decoder_prompt", ids, model.config.vocab_size)
    if positions is not None and len(ids) + max_new_tokens > positions:
        raise ValueError(
            f"decoder_prompt has {len(ids)} tokens, with max_new_tokens={max_new_tokens} more than the {positions} "
            "positions of this model; ask for fewer"
        )
    return ids


# ---- images ----------------------------------------------------------------------------------------------------------


def _checked_images(pixel_values: Any) -> np.ndarray:
    if pixel_values is None:
        raise ValueError("pixel_values: this model's encoder reads images; give them")
    pixel_values = np.asarray(pixel_values)
    if pixel_values.ndim != 4 or pixel_values.dtype.kind != "f":
        raise ValueError(
            f"pixel_values: expected floating-point numbers (images, channels, height, width), got "
            f"{pixel_values.dtype} of shape {pixel_values.shape}"
        )
    return pixel_values


def _images_of(model: nnx.Module, rows: list[list[int]], pixel_values: Any) -> list[np.ndarray] | None:
    """The images of each prompt, for a decoder that reads them as tokens."""
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
    pixel_values = _checked_images(pixel_values)
    counts = model.count_images(rows, pixel_values)
    return np.split(pixel_values, np.cumsum(counts)[:-1])


def _padded_images(images: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The images of several prompts as one array of a size that is compiled for, and which of it are real."""
    real = np.concatenate(images)
    size = batch_bucket(len(real))
    padding = np.zeros((size - len(real), *real.shape[1:]), real.dtype)
    return {"pixel_values": np.concatenate([real, padding]), "image_mask": (np.arange(size) < len(real)).astype(int)}


# ---- what ends a text ------------------------------------------------------------------------------------------------


def endings(model: nnx.Module, tokenizer: Tokenizer | None, eos_token_id: Any, stop_sequences: Any) -> Endings:
    """The end tokens (as given, else by generation_config.json, config.json, the tokenizer) and the stop sequences."""
    found = _said(model, "eos_token_id") if eos_token_id is None else eos_token_id
    if found is None:
        found = getattr(model.config, "eos_token_id", None)
    if found is None and tokenizer is not None:
        found = tokenizer.eos_id
    ends = () if found is None else tuple(np.atleast_1d(np.asarray(found)).tolist())
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ends):
        raise ValueError(f"eos_token_id={found!r}: expected a token id or a list of them")
    given = [stop_sequences] if isinstance(stop_sequences, str) else list(stop_sequences)
    texts, sequences = [], []
    for i, stop in enumerate(given):
        if isinstance(stop, str) and stop:
            texts.append(stop)
            continue
        array = np.asarray(stop)
        if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
            raise ValueError(f"stop_sequences: item {i} is {stop!r}; expected a text or token ids, not empty")
        _check_ids(f"stop_sequences: item {i}", array.tolist(), model.config.vocab_size)
        sequences.append(tuple(array.tolist()))
    if texts and tokenizer is None:
        raise ValueError("tokenizer: needed to look for stop_sequences that are texts")
    return Endings(ends, tuple(sequences), tuple(texts))


def ending_arrays(endings: Endings) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and sequences as arrays of few shapes: powers of two from 4 tokens, and 4 sequences of 8, on."""
    ends = np.full(_power(len(endings.tokens), 4), -1, np.int32)
    ends[: len(endings.tokens)] = endings.tokens
    longest = _power(max(map(len, endings.sequences), default=0), 8)
    sequences = np.full((_power(len(endings.sequences), 4), longest), -1, np.int32)
    for row, sequence in zip(sequences, endings.sequences, strict=False):
        row[longest - len(sequence) :] = sequence
    return ends, sequences


def _power(count: int, least: int) -> int:
    return max(least, 1 << max(count - 1, 0).bit_length())


def cut(ids: list[int], endings: Endings) -> list[int]:
    """Up to and with the first end token, or the first stop sequence."""
    for i, token in enumerate(ids):
        if token in endings.tokens or _stopped(ids[: i + 1], endings):
            return ids[: i + 1]
    return ids


def _stopped(ids: list[int], endings: Endings) -> int:
    """The length of the longest stop sequence that ``ids`` end with, or 0."""
    return max((len(s) for s in endings.sequences if tuple(ids[-len(s) :]) == s), default=0)


def _said(model: nnx.Module, name: str) -> Any:
    """What the checkpoint's generation_config.json, or else config.json, says."""
    found = None
    if model.source is not None and (file := Path(model.source) / "generation_config.json").is_file():
        from jaxformers.safetensors_io import read_json

        found = read_json(file).get(name)
    if found is None:
        hf = json.loads(model.config.hf)
        found = hf.get(name)
        for part in ("text_config", "decoder"):  # a model of several parts
            found = (hf.get(part) or {}).get(name) if found is None else found
    return found


# ---- text ------------------------------------------------------------------------------------------------------------


def tokenizer_of(model: nnx.Module) -> Tokenizer:
    from jaxformers.data.tokenizers import load_tokenizer

    if getattr(model, "source", None) is None:
        raise ValueError("tokenizer: needed for texts, since the model does not come from a directory that holds one")
    return load_tokenizer(model.source)


def text_of(tokenizer: Tokenizer, before: list[int], new: list[int], endings: Endings) -> str:
    """The text of ``new`` as it goes on from the prompt ``before``, up to what stopped it."""
    text = continuation(tokenizer, before, new[: len(new) - _stopped(new, endings)])
    found = [text.find(stop) for stop in endings.texts if stop in text]
    return text[: min(found)] if found else text


def continuation(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    """The text of ``new`` as it goes on from the prompt: some tokenizers drop a leading space when decoded alone."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *new])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new)


def printing(
    model: nnx.Module, prompt: str, stops: Sequence[str]
) -> tuple[list[str], Callable[[int, dict[int, int]], None]]:
    """``(shown, stream)``: a function for `generate` to stream to that prints ``prompt`` and then its text as it comes,
    and the pieces that it has printed so far. What may yet be taken back, as the beginning of a stop or half a
    character, waits."""
    tokenizer = tokenizer_of(model)
    before = tokenizer.encode(prompt) if prompt else []
    held = max(map(len, stops), default=0)
    shown, ids = [prompt], []

    def stream(step: int, tokens: dict[int, int]) -> None:
        ids.extend(tokens.values())
        text = continuation(tokenizer, before, ids).rstrip("\ufffd")
        more = text[len("".join(shown[1:])) : max(len(text) - held, 0)]
        shown.append(more)
        print(more, end="", flush=True)

    print(prompt, end="", flush=True)
    return shown, stream
