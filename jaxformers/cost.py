"""What a function costs: multiply-adds, FLOPs and bytes from its trace, and seconds from a clock.

    apply, params = jf.functional(model)
    print(jf.cost(apply, params, batch))            # nothing runs; shapes (jax.eval_shape) will do
    print(jf.latency(apply, params, batch))         # compiled, warmed up, blocked, the median of some calls

MACs are counted as fvcore and timm do, whose "GFLOPs" they are: one for each multiply-add of matrix products and
convolutions, nothing else (DeiT-S at 224²: 4.6 G).
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxformers import paths, weights

CONVENTIONS = ("products", "all")

# Operations that read their operands from memory and write their results to it; the others are fused with them.
_BARRIERS = {
    "dot_general", "ragged_dot_general", "conv_general_dilated", "pallas_call", "gather", "scatter",
    "scatter-add", "scatter_add", "scatter_mul", "scatter_min", "scatter_max", "scatter_sub", "dynamic_slice",
    "dynamic_update_slice", "sort", "top_k", "approx_top_k", "fft", "cholesky", "eigh", "svd", "qr", "lu",
    "triangular_solve",
}  # fmt: skip
_PARTIAL = {"gather", "dynamic_slice"}  # read as much of their first operand as they return
_MOVES = {
    "broadcast_in_dim", "concatenate", "convert_element_type", "bitcast_convert_type", "copy", "copy_p", "expand_dims",
    "iota", "pad", "reshape", "rev", "select_n", "slice", "squeeze", "stop_gradient", "transpose", "split",
    "optimization_barrier", "sharding_constraint", "device_put", "name", "random_bits", "random_wrap", "random_unwrap",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one call costs, on all devices together.

    ``macs``: multiply-adds of matrix products and convolutions. ``flops``: by the convention asked for. ``parameters``:
    the weights that the first argument stands for. ``parameter_bytes``: as stored, of packed ones their words and
    scales. ``read_bytes`` and ``written_bytes``: memory traffic if everything elementwise is fused, see :func:`cost`.
    """

    macs: float
    flops: float
    parameters: int
    parameter_bytes: int
    read_bytes: float
    written_bytes: float

    def __str__(self) -> str:
        return (
            f"{self.macs / 1e9:,.4g} GMACs, {self.flops / 1e9:,.4g} GFLOPs, {self.parameters:,} parameters in "
            f"{self.parameter_bytes:,} bytes, {self.read_bytes / 1e6:,.4g} MB read, {self.written_bytes / 1e6:,.4g} MB "
            "written"
        )


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds of each timed call (``times``) with ``batch`` rows, and of tracing and compiling before the first."""

    times: tuple[float, ...]
    batch: int
    compile_seconds: float

    @property
    def seconds(self) -> float:
        """The median of a call."""
        return statistics.median(self.times)

    @property
    def throughput(self) -> float:
        """Rows a second at this batch."""
        return self.batch / self.seconds

    def __str__(self) -> str:
        return (
            f"{1e3 * self.seconds:,.4g} ms a call (median of {len(self.times)}, {1e3 * min(self.times):,.4g} to "
            f"{1e3 * max(self.times):,.4g}) of {self.batch} rows, {self.throughput:,.4g} rows/s, compiled in "
            f"{self.compile_seconds:.3g} s"
        )


def cost(fn: Callable, params: Any, *args: Any, convention: str = "products") -> Cost:
    """The cost of ``fn(params, *args)``, from its trace; nothing is compiled or run, and shapes do for arrays.

    ``convention``: what counts as FLOPs. "products": two for each multiply-add of matrix products and convolutions
    (``macs`` is then what fvcore and timm report). "all": also one for each element of a floating-point result of
    elementwise arithmetic, and one for each element that a reduction takes in.

    ``read_bytes`` and ``written_bytes`` are what would go through memory if all elementwise operations were fused with
    the products, convolutions, gathers, scatters and sorts around them: each of these reads its operands (a gather as
    much as it returns) and writes its result; arrays among the arguments, typed weights above all, are read once, as
    stored. Compilers may keep more in caches, and may write more out.

    Scans count times their length, the bodies of a ``while`` once, of a ``cond`` its dearest branch, Pallas kernels as
    much as their cost estimate says. Raises ValueError for an unknown convention.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: expected one of {', '.join(CONVENTIONS)}, got {convention!r}")
    tally = count(jax.make_jaxpr(fn)(params, *args))
    leaves = jax.tree.leaves(params, is_leaf=weights.is_typed)
    return Cost(
        macs=tally.macs,
        flops=2 * tally.macs + (tally.elementwise if convention == "all" else 0),
        parameters=sum(paths.count(leaf) for leaf in leaves),
        parameter_bytes=sum(_bytes(array) for array in jax.tree.leaves(params)),
        read_bytes=tally.read,
        written_bytes=tally.written,
    )


def count_flops(jaxpr: Any) -> float:
    """Two FLOPs for each multiply-add of the matrix products and convolutions in a (closed) jaxpr; see :func:`cost`."""
    return 2 * count(jaxpr).macs


def latency(fn: Callable, *args: Any, batch: int | None = None, repeats: int = 10, warmup: int = 2) -> Latency:
    """Time ``fn(*args)``: compiled once, ``warmup`` calls, then ``repeats`` calls, each until its result is there.

    ``fn`` may be jitted already; its arguments are put on the device before. ``batch``: rows a call, by default the
    leading axis that the arrays of the last argument share. With the compilation cache on, a program that is in it
    costs little to compile. Raises ValueError when ``repeats`` < 1, ``warmup`` < 0, or the batch is not clear.
    """
    return latencies({"": (fn, *args)}, batch=batch, repeats=repeats, warmup=warmup)[""]


def latencies(
    programs: Mapping[str, tuple[Any, ...]], *, batch: int | None = None, repeats: int = 10, warmup: int = 2
) -> dict[str, Latency]:
    """:func:`latency` of several programs, ``{name: (fn, *args)}``, whose calls take turns: what else the machine does
    meanwhile slows all of them alike."""
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats, warmup: expected at least 1 and 0, got {repeats} and {warmup}")
    rows = {name: _rows(args[-1:]) if batch is None else batch for name, (_, *args) in programs.items()}
    calls, compiling = {}, {}
    for name, (fn, *args) in programs.items():
        args = jax.block_until_ready(jax.device_put(args))
        began = time.perf_counter()
        program = (fn if hasattr(fn, "lower") else jax.jit(fn)).lower(*args).compile()
        compiling[name] = time.perf_counter() - began
        calls[name] = lambda program=program, args=args: jax.block_until_ready(program(*args))
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(warmup):
        for call in calls.values():
            call()
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: Latency(tuple(times[name]), rows[name], compiling[name]) for name in programs}


def _rows(tree: Any) -> int:
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError("batch: the arrays of the last argument share no leading axis; say how many rows a call has")
    return sizes.pop()[0]


# ---- counting --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tally:
    """Multiply-adds of products, operations on single elements, bytes read and written."""

    macs: float = 0.0
    elementwise: float = 0.0
    read: float = 0.0
    written: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Value:
    """Where a value comes from: ``made`` by an operation that writes to memory (perhaps with elementwise ones since),
    and the arguments of the function that elementwise operations have brought in."""

    made: bool = False
    arguments: frozenset[int] = frozenset()


def count(jaxpr: Any) -> Tally:
    """The tally of a (closed) jaxpr; see :func:`cost`."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    tally, read = Tally(), set()
    results = _visit(jaxpr, [_Value(arguments=frozenset({i})) for i in range(len(jaxpr.invars))], 1, tally, read)
    for value in results:
        read |= value.arguments
    tally.read += sum(_bytes(jaxpr.invars[i].aval) for i in read)
    written = {v for eqn in jaxpr.eqns if eqn.primitive.name in _BARRIERS for v in eqn.outvars}
    tally.written += sum(_bytes(v.aval) for v in jaxpr.outvars if not hasattr(v, "val") and v not in written)
    return tally


def _visit(jaxpr: Any, values: list[_Value], times: float, tally: Tally, read: set[int]) -> list[_Value]:
    """Add to ``tally`` and ``read`` what ``times`` runs of ``jaxpr`` on ``values`` cost; returns its results."""
    known = dict(zip(jaxpr.invars, values, strict=True))
    look = lambda v: known.get(v, _Value()) if not hasattr(v, "val") else _Value()  # a literal, or a constant
    for eqn in jaxpr.eqns:
        name, inputs = eqn.primitive.name, [look(v) for v in eqn.invars]
        if name in _BARRIERS:
            tally.macs += times * _macs(eqn)
            tally.read += times * _reads(name, eqn, inputs, read)
            tally.written += times * sum(_bytes(v.aval) for v in eqn.outvars)
            results = [_Value(made=True)] * len(eqn.outvars)
        elif name == "cond":
            results = _dearest(eqn.params["branches"], inputs[1:], times, tally, read)
        elif inner := _inner(eqn):
            looped = name in ("scan", "while")
            runs = times * (eqn.params["length"] if name == "scan" else 1)
            results = []
            for body in inner:
                results = _visit(body, _arguments(eqn, body, inputs), runs, tally, read)
            if looped or len(results) != len(eqn.outvars):
                results = [_Value(made=True)] * len(eqn.outvars)
        else:
            tally.elementwise += times * _operations(name, eqn)
            merged = frozenset().union(*(value.arguments for value in inputs))
            results = [_Value(any(value.made for value in inputs), merged)] * len(eqn.outvars)
        known.update(zip(eqn.outvars, results, strict=True))
    return [look(v) for v in jaxpr.outvars]


def _inner(eqn: Any) -> list[Any]:
    """The jaxprs that an equation runs."""
    found = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
    return [value for value in found if hasattr(value, "eqns")]


def _arguments(eqn: Any, body: Any, inputs: list[_Value]) -> list[_Value]:
    """What a body's arguments are: those of the equation, but for the carry of a loop, which it has made itself."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        first, carry = _constants_and_carry(params)
        return [*inputs[:first], *[_Value(made=True)] * carry, *inputs[first + carry :]]
    if name == "while":
        skipped, own = params["cond_nconsts"], params["body_nconsts"]
        constants = inputs[skipped : skipped + own] if body is params["body_jaxpr"].jaxpr else inputs[:skipped]
        return [*constants, *[_Value(made=True)] * (len(body.invars) - len(constants))]
    return inputs if len(inputs) == len(body.invars) else [_Value(made=True)] * len(body.invars)


def _constants_and_carry(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many of a scan's arguments are constants of its body, and how many its carry."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()  # since jax 0.12
    return len(constants), len(carry)


def _dearest(branches: Any, inputs: list[_Value], times: float, tally: Tally, read: set[int]) -> list[_Value]:
    runs = []
    for branch in branches:
        own, seen = Tally(), set()
        results = _visit(branch.jaxpr, inputs, times, own, seen)
        runs.append((own.macs, own.elementwise, len(runs), own, seen, results))
    _, _, _, own, seen, results = max(runs, key=lambda run: run[:3])
    for field in dataclasses.fields(Tally):
        setattr(tally, field.name, getattr(tally, field.name) + getattr(own, field.name))
    read |= seen
    return results


def _macs(eqn: Any) -> float:
    name, params, out = eqn.primitive.name, eqn.params, eqn.outvars[0].aval
    if name in ("dot_general", "ragged_dot_general"):
        ragged = params.get("ragged_dot_dimension_numbers")
        dims = params["dimension_numbers"] if ragged is None else ragged.dot_dimension_numbers
        depth = math.prod(eqn.invars[0].aval.shape[d] for d in dims[0][0])
        # summed over rows in groups (the gradient of a mixture's matrices), each row goes into one group's result only
        summed = ragged is not None and ragged.lhs_ragged_dimensions[0] in dims[0][0]
        return float(math.prod(out.shape)) * depth / (out.shape[0] if summed else 1)
    if name == "conv_general_dilated":
        kernel, numbers = eqn.invars[1].aval.shape, params["dimension_numbers"]
        return float(math.prod(out.shape)) * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
    if name == "pallas_call":
        return (getattr(params.get("cost_estimate"), "flops", 0) or 0) / 2
    return 0.0


def _reads(name: str, eqn: Any, inputs: list[_Value], read: set[int]) -> float:
    """Bytes of what an operation reads that other operations have written; arguments go to ``read``."""
    total = 0.0
    for i, (value, v) in enumerate(zip(inputs, eqn.invars, strict=True)):
        if name in _PARTIAL and i == 0:
            total += sum(_bytes(out.aval) for out in eqn.outvars)
            continue
        read |= value.arguments
        total += _bytes(v.aval) if value.made else 0
    return total


def _operations(name: str, eqn: Any) -> float:
    """Floating-point operations of an elementwise operation or a reduction."""
    if name in _MOVES or not eqn.outvars or not _floating(v.aval for v in (*eqn.outvars, *eqn.invars)):
        return 0.0
    reduces = name.startswith(("reduce_", "arg", "cum"))
    return float(math.prod((eqn.invars if reduces else eqn.outvars)[0].aval.shape))


def _floating(avals: Iterable[Any]) -> bool:
    return any(jax.dtypes.issubdtype(getattr(a, "dtype", np.int32), np.inexact) for a in avals)


def _bytes(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize if hasattr(array, "dtype") else 0
