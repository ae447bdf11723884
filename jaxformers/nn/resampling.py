"""Resampling one axis of an image or of a position table, as a matrix from old points to new ones: NumPy alone."""

import numpy as np


def resize_matrix(old: int, new: int, kind: str) -> np.ndarray:
    """(new, old): one axis of an interpolation from ``old`` to ``new`` points, as torch's without anti-aliasing.

    Corners are not aligned; points beyond an edge repeat it. ``kind``: "bilinear", or "bicubic" with a = −3/4 (JAX's
    own takes a = −1/2, which checkpoints were not trained with).
    """
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    if kind == "bilinear":
        at = np.maximum(at, 0)
    left = np.floor(at).astype(int)
    t = at - left
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        d = np.abs(t - tap)
        weight = np.maximum(1 - d, 0) if kind == "bilinear" else cubic(d, -0.75)
        np.add.at(matrix, (np.arange(new), np.clip(left + tap, 0, old - 1)), weight)
    return matrix.astype(np.float32)


def filter_matrix(old: int, new: int, kind: str) -> np.ndarray:
    """(new, old) float64: the same with anti-aliasing, as Pillow and torch (``antialias=True``) do it.

    Where the axis shrinks, the filter widens with it; weights are cut off at the edges and sum to 1. ``kind``: "box",
    "bilinear", "hamming", "bicubic" (a = −1/2) or "lanczos". Raises ValueError for another.
    """
    if kind not in FILTERS:
        raise ValueError(f"kind: expected one of {', '.join(FILTERS)}, got {kind!r}")
    weight, radius = FILTERS[kind]
    scale = old / new
    widened = max(scale, 1.0)
    support = radius * widened
    matrix = np.zeros((new, old))
    for i in range(new):
        center = (i + 0.5) * scale
        first, last = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), old)
        w = weight((np.arange(first, last) - center + 0.5) / widened)
        matrix[i, first:last] = w / np.add.accumulate(w)[-1]  # summed from left to right, as they do
    return matrix


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel with parameter ``a`` (IEEE TASSP 29(6), 1981)."""
    d = np.abs(x)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    return np.where(d <= 1, near, np.where(d < 2, a * (d**3 - 5 * d**2 + 8 * d - 4), 0))


def _box(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(np.float64)


def _hamming(x: np.ndarray) -> np.ndarray:
    a, b = float(np.float32(0.54)), float(np.float32(0.46))  # Pillow's constants have single precision
    return np.where(np.abs(x) >= 1, 0, np.sinc(x) * (a + b * np.cos(np.pi * x)))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) >= 3, 0, np.sinc(x) * np.sinc(x / 3))


# name: (weight at a distance, distance beyond which it is 0)
FILTERS = {
    "box": (_box, 0.5),
    "bilinear": (lambda x: np.maximum(1 - np.abs(x), 0), 1.0),
    "hamming": (_hamming, 1.0),
    "bicubic": (lambda x: cubic(x, -0.5), 2.0),
    "lanczos": (_lanczos, 3.0),
}
