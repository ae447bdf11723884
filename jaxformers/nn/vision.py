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
from jaxformers.nn.resampling import filter_matrix, resize_matrix
from jaxformers.sites import site


def resize(
    x: Float[Array, "*batch h w c"], size: tuple[int, int], kind: str, *, antialias: bool = False
) -> Float[Array, "*batch h2 w2 c"]:
    """Interpolate grids to another size, in float32; see :func:`resize_matrix`, or with ``antialias``
    :func:`filter_matrix`."""
    matrix = filter_matrix if antialias else resize_matrix
    rows, columns = (matrix(x.shape[i - 3], size[i], kind).astype(np.float32) for i in range(2))
    resized = jnp.einsum("ih,...hwc->...iwc", rows, x.astype(jnp.float32), precision="highest")
    return jnp.einsum("jw,...iwc->...ijc", columns, resized, precision="highest").astype(x.dtype)


class ImageEmbeddings(nnx.Module):
    """Patches, behind a class token (and DeiT's distillation token), plus a position table, then ``norm`` where the
    architecture has one (CLIP). Site: ``embeddings``.

    The table belongs to ``grid`` (rows, columns) of patches; for another grid it is stretched, bicubically. It gets no
    gradient where ``fixed_positions`` says so.
    ``mask_token`` stands for the patches that ``bool_masked_pos`` marks. ``registers``: so many more tokens without
    position between the class token and the patches (arXiv 2309.16588). ``patch_eps``: patches are normalised first.
    ``pad``: images are padded with zeros, right and below, to whole patches; otherwise what fills no patch is left out.
    """

    def __init__(
        self,
        width: int,
        *,
        grid: tuple[int, int],
        patch: tuple[int, int],
        stride: tuple[int, int] | None = None,
        channels: int = 3,
        cls_token: bool = True,
        distillation: bool = False,
        registers: int = 0,
        mask_token: bool = False,
        positions: bool = True,
        fixed_positions: bool = False,
        antialias: bool = False,
        patch_bias: bool = True,
        eps: float | None = None,
        patch_eps: float | None = None,
        pad: bool = False,
        rate: float = 0.0,
        std: float = 0.02,
        rngs: Any,
    ):
        self.path = ""
        self.grid, self.rate, self.channels, self.antialias = grid, rate, channels, antialias
        self.pad, self.fixed_positions = patch if pad else None, fixed_positions
        stride = patch if stride is None else stride
        self.patch = Conv(channels, width, patch, stride=stride, bias=patch_bias, std=std, rngs=rngs)
        token = lambda *shape: nnx.Param(std * jax.random.normal(rngs.params(), (*shape, width)))
        self.cls_token = token() if cls_token else None
        self.distillation_token = token() if distillation else None
        self.register_tokens = token(registers) if registers else None
        self.mask_token = nnx.Param(jnp.zeros(width)) if mask_token else None
        self.patch_norm = None if patch_eps is None else LayerNorm(width, eps=patch_eps)
        rows = cls_token + distillation + grid[0] * grid[1]
        self.position = Embed(rows, width, std=std, rngs=rngs) if positions else None
        self.norm = None if eps is None else LayerNorm(width, eps=eps)

    def patches(self, pixel_values: Float[Array, "batch channels height width"]) -> Float[Array, "batch h w d"]:
        """The patches' embeddings. Raises ValueError for pixels of another layout."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.channels:
            raise ValueError(
                f"pixel_values: expected (batch, {self.channels}, height, width), got {tuple(pixel_values.shape)}"
            )
        x = jnp.moveaxis(jnp.asarray(pixel_values), 1, -1).astype(self.patch.kernel.get_value().dtype)
        if self.pad is not None:
            rows, columns = (-n % p for n, p in zip(x.shape[1:3], self.pad, strict=True))
            x = jnp.pad(x, ((0, 0), (0, rows), (0, columns), (0, 0)))
        if any(n < p for n, p in zip(x.shape[1:3], self.patch.kernel.get_value().shape, strict=False)):
            raise ValueError(f"pixel_values: an image of {pixel_values.shape[2:]} pixels holds no whole patch")
        x = self.patch(x)
        return x if self.patch_norm is None else self.patch_norm(x)

    def positions(self, grid: tuple[int, int]) -> Float[Array, "rows width"]:
        """The position table for ``grid``: special tokens, then patches row by row."""
        table = self.position.embedding.get_value()
        if grid == self.grid:
            return table
        special = table.shape[0] - self.grid[0] * self.grid[1]
        patches = resize(table[special:].reshape(*self.grid, -1), grid, "bicubic", antialias=self.antialias)
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
            x = self._masked(x, bool_masked_pos)
        special = [t.get_value() for t in (self.cls_token, self.distillation_token) if t is not None]
        if special:
            special = jnp.broadcast_to(jnp.stack(special).astype(x.dtype), (batch, len(special), width))
            x = jnp.concatenate([special, x], axis=1)
        if self.position is not None:
            positions = self.positions(tuple(grid)).astype(x.dtype)
            x = x + (jax.lax.stop_gradient(positions) if self.fixed_positions else positions)
        if self.register_tokens is not None:
            tokens = self.register_tokens.get_value().astype(x.dtype)
            x = jnp.concatenate([x[:, :1], jnp.broadcast_to(tokens, (batch, *tokens.shape)), x[:, 1:]], axis=1)
        if self.norm is not None:
            x = self.norm(x)
        return site(self.path, dropout(x, self.rate, key)), tuple(grid)

    def _masked(self, x: Array, bool_masked_pos: Array) -> Array:
        if self.mask_token is None:
            raise ValueError("bool_masked_pos: this model has no mask token")
        if bool_masked_pos.shape != x.shape[:2]:
            raise ValueError(f"bool_masked_pos: expected shape {x.shape[:2]}, got {tuple(bool_masked_pos.shape)}")
        mask = jnp.asarray(bool_masked_pos)[..., None].astype(bool)
        return jnp.where(mask, self.mask_token.get_value().astype(x.dtype), x)


class OverlapEmbeddings(nnx.Module):
    """``patch_norm(patch(·))``: patches that overlap, by a convolution with padding. Site: ``embeddings`` (B, L, D)."""

    def __init__(
        self, d_in: int, d_out: int, patch: int, stride: int, *, eps: float = 1e-5, std: float = 0.02, rngs: Any
    ):
        self.path = ""
        half = (patch // 2, patch // 2)
        self.patch = Conv(d_in, d_out, (patch, patch), stride=(stride, stride), padding=half, std=std, rngs=rngs)
        self.patch_norm = LayerNorm(d_out, eps=eps)

    def __call__(
        self, x: Float[Array, "batch rows columns in"]
    ) -> tuple[Float[Array, "batch length width"], tuple[int, int]]:
        """The sequence and the grid of its patches."""
        x = self.patch(x)
        grid = x.shape[1:3]
        return site(self.path, self.patch_norm(x).reshape(x.shape[0], grid[0] * grid[1], -1)), grid


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


def drop_path_rates(rate: float, depth: int) -> list[float | None]:
    """Stochastic depth grows linearly with depth, from 0 to ``rate`` (arXiv 1603.09382). None: there is none."""
    return [rate * i / max(depth - 1, 1) if rate else None for i in range(depth)]
