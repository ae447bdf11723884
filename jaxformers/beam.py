"""Beam search, compiled: the best continuations of each prompt by the sum of their log-probabilities.

A hypothesis y of n tokens that has ended scores Σ log p(yᵢ | y₁ … yᵢ₋₁) / n^length_penalty. At each step the
``num_beams`` best of all one-token continuations of a row's beams are looked at: those that end are kept if they are
among the row's best ended ones so far, and the beams go on from the best that do not end. At the last step all of them
end. These, and the ways to stop early, are Hugging Face's, so that scores and texts are the same.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxformers.decoding import Prompts, Stops, forward, penalised, prefill, recent, seen_in
from jaxformers.nn.cache import reorder, repeat

NONE = -1e9  # the score of a hypothesis that is not there
WHEN_FULL, NEVER = 1, 2  # of Search.early_stopping


class Search(NamedTuple):
    """How beams are judged: traced scalars.

    ``early_stopping``: 0 stops a row when its best beam, ended now, would not beat the worst of its ended hypotheses;
    ``WHEN_FULL`` as soon as it has ``num_beams`` of them; ``NEVER`` only when no continuation whatever could beat it.
    """

    length_penalty: Float[Array, ""]
    early_stopping: Int[Array, ""]
    repetition_penalty: Float[Array, ""]
    max_new_tokens: Int[Array, ""]


class Beams(NamedTuple):
    """Between two steps: ``tokens`` and ``score`` of the beams that go on, best first; ``ended``, ``ended_score`` and
    ``length`` (0: none) of those that have ended; ``hopeful``: rows that may still improve. ``seen``, ``position`` and
    ``cache`` have one row a beam."""

    step: Int[Array, ""]
    tokens: Int[Array, "batch beams new"]
    score: Float[Array, "batch beams"]
    ended: Int[Array, "batch beams new"]
    ended_score: Float[Array, "batch beams"]
    length: Int[Array, "batch beams"]
    hopeful: Bool[Array, "batch"]
    seen: Bool[Array, "rows vocab"]
    position: Int[Array, "rows"]
    cache: Any


@partial(jax.jit, static_argnums=0, static_argnames=("num_beams", "new_slots"))
def search(
    graph: Any,
    params: dict[str, Any],
    prompts: Prompts,
    done: Bool[Array, "batch"],
    settings: Search,
    stops: Stops,
    *,
    num_beams: int,
    new_slots: int,
) -> tuple[Int[Array, "batch beams new"], Int[Array, "batch beams"], Float[Array, "batch beams"]]:
    """``(tokens, lengths, scores)`` of each row's hypotheses, best first. ``done``: rows to leave alone."""
    model = nnx.merge(graph, params)
    batch, length = prompts.ids.shape
    logits, position, cache = prefill(model, prompts, length + new_slots)  # once a prompt, not once a beam
    first = jnp.where(jnp.arange(num_beams) == 0, 0.0, NONE)  # all beams are equal: only one of them counts
    beams = Beams(
        jnp.int32(0),
        jnp.zeros((batch, num_beams, new_slots), jnp.int32),
        jnp.broadcast_to(first, (batch, num_beams)),
        jnp.zeros((batch, num_beams, new_slots), jnp.int32),
        jnp.full((batch, num_beams), NONE),
        jnp.zeros((batch, num_beams), jnp.int32),
        ~done,
        jnp.repeat(seen_in(prompts, logits.shape[-1]), num_beams, axis=0),
        jnp.repeat(position, num_beams) - 1,
        repeat(cache, num_beams),
    )
    beams = _expand(beams, jnp.repeat(logits, num_beams, axis=0), settings, stops)

    def unfinished(beams: Beams) -> jax.Array:
        return (beams.step < settings.max_new_tokens) & (beams.hopeful & ~_closed(beams, settings)).any()

    def advance(beams: Beams) -> Beams:
        last = jax.lax.dynamic_index_in_dim(beams.tokens, beams.step - 1, axis=2, keepdims=False)
        logits, cache = forward(model, last.reshape(-1), beams.position, beams.cache)
        return _expand(beams._replace(cache=cache), logits, settings, stops)

    beams = jax.lax.while_loop(unfinished, advance, beams)
    return beams.ended, beams.length, beams.ended_score


def _closed(beams: Beams, settings: Search) -> Bool[Array, "batch"]:
    """Rows that have all the hypotheses they need."""
    return (beams.length > 0).all(-1) & (settings.early_stopping == WHEN_FULL)


def _expand(beams: Beams, logits: Float[Array, "rows vocab"], settings: Search, stops: Stops) -> Beams:
    batch, n, _ = beams.tokens.shape
    vocab = logits.shape[-1]
    log_p = penalised(jax.nn.log_softmax(logits, axis=-1), beams.seen, settings.repetition_penalty)
    scores = (log_p.reshape(batch, n, vocab) + beams.score[:, :, None]).reshape(batch, n * vocab)
    count = beams.step + 1
    ending = _ending(beams, vocab, stops).reshape(batch, n * vocab) | (count >= settings.max_new_tokens)

    best_score, best = jax.lax.top_k(scores, n)
    beams = _keep_ended(beams, best, best_score, jnp.take_along_axis(ending, best, axis=1), count, settings)

    score, chosen = jax.lax.top_k(scores + jnp.where(ending, NONE, 0.0), n)
    parent, token = chosen // vocab, (chosen % vocab).astype(jnp.int32)
    tokens = jnp.take_along_axis(beams.tokens, parent[:, :, None], axis=1).at[:, :, beams.step].set(token)
    rows = (parent + n * jnp.arange(batch)[:, None]).reshape(-1)
    seen = jnp.take(beams.seen, rows, axis=0).at[jnp.arange(len(rows)), token.reshape(-1)].set(True)

    # may a row still improve? By the score that its best beam would have, did it end now (or at the last step)
    penalty, wait = settings.length_penalty, settings.early_stopping == NEVER
    when = jnp.where(wait & (penalty > 0), settings.max_new_tokens, count).astype(jnp.float32)
    worst = jnp.where(beams.length > 0, beams.ended_score.min(-1, keepdims=True), NONE)
    hopeful = beams.hopeful & (score[:, :1] / when**penalty > worst).any(-1)
    return beams._replace(
        step=count,
        tokens=tokens,
        score=score,
        hopeful=hopeful,
        seen=seen,
        position=beams.position + 1,
        cache=reorder(beams.cache, rows),
    )


def _ending(beams: Beams, vocab: int, stops: Stops) -> Bool[Array, "batch beams vocab"]:
    """Which token ends which beam: an end token any of them, the last of a stop sequence those that have the rest."""
    batch, n, _ = beams.tokens.shape
    out_of_range = jnp.where(stops.ends < 0, vocab, stops.ends)  # negative indices would count from the end
    ends = jnp.zeros(vocab, bool).at[out_of_range].set(True, mode="drop")
    window = recent(beams.tokens, beams.step, stops.sequences.shape[1] - 1)
    before, last = stops.sequences[:, :-1], stops.sequences[:, -1]
    fits = ((before == -1) | (window[:, :, None, :] == before)).all(-1)  # (B, beams, sequences)
    last = jnp.broadcast_to(jnp.where(last < 0, vocab, last), fits.shape)
    rows, columns = jnp.arange(batch)[:, None, None], jnp.arange(n)[None, :, None]
    return jnp.broadcast_to(ends, (batch, n, vocab)).at[rows, columns, last].max(fits, mode="drop")


def _keep_ended(
    beams: Beams, best: jax.Array, best_score: jax.Array, ending: jax.Array, count: jax.Array, settings: Search
) -> Beams:
    """The rows' best ended hypotheses, with those of their ``best`` continuations (B, beams) that are ``ending``."""
    n, vocab = beams.score.shape[1], beams.seen.shape[1]
    new = ending & (beams.hopeful & ~_closed(beams, settings))[:, None]
    score = jnp.where(new, best_score / count.astype(jnp.float32) ** settings.length_penalty, NONE)
    parent = best // vocab
    tokens = jnp.take_along_axis(beams.tokens, parent[:, :, None], axis=1)
    tokens = tokens.at[:, :, beams.step].set((best % vocab).astype(jnp.int32))
    all_score = jnp.concatenate([beams.ended_score, score], axis=1)
    kept_score, kept = jax.lax.top_k(all_score, n)
    pick = lambda old, new: jnp.take_along_axis(jnp.concatenate([old, new], axis=1), kept, axis=1)
    ended = jnp.concatenate([beams.ended, tokens], axis=1)
    return beams._replace(
        ended=jnp.take_along_axis(ended, kept[:, :, None], axis=1),
        ended_score=kept_score,
        length=pick(beams.length, jnp.where(new, count, 0)),
    )
