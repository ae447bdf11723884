"""The cache of a layer that sees a window of the latest tokens only: as long as the window, written round and round.

The token at slot s of the sequence lies at place s mod W. What it gives is what a cache of all slots gives.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rolling:
    """The keys and values of the last W tokens by place, (B, kv heads, W, head size)."""

    key: Float[Array, "batch heads window size"]
    value: Float[Array, "batch heads window size"]

    def turn(self, key: jax.Array, value: jax.Array, mask: Any) -> tuple["Rolling", jax.Array, jax.Array, Any]:
        """Take in keys and values (B, L, kv heads, head size) of the slots from ``mask.start`` on.

        Returns the new cache, the keys and values that the L queries are to look at (B, keys, kv heads, head size), and
        the :class:`jaxformers.nn.Mask` over these. One new token looks at all W places; several at what was there
        before them, in order, and at themselves, since later ones may take the place of what earlier ones need.
        """
        length, window, start = key.shape[1], self.key.shape[2], mask.start
        new = Rolling(_write(self.key, key, start), _write(self.value, value, start))
        if length == 1:
            slots = start - (start - jnp.arange(window)) % window  # of each place, at most ``start``
            keys, values = (a.astype(key.dtype).swapaxes(1, 2) for a in (new.key, new.value))
            return (
                new,
                keys,
                values,
                dataclasses.replace(
                    mask, valid=_valid(mask.valid, slots, key.shape[0]), start=0, causal=False, window=None, prefix=None
                ),
            )
        slots = start - window + jnp.arange(window + length)
        keys, values = (
            jnp.concatenate([jnp.take(old, slots[:window] % window, axis=2).astype(a.dtype).swapaxes(1, 2), a], axis=1)
            for old, a in ((self.key, key), (self.value, value))
        )
        prefix = None if mask.prefix is None else mask.prefix - slots[0]
        return (
            new,
            keys,
            values,
            dataclasses.replace(
                mask, valid=_valid(mask.valid, slots, key.shape[0]), start=window, window=window, prefix=prefix
            ),
        )


def _write(store: jax.Array, new: jax.Array, start: jax.Array | int) -> jax.Array:
    """Put the last W of the new tokens at their places."""
    length, window = new.shape[1], store.shape[2]
    new = new.swapaxes(1, 2).astype(store.dtype)
    if length == 1:
        return jax.lax.dynamic_update_slice(store, new, (0, 0, start % window, 0))
    kept = min(length, window)
    places = (start + length - kept + jnp.arange(kept)) % window
    return store.at[:, :, places].set(new[:, :, length - kept :], unique_indices=True)


def _valid(valid: jax.Array | None, slots: jax.Array, batch: int) -> jax.Array:
    """Which of ``slots`` hold a real token: those before the first do not."""
    there = jnp.broadcast_to(slots >= 0, (batch, slots.shape[0]))
    return there if valid is None else there & jnp.take(valid.astype(bool), jnp.maximum(slots, 0), axis=1)
