"""Dry runs without a compiler: the search for the largest batch, reports, processes that fail, steps as shapes."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import jaxformers as jf
from jaxformers import dryrun, dryrun_steps
from jaxformers.chips import CHIPS, GIB, chip_of
from jaxformers.dryrun import Report, from_json, largest_batch, run_child
from jaxformers.hlo import Collective
from jaxformers.train import OptimConfig, TrainConfig

eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 100, 117])
@pytest.mark.parametrize("first", [1, 8, 64])
@pytest.mark.parametrize("bend", [0, 3])
def test_the_largest_batch_is_found(limit, first, bend):
    """``limit`` units of 16 fit. Bytes grow by a line, or (``bend``) by one that steepens: then the line misleads."""
    tried = []

    cost = lambda units: 1.0 + units + bend * units**2 / 200

    def attempt(batch):
        tried.append(batch)
        fits = batch <= 16 * limit
        return Report("x", "v5e:2x2", "", 4, cost(limit + 0.5), fits, arguments=cost(batch / 16))

    found = largest_batch(attempt, 16 * first, 16, attempt(16 * first), tries=20)
    assert found == 16 * limit and all(batch % 16 == 0 for batch in tried)
    assert len(tried) == len(set(tried)) <= 12


def test_few_tries_give_what_was_seen_to_fit():
    attempt = lambda batch: Report("x", "v5e:2x2", "", 4, 1e9, True, arguments=1.0)
    assert largest_batch(attempt, 4, 4, attempt(4), tries=2) == 32


def test_a_report_says_what_it_knows():
    whole = Report(
        "llama, train step", "v5e:2x2", "fsdp=4", 4, 16 * GIB, True, arguments=4 * GIB, temporaries=2 * GIB,
        outputs=0.0, code=GIB / 2, parameters=1000, flops=4 * 197e12, collectives={"all-gather": Collective(3, 90e9)},
        compile_seconds=7.0, largest_batch=64,
    )  # fmt: skip
    assert from_json(json.loads(json.dumps(whole.to_json()))) == whole
    assert whole.used == 6.5 * GIB
    assert whole.seconds == {"compute": 1.0, "memory": 4 * GIB / 0.819e12, "links": 0.5}
    said = str(whole)
    assert "fits: 6.50 of 16.0 GiB a device (arguments 4.00 + temporaries 2.00 + outputs 0.00 + code 0.50)" in said
    assert "all-gather 3 (90 GB)" in said and "no measurement: at least 1e+03 ms" in said
    assert "largest batch that fits: 64" in said
    small = dataclasses.replace(whole, fits=False, note="41 GiB are needed", largest_batch=0)
    assert "does not fit in 16.0 GiB a device: 41 GiB are needed" in str(small) and "that fits: 0" in str(small)
    assert str(dataclasses.replace(whole, fits=None, note="it aborted")).endswith("could not check: it aborted")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import time; time.sleep(60)", "the compiler had not ended after 1 s"),
        ("import os; os.abort()", "ended with code -6"),
        ("import sys; print('XlaRuntimeError: INTERNAL', file=sys.stderr); sys.exit(1)", "XlaRuntimeError: INTERNAL"),
        ("print('nothing')", "ended with code 0"),
    ],
)
def test_a_compiler_that_fails_is_no_answer(code, told):
    limit = 1 if "sleep" in code else 30
    found = run_child([sys.executable, "-c", code], limit, "x", "v5e:2x2", "fsdp=4")
    assert found.fits is None and told in found.note and told in str(found)


def test_what_the_child_refuses_is_an_error_here():
    with pytest.raises(ValueError, match="^mesh: too large$"):
        code = f"print({dryrun._MARK + json.dumps({'error': 'mesh: too large'})!r})"
        run_child([sys.executable, "-c", code], 30, "x", "v5e:2x2", "fsdp=4")


@pytest.mark.parametrize("topology", ["v9:2x2", "v5p", "v5p:axb", ""])
def test_topologies_that_are_none(topology):
    with pytest.raises(ValueError, match="expected a generation"):
        chip_of(topology)
    assert chip_of("v5p:4x4x4") is CHIPS["v5p"]


def test_work_that_every_device_does_counts_for_each(tmp_path):
    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    step = lambda whole: dryrun.Step("a product", jnp.dot, (shape, shape), parameters=64, whole=whole)
    one, all_four = (dryrun.compiled(step(whole), "v5e:2x2", "data=4", 4, str(tmp_path)) for whole in (False, True))
    assert one.flops == 2 * 8**3 and all_four.flops == 4 * one.flops and all_four.arguments == 2 * 64 * 4


@eight
@pytest.mark.parametrize("name", ["llama"])
def test_the_train_step_of_shapes_is_the_one_that_fit_takes(name):
    """Run on real arrays of those shapes and shardings it makes one AdamW update of the masters."""
    mesh, model = jf.mesh("data=2,fsdp=2,tensor=2"), tiny.model(name)
    apply, params = jf.functional(model, scan_layers=True)
    shapes = jax.eval_shape(lambda: params)
    batch = {"input_ids": jax.ShapeDtypeStruct((8, 6), jnp.int32), "labels": jax.ShapeDtypeStruct((8, 6), jnp.int32)}
    config = TrainConfig(steps=10, optim=OptimConfig(learning_rate=0.1, schedule="constant", clip_norm=None))
    objective = dryrun_steps.objective_of(model.head_name)
    step = dryrun_steps.train_step("x", objective, apply, shapes, batch, config, mesh)
    assert step.parameters == sum(x.size for x in jax.tree.leaves(params))
    flat = {path: x for path, x in jf.paths.flatten(params).items()}
    rng = np.random.default_rng(0)

    def real(shape):
        if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(0), shape.sharding)
        value = rng.integers(1, 20, shape.shape) if shape.shape == (8, 6) else np.zeros(shape.shape)
        return jax.device_put(value.astype(shape.dtype), shape.sharding)

    state, frozen, batch, key = jax.tree.map(real, step.args)
    masters = {p: jax.device_put(flat[p], x.sharding) for p, x in step.args[0].params.items()}
    run = jax.jit(step.function, out_shardings=step.out_shardings)
    new, metrics = run(state._replace(params=masters, failed=state.failed - 1), frozen, batch, key)
    grads = jax.grad(lambda p: objective(apply, p, batch, None)[0])(params)
    update = optax.adam(0.1)
    moved = optax.apply_updates(params, update.update(grads, update.init(params))[0])
    for path, x in jf.paths.flatten(moved).items():
        near = np.abs(np.asarray(new.params[path]) - np.asarray(x)) < 1e-3
        assert near.mean() > 0.98, path  # Adam's first step is ±rate: the sign of a vanishing gradient is anybody's
    assert float(metrics["loss"]) > 0


def test_steps_that_cannot_be():
    with pytest.raises(ValueError, match="a model without a head has no loss"):
        dryrun_steps.objective_of(None)
    with pytest.raises(ValueError, match="not of 'masked_image_modeling'"):
        dryrun_steps.objective_of("masked_image_modeling")
    with pytest.raises(ValueError, match="names known without files are"):
        dryrun_steps.config_dict("nobody/nothing-7b")
    for name, hf in dryrun_steps.NAMED.items():
        assert jf.models.architecture(hf["model_type"]).Config.from_hf(hf), name
