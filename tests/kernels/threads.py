"""Kernels written for one thread (:class:`jaxformers.kernels.warp.Warp`), run with NumPy on all threads at a time.

A register is an array (programs, warps, 32) of uint32, held as int64, a float one of float32.
"""

import re

import jax.numpy as jnp
import numpy as np

PTX = {
    "mov.b32": lambda a, b: a,
    "shr.u32": np.right_shift,
    "shl.b32": np.left_shift,
    "and.b32": np.bitwise_and,
    "mul.lo.u32": np.multiply,
}


def run_ptx(asm, registers, dtype):
    """What the few instructions in use leave in $0; registers are uint32 arrays of two 16-bit lanes each."""
    lanes = lambda v: np.asarray(v, np.uint32)[..., None].view(np.uint16).view(dtype)
    values = {f"${i + 1}": np.asarray(r, np.uint32) for i, r in enumerate(registers)}
    read = lambda name: values[name] if name in values else np.uint32(int(name, 0))
    body = re.sub(r"\.reg \.b32 [a-z, ]+;|[{}]", "", asm)
    for line in filter(None, (part.strip() for part in body.split(";"))):
        name, rest = line.split(" ", 1)
        to, *sources = (part.strip() for part in rest.split(","))
        a, b = (read(source) for source in (*sources, "0")[:2])
        if name.startswith(("sub.rn", "add.rn")):
            sign = -1 if name.startswith("sub") else 1
            exact = lanes(a).astype(np.float64) + sign * lanes(b).astype(np.float64)
            values[to] = exact.astype(dtype).view(np.uint16).view(np.uint32)[..., 0]
        elif name == "lop3.b32":
            assert int(sources[3], 0) == 0xEA  # (a and b) or c
            values[to] = (a & b) | read(sources[2])
        else:
            values[to] = PTX[name](a, b) + 0 * values["$1"]
    return values["$0"]


class Threads:
    """All threads of ``programs`` of ``warps``; memory is NumPy arrays, shared memory one with a row for each program.

    Loads are checked to lie inside their arrays, and at whole registers; a thread that must not store does not.
    """

    def __init__(self, half, programs, warps):
        self.half, self.dtype = half, jnp.dtype("bfloat16" if half == "bf16" else "float16")
        self.shape = (programs, warps, 32)
        self.program, self.warp, self.lane = (a.astype(np.int64) for a in np.indices(self.shape))
        self.thread = self.warp * 32 + self.lane
        self.unseen = []

    def whole(self, a, dtype=np.int64):
        return np.broadcast_to(np.asarray(a, dtype), self.shape)

    def where(self, condition):
        return self.whole(True if condition is None else condition, bool)

    def load(self, ref, at, where=None, *, n=4, once=False):
        flat, size = np.asarray(ref).reshape(-1), ref.dtype.itemsize
        at, where = self.whole(at), self.where(where)
        each = 4 // size * n
        assert (at[where] >= 0).all() and (at[where] + each <= flat.size).all() and (at[where] % each == 0).all()
        elements = flat[np.where(where, at, 0)[..., None] + np.arange(each)]
        registers = np.ascontiguousarray(elements).view(np.uint32).astype(np.int64)
        return [np.where(where, registers[..., i], 0) for i in range(n)]

    def store(self, ref, at, value, where):
        where = self.where(where)
        ref.reshape(-1)[self.whole(at)[where]] = value[where].astype(self.dtype)

    def put(self, ref, at, value):
        self.unseen.append((ref, at, value))

    def get(self, ref, at):
        return ref[self.program, self.whole(at)]

    def barrier(self):
        """Only now does anybody see what was put."""
        for ref, at, value in self.unseen:
            ref[self.program, self.whole(at)] = value
        self.unseen = []

    def ptx(self, body, args):
        return run_ptx(body, [self.whole(a) for a in args], self.dtype).astype(np.int64)

    def mma(self, acc, a, b):
        def pairs(register):  # (…, 8, 4, 2): rows (or columns) of four threads, two halves each
            raw = np.ascontiguousarray(self.whole(register).astype(np.uint32))[..., None]
            return raw.view(np.uint16).view(self.dtype).astype(np.float32).reshape(*self.shape[:2], 8, 4, 2)

        flat = lambda x: x.reshape(*x.shape[:3], 8)
        left = np.concatenate([np.concatenate([flat(pairs(a[i])), flat(pairs(a[i + 2]))], -1) for i in (0, 1)], -2)
        right = np.concatenate([flat(pairs(r)) for r in b], -1)  # (…, 8 columns, 16)
        out = (left @ right.swapaxes(-1, -2)).reshape(*self.shape[:2], 2, 8, 4, 2)  # row half, row, thread, column
        found = [out[..., e // 2, :, :, e % 2].reshape(self.shape) for e in range(4)]
        return [c + f for c, f in zip(acc, found, strict=True)]

    def zero(self):
        return np.zeros(self.shape, np.float32)

    def as_float(self, a):
        return np.ascontiguousarray(self.whole(a).astype(np.uint32)).view(np.float32)

    def fma(self, a, b, c):
        return a * b + c

    def add(self, a, b):
        return a + b

    def least(self, a, b):
        return np.minimum(a, b)

    def both(self, *conditions):
        return np.logical_and.reduce([self.where(c) for c in conditions])

    def loop(self, n, body, carry):
        for i in range(n):
            carry = body(i if n <= 2 else self.whole(i), carry)
        return carry
