"""Weights in planes: the layout, the kernels in the interpreter, their PTX by hand, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import aot
from kernels.test_lowbit import KINDS, error, inputs
from kernels.threads import run_ptx

from jaxformers.kernels import planes, planes_gpu
from jaxformers.kernels.planes_layout import (
    Planes,
    arrange,
    codes_of,
    levels_of,
    plane_of,
    scales_and_zeros,
    unit,
)

BOUNDS = {"float32": 1e-6, "float16": 1.5e-3, "bfloat16": 8e-3}  # of the largest output
Tile = planes_gpu.Tile


def operands(kind, k, n, group_size, seed=0):
    """(Planes, the dense matrix in float64, its codes)."""
    rng = np.random.default_rng(seed)
    groups = 1 if group_size == -1 else -(-k // group_size)
    group = k if groups == 1 else group_size
    bits = 2 if kind == "ternary" else int(kind)
    scales = rng.uniform(0.01, 0.1, (groups, n)).astype(np.float16)
    at = np.arange(k) // group
    if kind == "ternary":
        codes, second = rng.integers(0, 3, (k, n)), -rng.uniform(0.01, 0.1, (groups, n)).astype(np.float16)
        dense = np.where(codes == 1, scales[at], np.where(codes == 2, second[at], 0)).astype(np.float64)
    else:
        codes, second = rng.integers(0, 2**bits, (k, n)), rng.integers(0, 2**bits, (groups, n))
        dense = scales.astype(np.float64)[at] * (codes - second[at])
    plane = plane_of(group, groups, bits)
    made = arrange(*map(jnp.asarray, (codes.astype(np.uint8), scales, second)), bits, plane, kind == "ternary")
    return made, dense, codes


def shape_of(kind, made, m, k, group_size):
    return planes.shape_of(made, m, 2 if kind == "ternary" else int(kind), k, group_size)


# -- layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "n", "group_size"), [(544, 40, 32), (1056, 33, 96), (512, 16, -1), (640, 72, 128)])
def test_the_layout_gives_everything_back(kind, k, n, group_size):
    made, dense, codes = operands(kind, k, n, group_size)
    shape = shape_of(kind, made, 1, k, group_size)
    assert made.cells.shape == shape.cells and made.cells.dtype == jnp.int16
    assert made.cells.nbytes == shape.bits * -(-k // shape.unit) * shape.unit * -(-n // 16) * 16 // 8  # and not more
    np.testing.assert_array_equal(codes_of(made, shape.bits, shape.plane, k), codes)
    np.testing.assert_array_equal(planes.dense(made, shape), dense.astype(np.float32))


def test_cells_are_where_the_docstring_says():
    codes = np.random.default_rng(0).integers(0, 16, (512, 32)).astype(np.uint8)
    made = arrange(jnp.asarray(codes), jnp.ones((1, 32)), jnp.zeros((1, 32)), 4, 64)
    for output, u, j, r in [(0, 0, 0, 0), (17, 1, 2, 5), (31, 1, 3, 63)]:
        cell = int(made.cells[output // 16, u, output % 16, r]) & 0xFFFF
        assert cell >> (4 * j) & 15 == codes[64 * (4 * u + j) + r, output]


@given(
    st.floats(width=16, allow_nan=False, allow_infinity=False, allow_subnormal=True),
    st.integers(0, 255),
    st.sampled_from(["float16", "bfloat16"]),
)
def test_levels_are_exact_for_halves(scale, zero, dtype):
    scale = jnp.asarray([scale], dtype)
    found, zeros = scales_and_zeros(levels_of(scale, jnp.asarray([zero])))
    assert int(zeros[0]) == zero and found.astype(dtype)[0] == scale[0]


def test_planes_hold_whole_groups():
    assert [plane_of(g, 2, b) for g, b in [(128, 4), (128, 3), (96, 4), (64, 8), (40, 4)]] == [64, 32, 32, 64, 0]
    assert plane_of(1000, 1, 4) == 64  # a single group
    assert [unit(b, 32) for b in (2, 3, 4, 8)] == [256, 512, 128, 64]


# -- kernels, interpreted ---------------------------------------------------------------------------------------------

CASES = [  # kind, dtype, m, k, n, group size, tile: splits that fit and that do not, rows and outputs beyond
    ("2", "bfloat16", 1, 1024, 64, 128, Tile(16, 16)),
    ("2", "float16", 5, 544, 40, 32, Tile(32, 16, splits=2)),
    ("3", "bfloat16", 1, 1056, 40, 96, Tile(16, 16, splits=2)),
    ("3", "float16", 20, 544, 72, -1, Tile(64, 16)),
    ("4", "bfloat16", 1, 1024, 64, 128, Tile(32, 16)),
    ("4", "bfloat16", 3, 1056, 40, 32, Tile(16, 16, splits=2)),
    ("4", "float16", 17, 640, 72, 64, Tile(64, 16, splits=2)),
    ("4", "bfloat16", 70, 512, 130, 256, Tile(64, 64)),
    ("4", "bfloat16", 2, 544, 40, -1, Tile(16, 16)),
    ("8", "bfloat16", 1, 512, 64, 128, Tile(16, 16)),
    ("8", "float16", 9, 544, 40, 32, Tile(64, 8, splits=3)),
    ("ternary", "bfloat16", 1, 1056, 40, 96, Tile(16, 16, splits=2)),
    ("ternary", "float16", 17, 512, 72, -1, Tile(64, 16, splits=2)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}x{c[3]}x{c[4]}-g{c[5]}")
def test_products_interpreted(case):
    kind, dtype, m, k, n, group_size, tile = case
    made, dense, _ = operands(kind, k, n, group_size)
    x = inputs(m, k, dtype)
    found = planes_gpu.matmul(x, made, shape_of(kind, made, m, k, group_size), tile, interpret=True)
    assert error(found, x, dense) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_kernel_is_the_definition(kind, dtype):
    made, dense, _ = operands(kind, 544, 40, 32)
    found = planes_gpu.dense(made, shape_of(kind, made, 1, 544, 32), jnp.dtype(dtype), interpret=True)
    np.testing.assert_array_equal(found, jnp.asarray(dense.T, jnp.float32).astype(dtype))


@settings(max_examples=8)
@given(
    st.sampled_from(KINDS),
    st.sampled_from([1, 2, 7, 17, 65]),
    st.integers(1, 40),
    st.integers(1, 70),
    st.sampled_from([-1, 32, 64, 96]),
    st.integers(0, 2**31),
)
def test_odd_shapes(kind, m, k, n, group_size, seed):
    made, dense, _ = operands(kind, 32 * k, n, group_size, seed)
    x = inputs(m, 32 * k, jnp.bfloat16, seed)
    bits = 2 if kind == "ternary" else int(kind)
    options = {"bits": bits, "k": 32 * k, "group_size": group_size}
    found = planes.matmul(x, made, **options, implementation="gpu", interpret=True)
    assert error(found, x, dense) < BOUNDS["bfloat16"]


@pytest.mark.parametrize("implementation", ["gpu", "xla"])
@pytest.mark.parametrize("kind", ["3", "4", "ternary"])
def test_gradients_vmap_and_jit(kind, implementation):
    made, dense, _ = operands(kind, 512, 40, 64)
    options = {"bits": 2 if kind == "ternary" else int(kind), "k": 512, "group_size": 64}
    f = lambda x: planes.matmul(x, made, **options, implementation=implementation, interpret=True)
    x, dy = inputs(6, 512, jnp.float32).reshape(2, 3, 512), inputs(6, 40, jnp.float32, seed=2).reshape(2, 3, 40)
    y, pull = jax.vjp(f, x)
    np.testing.assert_allclose(pull(dy)[0], np.asarray(dy, np.float64) @ dense.T, rtol=1e-4, atol=1e-4)
    assert all(leaf.size < 512 * 40 for leaf in jax.tree.leaves(pull))  # the cells wait, not a dense matrix
    for found in (y, jax.jit(f)(x), jax.vmap(f)(x)):
        np.testing.assert_allclose(found, np.asarray(x, np.float64) @ dense, rtol=1e-4, atol=1e-4)


# -- PTX, executed by hand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ptx_of_every_plane(kind, dtype, monkeypatch):
    """Code less zero, exactly, for every code, zero and plane, beside random neighbours."""
    dtype, bits = jnp.dtype(dtype), 2 if kind == "ternary" else int(kind)
    rng = np.random.default_rng(0)
    cells = [rng.integers(0, 2**16, 4096).astype(np.uint16) for _ in range(3 if bits == 3 else 1)]
    zeros = rng.integers(0, 2**bits, 4096)
    seen = []

    def asm(body, args, *, constraints, pack, result_shape_dtypes, **_):
        assert pack == 2 and constraints == ",".join(["=r"] + ["r"] * len(args))
        seen.append(len(args))
        left = run_ptx(body, [np.asarray(a).view(np.uint16).view(np.uint32) for a in args], dtype)
        return [left.view(np.uint16).view(dtype)]

    monkeypatch.setattr(
        planes_gpu.plgpu, "elementwise_inline_asm", lambda asm_, **o: asm(asm_, o.pop("args"), **o), False
    )
    held = planes_gpu._zeros(jnp.asarray(zeros), bits, dtype)
    wide = [c.astype(np.int64) for c in cells]
    for j in range(16 if bits == 3 else 16 // bits):
        if kind == "ternary":
            for i in (0, 1):
                found = planes_gpu._bit(cells[0], 2 * j + i, dtype, False)
                np.testing.assert_array_equal(found.astype(np.float64), wide[0] >> (2 * j + i) & 1)
            continue
        found = planes_gpu._plane(cells, np.asarray(held), j, bits, dtype, False)
        if bits == 3:
            last = sum((c >> 15) << i for i, c in enumerate(wide))
            code = last if j == 15 else wide[j // 5] >> (3 * (j % 5)) & 7
        else:
            code = wide[0] >> (bits * j) & (2**bits - 1)
        np.testing.assert_array_equal(found.astype(np.float64), code - zeros)
    assert seen


# -- what is chosen, compilers, errors --------------------------------------------------------------------------------


def test_the_choice():
    made, _, _ = operands("4", 512, 64, 128)
    shape = lambda m: shape_of("4", made, m, 512, 128)
    assert planes.choose(shape(1), jnp.bfloat16) == "xla"  # here
    assert planes.choose(shape(1), jnp.bfloat16, "gpu") == "gpu" and planes.choose(shape(1), jnp.int8, "gpu") == "xla"
    assert planes.choose(shape(1), jnp.bfloat16, "tpu") == planes.choose(shape(0), jnp.bfloat16, "gpu") == "xla"
    assert planes_gpu.tile_for(shape(64), jnp.bfloat16).splits == 8 and planes_gpu.tile_for(shape(256), jnp.float16)
    assert planes_gpu.tile_for(shape(4096), jnp.bfloat16) is planes_gpu.tile_for(shape(1), jnp.float32) is None


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_lower_for_cuda(kind):
    made, _, _ = operands(kind, 1056, 200, 32)
    options = {"bits": 2 if kind == "ternary" else int(kind), "k": 1056, "group_size": 32}
    f = lambda x, made: planes.matmul(x, made, **options, implementation="gpu")
    for m, dtype, name in [
        (1, "bfloat16", "mosaic_gpu"),
        (17, "float16", "mosaic_gpu"),
        (64, "bfloat16", "planes_matmul"),
    ]:
        assert name in aot.lower_for_cuda(f, jax.ShapeDtypeStruct((m, 1056), dtype), made)
    for m, dtype in [(1000, "bfloat16"), (3, "float32")]:
        assert "planes_dense" in aot.lower_for_cuda(f, jax.ShapeDtypeStruct((m, 1056), dtype), made)
    grad = jax.grad(lambda x, made: f(x, made).astype(jnp.float32).sum())
    assert "planes_dense" in aot.lower_for_cuda(grad, jax.ShapeDtypeStruct((2, 1056), "bfloat16"), made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 480}, "x: expected 480 inputs"),
        ({"group_size": 40}, "group_size=40"),
        ({"group_size": 64}, "group_size=64: expected 16 groups"),
        ({"bits": 8}, "planes: expected cells"),
        ({"implementation": "tpu"}, "implementation='tpu'"),
    ],
)
def test_errors_name_the_argument(change, message):
    made, _, _ = operands("4", 512, 40, 32)
    arguments = {"x": jnp.ones((2, 512)), "planes": made, "bits": 4, "k": 512, "group_size": 32} | change
    with pytest.raises(ValueError, match=message):
        planes.matmul(**arguments)
    assert isinstance(made, Planes)
