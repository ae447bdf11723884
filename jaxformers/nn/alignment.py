"""Modules that carry a small network's stages to the widths of a large one's, to be compared there and then dropped.

A hierarchical network has for each stage s, shallow to deep, a feature map F_s (B, rows, columns, c_s) and the
embedding E_s (B, L, c_s) of its patches; the large one has C_s channels. Two ways to fuse the maps from deep to
shallow, both with m channels between: x = norm(reduce(F_s)), y the fused map of stage s + 1 stretched to x's size,

    selection (TransKD, arXiv 2202.13393)    a = relu(norm(squeeze(mean(x + y)))); w_x, w_y = softmax(own(a), deeper(a))
    attention (ReviewKD, arXiv 2104.09044)   w_x, w_y = sigmoid(attend([x; y])), one pair of weights per cell
    fused_s = w_x x + w_y y                  out_s = norm(expand(fused_s)) (B, rows, columns, C_s)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxformers.nn.attention import Attention
from jaxformers.nn.conv import Conv
from jaxformers.nn.linear import Linear
from jaxformers.nn.norms import BatchNorm
from jaxformers.nn.stages import Stages
from jaxformers.nn.vision import OverlapEmbeddings

Map = Float[Array, "batch rows columns channels"]
FUSIONS = ("selection", "attention")


def same_stages(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    """Raise ValueError unless both lists of channels speak of the same number of stages."""
    if len(first) != len(second) or not first:
        raise ValueError(f"channels: expected one number per stage of both networks, got {first} and {second}")


class StageFusion(nnx.Module):
    """One stage of the fusion. ``kind``: "selection", "attention", or None for the deepest stage.

    ``squeeze_single`` stands in for ``squeeze`` and its norm where a batch holds one image, whose pooled vector has no
    variance (as the authors' code does it).
    """

    def __init__(self, d_in: int, d_out: int, width: int, kind: str | None, *, rngs: Any):
        self.path = ""
        self.kind = kind
        self.reduce = uniform(Conv(d_in, width, (1, 1), bias=False, rngs=rngs), 3, rngs)
        self.reduce_norm = BatchNorm(width)
        self.expand = uniform(Conv(width, d_out, (3, 3), padding=(1, 1), bias=False, rngs=rngs), 3, rngs)
        self.expand_norm = BatchNorm(d_out)
        if kind == "selection":
            narrow = max(width // 16, 32)
            self.squeeze = uniform(Linear(width, narrow, bias=False, rngs=rngs), 1, rngs)
            self.squeeze_norm = BatchNorm(narrow)
            self.squeeze_single = uniform(Linear(width, narrow, bias=False, rngs=rngs), 1, rngs)
            self.own = uniform(Linear(narrow, width, rngs=rngs), 1, rngs)
            self.deeper = uniform(Linear(narrow, width, rngs=rngs), 1, rngs)
        elif kind == "attention":
            self.attend = uniform(Conv(2 * width, 2, (1, 1), rngs=rngs), 1, rngs)

    def __call__(self, x: Map, deeper: Map | None, *, batch_statistics: bool) -> tuple[Map, Map]:
        """(the map at the large network's width, the fused map for the next shallower stage)."""
        x = self.reduce_norm(self.reduce(x), batch_statistics=batch_statistics)
        if self.kind is not None:
            y = nearest(deeper, x.shape[1:3])
            own, other = self._weights(x, y, batch_statistics)
            x = own * x + other * y
        return self.expand_norm(self.expand(x), batch_statistics=batch_statistics), x

    def _weights(self, x: Map, y: Map, batch_statistics: bool) -> tuple[Array, Array]:
        if self.kind == "attention":
            z = jax.nn.sigmoid(self.attend(jnp.concatenate([x, y], axis=-1)))
            return z[..., :1], z[..., 1:]
        pooled = (x + y).mean((1, 2))
        if pooled.shape[0] == 1:
            a = self.squeeze_single(pooled)
        else:
            a = self.squeeze_norm(self.squeeze(pooled), batch_statistics=batch_statistics)
        a = jax.nn.relu(a)
        own, other = jax.nn.softmax(jnp.stack([self.own(a), self.deeper(a)]), axis=0)
        return own[:, None, None], other[:, None, None]


class FeatureFusion(nnx.Module):
    """:class:`StageFusion` of all stages, deep to shallow: TransKD's CSF (``"selection"``) or ReviewKD's ABF
    (``"attention"``). ``channels`` and ``large``: of both networks' stages, shallow to deep. ``width``: m above."""

    def __init__(
        self, channels: tuple[int, ...], large: tuple[int, ...], kind: str = "selection", *, width: int = 64, rngs: Any
    ):
        same_stages(channels, large)
        if kind not in FUSIONS:
            raise ValueError(f"kind: expected one of {', '.join(FUSIONS)}, got {kind!r}")
        self.path = ""
        kinds = [kind] * (len(channels) - 1) + [None]
        sizes = zip(channels, large, kinds, strict=True)
        self.stages = Stages([StageFusion(c, d, width, kind, rngs=rngs) for c, d, kind in sizes])

    def __call__(self, maps: list[Map], *, batch_statistics: bool = False) -> list[Map]:
        """Maps of all stages, shallow to deep, at the large network's widths."""
        fused, out = None, []
        for stage, x in reversed(list(zip(self.stages, maps, strict=True))):
            y, fused = stage(x, fused, batch_statistics=batch_statistics)
            out.append(y)
        return out[::-1]


class GlobalLocalMixer(nnx.Module):
    """TransKD's GL-Mixer: ``alpha · attention(E) + beta · conv_a(E) · sigmoid(conv_b(E))``, plus E with ``add``.

    Attention sees all positions, the convolutions over three neighbours in the sequence. The authors' code leaves alpha
    and beta uninitialised; here both begin at 1.
    """

    def __init__(self, width: int, heads: int = 8, *, add: bool = False, rngs: Any):
        self.path = ""
        self.add = add
        self.attention = Attention(width, heads, bias=False, out_bias=True, rngs=rngs)
        self.conv_a = uniform(Conv(width, width, (3,), padding=(1,), rngs=rngs), 1, rngs)
        self.conv_b = uniform(Conv(width, width, (3,), padding=(1,), rngs=rngs), 1, rngs)
        self.alpha = nnx.Param(jnp.ones(()))
        self.beta = nnx.Param(jnp.ones(()))

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        seen, _ = self.attention(x)
        local = self.conv_a(x) * jax.nn.sigmoid(self.conv_b(x))
        mixed = self.alpha.get_value() * seen + self.beta.get_value() * local
        return mixed + x if self.add else mixed


class EmbeddingAlignment(nnx.Module):
    """TransKD's PEA, ``project_s(E_s)`` (B, L, C_s), and what its variants add.

    ``mixer_heads``: a :class:`GlobalLocalMixer` with so many heads before the deepest stage's projection (GL).
    ``assistant``: patches of the large network's width, taken from the image and from the maps of all stages but the
    deepest, join the projections: a_s project_s(E_s) + b_s M_s (EA; a from 0.1 to 0.4, b from 0.5 to 0.8 at first).
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        large: tuple[int, ...],
        *,
        mixer_heads: int | None = None,
        add: bool = False,
        assistant: bool = False,
        image_channels: int = 3,
        rngs: Any,
    ):
        same_stages(channels, large)
        self.path = ""
        self.project = Stages([uniform(Linear(c, d, rngs=rngs), 1, rngs) for c, d in zip(channels, large, strict=True)])
        self.mixer = self.assistant = self.own_scale = self.assistant_scale = nnx.data(None)
        if mixer_heads is not None:
            self.mixer = GlobalLocalMixer(channels[-1], mixer_heads, add=add, rngs=rngs)
        if assistant:
            sources, n = (image_channels, *channels[:-1]), len(channels)
            shapes = [(7, 4), *[(3, 2)] * (n - 1)]
            self.assistant = Stages([
                OverlapEmbeddings(c, d, *shape, std=(2 / (shape[0] ** 2 * d)) ** 0.5, rngs=rngs)
                for c, d, shape in zip(sources, large, shapes, strict=True)
            ])  # fmt: skip
            self.own_scale = nnx.Param(0.1 * jnp.arange(1.0, n + 1))
            self.assistant_scale = nnx.Param(0.4 + 0.1 * jnp.arange(1.0, n + 1))

    def __call__(
        self,
        embeddings: list[Float[Array, "batch length width"]],
        maps: list[Map],
        pixel_values: Float[Array, "batch channels height width"],
    ) -> list[Float[Array, "batch length large_width"]]:
        """Embeddings of all stages, shallow to deep, at the large network's widths."""
        if self.mixer is not None:
            embeddings = [*embeddings[:-1], self.mixer(embeddings[-1])]
        out = [self.project[i](x) for i, x in enumerate(embeddings)]
        if self.assistant is None:
            return out
        sources = [jnp.moveaxis(pixel_values, 1, -1), *maps[:-1]]
        own, other = self.own_scale.get_value(), self.assistant_scale.get_value()
        helped = [self.assistant[i](x)[0] for i, x in enumerate(sources)]
        return [own[i] * x + other[i] * y for i, (x, y) in enumerate(zip(out, helped, strict=True))]


def nearest(x: Map, size: tuple[int, int]) -> Map:
    """``x`` at another size: cell i is old cell floor(i · old / new), torch's nearest neighbour."""
    rows, columns = (np.arange(new) * old // new for old, new in zip(x.shape[1:3], size, strict=True))
    return x[:, rows][:, :, columns]


def uniform(module: Any, gain: float, rngs: Any) -> Any:
    """``module`` whose kernel (and bias) are drawn from ±sqrt(gain / fan_in): torch's default with gain 1, its
    ``kaiming_uniform_(a=1)`` with gain 3."""
    shape = module.kernel.get_value().shape
    fan_in = int(np.prod(shape[:-1]))
    draw = lambda shape, gain: (gain / fan_in) ** 0.5 * jax.random.uniform(rngs.params(), shape, minval=-1, maxval=1)
    module.kernel = nnx.Param(draw(shape, gain))
    if module.bias is not None:
        module.bias = nnx.Param(draw(module.bias.get_value().shape, 1))
    return module
