"""Optimisers against Hugging Face's Adafactor, schedules against their definitions, updates against the papers."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformers.train.optim import OptimConfig, adafactor, make_optimizer, schedule


@pytest.mark.parametrize("name", ["fixed_lr", "scaled"])
def test_adafactor_follows_hugging_face(oracles, name):
    oracle = np.load(oracles / "star" / f"adafactor_{name}.npz")
    options = json.loads(str(oracle["options"]))
    count = sum(k.endswith("_init") for k in oracle)
    params = {str(i): jnp.asarray(oracle[f"param{i}_init"]) for i in range(count)}
    rule = adafactor(
        options["lr"],
        eps=tuple(options["eps"]),
        clip_threshold=options["clip_threshold"],
        decay_rate=options["decay_rate"],
        scale_parameter=options["scale_parameter"],
    )
    state = rule.init(params)
    for t in range(options["steps"]):
        grads = {str(i): jnp.asarray(oracle[f"grad{i}_{t}"]) for i in range(count)}
        updates, state = rule.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for i in range(count):
            np.testing.assert_allclose(params[str(i)], oracle[f"param{i}_{t}"], rtol=1e-5, atol=1e-6)
    moved = max(float(jnp.abs(params[str(i)] - oracle[f"param{i}_init"]).max()) for i in range(count))
    assert moved > 1e-4, "the oracle's parameters move, so agreement is no accident"


def test_adafactor_through_the_config_is_the_stars(oracles):
    """fit's "adafactor" is STAR's: no relative step, no parameter scale, no momentum."""
    oracle = np.load(oracles / "star" / "adafactor_fixed_lr.npz")
    params = {str(i): jnp.asarray(oracle[f"param{i}_init"]) for i in range(3)}
    config = OptimConfig(name="adafactor", learning_rate=1e-2, schedule="constant", clip_norm=None)
    rule = make_optimizer(config, 6, params)
    state = rule.init(params)
    for t in range(6):
        updates, state = rule.update({str(i): jnp.asarray(oracle[f"grad{i}_{t}"]) for i in range(3)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["2"], oracle["param2_5"], rtol=1e-5, atol=1e-6)


def test_adafactor_momentum_decay_and_relative_step_by_hand():
    """One vector, two steps, written out from algorithm 4 with Hugging Face's order of momentum and rate."""
    p, g1, g2 = np.array([1.0, -2.0, 3.0]), np.array([0.1, 0.2, -0.3]), np.array([-0.2, 0.1, 0.4])
    rms = lambda x: math.sqrt(np.mean(x * x))
    v = momentum = 0.0
    want = p.copy()
    for t, g in ((1, g1), (2, g2)):
        beta2 = 1 - t**-0.8
        v = beta2 * v + (1 - beta2) * (g * g + 1e-30)
        u = g / np.sqrt(v)
        u = u / max(1.0, rms(u))
        rate = min(1e-2, 1 / math.sqrt(t)) * max(1e-3, rms(want))
        momentum = 0.9 * momentum + 0.1 * rate * u
        want = want - momentum - 0.05 * rate * want
    params = {"w": jnp.asarray(p, jnp.float32)}
    rule = adafactor(None, b1=0.9, weight_decay=0.05)
    state = rule.init(params)
    for g in (g1, g2):
        updates, state = rule.update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], want, rtol=1e-6)


@pytest.mark.parametrize("b1", [None, 0.9])
def test_adafactor_on_stacked_layers_equals_layer_by_layer(b1):
    """Vectors stay unfactored and every layer is clipped and scaled alone, as without scan_layers."""
    key = jax.random.split(jax.random.key(0), 4)
    stacked = {"layers.*.w": jax.random.normal(key[0], (3, 4, 5)), "layers.*.b": jax.random.normal(key[1], (3, 5))}
    grads = {"layers.*.w": jax.random.normal(key[2], (3, 4, 5)), "layers.*.b": jax.random.normal(key[3], (3, 5))}
    grads = jax.tree.map(lambda g: g * jnp.arange(1.0, 4.0).reshape(-1, *[1] * (g.ndim - 1)), grads)
    config = OptimConfig(name="adafactor", schedule="constant", scale_parameter=True, b1=b1, clip_norm=None)
    rule = make_optimizer(config, 2, stacked)
    state, whole = rule.init(stacked), stacked
    for _ in range(2):
        updates, state = rule.update(grads, state, whole)
        whole = optax.apply_updates(whole, updates)
    for i in range(3):
        alone = {f"layers.{i}.{k[-1]}": v[i] for k, v in stacked.items()}
        rule = make_optimizer(config, 2, alone)
        state = rule.init(alone)
        for _ in range(2):
            updates, state = rule.update({f"layers.{i}.{k[-1]}": v[i] for k, v in grads.items()}, state, alone)
            alone = optax.apply_updates(alone, updates)
        for k, v in alone.items():
            np.testing.assert_allclose(whole[f"layers.*.{k[-1]}"][i], v, rtol=1e-6)


def test_adamw_by_hand_with_decay_mask_and_clipping():
    params = {"a.kernel": jnp.array([1.0, -2.0]), "a.bias": jnp.array([0.5])}
    grads = {"a.kernel": jnp.array([3.0, 0.0]), "a.bias": jnp.array([4.0])}  # global norm 5, clipped to 1
    config = OptimConfig(learning_rate=0.1, schedule="constant", weight_decay=0.1, clip_norm=1.0)
    rule = make_optimizer(config, 10, params)
    updates, _ = rule.update(grads, rule.init(params), params)
    after = optax.apply_updates(params, updates)
    # the first AdamW update is g / (|g| + eps), whatever the size of g (1 - b2 rounds to 1e-5 in float32)
    np.testing.assert_allclose(after["a.kernel"], [1 - 0.1 * (1 + 0.1 * 1), -2 - 0.1 * (0.1 * -2)], rtol=1e-5)
    np.testing.assert_allclose(after["a.bias"], [0.5 - 0.1], rtol=1e-5)


def test_lion_by_hand():
    params, grads = {"w": jnp.array([1.0, -1.0])}, {"w": jnp.array([0.3, -5.0])}
    config = OptimConfig(name="lion", learning_rate=0.01, schedule="constant", weight_decay=0.5, clip_norm=None)
    rule = make_optimizer(config, 10, params)
    state = rule.init(params)
    updates, state = rule.update(grads, state, params)
    np.testing.assert_allclose(updates["w"], [-0.01 * (1 + 0.5), -0.01 * (-1 - 0.5)], rtol=1e-6)
    # momentum is 0.01 g; with the gradient reversed the interpolation 0.9 m + 0.1 g has the new sign
    updates, _ = rule.update({"w": -grads["w"]}, state, params)
    np.testing.assert_allclose(updates["w"], [-0.01 * (-1 + 0.5), -0.01 * (1 - 0.5)], rtol=1e-6)


def test_schedules():
    at = lambda config, steps, *counts: [float(schedule(config, steps)(c)) for c in counts]
    linear = OptimConfig(learning_rate=1.0, schedule="linear", warmup=10)
    np.testing.assert_allclose(at(linear, 110, 0, 5, 10, 60, 110), [0, 0.5, 1, 0.5, 0], atol=1e-6)
    share = OptimConfig(learning_rate=1.0, schedule="linear", warmup=0.06)  # STAR: 6 % of 3000
    np.testing.assert_allclose(at(share, 3000, 90, 180, 3000), [0.5, 1, 0], atol=1e-6)
    cosine = OptimConfig(learning_rate=2.0, schedule="cosine", warmup=0, final=0.1)
    np.testing.assert_allclose(at(cosine, 100, 0, 50, 100, 200), [2, 1.1, 0.2, 0.2], rtol=1e-6)
    root = OptimConfig(learning_rate=1.0, schedule="inverse_sqrt", warmup=100)
    np.testing.assert_allclose(at(root, 1000, 50, 100, 400), [0.5, 1, 0.5], rtol=1e-6)
    root = OptimConfig(learning_rate=1.0, schedule="inverse_sqrt")
    np.testing.assert_allclose(at(root, 100_000, 0, 30_000), [1, 0.5], rtol=1e-6)
    flat = OptimConfig(learning_rate=0.3, schedule="constant", warmup=2)
    np.testing.assert_allclose(at(flat, 10, 1, 2, 9), [0.15, 0.3, 0.3], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"name": "sgd"}, "name"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": None}, "learning_rate"),
        ({"schedule": "step"}, "schedule"),
        ({"schedule": "constant", "final": 0.1}, "final"),
        ({"warmup": -1}, "warmup"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"b1": 1.0}, "b1"),
        ({"name": "adafactor", "b2": 0.9}, "b2"),
        ({"name": "lion", "eps": 1e-8}, "eps"),
        ({"scale_parameter": True}, "scale_parameter"),
        ({"name": "adafactor", "relative_step": True}, "relative_step"),
    ],
)
def test_config_names_what_is_wrong(options, named):
    with pytest.raises(ValueError, match=named):
        OptimConfig(**options)


def test_warmup_longer_than_the_run():
    with pytest.raises(ValueError, match="warmup"):
        schedule(OptimConfig(warmup=20), 10)


def test_adafactor_wants_parameters_and_no_warmup_init_with_a_rate():
    with pytest.raises(ValueError, match="warmup_init"):
        adafactor(1e-3, warmup_init=True)
    rule = adafactor(1e-3)
    with pytest.raises(ValueError, match="params"):
        rule.update({"w": jnp.ones(2)}, rule.init({"w": jnp.ones(2)}))


def test_bert_adam_by_hand():
    """Two updates of a matrix, no bias correction, clipped by its own norm; a bias does not decay."""
    config = OptimConfig(name="bert_adam", learning_rate=0.1, schedule="constant", weight_decay=0.01)
    params = {"a.kernel": jnp.array([[3.0, -1.0]]), "a.bias": jnp.array([0.5])}
    grads = [{"a.kernel": jnp.array([[3.0, 4.0]]), "a.bias": jnp.array([0.1])},
             {"a.kernel": jnp.array([[0.1, -0.2]]), "a.bias": jnp.array([-2.0])}]  # fmt: skip
    rule = make_optimizer(config, 2, params)
    state, found = rule.init(params), params
    for g in grads:
        updates, state = rule.update(g, state, found)
        found = optax.apply_updates(found, updates)
    for name, decay in (("a.kernel", 0.01), ("a.bias", 0.0)):
        p = np.array(params[name], np.float64)
        m = v = 0.0
        for step in grads:
            g = np.array(step[name], np.float64)
            g = g * min(1.0, 1.0 / (np.linalg.norm(g) + 1e-6))
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            p = p - 0.1 * (m / (np.sqrt(v) + 1e-6) + decay * p)
        np.testing.assert_allclose(found[name], p, rtol=1e-5)


def test_bert_adam_passes_over_what_nothing_reaches():
    """No decay, no averages, and the schedule of that tensor waits; stacked layers count one by one."""
    config = OptimConfig(name="bert_adam", learning_rate=0.1, warmup=0.5, weight_decay=0.1, clip_norm=None)
    params = {"layers.*.kernel": jnp.ones((2, 3, 3)), "kernel": jnp.ones((3, 3))}
    rule = make_optimizer(config, 8, params)
    state, found = rule.init(params), params
    half = {"layers.*.kernel": jnp.ones((2, 3, 3)).at[0].set(0.0), "kernel": jnp.zeros((3, 3))}
    for _ in range(3):
        updates, state = rule.update(half, state, found)
        found = optax.apply_updates(found, updates)
    np.testing.assert_array_equal(found["kernel"], 1.0)
    np.testing.assert_array_equal(found["layers.*.kernel"][0], 1.0)
    assert np.all(found["layers.*.kernel"][1] < 1.0)
    assert state.count["kernel"] == 0 and np.array_equal(state.count["layers.*.kernel"], [0, 3])
    updates, _ = rule.update({"layers.*.kernel": jnp.ones((2, 3, 3)), "kernel": jnp.ones((3, 3))}, state, found)
    assert not np.any(updates["kernel"]) and not np.any(updates["layers.*.kernel"][0]), "its first update is at rate 0"
    with pytest.raises(ValueError, match="params: BERT's Adam"):
        rule.update(half, state)
