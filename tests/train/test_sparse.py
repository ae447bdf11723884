"""Training with fixed masks: torch's numbers, zeros that stay, checkpoints; the probe of thinning weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxformers as jf
from jaxformers.compress import prune
from jaxformers.train import OptimConfig, TrainConfig, fit, keep_zeros, sharpest_rise, sparsity_probe
from jaxformers.weights import Masked, add_masks
from tests import tiny

BATCH = tiny.batch()


def objective(apply, params, batch, key):
    return jnp.mean((apply(params, batch).logits - 1) ** 2), {}


def test_masked_adamw_equals_torchs_reparametrisation(oracles):
    """Thirty steps in float64: the optimiser's state holds masked entries, weight decay included; they never act."""
    z = np.load(oracles / "essential_sparsity" / "masked_adamw.npz")
    o = json.loads(str(z["options"]))
    with jax.enable_x64(True):
        rule = optax.adamw(o["lr"], *o["betas"], eps=o["eps"], weight_decay=o["weight_decay"])
        mask = jnp.asarray(z["mask"].T != 0)
        params = {"kernel": jnp.asarray(z["w0"].T), "bias": jnp.zeros(5)}
        state = rule.init(params)

        @jax.jit
        def step(params, state, x, y):
            def loss(p):
                return jnp.mean((Masked(p["kernel"], mask).matmul(x) + p["bias"] - y) ** 2)

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = rule.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        losses = []
        for x, y in zip(z["X"], z["Y"], strict=True):
            params, state, value = step(params, state, x, y)
            losses.append(float(value))
        np.testing.assert_allclose(losses, z["losses"], rtol=1e-9)
        np.testing.assert_allclose(Masked(params["kernel"], mask).dense().T, z["w_final"], atol=1e-9)
        np.testing.assert_allclose(params["bias"], z["b_final"], atol=1e-9)


@pytest.mark.parametrize("way", ["typed, scanned", "optimiser, scanned", "lion"])
def test_zeros_stay_zero_and_the_rest_moves(way, tmp_path):
    """Fifty steps with weight decay 0.1, and the file that is written then."""
    pruned = prune(tiny.model("llama", num_hidden_layers=2), sparsity=0.5)
    optim = OptimConfig(learning_rate=1e-3, weight_decay=0.1)
    scan = "scanned" in way
    if way.startswith("typed"):
        model, options, config = add_masks(pruned.model, pruned.masks), {}, {"optim": optim}
    else:
        model, config = pruned.model, {}
        options = {"optimizer": keep_zeros((optax.lion if way == "lion" else optax.adamw)(1e-3, weight_decay=0.1))}
    settings = TrainConfig(steps=50, scan_layers=scan, progress=False, **config)
    trained = fit(objective, model, [BATCH], settings, key=jax.random.key(0), **options).model
    jf.save(trained, tmp_path / "trained")
    for found in (trained, jf.load(tmp_path / "trained")):
        for path, mask in pruned.masks.items():
            before, after = (np.asarray(jf.weights.dense(kernel(m, path))) for m in (pruned.model, found))
            assert not np.any(after[~np.asarray(mask)]), path
            np.testing.assert_array_equal(after != before, mask)


def kernel(model, path):
    for part in path.split("."):
        model = getattr(model, part)
    return model.kernel.get_value()


def test_without_it_zeros_move():
    pruned = prune(tiny.model("llama", num_hidden_layers=1), sparsity=0.5)
    trained = fit(objective, pruned.model, [BATCH], TrainConfig(steps=2, progress=False), key=jax.random.key(0)).model
    moved = [np.asarray(kernel(trained, p))[~np.asarray(m)] for p, m in pruned.masks.items()]
    assert np.mean(np.concatenate(moved) != 0) > 0.9


def test_checkpoints_hold_what_is_kept(tmp_path):
    """A run that is taken up goes on with the same zeros as one that was not interrupted."""
    pruned = prune(tiny.model("llama", num_hidden_layers=1), sparsity=0.5)
    run = lambda steps, where: fit(  # noqa: E731
        objective, pruned.model, [BATCH], TrainConfig(steps=steps, checkpoint_every=3, progress=False),
        key=jax.random.key(0), optimizer=keep_zeros(optax.adamw(1e-2)), directory=where,
    )  # fmt: skip
    run(3, tmp_path / "a")
    resumed, whole = run(6, tmp_path / "a").params, run(6, tmp_path / "b").params
    assert tiny.largest_difference(resumed, whole) == 0
    for path, mask in pruned.masks.items():
        leaf = jf.paths.flatten(resumed)[f"{path}.kernel"]
        assert not np.any(np.asarray(leaf)[~np.asarray(mask)])


def test_the_probe_counts_each_matrix():
    model = tiny.model("llama", num_hidden_layers=2)
    result = fit(
        objective, model, [BATCH], TrainConfig(steps=4, eval_every=1, scan_layers=True, progress=False),
        key=jax.random.key(0), evaluate=sparsity_probe([0.1, 0.4]),
    )  # fmt: skip
    last = [record for record in result.history if record["kind"] == "eval"][-1]
    kernels = {p: np.asarray(k) for p, k in jf.paths.flatten(jf.functional(result.model)[1]).items()
               if p.startswith("layers.") and p.endswith("kernel")}  # fmt: skip
    for t in (0.1, 0.4):
        for path, w in kernels.items():
            assert last[f"below_{t}/{path}"] == pytest.approx((np.abs(w) < t).mean(), abs=1e-6), path
        joined = np.concatenate([w.ravel() for w in kernels.values()])
        assert last[f"below_{t}"] == pytest.approx((np.abs(joined) < t).mean(), abs=1e-6)
    step, rise = sharpest_rise(result.history, "below_0.4")
    shares = [r["below_0.4"] for r in result.history if r["kind"] == "eval"]
    assert rise == pytest.approx(max(np.diff(shares))) and step == 2 + int(np.argmax(np.diff(shares)))


def test_refusals():
    with pytest.raises(ValueError, match="patterns .* no parameter matches; there are a"):
        keep_zeros(optax.sgd(1.0)).init({"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="thresholds"):
        sparsity_probe([])
    with pytest.raises(ValueError, match="no kernel of the model matches"):
        sparsity_probe([0.1])({"a": jnp.ones((2, 2))}, 0)
    with pytest.raises(ValueError, match="evaluated 1 times"):
        sharpest_rise([{"kind": "eval", "step": 1, "below_1": 0.5}], "below_1")
