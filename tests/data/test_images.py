"""Image processors against Hugging Face's (frozen by tests/live/freeze_images.py), Pillow itself, and bad input."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxformers as jf
from jaxformers.data import resample

CASES = (
    "beit", "clip", "deit", "dinov2", "segformer", "segformer-plain", "vit", "vit-as-is", "vit-box", "vit-fits",
    "vit-hamming", "vit-lanczos", "vit-longest", "vit-nearest",
)  # fmt: skip


def config_of(oracles, name):
    return json.loads((oracles / "images" / "configs.json").read_text())[name]


def load(folder, config, model_type=None):
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return jf.load_image_processor(folder)


def case(oracles, name):
    with np.load(oracles / "images" / "images.npz") as z:
        found = {key.removeprefix(f"{name}/"): z[key] for key in z.files if key.startswith(f"{name}/")}
    lists = {}
    for kind in ("images", "segmentation_maps"):
        lists[kind] = [found[key] for key in sorted(found) if key.startswith(f"in/{kind}/")] or None
    return lists, {key.removeprefix("out/"): value for key, value in found.items() if key.startswith("out/")}


@pytest.mark.parametrize("name", CASES)
def test_equals_hugging_face(name, oracles, tmp_path):
    processor = load(tmp_path, config_of(oracles, name))
    inputs, expected = case(oracles, name)
    batch = processor(**inputs)
    assert batch.keys() == expected.keys()
    assert batch["pixel_values"].dtype == np.float32 and batch["pixel_values"].shape == expected["pixel_values"].shape
    assert np.abs(batch["pixel_values"] - expected["pixel_values"]).max() <= 1e-5
    if "labels" in expected:
        assert np.array_equal(batch["labels"], expected["labels"])
    again = tmp_path / "again"
    again.mkdir()
    (again / "preprocessor_config.json").write_bytes(processor.files()["preprocessor_config.json"])
    assert jf.load_image_processor(again) == processor


def test_every_form_of_an_image_gives_the_same(oracles, tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    processor = load(tmp_path, config_of(oracles, "clip"))
    (image, *_), expected = case(oracles, "clip")[0]["images"], case(oracles, "clip")[1]["pixel_values"][:1]
    file = tmp_path / "image.png"
    pillow.fromarray(image).save(file)
    forms = (
        image, [image], image[None], np.moveaxis(image, -1, 0), image.astype(np.int64), image.astype(np.float32),
        pillow.fromarray(image), file, str(file), [pillow.open(file)],
    )  # fmt: skip
    for form in forms:
        assert np.abs(processor(form)["pixel_values"] - expected).max() <= 1e-5
    assert np.abs(processor(image, channels="last")["pixel_values"] - expected).max() <= 1e-5
    unit = np.minimum((image + 0.5) / 255, 1)  # rescaled beforehand: bytes again for the resizing, rounded down
    found = dataclasses.replace(processor, do_rescale=False)(unit)
    assert np.abs(found["pixel_values"] - expected).max() <= 1e-5


def test_grey_and_transparent_images_become_rgb_where_asked(oracles, tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    processor = load(tmp_path, {**config_of(oracles, "clip"), "do_normalize": False, "do_resize": False})
    grey = np.arange(144, dtype=np.uint8).reshape(12, 12)
    for form in (grey, grey[..., None], pillow.fromarray(grey)):
        found = processor(form)["pixel_values"]
        assert np.allclose(found, np.broadcast_to(grey / 255, (1, 3, 12, 12)), atol=1e-6)
    clear = np.dstack([grey, grey, grey, np.zeros_like(grey)])
    half = np.dstack([grey, grey, grey, np.full_like(grey, 128)])
    for form in (clear, pillow.fromarray(clear)):
        assert np.allclose(processor(form)["pixel_values"], 1)
    for form in (half, pillow.fromarray(half)):
        assert np.abs(processor(form)["pixel_values"] - (grey / 255 * 128 + 127) / 255).max() < 0.005
    with pytest.raises(ValueError, match="1 channels, but image_mean has 3; do_convert_rgb"):
        load(tmp_path, config_of(oracles, "vit"))(grey)


def test_older_files_mean_the_same(oracles, tmp_path):
    new = config_of(oracles, "vit")
    old = {**new, "size": 20, "feature_extractor_type": "ViTFeatureExtractor"}
    del old["image_processor_type"]
    square = load(tmp_path, {**new, "size": {"height": 20, "width": 20}})
    assert load(tmp_path, old) == square
    assert load(tmp_path, {**new, "size": [20, 20], "image_processor_type": "ViTImageProcessorFast"}) == square
    del old["feature_extractor_type"]
    assert load(tmp_path, old, "swin") == square
    clip = load(tmp_path, {**config_of(oracles, "clip"), "size": 12, "crop_size": 12})
    assert clip == load(tmp_path, config_of(oracles, "clip"))
    labels = {key: v for key, v in config_of(oracles, "segformer").items() if key != "do_reduce_labels"}
    assert load(tmp_path, {**labels, "reduce_labels": True}).do_reduce_labels
    sparse = load(tmp_path, {"image_processor_type": "DeiTImageProcessor"})
    assert (sparse.size["height"], sparse.crop_size["height"], sparse.resample) == (256, 224, "bicubic")


def test_flipped_channels_and_changes(oracles, tmp_path):
    inputs, expected = case(oracles, "vit")
    load(tmp_path, config_of(oracles, "vit"))
    found = jf.load_image_processor(tmp_path, do_flip_channel_order=True)(inputs["images"])
    assert np.abs(found["pixel_values"] - expected["pixel_values"][:, ::-1]).max() <= 1e-5
    with pytest.raises(ValueError, match="do_flip: an ImageProcessor has no such field"):
        jf.load_image_processor(tmp_path, do_flip=True)


def test_a_saved_model_keeps_its_processor(oracles, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in (oracles / "vision" / "vit-mim").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    processor = load(source, config_of(oracles, "vit"))
    jf.save(jf.load(source), tmp_path / "copy")
    assert jf.load_image_processor(tmp_path / "copy") == processor


@given(st.tuples(*[st.integers(1, 40)] * 4), st.sampled_from(list(resample.KINDS)), st.integers(0, 9))
def test_resizing_equals_pillow_to_the_bit(sizes, number, seed):
    pillow = pytest.importorskip("PIL.Image")
    h, w, new_h, new_w = sizes
    if int(pytest.importorskip("PIL").__version__.split(".")[0]) < 13 and new_h < h and h - new_h > 2 * (w - new_w):
        return  # older ones begin with the other axis there
    image = np.random.default_rng(seed).integers(0, 256, (h, w, 3)).astype(np.uint8)
    expected = np.asarray(pillow.fromarray(image).resize((new_w, new_h), number))
    assert np.array_equal(resample.resize(image, (new_h, new_w), resample.KINDS[number]), expected)


@given(st.tuples(*[st.integers(1, 20)] * 4))
def test_cropping_keeps_the_middle(sizes):
    h, w, new_h, new_w = sizes
    image = np.random.default_rng(0).integers(1, 256, (h, w, 1))
    found = resample.center_crop(image, (new_h, new_w))
    assert found.shape == (new_h, new_w, 1)
    assert np.count_nonzero(found) == min(h, new_h) * min(w, new_w)
    back = resample.center_crop(found, (h, w))
    if new_h >= h and new_w >= w and (new_h - h) % 2 == 0 and (new_w - w) % 2 == 0:
        assert np.array_equal(back, image)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "DonutImageProcessor"}, "image_processor_type 'DonutImageProcessor' is not known"),
        ({"image_processor_type": None}, "image_processor_type None is not known; known are ViTImageProcessor"),
        ({"resample": 9}, "resample cannot be 9"),
        ({"size": {"height": 3}}, "size: expected height and width, shortest_edge"),
        ({"size": -1}, "size cannot be -1"),
        ({"size": "large"}, "size cannot be 'large'"),
        ({"image_mean": [0.5]}, "image_std: expected as many numbers as image_mean"),
        ({"image_std": [0.0, 1.0, 1.0]}, "all above 0"),
        ({"do_resize": "yes"}, "do_resize cannot be 'yes'"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 3}}, "crop_size: expected height and width"),
        ({"rescale_factor": "1/255"}, "rescale_factor cannot be '1/255'"),
    ],
)
def test_files_that_cannot_be(change, message, oracles, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, {**config_of(oracles, "vit"), **change})


def test_a_directory_without_a_processor(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no preprocessor_config.json"):
        jf.load_image_processor(tmp_path)


BYTES = np.zeros((9, 9, 3), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "images: none given"),
        (("nowhere.png",), "there is no file 'nowhere.png'"),
        (({"a": 1},), "expected arrays, Pillow images or paths, got dict"),
        ((np.zeros((2, 9, 9, 3, 1)),), "expected .height, width."),
        ((np.zeros((9, 9, 3), bool),), "of bool"),
        ((np.zeros((3, 9, 3), np.uint8),), "which axis of .3, 9, 3. has the channels"),
        ((np.zeros((7, 9, 8), np.uint8),), "which axis of .7, 9, 8. has the channels"),
        ((np.full((9, 9, 3), 0.5),), "floats from 0 to 1 are rescaled already; .* do_rescale=False"),
        ((BYTES + 1.5,), "expected bytes, or floats from 0 to 1"),
        ((BYTES - 1.0,), "got values from -1.0"),
        ((BYTES, [BYTES[..., 0], BYTES[..., 0]]), "expected one for each of 1 images, got 2"),
        ((BYTES, [BYTES]), "expected class numbers .height, width., got .9, 9, 3."),
    ],
)
def test_images_that_cannot_be(arguments, message, oracles, tmp_path):
    processor = load(tmp_path, config_of(oracles, "vit"))
    with pytest.raises(ValueError, match=message):
        processor(*arguments)


def test_sizes_that_do_not_stack_and_broken_files(oracles, tmp_path):
    processor = dataclasses.replace(load(tmp_path, config_of(oracles, "vit")), do_resize=False)
    with pytest.raises(ValueError, match=r"different sizes, \(3, 8, 9\), \(3, 9, 9\)"):
        processor([BYTES, BYTES[:8]])
    pytest.importorskip("PIL.Image")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(ValueError, match="is no image that Pillow reads"):
        processor(tmp_path / "broken.png")
