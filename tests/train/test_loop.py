"""fit: what a step computes, what it leaves alone, what it reports, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train import toy

import jaxformers as jf
from jaxformers.data.batches import array_batches
from jaxformers.train import NonFiniteLoss, OptimConfig, TrainConfig, fit
from jaxformers.weights import LowRank, PackedWeight
from jaxformers.weights.packed import pack_codes

KEY = jax.random.key(0)
SGD = optax.sgd(0.1)
BATCH = toy.arrays(16)


def train(params, data, steps=1, objective=toy.objective, apply=toy.apply, key=KEY, **options):
    names = ("optimizer", "eval_data", "evaluate", "eval_objective", "mesh", "shardings", "directory")
    given = {name: options.pop(name) for name in names if name in options}
    config = TrainConfig(steps=steps, progress=False, **options)
    return fit(objective, (apply, params), data, config, key=key, **given)


def quiet(apply, params, batch, key):
    """The toy objective without dropout."""
    del key
    return toy.objective(apply, params, batch, None)


def assert_trees_close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), **tolerance)


def test_one_step_is_the_gradient_step():
    params = toy.parameters()
    result = train(params, [BATCH], objective=quiet, optimizer=SGD)
    grads = jax.grad(lambda p: quiet(toy.apply, p, BATCH, None)[0])(params)
    assert_trees_close(result.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), rtol=1e-6, atol=1e-7)
    assert result.step == 1 and result.ema is None and result.model is None


def test_what_is_given_stays_untouched_and_usable():
    params = toy.parameters()
    before = jax.tree.map(np.array, params)
    train(params, [BATCH], steps=3, ema=0.5)
    assert_trees_close(params, before, rtol=0)


def test_the_key_decides():
    a, b, c = (train(toy.parameters(), [BATCH], steps=3, key=jax.random.key(k)).params for k in (1, 1, 2))
    assert_trees_close(a, b, rtol=0)
    assert not np.array_equal(a["head"]["kernel"], c["head"]["kernel"])


@pytest.mark.parametrize("k", [2, 4])
def test_accumulation_equals_the_whole_batch(k):
    whole = train(toy.parameters(), [BATCH], steps=3, objective=quiet)
    parts = train(toy.parameters(), [BATCH], steps=3, objective=quiet, accumulate=k)
    assert_trees_close(parts.params, whole.params, rtol=1e-5, atol=1e-6)
    assert parts.last("loss") == pytest.approx(whole.last("loss"), rel=1e-5)
    assert "weight" not in parts.history[-1]


def weighted(apply, params, batch, key):
    """A mean over the real tokens only: the mean of micro-batch means would be another number."""
    error = ((apply(params, batch) - batch["y"]) ** 2).mean(1)
    return (error * batch["mask"]).sum() / jnp.maximum(batch["mask"].sum(), 1), {"weight": batch["mask"].sum()}


@pytest.mark.parametrize("empty", [False, True])
def test_accumulation_is_exact_with_weights(empty):
    mask = (np.arange(16) % 4 == 0) * 1.0 if empty else np.random.default_rng(0).integers(0, 2, 16) * 1.0
    batch = BATCH | {"mask": mask.astype(np.float32)}  # empty: three of four micro-batches have no target at all
    whole = train(toy.parameters(), [batch], steps=2, objective=weighted)
    parts = train(toy.parameters(), [batch], steps=2, objective=weighted, accumulate=4)
    assert_trees_close(parts.params, whole.params, rtol=1e-5, atol=1e-6)
    assert parts.last("weight") == whole.last("weight") == mask.sum()


def test_evaluation_is_the_mean_over_examples_or_weights():
    params = toy.parameters()
    uneven = [jax.tree.map(lambda x: x[:12], BATCH), jax.tree.map(lambda x: x[12:], BATCH)]
    result = train(params, [BATCH], optimizer=optax.sgd(0.0), eval_data=uneven)
    want = quiet(toy.apply, params, BATCH, None)[0]
    assert result.last("eval_loss") == pytest.approx(float(want), rel=1e-6)
    masked = BATCH | {"mask": np.r_[np.ones(3), np.zeros(9), np.ones(4)].astype(np.float32)}
    uneven = [jax.tree.map(lambda x: x[:12], masked), jax.tree.map(lambda x: x[12:], masked)]
    result = train(params, [masked], objective=weighted, optimizer=optax.sgd(0.0), eval_data=uneven)
    assert result.last("eval_loss") == pytest.approx(float(weighted(toy.apply, params, masked, None)[0]), rel=1e-6)


def test_bfloat16_compute_with_float32_masters():
    seen = []

    def spy(apply, params, batch, key):
        seen.append({x.dtype.name for x in jax.tree.leaves(params)})
        return quiet(apply, params, batch, key)

    result = train(toy.parameters(), [BATCH], steps=3, objective=spy, compute_dtype="bfloat16", freeze=("**.bias",))
    assert seen[0] == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(result.params)} == {"float32"}
    # updates far below bfloat16's resolution add up in the masters
    tiny = train(toy.parameters(), [BATCH], steps=20, optimizer=optax.sgd(1e-5), compute_dtype="bfloat16")
    moved = np.abs(tiny.params["head"]["kernel"] - toy.parameters()["head"]["kernel"])
    assert 0 < moved.max() < 2e-3


def test_parameters_given_in_bfloat16_get_float32_masters_and_are_computed_in_bfloat16():
    seen = []

    def spy(apply, params, batch, key):
        seen.append({x.dtype.name for x in jax.tree.leaves(params)})
        return quiet(apply, params, batch, key)

    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy.parameters())
    result = train(low, [BATCH], objective=spy)
    assert seen[0] == {"bfloat16"} and {x.dtype.name for x in jax.tree.leaves(result.params)} == {"float32"}


def test_freeze_and_trainable_patterns():
    params = toy.parameters()
    frozen = train(params, [BATCH], steps=2, freeze=("layers.*.kernel",)).params
    np.testing.assert_array_equal(frozen["layers"]["0"]["kernel"], params["layers"]["0"]["kernel"])
    assert not np.array_equal(frozen["layers"]["0"]["bias"], params["layers"]["0"]["bias"])
    only = train(params, [BATCH], steps=2, trainable=("head.**",)).params
    assert_trees_close(only["layers"], params["layers"], rtol=0)
    assert not np.array_equal(only["head"]["kernel"], params["head"]["kernel"])


def test_low_rank_over_packed_integers():
    """QLoRA: only a and b move, the packed words are never touched nor differentiated."""
    rng = np.random.default_rng(0)
    params = toy.parameters()
    zeros, scales = np.full((1, 32), 8), np.full((1, 32), 0.05, np.float32)
    base = pack_codes(rng.integers(0, 16, (32, 32)), zeros, scales, np.zeros(32, np.int32), bits=4)
    a, b = rng.normal(size=(32, 2)).astype(np.float32), np.zeros((2, 32), np.float32)
    params["layers"]["1"] = {"kernel": LowRank(base, jnp.asarray(a), jnp.asarray(b), 2.0)}

    def apply(params, batch, *, rngs=None):
        first, second = params["layers"]["0"], params["layers"]["1"]
        h = jnp.tanh(batch["x"] @ first["kernel"] + first["bias"])
        return jnp.tanh(second["kernel"].matmul(h)) @ params["head"]["kernel"]

    result = train(params, [BATCH], steps=30, apply=apply, trainable=("**.kernel.{a,b}",), objective=quiet)
    after = result.params["layers"]["1"]["kernel"]
    assert isinstance(after, LowRank) and isinstance(after.base, PackedWeight)
    for x, y in zip(jax.tree.leaves(after.base), jax.tree.leaves(base), strict=True):
        np.testing.assert_array_equal(x, y)
    assert float(jnp.abs(after.b).max()) > 0
    np.testing.assert_array_equal(result.params["head"]["kernel"], params["head"]["kernel"])
    start = float(quiet(apply, params, BATCH, None)[0])
    assert float(quiet(apply, result.params, BATCH, None)[0]) < start


def test_moving_average():
    params = toy.parameters()
    result = train(params, [BATCH], steps=1, objective=quiet, optimizer=SGD, ema=0.75)
    want = jax.tree.map(lambda p, q: 0.75 * p + 0.25 * q, params, result.params)
    assert_trees_close(result.ema, want, rtol=1e-6, atol=1e-7)
    # evaluation sees the average
    result = train(params, [BATCH], steps=5, objective=quiet, ema=0.75, eval_data=[BATCH])
    assert result.last("eval_loss") == pytest.approx(float(quiet(toy.apply, result.ema, BATCH, None)[0]), rel=1e-5)


def poisoned(at, batches=6):
    bad = BATCH | {"x": np.where(np.arange(16)[:, None] == 3, np.nan, BATCH["x"]).astype(np.float32)}
    return [bad if i in at else BATCH for i in range(batches)]


def test_nan_stops_and_names_step_batch_and_checkpoint(tmp_path):
    with pytest.raises(NonFiniteLoss) as caught:
        train(toy.parameters(), poisoned({4}), steps=6, checkpoint_every=2, directory=tmp_path)
    error = caught.value
    assert error.step == 5 and error.checkpoint == tmp_path / "checkpoints" / "4"
    for part in ("step 5", "loss nan", "batch 5 of pass 1", str(error.batch), str(error.checkpoint), "on_nan='skip'"):
        assert part in str(error)
    stored = np.load(error.batch)
    np.testing.assert_array_equal(stored["x"], poisoned({4})[4]["x"])
    assert error.checkpoint.is_dir()


def test_nan_without_a_directory():
    with pytest.raises(NonFiniteLoss, match="step 1: loss nan.* no checkpoint was saved"):
        train(toy.parameters(), poisoned({0}), steps=6)


def test_infinite_gradient_of_a_finite_loss_stops_too():
    def steep(apply, params, batch, key):
        return jnp.sqrt(jnp.sum(params["head"]["kernel"] * 0.0)), {}

    with pytest.raises(NonFiniteLoss, match="step 1: loss 0.0, gradient norm (nan|inf)"):
        train(toy.parameters(), [BATCH], objective=steep)


def test_nan_skipped_is_as_if_the_batch_had_not_been_there(capsys):
    skipped = train(toy.parameters(), poisoned({1, 3}), steps=6, objective=quiet, optimizer=SGD, on_nan="skip")
    clean = train(toy.parameters(), [BATCH], steps=4, objective=quiet, optimizer=SGD)
    assert_trees_close(skipped.params, clean.params, rtol=0)
    assert skipped.last("skipped_updates") == 2 and np.isfinite(skipped.last("loss"))
    assert "step 2: loss nan" in capsys.readouterr().err
    with pytest.raises(NonFiniteLoss, match="step 4"):
        train(toy.parameters(), poisoned({1, 2, 3}), steps=6, on_nan="skip", max_skips=2)


@pytest.mark.parametrize("shape", ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_on_a_mesh_as_on_one_device(shape, name):
    options = dict(steps=4, objective=quiet, accumulate=2, ema=0.9, eval_data=[BATCH])
    options["optim"] = OptimConfig(name=name, learning_rate=1e-2, weight_decay=0.1)
    alone = train(toy.parameters(), [BATCH], **options)
    spread = train(toy.parameters(), [BATCH], mesh=jf.mesh(shape), **options)
    assert_trees_close(spread.params, alone.params, rtol=1e-4, atol=1e-5)
    assert spread.last("eval_loss") == pytest.approx(alone.last("eval_loss"), rel=1e-4)
    kernel = spread.params["layers"]["0"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    if shape == "fsdp=8":  # (4, 32) is cut along "embed" when it divides; 4 does not divide by 8
        assert spread.params["head"]["kernel"].sharding.spec == jax.sharding.PartitionSpec("fsdp", None)


def test_given_shardings_are_kept_through_training():
    mesh = jf.mesh("data=4,tensor=2")
    P = jax.sharding.PartitionSpec
    shardings = {"layers": {"0": {"kernel": P(None, "tensor"), "bias": P("tensor")}}, "head": {"kernel": P("tensor")}}
    result = train(toy.parameters(), [BATCH], steps=2, mesh=mesh, shardings=shardings)
    assert result.params["layers"]["0"]["kernel"].sharding.spec == P(None, "tensor")
    # parameters that are on a mesh already need no argument
    again = train(result.params, [BATCH], steps=2)
    assert again.params["layers"]["0"]["bias"].sharding == result.params["layers"]["0"]["bias"].sharding


def test_metrics_file_progress_and_tensorboard(tmp_path, capfd):
    result = train(
        toy.parameters(), [BATCH], steps=20, log_every=5, eval_every=10, eval_data=[BATCH], directory=tmp_path,
        tensorboard=True,
    )  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == json.loads(json.dumps(result.history))
    assert [(r["kind"], r.get("step")) for r in records if r["kind"] != "compile"] == [
        ("train", 5), ("train", 10), ("eval", 10), ("train", 15), ("train", 20), ("eval", 20)
    ]  # fmt: skip
    compiled = [r for r in records if r["kind"] == "compile"]
    assert [r["program"] for r in compiled] == ["train step", "evaluation"]
    assert all(r["compile_seconds"] > 0 and r["trace_seconds"] > 0 for r in compiled)
    # forward 2·16·(4·32 + 32·2), and as much twice for the backward, less the gradient with respect to the input
    assert compiled[0]["flops"] == 3 * 2 * 16 * (4 * 32 + 32 * 2) - 2 * 16 * 4 * 32
    train_record = next(r for r in records if r["kind"] == "train")
    assert {"loss", "worst", "grad_norm", "learning_rate", "steps_per_s", "examples_per_s"} <= train_record.keys()
    assert "mfu" not in train_record, "a CPU's peak is not known"
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert capfd.readouterr() == ("", ""), "no terminal, no progress line"


def test_a_new_batch_shape_is_a_new_program_and_an_old_one_is_not():
    short = jax.tree.map(lambda x: x[:8], BATCH)
    result = train(toy.parameters(), [BATCH, short, BATCH, short], steps=8)
    assert [r["shapes"] for r in result.history if r["kind"] == "compile"] == [1, 2]


def test_apply_none_and_a_parameter_tree():
    def bare(apply, params, batch, key):
        assert apply is None
        return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2), {}

    config = TrainConfig(steps=200, optim=OptimConfig(learning_rate=0.05), progress=False)
    result = fit(bare, {"w": np.zeros((4, 2), np.float32)}, [BATCH], config, key=KEY)
    best = np.linalg.lstsq(BATCH["x"], BATCH["y"], rcond=None)[0]
    np.testing.assert_allclose(result.params["w"], best, atol=0.02)


def test_best_needs_a_metric_that_evaluation_gives(tmp_path):
    with pytest.raises(ValueError, match="best: evaluation gave .*eval_loss.*, not 'accuracy'"):
        train(toy.parameters(), [BATCH], steps=2, best="accuracy", checkpoint_every=1, eval_every=1, eval_data=[BATCH],
              directory=tmp_path)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"accumulate": 0}, "accumulate"),
        ({"compute_dtype": "float16"}, "compute_dtype"),
        ({"on_nan": "ignore"}, "on_nan"),
        ({"ema": 1.0}, "ema"),
        ({"freeze": ("nothing.here",)}, "freeze: 'nothing.here' matches no parameter; there are head.kernel"),
        ({"trainable": ("typo",)}, "trainable"),
        ({"freeze": ("**",)}, "leave none of 3 arrays to train"),
        ({"checkpoint_every": 5}, "directory"),
        ({"tensorboard": True}, "directory"),
        ({"eval_every": 5}, "eval_data"),
        ({"best": "eval_loss", "eval_data": [BATCH], "directory": "nowhere"}, "best: .* checkpoint_every"),
        ({"eval_data": array_batches(BATCH, 4)}, "eval_data: it has no end"),
        ({"eval_data": []}, "eval_data: it holds no batch"),
        ({"eval_data": iter([BATCH]), "eval_every": 1}, "eval_data: .* a second time"),
        ({"optim": OptimConfig(no_decay=("**.norm",))}, "no_decay: '\\*\\*.norm' matches none"),
        ({"scan_layers": True}, "scan_layers"),
        ({"remat": "full"}, "remat"),
        ({"accumulate": 3}, "accumulate: a batch leaf of shape"),
        ({"optimizer": SGD, "optim": OptimConfig(learning_rate=1.0)}, "optimizer"),
        ({"optim": OptimConfig(warmup=50)}, "warmup"),
        ({"shardings": {}}, "shardings"),
        ({"directory": "gs://bucket/run", "checkpoint_every": 1}, "directory: gs://bucket/run is not a path"),
    ],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        train(toy.parameters(), [BATCH], **{"steps": 2, **options})


def test_bad_models_data_and_objectives_are_named():
    config = TrainConfig(steps=2, progress=False)
    with pytest.raises(ValueError, match="model_or_params: expected an nnx model"):
        fit(toy.objective, "bert-base", [BATCH], config, key=KEY)
    with pytest.raises(ValueError, match="apply: it is there twice"):
        fit(toy.objective, (toy.apply, toy.parameters()), [BATCH], config, key=KEY, apply=toy.apply)
    with pytest.raises(ValueError, match="data: expected an iterable"):
        train(toy.parameters(), 3)
    with pytest.raises(ValueError, match="data: it holds no batch"):
        train(toy.parameters(), [])
    with pytest.raises(ValueError, match="data: the iterator ended after 1 batches"):
        train(toy.parameters(), iter([BATCH]), steps=2)
    with pytest.raises(ValueError, match="objective: expected it to return"):
        train(toy.parameters(), [BATCH], objective=lambda a, p, b, k: jnp.float32(0))
    with pytest.raises(ValueError, match="objective: loss has shape"):
        train(toy.parameters(), [BATCH], objective=lambda a, p, b, k: (b["x"].sum(1), {}))
    with pytest.raises(ValueError, match="grad_norm"):
        train(toy.parameters(), [BATCH], objective=lambda a, p, b, k: (b["x"].sum(), {"grad_norm": 1.0}))
    with pytest.raises(ValueError, match="data: a batch of shape .* does not divide over the 8 devices"):
        train(toy.parameters(), [jax.tree.map(lambda x: x[:12], BATCH)], mesh=jf.mesh("data=8"))
    with pytest.raises(ValueError, match="keys must not contain dots"):
        train({"a.b": np.ones(2, np.float32), "a": {"b": np.ones(2, np.float32)}}, [BATCH])
