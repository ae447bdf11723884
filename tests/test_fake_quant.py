"""Quantisers against the authors' code, the papers' equations, and what must hold for any input."""

import dataclasses

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformers.fake_quant import Quantiser, asymmetric, lsq, lsq_scale, symmetric, twn

RULES = {
    "twn_tensor": twn,
    "twn_row": lambda x: twn(x, "row"),
    "sym8_tensor": symmetric,
    "sym4_tensor": lambda x: symmetric(x, 4),
    "sym2_tensor": lambda x: symmetric(x, 2),
    "sym8_rows": lambda x: symmetric(x, 8, "row"),
    "asym8_tensor": asymmetric,
    "asym4_row": lambda x: asymmetric(x, 4, "row"),
}


@pytest.fixture(scope="module")
def oracle(oracles):
    return np.load(oracles / "teacher_intervention" / "quantisers.npz")


@pytest.mark.parametrize("tag", RULES)
def test_values_and_gradients_are_the_authors(oracle, tag):
    """In float64, as the oracle: an exact tie of the asymmetric quantiser is none in float32."""
    with jax.enable_x64():
        y, pull = jax.vjp(RULES[tag], jnp.asarray(oracle["x"], jnp.float64))
        np.testing.assert_allclose(y, oracle[tag], rtol=1e-12, atol=1e-12)
        if f"{tag}_grad" in oracle:
            grad = pull(jnp.asarray(oracle["upstream"], jnp.float64))[0]
            np.testing.assert_array_equal(grad, oracle[f"{tag}_grad"])
    at_clip = np.abs(oracle["x"]) == 2.5
    assert at_clip.any() and not np.any(oracle["twn_tensor_grad"][at_clip]), "the oracle has entries at the clip"


@pytest.mark.parametrize("rule", [symmetric, asymmetric])
def test_one_scale_for_each_batch_element_and_head(oracle, rule):
    with jax.enable_x64():
        y = rule(jnp.asarray(oracle["x4"], jnp.float64), 8, "head")
    name = {symmetric: "sym8_4d_per_head", asymmetric: "asym8_4d_per_head"}[rule]
    np.testing.assert_allclose(y, oracle[name], rtol=1e-12, atol=1e-12)


def test_float32_is_near_float64(oracle):
    for tag in ("twn_tensor", "twn_row", "sym8_tensor", "sym4_tensor", "sym2_tensor"):
        y = RULES[tag](jnp.asarray(oracle["x"]))
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, oracle[tag], rtol=1e-6, atol=1e-6)


def test_groups_of_zeros_give_zeros():
    x = jnp.zeros((3, 4)).at[1].set(jnp.array([1.0, -2.0, 0.1, 0.0]))
    for y in (twn(x, "row"), symmetric(x, 8, "row"), asymmetric(x, 8, "row")):
        assert not np.any(y[0]) and not np.any(y[2]) and np.any(y[1]) and np.isfinite(y).all()
    assert not np.any(twn(jnp.zeros((2, 2)))) and not np.any(symmetric(jnp.zeros(3)))


arrays = hnp.arrays(np.float32, (4, 5), elements=st.floats(-4, 4, width=32))  # one shape: each compiles anew


@settings(max_examples=25)
@given(arrays, st.sampled_from(["tensor", "row", "column"]), st.sampled_from([2, 4, 8]))
def test_what_holds_for_any_input(x, granularity, bits):
    axes = {"tensor": None, "row": -1, "column": -2}[granularity]
    y = np.asarray(twn(jnp.asarray(x), granularity))
    for group in np.moveaxis(y, axes, -1).reshape(-1, y.shape[axes]) if axes else [y.ravel()]:
        assert len(np.unique(np.abs(group[group != 0]))) <= 1, "one magnitude a group"
    assert np.all(y * x >= 0)
    y = np.asarray(symmetric(jnp.asarray(x), bits, granularity))
    step = np.abs(np.clip(x, -2.5, 2.5)).max(axes, keepdims=True) / (2 ** (bits - 1) - 1)
    assert np.all(np.abs(y - np.clip(x, -2.5, 2.5)) <= 0.5 * step + 1e-5)
    again = np.asarray(symmetric(jnp.asarray(y), bits, granularity))
    np.testing.assert_allclose(again, y, atol=1e-5)
    y = np.asarray(asymmetric(jnp.asarray(x), bits, granularity))
    span = np.ptp(np.clip(x, -2.5, 2.5), axis=axes, keepdims=True)
    assert np.all(np.abs(y - np.clip(x, -2.5, 2.5)) <= 0.5 * span / (2**bits - 1) + 1e-5)


def test_no_clip_and_half_precision():
    x = jnp.array([-7.0, 0.3, 5.0])
    y, pull = jax.vjp(lambda x: symmetric(x, 8, clip=None), x)
    assert y[0] == -7.0 and np.array_equal(pull(jnp.ones(3))[0], np.ones(3))
    half = symmetric(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and half[0] == -2.5
    tangent = jax.jvp(twn, (jnp.array([[1.0, 3.0]]),), (jnp.array([[5.0, 7.0]]),))[1]
    assert np.array_equal(tangent, [[5.0, 0.0]]), "forward mode too"


def test_lsq_is_equations_1_to_3():
    x, s, bits = np.array([-9.0, -0.74, 0.2, 0.55, 0.9, 9.0]), 0.25, 3
    low, high = -4, 3
    y, pull = jax.vjp(lambda x, s: lsq(x, s, bits), jnp.asarray(x, jnp.float32), jnp.float32(s))
    np.testing.assert_allclose(y, s * np.clip(np.round(x / s), low, high), rtol=1e-6)
    up = np.arange(1.0, 7.0)
    dx, ds = pull(jnp.asarray(up, jnp.float32))
    ratio = x / s
    inside = (ratio > low) & (ratio < high)
    np.testing.assert_array_equal(dx, up * inside)
    by_hand = np.where(inside, np.round(ratio) - ratio, np.where(ratio <= low, low, high))
    np.testing.assert_allclose(ds, (up * by_hand).sum() / np.sqrt(6 * high), rtol=1e-5)
    unsigned = lsq(jnp.array([-1.0, 10.0]), jnp.float32(1.0), 3, signed=False)
    assert np.array_equal(unsigned, [0.0, 7.0])


def test_lsq_learns_its_step():
    """From a step three times too large the error of rounding falls by following the gradient."""
    x = jax.random.normal(jax.random.key(0), (16, 32))
    begin = lsq_scale(x, 4, "column")
    assert begin.shape == (1, 32)
    np.testing.assert_allclose(begin[0], 2 * np.abs(x).mean(0) / np.sqrt(7), rtol=1e-6)
    error = lambda s: jnp.square(lsq(x, s, 4) - x).sum()
    scale = 3 * begin
    step = jax.jit(lambda s: s - 0.05 * jax.grad(error)(s))
    for _ in range(60):
        scale = step(scale)
    assert error(scale) < 0.5 * error(3 * begin)


def test_bad_input():
    for call, match in (
        (lambda: symmetric(jnp.ones(2), 1), "bits: symmetric takes 2 to 16, got 1"),
        (lambda: asymmetric(jnp.ones(2), 0), "bits: asymmetric takes 1 to 16"),
        (lambda: lsq(jnp.ones(2), jnp.float32(1), 1), "bits: lsq takes 2"),
        (lambda: twn(jnp.ones(2), "rows"), "granularity: expected one of tensor, row, column, head, got 'rows'"),
        (lambda: twn(jnp.ones(2), clip=0.0), "clip: expected a number above 0"),
        (lambda: Quantiser("ternary"), "kind: a quantiser is one of twn"),
        (lambda: Quantiser("twn", 3), "bits: ternary weights take 2, got 3"),
        (lambda: Quantiser("lsq", 4, "head"), "granularity: lsq"),
        (lambda: Quantiser("lsq", 4)(jnp.ones(2)), "scale: lsq needs one"),
        (lambda: Quantiser("twn", 2)(jnp.ones(2), jnp.ones(())), "scale: twn makes its own"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_a_quantiser_is_its_function():
    x = jax.random.normal(jax.random.key(1), (2, 3, 4, 5))
    assert np.array_equal(Quantiser("twn", 2, "column")(x), twn(x, "column"))
    assert np.array_equal(Quantiser("symmetric", 4, "head", None)(x), symmetric(x, 4, "head", clip=None))
    assert np.array_equal(Quantiser("asymmetric", 3)(x), asymmetric(x, 3))
    assert np.array_equal(Quantiser("lsq", 5)(x, jnp.float32(0.1)), lsq(x, jnp.float32(0.1), 5))
    rule = Quantiser("symmetric", 4)
    assert hash(rule) == hash(Quantiser(**dataclasses.asdict(rule))) and rule == Quantiser(**dataclasses.asdict(rule))


def test_small_groups_do_not_overflow():
    """Scales beyond float16, and beyond float32: levels where there can be any, else zeros."""
    small = jnp.asarray([1e-3, -5e-4, 0], jnp.float16)
    y = symmetric(small, 8)
    assert y.dtype == jnp.float16 and np.abs(np.asarray(y - small, np.float32)).max() <= 0.5e-3 / 127 * 1.1
    assert np.array_equal(symmetric(jnp.full(3, 5e-38), 8), np.zeros(3))
    wide = np.asarray(symmetric(jnp.asarray([3e-36, 1e-36]), 8))
    np.testing.assert_allclose(wide, [3e-36, 1e-36], atol=0.5 * 3e-36 / 127)
