"""What the kernels for packed weights must know of their operands."""

import dataclasses

import jax.numpy as jnp

from jaxformers.kernels.codes import PER_WORD, WORDS
from jaxformers.kernels.lazy import pl


@dataclasses.dataclass(frozen=True)
class Shape:
    """x (m, k) times an (k, n) matrix of `bits`, in `groups` groups of `group` inputs (of k, for a single one)."""

    m: int
    k: int
    n: int
    bits: int
    group: int
    groups: int
    ternary: bool = False
    act_order: bool = False

    @property
    def per(self) -> int:
        return PER_WORD[self.bits]

    @property
    def rows(self) -> int:
        """Rows of words, or of triples at 3 bits."""
        return -(-self.k // self.per)

    def cost(self, dtype) -> "pl.CostEstimate":
        """FLOPs and bytes: words, scales and zeros in 32 bits each, activations in and out."""
        size = jnp.dtype(dtype).itemsize
        moved = 4 * self.rows * WORDS[self.bits] * self.n + 8 * self.groups * self.n + size * self.m * (self.k + self.n)
        return pl.CostEstimate(flops=2 * self.m * self.k * self.n, bytes_accessed=moved, transcendentals=0)
