"""The Hopper kernel of products of few rows: every thread of it run by NumPy, and what it takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.test_lowbit import KINDS, error, inputs
from kernels.test_planes import BOUNDS, operands, shape_of
from kernels.threads import Threads

from jaxformers.kernels import planes_mosaic
from jaxformers.kernels.planes_mosaic import Tile, takes, tile_for


def run(x, made, shape, tile):
    """The kernel, thread by thread."""
    half = "bf16" if x.dtype == jnp.bfloat16 else "f16"
    w = Threads(half, -(-shape.cells[0] // tile.blocks), tile.warps)
    cells, *tables = (np.asarray(a) for a in made if a is not None)
    y = np.full((shape.m, shape.n), np.nan, x.dtype)
    sums = np.full((w.shape[0], tile.warps * tile.blocks * 16 * -(-shape.m // 8) * 8), np.nan, np.float32)
    planes_mosaic.compute(w, np.asarray(x), cells, tables, y, sums, shape, tile)
    return y


CASES = [  # kind, dtype, m, k, n, group size, tile: units, rows and outputs that fit and that do not
    ("2", "bfloat16", 1, 1024, 64, 128, Tile(2, 4)),
    ("2", "float16", 5, 544, 40, 32, Tile(1, 4)),
    ("3", "bfloat16", 1, 1056, 40, 96, Tile(2, 4)),
    ("3", "float16", 20, 2048, 72, -1, Tile(1, 4)),
    ("4", "bfloat16", 1, 4096, 64, 128, Tile(2, 4)),
    ("4", "bfloat16", 3, 1056, 40, 32, Tile(2, 8)),
    ("4", "float16", 16, 640, 72, 64, Tile(4, 4)),
    ("4", "bfloat16", 9, 3072, 48, 256, Tile(2, 4)),
    ("8", "bfloat16", 8, 512, 64, 128, Tile(2, 4)),
    ("8", "float16", 9, 544, 40, 32, Tile(1, 8)),
    ("ternary", "bfloat16", 1, 1056, 40, 96, Tile(2, 4)),
    ("ternary", "float16", 17, 512, 72, -1, Tile(2, 4)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}x{c[3]}x{c[4]}-g{c[5]}")
def test_products(case):
    kind, dtype, m, k, n, group_size, tile = case
    made, dense, _ = operands(kind, k, n, group_size)
    x = inputs(m, k, dtype)
    assert error(run(x, made, shape_of(kind, made, m, k, group_size), tile), x, dense) < BOUNDS[dtype]


@settings(max_examples=12)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 24),
    st.integers(1, 60),
    st.integers(1, 70),
    st.sampled_from([-1, 32, 64, 96]),
    st.integers(0, 2**31),
)
def test_odd_shapes(kind, m, k, n, group_size, seed):
    made, dense, _ = operands(kind, 32 * k, n, group_size, seed)
    x = inputs(m, 32 * k, jnp.bfloat16, seed)
    assert error(run(x, made, shape_of(kind, made, m, 32 * k, group_size), Tile(2, 4)), x, dense) < BOUNDS["bfloat16"]


def test_what_it_takes():
    made, _, _ = operands("4", 512, 64, 128)
    shape = lambda m: shape_of("4", made, m, 512, 128)
    assert takes(shape(1), jnp.bfloat16) and takes(shape(32), jnp.float16)
    assert not (takes(shape(33), jnp.bfloat16) or takes(shape(0), jnp.bfloat16) or takes(shape(1), jnp.float32))
    large = dataclasses.replace(shape(1), k=2**17, n=2**17)
    assert not takes(large, jnp.bfloat16)  # its cells lie beyond 32-bit offsets


@pytest.mark.parametrize("kind", KINDS)
def test_the_tiles_that_are_chosen(kind):
    """Each is one that a block can be: warps of whole warpgroups, at most 1024 threads, and the right answer."""
    made, dense, _ = operands(kind, 1024, 72, 128)
    for m in (1, 4, 9, 32):
        x, shape = inputs(m, 1024, jnp.bfloat16), shape_of(kind, made, m, 1024, 128)
        tile = tile_for(shape)
        assert tile.warps % 4 == 0 and tile.warps <= 32
        assert error(run(x, made, shape, tile), x, dense) < BOUNDS["bfloat16"]


def test_the_next_kernel_is_let_in_only_after_the_wait():
    """A kernel that may begin early waits before it reads anything; one that was not asked to has no part in it."""
    made, _, _ = operands("4", 512, 64, 128)
    shape = shape_of("4", made, 2, 512, 128)
    x = inputs(2, 512, jnp.bfloat16)
    text = lambda early: str(jax.make_jaxpr(lambda x: planes_mosaic.matmul(x, made, shape, Tile(early=early)))(x))
    wait, release, body = (text(True).index(n) for n in ("griddepcontrol_wait", "launch_dependents", "inline_mgpu"))
    assert wait < release < body
    assert "griddepcontrol" not in text(False) and "inline_mgpu" in text(False)


def test_what_it_refuses():
    made, _, _ = operands("4", 512, 64, 128)
    shape = lambda m: shape_of("4", made, m, 512, 128)
    for x, m, tile, message in (
        (jnp.zeros((33, 512), jnp.bfloat16), 33, Tile(), "up to 32 rows in 16 bits"),
        (jnp.zeros((2, 512)), 2, Tile(), "found float32"),
        (jnp.zeros((3, 512), jnp.bfloat16), 2, Tile(), "x: expected"),
        (jnp.zeros((2, 512), jnp.bfloat16), 2, Tile(warps=6), "multiple of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            planes_mosaic.matmul(x, made, shape(m), tile)
