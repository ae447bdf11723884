"""wav2vec 2.0 against Hugging Face on tiny models frozen by tests/live/freeze_audio.py; masks, rates, errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parity import assert_close_scaled, grads_by_hf_name, run
from safetensors.numpy import load_file, save_file

import jaxformers as jf
from jaxformers.data.features import WaveExtractor
from jaxformers.models import wav2vec2
from jaxformers.safetensors_io import CheckpointError

NAMES = ("", "-unmasked", "-ctc", "-ctc-stable", "-sequence", "-sequence-stable", "-frames")
LABELS = np.array([[3, 4, 4, 5, 10], [7, 8, -100, -100, -100]])


def load(oracles, name, **settings):
    folder = oracles / "variants" / f"wav2vec2{name}"
    with np.load(folder / "io.npz") as z:
        return jf.load(folder, **settings), {key: z[key] for key in z.files}


def batch_of(arrays, kind):
    names = ("input_values", "attention_mask")
    return {name: arrays[f"{kind}.{name}"] for name in names if f"{kind}.{name}" in arrays}


@pytest.mark.parametrize("kind", ["plain", "padded"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_hugging_face(name, kind, oracles):
    model, expected = load(oracles, name)
    out = run(model, batch_of(expected, kind))
    real = out.extra.get("frame_mask")
    assert (real is None) == (kind == "plain")
    if real is not None:
        assert real.sum(axis=1).tolist() == [model.config.frames(400), model.config.frames(271)] == [19, 13]
    parts = [part for part in ("last_hidden_state", "logits") if f"{kind}.{part}" in expected]
    assert parts
    for part in parts:
        value = expected[f"{kind}.{part}"]
        assert_close_scaled(getattr(out, part), value, 2e-5, real if value.ndim == 3 else None)


@pytest.mark.parametrize("kind", ["plain", "padded"])
@pytest.mark.parametrize("name", ["-ctc", "-ctc-stable"])
def test_ctc_loss_and_gradients(name, kind, oracles):
    model, expected = load(oracles, name)
    apply, params = jf.functional(model)
    batch = batch_of(expected, kind)

    def loss(params):
        out = apply(params, batch)
        padding = jnp.zeros(out.logits.shape[:2]) if kind == "plain" else 1.0 - out.extra["frame_mask"]
        ignored = LABELS < 0
        losses = optax.ctc_loss(out.logits, padding, np.where(ignored, 0, LABELS), ignored.astype(float), blank_id=0)
        return losses.sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert_close_scaled(value, expected[f"{kind}.loss"], 1e-5)
    grads = grads_by_hf_name(model, grads)
    names = [key for key in expected if key.startswith(f"{kind}.grad.")]
    assert len(names) == 4
    for key in names:
        assert_close_scaled(grads[key.removeprefix(f"{kind}.grad.")], expected[key], 2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_save_is_bit_equal(name, oracles, tmp_path):
    model, _ = load(oracles, name)
    jf.save(model, tmp_path / "copy")
    folder = oracles / "variants" / f"wav2vec2{name}"
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "copy"))
    assert set(before) == set(after)
    assert all(np.array_equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    configs = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "copy"))
    assert next(configs) == next(configs)


def test_older_names_of_the_weight_norm_and_other_heads(oracles, tmp_path):
    model, expected = load(oracles, "-ctc")
    folder = oracles / "variants" / "wav2vec2-ctc"
    tensors = load_file(folder / "model.safetensors")
    for old, new in (
        ("weight_g", "parametrizations.weight.original0"),
        ("weight_v", "parametrizations.weight.original1"),
    ):
        stem = "wav2vec2.encoder.pos_conv_embed.conv."
        tensors[stem + old] = tensors.pop(stem + new)
    tensors["quantizer.codevectors"] = np.zeros((1, 4, 2), np.float32)  # of pre-training
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    body = jf.load(tmp_path, head="none")
    out = run(body, batch_of(expected, "plain"))
    assert out.logits is None
    assert np.array_equal(out.last_hidden_state, run(model, batch_of(expected, "plain")).last_hidden_state)
    with pytest.raises(CheckpointError, match="no place in this model: quantizer.codevectors"):
        jf.load(tmp_path)
    labelled = jf.load(tmp_path, head="sequence_classification", key=jax.random.key(0))
    assert run(labelled, batch_of(expected, "plain")).logits.shape == (2, model.config.num_labels)


@pytest.mark.parametrize("name", ["", "-unmasked"])
def test_scanned_layers_and_sites(name, oracles):
    model, expected = load(oracles, name)
    apply, params = jf.functional(model, scan_layers=True)
    patterns = ("embeddings", "layers.*.output", "layers.*.attention.probs", "embeddings.features.0.conv.output")
    out, seen = jax.jit(jf.reap(apply, patterns))(params, batch_of(expected, "padded"))
    real = out.extra["frame_mask"]
    assert_close_scaled(out.last_hidden_state, expected["padded.last_hidden_state"], 2e-5, real)
    assert seen["embeddings"].shape == seen["layers.1.output"].shape == (2, 19, 16)
    assert seen["embeddings.features.0.conv.output"].shape == (2, 79, 6)
    assert not np.any(seen["layers.0.attention.probs"][1, :, :, 13:])  # nobody looks at padding


def test_weighted_sum_works_on_scanned_layers_too(oracles):
    model, expected = load(oracles, "-sequence")
    apply, params = jf.functional(model, scan_layers=True)
    out = jax.jit(apply)(params, batch_of(expected, "plain"))
    assert_close_scaled(out.logits, expected["plain.logits"], 2e-5)


def test_padding_does_not_reach_real_frames(oracles):
    model, expected = load(oracles, "-ctc-stable")
    batch = batch_of(expected, "padded")
    loud = {**batch, "input_values": np.where(batch["attention_mask"] == 1, batch["input_values"], 100)}
    first, second = run(model, batch), run(model, loud)
    real = first.extra["frame_mask"]
    assert_close_scaled(second.logits, first.logits, 1e-6, real)
    alone = run(model, {"input_values": batch["input_values"][1:, :271]})
    assert_close_scaled(alone.logits[0], first.logits[1, :13], 2e-5)


def test_masked_frames(oracles):
    model, expected = load(oracles, "")
    batch = batch_of(expected, "plain")
    mask = np.zeros((2, 19), bool)
    mask[0, 3:5] = True
    apply, params = jf.functional(model)
    masked = {**params, "embeddings": {**params["embeddings"], "masked": params["embeddings"]["masked"] + 1}}
    step = jax.jit(lambda params: apply(params, {**batch, "mask_time_indices": mask}).last_hidden_state)
    assert np.abs(step(params)[0] - run(model, batch).last_hidden_state[0]).max() > 0.01
    assert np.array_equal(step(params)[1], step(masked)[1]) and np.abs(step(params)[0] - step(masked)[0]).max() > 0.01
    without, _ = load(oracles, "-unmasked")
    with pytest.raises(ValueError, match="mask_time_indices: this model has no vector for masked frames"):
        run(without, {**batch, "mask_time_indices": mask})


QUIET = {
    "hidden_dropout_prob": 0.0, "activation_dropout": 0.0, "attention_probs_dropout_prob": 0.0, "layerdrop": 0.0,
    "feat_proj_dropout": 0.0, "final_dropout": 0.0, "mask_time_prob": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("rate", [*QUIET, "mask_feature_prob"])
def test_every_rate_does_something_in_training_only(rate, oracles):
    settings = QUIET | {rate: 0.5, "mask_time_length": 2, "mask_feature_length": 2}
    model = jf.init(load(oracles, "-ctc")[0].config, head="ctc", key=jax.random.key(0))
    model = jf.init(jf.models.config.replace(model.config, settings), head="ctc", key=jax.random.key(0))
    batch = {"input_values": np.random.default_rng(0).standard_normal((2, 400)).astype(np.float32)}
    apply, params = jf.functional(model)
    step = jax.jit(lambda key: apply(params, batch, rngs=key).logits)
    plain = run(model, batch).logits
    drawn = [step(jax.random.key(i)) for i in range(6)]
    assert np.array_equal(drawn[0], step(jax.random.key(0)))
    assert max(np.abs(value - plain).max() for value in drawn) > 1e-4
    if rate == "layerdrop":  # with both layers skipped, what is left is the head on the embeddings
        assert len({np.asarray(value).tobytes() for value in drawn}) <= 4


drawn_spans = jax.jit(wav2vec2.spans, static_argnums=(1, 3))


@given(st.floats(0, 1), st.sampled_from([1, 2, 5, 24]), st.integers(0, 3), st.integers(0, 99))
def test_spans(prob, length, at_least, seed):
    size = 24
    lengths = np.random.default_rng(seed).integers(0, size + 1, 5)
    mask = drawn_spans(jax.random.key(seed), (5, size), prob, length, at_least, lengths=lengths)
    mask, prob = np.asarray(mask), np.float32(prob)
    for row, own in zip(mask, lengths, strict=True):
        assert not row[own:].any()  # spans end within the real frames
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
        runs = edges[1::2] - edges[::2]
        assert (runs >= length).all()
        starts = max(own - length + 1, 0)
        most = min(max(int(prob * own / length + np.float32(1)), at_least), starts, size // length)
        least = min(max(int(prob * own / length), at_least), starts, size // length)
        assert row.sum() <= most * length and (row.sum() >= length or least == 0)


def test_spans_cover_what_they_should():
    mask = drawn_spans(jax.random.key(0), (500, 200), 0.2, 1)  # length 1: no overlap
    assert abs(float(mask.mean()) - 0.2) < 0.004
    assert np.abs(np.asarray(mask).mean(axis=0) - 0.2).max() < 0.1  # anywhere
    with pytest.raises(ValueError, match="mask length 9: longer than the 8 places"):
        wav2vec2.spans(jax.random.key(0), (1, 8), 0.1, 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feat_extract_norm": "batch"}, "feat_extract_norm must be 'group' or 'layer', got 'batch'"),
        ({"conv_dim": [8, 8]}, "must be equally long lists"),
        ({"conv_stride": [5, 0, 2]}, "must be equally long lists of numbers of 1 or more"),
        ({"conv_kernel": [10, 3, "2"]}, "conv_kernel must be a list of whole numbers"),
        ({"add_adapter": True}, "add_adapter True is not supported, only False"),
        ({"adapter_attn_dim": 16}, "adapter_attn_dim 16 is not supported, only None"),
        ({"mask_time_length": 0}, "mask_time_length and mask_feature_length must be 1 or more"),
        ({"num_conv_pos_embedding_groups": 3}, "num_conv_pos_embedding_groups 3 do not divide 16 channels"),
    ],
)
def test_configs_that_are_refused(settings, message, oracles):
    hf = json.loads((oracles / "variants" / "wav2vec2" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        jf.init(hf | settings, key=jax.random.key(0))


@pytest.mark.parametrize("shape", [(400,), (2, 24), (2, 1, 400)])
def test_waveforms_that_are_refused(shape, oracles):
    apply, params = jf.functional(load(oracles, "")[0])
    with pytest.raises(ValueError, match=r"input_values: expected \(batch, samples\) with samples for a frame"):
        apply(params, {"input_values": np.zeros(shape, np.float32)})


def test_extractor():
    rng = np.random.default_rng(0)
    waves = [rng.standard_normal(n).astype(np.float32) * 3 + 1 for n in (50, 30)]
    found = WaveExtractor(return_attention_mask=True)(waves, sampling_rate=16000, length=64)
    assert found["input_values"].shape == (2, 64) and found["attention_mask"].sum(axis=1).tolist() == [50, 30]
    real = found["input_values"][1, :30]
    assert abs(real.mean()) < 1e-6 and abs(real.std() - 1) < 1e-5 and not found["input_values"][1, 30:].any()
    plain = WaveExtractor(do_normalize=False)(waves, sampling_rate=16000)
    assert set(plain) == {"input_values"} and np.array_equal(plain["input_values"][1, :30], waves[1])
    for kwargs, message in (
        ({"sampling_rate": 8000}, "sampling_rate=8000: this model was trained at 16000 Hz"),
        ({"sampling_rate": 16000, "length": 40}, "30 to 50 samples; expected 1 to 40"),
    ):
        with pytest.raises(ValueError, match=message):
            WaveExtractor()(waves, **kwargs)
    with pytest.raises(ValueError, match="NaN or infinite"):
        WaveExtractor()(np.array([0.0, np.inf]), sampling_rate=16000)
