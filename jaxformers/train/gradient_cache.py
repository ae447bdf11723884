"""Gradient caching: a contrastive batch larger than memory, with the exact gradient (Gao et al. 2021, and STAR).

A contrastive loss couples all texts of a batch through their embeddings, but the encoder treats each text alone. So:
encode the batch in chunks without keeping activations, take the loss on all embeddings, and on the way back encode each
chunk once more, with the same dropout key, to turn its rows' cotangents into parameter gradients, which add up. That is
reverse-mode differentiation of a scan over checkpointed chunks, and is written as just that: the result is an ordinary
function, so that `jax.grad` of any loss of it is the cached gradient. Three encoder passes instead of two; the
activations of one chunk instead of all. A batch of one chunk is encoded as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def gradient_cache(encode: Callable[..., Any], chunk: int) -> Callable[..., Any]:
    """Makes `encode(params, inputs, key) -> (rows, ...)` run chunk by chunk, keeping one chunk's activations.

    `inputs` and the result are pytrees of arrays whose first axis is the rows, which `encode` must treat independently
    of one another. The returned function has the same signature and, where `encode` draws nothing from `key`, the same
    values and gradients. Chunk c gets the key fold_in(key, c) in both passes, so that dropout masks agree; `key=None`
    is handed on as None. The last chunk may be smaller than `chunk`. Sharded rows stay sharded where `chunk` is a
    multiple of the devices. Errors: ValueError for chunk < 1 or > rows, and
    for inputs whose first axes differ.
    """
    if chunk < 1:
        raise ValueError(f"chunk: must be >= 1, got {chunk}")

    def cached(params, inputs, key=None):
        sizes = {x.shape[0] for x in jax.tree.leaves(inputs)}
        if len(sizes) != 1:
            raise ValueError(f"inputs: all leaves need the same first axis, got sizes {sorted(sizes)}")
        (rows,) = sizes
        if chunk > rows:
            raise ValueError(f"chunk: {chunk} is larger than the batch of {rows} rows; use 1..{rows}")
        whole, rest = divmod(rows, chunk)

        def encode_chunk(c, part):
            return encode(params, part, None if key is None else jax.random.fold_in(key, c))

        # Chunk c holds the rows c, c + whole, c + 2 whole, ...: of rows sharded over devices, some of every device's.
        deal = lambda x: jnp.swapaxes(x[: whole * chunk].reshape(chunk, whole, *x.shape[1:]), 0, 1)
        if whole == 1 and not rest:  # nothing to save: the activations of one chunk are kept anyway
            return encode_chunk(0, inputs)
        head = jax.tree.map(deal, inputs)
        # Inside a scan the compiler cannot merge the two passes, so no barrier against that is needed.
        body = jax.checkpoint(lambda c_part: encode_chunk(*c_part), prevent_cse=False)
        out = jax.lax.map(body, (jnp.arange(whole), head))
        out = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(whole * chunk, *x.shape[2:]), out)
        if rest:
            tail = jax.checkpoint(encode_chunk)(whole, jax.tree.map(lambda x: x[whole * chunk :], inputs))
            out = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, tail)
        return out

    return cached
