"""What all decoders do around their blocks: positions, cache, final norm, head."""

from typing import Any

import jax
from jaxtyping import Array, Int

from jaxformers.nn.attention import causal_mask
from jaxformers.nn.cache import Cache, advance, new_cache
from jaxformers.nn.dropout import split
from jaxformers.nn.embeddings import check_length
from jaxformers.nn.heads import decoder_output
from jaxformers.nn.output import Output
from jaxformers.nn.positions import Turns, rotary_table
from jaxformers.nn.seq2seq import Memory, memory_cache, memory_context

NO_CROSS_ATTENTION = "memory: this decoder has no cross-attention; its config.json must say add_cross_attention"


def decode(
    model: Any,
    input_ids: Int[Array, "batch length"] | None,
    attention_mask: Int[Array, "batch length"] | None,
    position_ids: Int[Array, "#batch length"] | None,
    inputs_embeds: jax.Array | None,
    cache: Cache | None,
    logits_to_keep: int,
    rngs: jax.Array | None,
    memory: Memory | None = None,
) -> Output:
    """Run ``embeddings`` → ``layers`` → ``final_norm`` → ``head`` of a decoder, with the ``memory`` it may attend to.

    Positions are looked up where ``embeddings`` has a table of them, and rotated where ``config.rope`` says how.
    Without ``position_ids`` they are the slots, as in Hugging Face, also when padded on the left.
    """
    batch, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
    embed_key, layers_key, head_key = split(rngs, 3)
    mask, slots, cache = causal_mask(batch, length, attention_mask, cache)
    positions, context = slots if position_ids is None else position_ids, {}
    if getattr(model.config, "add_cross_attention", False):
        context |= memory_context(memory, cache)
    elif memory is not None:
        raise ValueError(NO_CROSS_ATTENTION)
    if model.embeddings.position is not None:
        check_length(length, model.config.max_position_embeddings, cache if position_ids is None else None)
    rope = getattr(model.config, "rope", None)
    if rope is not None:
        context["rotary"] = Turns(*rotary_table(rope, positions), positions)
    x = model.embeddings(
        input_ids,
        position_ids=None if model.embeddings.position is None else positions,
        inputs_embeds=inputs_embeds,
        key=embed_key,
    )
    layer_caches = None if cache is None else cache.layers
    h, layer_caches = model.layers(x, mask=mask, cache=layer_caches, key=layers_key, **context)
    cache = advance(cache, layer_caches, length)
    h = model.final_norm(h)
    return decoder_output(model, h, input_ids, attention_mask, cache, logits_to_keep, head_key)


def empty_cache(model: Any, batch: int, slots: int, memory: Memory | None = None) -> Cache:
    """A cache for ``batch`` sequences of up to ``slots`` tokens, in the embeddings' dtype; with the keys and values of
    ``memory`` in it, where a decoder with cross-attention has one."""
    dtype = model.embeddings.token.embedding.get_value().dtype
    if memory is None:
        return new_cache(model.layers.empty_cache(batch, slots, dtype), batch, slots)
    if not model.config.add_cross_attention:
        raise ValueError(NO_CROSS_ATTENTION)
    return memory_cache(model.layers, memory, batch, slots, dtype)
