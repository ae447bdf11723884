"""What the attention kernels of all platforms share: which keys of a tile are seen, and which tiles are worth visiting.

Query i stands at slot i + start, key j at slot j. A key is seen when it lies inside the array, and
``causal``: j <= i + start, or j < prefix; then ``window`` also asks i + start - j < window;
``segments``: both have the same number; ``valid``: the key is a real one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

MASKED = -1e30  # score of a key that is not seen, and log-sum-exp of a query that sees none: finite, so never NaN


@dataclasses.dataclass(frozen=True)
class Rules:
    """The static part of a mask, and the shape it applies to; segments and validity come as arrays (:func:`seen`)."""

    queries: int
    keys: int
    causal: bool = False
    window: int | None = None
    prefix: bool = False
    segments: bool = False
    valid: bool = False
    start: int | None = 0  # None where only an array says it

    @property
    def by_content(self) -> bool:
        """Whether arrays decide too, so that no tile is known to be fully visible."""
        return self.segments or self.valid


def seen(rules: Rules, slots, keys, prefix, query_segments, key_segments, *, positional: bool, even: bool = False):
    """Boolean tile, or None when all of it is visible.

    ``slots`` and ``keys`` broadcast to the tile (a column and a row, or the other way round), as do the segments.
    ``key_segments`` are −1 where a key is not valid. ``positional=False`` skips what depends on positions alone,
    for tiles known to lie inside. ``even``: tiles of keys divide the array, so that none reaches beyond its end.
    """
    allowed = None

    def both(a, b):
        return b if a is None else a & b

    if positional:
        allowed = None if even else keys < rules.keys
        if rules.causal:
            below = keys <= slots
            allowed = both(allowed, below | (keys < prefix) if rules.prefix else below)
            if rules.window is not None:
                allowed = allowed & (slots - keys < rules.window)
    if rules.segments:
        allowed = both(allowed, query_segments == key_segments)
    elif rules.valid:
        allowed = both(allowed, key_segments >= 0)
    return allowed


def _floor(a, b: int):
    """a // b for numbers that may be traced and negative; XLA's and Triton's division truncates."""
    if isinstance(a, int):
        return a // b
    return jnp.where(a >= 0, jax.lax.div(a, jnp.int32(b)), -jax.lax.div(b - 1 - a, jnp.int32(b)))


def _ceil(a, b: int):
    return _floor(a + (b - 1), b)


def _clip(x, low, high):
    if all(isinstance(v, int) for v in (x, low, high)):
        return min(max(x, low), high)
    return jnp.clip(jnp.int32(x), jnp.int32(low), jnp.int32(high))


def key_tiles(rules: Rules, first, block_q: int, block_k: int, start, prefix):
    """Tiles of keys for the queries ``first … first + block_q − 1``: (low, a, b, high).

    Tiles in [low, high) hold what may be seen; positions decide nothing in [a, b).
    """
    tiles, whole = -(-rules.keys // block_k), rules.keys // block_k
    low, a, b, high = 0, 0, whole, tiles
    if rules.causal:
        top = first + start  # slots run from top to top + block_q - 1
        b, high = _floor(top + 1, block_k), _ceil(top + block_q, block_k)
        if rules.prefix:
            b, high = jnp.maximum(b, _floor(prefix, block_k)), jnp.maximum(high, _ceil(prefix, block_k))
        if rules.window is not None:
            low, a = _floor(top - rules.window + 1, block_k), _ceil(top + block_q - rules.window, block_k)
    high = _clip(high, 0, tiles)
    low = _clip(low, 0, high)
    a = _clip(a, low, high)
    b = _clip(b, a, _clip(whole, a, high))
    return low, a, b, high


def query_tiles(rules: Rules, first, block_q: int, block_k: int, start, prefix):
    """The same for the keys ``first … first + block_k − 1``: the tiles of queries that may see them."""
    tiles = -(-rules.queries // block_q)
    low, a, b, high = 0, 0, tiles, tiles
    if rules.causal:
        reach = first - start  # the first query that sees the first key
        low, a = _floor(reach, block_q), _ceil(reach + block_k - 1, block_q)
        if rules.prefix:
            low = jnp.where(first < prefix, 0, low)
            a = jnp.where(first + block_k <= prefix, 0, a)
        if rules.window is not None:
            b = _floor(reach + rules.window, block_q)
            high = _ceil(reach + block_k - 1 + rules.window, block_q)
    high = _clip(high, 0, tiles)
    low = _clip(low, 0, high)
    a = _clip(a, low, high)
    b = _clip(b, a, high)
    return low, a, b, high


def dot(a, b, *, trans_a: bool = False, trans_b: bool = False, precision=None):
    """Matrix product of two tiles, accumulated in float32; transposing inside it is cheaper than before it."""
    axes = (((0 if trans_a else 1,), (1 if trans_b else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def platform() -> str:
    """The platform that is compiled for: that of the mesh in use (dry runs name a foreign one), or JAX's default."""
    found = device().platform
    return "gpu" if found in ("cuda", "rocm") else found


def device() -> Any:
    """The device that is compiled for: the one that the mesh in use names (dry runs, tests), or JAX's first."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) or jax.devices()[0]


def hopper() -> bool:
    """Whether what is compiled for is an NVIDIA GPU of the Hopper generation."""
    return platform() == "gpu" and device().device_kind.startswith(("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200"))


def partitioned() -> bool:
    """Whether XLA may have to cut what is being traced over several devices, which it cannot do to a Pallas kernel.

    Inside ``jax.shard_map`` over all axes every device has its own program, and kernels are welcome.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() > 1
    return mesh.size > 1 and set(mesh.axis_names) != set(mesh.manual_axes)
