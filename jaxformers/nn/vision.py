"""Images as sequences: patches, class tokens, position tables that stretch, and relative positions on a grid."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxformers.nn.conv import Conv
from jaxformers.nn.dropout import dropout
from jaxformers.nn.linear import Embed
from jaxformers.nn.norms import LayerNorm
from jaxformers.sites import site


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
    a = -0.75
    for tap in range(-1, 3):
        d = np.abs(t - tap)
        if kind == "bilinear":
            weight = np.maximum(1 - d, 0)
        else:
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            weight = np.where(d <= 1, near, np.where(d < 2, a * (d**3 - 5 * d**2 + 8 * d - 4), 0))
        np.add.at(matrix, (np.arange(new), np.clip(left + tap, 0, old - 1)), weight)
    return matrix.astype(np.float32)


def resize(x: Float[Array, "h w c"], size: tuple[int, int], kind: str) -> Float[Array, "h2 w2 c"]:
    """Interpolate a grid to another size; see :func:`resize_matrix`."""
    rows, columns = (resize_matrix(x.shape[i], size[i], kind) for i in range(2))
    return jnp.einsum("ih,jw,hwc->ijc", rows, columns, x.astype(jnp.float32), precision="highest").astype(x.dtype)


class ImageEmbeddings(nnx.Module):
    """Patches, behind a class token (and DeiT's distillation token), plus a position table, then ``norm`` where the
    architecture has one (CLIP). Site: ``embeddings``.

    The table belongs to ``grid`` (rows, columns) of patches; for another grid it is stretched, bicubically.
    ``mask_token`` stands for the patches that ``bool_masked_pos`` marks.
    """

    def __init__(
        self,
        width: int,
        *,
        grid: tuple[int, int],
        patch: tuple[int, int],
        stride: tuple[int, int] | None = None,
        channels: int = 3,
        distillation: bool = False,
        mask_token: bool = False,
        positions: bool = True,
        patch_bias: bool = True,
        eps: float | None = None,
        rate: float = 0.0,
        std: float = 0.02,
        rngs: Any,
    ):
        self.path = ""
        self.grid, self.rate, self.channels = grid, rate, channels
        stride = patch if stride is None else stride
        self.patch = Conv(channels, width, patch, stride=stride, bias=patch_bias, std=std, rngs=rngs)
        token = lambda: nnx.Param(std * jax.random.normal(rngs.params(), (width,)))
        self.cls_token = token()
        self.distillation_token = token() if distillation else None
        self.mask_token = nnx.Param(jnp.zeros(width)) if mask_token else None
        rows = 1 + distillation + grid[0] * grid[1]
        self.position = Embed(rows, width, std=std, rngs=rngs) if positions else None
        self.norm = None if eps is None else LayerNorm(width, eps=eps)

    def patches(self, pixel_values: Float[Array, "batch channels height width"]) -> Float[Array, "batch h w d"]:
        """The patches' embeddings. Raises ValueError for pixels of another layout."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.channels:
            raise ValueError(
                f"pixel_values: expected (batch, {self.channels}, height, width), got {tuple(pixel_values.shape)}"
            )
        return self.patch(jnp.moveaxis(pixel_values, 1, -1).astype(self.patch.kernel.get_value().dtype))

    def positions(self, grid: tuple[int, int]) -> Float[Array, "rows width"]:
        """The position table for ``grid``: special tokens, then patches row by row."""
        table = self.position.embedding.get_value()
        if grid == self.grid:
            return table
        special = table.shape[0] - self.grid[0] * self.grid[1]
        patches = resize(table[special:].reshape(*self.grid, -1), grid, "bicubic")
        return jnp.concatenate([table[:special], patches.reshape(-1, table.shape[-1])])

    def __call__(
        self,
        pixel_values: Float[Array, "batch channels height width"],
        bool_masked_pos: Bool[Array, "batch patches"] | None = None,
        *,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "batch length width"], tuple[int, int]]:
        """The sequence and the grid of its patches."""
        x = self.patches(pixel_values)
        batch, *grid, width = x.shape
        x = x.reshape(batch, -1, width)
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError("bool_masked_pos: this model has no mask token")
            x = jnp.where(bool_masked_pos[..., None].astype(bool), self.mask_token.get_value().astype(x.dtype), x)
        special = [t.get_value() for t in (self.cls_token, self.distillation_token) if t is not None]
        special = jnp.broadcast_to(jnp.stack(special).astype(x.dtype), (batch, len(special), width))
        x = jnp.concatenate([special, x], axis=1)
        if self.position is not None:
            x = x + self.positions(tuple(grid)).astype(x.dtype)
        if self.norm is not None:
            x = self.norm(x)
        return site(self.path, dropout(x, self.rate, key)), tuple(grid)


class GridBias(nnx.Module):
    """A bias per head for each offset (rows, columns) between two patches, and three for the class token (BEiT).

    ``table``: offsets row by row, then class → patch, patch → class, class → class. For another grid than the one
    trained on, the offsets' part is stretched bilinearly.
    """

    def __init__(self, heads: int, grid: tuple[int, int], *, rngs: Any):
        self.path = ""
        self.grid = grid
        rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
        self.table = nnx.Param(jnp.zeros((rows, heads)))

    def __call__(self, grid: tuple[int, int]) -> Float[Array, "1 heads length length"]:
        table = self.table.get_value()
        spread = lambda g: (2 * g[0] - 1, 2 * g[1] - 1)
        if grid != self.grid:
            offsets = resize(table[:-3].reshape(*spread(self.grid), -1), spread(grid), "bilinear")
            table = jnp.concatenate([offsets.reshape(-1, table.shape[-1]), table[-3:]])
        return table[cls_offsets(*grid)].transpose(2, 0, 1)[None]


def offsets(rows: int, columns: int) -> np.ndarray:
    """(N, N) index of the offset between each two cells of a grid, N = rows · columns."""
    cells = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")).reshape(2, -1)
    dy, dx = cells[:, :, None] - cells[:, None, :]
    return (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1


def cls_offsets(rows: int, columns: int) -> np.ndarray:
    """(1 + N, 1 + N): :func:`offsets` with the class token first."""
    last = (2 * rows - 1) * (2 * columns - 1)
    index = np.pad(offsets(rows, columns), ((1, 0), (1, 0)))
    index[0, :], index[:, 0], index[0, 0] = last, last + 1, last + 2
    return index


def pixel_shuffle(x: Float[Array, "batch h w c_r_r"], r: int) -> Float[Array, "batch c hr wr"]:
    """Channels (C, r, r) to space: torch's PixelShuffle, from channels last to channels first."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, c // r**2, r, r)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(b, c // r**2, h * r, w * r)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth grows linearly with depth, from 0 to ``rate`` (arXiv 1603.09382)."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
