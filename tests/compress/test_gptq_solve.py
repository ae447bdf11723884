"""The Hessian and the column solver against the official code, and against an independent solve in float64."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.compress import hessian
from jaxformers.compress.columns import dense, round_to_nearest, solve
from jaxformers.compress.grids import Grid

SMALL = ["row_4b_asym", "ternary_g8_asym"]  # in the repository; the others are larger
LARGE = [
    "row_2b_sym", "row_3b_actorder", "row_3b_asym_multiblock", "row_8b_sym", "g128_3b_asym", "g32_2b_static",
    "g32_4b_sym", "g64_4b_actorder_dynamic", "g64_4b_actorder_static", "ternary_sym",
]  # fmt: skip


def correlated(n, out, seed=0, samples=400):
    """A kernel (n, out) and the Hessian of correlated inputs."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((n, n)) / n**0.5 + 0.5 * np.eye(n)
    X = rng.standard_normal((samples, n)) @ mix
    return rng.standard_normal((n, out)).astype(np.float32), (2 * X.T @ X / samples).astype(np.float32)


def error(kernel, values, H):
    D = np.asarray(kernel, np.float64) - np.asarray(values, np.float64)
    return float(np.sum(D * (np.asarray(H, np.float64) @ D)))


def reference(kernel, H, bits, damp=0.01):
    """Row grids, asymmetric, column by column in float64: textbook Optimal Brain Surgeon without any Cholesky."""
    W, H, maxq = np.asarray(kernel, np.float64).copy(), np.asarray(H, np.float64), 2**bits - 1
    low, high = np.minimum(W.min(0), 0), np.maximum(W.max(0), 0)
    scale = ((high - low).astype(np.float32) / np.float32(maxq)).astype(np.float64)
    zero = np.round(-low / scale)
    codes = np.zeros(W.shape, int)
    inverse = np.linalg.inv(H + damp * np.mean(np.diag(H)) * np.eye(len(H)))
    for i in range(len(W)):
        codes[i] = np.clip(np.round(W[i] / scale) + zero, 0, maxq)
        e = (W[i] - scale * (codes[i] - zero)) / inverse[0, 0]
        W[i + 1 :] -= np.outer(inverse[0, 1:], e)
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return codes


def test_hessian_is_a_running_mean_over_samples(oracles):
    z = np.load(oracles / "gptq/hessian.npz")
    H, seen = jnp.zeros((24, 24)), 0
    for i in range(json.loads(str(z["options"]))["n_batches"]):
        H, seen = hessian.accumulate(H, seen, jnp.asarray(z[f"x{i}"]))
        np.testing.assert_allclose(H, z[f"H_after{i}"], rtol=1e-5, atol=1e-5 * np.abs(H).max())
    assert seen == json.loads(str(z["options"]))["nsamples"]


def test_padding_does_not_count():
    x = jax.random.normal(jax.random.key(0), (3, 5, 8))
    mask = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    H, _ = hessian.accumulate(jnp.zeros((8, 8)), 0, x, mask)
    kept = np.concatenate([np.asarray(x)[i, : int(n)] for i, n in enumerate(mask.sum(1))])
    np.testing.assert_allclose(H, 2 * kept.T @ kept / 3, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [5, 384, 500])
def test_inverse_factor(n):
    _, H = correlated(n, 1, samples=3 * n)
    H = H + 0.01 * np.mean(np.diag(H)) * np.eye(n, dtype=np.float32)
    U = np.asarray(hessian.inverse_factor(jnp.asarray(H)), np.float64)
    np.testing.assert_array_equal(U, np.triu(U))
    three_steps = np.linalg.cholesky(np.linalg.inv(H.astype(np.float64))).T
    np.testing.assert_allclose(U, three_steps, atol=2e-5 * np.abs(three_steps).max())


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_equals_the_official_code(request, name):
    root = request.getfixturevalue("oracles") if name in SMALL else request.getfixturevalue("shared") / "oracles"
    z = np.load(root / f"gptq/solve_{name}.npz")
    o = json.loads(str(z["options"]))
    grid = Grid(o["bits"], sym=o["sym"], ternary=o["ternary"], mse=o["mse"])
    H, seen = jnp.zeros(z["H"].shape), 0
    for x in z["X"]:
        H, seen = hessian.accumulate(H, seen, x[None])
    np.testing.assert_allclose(H, z["H"], rtol=1e-4, atol=1e-5 * np.abs(z["H"]).max())
    names = ("act_order", "static_groups", "blocksize")
    solved = solve(
        jnp.asarray(z["W"].T), z["H"], o["percdamp"], grid=grid, group_size=o["groupsize"], **{k: o[k] for k in names}
    )
    values = np.asarray(dense(grid, solved)).T
    assert (np.abs(values - z["Q"]) <= 1e-5 * np.abs(z["Q"]).max()).mean() >= 0.999
    assert float(solved.loss) == pytest.approx(float(z["loss"]), rel=1e-3)
    assert error(z["W"].T, values.T, z["H"]) == pytest.approx(float(z["err_gptq"]), rel=1e-3)
    assert float(solved.damp) == pytest.approx(o["percdamp"])
    if "q_int" in z:
        assert (solved.codes.T == z["q_int"]).mean() >= 0.999
        np.testing.assert_array_equal(solved.g_idx, z["g_idx"])
        np.testing.assert_allclose(solved.scales.T, z["scale"], rtol=1e-4)
    if "Q_rtn" in z:
        np.testing.assert_allclose(dense(grid, round_to_nearest(z["W"].T, grid=grid)).T, z["Q_rtn"], rtol=1e-6)
        assert 1.5 < float(z["err_rtn"]) / error(z["W"].T, values.T, z["H"])


@pytest.mark.parametrize("bits", [2, 4])
def test_equals_an_independent_solve_in_float64(bits):
    kernel, H = correlated(160, 12)
    solved = solve(kernel, H, grid=Grid(bits))
    assert (np.asarray(solved.codes) == reference(kernel, H, bits)).mean() >= 0.999


def test_the_loss_is_half_the_damped_error():
    kernel, H = correlated(150, 16)
    for options in ({}, {"group_size": 32}, {"act_order": True}, {"group_size": 40, "static_groups": True}):
        solved = solve(kernel, H, 0.01, grid=Grid(3), **options)
        damped = H + 0.01 * np.mean(np.diag(H)) * np.eye(len(H))
        assert float(solved.loss) == pytest.approx(error(kernel, dense(Grid(3), solved), damped) / 2, rel=1e-3)


def test_with_the_identity_as_hessian_it_is_rounding_to_nearest():
    kernel, _ = correlated(96, 16)
    for group_size in (-1, 32):
        for sym in (False, True):
            grid = Grid(4, sym=sym)
            ours = solve(kernel, jnp.eye(96), grid=grid, group_size=group_size)
            nearest = round_to_nearest(kernel, grid=grid, group_size=group_size)
            for a, b in zip(ours[:4], nearest[:4], strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("act_order", [False, True])
def test_block_sizes_agree_for_row_grids(act_order):
    kernel, H = correlated(150, 8)
    found = [solve(kernel, H, grid=Grid(3), act_order=act_order, blocksize=b).codes for b in (1, 32, 128, 200)]
    for codes in found[1:]:
        assert (np.asarray(codes) == np.asarray(found[0])).mean() >= 0.998


@pytest.mark.parametrize("options", [{}, {"static_groups": True}, {"act_order": True}])
@pytest.mark.parametrize("group_size", [32, 48, 100, 128, 200])
def test_ragged_groups(group_size, options):
    kernel, H = correlated(150, 8)
    solved = solve(kernel, H, grid=Grid(4), group_size=group_size, **options)
    groups = -(-150 // group_size)
    assert solved.scales.shape == solved.zeros.shape == (groups, 8)
    assert sorted(np.asarray(solved.g_idx)) == sorted(np.arange(150) // group_size)
    assert bool(jnp.all(solved.scales > 0))
    nearest = round_to_nearest(kernel, grid=Grid(4), group_size=group_size)
    assert error(kernel, dense(Grid(4), solved), H) < error(kernel, dense(Grid(4), nearest), H)


def test_dead_inputs_get_weight_zero_and_cost_nothing():
    kernel, H = correlated(64, 8)
    dead = np.zeros(64, bool)
    dead[[3, 40, 63]] = True
    H = np.where(dead[:, None] | dead[None], 0, H)
    for options in ({}, {"group_size": 16}, {"act_order": True}):
        values = np.asarray(dense(Grid(4), solve(kernel, H, grid=Grid(4), **options)))
        np.testing.assert_array_equal(values[dead], 0)
        assert np.abs(values[~dead]).max() > 1


@pytest.mark.parametrize("grid", [Grid(4), Grid(3, sym=True), Grid(2, ternary=True)])
def test_masked_weights_stay_zero_and_are_made_up_for(grid):
    kernel, H = correlated(96, 16)
    mask = np.random.default_rng(1).random((96, 16)) > 0.4
    solved = solve(kernel, H, mask=mask, grid=grid, group_size=32)
    values = np.asarray(dense(grid, solved))
    np.testing.assert_array_equal(values[~mask], 0)
    nearest = np.asarray(dense(grid, round_to_nearest(kernel, mask, grid=grid, group_size=32)))
    np.testing.assert_array_equal(nearest[~mask], 0)
    masked = np.where(mask, kernel, 0)
    assert error(masked, values, H) < 0.8 * error(masked, nearest, H)


def test_damping_grows_until_the_hessian_factorises():
    kernel, _ = correlated(64, 8)
    H = -0.05 * np.eye(64, dtype=np.float32) + np.diag(np.linspace(0.05, 1, 64, dtype=np.float32))
    solved = solve(kernel, H, 1e-4, grid=Grid(4))  # -0.05 + 0.05 and so on: no damping below 0.1 makes it definite
    H_indefinite = H - 0.02 * np.eye(64, dtype=np.float32)
    retried = solve(kernel, H_indefinite, 1e-4, grid=Grid(4))
    assert float(solved.damp) == pytest.approx(1e-4) and np.isfinite(float(solved.loss))
    assert float(retried.damp) == pytest.approx(0.1) and np.isfinite(float(retried.loss))
    hopeless = solve(kernel, -np.eye(64, dtype=np.float32), 0.01, grid=Grid(4))
    assert not np.isfinite(float(hopeless.loss))


def test_one_compile_for_all_bits_and_no_python_loop_over_columns():
    """Four times the columns: one loop still; only the inverse, which is split in halves, has two more levels."""
    counts = []
    for n in (256, 1024):
        kernel, H = jax.ShapeDtypeStruct((n, 64), jnp.float32), jax.ShapeDtypeStruct((n, n), jnp.float32)
        program = jax.make_jaxpr(lambda k, h: solve(k, h, grid=Grid(4), group_size=128))(kernel, H)
        counts.append(len(str(program).splitlines()))
    assert counts[1] < 2 * counts[0]
    kernel, H = correlated(64, 8)
    solve(kernel, H, 0.01, grid=Grid(2), blocksize=64)
    before = solve._cache_size()
    for bits in (3, 4, 8):
        solve(kernel, H, 0.02, grid=Grid(bits), blocksize=64)
    assert solve._cache_size() == before


def test_many_outputs_by_vmap_equal_one_by_one():
    kernels, hessians = zip(*[correlated(32, 8, seed=s) for s in range(3)], strict=True)
    mapped = jax.vmap(lambda k, h: solve(k, h, grid=Grid(4), group_size=16))(np.stack(kernels), np.stack(hessians))
    for i in range(3):
        one = solve(kernels[i], hessians[i], grid=Grid(4), group_size=16)
        assert (np.asarray(mapped.codes[i]) == np.asarray(one.codes)).mean() > 0.99
