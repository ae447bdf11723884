"""Running statistics in `fit`: they follow their batches instead of being optimised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers as jf
from jaxformers.train import OptimConfig, TrainConfig, fit

OPTIM = OptimConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5, no_decay=())


def objective(apply, params, batch, key):
    mean = batch["x"].mean(0)
    used = params["norm"]["mean"] if key is None else mean
    loss = jnp.square((batch["x"] - used) @ params["w"] - 1).mean()
    return loss, {"size": jnp.abs(used).sum(), **({} if key is None else {"running": {"norm.mean": mean}})}


def data(steps):
    x = np.random.default_rng(0).normal(2, 1, (steps, 8, 3)).astype(np.float32)
    return x, [{"x": batch} for batch in x]


def params():
    return {"w": jnp.ones(3), "norm": {"mean": jnp.zeros(3)}}


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"ema": 0.5}])
def test_statistics_follow(settings):
    x, batches = data(4)
    train = TrainConfig(steps=4, optim=OPTIM, progress=False, **settings)
    done = fit(objective, params(), batches, train, key=jax.random.key(0), eval_data=batches)
    expected, average = np.zeros(3), np.zeros(3)
    for batch in x:
        expected = 0.9 * expected + 0.1 * batch.mean(0)
        average = 0.5 * average + 0.5 * expected
    np.testing.assert_allclose(done.params["norm"]["mean"], expected, rtol=1e-5)
    if "ema" in settings:
        np.testing.assert_allclose(done.ema["norm"]["mean"], average, rtol=1e-5)
    evaluated = average if "ema" in settings else expected
    assert done.last("eval_size") == pytest.approx(np.abs(evaluated).sum(), rel=1e-5)
    assert not np.allclose(done.params["w"], 1) and "running" not in done.history[-1]


def test_frozen_statistics_stay():
    _, batches = data(2)
    train = TrainConfig(steps=2, optim=OPTIM, freeze=("norm.**",), progress=False)
    done = fit(objective, params(), batches, train, key=jax.random.key(0))
    assert not np.any(done.params["norm"]["mean"]) and not np.allclose(done.params["w"], 1)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
def test_over_a_mesh_they_are_those_of_the_whole_batch():
    _, batches = data(2)
    train = TrainConfig(steps=2, optim=OPTIM, progress=False)
    runs = [fit(objective, params(), batches, train, key=jax.random.key(0), mesh=mesh).params
            for mesh in (None, jf.mesh("data=8"))]  # fmt: skip
    for one, spread in zip(*map(jax.tree.leaves, runs), strict=True):
        np.testing.assert_allclose(spread, one, rtol=1e-5)


@pytest.mark.parametrize(
    ("running", "message"),
    [({"norm.var": jnp.zeros(3)}, "norm.var is none"), ({"norm.mean": jnp.zeros(2)}, r"has shape \(3,\), not \(2,\)")],
)
def test_what_is_no_statistic(running, message):
    _, batches = data(1)
    with pytest.raises(ValueError, match=f"objective: running names parameters .*{message}"):
        fit(lambda *_: (jnp.float32(0), {"running": running}), params(), batches,
            TrainConfig(steps=1, progress=False), key=jax.random.key(0))  # fmt: skip
