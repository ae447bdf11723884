"""Resizing and cropping images in NumPy, to the bit as Pillow and Hugging Face's processors built on it do."""

import numpy as np
from jaxtyping import Num, UInt8

from jaxformers.nn.resampling import filter_matrix

# Pillow's numbers of its filters, as they stand in preprocessor_config.json
KINDS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_BITS = 22  # Pillow multiplies bytes with weights of so many binary places


def resize(image: Num[np.ndarray, "h w c"], size: tuple[int, int], kind: str) -> Num[np.ndarray, "h2 w2 c"]:
    """``image`` at ``size`` (height, width).

    ``kind``: "nearest" takes any dtype; the filters "box", "bilinear", "hamming", "bicubic" and "lanczos" work on
    bytes, one axis after the other, each rounded to bytes as Pillow does. Raises ValueError for another kind or dtype.
    """
    if kind not in KINDS.values():
        raise ValueError(f"kind: expected one of {', '.join(KINDS.values())}, got {kind!r}")
    if kind == "nearest":
        rows, columns = (_nearest(image.shape[i], size[i]) for i in range(2))
        return image[rows][:, columns]
    if image.dtype != np.uint8:
        raise ValueError(f"image: filters work on bytes (uint8), got {image.dtype}")
    (h, w), (new_h, new_w) = image.shape[:2], size
    # Pillow's order, on which the rounding depends, since its version 13; before, columns came first always
    rows_first = new_h < h and h - new_h > 2 * (w - new_w)
    for axis in (0, 1) if rows_first else (1, 0):
        if image.shape[axis] != size[axis]:
            image = _filtered(image, axis, size[axis], kind)
    return image


def _filtered(image: UInt8[np.ndarray, "h w c"], axis: int, new: int, kind: str) -> UInt8[np.ndarray, "h2 w2 c"]:
    weights = filter_matrix(image.shape[axis], new, kind) * (1 << _BITS)
    weights = np.trunc(weights + np.copysign(0.5, weights))  # Pillow rounds halves away from zero
    moved = np.moveaxis(image, axis, 0)
    sums = weights @ moved.reshape(moved.shape[0], -1).astype(np.float64)  # whole numbers below 2**53: exact
    pixels = np.clip(np.floor((sums + (1 << (_BITS - 1))) / (1 << _BITS)), 0, 255).astype(np.uint8)
    return np.moveaxis(pixels.reshape(new, *moved.shape[1:]), 0, axis)


def _nearest(old: int, new: int) -> np.ndarray:
    """Which of ``old`` points is nearest to each of ``new``, by the running sum that Pillow keeps."""
    scale = old / new
    at = np.add.accumulate(np.concatenate([[scale * 0.5], np.full(new - 1, scale)]))
    return np.minimum(at.astype(int), old - 1)


def center_crop(image: Num[np.ndarray, "h w c"], size: tuple[int, int]) -> Num[np.ndarray, "h2 w2 c"]:
    """The middle ``size`` (height, width) of ``image``, with zeros around it where it is smaller."""
    for axis, new in enumerate(size):
        old = image.shape[axis]
        if old < new:
            before = -((old - new) // 2)  # an odd rest goes before
            around = [(before, new - old - before) if i == axis else (0, 0) for i in range(image.ndim)]
            image = np.pad(image, around)
        else:
            start = (old - new) // 2
            image = image.take(range(start, start + new), axis)
    return image


def fitting(shape: tuple[int, int], size: dict[str, int]) -> tuple[int, int]:
    """(height, width) of an image of ``shape`` when resized to ``size``, as preprocessor_config.json gives it.

    ``height`` and ``width``: exactly. ``shortest_edge``: to that, keeping the shape. ``shortest_edge`` and
    ``longest_edge``: the same, unless the other edge would become longer than that. ``longest_edge``, or ``max_height``
    and ``max_width``: as large as fits in there. Raises ValueError for other keys.
    """
    h, w = shape
    keys = set(size)
    if keys == {"height", "width"}:
        return size["height"], size["width"]
    if keys == {"shortest_edge"}:
        short, long = sorted(shape)
        new = (size["shortest_edge"], int(size["shortest_edge"] * long / short))
        return (new[1], new[0]) if w <= h else new
    if keys == {"shortest_edge", "longest_edge"}:
        return _between(h, w, size["shortest_edge"], size["longest_edge"])
    if keys in ({"longest_edge"}, {"max_height", "max_width"}):
        limits = [size.get(name, size.get("longest_edge")) for name in ("max_height", "max_width")]
        scale = min(limit / n for limit, n in zip(limits, shape, strict=True))
        return max(int(h * scale), 1), max(int(w * scale), 1)
    raise ValueError(
        f"size: expected height and width, shortest_edge, longest_edge, both of these, or max_height and max_width; "
        f"got {', '.join(sorted(keys)) or 'nothing'}"
    )


def _between(h: int, w: int, shortest: int, longest: int) -> tuple[int, int]:
    short, long = float(min(h, w)), float(max(h, w))
    edge = shortest
    if long / short * shortest > longest:
        edge = longest * short / long
        shortest = int(round(edge))
    if min(h, w) == shortest:
        return h, w
    return (int(edge * h / w), shortest) if w < h else (shortest, int(edge * w / h))
