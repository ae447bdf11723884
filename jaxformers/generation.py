"""Text from a decoder, or from an encoder–decoder: `generate`, greedy, sampled or by beam search.

A decoder's prompts are padded on the left to a bucket of lengths, an encoder's inputs on the right; they are run once
(prefill) and then continued token by token with a key/value cache of static shape (:mod:`jaxformers.decoding`, and
:mod:`jaxformers.beam` for beams). What is compiled depends on the structure of the model and on the bucket (batch,
prompt length, new tokens; the number of beams) alone. Whatever else changes is an argument and compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxformers import beam, decoding, surgery
from jaxformers.beam import Search
from jaxformers.data.padding import bucket, length_buckets, pad_rows
from jaxformers.decoding import Prompts, Sampler, State, Stops
from jaxformers.models.config import positions_of
from jaxformers.prompts import (
    Endings,
    Request,
    batch_bucket,
    continuation,
    cut,
    ending_arrays,
    endings,
    form,
    request,
    text_of,
    tokenizer_of,
)

if TYPE_CHECKING:
    from jaxformers.data.tokenizers import Tokenizer

HEADS = ("causal_lm", "seq2seq_lm")
EARLY = {False: 0, True: beam.WHEN_FULL, "never": beam.NEVER}
Stream = Callable[[int, dict[int, int]], Any]


def generate(
    model: nnx.Module,
    prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | None = None,
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    num_beams: int = 1,
    length_penalty: float | None = None,
    early_stopping: bool | str | None = None,
    num_return_sequences: int | None = None,
    return_scores: bool = False,
    stop_sequences: str | Sequence[str | Sequence[int]] = (),
    stream: Stream | None = None,
    key: jax.Array | None = None,
    tokenizer: Tokenizer | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    decoder_prompt: Sequence[int] | None = None,
    batch_size: int = 64,
    pixel_values: Float[Array, "images channels height width"] | None = None,
) -> Any:
    """Continue each prompt by at most ``max_new_tokens`` tokens; with an encoder–decoder, answer it.

    ``prompts``: a text or several, or the token ids of one or several. Returns what was generated, without the prompt,
    in the same form: str for a str, a list of str for several, and a list of ids, or a list of such, for ids. Ids end
    with the end token or stop sequence where one was reached; texts leave special tokens out and end before a stop
    sequence.

    Without ``temperature``, or with 0, the most likely token is taken (greedy). Otherwise a token is drawn from
    softmax(logits / temperature) with ``key``, after restriction to the ``top_k`` most likely tokens (ties with the
    last of them stay), then to the smallest set of most likely tokens whose probability reaches ``top_p``
    (arXiv 1904.09751), then to those at least ``min_p`` times as likely as the most likely one (arXiv 2407.01082). Row
    i draws with its own key: its text does not depend on the batch's size or padding. ``repetition_penalty`` divides
    the positive scores, and multiplies the negative ones, of tokens that the row has had, a decoder's prompt included
    (arXiv 1909.05858); above 1 it discourages them.

    ``num_beams`` above 1 searches for the most likely text instead, see :mod:`jaxformers.beam`. A hypothesis of n
    tokens scores Σ log p / n^``length_penalty`` (1 by default; more favours longer ones). ``early_stopping``: True
    stops a row as soon as it has as many ended hypotheses as beams, False (by default) when its best beam would not
    beat them if it ended now, ``"never"`` when no continuation could. ``num_return_sequences`` gives a list of so many
    for each prompt, best first, instead of the best alone; ``return_scores`` also the scores, ``(texts, scores)`` in
    the same form.

    ``eos_token_id``: the token, or tokens, at which a row stops; by default those of ``generation_config.json``, else
    of ``config.json``, else the tokenizer's. ``()`` never stops. ``stop_sequences``: more that ends a row, each a list
    of token ids or a text. ``decoder_prompt``: the ids that an encoder–decoder's decoder starts from, by default the
    checkpoint's ``decoder_start_token_id``. Nothing else that ``generation_config.json`` may say is applied.
    ``tokenizer`` defaults to the one in the directory the model came from, and is not needed for ids.

    ``stream(step, {row: token})`` is called after each step, in order, with the new token of each row (numbered as the
    prompts are) that had not stopped. Streaming, and stop sequences that are texts, hand control back to Python at each
    step: nothing more is compiled, but each step is dispatched and waited for, which costs a CPU milliseconds, and an
    accelerator a round trip. Token ids as stop sequences cost nothing.

    ``batch_size`` prompts run at a time (times beams: ``batch_size`` sequences), the longest first; ``stream`` then
    begins again at step 0. ``pixel_values``: the images of all prompts, for a model that reads images: in the order of
    their image tokens (LLaVA: one for each image, or already as many as it needs), or instead of prompts, one for each
    answer (vision encoder–decoders; the answers are texts where a ``tokenizer`` is given).

    Raises ValueError: a model without a language model's head; images that do not match the prompts' image tokens; an
    empty prompt, ids outside the vocabulary, or a prompt that with ``max_new_tokens`` exceeds the model's positions;
    settings out of range or without effect; sampling without a key; no tokenizer for a text.
    """
    if getattr(model, "head_name", None) not in HEADS:
        raise ValueError(
            f"model: head {getattr(model, 'head_name', None)!r} predicts no next token; load it with head='causal_lm' "
            "or, for an encoder–decoder, 'seq2seq_lm'"
        )
    sampler = _sampler(model.config.vocab_size, temperature, top_k, top_p, min_p, repetition_penalty, key)
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size), ("num_beams", num_beams)):
        _whole(name, value)
    num_beams = int(num_beams)
    search = _search(num_beams, length_penalty, early_stopping, sampler, max_new_tokens)
    returned = _returned(num_beams, num_return_sequences, return_scores)
    single, texts = (np.ndim(pixel_values) == 3, tokenizer is not None) if prompts is None else form(prompts)
    if texts and tokenizer is None:
        tokenizer = tokenizer_of(model)
    stops = endings(model, tokenizer, eos_token_id, stop_sequences)
    if search is not None and (stream is not None or stops.texts):
        raise ValueError("num_beams: beams change until the end, so no stream, and no stop_sequences that are texts")
    if prompts is None and single:
        pixel_values = np.asarray(pixel_values)[None]
    listed = None if prompts is None else [prompts] if single else list(prompts)
    asked = request(model, listed, tokenizer, pixel_values, decoder_prompt, max_new_tokens)
    program = _Program.of(model)
    before = lambda i: [] if hasattr(model, "encode") else asked.rows[i]
    write = (lambda i, ids: text_of(tokenizer, before(i), ids, stops)) if texts else (lambda i, ids: ids)

    found: list[Any] = [None] * len(asked.rows)
    scores: list[Any] = [None] * len(asked.rows)
    order = sorted(range(len(asked.rows)), key=lambda i: -asked.lengths[i])
    at_once = max(1, batch_size // num_beams)
    for start in range(0, len(order), at_once):
        chunk = order[start : start + at_once]
        if search is not None:
            for i, hypotheses in zip(chunk, program.search(asked, chunk, search, num_beams, stops), strict=True):
                best = hypotheses[: returned or 1]
                found[i], scores[i] = [write(i, ids) for ids, _ in best], [score for _, score in best]
                if returned is None:
                    found[i], scores[i] = found[i][0], scores[i][0]
            continue
        watch = _watch(stream, chunk, stops, tokenizer, before) if stream is not None or stops.texts else None
        for i, ids in zip(chunk, program.sample(asked, chunk, max_new_tokens, sampler, stops, watch), strict=True):
            found[i] = write(i, ids)
    if single:
        found, scores = found[0], scores[0]
    return (found, scores) if return_scores else found


class _Program(NamedTuple):
    graph: Any  # hashable structure: the key under which jit keeps what it compiled
    params: dict[str, Any]
    positions: int | None

    @classmethod
    def of(cls, model: nnx.Module) -> _Program:
        model = surgery.copy(model)
        model.source = None  # where weights came from makes no difference to the program
        graph, state = nnx.split(model)
        return cls(graph, nnx.to_pure_dict(state), positions_of(model.config))

    def sample(
        self,
        asked: Request,
        chunk: list[int],
        max_new_tokens: int,
        sampler: Sampler,
        stops: Endings,
        watch: Callable[[int, dict[int, int]], list[int]] | None,
    ) -> list[list[int]]:
        """The new ids of the prompts numbered ``chunk``, greedy or drawn."""
        prompts, done, new_slots = self._arrays(asked, chunk, max_new_tokens)
        numbers = np.asarray([*chunk, *[0] * (len(done) - len(chunk))], np.int32)
        ending = Stops(*ending_arrays(stops))
        state = decoding.start(self.graph, self.params, prompts, numbers, done, sampler, ending, new_slots=new_slots)
        further = lambda state, until: decoding.go_on(
            self.graph, self.params, state, np.int32(until), numbers, sampler, ending
        )
        if watch is not None:
            return _step_by_step(state, further, len(chunk), max_new_tokens, watch)
        tokens = np.asarray(further(state, max_new_tokens).tokens)
        return [cut(row[:max_new_tokens].tolist(), stops) for row in tokens[: len(chunk)]]

    def search(
        self, asked: Request, chunk: list[int], search: Search, num_beams: int, stops: Endings
    ) -> list[list[tuple[list[int], float]]]:
        """``(ids, score)`` of each hypothesis, best first, for the prompts numbered ``chunk``."""
        prompts, done, new_slots = self._arrays(asked, chunk, int(search.max_new_tokens))
        ending = Stops(*ending_arrays(stops))
        found = beam.search(
            self.graph, self.params, prompts, done, search, ending, num_beams=num_beams, new_slots=new_slots
        )
        tokens, lengths, scores = (np.asarray(a)[: len(chunk)] for a in found)
        return [
            [(ids[:n].tolist(), float(score)) for ids, n, score in zip(*row, strict=True)]
            for row in zip(tokens, lengths, scores, strict=True)
        ]

    def _arrays(self, asked: Request, chunk: list[int], max_new_tokens: int) -> tuple[Prompts, np.ndarray, int]:
        """The prompts filled up to their bucket, which rows only fill it up, and the bucket of new tokens."""
        size = batch_bucket(len(chunk))
        rows = [asked.rows[i] for i in chunk]
        # of the positions, max_new_tokens are spoken for; padding takes slots of the cache, never more than positions
        room = None if self.positions is None else self.positions - max_new_tokens
        length = bucket(rows, length_buckets(room or 1 << 30)) if asked.padded else len(rows[0])
        new_slots = next(n for n in length_buckets(1 << 30) if n >= max_new_tokens)
        new_slots = new_slots if self.positions is None else min(new_slots, self.positions - length)
        filled = [*rows, *[rows[0] if not asked.padded else [0]] * (size - len(rows))]
        ids = pad_rows(filled, length, 0, "left")
        mask = pad_rows([[1] * len(row) for row in filled], length, 0, "left") if asked.padded else None
        return Prompts(ids, mask, asked.first(chunk, size)), np.arange(size) >= len(rows), new_slots


# ---- one step at a time ----------------------------------------------------------------------------------------------


def _step_by_step(
    state: State,
    further: Callable[[State, int], State],
    count: int,
    max_new_tokens: int,
    watch: Callable[[int, dict[int, int]], list[int]],
) -> list[list[int]]:
    """Like the compiled loop, but ``watch(step, {row: token})`` sees each step and says which rows are to stop."""
    found: list[list[int]] = [[] for _ in range(count)]
    alive = list(range(count))
    for step in range(max_new_tokens):
        state = further(state, step + 1)  # the first token is there already
        token, done = np.asarray(state.token), np.array(state.done)
        new = {i: int(token[i]) for i in alive}
        for i, one in new.items():
            found[i].append(one)
        stopped = watch(step, new)
        if stopped:
            done[stopped] = True
            state = state._replace(done=jnp.asarray(done))
        alive = [i for i in alive if not done[i]]
        if not alive:
            break
    return found


def _watch(
    stream: Stream | None,
    chunk: list[int],
    stops: Endings,
    tokenizer: Tokenizer | None,
    before: Callable[[int], list[int]],
) -> Callable[[int, dict[int, int]], list[int]]:
    """What looks at each step: hands the tokens to ``stream``, and finds the rows whose text has come to a stop."""
    new: dict[int, list[int]] = {i: [] for i in range(len(chunk))}

    def watch(step: int, tokens: dict[int, int]) -> list[int]:
        if stream is not None:
            stream(step, {chunk[i]: token for i, token in tokens.items()})
        stopped = []
        for i, token in tokens.items() if stops.texts else ():
            new[i].append(token)
            text = continuation(tokenizer, before(chunk[i]), new[i])
            if any(stop in text for stop in stops.texts):
                stopped.append(i)
        return stopped

    return watch


# ---- settings --------------------------------------------------------------------------------------------------------


def _sampler(
    vocab: int,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any = None,
    repetition_penalty: Any = None,
    key: jax.Array | None = None,
) -> Sampler:
    if temperature is None and any(given is not None for given in (top_k, top_p, min_p, key)):
        raise ValueError("temperature: top_k, top_p, min_p and key act on sampling; give a temperature, as 1.0")
    temperature = 0.0 if temperature is None else temperature
    if not _number(temperature) or not 0 <= temperature < np.inf:
        raise ValueError(f"temperature={temperature!r}: expected a number of 0 or more; 0 takes the most likely token")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int | np.integer) or top_k < 1):
        raise ValueError(f"top_k={top_k!r}: expected a whole number of 1 or more, or None for all tokens")
    if top_p is not None and (not _number(top_p) or not 0 < top_p <= 1):
        raise ValueError(f"top_p={top_p!r}: expected a number above 0 and up to 1, or None for all tokens")
    if min_p is not None and (not _number(min_p) or not 0 <= min_p <= 1):
        raise ValueError(f"min_p={min_p!r}: expected a number from 0 to 1, or None for all tokens")
    penalty = 1.0 if repetition_penalty is None else repetition_penalty
    if not _number(penalty) or not 0 < penalty < np.inf:
        raise ValueError(f"repetition_penalty={penalty!r}: expected a number above 0; 1 is none")
    if temperature > 0 and key is None:
        raise ValueError("key: sampling needs a PRNG key, as in key=jax.random.key(0)")
    key = jax.random.key(0) if key is None else key
    if not jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(jnp.asarray(key))
    k = vocab if top_k is None else min(int(top_k), vocab)
    shares = (np.float32(1 if top_p is None else top_p), np.float32(0 if min_p is None else min_p))
    return Sampler(np.float32(temperature), np.int32(k), *shares, np.float32(penalty), key)


def _search(
    num_beams: int, length_penalty: Any, early_stopping: Any, sampler: Sampler, max_new_tokens: int
) -> Search | None:
    """How beams are judged, or None for one token after the other."""
    if num_beams == 1:
        if length_penalty is not None or early_stopping is not None:
            raise ValueError("num_beams: length_penalty and early_stopping act on beam search; give 2 beams or more")
        return None
    if sampler.temperature > 0:
        raise ValueError("num_beams: beam search takes the most likely texts; give no temperature, or one beam")
    length_penalty = 1.0 if length_penalty is None else length_penalty
    if not _number(length_penalty) or not np.isfinite(length_penalty):
        raise ValueError(f"length_penalty={length_penalty!r}: expected a number; above 0 favours longer texts")
    early_stopping = False if early_stopping is None else early_stopping
    if not isinstance(early_stopping, bool | str) or early_stopping not in EARLY:
        raise ValueError(f"early_stopping={early_stopping!r}: expected True, False or 'never'")
    early = np.int32(EARLY[early_stopping])
    return Search(np.float32(length_penalty), early, sampler.repetition_penalty, np.int32(max_new_tokens))


def _returned(num_beams: int, num_return_sequences: Any, return_scores: bool) -> int | None:
    if num_beams == 1 and return_scores:
        raise ValueError("return_scores: beam search scores its texts; give 2 beams or more")
    if num_return_sequences is not None:
        _whole("num_return_sequences", num_return_sequences)
        if num_beams == 1 or num_return_sequences > num_beams:
            raise ValueError(f"num_return_sequences={num_return_sequences}: {num_beams} beams have no more than that; "
                             "to sample several texts, repeat the prompt")  # fmt: skip
    return num_return_sequences


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number of 1 or more")


def _number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
