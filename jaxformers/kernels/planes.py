"""Products with low-bit weights in planes, the layout of :mod:`jaxformers.kernels.planes_layout`.

    y[o] = Σ_groups scale[g, o] · Σ_{i in g} (code[i, o] - zero[g, o]) · x[i]      (GPTQ's weights, arXiv 2210.17323)

Bytes moved: k·n·bits / 8 of cells, 4·n for each group, activations m·k once for each tile of outputs (of which the L2
cache serves most) and m·n. FLOPs 2·m·k·n. What an H100 measured against XLA's product of the bfloat16 matrix stands in
benchmarks/results/kernels_lowbit.md. On a GPU up to 32 rows in 16 bits are :mod:`jaxformers.kernels.planes_mosaic`'s,
more of them :mod:`jaxformers.kernels.planes_gpu`'s, of which many are better served by writing the matrix out in the
dtype of x (:func:`jaxformers.kernels.planes_gpu.dense`) and XLA's product.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxformers.kernels import lowbit, planes_gpu, planes_mosaic
from jaxformers.kernels.planes_layout import Planes, Shape, codes_of, plane_of, scales_and_zeros

Implementation = Literal["xla", "gpu"]


def shape_of(planes: Planes, m: int, bits: int, k: int, group_size: int) -> Shape:
    """What the kernels must know of a product with `m` rows. Raises ValueError where sizes disagree."""
    groups, n = planes.levels.shape
    group = k if groups == 1 else group_size
    plane = plane_of(group, groups, bits)
    if plane == 0 or groups != -(-k // group):
        raise ValueError(
            f"group_size={group_size}: expected {groups} groups of whole planes of 32 inputs in {k} inputs"
        )
    shape = Shape(m, k, n, bits, group, groups, plane, planes.negative is not None)
    if planes.cells.shape != shape.cells:
        raise ValueError(f"planes: expected cells {shape.cells} for {bits} bits, found {planes.cells.shape}")
    return shape


def dense(planes: Planes, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
    """The (k, n) matrix in `dtype`; the arithmetic is in float32. The definition that every kernel is held to."""
    codes = codes_of(planes, shape.bits, shape.plane, shape.k)
    group = jnp.arange(shape.k) // shape.group
    scale, zero = (table[group] for table in scales_and_zeros(planes.levels))
    if shape.ternary:
        return jnp.where(codes == 1, scale, jnp.where(codes == 2, planes.negative[group], 0)).astype(dtype)
    return (scale * (codes.astype(jnp.int32) - zero).astype(jnp.float32)).astype(dtype)


def choose(shape: Shape, dtype: Any, where: str | None = None) -> Implementation:
    """The implementation on `where` (:func:`jaxformers.kernels.lowbit.platform` if None): "gpu" on NVIDIA's Hopper.

    Elsewhere, and in programs for several devices, XLA's: there this layout has no advantage.
    """
    where = lowbit.platform() if where is None else where
    return "gpu" if where == "gpu" and shape.m > 0 and dtype in (jnp.bfloat16, jnp.float16, jnp.float32) else "xla"


def matmul(
    x: jax.Array,
    planes: Planes,
    *,
    bits: int,
    k: int,
    group_size: int = -1,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x (…, k) times the (k, n) matrix of :func:`dense` -> (…, n), in the dtype of x, accumulated in float32.

    Differentiable with respect to x. ``implementation`` overrides :func:`choose`; ``interpret`` runs a kernel on any
    machine, slowly. Raises ValueError for an implementation that does not exist and for shapes that disagree.
    """
    if x.shape[-1] != k:
        raise ValueError(f"x: expected {k} inputs, found {x.shape}")
    shape = shape_of(planes, math.prod(x.shape[:-1]), bits, k, group_size)
    chosen = choose(shape, x.dtype) if implementation is None else implementation
    if chosen not in ("xla", "gpu"):
        raise ValueError(f"implementation={implementation!r}: must be 'xla' or 'gpu'")
    y = _product((shape, chosen, interpret), x.reshape(shape.m, k), planes)
    return y.reshape(*x.shape[:-1], shape.n)


def _transposed(planes: Planes, how, dtype: Any) -> jax.Array:
    """The matrix as (n, k): as a kernel writes it, or by XLA."""
    shape, chosen, interpret = how
    if chosen == "gpu":
        return planes_gpu.dense(planes, shape, dtype, interpret=interpret)
    return dense(planes, shape, dtype).T


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how, x: jax.Array, planes: Planes) -> jax.Array:
    shape, chosen, interpret = how
    if chosen == "gpu" and not interpret and planes_mosaic.takes(shape, x.dtype):
        return planes_mosaic.matmul(x, planes, shape)
    tile = planes_gpu.tile_for(shape, x.dtype) if chosen == "gpu" else None
    if tile is not None:
        return planes_gpu.matmul(x, planes, shape, tile, interpret)
    return lax.dot_general(x, _transposed(planes, how, x.dtype), (((1,), (1,)), ((), ())))


def _forward(how, x: jax.Array, planes: Planes):
    return _product(how, x, planes), planes


def _backward(how, planes: Planes, dy: jax.Array):
    """dx = dy Wᵀ, with W written out anew: no dense matrix waits for the backward pass."""
    return dy @ _transposed(planes, how, dy.dtype), None


_product.defvjp(_forward, _backward)
