"""Which weights of one kernel to remove by what calibration inputs say of it: Wanda and SparseGPT.

Wanda (arXiv 2306.11695) removes, per output o, the inputs j with the smallest |W_jo| · sqrt(mean ‖X_j‖²), and changes
nothing else. SparseGPT (arXiv 2301.00774) walks through the columns as GPTQ does (columns.py, the same H and U): in
each block of 128 inputs it removes the weights with the smallest score

    w² / U_ii²     (unstructured: `<=` the int(s · numel)-th sorted score of the block, over all outputs)

and moves the weights of later inputs so that they make up for each one removed. N:M patterns are chosen at every m-th
input, on the weights as they are by then. Kernels are (in, out): a paper's column is a row here.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformers.compress import threshold
from jaxformers.compress.columns import through_columns
from jaxformers.compress.hessian import damped_factor


@functools.partial(jax.jit, static_argnames=("keep_n", "m"))
def wanda(
    kernel: Float[Array, "in out"],
    norms: Float[Array, " in"],
    kept: Bool[Array, "in out"] | None = None,
    *,
    drop: Array | int | None = None,
    keep_n: int | None = None,
    m: int | None = None,
) -> Bool[Array, "in out"]:
    """The mask, True = kept, that removes ``drop`` inputs of each output, or all but ``keep_n`` of each ``m`` inputs.

    ``norms``: mean over samples of the squared norms of the inputs. Entries where ``kept`` is False are gone, and
    count. Of equal scores the first input goes.
    """
    keys = threshold.keys(jnp.abs(kernel) * jnp.sqrt(norms)[:, None], kept)
    gone = threshold.smallest_of_columns(keys, drop) if m is None else threshold.smallest_of_groups(keys, m - keep_n, m)
    return ~gone if kept is None else ~gone & kept


class Sparse(NamedTuple):
    """A pruned kernel. ``loss``: Σ e² / 2; ``damp``: what was used in the end."""

    values: Float[Array, "in out"]
    mask: Bool[Array, "in out"]
    loss: Float[Array, ""]
    damp: Float[Array, ""]


def sparsegpt(
    kernel: Float[Array, "in out"],
    H: Float[Array, "in in"],
    damp: float = 0.01,
    kept: Bool[Array, "in out"] | None = None,
    *,
    sparsity: float | None = None,
    keep_n: int | None = None,
    m: int | None = None,
    blocksize: int = 128,
) -> Sparse:
    """Prune one kernel given the Hessian ``H`` of its inputs, either to ``sparsity`` or to ``keep_n`` of each ``m``.

    ``damp`` is added to H's diagonal as a share of its mean, ten times more after each failed factorisation (at most
    four times; then the loss is not finite). Inputs never seen (diag(H) = 0) get weight 0. Where ``kept`` is False the
    weight is 0 and stays so. With N:M a block holds whole groups. Compiled once per shape, whatever the sparsity.
    """
    n, out = kernel.shape
    B = blocksize if m is None else -(-blocksize // m) * m
    # whole numbers are taken by Python, as the official code does: float32 would round others away
    ranks = [0, 0] if sparsity is None else [int(size * out * sparsity) + 1 for size in (B, n - (n - 1) // B * B)]
    drop = 0 if m is None else m - keep_n
    return _sparsegpt(kernel, H, damp, kept, jnp.asarray(ranks, jnp.int32), drop=drop, m=m, B=B)


@functools.partial(jax.jit, static_argnames=("drop", "m", "B"))
def _sparsegpt(
    kernel: Array, H: Array, damp: Array, kept: Array | None, ranks: Array, *, drop: int, m: int | None, B: int
) -> Sparse:
    """``ranks``: place of the threshold among the sorted scores, counted from 1, of a whole block and of the last."""
    n, out = kernel.shape
    padded = -(-n // B) * B
    W = kernel.astype(jnp.float32)
    if kept is not None:
        W = jnp.where(kept, W, 0.0)
    dead = jnp.diagonal(H) == 0
    W = jnp.where(dead[:, None], 0.0, W)
    U, used = damped_factor(H + jnp.diag(dead.astype(H.dtype)), damp)
    diagonal = jnp.pad(jnp.diagonal(U), (0, padded - n), constant_values=1.0)
    alive = None if kept is None else jnp.pad(kept, ((0, padded - n), (0, 0)))
    within = (jnp.arange(padded) < n)[:, None]
    cut, put = jax.lax.dynamic_slice_in_dim, jax.lax.dynamic_update_slice_in_dim
    row = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)

    def scores(W: Array, i: Array, rows: int) -> Array:
        """Keys of the weights of ``rows`` inputs from i on; what is gone already goes first, padding never."""
        score = W**2 / (cut(diagonal, i, rows) ** 2)[:, None]
        keys = threshold.keys(score, None if alive is None else cut(alive, i, rows))
        return jnp.where(cut(within, i, rows), keys, jnp.array(jnp.iinfo(keys.dtype).max, keys.dtype))

    def begin(state: Any, i: Array, W: Array) -> Any:
        """Choose for a whole block, by its weights as they are when it begins."""
        if m is not None:
            return state
        values, mask = state
        keys = scores(cut(W, i, B), i, B)
        limit = threshold.kth_key(keys, jnp.where(i + B >= padded, ranks[1], ranks[0]))
        return values, put(mask, keys > limit, i, 0)

    def choose(state: Any, i: Array, w: Array, W: Array, ahead: Any) -> tuple[Any, Array]:
        values, mask = state
        if m is not None:
            group = lambda: put(mask, ~threshold.smallest_of_groups(scores(ahead(m), i, m), drop, m), i, 0)  # noqa: E731
            mask = jax.lax.cond(i % m == 0, group, lambda: mask)
        stay = row(mask, i) if alive is None else row(mask, i) & row(alive, i)
        value = jnp.where(stay, w, 0.0)
        return (put(values, value[None], i, 0), put(mask, stay[None], i, 0)), value

    start = (jnp.zeros((padded, out)), jnp.ones((padded, out), bool))
    (values, mask), loss = through_columns(W, U, B, choose, start, begin=begin)
    return Sparse(values[:n], mask[:n], loss, used)
