"""CLIP against Hugging Face on a tiny model, its loss, and what becomes of its towers alone."""

import json
import shutil

import jax
import numpy as np
import pytest
from parity import assert_close, run

import jaxformers as jf
from jaxformers.losses import info_nce
from jaxformers.models import clip
from jaxformers.models.clip_text import end_state
from jaxformers.safetensors_io import CheckpointError

TOLERANCE = 1e-5  # absolute, by the oracle's README


@pytest.fixture(scope="module")
def folder(oracles):
    return oracles / "backbones" / "clip"


@pytest.fixture(scope="module")
def model(folder):
    return jf.load(folder)


@pytest.fixture(scope="module")
def expected(folder):
    with np.load(folder / "io.npz") as z:
        return dict(z)


@pytest.fixture(scope="module")
def batch(expected):
    return {name: expected[name] for name in ("input_ids", "pixel_values", "attention_mask")}


def test_every_array(model, expected, batch):
    apply, params = jf.functional(model)
    out, seen = jax.jit(jf.reap(apply, ("*.embeddings", "*.layers.*.output", "*.layers.*.attention.probs")))(
        params, batch
    )
    found = {
        "logits_per_image": out.logits,
        "logits_per_text": out.extra["logits_per_text"],
        "image_embeds": out.extra["image_embeds"],
        "text_embeds": out.extra["text_embeds"],
    }
    for tower, depth in (("vision", 3), ("text", 2)):
        own = out.extra[f"{tower}_model_output"]
        found[f"{tower}/last_hidden_state"], found[f"{tower}/pooler_output"] = own.last_hidden_state, own.pooled
        found[f"{tower}/hidden_states/0"] = seen[f"{tower}.embeddings"]
        for i in range(depth):
            found[f"{tower}/hidden_states/{i + 1}"] = seen[f"{tower}.layers.{i}.output"]
            found[f"{tower}/attentions/{i}"] = seen[f"{tower}.layers.{i}.attention.probs"]
    nomask = run(model, {name: batch[name] for name in ("input_ids", "pixel_values")}).extra["text_model_output"]
    found |= {"text_nomask/last_hidden_state": nomask.last_hidden_state, "text_nomask/pooler_output": nomask.pooled}
    images = len(batch["pixel_values"])
    loss, _ = info_nce(found["image_embeds"], found["text_embeds"][:images], log_scale=params["logit_scale"])
    found["contrastive_loss_first_B"] = loss
    assert set(found) == set(expected) - {"options_json"} - set(batch)
    for name, value in found.items():
        assert_close(value, expected[name], TOLERANCE)


def test_one_modality_alone(model, expected, batch):
    images = run(model, {"pixel_values": batch["pixel_values"]})
    assert_close(images.extra["image_embeds"], expected["image_embeds"], TOLERANCE)
    texts = run(model, {name: batch[name] for name in ("input_ids", "attention_mask")})
    assert_close(texts.extra["text_embeds"], expected["text_embeds"], TOLERANCE)
    assert images.logits is texts.logits is None
    with pytest.raises(ValueError, match="input_ids, pixel_values: give at least one"):
        model()


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_tower_is_a_model_of_its_own(tower, model, expected, batch, tmp_path):
    jf.save(getattr(model, tower), tmp_path / "tower")
    alone = jf.load(tmp_path / "tower")
    assert type(alone) is type(getattr(model, tower)) and alone.layers[0].attention.path == "layers.0.attention"
    inputs = {k: v for k, v in batch.items() if (k == "pixel_values") == (tower == "vision")}
    out = run(alone, inputs)
    assert_close(out.last_hidden_state, expected[f"{tower}/last_hidden_state"], TOLERANCE)
    assert_close(out.pooled, expected[f"{tower}/pooler_output"], TOLERANCE)


def test_end_token_by_both_rules():
    ids = np.array([[7, 9, 3, 9, 5], [3, 3, 4, 4, 1], [6, 2, 8, 2, 8]])
    h = np.arange(5.0)[None, :, None] + np.zeros((3, 1, 1))
    assert end_state(h, ids, 4)[:, 0].tolist() == [0, 2, 0]  # the first 4; without one, the first state
    assert end_state(h, ids, 9)[:, 0].tolist() == [1, 0, 0]
    assert end_state(h, ids, 2)[:, 0].tolist() == [1, 2, 2]  # the largest id of each row


def test_a_new_classifier_on_the_vision_tower(folder, batch):
    with pytest.raises(CheckpointError, match="no weights for head"):
        jf.load(folder, head="image_classification")
    model = jf.load(folder, head="image_classification", key=jax.random.key(0), num_labels=5)
    assert model.text is None
    assert run(model, {"pixel_values": batch["pixel_values"]}).logits.shape == (2, 5)
    with pytest.raises(ValueError, match="pixel_values: this model classifies images"):
        model(**batch)


def test_layers_beyond_the_config_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no place in this model: text_model.encoder.layers.1"):
        jf.load(tmp_path / "x")
    config["text_config"]["num_hidden_layers"] = 1500
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="asks for 1503 layers"):
        jf.load(tmp_path / "x")


def test_settings_of_early_writers(folder):
    hf = json.loads((folder / "config.json").read_text())
    old = {**hf, "text_config_dict": {**hf["text_config"], "hidden_size": 40}, "vision_config_dict": None}
    config = clip.Config.from_hf(old)
    assert config.text.hidden_size == 40  # Hugging Face lets the repeated settings win
    assert config.vision == clip.Config.from_hf(hf).vision
    written = config.to_hf()
    assert "text_config_dict" not in written and clip.Config.from_hf(written) == config
    with pytest.raises(ValueError, match="config.json: text_config must hold the settings of a model"):
        clip.Config.from_hf({**hf, "text_config": 3})


def test_parts_lie_on_a_mesh_as_everywhere(model, batch, folder):
    mesh = jf.mesh("data=2,tensor=2")
    cut = jf.load(folder, mesh=mesh)
    kernel = cut.text.layers[0].attention.query.kernel.get_value()
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "tensor")
    assert_close(run(cut, batch).logits, run(model, batch).logits, TOLERANCE)


class Words:
    """A tokenizer of one-letter words, as jf.embed asks for one."""

    max_length, pad_id = 16, 59

    def __call__(self, texts, pairs, max_length, padding_side):
        rows = [[1, *(ord(word) % 50 + 2 for word in text.split()), 59][:max_length] for text in texts]
        length = max(map(len, rows))
        ids = np.array([row + [59] * (length - len(row)) for row in rows])
        mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * mask}


def test_embed_puts_texts_and_images_into_one_space(model, batch, expected):
    images = jf.embed(model, pixel_values=batch["pixel_values"])
    assert_close(images, expected["image_embeds"], TOLERANCE)
    many = np.concatenate([batch["pixel_values"]] * 5)
    assert_close(jf.embed(model, pixel_values=many, batch_size=3), np.concatenate([images] * 5), TOLERANCE)
    texts = ["a b c", "q", "a b c d e f g h i j"]
    found = jf.embed(model, texts, tokenizer=Words())
    one = lambda text: run(model, {"input_ids": Words()([text], None, 16, "right")["input_ids"]}).extra["text_embeds"]
    assert_close(found, np.concatenate([one(text) for text in texts]), TOLERANCE)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    assert jf.embed(model, pixel_values=many[:0]).shape == (0, 20)


def test_embed_of_images_by_other_models(model, batch):
    pooled = run(jf.with_params(model.vision, jf.functional(model.vision)[1]), {"pixel_values": batch["pixel_values"]})
    found = jf.embed(model.vision, pixel_values=batch["pixel_values"])
    assert_close(found, pooled.pooled, TOLERANCE)
    unit = jf.embed(model.vision, pixel_values=batch["pixel_values"], normalize=True)
    assert_close(unit, found / np.linalg.norm(found, axis=1, keepdims=True), TOLERANCE)
    for call, message in (
        (lambda: jf.embed(model), "texts, pixel_values: give exactly one"),
        (
            lambda: jf.embed(model, pixel_values=batch["pixel_values"], normalize=True),
            "normalize: Clip embeds by its own",
        ),
        (lambda: jf.embed(model, pixel_values=batch["pixel_values"][0]), r"pixel_values: expected .*\(images"),
        (lambda: jf.embed(model.text, pixel_values=batch["pixel_values"]), "pixel_values: ClipText reads no images"),
        (lambda: jf.embed(model, pixel_values=batch["pixel_values"], batch_size=0), "batch_size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
