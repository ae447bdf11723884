"""Losses of images: segmentation, masked image modelling that predicts pixels, and feature maps that are to be alike.
Float32 or wider."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxformers.losses import cross_entropy, kl_divergence
from jaxformers.nn.vision import resize


def segmentation(
    logits: Float[Array, "batch classes rows columns"],
    labels: Int[Array, "batch height width"],
    *,
    ignore_index: int = 255,
) -> Float[Array, ""]:
    """Mean cross-entropy per pixel, in nats, of logits stretched bilinearly to the labels' size (arXiv 2105.15203).

    Pixels labelled ``ignore_index`` do not count; 0 when all are. With a single class: binary cross-entropy of labels 0
    and 1, averaged over all pixels, the ignored ones as 0 (as Hugging Face does). Raises ValueError for other shapes.
    """
    if labels.ndim != 3 or logits.ndim != 4 or labels.shape[0] != logits.shape[0]:
        raise ValueError(
            f"labels: expected (batch, height, width) for logits (batch, classes, rows, columns), got {labels.shape} "
            f"for {logits.shape}"
        )
    stretched = resize(jnp.moveaxis(logits, 1, -1).astype(jnp.float32), labels.shape[1:], "bilinear")
    if logits.shape[1] > 1:
        return cross_entropy(stretched, labels, ignore_index=ignore_index)
    z, y = stretched[..., 0], labels.astype(jnp.float32)
    counts = (labels >= 0) & (labels != ignore_index)
    return jnp.where(counts, jax.nn.softplus(z) - z * y, 0.0).mean()


def patchify(
    pixel_values: Float[Array, "batch channels height width"], patch: tuple[int, int]
) -> Float[Array, "batch patches pixels"]:
    """Patches row by row, each flattened as (row, column, channel). Raises ValueError where patches do not tile it."""
    b, c, h, w = pixel_values.shape
    if h % patch[0] or w % patch[1]:
        raise ValueError(f"pixel_values: {h} x {w} pixels are not whole patches of {patch[0]} x {patch[1]}")
    x = pixel_values.reshape(b, c, h // patch[0], patch[0], w // patch[1], patch[1])
    return x.transpose(0, 2, 4, 3, 5, 1).reshape(b, (h // patch[0]) * (w // patch[1]), -1)


def masked_patches(
    predicted: Float[Array, "batch patches pixels"],
    pixel_values: Float[Array, "batch channels height width"],
    mask: Float[Array, "batch patches"],
    *,
    patch: tuple[int, int],
    normalize: bool = False,
) -> Float[Array, ""]:
    """MAE's loss (arXiv 2111.06377): mean square error per pixel over the patches where ``mask`` is 1.

    ``normalize``: targets are (pixel − mean) / sqrt(variance + 1e-6) of their own patch, with the unbiased variance.
    """
    target = patchify(pixel_values.astype(jnp.float32), patch)
    if normalize:
        mean, var = target.mean(-1, keepdims=True), target.var(-1, keepdims=True, ddof=1)
        target = (target - mean) / jnp.sqrt(var + 1e-6)
    error = jnp.square(predicted.astype(jnp.float32) - target).mean(-1)
    return (error * mask).sum() / mask.sum()


def masked_pixels(
    reconstruction: Float[Array, "batch channels height width"],
    pixel_values: Float[Array, "batch channels height width"],
    bool_masked_pos: Bool[Array, "batch patches"],
    *,
    patch: tuple[int, int],
) -> Float[Array, ""]:
    """SimMIM's loss (arXiv 2111.09886): mean absolute error over the pixels of masked patches."""
    if reconstruction.shape != pixel_values.shape:
        raise ValueError(f"reconstruction: expected the images' shape {pixel_values.shape}, got {reconstruction.shape}")
    batch, channels, height, width = pixel_values.shape
    mask = jnp.asarray(bool_masked_pos).reshape(batch, height // patch[0], width // patch[1])
    mask = jnp.repeat(jnp.repeat(mask, patch[0], 1), patch[1], 2)[:, None].astype(jnp.float32)
    error = jnp.abs(pixel_values - reconstruction).astype(jnp.float32)
    return (error * mask).sum() / (mask.sum() + 1e-5) / channels


# ---- feature maps of a teacher and a student -------------------------------------------------------------------------


def hierarchical_context(
    student: Float[Array, "batch rows columns channels"], teacher: Float[Array, "batch rows columns channels"]
) -> Float[Array, ""]:
    """ReviewKD's hierarchical context loss (arXiv 2104.09044), without a gradient into ``teacher``:

        [ MSE(S, T) + sum_l c_l MSE(pool_l(S), pool_l(T)) ] / (1 + sum_l c_l)        l in 4, 2, 1 with l < rows

    with pool_l to l x l cells, and c_l = 1/2, 1/4, 1/8 in the order of the l that are used. Raises ValueError for maps
    of different shapes.
    """
    student, teacher = _alike(student, teacher)
    loss, total, weight = jnp.square(student - teacher).mean(), 1.0, 1.0
    for size in (4, 2, 1):
        if size < student.shape[1]:
            weight /= 2
            loss += weight * jnp.square(adaptive_average_pool(student - teacher, size)).mean()
            total += weight
    return loss / total


def channel_wise(
    student: Float[Array, "batch rows columns channels"],
    teacher: Float[Array, "batch rows columns channels"],
    *,
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """Channel-wise distillation (arXiv 2011.13256): T² / (B · C) times the sum of KL(teacher || student), each
    channel's softmax over its positions. No gradient into ``teacher``. Raises ValueError for different shapes."""
    student, teacher = (x.reshape(x.shape[0], -1, x.shape[-1]).swapaxes(1, 2) for x in _alike(student, teacher))
    return temperature**2 * kl_divergence(teacher, student, temperature=temperature).mean()


def cell_wise(
    student: Float[Array, "batch rows columns channels"],
    teacher: Float[Array, "batch rows columns channels"],
    *,
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """T² / (B · H · W) times the sum of KL(teacher || student), each cell's softmax over its channels (of logits:
    Hinton's distillation, arXiv 1503.02531). No gradient into ``teacher``. Raises ValueError as above."""
    student, teacher = _alike(student, teacher)
    return temperature**2 * kl_divergence(teacher, student, temperature=temperature).mean()


def adaptive_average_pool(
    x: Float[Array, "batch rows columns channels"], size: int
) -> Float[Array, "batch size size channels"]:
    """Means over ``size`` x ``size`` bins; bin i covers floor(i · n / size) to ceil((i + 1) · n / size), as torch's."""
    rows, columns = (_bins(n, size) for n in x.shape[1:3])
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x, precision="highest")


def _bins(n: int, size: int) -> Float[np.ndarray, "size n"]:
    at, i = np.arange(n), np.arange(size)[:, None]
    inside = (at >= i * n // size) & (at < -(-(i + 1) * n // size))
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)


def _alike(student: Array, teacher: Array) -> tuple[Array, Array]:
    if student.shape != teacher.shape:
        raise ValueError(f"teacher: its map {teacher.shape} must have the shape of the student's, {student.shape}")
    wide = jnp.promote_types(student.dtype, jnp.float32)
    return student.astype(wide), jax.lax.stop_gradient(teacher).astype(wide)
