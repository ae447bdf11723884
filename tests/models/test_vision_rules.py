"""Vision models: what they refuse, how they train and shard, and one vocabulary for flat and hierarchical ones."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models.test_vision import arrays, load
from models.test_vision_variants import cases
from parity import assert_close_scaled, run

import jaxformers as jf
from jaxformers import models, nn, paths
from jaxformers.mesh import batch_sharding, constrained
from jaxformers.models import beit, keymap, segformer, swin, vit_mae

SIZES = {"image_size": (16, 16), "patch_size": (4, 4)}
FLAT = {**SIZES, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "vit": {**FLAT, "intermediate_size": 12, "encoder_stride": 4},
    "deit": {**FLAT, "intermediate_size": 12, "encoder_stride": 4},
    "dinov2": {**FLAT, "use_swiglu_ffn": True},
    "dinov2_with_registers": {**FLAT, "num_register_tokens": 3},
    "beit": {**FLAT, "intermediate_size": 12, "use_relative_position_bias": True, "use_mask_token": True,
             "out_indices": (1, 1, 2, 2), "auxiliary_concat_input": True},
    "swin": {**SIZES, "embed_dim": 4, "depths": (2, 1), "num_heads": (1, 2), "window_size": 2, "encoder_stride": 8},
    "segformer": {"depths": (2, 1), "hidden_sizes": (8, 12), "num_heads": (1, 2), "sr_ratios": (2, 1),
                  "patch_sizes": (7, 3), "strides": (4, 2), "mlp_ratios": (2, 2), "decoder_hidden_size": 8},
    "vit_mae": {**FLAT, "intermediate_size": 12, "decoder_hidden_size": 8, "decoder_num_hidden_layers": 1,
                "decoder_num_attention_heads": 2, "decoder_intermediate_size": 8},
}  # fmt: skip


def init(name, head=None, **changes):
    config = models.architecture(name).Config(**{**CONFIGS[name], "initializer_range": 0.3, **changes})
    return jf.init(config, head=head, key=jax.random.key(0))


def pixels(rows=2, size=(16, 16)):
    return np.random.default_rng(0).standard_normal((rows, 3, *size)).astype(np.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_a_round_trip(name):
    cls = models.architecture(name).Config
    for config in (cls(), cls(**CONFIGS[name])):
        hf = json.loads(json.dumps(config.to_hf()))
        assert hf["model_type"] == name
        again = cls.from_hf({**hf, "unknown_future_key": 1})
        assert again == config and again.to_hf() == {**hf, "unknown_future_key": 1}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_a_name_of_its_own(name):
    arch = models.architecture(name)
    for head in (None, *arch.HEADS):
        model = nnx.eval_shape(lambda head=head: arch.Model(arch.Config(**CONFIGS[name]), head=head, rngs=nnx.Rngs(0)))
        keys, found = keymap.all_keys(model, arch), {}
        for path in paths.flatten(nnx.to_pure_dict(nnx.state(model))):
            entry, leaf = keymap.lookup(keys, path)
            place = (entry.name, leaf, entry.part[0], entry.top)
            assert place not in found, f"{path} and {found.get(place)} are both {place}"
            found[place] = path


@pytest.mark.parametrize("name", CONFIGS)
def test_one_pattern_finds_the_same_in_all(name):
    model = init(name)
    apply, params = jf.functional(model)
    batch = {"pixel_values": pixels()}
    depth = len(paths.select(params, "**.layers.*.attention.query.kernel"))
    assert depth == (3 if name in ("swin", "segformer") else 2)
    patterns = ("**layers.*.attention.probs", "**layers.*.attention.context", "**layers.*.mlp.hidden",
                "**layers.*.input", "**.mlp.up.output", "**embeddings")  # fmt: skip
    out, seen = jf.reap(apply, patterns)(params, batch)
    for pattern in patterns[:-1]:
        assert sum(paths.matches(pattern, site) for site in seen) == depth, pattern
    for site, probs in seen.items():
        if site.endswith("probs"):
            assert np.allclose(probs.sum(-1), 1, atol=1e-5)
    none = jf.edit(apply, {"**layers.*.mlp.hidden": lambda h: 0 * h, "**layers.*.attention.context": lambda h: 0 * h})
    assert np.abs(none(params, batch).last_hidden_state - out.last_hidden_state).max() > 0.01


@pytest.mark.parametrize("name", CONFIGS)
def test_sentence_heads_pool_what_they_say(name):
    model = init(name, "sentence")
    out = run(model, {"pixel_values": pixels()})
    assert_close_scaled(out.pooled, out.last_hidden_state.mean(1), 1e-6)


@pytest.mark.parametrize(("name", "head"), [("beit", None), ("swin", None), ("segformer", "semantic_segmentation")])
def test_cut_over_devices_it_gives_the_same(name, head, tmp_path):
    model = init(name, head)
    expected = run(model, {"pixel_values": pixels(4)})
    devices = jf.mesh("data=2,fsdp=2,tensor=2")
    jf.save(model, tmp_path / "x")
    apply, params = jf.functional(jf.load(tmp_path / "x", mesh=devices))
    apply = jax.jit(constrained(apply, devices))
    found = apply(params, {"pixel_values": jax.device_put(pixels(4), batch_sharding(devices))})
    assert_close_scaled(found.last_hidden_state, expected.last_hidden_state, 1e-5)
    if head:
        assert_close_scaled(found.logits, expected.logits, 1e-5)
        where = params["stages"]["0"]["layers"]["0"]["mlp"]["conv"]["kernel"].sharding
        assert where.spec == jax.sharding.PartitionSpec(None, None, None, "tensor")
    kernel = paths.flatten(params)[paths.select(params, "**layers.1.attention.query.kernel")[0]]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")


@pytest.mark.parametrize("name", ["beit-all", "mae-wide", "registers-swiglu", "segformer-maps", "swin-base"])
def test_bfloat16_is_close(name, oracles):
    model = jf.load(oracles / "vision" / name, dtype="bfloat16")
    apply, params = jf.functional(model, scan_layers=True)
    batch, expected = cases(oracles / "vision" / name)[0]
    batch.pop("labels", None)
    out = jax.jit(apply)(params, batch)
    assert out.last_hidden_state.dtype == "bfloat16"
    found, reference = (
        (out.logits, expected["logits"]) if "logits" in expected else (out.pooled, expected["pooler_output"])
    )
    error = np.asarray(found, np.float32) - reference
    assert np.sqrt(np.mean(error**2)) < 0.03 * reference.std()


# ---- masked autoencoders -------------------------------------------------------------------------------------------


def test_noise_comes_from_the_key_or_is_refused(oracles):
    model, expected = load(oracles, "vit_mae/tiny")
    apply, params = jf.functional(model)
    batch = {"pixel_values": expected["pixel_values"]}
    one, two, again = (apply(params, batch, rngs=jax.random.key(k)).extra["mask"] for k in (0, 1, 0))
    assert np.array_equal(one, again) and not np.array_equal(one, two)
    assert np.array_equal(one.sum(1), [12, 12])
    with pytest.raises(ValueError, match="noise: pre-training hides patches by it"):
        apply(params, batch)
    with pytest.raises(ValueError, match=r"noise: expected shape \(2, 16\), got \(2, 15\)"):
        apply(params, {**batch, "noise": expected["noise"][:, 1:]})
    with pytest.raises(ValueError, match="mask_ratio must be 0 or more and less than 1"):
        dataclasses.replace(model.config, mask_ratio=1.0)
    with pytest.raises(ValueError, match="multiples of 4"):
        vit_mae.sinusoids((2, 2), 10)


def test_the_encoder_is_a_vit(oracles, tmp_path):
    folder = oracles / "backbones" / "vit_mae" / "tiny"
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    batch = {"pixel_values": arrays(folder)["pixel_values"]}
    as_vit = jf.load(tmp_path, head="none")
    h = run(as_vit, batch).last_hidden_state
    assert as_vit.pooler is None and h.shape == (2, 17, 32)
    assert_close_scaled(run(jf.load(folder, head="none"), batch).last_hidden_state, h, 1e-6)
    classifier = jf.load(tmp_path, head="image_classification", key=jax.random.key(0))
    assert_close_scaled(run(classifier, batch).last_hidden_state, h, 1e-6)


def test_positions_start_as_sines():
    model = init("vit_mae", "pretraining")
    table = np.asarray(model.head.position.embedding.get_value())
    omega = 10000.0 ** -np.array([0, 0.5])
    row, column = 2, 3
    expected = np.concatenate([f(at * omega) for at in (column, row) for f in (np.sin, np.cos)])
    assert np.abs(table[1 + 4 * row + column] - expected).max() < 1e-6 and not table[0].any()


# ---- training ------------------------------------------------------------------------------------------------------


def test_batch_norm_uses_and_hands_out_the_batch_in_training(oracles):
    torch = pytest.importorskip("torch", reason="live comparison: pip install 'jaxformers[oracle]'")
    model = jf.load(oracles / "vision" / "segformer-maps", classifier_dropout_prob=0.0, drop_path_rate=0.0)
    apply, params = jf.functional(model)
    batch = {"pixel_values": cases(oracles / "vision" / "segformer-maps")[0][0]["pixel_values"]}
    reaped = jf.reap(apply, ("head.batch_norm.{mean,var}", "head.fuse.output", "head.classifier.input"))
    _, seen = reaped(params, batch, rngs=jax.random.key(0))
    theirs = torch.nn.BatchNorm2d(seen["head.fuse.output"].shape[-1])
    own = params["head"]["batch_norm"]
    with torch.no_grad():
        names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
        for name, ours in names.items():
            getattr(theirs, name).copy_(torch.from_numpy(np.array(own[ours])))
        h = theirs.train()(torch.from_numpy(np.moveaxis(np.asarray(seen["head.fuse.output"]), -1, 1).copy()))
    expected = np.maximum(np.moveaxis(h.numpy(), 1, -1), 0)
    assert_close_scaled(seen["head.classifier.input"], expected, 1e-5)
    for name, ours in (("running_mean", "mean"), ("running_var", "var")):
        moved = nn.follow(own[ours], seen[f"head.batch_norm.{ours}"])
        assert_close_scaled(moved, getattr(theirs, name).numpy(), 1e-5)
    _, seen = reaped(params, batch)  # at inference what is used are the running ones
    assert np.array_equal(seen["head.batch_norm.var"], own["var"])


def test_maps_are_fused_before_or_after_they_are_stretched(oracles):
    """Whoever asks for the input of the fusing convolution has it formed; the numbers are the same."""
    model = jf.load(oracles / "vision" / "segformer-maps")
    apply, params = jf.functional(model)
    batch = {"pixel_values": cases(oracles / "vision" / "segformer-maps")[0][0]["pixel_values"]}
    formed, seen = jf.reap(apply, "head.fuse.{input,output}")(params, batch)
    quick, also = jf.reap(apply, "head.fuse.output")(params, batch)
    width = model.config.decoder_hidden_size * len(model.config.depths)
    assert seen["head.fuse.input"].shape == (*also["head.fuse.output"].shape[:-1], width)
    assert_close_scaled(also["head.fuse.output"], seen["head.fuse.output"], 1e-5)
    assert_close_scaled(quick.logits, formed.logits, 1e-5)


def test_stochastic_depth_drops_whole_images():
    x = jnp.ones((4000, 3, 2))
    dropped = np.asarray(nn.drop_path(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped.round(5))) == {0.0, np.float32(4 / 3).round(5)}
    assert np.all(dropped == dropped[:, :1, :1])
    assert abs((dropped[:, 0, 0] == 0).mean() - 0.25) < 0.03
    assert nn.drop_path_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3]) and nn.drop_path_rates(0.0, 2) == [None] * 2


def test_a_training_step_lowers_the_loss():
    model = init("swin", "masked_image_modeling", drop_path_rate=0.1)
    apply, params = jf.functional(model, scan_layers=False, remat="full")
    mask = np.arange(16) % 3 == 0
    batch = {"pixel_values": pixels(), "bool_masked_pos": np.stack([mask, ~mask])}

    def loss(params, key):
        out = apply(params, batch, rngs=key)
        return jf.image_losses.masked_pixels(out.logits, batch["pixel_values"], batch["bool_masked_pos"], patch=(4, 4))

    step = jax.jit(jax.value_and_grad(loss))
    before, grads = step(params, jax.random.key(0))
    after, _ = step(jax.tree.map(lambda p, g: p - 0.02 * g, params, grads), jax.random.key(0))
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(grads["stages"]["0"]["layers"]["1"]))
    assert after < before


# ---- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "head", "batch", "message"),
    [
        ("vit", None, {"pixel_values": pixels(size=(3, 16))}, "holds no whole patch"),
        ("vit", None, {"pixel_values": pixels()[0]}, r"pixel_values: expected \(batch, 3, height, width\)"),
        ("vit", None, {"pixel_values": pixels(), "bool_masked_pos": np.ones((2, 16))}, "this model has no mask token"),
        ("beit", None, {"pixel_values": pixels(), "bool_masked_pos": np.ones((2, 9))}, r"expected shape \(2, 16\)"),
        ("swin", None, {"pixel_values": pixels(size=(8, 4))}, r"grid of \(2, 1\) cells, smaller than its window of 2"),
        ("segformer", None, {"pixel_values": pixels(size=(4, 16))}, "reduces 2 x 2 cells to one, but the grid is"),
        ("segformer", None, {"pixel_values": pixels()[:, :1]}, r"pixel_values: expected \(batch, 3, height, width\)"),
    ],
)
def test_inputs_that_cannot_be(name, head, batch, message):
    apply, params = jf.functional(init(name, head))
    with pytest.raises(ValueError, match=message):
        apply(params, batch)


def test_segmentation_needs_four_states_and_a_grid_to_halve():
    with pytest.raises(ValueError, match="out_indices: segmentation reads four states of 1 to 2, got None"):
        init("beit", "semantic_segmentation", out_indices=None)
    apply, params = jf.functional(init("beit", "semantic_segmentation"))
    with pytest.raises(ValueError, match=r"a grid of \(1, 4\) patches cannot be halved"):
        apply(params, {"pixel_values": pixels(size=(4, 16))})


@pytest.mark.parametrize(
    ("module", "hf", "message"),
    [
        (swin, {"depths": 3}, "depths must list one number of 1 or more per stage, got 3"),
        (swin, {"depths": [2, 0]}, "depths must list one number"),
        (swin, {"depths": [2, 2]}, "one number per stage in all of these lists, got depths 2, num_heads 4"),
        (swin, {"depths": [10**5] * 4}, "depths must list"),
        (swin, {"window_size": 0}, "window_size and embed_dim must be 1 or more"),
        (beit, {"out_indices": "stage2"}, "out_indices must be a list of whole numbers"),
        (segformer, {"num_encoder_blocks": 3}, "num_encoder_blocks is 3, but depths has 4"),
        (segformer, {"strides": [4, 2]}, "one number per stage in all of these lists, got depths 4"),
        (segformer, {"num_attention_heads": "8"}, "num_attention_heads must list"),
        (vit_mae, {"mask_ratio": 1.5}, "mask_ratio must be 0 or more and less than 1"),
        (vit_mae, {"image_size": [1, 2, 3]}, "image_size must be a number or"),
    ],
)
def test_configs_that_cannot_be(module, hf, message):
    with pytest.raises(ValueError, match=message):
        module.Config.from_hf(hf)
