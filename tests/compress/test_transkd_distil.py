"""TransKD's recipe: what is trained, what is saved, what the variants have in common, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxformers as jf
from jaxformers import image_losses, nn
from jaxformers.compress.transkd import (
    VARIANTS,
    TransKDConfig,
    check_models,
    new_distiller,
    transkd_objective,
)
from jaxformers.compress.transkd_distil import (
    evaluate,
    load_distiller,
    new_student,
    save_distiller,
    segmentation_distil,
)
from jaxformers.data.segmentation import Segmentation
from jaxformers.mesh import batch_sharding
from jaxformers.metrics import confusion_matrix, intersection_over_union
from jaxformers.models import segformer
from jaxformers.nn.alignment import nearest
from jaxformers.safetensors_io import CheckpointError
from jaxformers.train import OptimConfig, TrainConfig

KEY = jax.random.key(0)
SMALL = segformer.Config(
    depths=(1, 1), sr_ratios=(2, 1), hidden_sizes=(8, 12), patch_sizes=(7, 3), strides=(4, 2), num_heads=(1, 2),
    mlp_ratios=(2, 2), decoder_hidden_size=8, num_labels=4,
)  # fmt: skip
LARGE = dataclasses.replace(SMALL, hidden_sizes=(12, 16), drop_path_rate=0.0)
TRAIN = TrainConfig(steps=2, optim=OptimConfig(learning_rate=1e-3, weight_decay=0.01, no_decay=()), progress=False)


@pytest.fixture(scope="module")
def teacher():
    return new_student(LARGE, key=jax.random.key(1))


@pytest.fixture(scope="module")
def student():
    return new_student(SMALL, key=KEY)


def images(n=8, size=(24, 16)):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (n, *size), dtype=np.uint8)
    return Segmentation(rng.integers(0, 256, (n, *size, 3), dtype=np.uint8), labels, 4, 3)


def config_of(variant, **changes):
    weights = {"embedding_weights": (0.1, 1.0)} if variant in ("base", "gl", "ea") else {}
    heads = {"mixer_heads": 2} if variant == "gl" else {}
    width = {"width": 8} if variant not in ("none", "logits", "cwd") else {}
    return TransKDConfig(variant, **weights, **heads, **width, **changes)


def parts(teacher, student, variant, **changes):
    config = config_of(variant, **changes)
    build = lambda: new_distiller(teacher, student, config, key=KEY)
    loaded = isinstance(student.head.fuse.kernel.get_value(), jax.Array)
    made = None if variant in ("none", "logits") else build() if loaded else nnx.eval_shape(build)
    return transkd_objective(teacher, student, made, config, void=3, class_weights=[1, 2, 3, 0])


def batch(n=8):
    data = images(n)
    return {"pixel_values": np.moveaxis(data.images, -1, 1) / np.float32(255), "labels": data.labels.astype(np.int32)}


def abstract(config, head="semantic_segmentation"):
    """A model without arrays."""
    return jf.surgery.named(nnx.eval_shape(lambda: segformer.SegFormer(config, head=head, rngs=nn.Keys(0))))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parts_of_each_variant(variant):
    names = {"none": (), "logits": (), "review": ("fusion",), "cwd": ("project",)}.get(variant, ("fusion", "align"))
    objective, params, freeze = parts(abstract(LARGE), abstract(SMALL), variant)
    assert freeze == (() if variant == "none" else ("teacher.**",))
    assert set(params) == {"student", *(() if variant == "none" else ("teacher",)), *(("distiller",) if names else ())}
    assert set(params.get("distiller", {})) == set(names)
    loss, terms = jax.eval_shape(lambda p: objective(None, p, batch(), KEY), params)
    running, flat = terms.pop("running"), jf.paths.flatten(params)
    assert loss.shape == () and set(terms) == {"ce", "maps", "embeddings"}
    norms = [path for path in flat if path.endswith((".mean", ".var")) and not path.startswith("teacher.")]
    skipped = {path for path in norms if ".squeeze_norm." in path and variant == "review"}
    assert set(running) == set(norms) - skipped and all(running[path].shape == flat[path].shape for path in running)
    assert len(norms) == {"fusion": 2 + 10 - (2 if variant == "review" else 0)}.get(names[0] if names else "", 2)


@pytest.mark.parametrize("variant", ["gl", "logits"])
def test_what_is_trained(teacher, student, variant):
    objective, params, _ = parts(teacher, student, variant)
    run = jax.jit(jax.value_and_grad(objective, argnums=1, has_aux=True), static_argnums=0)
    (loss, terms), grads = run(None, params, batch(), KEY)
    terms.pop("running")
    assert loss == pytest.approx(float(terms["ce"] + terms["maps"] + terms["embeddings"]), rel=1e-6)
    assert terms["maps"] > 0 and (terms["embeddings"] > 0) == (variant == "gl")
    assert not any(np.any(x) for x in jax.tree.leaves(grads["teacher"]))
    own = jf.paths.flatten(grads["student"])
    untrained = {path for path, x in own.items() if not np.any(x)}
    assert untrained == {"head.batch_norm.mean", "head.batch_norm.var"}
    for path, x in jf.paths.flatten(grads.get("distiller", {})).items():
        assert np.any(x) or path.endswith((".mean", ".var")) or ".squeeze_single." in path, path


def test_logits_are_the_same_whatever_distils(teacher, student):
    """In evaluation the cross-entropy and the student's own terms do not see the variant."""
    found = set()
    for variant in ("none", "cwd"):
        objective, params, _ = parts(teacher, student, variant)
        _, terms = jax.jit(objective, static_argnums=(0, 3))(None, params, batch(), None)
        assert "running" not in terms
        found.add(float(terms["ce"]))
    assert len(found) == 1


@pytest.fixture(scope="module")
def distilled(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("transkd")
    done = segmentation_distil(
        teacher, SMALL, images(), folder / "student", key=KEY, config=config_of("base"), train=TRAIN, batch_size=4,
        heldout=images(4), keep_distiller=folder / "distiller", directory=folder / "run",
    )  # fmt: skip
    return done, folder


def test_the_student_is_an_ordinary_segformer(distilled):
    done, folder = distilled
    hf = json.loads((folder / "student" / "config.json").read_text())
    assert hf["architectures"] == ["SegformerForSemanticSegmentation"] and "jaxformers" not in hf
    loaded = jf.load(folder / "student")
    apply, inputs = jax.jit(jf.functional(loaded)[0]), {"pixel_values": batch()["pixel_values"]}
    logits = [apply(jf.functional(model)[1], inputs).logits for model in (loaded, done.student)]
    assert np.array_equal(*logits) and logits[0].shape == (8, 4, 6, 4)
    assert np.any(loaded.head.batch_norm.mean.get_value()), "running statistics moved, and were saved"
    assert not any("distiller" in name or "align" in name for name in jf.paths.flatten(jf.functional(loaded)[1]))


def test_the_distiller_goes_on(distilled, teacher):
    done, folder = distilled
    loaded = load_distiller(folder / "distiller")
    ours, theirs = (jf.paths.flatten(jf.functional(model)[1]) for model in (done.distiller, loaded))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in ours)
    start = new_distiller(teacher, done.student, config_of("base"), key=jax.random.split(KEY, 3)[1])
    start = jf.paths.flatten(jf.functional(start)[1])
    same = {path for path in ours if np.array_equal(ours[path], start[path])}
    assert same == {path for path in ours if ".squeeze_single." in path}, "no decay for what no batch goes through"
    again = segmentation_distil(
        teacher, done.student, images(), key=KEY, config=config_of("base"), train=TRAIN, batch_size=4,
        distiller=folder / "distiller",
    )  # fmt: skip
    assert again.report is None and again.history[-1]["ce"] > 0
    with pytest.raises(ValueError, match="distiller: it was made for"):
        segmentation_distil(teacher, SMALL, images(), key=KEY, config=config_of("ea"), distiller=loaded)
    (folder / "distiller" / "distiller.json").write_text('{"channels": [8, 12]}')
    with pytest.raises(CheckpointError, match="does not describe a distiller"):
        load_distiller(folder / "distiller")


def test_distillers_of_other_sizes_are_not_mixed_up(teacher, student, tmp_path):
    save_distiller(new_distiller(teacher, student, config_of("cwd"), key=KEY), tmp_path / "d")
    settings = json.loads((tmp_path / "d" / "distiller.json").read_text())
    settings["large"][-1] += 1
    (tmp_path / "d" / "distiller.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="the tensor project.bias does not fit"):
        load_distiller(tmp_path / "d")


def test_the_report_counts_whole_data_sets(distilled):
    done, _ = distilled
    data = images()
    apply, params = jf.functional(done.student)
    inputs = np.moveaxis(data.images, -1, 1) / np.float32(255)
    predicted = np.argmax(jax.jit(apply)(params, {"pixel_values": inputs}).logits, 1)
    at_quarter = data.labels[:, 2::4, 2::4]
    expected = intersection_over_union(confusion_matrix(at_quarter, predicted, 4, void=3), void=3)
    found = evaluate(done.student, data, batch_size=4)
    assert found["miou"] == expected["miou"] and np.array_equal(found["tp"], expected["tp"])
    outside = Segmentation(data.images, np.where(data.labels == 3, 255, data.labels), 4, 255)
    assert np.array_equal(evaluate(done.student, outside, batch_size=4)["tp"][:3], expected["tp"])
    assert len(done.report["iou"]) == 3


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
def test_batch_norms_see_the_whole_batch_of_a_mesh():
    """One image a device: the squeeze's norm would have no variance there."""
    config = config_of("base", shift=0)
    distiller = new_distiller(abstract(LARGE), abstract(SMALL), config, key=KEY)
    apply, params = jf.functional(distiller)
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=size).astype(np.float32) for size in ((8, 6, 4, 8), (8, 3, 2, 12))]
    inputs = {"maps": maps, "embeddings": [x.reshape(8, -1, x.shape[-1]) for x in maps], "pixel_values": None}

    def loss(params, inputs):
        (fused, _), seen = jf.reap(apply, "**.{mean,var}")(params, inputs, rngs=KEY)
        return sum(jnp.sin(3 * x).mean() for x in fused), seen

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, seen), grads = run(params, inputs)
    mesh = jf.mesh("data=8")
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    (value2, seen2), grads2 = run(jax.device_put(params, whole), jax.device_put(inputs, batch_sharding(mesh)))
    np.testing.assert_allclose(value2, value, rtol=1e-5)
    assert len(seen) == 10 and seen.keys() == seen2.keys()
    for path in seen:
        np.testing.assert_allclose(seen2[path], seen[path], rtol=1e-5, atol=1e-6, err_msg=path)
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(grads))
    for one, spread in zip(jax.tree.leaves(grads), jax.tree.leaves(grads2), strict=True):
        assert np.abs(np.asarray(one) - np.asarray(spread)).max() < 1e-5 * scale


def test_a_batch_of_one_image_passes_the_norm_by(teacher, student):
    config = config_of("base")
    apply, params = jf.functional(new_distiller(teacher, student, config, key=KEY))
    maps = [np.random.default_rng(0).normal(size=size).astype(np.float32) for size in ((1, 6, 4, 8), (1, 3, 2, 12))]
    inputs = {"maps": maps, "embeddings": [x.reshape(1, -1, x.shape[-1]) for x in maps], "pixel_values": None}
    site = "fusion.stages.0.expand.input"
    of = lambda params: (lambda out, seen: (out[0][0].sum(), seen[site]))(*jf.reap(apply, site)(params, inputs))
    grads, fused = jax.jit(jax.grad(of, has_aux=True))(params)
    grads, params = jf.paths.flatten(grads), jax.tree.map(np.asarray, params)
    assert np.any(grads["fusion.stages.0.squeeze_single.kernel"])
    assert not np.any(grads["fusion.stages.0.squeeze.kernel"])
    # by hand: the deeper map, then selection between both
    norm = lambda x, at: x * at["scale"] / np.sqrt(at["var"] + 1e-5)  # new statistics: mean 0, bias 0
    deep, shallow = params["fusion"]["stages"]["1"], params["fusion"]["stages"]["0"]
    y = nearest(norm(maps[1] @ deep["reduce"]["kernel"][0, 0], deep["reduce_norm"]), (6, 4))
    x = norm(maps[0] @ shallow["reduce"]["kernel"][0, 0], shallow["reduce_norm"])
    a = np.maximum((x + y).mean((1, 2)) @ shallow["squeeze_single"]["kernel"], 0)
    both = np.exp([a @ shallow[name]["kernel"] + shallow[name]["bias"] for name in ("own", "deeper")])
    w = (both / both.sum(0))[:, :, None, None]
    np.testing.assert_allclose(fused, w[0] * x + w[1] * y, atol=1e-5)


def test_losses_of_equal_maps_are_zero_and_bins_are_torchs():
    x = np.random.default_rng(0).normal(size=(2, 7, 5, 3)).astype(np.float32)
    for loss in (image_losses.hierarchical_context, image_losses.channel_wise, image_losses.cell_wise):
        both = jax.jit(lambda x, loss=loss: (loss(x, x), loss(x, 2 * x)))(x)
        assert float(both[0]) == pytest.approx(0, abs=1e-6) and float(both[1]) > 1e-3
        with pytest.raises(ValueError, match="must have the shape of the student's"):
            loss(x, x[:, :6])
    pooled = image_losses.adaptive_average_pool(x, 4)
    for i in range(4):
        for j in range(4):
            rows, columns = (slice(k * n // 4, -(-(k + 1) * n // 4)) for k, n in ((i, 7), (j, 5)))
            np.testing.assert_allclose(pooled[:, i, j], x[:, rows, columns].mean((1, 2)), atol=1e-6)
    # rows, not columns, decide which bins are used: 2 rows use 1 x 1 alone, with weight 1/2
    wide, other = np.random.default_rng(1).normal(size=(2, 2, 2, 9, 3)).astype(np.float32)
    d = wide - other
    expected = (np.square(d).mean() + 0.5 * np.square(d.mean((1, 2))).mean()) / 1.5
    np.testing.assert_allclose(image_losses.hierarchical_context(wide, other), expected, rtol=1e-5)


def test_weighted_cross_entropy():
    logits, labels = np.log([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]), np.array([0, 1, -100])
    weighed = jf.losses.cross_entropy(logits, labels, class_weights=[1.0, 3.0])
    assert float(weighed) == pytest.approx(-(np.log(0.5) + 3 * np.log(0.1)) / 4, rel=1e-6)
    assert float(jf.losses.cross_entropy(logits, labels, class_weights=[0.0, 0.0])) == 0
    with pytest.raises(ValueError, match="class_weights: expected one for each of 2"):
        jf.losses.cross_entropy(logits, labels, class_weights=[1.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "large"}, "variant: expected one of base, gl, ea"),
        ({"map_loss": "mse"}, "map_loss: expected one of"),
        ({"variant": "none", "map_weight": 2.0}, "map_weight: the variant 'none' .* has no use"),
        ({"variant": "base", "mixer_heads": 4}, "mixer_heads: the variant 'base'"),
        ({"variant": "review", "embedding_weights": (1,) * 4}, "embedding_weights: the variant 'review'"),
        ({"temperature": 2.0}, "temperature: the variant 'base' with its losses has no use"),
        ({"map_loss": "kl", "temperature": 0.0}, "temperature.*more than 0"),
        ({"embedding_weights": (1.0, -1.0)}, "expected numbers of 0 or more"),
        ({"shift": -1}, "flip, shift"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        TransKDConfig(**settings)


def test_models_that_do_not_fit():
    teacher, student = abstract(LARGE), abstract(SMALL)
    config = config_of("base")
    three = dataclasses.replace(
        SMALL, depths=(1,) * 3, sr_ratios=(1,) * 3, hidden_sizes=(8,) * 3, patch_sizes=(7, 3, 3), strides=(4, 2, 2),
        num_heads=(1,) * 3, mlp_ratios=(1,) * 3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="teacher: it has 3 stages, the student 2"):
        check_models(abstract(three), student, config)
    with pytest.raises(ValueError, match=r"its strides \(4, 4\) are not the student's \(4, 2\)"):
        check_models(abstract(dataclasses.replace(SMALL, strides=(4, 4))), student, config)
    with pytest.raises(ValueError, match="embedding_weights: expected one for each of 2 stages"):
        check_models(teacher, student, TransKDConfig())
    with pytest.raises(ValueError, match="student: it needs the head semantic_segmentation"):
        check_models(teacher, abstract(SMALL, None), config)
    with pytest.raises(ValueError, match="teacher: expected a model of stages"):
        check_models(None, student, config)
    with pytest.raises(ValueError, match="teacher: 5 classes, the student has 4"):
        check_models(abstract(dataclasses.replace(LARGE, num_labels=5)), student, config_of("logits"))
    with pytest.raises(ValueError, match="distiller: the variant 'base' has one"):
        transkd_objective(teacher, student, None, config, void=3)
    with pytest.raises(ValueError, match="void: shifted images need a label"):
        transkd_objective(teacher, student, None, config_of("logits"))
    with pytest.raises(ValueError, match="class_weights: expected one for each of 4 classes"):
        transkd_objective(teacher, student, None, config_of("logits"), void=3, class_weights=[1.0])
    with pytest.raises(ValueError, match="student: it has 4 labels, the data 5 classes"):
        data = images()
        segmentation_distil(teacher, student, Segmentation(data.images, data.labels, 5, 4), key=KEY, config=config)


def test_maps_of_other_sizes_are_refused():
    """Equal strides, but one network pads its patches otherwise."""
    student, other = abstract(SMALL), abstract(dataclasses.replace(LARGE, patch_sizes=(3, 5)))
    objective, params, _ = parts(other, student, "base")
    uneven = {"pixel_values": np.zeros((2, 3, 30, 22), np.float32), "labels": np.zeros((2, 30, 22), np.int32)}
    jax.eval_shape(lambda p, b: objective(None, p, b, KEY)[0], params, uneven)  # no multiples of 8, but they agree
    objective, params, _ = parts(abstract(dataclasses.replace(LARGE, patch_sizes=(4, 3))), student, "base")
    with pytest.raises(ValueError, match=r"teacher: stage 0 has a map of \(8, 6\) cells, the student one of \(7, 5\)"):
        jax.eval_shape(lambda p, b: objective(None, p, b, KEY)[0], params, {
            "pixel_values": np.zeros((2, 3, 28, 20), np.float32), "labels": np.zeros((2, 28, 20), np.int32)
        })  # fmt: skip


def test_fusion_needs_a_known_kind():
    with pytest.raises(ValueError, match="kind: expected one of selection, attention"):
        nn.FeatureFusion((8,), (8,), "sum", rngs=nn.Keys(0))
    with pytest.raises(ValueError, match="channels: expected one number per stage"):
        nn.FeatureFusion((8,), (8, 9), rngs=nn.Keys(0))
