"""The layer-wise second-order statistic H = 2 · mean over samples of X Xᵀ, and the triangular factor of its inverse.

Source: GPTQ, arXiv 2210.17323, sections 3.2 and 3.3; Optimal Brain Surgeon. A *sample* is one sequence, whatever its
length. Everything here is float32 at the highest matmul precision: bfloat16 products, the default of some accelerators,
make the factorisation fail or, worse, succeed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.lax import linalg
from jaxtyping import Array, Float


def accumulate(
    H: Float[Array, "in in"], seen: Array | int, x: Float[Array, "*batch in"], mask: Array | None = None
) -> tuple[Array, Array]:
    """Running mean over samples: add the inputs `x` of a layer to `H`, which holds `seen` samples. Returns both anew.

    `x` (B, ..., in) adds B samples, a matrix (tokens, in) adds one. `mask`, of the shape of `x` without its last axis,
    is 0 where a token is padding and must not count.
    """
    new = x.shape[0] if x.ndim > 2 else 1
    x = x.astype(jnp.float32)
    if mask is not None:
        x = jnp.where(mask[..., None] != 0, x, 0.0)
    x = x.reshape(-1, x.shape[-1])
    total = seen + new
    gram = jnp.matmul(x.T, x, precision="highest")
    return H * (seen / total) + gram * (2 / total), total


def accumulate_norms(
    norms: Float[Array, " in"], seen: Array | int, x: Float[Array, "*batch in"], mask: Array | None = None
) -> tuple[Array, Array]:
    """The same for the squared norms of the columns, mean over samples of ‖X_j‖² (Wanda): half the diagonal of H."""
    new = x.shape[0] if x.ndim > 2 else 1
    x = x.astype(jnp.float32)
    if mask is not None:
        x = jnp.where(mask[..., None] != 0, x, 0.0)
    total = seen + new
    return norms * (seen / total) + jnp.sum(x.reshape(-1, x.shape[-1]) ** 2, axis=0) / total, total


def inverse_factor(H: Float[Array, "in in"]) -> Float[Array, "in in"]:
    """The upper triangular U with `inv(H) = Uᵀ U`; not finite where `H` is not positive definite.

    The published three steps (factorise, invert, factorise the inverse) in two: with J the reversal of all rows,
    `J H J = L Lᵀ` gives `inv(H) = (J inv(L) J)ᵀ (J inv(L) J)`, and that factor is upper triangular and unique.
    """
    L = linalg.cholesky(H[::-1, ::-1], symmetrize_input=False)
    return _inverse_lower(L)[::-1, ::-1]


def _inverse_lower(L: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """inv([[A, 0], [B, C]]) = [[inv A, 0], [-inv C B inv A, inv C]]: mostly matrix products."""
    n = L.shape[0]
    if n <= 384:
        return linalg.triangular_solve(L, jnp.eye(n, dtype=L.dtype), left_side=True, lower=True)
    h = n // 2
    dot = functools.partial(jnp.matmul, precision="highest")
    A, C = _inverse_lower(L[:h, :h]), _inverse_lower(L[h:, h:])
    return jnp.block([[A, jnp.zeros((h, n - h), L.dtype)], [-dot(C, dot(L[h:, :h], A)), C]])


def damped_factor(H: Float[Array, "in in"], damp: Array | float, tries: int = 5) -> tuple[Array, Array]:
    """(U, damp used): the factor of `H + damp · mean(diag H) · I`; ten times more damping after each failure.

    When all `tries` fail the factor is not finite: the caller must look.
    """
    mean, n = jnp.mean(jnp.diagonal(H)), H.shape[0]
    diagonal = jax.lax.broadcasted_iota(jnp.int32, (n, n), 0) == jax.lax.broadcasted_iota(jnp.int32, (n, n), 1)
    factor = lambda d: inverse_factor(H + jnp.where(diagonal, d * mean, 0))  # noqa: E731
    failed = lambda U: ~jnp.all(jnp.isfinite(jnp.diagonal(U)))  # noqa: E731  a failure reaches the diagonal

    def retry(state):
        i, d, _ = state
        return i + 1, 10 * d, factor(10 * d)

    damp = jnp.asarray(damp, jnp.float32)
    state = jax.lax.while_loop(lambda s: failed(s[2]) & (s[0] < tries), retry, (1, damp, factor(damp)))
    return state[2], state[1]
