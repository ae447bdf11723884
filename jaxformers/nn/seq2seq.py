"""What encoder–decoders share: the encoder's output as the decoder sees it, the decoder's cache, and its inputs.

Beside ``model(<encoder's inputs>, decoder_input_ids=…)``, the pass over everything that training uses, an
encoder–decoder offers three steps, and generation knows no others:

    memory = model.encode(<encoder's inputs>)                 # Memory
    cache = model.empty_cache(batch, slots, memory)           # Cache: keys and values of the memory made here, once
    out = model(decoder_input_ids=ids, cache=cache)           # Output(logits, cache): one or more tokens further

Its decoder is :class:`Layers` of blocks with ``cross_attention``; :func:`memory_cache` makes the cache and
:func:`memory_context` what the layers take.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformers.nn.attention import Mask
from jaxformers.nn.block import Layers
from jaxformers.nn.cache import Cache, WithMemory, new_cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """An encoder's output: ``hidden`` (B, S, D), and ``valid`` (B, S) with 1 where a position is real (None: all)."""

    hidden: Float[Array, "batch keys width"]
    valid: Int[Array, "batch keys"] | None = None


def memory_cache(layers: Layers, memory: Memory, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """An empty cache of ``slots`` tokens for a decoder's ``layers``, with the keys and values of ``memory`` in it.

    Raises ValueError when ``memory`` is that of another number of sequences.
    """
    if memory.hidden.shape[0] != batch:
        raise ValueError(f"memory: encodes {memory.hidden.shape[0]} sequences, the cache is for {batch}")
    own, made = layers.empty_cache(batch, slots, dtype), layers.remember(memory.hidden)
    return new_cache({name: WithMemory(own[name], made[name]) for name in own}, batch, slots, memory.valid)


def memory_context(memory: Memory | None, cache: Cache | None) -> dict[str, Any]:
    """What a decoder's layers take for cross-attention: from ``cache`` where there is one, else from ``memory``."""
    if cache is not None:
        return {"memory_mask": Mask(valid=cache.memory_valid)}
    return {} if memory is None else {"memory": memory.hidden, "memory_mask": Mask(valid=memory.valid)}


def shift_right(labels: Int[Array, "batch length"], start_id: int, pad_id: int) -> Int[Array, "batch length"]:
    """A decoder's inputs for its ``labels``: ``start_id``, then all labels but the last, with ``pad_id`` for -100."""
    shifted = jnp.roll(labels, 1, axis=1).at[:, 0].set(start_id)
    return jnp.where(shifted == -100, pad_id, shifted)
