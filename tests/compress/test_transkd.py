"""TransKD against the authors' modules and losses: forward, gradients, running statistics, intersection over union."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxformers as jf
from jaxformers import metrics, nn, surgery
from jaxformers.compress.transkd import Distiller, TransKDConfig, imitation, segmentation_loss
from jaxformers.nn.keys import Keys

BATCH_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
LINEAR = {"weight": "kernel", "bias": "bias"}
PARTS = {
    "conv1.0": "reduce", "conv1.1": "reduce_norm", "conv2.0": "expand", "conv2.1": "expand_norm", "fc.0": "squeeze",
    "fc.1": "squeeze_norm", "fc1.0": "squeeze_single", "fcs.0": "own", "fcs.1": "deeper", "att_conv.0": "attend",
}  # fmt: skip


def close(actual, expected, rtol=1e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


def load(file):
    d = np.load(file)
    options = json.loads(str(d["options"]))
    return options, {k: d[k] for k in d.files if k != "options"}


def ours(name: str, stages: int = 4) -> str | None:
    """Our path of one of the authors' parameters; None for what has none."""
    words = name.split(".")
    if words[0] in ("skfs", "abfs"):
        part, leaf = PARTS[".".join(words[2:4])], words[4]
        table = BATCH_NORM if part.endswith("norm") else LINEAR
        return f"fusion.stages.{stages - 1 - int(words[1])}.{part}.{table[leaf]}" if leaf in table else None
    if words[0].startswith("embed"):
        return f"align.project.{int(words[0][5]) - 1}.{LINEAR[words[1]]}"
    if words[0].startswith("patch_embed"):
        norm = words[1] == "norm"
        table = BATCH_NORM if norm else LINEAR
        return f"align.assistant.{int(words[0][-1]) - 1}.{'patch_norm' if norm else 'patch'}.{table[words[2]]}"
    mixer = {"attn4.proj": "attention.out", "conv1": "conv_a", "conv2": "conv_b"}
    for theirs, path in mixer.items():
        if name.startswith(theirs + "."):
            return f"align.mixer.{path}.{LINEAR[words[-1]]}"
    return {"atten_weight": "align.mixer.alpha", "conv_weight": "align.mixer.beta"}.get(name)


def converted(named: dict[str, np.ndarray], like: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Arrays under the authors' names and in torch's layouts as ours, those that are there."""
    found = {}
    for name, x in named.items():
        if name == "attn4.qkv.weight":
            for part, rows in zip(("query", "key", "value"), np.split(x, 3), strict=True):
                found[f"align.mixer.attention.{part}.kernel"] = rows.T
        elif name.startswith("fuse_weights"):
            kind, i = ("own_scale", "assistant_scale")[int(name[-1]) // 4], int(name[-1]) % 4
            found.setdefault(f"align.{kind}", np.zeros(4, np.float32))[i] = x[0]
        elif path := ours(name):
            x = x.transpose(*range(2, x.ndim), 1, 0) if path.endswith("kernel") else x
            found[path] = x.reshape(like[path].shape)
    return found


def built(options):
    config = TransKDConfig(
        options["variant"], options["loss"], temperature=options["temperature"], width=options["mid"],
        embedding_weights=tuple(options["embed_weights"]) if options["variant"] != "review" else None,
    )  # fmt: skip
    sizes = tuple(options["student_channels"]), tuple(options["teacher_channels"])
    return config, surgery.named(nnx.eval_shape(lambda: Distiller(*sizes, config, rngs=Keys(0))))


def check(options, d):
    """One oracle: outputs, losses, gradients and, after a training batch, running statistics."""
    config, distiller = built(options)
    apply, params = jf.functional(distiller)
    flat = jf.paths.flatten(params)
    loaded = converted({k[2:]: x for k, x in d.items() if k.startswith("p.")}, flat)
    assert loaded.keys() == flat.keys()
    params = jf.paths.unflatten(loaded)
    aligned = config.variant != "review"
    inputs = {
        "maps": [np.moveaxis(d[f"student_feat_{i}"], 1, -1) for i in range(4)],
        "embeddings": [d[f"student_embed_{i}"] for i in range(4)],
    }
    image = d.get("image", np.zeros((2, 3, 8, 8), np.float32))
    goals = [np.moveaxis(d[f"teacher_feat_{i}"], 1, -1) for i in range(4)], [d[f"teacher_embed_{i}"] for i in range(4)]
    key = jax.random.key(0) if options["train_mode_batchnorm"] else None
    pattern = "**.{mean,var}"

    def loss(params, inputs, logits, goals):
        (maps, embeddings), seen = jf.reap(apply, pattern)(params, {**inputs, "pixel_values": image}, rngs=key)
        terms = imitation(config, maps, embeddings, *goals)
        weights = np.asarray(options["class_weights"], np.float32)
        ce = segmentation_loss(jnp.moveaxis(logits, 1, -1), d["labels"], weights, 19)
        return ce + terms["maps"] + terms["embeddings"], (ce, terms, maps, embeddings, seen)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (total, (ce, terms, maps, embeddings, seen)), grads = run(params, inputs, d["logits"], goals)
    for i in range(4):
        close(np.moveaxis(maps[i], -1, 1), d[f"out_feat_{i}"])
        if aligned:
            close(embeddings[i], d[f"out_embed_{i}"])
    close(ce, d["loss_ce"])
    close(terms["maps"], d["loss_kd"])
    close(total, d["loss"])

    slopes = jf.paths.flatten(grads[0])
    largest = max(np.abs(x).max() for k, x in d.items() if k.startswith("grad."))
    expected = converted({k[5:]: x for k, x in d.items() if k.startswith("grad.")}, flat)
    assert len(expected) > 20
    for path, x in expected.items():
        # what a batch norm behind it takes out again has no slope but rounding
        atol = 2e-4 * max(np.abs(x).max(), 1e-3 * largest)
        np.testing.assert_allclose(slopes[path], x, rtol=0, atol=atol, err_msg=path)
    for i in range(4):
        close(np.moveaxis(grads[1]["maps"][i], -1, 1), d[f"grad_student_feat_{i}"], 2e-4)
        if aligned and f"grad_student_embed_{i}" in d:
            close(grads[1]["embeddings"][i], d[f"grad_student_embed_{i}"], 2e-4)
    if "grad_logits" in d:
        close(grads[2], d["grad_logits"], 2e-4)
    assert not any(np.any(x) for x in jax.tree.leaves(grads[3])), "the teacher gets no gradient"
    for path in slopes:  # the branch for single images is passed by, and statistics are no weights
        if ".squeeze_single." in path or path.endswith((".mean", ".var")):
            assert not np.any(slopes[path])

    moved = jf.paths.flatten(nn.followed(params, seen))
    after = {k.removeprefix("after."): x for k, x in d.items() if k.startswith("after.")}
    for path, x in converted(after, flat).items():
        close(moved[path], x, 1e-4 if path.endswith("var") else 1e-5)
    assert len(after) > 0 or not options["train_mode_batchnorm"]


def test_the_variant_with_the_mixer(oracles):
    check(*load(oracles / "transkd" / "gl_train.npz"))


@pytest.mark.parametrize("name", ["base_train_b2", "base_eval_cwd", "ea_train", "reviewkd_baseline"])
def test_the_authors_modules_and_losses(shared, name):
    check(*load(shared / "oracles" / "transkd" / f"{name}.npz"))


def test_intersection_over_union(oracles):
    options, d = load(oracles / "transkd" / "iou.npz")
    void, total = options["ignore"], 0
    for predicted, target in zip(d["pred"], d["target"], strict=True):
        total = total + metrics.confusion_matrix(target, predicted, options["classes"], void=void)
    found = metrics.intersection_over_union(total, void=void)
    for name in ("tp", "fp", "fn"):
        assert np.array_equal(found[name], d[name])
    np.testing.assert_allclose(found["iou"], d["iou"], rtol=1e-6)
    assert found["miou"] == pytest.approx(float(d["miou"]), rel=1e-9)
    assert found["miou_present"] == pytest.approx(float(d["miou_present_only"]), rel=1e-9)
    outside = metrics.confusion_matrix([0, 1, 255], [0, 0, 1], 2, void=255)  # void may lie outside of the classes
    assert outside.tolist() == [[1, 0], [1, 0]]
    for true, predicted in (([0, 2], [0, 1]), ([0, 1], [0, 2]), ([-1, 0], [0, 0])):
        with pytest.raises(ValueError, match="labels must be from 0 to 1"):
            metrics.confusion_matrix(true, predicted, 2)
    with pytest.raises(ValueError, match="predicted: expected the shape"):
        metrics.confusion_matrix([0, 1], [0], 2)
    with pytest.raises(ValueError, match="confusion: expected"):
        metrics.intersection_over_union(np.zeros(4))
