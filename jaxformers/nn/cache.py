"""A decoder's cache of keys and values, or of what they come from.

Shapes are static, so that every decoding step runs the same compiled code.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValue:
    """One layer's keys and values by slot: (B, kv heads, S, head size), in the order that attention multiplies."""

    key: Float[Array, "batch heads slots size"]
    value: Float[Array, "batch heads slots size"]

    def write(self, key: jax.Array, value: jax.Array, start: jax.Array) -> "KeyValue":
        """Put new keys and values (B, L, kv heads, head size) at slots ``start … start + L − 1``."""
        put = lambda store, new: jax.lax.dynamic_update_slice(
            store, new.swapaxes(1, 2).astype(store.dtype), (0, 0, start, 0)
        )
        return KeyValue(put(self.key, key), put(self.value, value))

    def read(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """All keys and values, (B, S, kv heads, head size)."""
        return self.key.astype(dtype).swapaxes(1, 2), self.value.astype(dtype).swapaxes(1, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WithMemory:
    """What a layer with cross-attention keeps: ``own``, the cache of its self-attention, and ``memory``, the keys and
    values of the encoder's output, which no step changes."""

    own: Any
    memory: KeyValue


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latent:
    """One layer's lines by slot, (B, S, width), that all heads share: :class:`jaxformers.nn.LatentAttention`."""

    line: Float[Array, "batch slots width"]

    def write(self, line: jax.Array, start: jax.Array) -> "Latent":
        """Put new lines (B, L, width) at slots ``start … start + L − 1``."""
        return Latent(jax.lax.dynamic_update_slice(self.line, line.astype(self.line.dtype), (0, start, 0)))

    def read(self, dtype: jnp.dtype) -> Float[Array, "batch slots width"]:
        """All lines."""
        return self.line.astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """``layers`` {layer name: what its attention's ``empty_cache`` made}, ``used`` the slots filled so far, ``valid``
    which slots hold real tokens, ``memory_valid`` which positions of the encoder's output are real (None: all)."""

    layers: dict[str, Any]
    used: Int[Array, ""]
    valid: Bool[Array, "batch slots"]
    memory_valid: Bool[Array, "batch keys"] | None = None

    @property
    def slots(self) -> int:
        return self.valid.shape[1]


def new_cache(layers: dict[str, Any], batch: int, slots: int, memory_valid: jax.Array | None = None) -> Cache:
    """An empty cache around each layer's empty storage."""
    memory_valid = None if memory_valid is None else memory_valid.astype(bool)
    return Cache(layers, jnp.zeros((), jnp.int32), jnp.zeros((batch, slots), bool), memory_valid)


def extend(cache: Cache, attention_mask: jax.Array | None, length: int) -> Cache:
    """Mark ``length`` new slots as real (or as ``attention_mask`` (B, length) says); ``used`` does not move yet.

    Raises ValueError when the cache is known to be full (outside of jit, where its fill is a number).
    """
    if not isinstance(cache.used, jax.core.Tracer) and int(cache.used) + length > cache.slots:
        raise ValueError(f"cache: {int(cache.used)} of {cache.slots} slots are used, {length} more do not fit")
    new = jnp.ones((cache.valid.shape[0], length), bool) if attention_mask is None else attention_mask.astype(bool)
    return dataclasses.replace(cache, valid=jax.lax.dynamic_update_slice(cache.valid, new, (0, cache.used)))


def advance(cache: Cache | None, layers: dict[str, Any] | None, length: int) -> Cache | None:
    """The cache after a pass over ``length`` tokens that left ``layers`` behind."""
    return None if cache is None else dataclasses.replace(cache, layers=layers, used=cache.used + length)


def repeat(cache: Cache, times: int) -> Cache:
    """Each sequence ``times`` times, one after the other: a row for each beam."""

    def along(axis: int) -> Any:
        return lambda tree: jax.tree.map(lambda a: jnp.repeat(a, times, axis=axis), tree)

    valid = None if cache.memory_valid is None else jnp.repeat(cache.memory_valid, times, axis=0)
    layers = _by_axis(cache.layers, along)
    return dataclasses.replace(cache, layers=layers, valid=jnp.repeat(cache.valid, times, axis=0), memory_valid=valid)


def reorder(cache: Cache, rows: Int[Array, "batch"]) -> Cache:
    """The cache whose sequence i is what sequence ``rows[i]`` was. Memories stay: beams of one prompt share them."""

    def along(axis: int) -> Any:
        take = lambda tree: jax.tree.map(lambda a: jnp.take(a, rows, axis=axis), tree)
        return lambda layer: (
            dataclasses.replace(layer, own=take(layer.own)) if isinstance(layer, WithMemory) else take(layer)
        )

    return dataclasses.replace(cache, layers=_by_axis(cache.layers, along), valid=jnp.take(cache.valid, rows, axis=0))


def _by_axis(layers: dict[str, Any], along: Any) -> dict[str, Any]:
    """``along(axis)`` of each layer: the batch is the first axis, the second one where layers are stacked."""
    return {name: along(1 if name == "*" else 0)(layer) for name, layer in layers.items()}
