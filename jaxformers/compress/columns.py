"""GPTQ's solve of one linear layer: round its columns one by one, and let the rest make up for each rounding error.

Source: GPTQ, arXiv 2210.17323, algorithm 1. With `inv(H) = Uᵀ U` and the columns w_i (the weights of one input) of a
layer in order,

    q_i = quantise(w_i),   e_i = (w_i - q_i) / U_ii,   w_j <- w_j - e_i U_ij for j > i,   loss = Σ ‖e_i‖² / 2

Kernels are (in, out), so a paper's column is a row here, and all outputs of it are rounded at once. A column
receives the updates of earlier columns of its block of 128 when its turn comes, as one product of a row of U with their
errors; the columns after the block receive those of the whole block as one matrix product. What value a column takes
instead of its own is a function's choice (:func:`through_columns`): SparseGPT's pruning is the same walk (pruning.py).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from jaxformers.compress import grids
from jaxformers.compress.grids import Grid
from jaxformers.compress.hessian import damped_factor


class Solved(NamedTuple):
    """A quantised kernel: value[i, o] = dequantise(codes[i, o]; scales[g_idx[i], o], zeros[g_idx[i], o])."""

    codes: UInt8[Array, "in out"]
    scales: Float[Array, "groups out"]
    zeros: Float[Array, "groups out"]
    g_idx: Int[Array, " in"]
    loss: Float[Array, ""]  # Σ e² / 2, which is tr((W - Q)ᵀ H (W - Q)) / 2 with the damped H
    damp: Float[Array, ""]  # what was used in the end; not finite factors leave a loss that is not finite


def dense(grid: Grid, solved: Solved) -> Float[Array, "in out"]:
    """The float32 kernel that the codes stand for."""
    return grids.dequantize(grid, solved.codes, solved.scales[solved.g_idx], solved.zeros[solved.g_idx])


def fit_groups(grid: Grid, kernel: Float[Array, "in out"], group_size: int) -> tuple[Array, Array]:
    """(scales, zeros) (groups, out) of consecutive groups of inputs; the last may be ragged. -1: one group."""
    n, out = kernel.shape
    g = n if group_size == -1 else group_size
    rows = jnp.pad(kernel.astype(jnp.float32), ((0, -n % g), (0, 0)))
    return grids.fit(grid, rows.reshape(-1, g, out))


@functools.partial(jax.jit, static_argnames="group_size")
def round_to_nearest(kernel: Float[Array, "in out"], mask: Array | None = None, *, grid: Grid, group_size: int = -1):
    """RTN, the baseline: every weight to the nearest value of its grid. Where `mask` is False the value is 0."""
    kernel = kernel.astype(jnp.float32) if mask is None else jnp.where(mask, kernel, 0).astype(jnp.float32)
    scales, zeros = fit_groups(grid, kernel, group_size)
    g_idx = jnp.arange(len(kernel), dtype=jnp.int32) // (len(kernel) if group_size == -1 else group_size)
    codes = grids.quantize(grid, kernel, scales[g_idx], zeros[g_idx])
    if mask is not None:
        codes = jnp.where(mask, codes, grids.zero_code(grid, zeros)[g_idx])
    return Solved(codes, scales, zeros, g_idx, jnp.float32(jnp.nan), jnp.float32(0))


@functools.partial(jax.jit, static_argnames=("group_size", "act_order", "static_groups", "blocksize"))
def solve(
    kernel: Float[Array, "in out"],
    H: Float[Array, "in in"],
    damp: Array | float = 0.01,
    mask: Array | None = None,
    *,
    grid: Grid,
    group_size: int = -1,
    act_order: bool = False,
    static_groups: bool = False,
    blocksize: int = 128,
) -> Solved:
    """Quantise one kernel given the Hessian `H` of its inputs. Pure.

    Compiled once per shape and set of options, whatever the bits.

    `damp` is added to the diagonal as a share of its mean, ten times more after each failed factorisation (at most four
    times). `mask` (in, out), False where a weight must stay exactly zero: its share of the error is compensated too.
    `act_order` takes columns by decreasing diag(H). Groups: -1 fits one grid per output on the kernel as it is;
    otherwise each group's grid is fitted when its first column comes up, on values that hold the updates of earlier
    blocks only (as the official code does), or before the start if `static_groups`. With `act_order` the groups are
    those of the permuted order, unless static. Inputs never seen (diag(H) = 0) get weight 0.
    """
    n, out = kernel.shape
    W = kernel.astype(jnp.float32)
    if mask is not None:
        W = jnp.where(mask, W, 0.0)
    row_grid = fit_groups(grid, W, -1)
    diag = jnp.diagonal(H)
    dead = diag == 0
    H = H + jnp.diag(dead.astype(H.dtype))
    W = jnp.where(dead[:, None], 0.0, W)

    dynamic = group_size != -1 and not static_groups
    g = n if group_size == -1 else group_size
    fitted = row_grid if group_size == -1 else fit_groups(grid, W, g) if static_groups else None
    order = jnp.argsort(diag, descending=True, stable=True) if act_order else jnp.arange(n)
    if act_order:
        W, H = W[order], H[order][:, order]
        mask = None if mask is None else mask[order]
    U, used = damped_factor(H, damp)

    position_groups = (order if static_groups else jnp.arange(n)) // g  # the group of each column in solving order
    codes, scales, zeros, loss = _columns(grid, W, U, mask, fitted, position_groups, g, blocksize, dynamic)
    back = jnp.argsort(order)
    return Solved(codes[back], scales, zeros, position_groups[back].astype(jnp.int32), loss, used)


def _columns(
    grid: Grid,
    W: Float[Array, "in out"],
    U: Float[Array, "in in"],
    mask: Array | None,
    fitted: tuple[Array, Array] | None,
    groups: Int[Array, " in"],
    g: int,
    B: int,
    dynamic: bool,
) -> tuple[Array, Array, Array, Array]:
    """Algorithm 1 on columns already in order: (codes, scales, zeros, loss)."""
    n, out = W.shape
    padded = -(-n // B) * B
    rows = -(-padded // g) * g if dynamic else padded  # a group that starts in the padding is read in full
    groups = jnp.arange(padded) // g if dynamic else jnp.pad(groups, (0, padded - n))
    keep = None if mask is None else jnp.pad(mask, ((0, padded - n), (0, 0)), constant_values=True)
    tables = tuple(jnp.zeros((rows // g, out)) for _ in range(2)) if dynamic else fitted

    def round_column(state: Any, i: Array, w: Array, W: Array, ahead: Any) -> tuple[Any, Array]:
        codes, tables = state
        if dynamic:
            refit = lambda: grids.fit(grid, _cut(W, i, g))  # noqa: E731
            current = jax.lax.cond(i % g == 0, refit, lambda: tuple(_row(t, i // g) for t in tables))
            tables = tuple(_put(t, c[None], i // g, 0) for t, c in zip(tables, current, strict=True))
        else:
            current = tuple(_row(t, groups[i]) for t in tables)
        code = grids.quantize(grid, w, *current)
        if keep is not None:
            code = jnp.where(_row(keep, i), code, grids.zero_code(grid, current[1]))
        return (_put(codes, code[None], i, 0), tables), grids.dequantize(grid, code, *current)

    start = (jnp.zeros((padded, out), jnp.uint8), tables)
    (codes, tables), loss = through_columns(W, U, B, round_column, start, rows=rows)
    n_groups = -(-n // g)
    return codes[:n], tables[0][:n_groups], tables[1][:n_groups], loss


_cut, _put = jax.lax.dynamic_slice_in_dim, jax.lax.dynamic_update_slice_in_dim
_row = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)


def through_columns(
    W: Float[Array, "in out"],
    U: Float[Array, "in in"],
    B: int,
    choose: Callable[[Any, Array, Array, Array, Callable[[int], Array]], tuple[Any, Array]],
    state: Any,
    *,
    begin: Callable[[Any, Array, Array], Any] = lambda state, i, W: state,
    rows: int = 0,
) -> tuple[Any, Float[Array, ""]]:
    """Give each column of a kernel, in order, the value that ``choose`` wants, and let the columns after it make up.

    ``choose(state, i, w, W, ahead) -> (state, value)``: ``w`` (out,) is column i with the updates of all columns before
    it, ``W`` the kernel as it was when the block of ``B`` columns began, ``ahead(m)`` (m, out) columns i … i + m - 1 of
    that block with all updates so far. ``begin(state, i, W)`` is called before the block that starts at column i.
    ``U`` (in, in): the factor of the inverse Hessian. The kernel is padded with columns of zeros to whole blocks, and
    to ``rows``. Returns the last state and Σ e² / 2.
    """
    n, out = W.shape
    padded = -(-n // B) * B
    chunk = B * max(c for c in (4, 3, 2, 1) if (padded // B) % c == 0)
    W = jnp.pad(W.astype(jnp.float32), ((0, max(rows, padded) - n), (0, 0)))
    # 1 on the padded diagonal, 0 elsewhere
    U = jnp.pad(U, ((0, padded - n), (0, padded - n))) + jnp.diag((jnp.arange(padded) >= n).astype(U.dtype))
    dot = functools.partial(jnp.matmul, precision="highest")

    def column(j: Array, carry: Any, i1: Array, W: Array, U_B: Array) -> Any:
        """Column `i1 + j`; `W` is the kernel as it was when the block began, `e_B` 0 from j on."""
        e_B, state = carry
        w = _row(W, i1 + j) - dot(_row(U_B.T, j), e_B)
        ahead = lambda m: _cut(W, i1 + j, m) - dot(_cut(U_B.T, j, m), e_B)  # noqa: E731
        state, value = choose(state, i1 + j, w, W, ahead)
        e = (w - value) / U_B[j, j]
        return _put(e_B, e[None], j, 0), state

    def block(b: Array, carry: Any) -> Any:
        W, loss, state = carry
        i1 = b * B
        U_rows = _cut(U, i1, B)  # (B, padded)
        state = begin(state, i1, W)
        step = functools.partial(column, i1=i1, W=W, U_B=_cut(U_rows, i1, B, 1))
        e_B, state = jax.lax.fori_loop(0, B, step, (jnp.zeros((B, out)), state))

        def trail(c: Array, W: Array) -> Array:  # rows already done change too, and are never read again
            return _put(W, _cut(W, c * chunk, chunk) - dot(_cut(U_rows, c * chunk, chunk, 1).T, e_B), c * chunk, 0)

        W = jax.lax.fori_loop((i1 + B) // chunk, padded // chunk, trail, W)
        return W, loss + jnp.sum(e_B**2, axis=0), state

    _, loss, state = jax.lax.fori_loop(0, padded // B, block, (W, jnp.zeros(out), state))
    return state, loss.sum() / 2
