"""Images with an index mask each: from arrays or from two folders, as batches, and what training does to them.

data = read_folders("leftImg8bit/train", "gtFine/train", classes=20, void=19, size=(512, 1024),
                    image_ending="_leftImg8bit", mask_ending="_gtFine_labelTrainIds")
weights = class_weights(data)
batches = segmentation_batches(data, 8)      # {"pixel_values": float32 (B, C, H, W) in [0, 1], "labels": (B, H, W)}
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformers import extras
from jaxformers.data.batches import array_batches
from jaxformers.data.resample import resize

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """``images`` (n, H, W, C) bytes and ``labels`` (n, H, W) class numbers: arrays, or what an index array can be taken
    from. ``classes``: how many logits a model has for them. ``void``: the label of what belongs to no class; one of the
    ``classes`` (a logit that is never to be right) or any other number, such as 255. None: there is none."""

    images: Any
    labels: Any
    classes: int
    void: int | None = None

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels) or not len(self.images):
            raise ValueError(f"labels: expected one mask per image, got {len(self.labels)} for {len(self.images)}")
        if isinstance(self.images, np.ndarray) and (self.images.ndim != 4 or self.images.dtype != np.uint8):
            raise ValueError(f"images: expected bytes (n, H, W, C), got {self.images.shape} of {self.images.dtype}")
        if isinstance(self.labels, np.ndarray):
            if isinstance(self.images, np.ndarray) and self.labels.shape != self.images.shape[:3]:
                raise ValueError(f"labels: expected the images' {self.images.shape[:3]}, got {self.labels.shape}")
            check_labels(self.labels, self.classes, self.void, "labels")

    def __len__(self) -> int:
        return len(self.images)


def check_labels(labels: np.ndarray, classes: int, void: int | None, where: str) -> np.ndarray:
    """``labels``; ValueError, with ``where`` they are, for a number that is neither a class nor void."""
    if labels.dtype.kind not in "uib":
        raise ValueError(f"{where}: labels must be whole numbers, got {labels.dtype}")
    wrong = (labels < 0) | (labels >= classes)
    if void is not None:
        wrong &= labels != void
    if wrong.any():
        raise ValueError(f"{where}: label {labels[wrong][0]} is none of {classes} classes (0 to {classes - 1})"
                         f"{'' if void is None else f' and not void, {void}'}")  # fmt: skip
    return labels


def read_folders(
    images: str | Path,
    masks: str | Path,
    *,
    classes: int,
    size: tuple[int, int],
    void: int | None = None,
    void_in_files: int = 255,
    image_ending: str = "",
    mask_ending: str = "",
) -> Segmentation:
    """Image files under ``images`` with the index masks of the same relative name under ``masks``, read when needed.

    Names are compared without their last suffix and without ``image_ending`` and ``mask_ending``. Images are resized to
    ``size`` (height, width) bilinearly, masks by nearest neighbour. ``void_in_files``: what masks call void; it becomes
    ``void``. Needs Pillow (the extra ``vision``). Raises ValueError for a folder that is not there or holds no image,
    images without a mask, and, once a file is read, labels out of range.
    """
    found = [_named(Path(folder), ending) for folder, ending in ((images, image_ending), (masks, mask_ending))]
    missing = sorted(found[0].keys() - found[1].keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"masks: {masks} has no mask for {found[0][missing[0]]}{more}")
    names = sorted(found[0])
    relabel = {} if void is None or void == void_in_files else {void_in_files: void}
    pixels = _Files([found[0][n] for n in names], size)
    return Segmentation(pixels, _Masks([found[1][n] for n in names], size, classes, void, relabel), classes, void)


def _named(folder: Path, ending: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"images, masks: there is no folder {folder}")
    files = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in ENDINGS and p.stem.endswith(ending)]
    if not files:
        raise ValueError(f"images, masks: {folder} holds no image file whose name ends in {ending!r}")
    cut = lambda p: str(p.relative_to(folder).with_name(p.stem.removesuffix(ending)))
    return {cut(p): p for p in files}


class _Files:
    """RGB images (n, H, W, 3) of one size, opened when they are taken."""

    def __init__(self, files: Sequence[Path], size: tuple[int, int]):
        self.files, self.size = list(files), size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return np.stack([self._read(self.files[i]) for i in np.atleast_1d(index)])

    def _read(self, file: Path) -> np.ndarray:
        return resize(_open(file, "RGB"), self.size, "bilinear")


class _Masks(_Files):
    """Index masks (n, H, W)."""

    def __init__(self, files: Sequence[Path], size: tuple[int, int], classes: int, void: int | None, relabel: dict):
        super().__init__(files, size)
        self.classes, self.void, self.relabel = classes, void, relabel

    def _read(self, file: Path) -> np.ndarray:
        mask = _open(file, None)
        if mask.ndim != 2:
            raise ValueError(f"masks: {file} has colours; expected one class number per pixel")
        mask = resize(mask[..., None].astype(np.int32), self.size, "nearest")[..., 0]
        for old, new in self.relabel.items():
            mask[mask == old] = new
        return check_labels(mask, self.classes, self.void, str(file))


def _open(file: Path, mode: str | None) -> np.ndarray:
    pillow = extras.require("PIL.Image", "vision")
    try:
        with pillow.open(file) as image:
            return np.asarray(image.convert(mode) if mode else image)
    except OSError as error:
        raise ValueError(f"images, masks: {file} is no image that Pillow reads ({error})") from error


def class_weights(data: Segmentation, *, constant: float = 1.10, batch: int = 64) -> Float[np.ndarray, "classes"]:
    """``1 / ln(constant + f_c)`` with f_c the share of class c among the pixels that are not void (ENet's rule, arXiv
    1606.02147); 0 for a void class. Goes once through all masks, ``batch`` at a time."""
    counts = np.zeros(data.classes, np.int64)
    for start in range(0, len(data), batch):
        labels = np.asarray(data.labels[np.arange(start, min(start + batch, len(data)))])
        counts += np.bincount(labels[labels != data.void].ravel(), minlength=data.classes)
    weights = 1 / np.log(constant + counts / max(counts.sum(), 1))
    if data.void is not None and data.void < data.classes:
        weights[data.void] = 0
    return weights.astype(np.float32)


def segmentation_batches(data: Segmentation, batch_size: int, **options: Any) -> grain.IterDataset:
    """Batches {"pixel_values": float32 (B, C, H, W) in [0, 1], "labels": int32 (B, H, W)}; ``options`` and errors as
    of :func:`jaxformers.data.batches.array_batches`."""

    def convert(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        pixels = np.moveaxis(batch["pixel_values"], -1, 1).astype(np.float32) / 255
        return {"pixel_values": np.ascontiguousarray(pixels), "labels": batch["labels"].astype(np.int32)}

    rows = {"pixel_values": data.images, "labels": data.labels}
    return array_batches(rows, batch_size, transform=convert, **options)


def augment(
    pixel_values: Float[Array, "batch channels height width"],
    labels: Int[Array, "batch height width"],
    key: jax.Array,
    *,
    flip: float = 0.5,
    shift: int = 2,
    void: int,
) -> tuple[Float[Array, "batch channels height width"], Int[Array, "batch height width"]]:
    """Each image and its mask mirrored left to right with probability ``flip``, then shifted by whole pixels drawn from
    −``shift`` to ``shift`` along both axes. What comes in from outside is 0, its label ``void``."""
    mirrored, moved = jax.random.split(key)
    flips = jax.random.bernoulli(mirrored, flip, (labels.shape[0], 1, 1))
    offsets = jax.random.randint(moved, (labels.shape[0], 2), 0, 2 * shift + 1)
    pixel_values = jnp.where(flips[..., None], pixel_values[..., ::-1], pixel_values)
    labels = jnp.where(flips, labels[..., ::-1], labels)
    around = ((0, 0), (shift, shift), (shift, shift))
    pixel_values, labels = jnp.pad(pixel_values, ((0, 0), *around)), jnp.pad(labels, around, constant_values=void)
    height, width = labels.shape[1] - 2 * shift, labels.shape[2] - 2 * shift

    def window(image: Array, mask: Array, at: Array) -> tuple[Array, Array]:
        seen = jax.lax.dynamic_slice(image, (0, at[0], at[1]), (image.shape[0], height, width))
        return seen, jax.lax.dynamic_slice(mask, (at[0], at[1]), (height, width))

    return jax.vmap(window)(pixel_values, labels, offsets)


def resize_labels(labels: Int[Array, "batch height width"], size: tuple[int, int]) -> Int[Array, "batch rows columns"]:
    """Masks at another size, each new pixel the old one under its centre (Pillow's nearest neighbour)."""
    sizes = zip(labels.shape[1:], size, strict=True)
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for old, new in sizes)
    return labels[:, rows][:, :, columns]
