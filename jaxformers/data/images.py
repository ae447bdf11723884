"""Images to a model's inputs: resized, cropped, rescaled and normalised as ``preprocessor_config.json`` says.

    processor = load_image_processor("some/checkpoint")
    batch = processor([image, "photo.jpg"])             # {"pixel_values": float32 (B, C, H, W)}, ready for apply
    batch = processor(images, segmentation_maps=maps)   # and "labels" (B, H, W)

Numbers are those of Hugging Face's processors on Pillow. Everything here is NumPy; Pillow itself (the extra ``vision``)
is needed for image files only.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxformers import atomic, extras, resolve
from jaxformers.data.resample import KINDS, center_crop, fitting, resize
from jaxformers.safetensors_file import show
from jaxformers.safetensors_io import CheckpointError, read_json

HALF = (0.5, 0.5, 0.5)
IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
SQUARE = {"height": 224, "width": 224}
IGNORE = 255  # the label of what belongs to no class


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """What happens to an image, in this order. Made by :func:`load_image_processor`.

    ``do_convert_rgb``: grey and transparent images become RGB, on white. ``do_resize`` to ``size`` (see
    :func:`jaxformers.data.resample.fitting`) by ``resample``: "nearest", "bilinear", "bicubic", "lanczos", "box" or
    "hamming". ``do_center_crop`` to ``crop_size``. ``do_rescale``: bytes times ``rescale_factor``. ``do_normalize``:
    minus ``image_mean``, by ``image_std``, per channel. ``do_flip_channel_order``: RGB to BGR. ``do_reduce_labels``:
    label 0 is no class but :data:`IGNORE`, and the others count from 0.
    """

    size: Mapping[str, int] = dataclasses.field(default_factory=lambda: SQUARE)
    crop_size: Mapping[str, int] | None = None
    resample: str = "bilinear"
    image_mean: tuple[float, ...] = HALF
    image_std: tuple[float, ...] = HALF
    rescale_factor: float = 1 / 255
    do_convert_rgb: bool = False
    do_resize: bool = True
    do_center_crop: bool = False
    do_rescale: bool = True
    do_normalize: bool = True
    do_flip_channel_order: bool = False
    do_reduce_labels: bool = False
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.resample not in KINDS.values():
            raise ValueError(f"resample: expected one of {', '.join(KINDS.values())}, got {self.resample!r}")
        if self.do_resize:
            fitting((8, 8), dict(self.size))
        if self.do_center_crop and (self.crop_size is None or set(self.crop_size) != {"height", "width"}):
            raise ValueError(f"crop_size: expected height and width, got {self.crop_size}")
        if len(self.image_mean) != len(self.image_std) or not all(std > 0 for std in self.image_std):
            raise ValueError("image_std: expected as many numbers as image_mean has, all above 0")

    def __call__(
        self,
        images: Any,
        segmentation_maps: Any = None,
        *,
        channels: str | None = None,
    ) -> dict[str, np.ndarray]:
        """``{"pixel_values": float32 (B, C, H, W)}``, and ``"labels"`` int64 (B, H, W) of ``segmentation_maps``.

        ``images``: one or a list of arrays (H, W), (H, W, C) or (C, H, W) of bytes, or of floats from 0 to 1; Pillow
        images; or paths of image files. ``channels``: "first" or "last", where the shape does not tell.
        ``segmentation_maps``: class numbers (H, W), in the same forms; resized by nearest neighbour, cropped alike.
        Raises ValueError for other images, and when they come out in different sizes.
        """
        if channels not in (None, "first", "last"):
            raise ValueError(f"channels: expected 'first', 'last' or None, got {channels!r}")
        items = _listed(images)
        if not items:
            raise ValueError("images: none given")
        arrays = [_array(image, channels, self.do_convert_rgb) for image in items]
        batch = {"pixel_values": _stacked([self._pixels(image) for image in arrays])}
        if segmentation_maps is not None:
            maps = _listed(segmentation_maps, single=2)
            if len(maps) != len(items):
                raise ValueError(f"segmentation_maps: expected one for each of {len(items)} images, got {len(maps)}")
            batch["labels"] = _stacked([self._labels(_map(labels)) for labels in maps])
        return batch

    def files(self) -> dict[str, bytes]:
        """``preprocessor_config.json`` as it was read, with the fields that have changed since."""
        hf = {"image_processor_type": "ViTImageProcessor", **json.loads(self.hf)}
        numbers = {name: number for number, name in KINDS.items()}
        for field in dataclasses.fields(self):
            if field.name != "hf":
                value = getattr(self, field.name)
                hf[field.name] = numbers[value] if field.name == "resample" else value
        return {"preprocessor_config.json": atomic.json_bytes(hf)}

    def _pixels(self, image: np.ndarray) -> np.ndarray:
        """One image (H, W, C) as float32 (C, H, W)."""
        if self.do_rescale and image.dtype.kind == "f" and image.max() <= 1 and not np.allclose(image, np.rint(image)):
            raise ValueError("images: floats from 0 to 1 are rescaled already; give bytes, or set do_rescale=False")
        if self.do_resize:
            image = _resized(image, fitting(image.shape[:2], dict(self.size)), self.resample)
        if self.do_center_crop:
            image = center_crop(image, (self.crop_size["height"], self.crop_size["width"]))
        if self.do_rescale:
            image = (image.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.do_normalize:
            image = image.astype(np.float32)
            if image.shape[-1] != len(self.image_mean):
                raise ValueError(
                    f"images: {image.shape[-1]} channels, but image_mean has {len(self.image_mean)}; "
                    "do_convert_rgb makes RGB of grey and of transparent images"
                )
            image = (image - np.float32(self.image_mean)) / np.float32(self.image_std)
        if self.do_flip_channel_order:
            image = image[..., ::-1]
        return np.ascontiguousarray(np.moveaxis(image, -1, 0), np.float32)

    def _labels(self, labels: np.ndarray) -> np.ndarray:
        labels = labels.astype(np.int64)[..., None]
        if self.do_reduce_labels:
            labels = np.where((labels == 0) | (labels == IGNORE), IGNORE, labels - 1)
        if self.do_resize:
            labels = resize(labels, fitting(labels.shape[:2], dict(self.size)), "nearest")
        if self.do_center_crop:
            labels = center_crop(labels, (self.crop_size["height"], self.crop_size["width"]))
        return labels[..., 0]


# ---- images --------------------------------------------------------------------------------------------------------


def _listed(images: Any, single: int = 3) -> list[Any]:
    """A list of images; an array with more axes than one image has (``single``) is a batch of them."""
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return list(images)
    if getattr(images, "ndim", 0) == single + 1:
        return list(images)
    return [images]


def _opened(image: Any, mode: str | None) -> Any:
    """A file as a Pillow image, upright; anything else as it is."""
    if not isinstance(image, str | Path):
        return image
    if not Path(image).is_file():
        raise ValueError(f"images: there is no file {str(image)!r}")
    pillow = extras.require("PIL.Image", "vision")
    try:
        with pillow.open(image) as found:
            found = extras.require("PIL.ImageOps", "vision").exif_transpose(found)
            return found.convert(mode) if mode else found.copy()
    except OSError as error:
        raise ValueError(f"images: {str(image)!r} is no image that Pillow reads ({error})") from error


def _array(image: Any, channels: str | None, rgb: bool) -> np.ndarray:
    """(H, W, C), channels last."""
    image = _opened(image, "RGB")
    if hasattr(image, "getbands"):  # a Pillow image
        if rgb:
            image = _opaque(image)
        image, channels = np.asarray(image), "last"
    elif not hasattr(image, "__array__"):
        raise ValueError(f"images: expected arrays, Pillow images or paths, got {type(image).__name__}")
    image = np.asarray(image)
    if image.dtype.kind not in "uif" or image.ndim not in (2, 3) or not image.size:
        raise ValueError(
            f"images: expected (height, width), (height, width, channels) or (channels, height, width) of numbers, got "
            f"{image.shape} of {image.dtype}"
        )
    if image.ndim == 2:
        image = image[..., None]
    elif _first(image.shape, channels):
        image = np.moveaxis(image, 0, -1)
    return _rgb(image) if rgb else image


def _first(shape: tuple[int, ...], channels: str | None) -> bool:
    if channels is not None:
        return channels == "first"
    first, last = (shape[i] in (1, 3, 4) for i in (0, 2))
    if first == last:
        raise ValueError(f"images: which axis of {shape} has the channels? Say channels='first' or channels='last'")
    return first


def _opaque(image: Any) -> Any:
    """A Pillow image as RGB; what is transparent lies on white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        pillow, image = extras.require("PIL.Image", "vision"), image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _rgb(image: np.ndarray) -> np.ndarray:
    """Grey to three equal channels; transparent ones blended with white."""
    if image.shape[-1] == 1:
        return np.repeat(image, 3, axis=-1)
    if image.shape[-1] != 4:
        return image
    white = 255 if image.dtype.kind in "ui" else 1.0
    alpha = image[..., 3:] / white
    blended = alpha * image[..., :3] + (1 - alpha) * white
    return (np.round(blended) if white == 255 else blended).astype(image.dtype)


def _resized(image: np.ndarray, size: tuple[int, int], kind: str) -> np.ndarray:
    """Filters work on bytes: floats from 0 to 1 become bytes and come back, as they do in Hugging Face's processors."""
    if image.dtype == np.uint8:
        return resize(image, size, kind)
    low, high = image.min(), image.max()
    if not (low >= 0 and high <= 255):
        raise ValueError(f"images: expected bytes, or floats from 0 to 1, to resize; got values from {low} to {high}")
    if np.allclose(image, image.astype(int)):
        return resize(image.astype(np.uint8), size, kind)
    if high > 1:
        raise ValueError(f"images: expected bytes, or floats from 0 to 1, to resize; got values from {low} to {high}")
    scaled = (image.astype(np.float64) * 255).astype(np.float32).astype(np.uint8)
    return (resize(scaled, size, kind).astype(np.float64) * (1 / 255)).astype(np.float32)


def _map(labels: Any) -> np.ndarray:
    labels = np.asarray(_opened(labels, None))
    if labels.dtype.kind not in "uib" or labels.ndim != 2 or not labels.size:
        raise ValueError(
            f"segmentation_maps: expected class numbers (height, width), got {labels.shape} of {labels.dtype}"
        )
    return labels


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ValueError(
            f"images: they come out in different sizes, {', '.join(map(str, sorted(shapes)))}; give a processor with a "
            "fixed size or a crop_size, or one image at a time"
        )
    return np.stack(arrays)


# ---- preprocessor_config.json --------------------------------------------------------------------------------------

# image_processor_type: what Hugging Face's class takes for what the file does not say
DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": {},
    "DeiT": {"size": {"height": 256, "width": 256}, "crop_size": SQUARE, "resample": "bicubic", "do_center_crop": True},
    "Beit": {"crop_size": SQUARE, "resample": "bicubic"},
    "Segformer": {"size": {"height": 512, "width": 512}, **IMAGENET},
    "CLIP": {"size": {"shortest_edge": 224}, "crop_size": SQUARE, "resample": "bicubic", "do_center_crop": True,
             "do_convert_rgb": True, **CLIP},
}  # fmt: skip
DEFAULTS["Bit"] = DEFAULTS["CLIP"]  # DINOv2's
SHORTEST = ("CLIP", "Bit")  # where one number as size means the shortest edge
OF_MODEL = {
    "vit": "ViT", "vit_mae": "ViT", "swin": "ViT", "deit": "DeiT", "beit": "Beit", "dinov2": "Bit",
    "dinov2_with_registers": "Bit", "segformer": "Segformer", "clip": "CLIP", "clip_vision_model": "CLIP",
    "llava": "CLIP",
}  # fmt: skip


def load_image_processor(path_or_id: str | Path, **changes: Any) -> ImageProcessor:
    """The image processor of a checkpoint: a directory with ``preprocessor_config.json``, or with a
    ``processor_config.json`` that has an ``image_processor`` (models of images and texts), or a hub id.

    ``changes``: fields of :class:`ImageProcessor`. Raises ValueError (CheckpointError for the file) naming what is
    missing, unknown or cannot be.
    """
    directory = resolve.find(str(path_or_id))
    file = directory / "preprocessor_config.json"
    both = directory / "processor_config.json"  # where Hugging Face's newer processors of several inputs keep it
    if not file.is_file() and both.is_file():
        hf = read_json(file := both)
        hf = hf.get("image_processor") if isinstance(hf, dict) else None
    elif not file.is_file():
        raise CheckpointError(f"{directory}: has no preprocessor_config.json; expected a checkpoint of a vision model")
    else:
        hf = read_json(file)
    if not isinstance(hf, dict):
        raise CheckpointError(f"{file}: expected an object with an image processor's settings")
    kind = _kind(file, hf)
    fields = {**DEFAULTS[kind], **_fields(file, hf, kind), "hf": json.dumps(hf, sort_keys=True)}
    if kind == "Segformer":  # its class never crops
        fields["do_center_crop"] = False
    known = {field.name for field in dataclasses.fields(ImageProcessor)} - {"hf"}
    for name in changes:
        if name not in known:
            raise ValueError(f"{name}: an ImageProcessor has no such field; it has {', '.join(sorted(known))}")
    try:
        return ImageProcessor(**{**fields, **changes})
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _kind(file: Path, hf: Mapping[str, Any]) -> str:
    name = hf.get("image_processor_type") or hf.get("feature_extractor_type")
    if name is None and (file.parent / "config.json").is_file():  # old files leave it to the model
        config = read_json(file.parent / "config.json")
        name = OF_MODEL.get(config.get("model_type") if isinstance(config, dict) else None)
    kind = str(name)
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        kind = kind.removesuffix(ending)
    if kind not in DEFAULTS:
        known = ", ".join(f"{kind}ImageProcessor" for kind in DEFAULTS)
        raise CheckpointError(f"{file}: image_processor_type {show(name)} is not known; known are {known}")
    return kind


def _fields(file: Path, hf: Mapping[str, Any], kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    named = {**hf, "do_reduce_labels": hf.get("do_reduce_labels", hf.get("reduce_labels"))}
    for field in dataclasses.fields(ImageProcessor):
        value = named.get(field.name)
        if value is None or field.name == "hf":
            continue
        if field.name in ("size", "crop_size"):
            value = _size(value, shortest=field.name == "size" and kind in SHORTEST)
        elif field.name == "resample":
            value = KINDS.get(value) if type(value) is int else None
        elif field.name in ("image_mean", "image_std"):
            numbers = isinstance(value, list) and 0 < len(value) <= 64 and all(type(n) in (int, float) for n in value)
            value = tuple(map(float, value)) if numbers else None
        elif field.name == "rescale_factor":
            value = float(value) if type(value) in (int, float) else None
        elif not isinstance(value, bool):
            value = None
        if value is None:
            raise CheckpointError(f"{file}: {field.name} cannot be {show(named[field.name])}")
        found[field.name] = value
    return found


def _size(value: Any, *, shortest: bool) -> dict[str, int] | None:
    """Today's form of a size: older files give one number, or (height, width)."""
    if type(value) is int:
        value = {"shortest_edge": value} if shortest else {"height": value, "width": value}
    elif isinstance(value, list) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    if not isinstance(value, dict):
        return None
    value = {name: n for name, n in value.items() if n is not None}
    return value if value and all(type(n) is int and 0 < n < 1 << 16 for n in value.values()) else None
