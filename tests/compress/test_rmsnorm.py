"""Pre-RMSNorm and Pre-CRMSNorm against the authors' example and an independent conversion, and over architectures."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from test_residual import FAST, inputs_of

import jaxformers as jf
from jaxformers import nn, paths, residual, weights
from jaxformers.compress import convert_norm, convert_norm_checkpoint, gptq, prune, rmsnorm, verify_norm
from jaxformers.models import gpt2, vit

TARGETS = ("zero-mean-ln", "rms", "crms")


def run(model, batch, pattern=None):
    """The model's output, and with ``pattern`` what is at the sites that match; compiled for one run."""
    apply, params = jf.functional(model)
    function = apply if pattern is None else jf.reap(apply, pattern)
    options = FAST if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options)(params, batch)


def flat(model):
    return paths.flatten(nnx.to_pure_dict(nnx.state(model)))


def close(found, expected, tolerance):
    expected = np.asarray(expected, np.float64)
    assert np.abs(np.asarray(found, np.float64) - expected).max() <= tolerance * np.abs(expected).max()


# ---- the norms -----------------------------------------------------------------------------------------------------


def test_the_norms_are_the_authors_own(oracles):
    with np.load(oracles / "rmsnorm/norms.npz") as z, jax.enable_x64(True):
        eps = json.loads(str(z["options"]))["eps"]
        for i in range(json.loads(str(z["options"]))["n"]):
            ln, rms, crms, d = z[f"ln{i}"], z[f"rms{i}"], z[f"crms{i}"], z[f"x{i}"].shape[-1]

            def every(x, centred, d=d):
                short, norm = centred[:, :-1], nn.CRMSNorm(d, eps=eps)
                padded = jnp.pad(short, ((0, 0), (0, 1)))
                root, whole = nn.RMSNorm(d, eps=eps, affine=False), nn.CRMSNorm(d, eps=eps, expand=True)
                layer = nn.LayerNorm(d, eps=eps, affine=False)(x)
                return layer, root(x), root(centred), nn.Recentre(d)(x), norm(short), norm(padded), whole(short)

            found = jax.jit(every)(z[f"x{i}"], z[f"x_zm{i}"])
            wanted = (ln, rms, ln, z[f"x_zm{i}"], crms, np.pad(crms, ((0, 0), (0, 1))), ln)
            for own, expected, tolerance in zip(found, wanted, (1e-12, 1e-12, 1e-11, 1e-12, 1e-12, 1e-12, 1e-11)):
                close(own, expected, tolerance)
            close(crms, ln[:, :-1], 1e-11)


def test_recentre_keeps_what_it_is_told():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 6)) + 5, jnp.bfloat16)
    whole, kept = nn.Recentre(6, normalize=True)(x), nn.Recentre(6, normalize=True, keep=5)(x)
    padded = nn.Recentre(6, normalize=True, keep=5, pad=True)(x)
    assert whole.dtype == jnp.bfloat16 and np.array_equal(kept, whole[:, :5])
    assert np.array_equal(padded[:, :5], kept) and not padded[:, 5].any()
    close(whole.astype(jnp.float32).sum(-1), np.zeros(3) + 1e-9, 1e8)
    with pytest.raises(ValueError, match="affine: a scale would not keep the sum"):
        nn.CRMSNorm(6, affine=True)


# ---- the authors' example ------------------------------------------------------------------------------------------


def demo(z, dtype):
    """The example's ViT, whose patches are pixels of as many channels; positions are of the patches alone."""
    options = json.loads(str(z["options"]))
    width, patches = options["dim"], z["x"].shape[1]
    config = vit.Config(
        hidden_size=width, num_hidden_layers=options["depth"], num_attention_heads=options["heads"],
        intermediate_size=z["mlp_in_linear_weight"].shape[1], layer_norm_eps=options["eps"],
        image_size=(patches, 1), patch_size=(1, 1), num_channels=z["x"].shape[2], num_labels=options["num_classes"],
    )  # fmt: skip
    model = jf.init(config, head="image_classification", key=jax.random.key(0))
    put = lambda variable, array: variable.set_value(jnp.asarray(array, dtype))
    e = model.embeddings
    put(e.patch.kernel, z["patch_linear_weight"].T[None, None])
    put(e.patch.bias, z["patch_linear_bias"])
    put(e.cls_token, z["cls_token"][0, 0])
    put(e.position.embedding, np.concatenate([np.zeros((1, width)), z["pos_embedding"][0]]))
    for i, block in enumerate(model.layers):
        for j, linear in enumerate((block.attention.query, block.attention.key, block.attention.value)):
            put(linear.kernel, z["att_in_linear_weight"][i, j * width : (j + 1) * width].T)
            put(linear.bias, z["att_in_linear_bias"][i, j * width : (j + 1) * width])
        rest = {"att_out": block.attention.out, "mlp_in": block.mlp.up, "mlp_out": block.mlp.down}
        for name, linear in rest.items():
            put(linear.kernel, z[f"{name}_linear_weight"][i].T)
            put(linear.bias, z[f"{name}_linear_bias"][i])
    put(model.head.classifier.kernel, z["cls_head_linear_weight"].T)
    put(model.head.classifier.bias, z["cls_head_linear_bias"])
    for norm in residual.streams(model)[0].norms:
        for leaf in (residual.at(model, norm).scale, residual.at(model, norm).bias):
            put(leaf, leaf.get_value())
    return model, {"pixel_values": np.moveaxis(z["x"], 1, 2)[..., None].astype(dtype)}


def demo_arrays(z, prefix, short):
    """{parameter: array} of a converted ViT, as the example has them."""
    pick = lambda name: z[f"{prefix}{name}"] if f"{prefix}{name}" in z.files else z[f"zm_{name}"]
    width = z["zm_cls_token"].shape[-1] - short
    position = np.concatenate([np.zeros((1, width)), pick("pos_embedding")[0]])
    found = {
        "embeddings.patch.kernel": pick("patch_linear_weight").T[None, None],
        "embeddings.patch.bias": pick("patch_linear_bias"),
        "embeddings.cls_token": pick("cls_token")[0, 0],
        "embeddings.position.embedding": position,
    }
    for i in range(z["att_out_linear_weight"].shape[0]):
        for name, path in (("att_out", "attention.out"), ("mlp_out", "mlp.down")):
            found[f"layers.{i}.{path}.kernel"] = pick(f"{name}_linear_weight")[i].T
            found[f"layers.{i}.{path}.bias"] = pick(f"{name}_linear_bias")[i]
        if short:
            fused = np.split(pick("att_in_linear_weight")[i].T, 3, axis=-1)
            found |= {f"layers.{i}.attention.{n}.kernel": w for n, w in zip(("query", "key", "value"), fused)}
            found[f"layers.{i}.mlp.up.kernel"] = pick("mlp_in_linear_weight")[i].T
    return found | ({"head.classifier.kernel": pick("cls_head_linear_weight").T} if short else {})


def test_the_authors_example_in_float64(oracles):
    with np.load(oracles / "rmsnorm/official_demo_vit.npz") as z, jax.enable_x64(True):
        model, batch = demo(z, np.float64)
        close(run(model, batch).logits, z["pre_ln_result"], 1e-9)
        for target, prefix, result in (("zero-mean-ln", "zm_", "pre_ln_result_2"), ("rms", "zm_", "pre_rms_result"),
                                       ("crms", "compressed_", "pre_crms_result")):  # fmt: skip
            converted = convert_norm(model, target)
            arrays = flat(converted)
            for path, expected in demo_arrays(z, prefix, target == "crms").items():
                assert np.abs(np.asarray(arrays[path]) - expected).max() <= 1e-12, path
            close(run(converted, batch).logits, z[result], 1e-9)


def test_the_authors_example_in_float32(oracles):
    with np.load(oracles / "rmsnorm/official_demo_vit.npz") as z:
        model, batch = demo(z, np.float32)
        for target in ("rms", "crms"):
            close(run(convert_norm(model, target), batch).logits, z["pre_ln_result"], 2e-4)


# ---- Hugging Face's tiny models ------------------------------------------------------------------------------------

NAMES = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "attention.out", "1": "mlp.up",
         "2": "mlp.down"}  # fmt: skip


def oracle_arrays(z, target, arch):
    """{parameter: array} of what an independent program made."""
    found = {}
    for key in z.files:
        kind, _, name = key.partition("_")
        layer, _, rest = name.partition("_")
        if kind != target:
            continue
        if layer.startswith("l") and layer[1:].isdigit():
            leaf = "kernel" if rest[1] == "w" else "bias"
            found[f"layers.{layer[1:]}.{NAMES[rest[0]]}.{leaf}"] = z[key]
        elif layer == "head":
            own = "classifier" if arch == "vit" else "decoder"
            found[f"head.{own}.{'kernel' if rest == 'w' else 'bias'}"] = z[key]
        else:
            tables = {"wte": "token.embedding", "wpe": "position.embedding", "pos": "position.embedding",
                      "patch_b": "patch.bias", "patch_w": "patch.kernel", "cls": "cls_token"}  # fmt: skip
            array = z[key].transpose(2, 3, 1, 0) if name == "patch_w" else z[key]
            found[f"embeddings.{tables[name]}"] = array
    return found


def check_oracle(folder, arch, targets):
    model = jf.load(folder)
    with np.load(folder / "conversion.npz") as z:
        batch = {n: z[n] for n in ("attention_mask", "pixel_values") if n in z.files}
        batch |= {"input_ids": z["ids"]} if "ids" in z.files else {}
        mask = batch.get("attention_mask", np.ones(z["logits"].shape[:2]))[..., None] if arch != "vit" else 1
        for target in targets:
            converted = convert_norm(model, target, fold_affine=True)
            arrays, expected = flat(converted), oracle_arrays(z, target, arch)
            assert expected
            for path, value in expected.items():
                shape = value.shape if path == "embeddings.patch.kernel" else arrays[path].shape
                skipped = value.reshape(-1)[-np.prod(shape) :].reshape(shape)  # leading axes of 1
                assert np.abs(np.asarray(arrays[path]) - skipped).max() <= 1e-6, path
            out, seen = run(converted, batch, "layers.*.input")
            assert np.abs((np.asarray(out.logits) - z["logits"]) * mask).max() <= 1e-4
            for i in range(2):
                found = np.asarray(seen[f"layers.{i}.input"])
                hidden = z[f"hidden_recentred_{i}"]
                assert found.shape[-1] == hidden.shape[-1] - (target == "crms")
                assert np.abs((found - hidden[..., : found.shape[-1]]) * mask).max() <= 1e-5


def test_gpt2_as_converted_by_another_program(oracles):
    check_oracle(oracles / "rmsnorm/gpt2_tiny", "gpt2", ("crms",))


@pytest.mark.parametrize("arch", ["gpt2", "vit", "opt"])
def test_all_as_converted_by_another_program(arch, shared):
    check_oracle(shared / "oracles/rmsnorm" / f"{arch}_tiny", arch, ("rms", "crms"))


# ---- architectures -------------------------------------------------------------------------------------------------

# what each adds: parallel branches behind one norm, or behind their own, layer scale and a gate, a masked LM with a
# tied table, three stages, a convolution before the blocks, two streams in a model, one of two, a head behind a norm
MODELS = (
    ("backbones/gptj", "**"), ("backbones/gpt_neox", "**"), ("vision/registers-swiglu", "**"),
    ("backbones/esm/base", "**"), ("vision/segformer-maps", "**"), ("variants/wav2vec2-ctc-stable", "**"),
    ("backbones/clip", "**"), ("backbones/vision_encoder_decoder/vit_trocr", "encoder"),
    ("variants/opt-sequence", "**"), ("backbones/audio-spectrogram-transformer", "**"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "streams"), MODELS)
def test_crms_computes_the_same_and_survives_a_round_trip(name, streams, oracles, tmp_path):
    model = jf.load(oracles / name)
    batch = inputs_of(model, oracles / name)
    small = convert_norm(model, "crms", streams=streams)
    widths = {s.path: s.width for s in residual.streams(model)}
    for stream in residual.streams(small):
        chosen = streams in ("**", stream.path)
        assert stream.width == widths[stream.path] - chosen
        kinds = {type(residual.at(small, norm)) for norm in stream.norms}
        assert not chosen or kinds <= {nn.CRMSNorm, nn.Recentre}
    close(run(small, batch).logits, run(model, batch).logits, 1e-5)
    jf.save(small, tmp_path / "small")
    again = jf.load(tmp_path / "small")
    assert tiny.largest_difference(nnx.to_pure_dict(nnx.state(again)), nnx.to_pure_dict(nnx.state(small))) == 0
    assert rmsnorm.forms(again) == rmsnorm.forms(small)


def test_what_leaves_the_model_keeps_its_width_and_its_values(oracles):
    model = jf.load(oracles / "vision/dinov2-base")  # no head: the normed states are the output
    batch = inputs_of(model, oracles / "vision/dinov2-base")
    expected = run(model, batch)
    for options in ({"target": "crms"}, {"target": "crms", "pad": True}):
        found = run(convert_norm(model, **options), batch)
        close(found.last_hidden_state, expected.last_hidden_state, 1e-5)
        close(found.pooled, expected.pooled, 1e-5)


def test_what_surgery_has_left_of_a_sublayer_is_recentred_too(oracles):
    model = jf.load(oracles / "rmsnorm/gpt2_tiny")
    block, other = model.layers
    block.attention, block.attention_norm = nn.NoAttention(24), nn.Identity()
    block.attention.out.bias.set_value(jnp.arange(24.0))
    other.mlp = nn.NoMLP()
    batch = {"input_ids": np.arange(20).reshape(2, 10)}
    jf.surgery.named(model)
    close(run(convert_norm(model, "crms"), batch).logits, run(model, batch).logits, 1e-5)


def test_the_streams_mean_is_zero_after_every_block(oracles):
    folder = oracles / "rmsnorm/gpt2_tiny"
    model, batch = jf.load(folder), {"input_ids": np.arange(20).reshape(2, 10)}
    _, seen = run(convert_norm(model, "rms"), batch, "layers.*.output")
    for h in seen.values():
        assert np.abs(h.mean(-1)).max() <= 1e-6 * np.sqrt(np.square(h).mean())
    _, seen = run(model, batch, "layers.*.output")
    assert all(np.abs(h.mean(-1)).max() > 1e-2 for h in seen.values())


def test_a_padded_stream_ends_in_a_zero(oracles):
    model = jf.load(oracles / "rmsnorm/gpt2_tiny")
    small = convert_norm(model, "crms", pad=True)
    batch = {"input_ids": np.arange(20).reshape(2, 10)}
    out, seen = run(small, batch, "layers.*.output")
    assert all(h.shape[-1] == 24 and not np.asarray(h)[..., -1].any() for h in seen.values())
    short = convert_norm(model, "crms")
    close(out.logits, run(short, batch).logits, 1e-5)
    assert residual.streams(small)[0].width == 24 and residual.streams(short)[0].width == 23


# ---- from form to form ---------------------------------------------------------------------------------------------


def test_from_every_form_to_every_other(oracles):
    model = jf.load(oracles / "rmsnorm/gpt2_tiny")
    batch = {"input_ids": np.arange(20).reshape(2, 10)}
    expected = run(model, batch).logits
    there = model
    for options in ({"target": "crms"}, {"target": "rms"}, {"target": "crms", "pad": True}, {"target": "zero-mean-ln"}):
        there = convert_norm(there, **options)
        close(run(there, batch).logits, expected, 1e-5)
        kind = {"rms": nn.RMSNorm, "crms": nn.CRMSNorm}.get(options["target"], nn.LayerNorm)
        assert isinstance(there.layers[1].mlp_norm, kind) and isinstance(there.final_norm, kind)


@pytest.mark.parametrize("name", ["vision/registers-swiglu", "backbones/clip"])
def test_back_from_crms_to_layer_norm_and_through_a_file(name, oracles, tmp_path):
    """Layer scale, biases that took up β, a norm at the start of a stream: what changed comes back or is noted."""
    model = jf.load(oracles / name)
    batch = inputs_of(model, oracles / name)
    streams = "text" if name.endswith("clip") else "**"
    back = convert_norm(convert_norm(model, "crms"), "rms") if streams == "text" else None
    back = convert_norm(back or convert_norm(model, "crms"), "zero-mean-ln", streams=streams)
    own = [s for s in residual.streams(back) if streams in ("**", s.path)]
    assert all(isinstance(residual.at(back, norm), nn.LayerNorm) for s in own for norm in s.norms)
    assert all(branch.scale is None or streams == "**" for s in own for branch in s.branches)
    close(run(back, batch).logits, run(model, batch).logits, 1e-5)
    jf.save(back, tmp_path / "back")
    again = jf.load(tmp_path / "back")
    assert tiny.largest_difference(nnx.to_pure_dict(nnx.state(again)), nnx.to_pure_dict(nnx.state(back))) == 0


def test_zero_mean_layer_norm_is_an_ordinary_checkpoint(oracles, tmp_path):
    model = jf.load(oracles / "rmsnorm/gpt2_tiny")
    plain = convert_norm(model, "zero-mean-ln")
    jf.save(plain, tmp_path / "plain")
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert "jaxformers" not in config and config["tie_word_embeddings"] is False
    names = set(jf.hub.open_checkpoint(tmp_path / "plain"))
    before = {name.removeprefix("transformer.") for name in jf.hub.open_checkpoint(oracles / "rmsnorm/gpt2_tiny")}
    assert {name.removeprefix("transformer.") for name in names} - before == {"lm_head.weight"}
    batch = {"input_ids": np.arange(20).reshape(2, 10)}
    close(run(jf.load(tmp_path / "plain"), batch).logits, run(model, batch).logits, 1e-5)


def test_keeping_the_tie_would_be_wrong(oracles):
    """The output projection is the table as it was: with recentred rows the logits are others."""
    model = jf.load(oracles / "rmsnorm/gpt2_tiny")
    batch = {"input_ids": np.arange(20).reshape(2, 10)}
    plain = convert_norm(model, "zero-mean-ln")
    assert np.array_equal(plain.head.decoder.kernel.get_value(), model.embeddings.token.embedding.get_value().T)
    plain.head.decoder.kernel.set_value(plain.embeddings.token.embedding.get_value().T)
    with pytest.raises(AssertionError):
        close(run(plain, batch).logits, run(model, batch).logits, 1e-3)


# ---- training ------------------------------------------------------------------------------------------------------


def one_block(z):
    """The oracle's model: one block, norms without γ and β, a head with a bias of its own."""
    rows, width = z["init_wte"].shape
    config = gpt2.Config(
        vocab_size=rows, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False,
        intermediate_size=z["init_1b"].shape[0], max_position_embeddings=z["init_wpe"].shape[0],
        hidden_dropout_prob=0.0, embedding_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = jf.init(config, head="causal_lm", key=jax.random.key(0))
    block = model.layers[0]
    block.attention_norm, block.mlp_norm, model.final_norm = (nn.LayerNorm(width, affine=False) for _ in range(3))
    model.head.decoder = nnx.data(nn.Linear(width, rows, rngs=nnx.Rngs(0)))
    for path, name in PARAMETERS.items():
        residual.at(model, path).set_value(jnp.asarray(z[f"init_{name}"]))
    return jf.surgery.named(model)


PARAMETERS = {
    "embeddings.token.embedding": "wte", "embeddings.position.embedding": "wpe", "head.decoder.kernel": "hw",
    "head.decoder.bias": "hb",
    **{f"layers.0.{NAMES[n]}.{leaf}": f"{n}{leaf[0].replace('k', 'w')}" for n in NAMES for leaf in ("kernel", "bias")},
}  # fmt: skip


def train(model, ids, rate=3e-3):
    """(losses, first gradients, last parameters) of AdamW on next tokens."""
    apply, params = jf.functional(model)
    optimiser = optax.adamw(rate, weight_decay=0.01)

    def loss(params, ids):
        logits = apply(params, {"input_ids": ids[:, :-1]}).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    @jax.jit
    def run(params, ids):
        def step(carry, ids):
            value, grads = jax.value_and_grad(loss)(carry[0], ids)
            updates, state = optimiser.update(grads, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), value

        (last, _), losses = jax.lax.scan(step, (params, optimiser.init(params)), ids)
        return losses, jax.grad(loss)(params, ids[0]), last

    losses, grads, last = run(params, ids)
    return np.asarray(losses), paths.flatten(grads), paths.flatten(last)


def test_training_takes_the_path_of_layer_norm_only_when_recentred_in_every_pass(oracles):
    with np.load(oracles / "rmsnorm/training.npz") as z, jax.enable_x64(True):
        model, ids = one_block(z), jnp.asarray(z["ids"])
        losses, grads, last = train(model, ids)
        fly = convert_norm(model, "rms", on_the_fly=True)
        assert isinstance(fly.layers[0].mlp.down, nn.CenteredLinear) and isinstance(fly.final_norm, nn.RMSNorm)
        own, own_grads, own_last = train(fly, ids)
        np.testing.assert_allclose(losses, z["losses_ln"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(own, z["losses_fly"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(own, losses, rtol=0, atol=1e-10)
        for path, name in PARAMETERS.items():
            assert np.abs(own_grads[path] - grads[path]).max() <= 1e-10
            assert np.abs(own_last[path] - z[f"final_{name}"]).max() <= 1e-9
            if f"grad0_{name}" in z.files:
                assert np.abs(grads[path] - z[f"grad0_{name}"]).max() <= 1e-10
        once, _, _ = train(convert_norm(model, "rms"), ids)
        np.testing.assert_allclose(once, z["losses_once"], rtol=0, atol=1e-9)
        assert np.abs(once - losses).max() > 1e-3  # and the assertions above would see it


def test_the_form_for_training_goes_into_a_file_and_into_the_others(oracles, tmp_path):
    model = jf.load(oracles / "rmsnorm/gpt2_tiny")
    batch = {"input_ids": np.arange(20).reshape(2, 10)}
    fly = convert_norm(model, "rms", on_the_fly=True)
    expected = run(model, batch).logits
    assert {path for path in flat(fly)} == {path for path in flat(model)}  # the same parameters, the table still tied
    close(run(fly, batch).logits, expected, 1e-5)
    jf.save(fly, tmp_path / "fly")
    again = jf.load(tmp_path / "fly")
    assert isinstance(again.embeddings.norm, nn.Recentre)
    close(run(again, batch).logits, expected, 1e-5)
    done = convert_norm(again, "crms")
    assert isinstance(done.layers[0].attention.out, nn.Linear) and done.embeddings.norm is None
    close(run(done, batch).logits, expected, 1e-5)
    lora = weights.add_lora(fly, "layers.*.attention.out", rank=2, key=jax.random.key(0))
    close(run(lora, batch).logits, expected, 1e-5)


# ---- together with other systems -----------------------------------------------------------------------------------


def test_converted_quantised_saved_loaded_and_generating(oracles, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = tiny.model("gpt2", **sizes, vocab_size=64, max_position_embeddings=24)
    small = convert_norm(model, "crms", pad=True)  # 31 inputs would not fill packed words
    prompts = [[5, 9, 2], [7, 1, 3]]
    ids = jf.generate(model, prompts, max_new_tokens=4, eos_token_id=())
    assert jf.generate(small, prompts, max_new_tokens=4, eos_token_id=()) == ids
    calibration = np.random.default_rng(0).integers(0, 64, (8, 16))
    packed = gptq(small, calibration, bits=4, group_size=16)
    jf.save(packed, tmp_path / "packed")
    again = jf.load(tmp_path / "packed")
    block = again.layers[0]
    assert {type(linear.kernel.get_value()) for linear in (block.mlp.up, block.attention.out)} == {weights.PackedWeight}
    assert isinstance(again.final_norm, nn.CRMSNorm)
    batch = {"input_ids": calibration[:2]}
    out, seen = run(again, batch, "layers.*.output")
    assert all(not np.asarray(h)[..., -1].any() for h in seen.values())  # rounding leaves the last place zero
    close(out.logits, run(packed, batch).logits, 1e-5)
    assert np.corrcoef(np.ravel(out.logits), np.ravel(run(model, batch).logits))[0, 1] > 0.9
    with pytest.raises(ValueError, match="has a PackedWeight; merge low-rank updates before, quantise and prune after"):
        convert_norm(again, "rms")


def test_converted_pruned_saved_and_loaded(oracles, tmp_path):
    small = convert_norm(jf.load(oracles / "rmsnorm/gpt2_tiny"), "crms")
    pruned = prune(small, sparsity=0.5)
    masked = weights.add_masks(pruned.model, pruned.masks)
    jf.save(masked, tmp_path / "half")
    again = jf.load(tmp_path / "half")
    kernel = again.layers[0].mlp.up.kernel.get_value()
    assert isinstance(kernel, weights.Masked) and kernel.shape == (23, 96) and isinstance(again.final_norm, nn.CRMSNorm)
    before, after = (jax.tree.leaves(nnx.to_pure_dict(nnx.state(m))) for m in (masked, again))
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    with pytest.raises(ValueError, match="has a Masked; merge low-rank updates before, quantise and prune afterwards"):
        convert_norm(again, "rms")


def test_from_checkpoint_to_checkpoint(oracles, tmp_path):
    found = convert_norm_checkpoint(oracles / "rmsnorm/gpt2_tiny", tmp_path / "rms", "rms")
    assert 0 < found.relative < 1e-5
    assert isinstance(jf.load(tmp_path / "rms").final_norm, nn.RMSNorm)
    other = jf.load(tmp_path / "rms")
    other.final_norm.eps = 0.5
    with pytest.raises(ValueError, match="verify: logits differ by"):
        verify_norm(jf.load(oracles / "rmsnorm/gpt2_tiny"), other)


def test_sixteen_bits(oracles):
    model = jf.load(oracles / "rmsnorm/gpt2_tiny", dtype="bfloat16")
    small = convert_norm(model, "crms", verify=True)
    assert {leaf.dtype for leaf in flat(small).values()} == {jnp.dtype(jnp.bfloat16)}
    wide = jf.load(oracles / "rmsnorm/gpt2_tiny")
    batch = {"input_ids": np.arange(20).reshape(2, 10)}
    noise = np.abs(np.asarray(run(model, batch).logits, np.float32) - run(wide, batch).logits).max()
    own = np.abs(np.asarray(run(small, batch).logits, np.float32) - run(wide, batch).logits).max()
    assert own < 3 * noise  # no worse than what 16 bits cost the source


# ---- what does not go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("backbones/bert/mlm", {}, "post-norm: the output of its norms, γ and β included, is the residual stream"),
        ("variants/opt-postnorm", {}, "the stream of OPT is post-norm"),
        ("backbones/llama/mha_leftpad", {}, "has RMSNorm already"),
        ("backbones/t5-v1_1", {"streams": "encoder"}, "the stream of encoder has RMSNorm already"),
        ("backbones/gin/gin", {}, "GIN has no residual stream"),
        ("backbones/swin", {}, "stages.0.merge.norm several vectors at a time"),
        ("variants/opt-bare", {}, "is read by the output projection without a norm"),
        ("backbones/llava/tiny", {"streams": "vision"}, "vision is read by projector.up without a norm"),
        ("mixed/clip-labels", {}, "is read by head.classifier without a norm"),
        ("vision/beit-maps", {}, "is read by head without a norm"),
        ("backbones/clip", {"target": "zero-mean-ln"}, "starts behind vision.embeddings.norm"),
        ("backbones/gptj", {"target": "zero-mean-ln", "fold_affine": True}, "has no bias to take up β"),
        ("backbones/gpt2", {"on_the_fly": True}, r"has dropout \(0.1\) on what is added"),
        ("vision/dinov2-base", {"on_the_fly": True}, "has a layer scale behind its branches"),
        ("backbones/vit_mae/tiny", {"on_the_fly": True}, "no place to recentre it in every pass"),
        ("backbones/vit", {"target": "layernorm"}, "target: expected one of zero-mean-ln, rms, crms, got 'layernorm'"),
        ("backbones/vit", {"target": "crms", "fold_affine": False}, "they must be folded"),
        ("backbones/vit", {"pad": True}, "pad: only crms drops a coordinate"),
        ("backbones/vit", {"target": "crms", "on_the_fly": True}, "the form for training is rms"),
        ("backbones/vit", {"streams": "encoder"}, "matches none of the model's residual streams; there are ''"),
    ],
)
def test_what_cannot_be_converted_is_named(name, options, message, oracles):
    model = jf.hub.outline(oracles / name).model
    with pytest.raises(ValueError, match=message):
        convert_norm(model, **options)


def test_weights_that_others_changed_are_refused(oracles):
    model = jf.load(oracles / "rmsnorm/gpt2_tiny")
    lora = weights.add_lora(model, key=jax.random.key(0))
    with pytest.raises(ValueError, match="attention.query has a LowRank; merge low-rank updates before"):
        convert_norm(lora, "rms")
    assert isinstance(convert_norm(weights.merge_lora(lora), "rms").final_norm, nn.RMSNorm)
    with pytest.raises(ValueError, match="attention.out has an adapter"):
        convert_norm(nn.add_adapters(model, size=2, key=jax.random.key(0)), "rms")


def test_a_record_that_does_not_fit_is_refused(oracles):
    told = {"streams": [""], "target": "rms", "fold": False}
    record = lambda **changes: {"surgery": [{"function": rmsnorm.RECORD, "arguments": told | changes}]}
    bert, model = (jf.hub.outline(oracles / name).model for name in ("backbones/bert/mlm", "rmsnorm/gpt2_tiny"))
    for target, section, message in (
        (bert, record(), "is post-norm"),
        (model, record(streams=["encoder"]), "has no residual stream 'encoder'"),
        (model, record(target="batch"), "target: expected one of"),
        (model, record(fold="no", width=3), "unexpected keyword argument 'width'"),
    ):
        with pytest.raises(ValueError, match=message):
            jf.surgery.replay(target, section)


def test_states_that_leave_without_a_norm_are_logged(oracles, caplog):
    model = jf.load(oracles / "mixed/clip-vision")
    with caplog.at_level(logging.WARNING):
        small = convert_norm(model, "crms")
    assert "un-normalised states are an output; they have mean 0 now and one coordinate less" in caplog.text
    batch = inputs_of(model, oracles / "mixed/clip-vision")
    before, after = run(model, batch), run(small, batch)
    close(after.pooled, before.pooled, 1e-5)
    centred = np.asarray(before.last_hidden_state) - np.asarray(before.last_hidden_state).mean(-1, keepdims=True)
    close(after.last_hidden_state, centred[..., :-1], 1e-5)
