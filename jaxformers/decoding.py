"""The compiled part of generation: prefill, the loop over tokens, and how the next token is chosen.

Two programs a (batch, prompt length, new tokens) bucket: :func:`start` runs the prompts and chooses the first token;
:func:`go_on` chooses more of them up to a step that is an argument: all at once, or one at a time when somebody
watches. What else changes compiles nothing: the sampler's settings, keys, end tokens, stop sequences, weights.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int


class Sampler(NamedTuple):
    """How the next token is chosen: traced scalars."""

    temperature: Float[Array, ""]  # 0: the most likely token
    top_k: Int[Array, ""]  # the vocabulary's size: all
    top_p: Float[Array, ""]  # 1: all
    min_p: Float[Array, ""]  # 0: all
    repetition_penalty: Float[Array, ""]  # 1: none
    key: jax.Array


class Stops(NamedTuple):
    """What ends a row: one of the tokens ``ends`` (−1: none), or one of ``sequences``, filled with −1 on the left."""

    ends: Int[Array, "ends"]
    sequences: Int[Array, "sequences longest"]


class Prompts(NamedTuple):
    """What a batch starts from. ``ids`` (B, L): the decoder's prompts, padded on the left where ``mask`` is 0 (None: no
    padding). ``first``: what else the model reads with them; for an encoder–decoder, the encoder's inputs."""

    ids: Int[Array, "batch length"]
    mask: Int[Array, "batch length"] | None
    first: dict[str, Any]


class State(NamedTuple):
    """Between two steps: ``step`` tokens are chosen. ``seen``: which tokens a row has had, its prompt included."""

    step: Int[Array, ""]
    token: Int[Array, "batch"]
    position: Int[Array, "batch"]
    done: Bool[Array, "batch"]
    tokens: Int[Array, "batch new"]
    seen: Bool[Array, "batch vocab"]
    cache: Any


# ---- the model -------------------------------------------------------------------------------------------------------


def prefill(model: nnx.Module, prompts: Prompts, slots: int) -> tuple[Float[Array, "batch vocab"], jax.Array, Any]:
    """``(logits of the next token (B, V), its position (B,), the cache)`` after the prompts."""
    batch, length = prompts.ids.shape
    if hasattr(model, "encode"):
        cache = model.empty_cache(batch, slots, model.encode(**prompts.first))
        out = model(decoder_input_ids=prompts.ids, cache=cache, logits_to_keep=1)
        return out.logits[:, -1].astype(jnp.float32), jnp.full(batch, length), out.cache
    first_position = getattr(model.config, "first_position", 0)  # RoBERTa's rows before it serve padding
    positions = jnp.maximum(jnp.cumsum(prompts.mask, axis=1) - 1, 0) + first_position
    out = model(
        prompts.ids,
        prompts.mask,
        position_ids=positions,
        cache=model.empty_cache(batch, slots),
        logits_to_keep=1,
        **prompts.first,
    )
    return out.logits[:, -1].astype(jnp.float32), positions[:, -1] + 1, out.cache


def forward(
    model: nnx.Module, token: Int[Array, "batch"], position: Int[Array, "batch"], cache: Any
) -> tuple[Float[Array, "batch vocab"], Any]:
    """The logits after one more token a row, and the cache with it."""
    if hasattr(model, "encode"):
        out = model(decoder_input_ids=token[:, None], cache=cache, logits_to_keep=1)
    else:
        out = model(token[:, None], None, position_ids=position[:, None], cache=cache, logits_to_keep=1)
    return out.logits[:, -1].astype(jnp.float32), out.cache


def seen_in(prompts: Prompts, vocab: int) -> Bool[Array, "batch vocab"]:
    """Which tokens each prompt has."""
    ids = prompts.ids if prompts.mask is None else jnp.where(prompts.mask == 1, prompts.ids, vocab)
    rows = jnp.arange(ids.shape[0])[:, None]
    return jnp.zeros((ids.shape[0], vocab), bool).at[rows, ids].set(True, mode="drop")


# ---- the loop --------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0, static_argnames="new_slots")
def start(
    graph: Any,
    params: dict[str, Any],
    prompts: Prompts,
    numbers: Int[Array, "batch"],
    done: Bool[Array, "batch"],
    sampler: Sampler,
    stops: Stops,
    *,
    new_slots: int,
) -> State:
    """Run the prompts and choose each row's first token. ``numbers``: the rows' own, for their keys; ``done``: rows
    that only fill up the batch."""
    model = nnx.merge(graph, params)
    batch, length = prompts.ids.shape
    logits, position, cache = prefill(model, prompts, length + new_slots)
    seen = seen_in(prompts, logits.shape[-1])
    state = State(jnp.int32(0), None, position - 1, done, jnp.zeros((batch, new_slots), jnp.int32), seen, cache)
    return _choose(state, logits, numbers, sampler, stops)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def go_on(
    graph: Any,
    params: dict[str, Any],
    state: State,
    until: Int[Array, ""],
    numbers: Int[Array, "batch"],
    sampler: Sampler,
    stops: Stops,
) -> State:
    """Choose tokens until there are ``until`` of them, or every row is done."""
    model = nnx.merge(graph, params)

    def unfinished(state: State) -> jax.Array:
        return (state.step < until) & ~state.done.all()

    def advance(state: State) -> State:
        logits, cache = forward(model, state.token, state.position, state.cache)
        return _choose(state._replace(cache=cache), logits, numbers, sampler, stops)

    return jax.lax.while_loop(unfinished, advance, state)


def _choose(state: State, logits: jax.Array, numbers: jax.Array, sampler: Sampler, stops: Stops) -> State:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(sampler.key, numbers)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
    logits = penalised(logits, state.seen, sampler.repetition_penalty)
    token = next_token(logits, sampler._replace(key=keys))
    tokens = state.tokens.at[:, state.step].set(token)
    ended = jnp.isin(token, stops.ends) | completes(recent(tokens, state.step + 1, stops.sequences.shape[1]), stops)
    return State(
        state.step + 1,
        token,
        state.position + 1,
        state.done | ended,
        tokens,
        state.seen.at[jnp.arange(len(token)), token].set(True),
        state.cache,
    )


def recent(tokens: Int[Array, "*batch new"], step: Int[Array, ""], width: int) -> Int[Array, "*batch width"]:
    """The last ``width`` of the first ``step`` tokens; −2 where there are not as many."""
    at = step - width + jnp.arange(width)
    return jnp.where(at >= 0, jnp.take(tokens, jnp.maximum(at, 0), axis=-1), -2)


def completes(window: Int[Array, "*batch longest"], stops: Stops) -> Bool[Array, "*batch"]:
    """Does the window end with one of the stop sequences?"""
    same = (stops.sequences == -1) | (window[..., None, :] == stops.sequences)
    return (same.all(-1) & (stops.sequences[:, -1] != -1)).any(-1)


# ---- the next token --------------------------------------------------------------------------------------------------


def penalised(
    scores: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], penalty: Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """Scores of tokens that were seen, divided by ``penalty`` where positive and multiplied by it where negative
    (arXiv 1909.05858, section 4.1, as amended by Hugging Face for negative scores)."""

    def apply(scores: jax.Array) -> jax.Array:
        return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)

    return jax.lax.cond(penalty != 1, apply, lambda scores: scores, scores)


def next_token(logits: Float[Array, "batch vocab"], sampler: Sampler) -> Int[Array, "batch"]:
    """One token a row; ``sampler.key`` holds one key a row. Sorting happens only when top-k or top-p ask for it."""
    vocab = logits.shape[-1]

    def greedy(logits: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(logits: jax.Array) -> jax.Array:
        logits = logits / sampler.temperature
        all_of_them = (sampler.top_k >= vocab) & (sampler.top_p >= 1)
        logits = jax.lax.cond(all_of_them, lambda x: x, lambda x: restrict(x, sampler.top_k, sampler.top_p), logits)
        logits = likely(logits, sampler.min_p)
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


def likely(logits: Float[Array, "batch vocab"], min_p: Float[Array, ""]) -> Float[Array, "batch vocab"]:
    """-inf for tokens less likely than ``min_p`` times the most likely one (arXiv 2407.01082, equation 1)."""
    least = logits.max(axis=-1, keepdims=True) + jnp.log(min_p)
    return jnp.where(logits >= least, logits, -jnp.inf)
