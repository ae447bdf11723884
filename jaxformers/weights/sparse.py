"""N:M sparse weights without their zeros: of every m consecutive inputs of an output, n values and a bit each.

    W[g · m + j, o] = values[g · n + r, o]   where bit j of group g is set and r of the bits before it in the group are,
    W[g · m + j, o] = 0                      elsewhere

2:4 in bfloat16 takes 36 of 64 bits, 56 % of the dense weight. The product is dense: x is multiplied by the weight,
which is unpacked for it, one layer at a time. So what is gained is memory, and the bandwidth of loading; no
multiplication is saved, on any device. Source of the pattern: arXiv 2104.08378; the layout is this library's own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import paths, surgery
from jaxformers.weights.base import Read, is_typed
from jaxformers.weights.masked import Masked, settle_masks

_RECORD = "jaxformers.weights.sparse:abstract_nm"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NMSparse:
    """A packed (in, out) kernel with at most ``n`` of every ``m`` inputs; a typed weight.

    ``values`` float (in / m · n, out); ``bits`` uint8 (ceil(in / 8), out), eight inputs a byte, the first in the lowest
    bit: exactly n bits of a group are set, also where fewer values are not zero. Training changes values, never bits.
    Leaves may carry leading axes (stacked layers).
    """

    values: jax.Array
    bits: jax.Array
    n: int = dataclasses.field(metadata={"static": True}, default=2)
    m: int = dataclasses.field(metadata={"static": True}, default=4)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, d_out = self.values.shape
        return (*lead, rows // self.n * self.m, d_out)

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def mask(self) -> jax.Array:
        """bool (in, out): where values stand."""
        *lead, d_in, d_out = self.shape
        shifts = jnp.arange(8, dtype=jnp.uint8)[:, None]
        flags = (self.bits[..., :, None, :] >> shifts) & 1
        return flags.reshape(*lead, -1, d_out)[..., :d_in, :].astype(bool)

    def dense(self) -> jax.Array:
        *lead, d_in, d_out = self.shape
        mask = self.mask().reshape(*lead, -1, self.m, d_out)
        values = self.values.reshape(*lead, -1, self.n, d_out)
        rank = jnp.cumsum(mask, axis=-2, dtype=jnp.int8) - 1
        out = jnp.zeros(mask.shape, values.dtype)
        for r in range(self.n):  # no gather
            out = jnp.where(mask & (rank == r), values[..., r : r + 1, :], out)
        return out.reshape(*lead, d_in, d_out)

    def matmul(self, x: jax.Array) -> jax.Array:
        return _dense_matmul(self, x)

    def to_tensors(self) -> dict[str, np.ndarray]:
        return {"nm_values": np.asarray(self.values).T, "nm_bits": np.asarray(self.bits).T}

    def from_tensors(self, read: Read) -> "NMSparse":
        values, bits = read("nm_values").T, read("nm_bits").T
        for name, found, own in (("nm_values", values, self.values), ("nm_bits", bits, self.bits)):
            if found.shape != own.shape:
                raise ValueError(f"{name}: expected shape {own.shape[::-1]}, found {found.shape[::-1]}")
        if bits.dtype != np.uint8:
            raise ValueError(f"nm_bits: expected uint8, found {bits.dtype}")
        flags = np.unpackbits(bits, axis=0, bitorder="little")
        whole = flags[: self.shape[0]].reshape(-1, self.m, flags.shape[1])
        if flags[self.shape[0] :].any() or (whole.sum(1) != self.n).any():
            raise ValueError(f"nm_bits: expected {self.n} bits set of every {self.m}")
        return NMSparse(values, bits, self.n, self.m)


# Rematerialised: what waits for the backward pass is the packed weight, never the dense kernel.
@jax.checkpoint
def _dense_matmul(w: NMSparse, x: jax.Array) -> jax.Array:
    return x @ w.dense().astype(x.dtype)


def pack_kernel(kernel: jax.Array, n: int, m: int) -> NMSparse:
    """A plain (in, out) kernel with at most ``n`` entries that are not zero of every ``m`` inputs, packed.

    Raises ValueError when ``m`` does not divide the inputs, or a group has more entries.
    """
    kernel = np.asarray(kernel)
    d_in, d_out = kernel.shape
    if not 1 <= n <= m:
        raise ValueError(f"n={n}, m={m}: expected 1 <= n <= m")
    if d_in % m:
        raise ValueError(f"m={m}: it does not divide the {d_in} inputs")
    groups = kernel.reshape(-1, m, d_out)
    full = (groups != 0).sum(1)
    if full.max(initial=0) > n:
        raise ValueError(f"{(full > n).sum()} of {full.size} groups have more than {n} of {m} entries that are not 0")
    order = np.argsort(groups == 0, axis=1, kind="stable")[:, :n]  # those with a value, then zeros to make up n
    order = np.sort(order, axis=1)
    flags = np.zeros(groups.shape, bool)
    np.put_along_axis(flags, order, True, axis=1)
    values = np.take_along_axis(groups, order, axis=1).reshape(-1, d_out)
    bits = np.packbits(flags.reshape(d_in, d_out), axis=0, bitorder="little")
    return NMSparse(jnp.asarray(values), jnp.asarray(bits), n, m)


def pack_nm(model: nnx.Module, n: int = 2, m: int = 4, targets: paths.Patterns = "**.layers.**") -> nnx.Module:
    """A copy of ``model`` whose kernels at ``targets`` are stored without their zeros. The values stay bit by bit.

    The kernels were pruned to n of m before (:func:`jaxformers.compress.prune` with ``keep_n`` and ``m``). Saving and
    loading keeps the form; :func:`unpack_nm` goes back to what other tools read. Fine-tuning changes the values, and
    nothing can move a zero. Raises ValueError naming the layer whose kernel does not have the pattern, or is packed.
    """
    model, packed = surgery.copy(model), []
    for path, linear in surgery.find_linears(model, targets):
        kernel = linear.kernel.get_value()
        kernel = kernel.dense() if isinstance(kernel, Masked) and not is_typed(kernel.base) else kernel
        if is_typed(kernel):
            raise ValueError(f"targets: {path} holds a {type(kernel).__name__}, no plain kernel")
        try:
            linear.kernel.set_value(pack_kernel(kernel, n, m))
        except ValueError as error:
            raise ValueError(f"targets: {path}: {error}") from None
        packed.append(path)
    return surgery.record(settle_masks(model), _RECORD, targets=packed, n=n, m=m)


def unpack_nm(model: nnx.Module) -> nnx.Module:
    """A copy of ``model`` with plain arrays in place of :class:`NMSparse` kernels."""
    model = surgery.copy(model)
    for _, module in nnx.iter_modules(model):
        if isinstance(getattr(module, "kernel", None), nnx.Variable):
            kernel = module.kernel.get_value()
            if isinstance(kernel, NMSparse):
                module.kernel.set_value(kernel.dense())
    return surgery.forget(model, _RECORD)


def abstract_nm(model: nnx.Module, *, targets: list[str], n: int, m: int) -> nnx.Module:
    """``model`` with abstract N:M kernels at ``targets``, for a checkpoint to fill. Replayed by loading."""
    model = surgery.copy(model)
    if not (type(n) is int and type(m) is int and 1 <= n <= m):
        raise ValueError(f"config.json: n={n!r}, m={m!r} is no pattern; expected 1 <= n <= m")
    for _, linear in surgery.find_linears(model, targets):
        kernel = linear.kernel.get_value()
        d_in, d_out = kernel.shape
        values = jnp.zeros((d_in // m * n, d_out), kernel.dtype)
        linear.kernel.set_value(NMSparse(values, jnp.zeros((-(-d_in // 8), d_out), jnp.uint8), n, m))
    return surgery.record(model, _RECORD, targets=targets, n=n, m=m)
