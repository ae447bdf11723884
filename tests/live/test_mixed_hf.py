"""Models of images and texts against Hugging Face itself: what is written here it reads alike, and gradients agree."""

import jax
import numpy as np
import pytest
from parity import assert_close_scaled, grads_by_hf_name
from safetensors.numpy import load_file

import jaxformers as jf

torch = pytest.importorskip("torch", reason="live comparison: pip install 'jaxformers[oracle]'")
transformers = pytest.importorskip("transformers", reason="live comparison: pip install 'jaxformers[oracle]'")

from live import freeze_mixed  # noqa: E402
from models.test_llava import with_processor  # noqa: E402
from models.test_mixed import NAMES, read, real  # noqa: E402


def test_all_variants_are_frozen():
    assert set(NAMES) == set(freeze_mixed.VARIANTS)


@pytest.mark.parametrize("name", freeze_mixed.VARIANTS)
def test_hugging_face_reads_what_is_written_here(name, oracles, tmp_path):
    folder = oracles / "mixed" / name
    jf.save(jf.load(folder), tmp_path / "x")
    cls = getattr(transformers, freeze_mixed.VARIANTS[name][0])
    model, report = cls.from_pretrained(tmp_path / "x", attn_implementation="eager", output_loading_info=True)
    unread = {"decoder.lm_head.bias"} if name == "ved-roberta" else set()  # a bias without use
    assert set(report["missing_keys"]) <= unread and not report["unexpected_keys"] and not report["mismatched_keys"]
    inputs, expected = read(folder)
    if name == "ved-trocr-sines":  # its table of sines has no data after from_pretrained, which is no weight's fault
        positions = model.decoder.model.decoder.embed_positions
        positions.weights = positions.get_embedding(*positions.weights.shape, positions.padding_idx)
    for key, value in freeze_mixed.run(model.eval(), inputs).items():
        assert_close_scaled(value, expected[key], 1e-5, real(key, value, inputs))


@pytest.mark.parametrize("name", freeze_mixed.VARIANTS)
def test_the_frozen_values_are_those_of_the_installed_version(name, oracles):
    inputs, expected = read(oracles / "mixed" / name)
    drawn = freeze_mixed.batch(name)
    assert set(inputs) == set(drawn) and all(np.array_equal(inputs[k], drawn[k]) for k in inputs)
    for key, value in freeze_mixed.run(freeze_mixed.build(name), inputs).items():
        assert_close_scaled(value, expected[key], 1e-5, real(key, value, inputs))


@pytest.mark.parametrize("name", ["clip-legacy", "clip-stretched"])
def test_gradients_of_the_contrastive_loss(name, oracles):
    from jaxformers.losses import info_nce

    folder = oracles / "mixed" / name
    inputs, _ = read(folder)
    inputs = {k: v[:2] for k, v in inputs.items()}  # a loss of pairs
    theirs = transformers.CLIPModel.from_pretrained(folder, attn_implementation="eager")
    batch = {k: torch.from_numpy(v) for k, v in inputs.items()}
    theirs(**batch, return_loss=True, interpolate_pos_encoding=name == "clip-stretched").loss.backward()

    model = jf.load(folder)
    apply, params = jf.functional(model)

    def loss(params):
        extra = apply(params, inputs).extra
        return info_nce(extra["image_embeds"], extra["text_embeds"], log_scale=params["logit_scale"])[0]

    found = grads_by_hf_name(model, jax.jit(jax.grad(loss))(params))
    scale = max(float(p.grad.abs().max()) for p in theirs.parameters())
    for key, parameter in theirs.named_parameters():
        assert np.abs(found[key] - parameter.grad.numpy()).max() < 1e-4 * scale, key


@pytest.mark.parametrize("name", ["llava-mistral", "llava-gpt2", "ved-roberta", "ved-trocr-sines", "ved-gpt2"])
def test_gradients_of_a_language_models_loss(name, oracles, tmp_path):
    from jaxformers.losses import cross_entropy

    folder = oracles / "mixed" / name
    inputs, _ = read(folder)
    ids = inputs.get("input_ids", inputs.get("decoder_input_ids"))
    labels = np.where(ids == 37, -100, np.roll(ids, 3, axis=1))
    theirs = freeze_mixed.build(name)
    theirs(**{k: torch.from_numpy(v) for k, v in inputs.items()}, labels=torch.from_numpy(labels)).loss.backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(tmp_path)  # gradients under the names of a checkpoint
    expected = load_file(tmp_path / "model.safetensors")

    model = jf.load(folder)
    apply, params = jf.functional(model)
    late = name.startswith("llava")  # there the labels are those of the inputs, to be shifted

    def loss(params):
        logits = apply(params, inputs).logits
        return cross_entropy(logits[:, :-1], labels[:, 1:]) if late else cross_entropy(logits, labels)

    found = grads_by_hf_name(model, jax.jit(jax.grad(loss))(params))
    scale = max(float(np.abs(g).max()) for g in expected.values())
    assert set(expected) - set(found) <= {"decoder.lm_head.bias"}
    for key in found:
        error = np.abs(found[key] - expected[key])
        if key.endswith(("embed_tokens.weight", "word_embeddings.weight")):
            error[0 if late else 1] = 0  # torch keeps gradients from the row of padding
        assert error.max() < 1e-4 * scale, key


def test_a_processor_of_images_and_texts(oracles, tmp_path):
    chat = with_processor(oracles / "backbones" / "llava" / "tiny", tmp_path / "x")
    theirs = transformers.AutoProcessor.from_pretrained(chat)
    pictures = list(np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3), dtype=np.uint8))
    texts = ["w5 <image> w7 w9 <image>", "w8"]
    expected = theirs(images=pictures, text=texts)
    pixels = jf.load_image_processor(chat)(pictures)["pixel_values"]
    np.testing.assert_allclose(pixels, np.stack(expected["pixel_values"]), atol=1e-6)
    prompts = [jf.load_tokenizer(chat).encode(text) for text in texts]
    assert jf.load(chat).expand_images(prompts, pixels) == [list(row) for row in expected["input_ids"]]
