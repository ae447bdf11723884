"""Swin (arXiv 2103.14030): attention within windows of a grid, shifted in every other layer, and patch merging."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers.nn.attention import Mask, attend
from jaxformers.nn.dropout import split
from jaxformers.nn.linear import Linear
from jaxformers.nn.norms import LayerNorm
from jaxformers.nn.vision import offsets
from jaxformers.sites import site


class WindowBias(nnx.Module):
    """A bias per head for each offset (rows, columns) between two cells of a window; ``table``: offsets row by row."""

    def __init__(self, heads: int, window: int):
        self.path = ""
        self.window = window
        self.table = nnx.Param(jnp.zeros(((2 * window - 1) ** 2, heads)))

    def __call__(self) -> Float[Array, "1 heads cells cells"]:
        return self.table.get_value()[offsets(self.window, self.window)].transpose(2, 0, 1)[None]


class WindowAttention(nnx.Module):
    """Attention of each ``window`` × ``window`` cells of a grid among themselves.

    The grid is rolled by ``shift`` rows and columns first, so that the windows of one layer join those of the last;
    cells that only meet because the roll wraps around do not see each other. A grid that windows do not tile is padded
    with zeros, right and below, and the padding is seen, as the original does. A grid no larger than one window in
    either direction is not shifted.

    Sites, with windows in the place of sequences: ``scores``, ``probs`` (B · windows, H, cells, cells), ``context``
    (B · windows, cells, H, size), cells = window².
    """

    varying = ("shift",)
    top_k: int | None = None

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        window: int,
        shift: int = 0,
        bias: bool = True,
        rate: float = 0.0,
        std: float = 0.02,
        rngs: Any,
    ):
        if width % heads:
            raise ValueError(f"attention: width {width} is not divisible by {heads} heads")
        self.path = ""
        self.heads, self.size, self.window, self.shift, self.rate = heads, width // heads, window, shift, rate
        self.query = Linear(width, width, bias=bias, std=std, rngs=rngs)
        self.key = Linear(width, width, bias=bias, std=std, rngs=rngs)
        self.value = Linear(width, width, bias=bias, std=std, rngs=rngs)
        self.out = Linear(width, width, std=std, rngs=rngs)
        self.relative = WindowBias(heads, window)

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        *,
        grid: tuple[int, int],
        key: jax.Array | None = None,
        **others: Any,
    ) -> tuple[Float[Array, "batch length width"], None]:
        """``grid`` (rows, columns) of the cells in x. A block's other arguments must be None: there is no cache."""
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise ValueError(f"{given[0]}: attention within windows takes none")
        if min(grid) < self.window:
            raise ValueError(
                f"pixel_values: {self.path} has a grid of {grid} cells, smaller than its window of {self.window}; "
                "give larger images"
            )
        batch, length, width = x.shape
        shift = 0 if min(grid) == self.window else self.shift
        shifted = not isinstance(shift, int) or shift > 0  # traced under a scan, where each layer has its own
        x = x.reshape(batch, *grid, width)
        x = jnp.pad(x, ((0, 0), *((0, -n % self.window) for n in grid), (0, 0)))
        padded = x.shape[1:3]
        x = windows(jnp.roll(x, (-shift, -shift), (1, 2)) if shifted else x, self.window)
        mask = None
        if shifted:
            regions = windows(self._regions(padded, shift)[None, ..., None], self.window)[..., 0]
            mask = Mask(segments=jnp.tile(regions, (batch, 1)))
        heads = (*x.shape[:2], self.heads, self.size)
        q, k, v = (linear(x).reshape(heads) for linear in (self.query, self.key, self.value))
        (drop,) = split(key, 1)
        options = {"path": self.path, "rate": self.rate, "top_k": self.top_k}
        context = attend(q, k, v, mask=mask, bias=self.relative(), key=drop, **options)
        context = site(f"{self.path}.context", context)
        x = unwindows(self.out(context.reshape(*x.shape[:2], self.heads * self.size)), self.window, padded)
        x = jnp.roll(x, (shift, shift), (1, 2)) if shifted else x
        return x[:, : grid[0], : grid[1]].reshape(batch, length, width), None

    def _regions(self, grid: tuple[int, int], shift: Any) -> Int[Array, "rows columns"]:
        """Which cells of the rolled grid were neighbours before: three bands along each axis."""
        rows, columns = (
            (jnp.arange(n) >= n - self.window).astype(int) + (jnp.arange(n) >= n - shift).astype(int) for n in grid
        )
        return 3 * rows[:, None] + columns


def windows(x: Array, size: int) -> Array:
    """(B, rows, columns, D) -> (B · windows, size², D), windows row by row."""
    b, h, w, d = x.shape
    x = x.reshape(b, h // size, size, w // size, size, d)
    return x.swapaxes(2, 3).reshape(-1, size * size, d)


def unwindows(x: Array, size: int, grid: tuple[int, int]) -> Array:
    """The inverse of :func:`windows`."""
    h, w = grid
    x = x.reshape(-1, h // size, w // size, size, size, x.shape[-1])
    return x.swapaxes(2, 3).reshape(-1, h, w, x.shape[-1])


class PatchMerging(nnx.Module):
    """``reduction(norm(·))`` of each 2 × 2 cells, side by side: half the rows and columns, twice the width.

    A grid with an odd side is padded with zeros.
    """

    def __init__(self, width: int, *, eps: float = 1e-5, std: float = 0.02, rngs: Any):
        self.path = ""
        self.norm = LayerNorm(4 * width, eps=eps)
        self.reduction = Linear(4 * width, 2 * width, bias=False, std=std, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch length width"], grid: tuple[int, int]
    ) -> tuple[Float[Array, "batch shorter wider"], tuple[int, int]]:
        b, _, d = x.shape
        x = jnp.pad(x.reshape(b, *grid, d), ((0, 0), (0, grid[0] % 2), (0, grid[1] % 2), (0, 0)))
        grid = (x.shape[1] // 2, x.shape[2] // 2)
        x = x.reshape(b, grid[0], 2, grid[1], 2, d).transpose(0, 1, 3, 4, 2, 5)  # (…, column, row, D) of each four
        return self.reduction(self.norm(x.reshape(b, grid[0] * grid[1], 4 * d))), grid
