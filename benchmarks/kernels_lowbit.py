"""Products with low-bit weights on a GPU: parity, a search over tiles, and times beside plain XLA and two floors.

    PYTHONPATH=. python benchmarks/kernels_lowbit.py --mode parity,sweep,table [--out FILE.md] [--jobs 4:1,3:16]

Needs jax alone. Weights lie in planes (jaxformers/kernels/planes_layout.py). A measurement is a chain x -> x W1 -> x W1
W2 … through enough different weights that none is still in the L2 cache when its turn comes again, repeated in one
compiled loop; the time is the median over several calls, divided by the products done. Nothing compiles while something
is timed. Everything is written as soon as it is known; a tile that does not compile costs its own line only.
"""

import argparse
import concurrent.futures
import dataclasses
import math
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

sys.path.insert(0, str(Path(__file__).resolve().parent))
import bare  # noqa: E402

layout, planes, gpu = bare.kernel("planes_layout"), bare.kernel("planes"), bare.kernel("planes_gpu")
few, lowbit = bare.kernel("planes_mosaic"), bare.kernel("lowbit")
Tile, Few = gpu.Tile, few.Tile

CACHE = 100e6  # bytes of weights in a chain: twice the L2 cache of an H100
BANDWIDTH, FLOPS = 3.35e12, 989e12  # H100 SXM: bytes and bfloat16 FLOPs a second
START = time.monotonic()
INTERPRET = jax.default_backend() == "cpu"  # to try the script itself; its times mean nothing then
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
DENSE = "dense, then XLA's dot"
WORDS = "GPTQ's words, dequantised by a kernel, then XLA's dot"
XLA = "XLA unpacks and multiplies"


class Log:
    def __init__(self, path: Path | None):
        self.path = path

    def __call__(self, text: str = "") -> None:
        print(text, flush=True)
        if self.path:
            with self.path.open("a") as file:
                file.write(text + "\n")


@dataclasses.dataclass(frozen=True)
class Kind:
    """Weights of `bits` (or "ternary") for k inputs and n outputs."""

    name: str
    k: int
    n: int
    group: int

    @property
    def bits(self) -> int:
        return 2 if self.name == "ternary" else int(self.name)

    @property
    def groups(self) -> int:
        return 1 if self.group == -1 else -(-self.k // self.group)

    def shape(self, m: int):
        group = self.k if self.groups == 1 else self.group
        plane = layout.plane_of(group, self.groups, self.bits)
        return layout.Shape(m, self.k, self.n, self.bits, group, self.groups, plane, self.name == "ternary")

    def draw(self, seed: int):
        """Random planes whose products keep the norm of x."""
        shape, keys = self.shape(1), jax.random.split(jax.random.key(seed), 3)
        cells = jax.lax.bitcast_convert_type(jax.random.bits(keys[0], shape.cells, jnp.uint16), jnp.int16)
        if shape.ternary:
            cells &= ~(cells & (cells >> 1) & 0x5555)  # no code is 3
        size = (1 / (self.k * (1.0 if shape.ternary else (4**self.bits - 1) / 6))) ** 0.5
        scales = (size * jax.random.uniform(keys[1], (self.groups, self.n), minval=0.9, maxval=1.1)).astype(F16)
        zeros = jax.random.randint(keys[2], scales.shape, 0, 2**self.bits)
        if shape.ternary:
            return layout.Planes(cells, layout.levels_of(scales, 0 * zeros), -scales.astype(F32))
        return layout.Planes(cells, layout.levels_of(scales, zeros))

    def words(self, seed: int):
        """(words, packed zeros, scales) as GPTQ has them."""
        keys = jax.random.split(jax.random.key(seed), 3)
        bits = lambda key, *size: jax.lax.bitcast_convert_type(jax.random.bits(key, size, jnp.uint32), jnp.int32)
        size = (1 / (self.k * (4**self.bits - 1) / 6)) ** 0.5
        scales = (size * jax.random.uniform(keys[1], (self.groups, self.n), minval=0.9, maxval=1.1)).astype(F16)
        return (
            bits(keys[0], self.k * self.bits // 32, self.n),
            bits(keys[2], self.groups, self.n * self.bits // 32),
            scales,
        )

    def product(self, m: int, how):
        """(x, weights) -> x times weights, by a tile, or by one of the other ways."""
        shape, options = self.shape(m), {"bits": self.bits, "group_size": self.group}
        if how in (WORDS, XLA):
            implementation = "gpu" if how == WORDS else "xla"
            return lambda x, w: lowbit.matmul(x, *w, **options, implementation=implementation, interpret=INTERPRET)
        if how == DENSE:
            contract = (((1,), (1,)), ((), ()))
            return lambda x, w: jax.lax.dot_general(x, gpu.dense(w, shape, x.dtype, interpret=INTERPRET), contract)
        if how is None:
            return lambda x, w: planes.matmul(x, w, **options, k=self.k)
        if isinstance(how, Few):
            return lambda x, w: few.matmul(x, w, shape, how)
        return lambda x, w: gpu.matmul(x, w, shape, how, INTERPRET)


def nbytes(arrays) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(arrays))


def compiled_chain(product, shapes: list, x: jax.Array, repeats: int):
    """Compile x -> product(x, w1) -> … through the operands of `shapes`, `repeats` times over."""

    product = jax.jit(product)  # lowered once, not once for every link of the chain

    def run(x, operands):
        def body(_, x):
            for w in operands:
                x, w = jax.lax.optimization_barrier((x, w))  # nothing may be computed once for all repeats
                x = product(x, *w)
            return x

        return jax.lax.fori_loop(0, repeats, body, x)

    begin = time.monotonic()
    done = jax.jit(run).lower(x, shapes).compile()
    return done, time.monotonic() - begin


def seconds_of(done, x, operands, products: int, calls: int = 5) -> float:
    jax.block_until_ready(done(x, operands))
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        jax.block_until_ready(done(x, operands))
        times.append(time.perf_counter() - begin)
    return float(np.median(times)) / products


class Case:
    """One product (kind of weight, m, size): compiled through so many weights that the cache does not help."""

    drawn: dict = {}

    def __init__(self, name: str, m: int, size: int, group: int, how):
        self.kind, self.m, self.how = Kind(name, size, size, group), m, how
        self.draw = self.kind.words if how in (WORDS, XLA) else self.kind.draw
        one = jax.eval_shape(self.draw, 0)
        self.copies = max(4, math.ceil(CACHE / nbytes(one)))
        slow = m > 64 or how in (WORDS, XLA, DENSE)
        self.repeats = 1 if INTERPRET else max(2, (400 if slow else 2000) // self.copies)
        self.bytes, self.x = nbytes(one), jax.ShapeDtypeStruct((m, size), BF16)

    def compile(self):
        one = jax.eval_shape(self.draw, 0)
        return compiled_chain(self.kind.product(self.m, self.how), [(one,)] * self.copies, self.x, self.repeats)

    def seconds(self, done) -> float:
        key = (self.kind, self.how in (WORDS, XLA))
        if key not in self.drawn:
            self.drawn[key] = [(self.draw(seed),) for seed in range(self.copies)]
        x = jax.random.normal(jax.random.key(1), self.x.shape, BF16)
        return seconds_of(done, x, self.drawn[key], self.repeats * self.copies)


def dense_seconds(m: int, k: int) -> float:
    operands = [(jax.random.normal(jax.random.key(i), (k, k), BF16) * k**-0.5,) for i in range(4)]
    x = jax.random.normal(jax.random.key(9), (m, k), BF16)
    repeats = 1 if INTERPRET else 300 if m <= 64 else 100
    done, _ = compiled_chain(lambda x, w: x @ w, operands, x, repeats)
    return seconds_of(done, x, operands, 4 * repeats)


def parity(log: Log) -> None:
    """Every kernel, kind of weight and dtype against the definition in float64, on this device."""
    names = ("2", "3", "4", "8", "ternary")
    tiles = {
        "few rows": Few(),
        "few rows, one block": Few(1, 4),
        "two warps, splits": Tile(64, 16, splits=2, warps=2, stages=3),
        "four warps": Tile(64, 64, stages=3),
    }
    cases = [
        (n, how, dtype, m, 1056, 72, 32)
        for n in names
        for how, dtype, m in (("two warps, splits", F16, 20), ("four warps", BF16, 70))
    ]
    cases += [("8", "four warps", BF16, 130, 1024, 192, 128), ("4", "few rows", F16, 5, 544, 40, -1)]
    rows = {BF16: (1, 3, 16), F16: (8, 20)}
    cases += [(n, "few rows", dtype, m, 1056, 72, 32) for n in names for dtype in rows for m in rows[dtype]]
    cases += [(n, "few rows, one block", BF16, 1, 4096, 1000, 128) for n in names]
    cases += [(n, "dense", dtype, 1, 1056, 72, 32) for n in names for dtype in (BF16, F16, F32)]

    def one(case):
        name, how, dtype, m, k, n, group = case
        kind = Kind(name, k, n, group)
        w, shape = kind.draw(3), kind.shape(m)
        full = np.asarray(planes.dense(w, shape, F32), np.float64)
        if how == "dense":
            found, expected = jax.jit(lambda w: gpu.dense(w, shape, dtype, interpret=INTERPRET))(w), full.T
        else:
            x = jnp.asarray(np.random.default_rng(1).standard_normal((m, k)), dtype)
            found, expected = jax.jit(kind.product(m, tiles[how]))(x, w), np.asarray(x, np.float64) @ full
        return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()

    bounds = {"bfloat16": 8e-3, "float16": 1.5e-3, "float32": 1e-6}
    worst, failed = {}, 0
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        futures = {pool.submit(one, case): case for case in cases}
        for future, case in futures.items():
            how, dtype = case[1], jnp.dtype(case[2]).name
            try:
                error = future.result(timeout=60)
                worst[how, dtype] = max(worst.get((how, dtype), 0), error)
                if error <= bounds[dtype]:
                    continue
                reason = f"error {error:.1e}"
            except Exception as e:
                reason = f"{type(e).__name__}: {str(e)[:300]!r}"
            failed += 1
            log(f"PARITY FAILED {case}: {reason}")
    log(f"parity: {len(cases)} cases, {failed} failed, {time.monotonic() - START:.0f} s; errors by the largest output:")
    log("; ".join(f"{how} {dtype} {error:.1e}" for (how, dtype), error in sorted(worst.items())) + "\n")


def chosen(shape):
    """What `planes.matmul` takes for bfloat16."""
    return few.tile_for(shape) if few.takes(shape, BF16) else gpu.tile_for(shape, BF16) or DENSE


def candidates(name: str, m: int) -> list:
    """Tiles to try, the chosen one first."""
    found = [chosen(Kind(name, 4096, 4096, 128).shape(m))]
    if m <= 32:
        found += [Few(b, w, early) for b, w in ((1, 4), (1, 8), (2, 8), (2, 16)) for early in (False, True)]
        found += [Tile(64, 16 if m <= 16 else 32, splits=s, warps=2, stages=3) for s in (4, 8)]
    else:
        found += [Tile(64, 64, splits=s, stages=3) for s in (1, 2, 4)]
        found += [Tile(128, 64, splits=s, stages=3) for s in (1, 2)] + [Tile(128, 64, warps=8), DENSE]
    return list(dict.fromkeys(found))


def show(how) -> str:
    if isinstance(how, Few):
        return f"few rows, `{how!r}`"
    if not isinstance(how, Tile):
        return how
    default = Tile(0, 0)
    names = [f.name for f in dataclasses.fields(how)]
    return f"`Tile({', '.join(f'{f}={getattr(how, f)}' for f in names if getattr(how, f) != getattr(default, f))})`"


def compile_all(cases: list, seconds: float, log: Log) -> dict:
    pool = concurrent.futures.ThreadPoolExecutor(16)
    futures = {pool.submit(case.compile): case for case in cases}
    concurrent.futures.wait(futures, timeout=seconds)
    pool.shutdown(wait=True, cancel_futures=True)  # a compiler that still ran would disturb the measurements
    found = {}
    for future, case in futures.items():
        try:
            found[case] = future.result(timeout=0)
        except Exception as e:
            log(f"    failed: {case.kind.name}, m={case.m}, {show(case.how)}: {type(e).__name__} {str(e)[:160]!r}")
    log(f"{len(found)} of {len(cases)} programs compiled, {time.monotonic() - START:.0f} s")
    return found


def row(case: Case, seconds: float, how: str, dot: float) -> str:
    us = lambda s: f"{1e6 * s:.2f}"
    moved, flops = case.bytes + 2 * case.m * (case.kind.k + case.kind.n), 2 * case.m * case.kind.k * case.kind.n
    cells = (case.kind.name, case.m, case.kind.k, us(seconds), us(dot), f"{dot / seconds:.2f}")
    return f"| {' | '.join(map(str, cells))} | {us(moved / BANDWIDTH)} | {us(flops / FLOPS)} | {how} |"


def measure(jobs: list, ways, group: int, log: Log, left) -> None:
    """Compile every way of every job (kind, m, size) side by side, then time one after the other beside XLA's dot."""
    cases = [Case(*job, group, how) for job in jobs for how in ways(*job)]
    done = compile_all(cases, 0.6 * left(), log)
    time.sleep(1)
    dots = {key: dense_seconds(*key) for key in dict.fromkeys((m, size) for _, m, size in jobs)}
    log("\n| bits | m | k = n | µs | bfloat16 dot, µs | dot / ours | floor: bytes, µs | floor: FLOPs, µs | how |")
    log("|---|---|---|---|---|---|---|---|---|")
    for case, (program, compiling) in done.items():
        if left() < 5:
            log(f"no time left for {case.kind.name}, m={case.m}, {show(case.how)}")
            continue
        how = case.how
        if how is None:
            how = f"chosen: {show(chosen(case.kind.shape(case.m)))}"
        seconds = case.seconds(program)
        log(row(case, seconds, f"{show(how)}, compiled in {compiling:.0f} s", dots[case.m, case.kind.k]))


def launch_floor(k: int) -> float:
    """Seconds that a kernel takes in such a chain when it only copies one row."""
    from jax.experimental import pallas as pl

    def copy(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    x = jnp.ones((1, k), jnp.bfloat16)
    call = pl.pallas_call(copy, out_shape=x, interpret=INTERPRET, compiler_params=plgpu.CompilerParams(num_warps=4))
    operands = [(jnp.zeros(1),)] * 14
    done, _ = compiled_chain(lambda x, _: call(x), operands, x, 150)
    return seconds_of(done, x, operands, 14 * 150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--mode", default="parity,table", help="of parity, sweep, table")
    parser.add_argument("--jobs", default="4:1,4:4,4:16,4:64,4:256,3:1,3:16,2:1,8:1,ternary:1", help="bits:rows, …")
    parser.add_argument("--sizes", default="4096")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=150, help="stop to begin anything new after so long")
    args = parser.parse_args()
    log = Log(args.out)
    left = lambda: args.seconds - (time.monotonic() - START)
    device = jax.devices()[0]
    log(f"# {device.device_kind}, {device.platform}, jax {jax.__version__}; {time.strftime('%Y-%m-%d %H:%M')} UTC\n")
    pairs = [job.split(":") for job in args.jobs.split(",")]
    jobs = [(kind, int(m), int(size)) for size in args.sizes.split(",") for kind, m in pairs]
    if "parity" in args.mode:
        parity(log)
    if "table" in args.mode:
        log(f"a kernel that does nothing takes {1e6 * launch_floor(4096):.2f} µs")
        others = lambda kind, m: [WORDS, XLA] if kind == "4" and m in (1, 256) else []
        measure(jobs, lambda kind, m, size: [None, *(others(kind, m) if size == 4096 else [])], args.group, log, left)
    if "sweep" in args.mode:
        measure(jobs, lambda kind, m, size: candidates(kind, m), args.group, log, left)
    log(f"\n{time.monotonic() - START:.0f} s in all")
    os._exit(0)  # whatever is still being compiled is not waited for


if __name__ == "__main__":
    main()
