"""Convolutions, patch embedding included."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformers import weights
from jaxformers.sites import site


class Conv(nnx.Module):
    """A convolution over the spatial axes of (B, …, in) with ``kernel`` (…, in / groups, out).

    ``size``, ``stride`` and ``padding`` (zeros on both sides) have one number per spatial axis. Where the windows tile
    the input (stride = size, no padding: patches) the convolution is one matrix product over flattened windows; rows
    and columns that fill no window are left out, as a convolution does. Sites: ``input``, ``output``.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        size: tuple[int, ...],
        *,
        stride: tuple[int, ...] | None = None,
        padding: tuple[int, ...] | None = None,
        groups: int = 1,
        bias: bool = True,
        std: float = 0.02,
        rngs: Any,
    ):
        if d_in % groups or d_out % groups:
            raise ValueError(f"conv: {groups} groups do not divide {d_in} inputs and {d_out} outputs")
        self.path = ""
        self.stride = (1,) * len(size) if stride is None else tuple(stride)
        self.padding = (0,) * len(size) if padding is None else tuple(padding)
        self.groups = groups
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (*size, d_in // groups, d_out)))
        self.bias = nnx.Param(jnp.zeros(d_out)) if bias else None

    def __call__(self, x: Float[Array, "batch *space in"]) -> Float[Array, "batch *out_space out"]:
        x = site(f"{self.path}.input", x)
        kernel = weights.dense(self.kernel.get_value()).astype(x.dtype)
        size = kernel.shape[:-2]
        if self.stride == size and not any(self.padding) and self.groups == 1:
            y = _patches(x, size) @ kernel.reshape(-1, kernel.shape[-1])
        elif self._shifts(x.shape[-1], kernel.shape[-1]):
            y = _depthwise(x, kernel, self.padding)
        else:
            axes = "DHW"[-len(size) :]
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                self.stride,
                [(p, p) for p in self.padding],
                dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
                feature_group_count=self.groups,
            )
        if self.bias is not None:
            y = y + self.bias.get_value().astype(y.dtype)
        return site(f"{self.path}.output", y)

    def _shifts(self, d_in: int, d_out: int) -> bool:
        """Whether each channel has a filter of its own, on a CPU: XLA's convolution there takes many times as long."""
        own = self.groups == d_in == d_out
        return own and set(self.stride) == {1} and jax.default_backend() == "cpu"


def _depthwise(
    x: Float[Array, "batch *space channels"], kernel: Float[Array, "*size 1 channels"], padding: tuple[int, ...]
) -> Float[Array, "batch *out_space channels"]:
    """One filter a channel, as the sum of shifted inputs, each times one row of the kernel."""
    size = kernel.shape[:-2]
    x = jnp.pad(x, [(0, 0), *((p, p) for p in padding), (0, 0)])
    out = [s - k + 1 for s, k in zip(x.shape[1:-1], size, strict=True)]
    y = 0
    for at in itertools.product(*map(range, size)):
        window = (slice(None), *(slice(i, i + n) for i, n in zip(at, out, strict=True)))
        y = y + x[window] * kernel[at][0]
    return y


def _patches(x: Float[Array, "batch *space in"], size: tuple[int, ...]) -> Float[Array, "batch *windows flat"]:
    """Disjoint windows, each flattened in the kernel's order."""
    n = len(size)
    x = x[(slice(None), *(slice(0, s // p * p) for s, p in zip(x.shape[1:-1], size, strict=True)))]
    split = [d for s, p in zip(x.shape[1:-1], size, strict=True) for d in (s // p, p)]
    x = x.reshape(x.shape[0], *split, x.shape[-1])
    x = x.transpose(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1)
    return x.reshape(*x.shape[: n + 1], -1)
