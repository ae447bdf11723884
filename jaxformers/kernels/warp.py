"""What one thread of a warp does on an NVIDIA GPU, for kernels that say it themselves: loads, PTX, matrix units.

For use inside Pallas-Mosaic-GPU's ``inline_mgpu``. Kernels are functions of a :class:`Warp`, so that tests can run them
on another object with the same methods, which holds a NumPy array of all threads where this one holds a register.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax


class Number:
    """A 32-bit register, taken as an unsigned number by +, *, //, %, >>, & and <; the other side may be an int."""

    def __init__(self, value: Any):
        self.value = value

    def _with(self, name: str, other: Any) -> "Number":
        from jaxlib.mlir.dialects import arith

        return Number(getattr(arith, name)(self.value, _number(other).value))

    def __add__(self, other):
        return self._with("addi", other)

    def __mul__(self, other):
        return self._with("muli", other)

    def __floordiv__(self, other):
        return self._with("divui", other)

    def __mod__(self, other):
        return self._with("remui", other)

    def __rshift__(self, other):
        return self._with("shrui", other)

    def __and__(self, other):
        return self._with("andi", other)

    def __lt__(self, other):
        from jaxlib.mlir.dialects import arith

        return Number(arith.cmpi(arith.CmpIPredicate.ult, self.value, _number(other).value))

    __radd__, __rmul__ = __add__, __mul__


def _i32():
    from jaxlib.mlir import ir

    return ir.IntegerType.get_signless(32)


def _number(value: Any) -> Number:
    from jax.experimental.mosaic import gpu

    return value if isinstance(value, Number) else Number(gpu.c(value - (value >> 31 << 32), _i32()))


class Warp:
    """The thread that runs this, and all that it does beyond arithmetic on :class:`Number`.

    Floats are values of MLIR. ``where``: a condition, or None for always; what is not loaded is 0.
    """

    def __init__(self, half: str):
        """``half``: "bf16" or "f16", of which a register holds two."""
        from jaxlib.mlir.dialects import gpu

        self.half, x = half, gpu.Dimension.x
        self.program, self.thread = Number(_cast(gpu.block_id(x))), Number(_cast(gpu.thread_id(x)))
        self.lane, self.warp = self.thread % 32, self.thread // 32

    def _asm(self, outputs: list[str], text: str, inputs: list[tuple[str, Any]], memory: bool = True) -> list[Any]:
        """PTX; ``outputs`` and ``inputs`` with constraints r, f or l. What touches ``memory`` stays in this order."""
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        types = {"r": _i32(), "f": ir.F32Type.get()}
        results = [types[o] for o in outputs]
        whole = llvm.StructType.get_literal(results) if len(results) > 1 else results[0] if results else None
        constraints = ",".join([f"=&{o}" for o in outputs] + [kind for kind, _ in inputs])
        values = [v.value if isinstance(v, Number) else v for _, v in inputs]
        found = llvm.inline_asm(whole, values, text, constraints, has_side_effects=memory, asm_dialect=0)
        if len(results) < 2:
            found = [found] * len(results)
        else:
            found = [llvm.extractvalue(kind, found, [i]) for i, kind in enumerate(results)]
        return [Number(value) if o == "r" else value for o, value in zip(outputs, found, strict=True)]

    def address(self, ref: Any, at: Any) -> Any:
        """The byte address of element ``at`` of a reference, in 64 bits (global memory) or 32 (shared memory)."""
        from jax.experimental.mosaic import gpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm

        utils, kind = gpu.utils, ir.MemRefType(ref.type)
        shared = utils.is_smem_ref(ref)
        space = {"memory_space": 3} if shared and _takes_space(utils.memref_ptr) else {}
        whole = _i32() if shared else ir.IntegerType.get_signless(64)
        base = llvm.ptrtoint(whole, utils.memref_ptr(ref, **space))
        at = (_number(at) * (utils.bitwidth(kind.element_type) // 8)).value
        return arith.addi(base, at if shared else arith.extui(whole, at))

    def load(self, ref: Any, at: Any, where: Any = None, *, n: int = 4, once: bool = False) -> list[Number]:
        """``n`` registers from element ``at`` on, which lies at a multiple of them; ``once``: not kept in L1."""
        if where is False:
            return [_number(0)] * n
        out = [f"${i}" for i in range(n)]
        to, vector = ("{" + ", ".join(out) + "}", f".v{n}") if n > 1 else (out[0], "")
        load = f"ld.global{'.L1::no_allocate' if once else ''}{vector}.b32 {to}, [${n}];"
        inputs = [("l", self.address(ref, at))]
        if where is None or where is True:
            return self._asm(["r"] * n, load, inputs)
        clear = "".join(f"mov.b32 {o}, 0; " for o in out)
        text = f"setp.ne.u32 p, ${n + 1}, 0; {clear}@p {load}"
        return self._asm(["r"] * n, "{ .reg .pred p; " + text + " }", [*inputs, ("r", _flag(where))])

    def store(self, ref: Any, at: Any, value: Any, where: Any) -> None:
        """A float, rounded to a half, as element ``at``."""
        text = "{ .reg .pred p; .reg .b16 h; setp.ne.u32 p, $2, 0; cvt.rn.HALF.f32 h, $1; @p st.global.b16 [$0], h; }"
        inputs = [("l", self.address(ref, at)), ("f", value), ("r", _flag(where))]
        self._asm([], text.replace("HALF", self.half), inputs)

    def put(self, ref: Any, at: Any, value: Any) -> None:
        """A float to element ``at`` of shared memory."""
        self._asm([], "st.shared.f32 [$0], $1;", [("r", self.address(ref, at)), ("f", value)])

    def get(self, ref: Any, at: Any) -> Any:
        """The float at element ``at`` of shared memory."""
        return self._asm(["f"], "ld.shared.f32 $0, [$1];", [("r", self.address(ref, at))])[0]

    def barrier(self) -> None:
        """Wait for all threads of the program, and for what they put into shared memory."""
        self._asm([], "barrier.sync 0;", [])

    def ptx(self, body: str, args: list[Number]) -> Number:
        """What ``body`` leaves in $0, of registers $1, …; t and u are to its use, KIND is the type of two halves."""
        text = "{ .reg .b32 t, u; " + body.replace("KIND", self.half + "x2") + " }"
        return self._asm(["r"], text, [("r", a) for a in args], memory=False)[0]

    def mma(self, acc: list[Any], a: list[Number], b: list[Number]) -> list[Any]:
        """acc + A B by the matrix units, A (16, 16) and B (16, 8) halves, sums float32; parts as PTX hands them out."""
        name = f"mma.sync.aligned.m16n8k16.row.col.f32.{self.half}.{self.half}.f32"
        text = name + " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        inputs = [("r", r) for r in (*a, *b)] + [("f", c) for c in acc]
        return self._asm(["f"] * 4, text, inputs, memory=False)

    def zero(self) -> Any:
        from jax.experimental.mosaic import gpu
        from jaxlib.mlir import ir

        return gpu.c(0.0, ir.F32Type.get())

    def as_float(self, a: Number) -> Any:
        """The register's bits as a float."""
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        return arith.bitcast(ir.F32Type.get(), a.value)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a b + c of floats."""
        return self._asm(["f"], "fma.rn.f32 $0, $1, $2, $3;", [("f", v) for v in (a, b, c)], memory=False)[0]

    def add(self, a: Any, b: Any) -> Any:
        """a + b of floats."""
        from jaxlib.mlir.dialects import arith

        return arith.addf(a, b)

    def least(self, a: Any, b: int) -> Any:
        """The smaller of a number and a constant."""
        from jaxlib.mlir.dialects import arith

        return min(a, b) if isinstance(a, int) else Number(arith.minui(a.value, _number(b).value))

    def both(self, *conditions: Any) -> Any:
        """The conjunction of conditions, of which None and True say nothing."""
        if any(c is False for c in conditions):
            return False
        left = [c for c in conditions if c is not None and c is not True]
        return functools.reduce(lambda p, q: p & q, left) if left else None

    def loop(self, n: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
        """``carry = body(i, carry)`` for i below n; written out where that is short."""
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, scf

        if n <= 2:
            for i in range(n):
                carry = body(i, carry)
            return carry
        leaves, tree = jax.tree.flatten(carry)
        index = ir.IndexType.get()
        bounds = [arith.constant(index, b) for b in (0, n, 1)]
        loop = scf.ForOp(*bounds, [leaf.value if isinstance(leaf, Number) else leaf for leaf in leaves])
        wrap = lambda values: tree.unflatten(
            [Number(v) if isinstance(leaf, Number) else v for leaf, v in zip(leaves, values, strict=True)]
        )
        with ir.InsertionPoint(loop.body):
            found = body(Number(_cast(loop.induction_variable)), wrap(loop.inner_iter_args))
            scf.YieldOp([leaf.value if isinstance(leaf, Number) else leaf for leaf in jax.tree.leaves(found)])
        return wrap(loop.results)


def _cast(index: Any) -> Any:
    from jaxlib.mlir.dialects import arith

    return arith.index_cast(_i32(), index)


def _flag(condition: Any) -> Number:
    """A condition as 0 or 1 in a register."""
    from jaxlib.mlir.dialects import arith

    if condition is None or isinstance(condition, bool):
        return _number(int(condition is not False))
    return Number(arith.extui(_i32(), condition.value))


@functools.cache
def _takes_space(f: Callable) -> bool:
    """JAX before 0.11 wants to be told of shared memory."""
    import inspect

    return "memory_space" in inspect.signature(f).parameters
