"""Images with masks: folders, class weights, batches, augmentation, labels at another size."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxformers.data.segmentation import (
    Segmentation,
    augment,
    class_weights,
    read_folders,
    resize_labels,
    segmentation_batches,
)

RNG = np.random.default_rng(0)


def arrays(n=3, size=(8, 12), classes=4, void=3):
    images = RNG.integers(0, 256, (n, *size, 3), dtype=np.uint8)
    return Segmentation(images, RNG.integers(0, classes, (n, *size), dtype=np.uint8), classes, void)


def test_class_weights_are_those_of_cityscapes():
    """The rule gives the constants of the authors' code: 2.596 for a road of 37 % of the pixels."""
    labels = np.full((2, 100, 100), 19)
    labels.reshape(-1)[:10_000] = np.repeat([0, 1], [3700, 6300])  # half of all pixels are void
    weights = class_weights(Segmentation(np.zeros((2, 100, 100, 3), np.uint8), labels, 20, 19), batch=1)
    assert weights[0] == pytest.approx(2.5959737, abs=1e-3)
    assert weights[5] == pytest.approx(1 / np.log(1.1)) and weights[19] == 0
    apart = np.where(labels == 19, 255, labels)
    outside = class_weights(Segmentation(np.zeros((2, 100, 100, 3), np.uint8), apart, 2, 255))
    np.testing.assert_allclose(outside, weights[:2], rtol=1e-6)


def test_batches():
    data = arrays()
    (batch,) = list(segmentation_batches(data, 3, shuffle=False, epochs=1))
    assert batch["pixel_values"].shape == (3, 3, 8, 12) and batch["pixel_values"].dtype == np.float32
    np.testing.assert_allclose(np.moveaxis(batch["pixel_values"], 1, -1) * 255, data.images, atol=1e-4)
    assert np.array_equal(batch["labels"], data.labels) and batch["labels"].dtype == np.int32


def test_folders(tmp_path):
    image_file = pytest.importorskip("PIL.Image")
    data = arrays(size=(16, 24))
    masks = np.where(data.labels == 3, 255, data.labels)
    for i, (pixels, mask) in enumerate(zip(data.images, masks, strict=True)):
        for kind, x in (("images", pixels), ("masks", mask)):
            (tmp_path / kind / f"city{i % 2}").mkdir(parents=True, exist_ok=True)
            ending = "_left" if kind == "images" else "_ids"
            image_file.fromarray(x).save(tmp_path / kind / f"city{i % 2}" / f"{i}{ending}.png")
    image_file.fromarray(masks[0]).save(tmp_path / "masks" / "city0" / "0_color.png")  # another kind of file
    options = {"classes": 4, "void": 3, "image_ending": "_left", "mask_ending": "_ids"}
    read = read_folders(tmp_path / "images", tmp_path / "masks", size=(16, 24), **options)
    order = [0, 2, 1]  # by name: city0/0, city0/2, city1/1
    assert np.array_equal(read.images[np.arange(3)], data.images[order])
    assert np.array_equal(read.labels[np.arange(3)], data.labels[order])
    np.testing.assert_allclose(class_weights(read), class_weights(data), rtol=1e-6)
    small = read_folders(tmp_path / "images", tmp_path / "masks", size=(8, 12), **options)
    (batch,) = list(segmentation_batches(small, 3, shuffle=False, epochs=1))
    assert np.array_equal(batch["labels"], resize_labels(data.labels[order], (8, 12)))
    assert batch["pixel_values"].shape == (3, 3, 8, 12)

    with pytest.raises(ValueError, match="label 2 is none of 2 classes .* and not void, 1"):
        read_folders(tmp_path / "images", tmp_path / "masks", size=(16, 24), **{**options, "classes": 2, "void": 1}
                     ).labels[np.arange(3)]  # fmt: skip
    (tmp_path / "masks" / "city1" / "1_ids.png").unlink()
    with pytest.raises(ValueError, match="has no mask for .*1_left.png"):
        read_folders(tmp_path / "images", tmp_path / "masks", size=(16, 24), **options)
    (tmp_path / "masks" / "city1" / "1_ids.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="is no image that Pillow reads"):
        read_folders(tmp_path / "images", tmp_path / "masks", size=(16, 24), **options).labels[np.arange(3)]
    with pytest.raises(ValueError, match="holds no image file whose name ends in '_none'"):
        read_folders(tmp_path / "images", tmp_path / "masks", classes=4, size=(8, 8), image_ending="_none")
    with pytest.raises(ValueError, match="there is no folder"):
        read_folders(tmp_path / "nowhere", tmp_path / "masks", classes=4, size=(8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.zeros((2, 8, 12), np.uint8)}, "one mask per image, got 2 for 3"),
        ({"labels": np.zeros((3, 8, 11), np.uint8)}, "expected the images'"),
        ({"labels": np.full((3, 8, 12), 4, np.uint8)}, "label 4 is none of 4 classes"),
        ({"labels": np.full((3, 8, 12), -1)}, "label -1 is none"),
        ({"labels": np.zeros((3, 8, 12), np.float32)}, "labels must be whole numbers"),
        ({"images": np.zeros((3, 8, 12, 3), np.float32)}, "images: expected bytes"),
    ],
)
def test_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(arrays(), **changes)


def test_augmentation_moves_images_and_masks_together():
    labels = np.arange(1, 16 * 8 * 12 + 1).reshape(16, 8, 12)
    images = np.stack([labels, labels], 1).astype(np.float32)
    pixels, moved = map(np.asarray, augment(images, labels, jax.random.key(0), flip=0.5, shift=2, void=-7))
    inside = moved != -7
    assert np.array_equal(pixels[:, 0][inside], moved[inside]) and not np.any(pixels[:, 0][~inside])
    seen = set()
    for before, after in zip(labels, moved, strict=True):
        fits = []
        for flip, x in enumerate((before, before[:, ::-1])):
            padded = np.pad(x, 2, constant_values=-7)
            fits += [(flip, i, j) for i in range(5) for j in range(5)
                     if np.array_equal(after, padded[i : i + 8, j : j + 12])]  # fmt: skip
        assert len(fits) == 1, "a shift by at most two pixels, mirrored or not"
        seen |= set(fits)
    assert {flip for flip, _, _ in seen} == {0, 1} and len({i for _, i, _ in seen}) > 2
    still = augment(images, labels, jax.random.key(0), flip=0.0, shift=0, void=-7)
    assert np.array_equal(still[0], images) and np.array_equal(still[1], labels)


@pytest.mark.parametrize(("old", "new"), [((8, 12), (2, 3)), ((10, 7), (3, 2)), ((4, 4), (4, 4))])
def test_labels_at_another_size_are_pillows(old, new):
    image_file = pytest.importorskip("PIL.Image")
    labels = RNG.integers(0, 50, (1, *old), dtype=np.uint8)
    theirs = image_file.fromarray(labels[0]).resize(new[::-1], image_file.Resampling.NEAREST)
    assert np.array_equal(resize_labels(labels, new)[0], np.asarray(theirs))
