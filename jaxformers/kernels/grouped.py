"""Grouped matrix products: rows sorted by group, each group times its own matrix (the experts of a mixture).

    y_i = x_i W_{g(i)}, where the first sizes[0] rows belong to group 0, the next sizes[1] to group 1, …

Rows behind the last group give zeros. FLOPs 2·M·K·N whatever the number of groups; bytes: x and y once, and those of
the matrices that have rows.

:func:`choose`: XLA's ragged product, except on TPU v5e and v6e. There XLA multiplies every row with every matrix and
masks (G times the FLOPs by its own count, where v5p has a kernel), and JAX's Pallas kernel "megablox" runs instead.
This was compiled and counted for those TPUs, not measured on one. On CPUs and GPUs the ragged product is a masked
one as well, or what XLA makes of it.
"""

import jax
import jax.numpy as jnp

from jaxformers.kernels.lowbit import platform

TILE = (128, 1024, 1024)  # rows, inputs and outputs of a step: what float32's gradients leave room for in 16 MB
MASKING = ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e")  # where XLA's ragged product is a masked dense one


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x (M, K) by groups of ``sizes`` (G,) int32 rows times w (G, K, N): (M, N) in the dtype of x. Differentiable.

    ``implementation``: None (:func:`choose`), "xla" or "pallas_tpu". Raises ValueError for shapes that do not fit, and
    for a K or N that the kernel does not take (multiples of 128).
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or sizes.shape != w.shape[:1]:
        raise ValueError(
            f"x, w, sizes: expected (M, K), (G, K, N) and (G,), got {x.shape}, {w.shape} and {sizes.shape}"
        )
    implementation = implementation or choose(w.shape, x.dtype)
    # neither implementation promises anything behind the last group, of the product or of its gradient
    real = (jnp.arange(x.shape[0]) < sizes.sum())[:, None]
    x, w = jnp.where(real, x, 0), w.astype(x.dtype)
    if implementation == "xla":
        y = jax.lax.ragged_dot(x, w, sizes)
    elif implementation == "pallas_tpu":
        y = _megablox(x, w, sizes, interpret)
    else:
        raise ValueError(f"implementation: expected xla or pallas_tpu, got {implementation!r}")
    return jnp.where(real, y, 0)


def choose(shape: tuple[int, int, int], dtype) -> str:
    """The implementation for matrices of ``shape`` (G, K, N) and rows of ``dtype``, where this is being traced for."""
    fits = shape[1] % 128 == 0 and shape[2] % 128 == 0 and dtype in (jnp.bfloat16, jnp.float32)
    return "pallas_tpu" if fits and platform() == "tpu" and _kind() in MASKING else "xla"


def _kind() -> str:
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) or jax.devices()[0]
    return device.device_kind


def _megablox(x: jax.Array, w: jax.Array, sizes: jax.Array, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    rows, (_, k, n) = x.shape[0], w.shape
    if k % 128 or n % 128:
        raise ValueError(f"w: the kernel takes multiples of 128 inputs and outputs, got {k} and {n}")
    tile = min(TILE[0], -(-rows // 16) * 16)
    x = jnp.pad(x, ((0, -rows % tile), (0, 0)))
    tiling = (tile, min(TILE[1], k), min(TILE[2], n))
    return gmm(x, w, sizes, x.dtype, tiling, None, None, False, interpret)[:rows]
