"""Quantisation grids against the official quantiser."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformers.compress.grids import Grid, dequantize, fit, quantize, zero_code

VARIANTS = [f"b{b}_{s}_{m}" for b in (2, 3, 4, 8) for s in ("sym", "asym") for m in ("minmax", "mse")]


def grid_of(variant: str) -> Grid:
    if variant.startswith("ternary"):
        return Grid(2, sym=variant == "ternary_sym", ternary=True)
    bits, sym, search = variant.split("_")
    return Grid(int(bits[1:]), sym=sym == "sym", mse=search == "mse")


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("variant", [*VARIANTS, "ternary_sym", "ternary_asym"])
def test_equals_the_official_quantiser(oracles, variant, jit):
    z = np.load(oracles / "gptq/grids.npz")
    assert variant in json.loads(str(z["options"]))["variants"]
    grid, x = grid_of(variant), jnp.asarray(z["W"].T)

    def run(x):
        scale, zero = fit(grid, x)
        return scale, zero, dequantize(grid, quantize(grid, x, scale, zero), scale, zero)

    scale, zero, values = (jax.jit(run) if jit else run)(x)
    np.testing.assert_allclose(scale, z[f"{variant}_scale"][:, 0], rtol=1e-6)
    np.testing.assert_array_equal(zero, z[f"{variant}_zero"][:, 0])
    np.testing.assert_allclose(values.T, z[f"{variant}_dequant"], rtol=1e-6)


@given(
    st.sampled_from(VARIANTS),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["normal", "positive", "negative", "zeros", "one"]),
)
def test_invariants(variant, seed, kind):
    grid = grid_of(variant)
    x = np.random.default_rng(seed).standard_normal((24, 3)).astype(np.float32)
    x = {
        "normal": x,
        "positive": abs(x),
        "negative": -abs(x),
        "zeros": 0 * x,
        "one": x * (np.arange(24) == 5)[:, None],
    }[kind]
    scale, zero = fit(grid, jnp.asarray(x))
    codes = quantize(grid, jnp.asarray(x), scale, zero)
    values = dequantize(grid, codes, scale, zero)
    assert codes.dtype == jnp.uint8 and int(codes.max()) <= grid.maxq
    assert bool(jnp.all(scale > 0)) and bool(jnp.all((zero >= 0) & (zero <= grid.maxq) & (zero == jnp.round(zero))))
    np.testing.assert_array_equal(dequantize(grid, zero_code(grid, zero), scale, zero), 0)
    np.testing.assert_array_equal(quantize(grid, values, scale, zero), codes)  # values lie on the grid
    if kind == "normal" and not grid.mse:
        slack = 0.5 if not grid.sym else 1.0  # the extreme of a symmetric slice clips by half a step
        assert bool(jnp.all(jnp.abs(values - x) <= (slack + 1e-4) * scale))


@pytest.mark.parametrize("sym", [False, True])
def test_rows_of_zeros_change_nothing(sym):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((20, 8)), jnp.float32)
    for mse in (False, True):
        grid = Grid(3, sym=sym, mse=mse)
        for a, b in zip(fit(grid, x), fit(grid, jnp.pad(x, ((0, 12), (0, 0)))), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_symmetric_quirk():
    """A slice without negative entries keeps the asymmetric scale and the middle as zero, so its upper half clips."""
    scale, zero = fit(Grid(4, sym=True), jnp.asarray([[1.5], [0.3]]))
    assert float(scale[0]) == pytest.approx(0.1) and float(zero[0]) == 8
    codes = quantize(Grid(4, sym=True), jnp.asarray([[1.5]]), scale, zero)
    assert int(codes[0, 0]) == 15 and float(dequantize(Grid(4, sym=True), codes, scale, zero)[0, 0]) < 0.71


def test_scales_are_what_the_stored_type_holds():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((32, 64)) * 10.0 ** np.arange(-9, 7, 0.25), jnp.float32)
    for sym in (False, True):
        scale, _ = fit(Grid(4, sym=sym, scale_dtype="float16"), x)
        np.testing.assert_array_equal(scale, scale.astype(jnp.float16).astype(jnp.float32))
        assert bool(jnp.all((scale > 0) & jnp.isfinite(scale)))
        exact, _ = fit(Grid(4, sym=sym), x)
        usual = (exact > 1e-4) & (exact < 6e4)
        np.testing.assert_allclose(scale[usual], exact[usual], rtol=5e-4)


def test_other_bits_do_not_compile_again():
    compiled = []

    @jax.jit
    def run(grid, x):
        compiled.append(grid)
        return fit(grid, x)

    x = jnp.ones((8, 4))
    for bits in (2, 3, 4, 8):
        run(Grid(bits), x)
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bits": 5}, "bits=5"), ({"ternary": True, "mse": True}, "mse"), ({"scale_dtype": "int8"}, "scale_dtype")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Grid(**options)
