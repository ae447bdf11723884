"""The layout of low-bit weights that an NVIDIA GPU's matrix units want.

GPTQ's words hold consecutive inputs of one output. Here a 16-bit cell holds codes of inputs that lie a *plane* apart:
with b bits, c = 16 / b codes a cell and planes of P inputs, cell r of unit u has in its bits b·j to b·j + b the code
of input P·(c·u + j) + r. So the j-th codes of P neighbouring cells are P neighbouring inputs: x is read as it lies, two
cells make a register of two codes, and one AND-OR writes both into mantissas. At 3 bits three cells hold 16 codes: five
each, and a bit each of the last. The cells of 16 outputs lie together, 1 kB and more, as a program reads them.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

CELL = 16  # bits of a cell
ROWS = 16  # outputs whose cells lie together


class Planes(NamedTuple):
    """The arrays of a (k, n) matrix, k filled up to K, whole units (:func:`unit`), and n to 16.

    `cells` int16 (n / 16, units, 16, K · bits / 16 / units); `levels` int32 (G, n), see :func:`levels_of`; `negative`
    float32 (G, n), the second level of ternary weights, or None.
    """

    cells: jax.Array
    levels: jax.Array
    negative: jax.Array | None = None


def plane_of(group: int, groups: int, bits: int) -> int:
    """Inputs in a plane: the longer, the better for many rows, but all of one group. 0: groups of no whole planes."""
    longest = 64 if bits in (4, 8) else 32  # with more planes a cell, longer ones were no faster
    return next((p for p in (64, 32) if p <= longest and (groups == 1 or group % p == 0)), 0)


def unit(bits: int, plane: int) -> int:
    """Inputs that the planes of neighbouring cells hold together: the least that a loop steps over."""
    return plane * CELL // (1 if bits == 3 else bits)


def levels_of(scales: jax.Array, zeros: jax.Array) -> jax.Array:
    """Scales and zeros (0 to 255) in one word each: a float32 whose last eight bits are the zero instead.

    Exact for scales of float16 and bfloat16; float32 keeps 16 bits of its mantissa. One word, because a GPU copies no
    less than four bytes ahead of their use, and a scale that a step has to wait for costs more than its products.
    """
    bits = lax.bitcast_convert_type(scales.astype(jnp.float32), jnp.int32)
    return (bits + 0x80 & ~0xFF) | zeros.astype(jnp.int32)


def scales_and_zeros(levels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of :func:`levels_of`: float32 and int32."""
    return lax.bitcast_convert_type(levels & ~0xFF, jnp.float32), levels & 0xFF


def arrange(
    codes: jax.Array, scales: jax.Array, zeros: jax.Array, bits: int, plane: int, ternary: bool = False
) -> Planes:
    """Codes uint8 (k, n), the inputs of a group side by side, with scales and zeros (G, n), as :class:`Planes`.

    `ternary`: the codes are 0, 1 and 2 (`bits` 2), for nothing, the level in `scales` and the one in `zeros`.
    """
    full = jnp.pad(codes, [(0, -size % to) for size, to in zip(codes.shape, (unit(bits, plane), ROWS))]).T
    n, full = len(full), full.astype(jnp.int32)
    if bits == 3:
        full = full.reshape(n, -1, 16, plane)
        full, last = full[:, :, :15].reshape(n, -1, 3, 5, plane), full[:, :, 15:]
        top = (last >> jnp.arange(3)[:, None] & 1) << 15  # (n, units, 3, plane): bit i goes to cell i
    else:
        full, top = full.reshape(n, -1, CELL // bits, plane), 0
    joined = (full << (bits * jnp.arange(full.shape[-2]))[:, None]).sum(axis=-2) + top
    units = full.shape[1]
    cells = lax.bitcast_convert_type(joined.astype(jnp.uint16), jnp.int16)
    cells = cells.reshape(n // ROWS, ROWS, units, -1).swapaxes(1, 2)
    if ternary:
        return Planes(cells, levels_of(scales, jnp.zeros(scales.shape)), zeros.astype(jnp.float32))
    return Planes(cells, levels_of(scales, zeros))


def codes_of(planes: Planes, bits: int, plane: int, k: int) -> jax.Array:
    """The inverse of :func:`arrange`: codes uint8 (k, n)."""
    cells = lax.bitcast_convert_type(planes.cells.swapaxes(1, 2), jnp.uint16).astype(jnp.int32)
    n, per = cells.shape[0] * ROWS, CELL // bits
    cells = cells.reshape(n, -1, 3 if bits == 3 else 1, 1, plane)
    found = (cells >> (bits * jnp.arange(per))[:, None]) & (2**bits - 1)  # (n, units, cells, codes, plane)
    if bits == 3:
        last = ((cells >> 15) << jnp.arange(3)[:, None, None]).sum(axis=2)
        found = jnp.concatenate([found.reshape(n, -1, 15, plane), last], axis=2)
    return found.reshape(n, -1).T[:k, : planes.levels.shape[1]].astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Shape:
    """x (m, k) times an (k, n) matrix of `bits`, in `groups` groups of `group` inputs (of k, for a single one)."""

    m: int
    k: int
    n: int
    bits: int
    group: int
    groups: int
    plane: int
    ternary: bool = False

    @property
    def unit(self) -> int:
        return unit(self.bits, self.plane)

    @property
    def cells(self) -> tuple[int, int, int, int]:
        """The shape of the cells."""
        return -(-self.n // ROWS), -(-self.k // self.unit), ROWS, self.unit * self.bits // CELL

    @property
    def run(self) -> int:
        """Planes in succession that share a scale: those of a group, or of a unit where that is less."""
        planes, group = self.unit // self.plane, self.group // self.plane
        if self.groups == 1 or group % planes == 0:
            return planes
        return group if planes % group == 0 else 1
