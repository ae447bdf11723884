"""The matrices that X-EcoMLA's layers begin with, from those of the source by SVD: see `jaxformers.compress.x_ecomla`.

Matrices are (out, in), y = W x, float32; decompositions are computed at the highest precision.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxformers import nn, weights

Matrices = dict[str, Float[Array, "out in"]]  # by the name of the new layer's linear


def energy_rank(sigma: Float[np.ndarray, "k"], energy: float, divisor: int = 8) -> int:
    """How many leading sums of ``sigma``² (descending) are at most ``energy`` of the whole: at least one, rounded up to
    a multiple of ``divisor``. The rank sits just below the threshold before it is rounded, as in the published code."""
    sums = np.cumsum(np.square(np.asarray(sigma, np.float32)), dtype=np.float64).astype(np.float32)
    count = int(np.sum(sums / sums[-1] <= np.float32(energy)))
    return -(-max(1, count) // divisor) * divisor


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Heads and key/value heads of the source, the size of one, and of its parts in the new layer."""

    heads: int
    kv_heads: int
    head: int
    nope: int
    rope: int

    def query_rows(self, W: Array) -> Array:
        """Of the rows of every head (H d_h, …) the first d_n and the last d_r."""
        W = W.reshape(self.heads, self.head, -1)
        return jnp.concatenate([W[:, : self.nope], W[:, self.head - self.rope :]], axis=1).reshape(
            self.heads * (self.nope + self.rope), -1
        )

    def kv_rows(self, K: Array, V: Array) -> Array:
        """Of the rows of every key/value head (n_kv d_h, …): per query head the key's first d_n, and the value's."""
        K, V = (W.reshape(self.kv_heads, self.head, -1) for W in (K, V))
        both = jnp.concatenate([K[:, : self.nope], V], axis=1)
        return jnp.repeat(both, self.heads // self.kv_heads, axis=0).reshape(self.heads * (self.nope + self.head), -1)


def matrix(linear: nn.Linear) -> Float[Array, "out in"]:
    """What a linear layer multiplies by, whatever kind of weight it has."""
    return weights.dense(linear.kernel.get_value()).astype(jnp.float32).T


@jax.jit
def _svd(W: Float[Array, "out in"]) -> tuple[Array, Array, Array]:
    with jax.default_matmul_precision("highest"):
        return jnp.linalg.svd(W, full_matrices=False)


def svd_query(
    W: Array, sizes: Sizes, rank: int | None, energy: float | None, divisor: int
) -> tuple[int | None, Matrices]:
    """The query's rank and matrices, ``query_down`` and ``query_up``; ``query`` alone without rank and energy."""
    if rank is None and energy is None:
        return None, {"query": sizes.query_rows(W)}
    U, S, Vt = _svd(W)
    if energy is not None:
        rank = min(energy_rank(np.asarray(S), energy, divisor), len(S))
    return rank, {"query_down": S[:rank, None] * Vt[:rank], "query_up": sizes.query_rows(U[:, :rank])}


def svd_kv(
    K: Array, V: Array, sizes: Sizes, rank: int | None, energy: float | None, divisor: int
) -> tuple[int, Matrices]:
    """The rank of keys and values, and the matrices ``kv_down`` and ``kv_up``."""
    g = sizes.heads // sizes.kv_heads
    U, S, Vt = _svd(math.sqrt(g) * jnp.concatenate([K, V]))
    limit = min(2 * sizes.heads * sizes.head, K.shape[1])  # singular values of the repeated matrix; the others are 0
    if energy is not None:
        sigma = np.pad(np.asarray(S), (0, limit - len(S)))
        rank = min(energy_rank(sigma, energy, divisor), limit)
    if rank > len(S):  # directions that only the repeated matrix has: trained like the others, and 0 before that
        repeat = lambda W: jnp.repeat(W.reshape(sizes.kv_heads, sizes.head, -1), g, axis=0).reshape(-1, W.shape[1])
        U, S, Vt = _svd(jnp.concatenate([repeat(K), repeat(V)]))
        U_k, U_v = (part.reshape(sizes.heads, sizes.head, -1)[:, :, :rank] for part in jnp.split(U, 2))
        up = jnp.concatenate([U_k[:, : sizes.nope], U_v], axis=1).reshape(-1, rank)
    else:
        up = sizes.kv_rows(*jnp.split(U[:, :rank] / math.sqrt(g), 2))
    turning = jnp.mean(K.reshape(sizes.kv_heads, sizes.head, -1), axis=0)[sizes.head - sizes.rope :]
    return rank, {"kv_down": jnp.concatenate([S[:rank, None] * Vt[:rank], turning]), "kv_up": up}


def random_matrices(sizes: Sizes, width: int, r_q: int | None, r_kv: int, key: jax.Array) -> Matrices:
    """Matrices as torch initialises a linear layer: uniform within 1/sqrt(inputs)."""
    queries = sizes.heads * (sizes.nope + sizes.rope)
    shapes = {"query": (queries, width)} if r_q is None else {"query_down": (r_q, width), "query_up": (queries, r_q)}
    shapes |= {"kv_down": (r_kv + sizes.rope, width), "kv_up": (sizes.heads * (sizes.nope + sizes.head), r_kv)}
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.uniform(k, shape, minval=-1, maxval=1) / math.sqrt(shape[1])
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
