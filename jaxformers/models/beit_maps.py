"""BEiT's semantic segmentation: four layers' patches as a pyramid, and UPerNet over it (arXiv 1807.10221)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxformers import nn


class Doubling(nnx.Module):
    """A transposed 2 × 2 convolution with stride 2: each cell becomes four. ``kernel`` (2, 2, out, in)."""

    def __init__(self, width: int, *, std: float, rngs: nnx.Rngs):
        self.path = ""
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (2, 2, width, width)))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "batch h w in"]) -> Float[Array, "batch 2h 2w out"]:
        b, h, w, _ = x.shape
        y = jnp.einsum("bhwi,rcoi->bhrwco", x, self.kernel.get_value().astype(x.dtype))
        return y.reshape(b, 2 * h, 2 * w, -1) + self.bias.get_value().astype(x.dtype)


class ConvNorm(nnx.Module):
    """``relu(norm(conv(·)))`` with a square kernel, the grid unchanged."""

    def __init__(self, d_in: int, d_out: int, size: int, *, std: float, rngs: nnx.Rngs):
        self.path = ""
        half = (size // 2, size // 2)
        self.conv = nn.Conv(d_in, d_out, (size, size), padding=half, bias=False, std=std, rngs=rngs)
        self.norm = nn.BatchNorm(d_out)

    def __call__(self, x: Float[Array, "batch h w in"], training: bool) -> Float[Array, "batch h w out"]:
        return jax.nn.relu(self.norm(self.conv(x), batch_statistics=training))


class Pyramid(nnx.Module):
    """Four maps of one size at four and two times, once and half of it: ``again(gelu(norm(up(·))))``, ``once(·)``."""

    def __init__(self, width: int, *, std: float, rngs: nnx.Rngs):
        self.path = ""
        self.up, self.again = (Doubling(width, std=std, rngs=rngs) for _ in range(2))
        self.norm = nn.BatchNorm(width)
        self.once = Doubling(width, std=std, rngs=rngs)

    def __call__(self, maps: list[Array], training: bool) -> list[Array]:
        first = self.again(nn.activation("gelu")(self.norm(self.up(maps[0]), batch_statistics=training)))
        b, h, w, d = maps[3].shape
        if min(h, w) < 2:
            raise ValueError(f"pixel_values: a grid of {(h, w)} patches cannot be halved; give larger images")
        last = maps[3][:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, d).max((2, 4))
        return [first, self.once(maps[1]), maps[2], last]


class Auxiliary(nnx.Module):
    """A second, shallow classifier of the third map, for training: ``convs``, perhaps beside their input."""

    def __init__(self, c: Any, rngs: nnx.Rngs):
        self.path = ""
        width, std = c.auxiliary_channels, c.initializer_range
        widths = [c.hidden_size] + [width] * c.auxiliary_num_convs
        convs = [ConvNorm(d_in, width, 3, std=std, rngs=rngs) for d_in in widths[:-1]]
        self.convs = nn.Stages(convs)
        joined = c.hidden_size + widths[-1]
        self.join = ConvNorm(joined, width, 3, std=std, rngs=rngs) if c.auxiliary_concat_input else nnx.data(None)
        self.classifier = nn.Conv(width, c.num_labels, (1, 1), std=std, rngs=rngs)

    def __call__(self, x: Array, training: bool) -> Float[Array, "batch labels h w"]:
        h = x
        for conv in self.convs:
            h = conv(h, training)
        h = h if self.join is None else self.join(jnp.concatenate([x, h], axis=-1), training)
        return jnp.moveaxis(self.classifier(h), -1, 1)


class MapHead(nnx.Module):
    """``pyramid`` → pooled context of the last map (``pool``, ``bottleneck``) → top-down sums of ``lateral`` maps →
    ``smooth`` → ``fuse`` → ``classifier``; and ``auxiliary``. With a key (training) batch norms use the batch's own
    statistics."""

    def __init__(self, c: Any, rngs: nnx.Rngs):
        self.path = ""
        width, std, scales = c.hidden_size, c.initializer_range, c.pool_scales
        layer = lambda d_in, size: ConvNorm(d_in, width, size, std=std, rngs=rngs)
        self.scales = tuple(scales)
        self.pyramid = Pyramid(width, std=std, rngs=rngs)
        self.pool = nn.Stages([layer(width, 1) for _ in scales])
        self.bottleneck = layer(width * (1 + len(scales)), 3)
        self.lateral = nn.Stages([layer(width, 1) for _ in range(3)])
        self.smooth = nn.Stages([layer(width, 3) for _ in range(3)])
        self.fuse = layer(4 * width, 3)
        self.classifier = nn.Conv(width, c.num_labels, (1, 1), std=std, rngs=rngs)
        self.auxiliary = Auxiliary(c, rngs) if c.use_auxiliary_head else nnx.data(None)

    def __call__(
        self, maps: list[Float[Array, "batch h w width"]], training: bool
    ) -> tuple[Float[Array, "batch labels 4h 4w"], Float[Array, "batch labels h w"] | None]:
        """Logits, and the auxiliary ones where there are any."""
        maps = self.pyramid(maps, training)
        size = maps[3].shape[1:3]
        pooled = [conv(average(maps[3], s), training) for conv, s in zip(self.pool, self.scales, strict=True)]
        context = jnp.concatenate([maps[3], *(nn.resize(p, size, "bilinear") for p in pooled)], axis=-1)
        laterals = [conv(x, training) for conv, x in zip(self.lateral, maps, strict=False)]
        laterals.append(self.bottleneck(context, training))
        for i in (3, 2, 1):
            laterals[i - 1] = laterals[i - 1] + nn.resize(laterals[i], laterals[i - 1].shape[1:3], "bilinear")
        outs = [conv(x, training) for conv, x in zip(self.smooth, laterals, strict=False)] + laterals[3:]
        outs = [outs[0], *(nn.resize(x, outs[0].shape[1:3], "bilinear") for x in outs[1:])]
        logits = self.classifier(self.fuse(jnp.concatenate(outs, axis=-1), training))
        second = None if self.auxiliary is None else self.auxiliary(maps[2], training)
        return jnp.moveaxis(logits, -1, 1), second


def average(x: Float[Array, "batch h w d"], cells: int) -> Float[Array, "batch cells cells d"]:
    """Means over a grid of ``cells`` × ``cells`` boxes, which overlap where they do not divide x (torch's adaptive
    pooling: box i of n goes from ⌊i·h/n⌋ to ⌈(i+1)·h/n⌉)."""
    matrices = []
    for old in x.shape[1:3]:
        matrix = np.zeros((cells, old), np.float32)
        for i in range(cells):
            first, end = i * old // cells, -(-(i + 1) * old // cells)
            matrix[i, first:end] = 1 / (end - first)
        matrices.append(matrix)
    rows, columns = matrices
    half = jnp.einsum("ih,bhwd->biwd", rows, x.astype(jnp.float32), precision="highest")
    return jnp.einsum("jw,biwd->bijd", columns, half, precision="highest").astype(x.dtype)


_CONV = {"conv": "conv", "norm": "bn"}
_LAYERS = {
    "pool.{}": "decode_head.psp_modules.{}.1",
    "bottleneck": "decode_head.bottleneck",
    "lateral.{}": "decode_head.lateral_convs.{}",
    "smooth.{}": "decode_head.fpn_convs.{}",
    "fuse": "decode_head.fpn_bottleneck",
    "auxiliary.convs.{}": "auxiliary_head.convs.{}",
    "auxiliary.join": "auxiliary_head.conv_cat",
}
KEYS = {
    **{f"head.{a}.{b}": f"{theirs}.{part}" for a, theirs in _LAYERS.items() for b, part in _CONV.items()},
    "head.pyramid.up": "fpn1.0",
    "head.pyramid.norm": "fpn1.1",
    "head.pyramid.again": "fpn1.3",
    "head.pyramid.once": "fpn2.0",
    "head.classifier": "decode_head.classifier",
    "head.auxiliary.classifier": "auxiliary_head.classifier",
}
