"""LLaVA against Hugging Face on a tiny model: every array, cached decoding, the layouts of its checkpoints, errors."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_close, run
from safetensors.numpy import load_file, save_file

import jaxformers as jf
from jaxformers.decoding import start
from jaxformers.losses import cross_entropy
from jaxformers.models import llava
from jaxformers.safetensors_io import CheckpointError

TOLERANCE = 5e-5  # absolute, by the oracle's README
IMAGE = 63


@pytest.fixture(scope="module")
def folder(oracles):
    return oracles / "backbones" / "llava" / "tiny"


@pytest.fixture(scope="module")
def model(folder):
    return jf.load(folder)


@pytest.fixture(scope="module")
def expected(folder):
    with np.load(folder / "io.npz") as z:
        return dict(z)


@pytest.fixture(scope="module")
def batch(expected):
    return {name: expected[f"in/{name}"] for name in ("input_ids", "pixel_values", "attention_mask")}


@pytest.fixture(scope="module")
def prompts(batch):
    """Rows of 1, 2 and 1 images."""
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [ids[mask == 1].tolist() for ids, mask in rows]


def test_every_array(model, expected, batch):
    apply, params = jf.functional(model)
    out, seen = jax.jit(jf.reap(apply, ("text.embeddings", "text.layers.*.{output,attention.probs}")))(params, batch)
    real = batch["attention_mask"] == 1
    hidden = [seen["text.embeddings"], seen["text.layers.0.output"], out.last_hidden_state]
    for i, h in enumerate(hidden):
        assert_close(h, expected[f"out/hidden_{i}"], TOLERANCE, real)
    for i in range(2):
        probs = seen[f"text.layers.{i}.attention.probs"].swapaxes(1, 2)
        assert_close(probs, expected[f"out/attention_{i}"].swapaxes(1, 2), TOLERANCE, real)
    assert_close(out.logits, expected["out/logits"], TOLERANCE, real)
    assert_close(out.extra["image_hidden_states"], expected["out/image_features"], TOLERANCE)
    assert_close(model.image_features(batch["pixel_values"]), expected["out/image_features"], TOLERANCE)
    loss = cross_entropy(out.logits[:, :-1], expected["in/labels"][:, 1:])
    assert_close(loss, expected["out/loss"], 1e-5)


def test_greedy_ids(model, expected, prompts):
    length = expected["in/input_ids"].shape[1]
    ids = jf.generate(model, prompts, max_new_tokens=6, pixel_values=expected["in/pixel_values"])
    assert ids == expected["out/generated"][:, length:].tolist()
    second = jf.generate(model, prompts[1], max_new_tokens=6, pixel_values=expected["in/pixel_values"][1:3])
    assert second == ids[1]  # one prompt alone, with its images
    # two at a time, the longest first: each row keeps its own images
    small = jf.generate(model, prompts, max_new_tokens=6, pixel_values=expected["in/pixel_values"], batch_size=2)
    assert small == ids
    assert model.config.max_position_embeddings == 128 and model.config.vocab_size == 64


def test_one_token_for_each_image(model, expected, prompts):
    """What a tokenizer makes of ``<image>``: generation puts as many in its place as the image needs."""
    short = []
    for row in prompts:
        seen = np.cumsum(np.array(row) == IMAGE) * (np.array(row) == IMAGE)
        short.append([i for i, n in zip(row, seen, strict=True) if n % 9 in (0, 1) and not (n and n % 9 == 0)])
    assert [row.count(IMAGE) for row in short] == [row.count(IMAGE) // 9 for row in prompts]
    assert model.expand_images(short, expected["in/pixel_values"]) == prompts
    length = expected["in/input_ids"].shape[1]
    ids = jf.generate(model, short, max_new_tokens=6, pixel_values=expected["in/pixel_values"])
    assert ids == expected["out/generated"][:, length:].tolist()
    with pytest.raises(ValueError, match="prompts: item 1 has 22 tokens, with max_new_tokens=107 more than the 128"):
        jf.generate(model, short, max_new_tokens=107, pixel_values=expected["in/pixel_values"])


@pytest.fixture(scope="module")
def chat(folder, tmp_path_factory):
    return with_processor(folder, tmp_path_factory.mktemp("chat") / "x")


def with_processor(folder, place):
    """A copy of the checkpoint with a tokenizer of the words w0 … w62 and ``<image>``, and an image processor where new
    files keep it."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    shutil.copytree(folder, place)
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(63)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken("<image>", special=True)])
    core.save(str(place / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2", "pad_token": "w0", "unk_token": "w0"}
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    size = {"height": 24, "width": 24}
    images = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 24}, "crop_size": size}
    processor = {"processor_class": "LlavaProcessor", "image_processor": images, "patch_size": 8,
                 "image_token": "<image>", "num_additional_image_tokens": 1,
                 "vision_feature_select_strategy": "default"}  # fmt: skip
    (place / "processor_config.json").write_text(json.dumps(processor))
    return place


def test_texts_and_image_files(chat, tmp_path):
    model = jf.load(chat)
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    pixels = jf.load_image_processor(chat)([picture])["pixel_values"]
    assert pixels.shape == (1, 3, 24, 24)
    text = jf.generate(model, "w5 <image> w7 w9", max_new_tokens=5, pixel_values=pixels, eos_token_id=())
    ids = jf.generate(model, [5, *[IMAGE] * 9, 7, 9], max_new_tokens=5, pixel_values=pixels, eos_token_id=())
    assert text.split() == [f"w{i}" for i in ids if i != IMAGE]
    jf.save(model, tmp_path / "copy")  # takes the processor along
    assert jf.load_image_processor(tmp_path / "copy") == jf.load_image_processor(chat)


def test_other_images_of_the_same_number_compile_nothing(model, prompts, expected):
    pixels = expected["in/pixel_values"]
    jf.generate(model, prompts, max_new_tokens=6, pixel_values=pixels)
    before = start._cache_size()
    one_fewer = [prompts[0], prompts[2], prompts[2]]  # three images where there were four
    jf.generate(model, one_fewer, max_new_tokens=5, pixel_values=pixels[[0, 3, 3]] + 1)
    three = start._cache_size()
    jf.generate(model, one_fewer, max_new_tokens=4, pixel_values=pixels[:3])
    assert start._cache_size() == three <= before + 1


def test_cached_decoding(model, batch):
    whole = run(model, batch).logits
    apply, params = jf.functional(model)
    step = jax.jit(apply)
    split = batch["input_ids"].shape[1] - 2  # the images come before
    assert not (batch["input_ids"][:, split:] == IMAGE).any()
    first = {**batch, "input_ids": batch["input_ids"][:, :split], "attention_mask": batch["attention_mask"][:, :split]}
    out = step(params, {**first, "cache": model.empty_cache(3, split + 2)})
    parts = [out.logits]
    for i in range(split, split + 2):
        out = step(params, {"input_ids": batch["input_ids"][:, i : i + 1], "cache": out.cache})
        parts.append(out.logits)
    assert_close(np.concatenate(parts, axis=1), whole, TOLERANCE, batch["attention_mask"] == 1)


def test_padding_among_the_images_changes_nothing(model, batch, expected):
    padded = np.insert(batch["pixel_values"], [0, 2], 7.0, axis=0)
    out = run(model, {**batch, "pixel_values": padded, "image_mask": np.array([0, 1, 1, 0, 1, 1])})
    assert_close(out.logits, expected["out/logits"], TOLERANCE, batch["attention_mask"] == 1)


def test_images_that_do_not_match_the_tokens(model, batch, prompts):
    few = {**batch, "pixel_values": batch["pixel_values"][:3]}
    with pytest.raises(ValueError, match="3 images of 9 tokens each need 27 image tokens, input_ids has 36"):
        model(**few)
    assert np.isnan(np.asarray(run(model, few).logits)[batch["input_ids"] == IMAGE]).all()  # where ids are not known
    for given, message in (
        (None, "prompts item 0 has image tokens"),
        (batch["pixel_values"][:3], "3 images, but the prompts have the tokens of 4"),
        (batch["pixel_values"][0], r"expected floating-point numbers \(images"),
    ):
        with pytest.raises(ValueError, match=f"pixel_values: .*{message}"):
            jf.generate(model, prompts, max_new_tokens=2, pixel_values=given)
    with pytest.raises(ValueError, match="prompts: item 1 has 10 image tokens.*needs 9"):
        jf.generate(model, [prompts[0], [IMAGE] * 10], max_new_tokens=2, pixel_values=batch["pixel_values"][:2])
    with pytest.raises(ValueError, match="pixel_values: Llama reads no images"):
        jf.generate(text_alone(model), [5], max_new_tokens=2, pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="give input_ids alone"):
        model(pixel_values=batch["pixel_values"])


def tensors_of(folder):
    """All tensors of a checkpoint that is stored in shards."""
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def text_alone(model):
    config = dataclasses.replace(model.config.text, num_hidden_layers=1)
    return jf.init(config, head="causal_lm", key=jax.random.key(0))


LAYOUTS = {
    "of transformers 4.52, in memory": lambda n: re.sub(
        r"^language_model\.model", "model.language_model",
        re.sub(r"^(vision_tower|multi_modal)", r"model.\1", n.replace("language_model.lm_head", "lm_head")),
    ),
    "with the tower's own prefix": lambda n: n.replace("vision_tower.", "vision_tower.vision_model."),
    "of LlavaModel": lambda n: n.replace("language_model.model.", "language_model."),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_other_writers(layout, folder, batch, expected, tmp_path):
    tensors = {LAYOUTS[layout](name): tensor for name, tensor in tensors_of(folder).items()}
    assert set(tensors) != set(tensors_of(folder))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = jf.load(tmp_path)
    assert_close(run(model, batch).logits, expected["out/logits"], TOLERANCE, batch["attention_mask"] == 1)
    jf.save(model, tmp_path / "copy")
    before, after = tensors_of(folder), tensors_of(tmp_path / "copy")
    assert set(before) == set(after) and all(np.array_equal(before[k], after[k]) for k in before)


def test_scan_remat_and_gradients(model, batch, expected):
    def loss(params, apply):
        return cross_entropy(apply(params, batch).logits[:, :-1], expected["in/labels"][:, 1:])

    apply, params = jf.functional(model)
    plain = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, apply)
    apply, params = jf.functional(model, scan_layers=True, remat="full")
    value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, apply)
    assert_close(value, expected["out/loss"], 1e-5)
    for tower in ("text", "vision"):
        found = grads[tower]["layers"]["*"]["attention"]["query"]["kernel"]
        layers = plain[1][tower]["layers"]
        each = jnp.stack([layers[str(i)]["attention"]["query"]["kernel"] for i in range(len(layers))])
        assert np.abs(each).max() > 1e-3  # the tower learns too
        assert_close(found, each, 1e-5)


def test_edits_reach_the_tower(model, batch):
    apply, params = jf.functional(model)
    plain = run(model, batch).logits
    blind = jf.edit(apply, {"vision.layers.0.mlp.hidden": lambda h: 0 * h})
    assert np.abs(jax.jit(blind)(params, batch).logits - plain).max() > 1e-3


def test_settings_that_cannot_be(folder):
    hf = json.loads((folder / "config.json").read_text())
    for changed, message in (
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy must be one of default, full"),
        ({"vision_feature_layer": 5}, "vision_feature_layer: expected numbers from -4 to 3, got 5"),
        ({"vision_feature_layer": [-2, "a"]}, "vision_feature_layer"),
        ({"text_config": {"model_type": "bert"}}, "text_config: this Bert is no decoder"),
        ({"text_config": {"model_type": "t5"}}, "text_config: this T5 is no decoder"),
        ({"text_config": {"model_type": "llava"}}, "text_config: this Llava is no decoder"),
        ({"vision_config": {"model_type": "bert"}}, "vision_config: this Bert is no tower"),
        ({"vision_config": {"model_type": "clip"}}, "vision_config: this Clip is no tower"),
        ({"text_config": {"model_type": "unheard"}}, "model_type 'unheard' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            llava.Config.from_hf({**hf, **changed})
    several = llava.Config.from_hf({**hf, "vision_feature_layer": [-1, 0]})
    assert several.feature_layers == (-1, 0)
    assert llava.Config.from_hf(several.to_hf()) == several
    defaults = llava.Config.from_hf({"model_type": "llava"})
    assert defaults.vision.image_size == (336, 336) and defaults.text.num_hidden_layers == 32


def test_a_missing_tensor_is_named(folder, tmp_path):
    tensors = tensors_of(folder)
    del tensors["vision_tower.encoder.layers.1.mlp.fc1.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="tensors missing: vision_tower.encoder.layers.1.mlp.fc1.bias"):
        jf.load(tmp_path)


def test_parts_lie_on_a_mesh_as_everywhere(model, folder, batch, expected):
    cut = jf.load(folder, mesh=jf.mesh("data=2,tensor=2"))
    kernels = (cut.text.layers[0].mlp.down.kernel, cut.vision.layers[1].attention.out.kernel)
    assert all(k.get_value().sharding.spec == jax.sharding.PartitionSpec("tensor", None) for k in kernels)
    assert_close(run(cut, batch).logits, expected["out/logits"], TOLERANCE, batch["attention_mask"] == 1)
