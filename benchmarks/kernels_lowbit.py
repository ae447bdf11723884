"""Packed low-bit products on a GPU: parity, a search over tiles, and times beside plain XLA and two floors.

    PYTHONPATH=. python benchmarks/kernels_lowbit.py --mode parity|sweep|table --out FILE.md [--jobs 4:1,3:16]

Needs jax alone. A measurement is a chain x -> x W1 -> x W1 W2 … through enough different weights that none is still in
the L2 cache when its turn comes again, repeated in one compiled loop; the time is the median over several calls, less
that of an empty loop, divided by the products done. Everything is written as soon as it is known; a tile that does not
compile costs its own line only.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import math
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import bare  # noqa: E402

gpu = bare.kernel("lowbit_gpu")
lowbit = bare.kernel("lowbit")
Shape = bare.kernel("shape").Shape
per_word = bare.kernel("codes").PER_WORD
words_of = bare.kernel("codes").WORDS

CACHE = 120e6  # bytes of weights in a chain: more than twice the L2 cache of an H100
BANDWIDTH, FLOPS = 3.35e12, 989e12  # H100 SXM: bytes and bfloat16 FLOPs a second
START = time.monotonic()
INTERPRET = jax.default_backend() == "cpu"  # to try the script itself; its times mean nothing then


class Log:
    def __init__(self, path: Path | None):
        self.path = path

    def __call__(self, text: str = "") -> None:
        print(text, flush=True)
        if self.path:
            with self.path.open("a") as file:
                file.write(text + "\n")


def weights(kind: str, k: int, n: int, group: int, seed: int) -> tuple[jax.Array, ...]:
    """(words, scales, zeros or negative levels) of random weights whose products keep the norm of x."""
    ternary, bits = kind == "ternary", 2 if kind == "ternary" else int(kind)
    groups = 1 if group == -1 else -(-k // group)
    keys = jax.random.split(jax.random.key(seed), 3)
    rows = -(-k // per_word[bits]) * words_of[bits]
    words = jax.lax.bitcast_convert_type(jax.random.bits(keys[0], (rows, n), jnp.uint32), jnp.int32)
    if ternary:
        words &= ~(words & (words >> 1) & 0x55555555)  # no code is 3
    width = -(-n // 32) * 3 if bits == 3 else -(-n * bits // 32)
    zeros = jax.lax.bitcast_convert_type(jax.random.bits(keys[1], (groups, width), jnp.uint32), jnp.int32)
    size = (1 / (k * (1.0 if ternary else (4**bits - 1) / 6))) ** 0.5
    scales = (size * jax.random.uniform(keys[2], (groups, n), minval=0.9, maxval=1.1)).astype(jnp.float16)
    return words, scales, -scales if ternary else zeros


def shape_of(kind: str, m: int, k: int, n: int, group: int, act_order: bool = False) -> Shape:
    groups = 1 if group == -1 else -(-k // group)
    bits = 2 if kind == "ternary" else int(kind)
    return Shape(m, k, n, bits, k if group == -1 else group, groups, kind == "ternary", act_order)


def dense(kind: str, w: tuple[jax.Array, ...], k: int, group: int, dtype, g_idx=None) -> jax.Array:
    words, scales, zeros = w
    if kind == "ternary":
        return lowbit.ternary_dequantise(words, scales, zeros, g_idx, group_size=group, dtype=dtype)[:k]
    return lowbit.dequantise(words, zeros, scales, g_idx, bits=int(kind), group_size=group, dtype=dtype)


def nbytes(arrays) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)


def compiled_chain(product, shapes: list, x: jax.Array, repeats: int):
    """Compile x -> product(x, w1) -> … through the operands of `shapes`, `repeats` times over."""

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


def product_by(tile, shape: Shape):
    """(x, words, scales, zeros, g_idx) -> product, by a kernel with `tile`, or by ("dequantise", tile) and a dot."""
    if not isinstance(tile, tuple):
        return lambda x, *w: gpu.matmul(x, *w, shape, tile, interpret=INTERPRET)

    def product(x, *w):
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return jnp.dot(x, gpu.dequantise(*w, shape, x.dtype, tile[1], interpret=INTERPRET), precision=precision)

    return product


class Case:
    """One product (kind of weight, m, k = n): its operands, so many that the cache does not help."""

    def __init__(self, kind: str, m: int, k: int, group: int):
        self.kind, self.m, self.k, self.group = kind, m, k, group
        one = weights(kind, k, k, group, 0)
        copies = max(4, math.ceil(CACHE / nbytes(one)))
        self.operands = [one] + [weights(kind, k, k, group, seed) for seed in range(1, copies)]
        self.x = jax.random.normal(jax.random.key(1), (m, k), jnp.bfloat16)
        self.repeats = max(4, math.ceil(2000 / copies) if m <= 64 else math.ceil(600 / copies))
        self.shape = shape_of(kind, m, k, k, group)

    def compile(self, tile):
        product = product_by(tile, self.shape)
        return compiled_chain(lambda x, *w: product(x, *w, None), self.operands, self.x, self.repeats)

    def compile_chosen(self):
        def product(x, words, scales, zeros):
            if self.kind == "ternary":
                return lowbit.ternary_matmul(x, words, scales, zeros, group_size=self.group)
            return lowbit.matmul(x, words, zeros, scales, bits=int(self.kind), group_size=self.group)

        return compiled_chain(product, self.operands, self.x, self.repeats)

    def compile_dequantised(self):
        product = lambda x, *w: x @ dense(self.kind, w, self.k, self.group, x.dtype)
        return compiled_chain(product, self.operands, self.x, self.repeats)

    def measure(self, done) -> float:
        return seconds_of(done, self.x, self.operands, self.repeats * len(self.operands))


def dense_seconds(m: int, k: int) -> float:
    operands = [(jax.random.normal(jax.random.key(i), (k, k), jnp.bfloat16) * k**-0.5,) for i in range(4)]
    x = jax.random.normal(jax.random.key(9), (m, k), jnp.bfloat16)
    repeats = 300 if m <= 64 else 100
    done, _ = compiled_chain(lambda x, w: x @ w, operands, x, repeats)
    return seconds_of(done, x, operands, 4 * repeats)


def parity(log: Log) -> None:
    """Every kernel, kind of weight, dtype and way of scaling against the definition in float64, on this device."""
    T = gpu.Tile
    tiles = {
        "vector": T(m=1, n=32, words=64, vector=True),
        "vector, split": T(m=2, n=32, splits=2, vector=True, x_load="split"),
        "tensor": T(n=32, warps=2, splits=2, x_load="split"),
        "tensor, strided": T(n=64),
        "tensor, word": T(n=32, scaling="word", x_load="permuted"),
        "dequantise": ("dequantise", T(n=64)),
    }
    bf16, f16, f32 = jnp.bfloat16, jnp.float16, jnp.float32
    odd, order, single = (3, 1056, 80, 32, False), (5, 96, 48, 40, True), (1, 544, 72, -1, False)
    cases = [(kind, name, bf16, odd) for kind in ("2", "3", "4", "8", "ternary") for name in ("vector", "tensor")]
    cases += [(kind, "dequantise", bf16, odd) for kind in ("3", "4", "ternary")]
    cases += [("4", name, dtype, odd) for name in ("vector", "tensor") for dtype in (f16, f32)]
    cases += [("4", name, bf16, order) for name in ("vector", "tensor", "dequantise")]
    cases += [("4", name, bf16, single) for name in ("vector", "tensor", "vector, split", "tensor, strided")]
    cases += [("8", "tensor", f16, odd), ("3", "tensor, word", bf16, odd), ("3", "vector", f32, odd)]

    def one(case):
        kind, name, dtype, (m, k, n, group, act_order) = case
        w = weights(kind, k, n, group, 3)
        g_idx = (
            jnp.asarray(np.random.default_rng(0).permutation(np.arange(k) // group), jnp.int32) if act_order else None
        )
        x = jnp.asarray(np.random.default_rng(1).standard_normal((m, k)), dtype)
        shape = shape_of(kind, m, k, n, group, act_order)
        y = jax.jit(product_by(tiles[name], shape))(x, *w, g_idx)
        full = dense(kind, w, k, group, f32, g_idx)
        expected = np.asarray(x, np.float64) @ np.asarray(full, np.float64)
        return np.abs(np.asarray(y, np.float64) - expected).max() / np.abs(expected).max()

    bounds = {"bfloat16": 8e-3, "float16": 1.5e-3, "float32": 1e-5}
    worst, failed, late = {}, 0, 0
    pool = concurrent.futures.ThreadPoolExecutor(16)
    futures = {pool.submit(one, case): case for case in cases}
    concurrent.futures.wait(futures, timeout=60)
    pool.shutdown(wait=False, cancel_futures=True)
    for future, (kind, name, dtype, sizes) in futures.items():
        dtype = jnp.dtype(dtype).name
        if not future.done() or future.cancelled():
            late += 1
            continue
        try:
            error = future.result()
            worst[name, dtype] = max(worst.get((name, dtype), 0), error)
            if error <= bounds[dtype]:
                continue
            reason = f"error {error:.1e}"
        except Exception as e:
            reason = f"{type(e).__name__}: {str(e)[:300]!r}"
        failed += 1
        log(f"PARITY FAILED {kind} {name} {dtype} (m, k, n, group, act_order)={sizes}: {reason}")
    log(f"parity: {len(cases)} cases, {failed} failed, {late} not done, {time.monotonic() - START:.0f} s; worst:")
    log("; ".join(f"{name} {dtype} {error:.1e}" for (name, dtype), error in sorted(worst.items())))


def candidates(kind: str, m: int) -> list:
    """Tiles to try. For many rows, also how to dequantise before XLA's product."""
    T, split = gpu.Tile, functools.partial(gpu.Tile, x_load="split")
    whole = {"2": 256, "3": 128, "4": 512, "8": 512, "ternary": 256}[
        kind
    ]  # all 4096 inputs in one step (half at 8 bits)
    out = []
    if m <= 2:
        V = functools.partial(T, m=m, vector=True)
        out += [
            V(n=32, words=whole, warps=16),
            V(n=32, words=whole, warps=8),
            V(n=32, words=whole, warps=16, x_load="split"),
            V(n=16, words=whole, warps=8),
            V(n=32, words=whole // 2, warps=8),
            V(n=64, words=whole // 4, splits=4, warps=8),
        ]
        if kind == "4":
            out += [
                V(n=16, words=whole, warps=4),
                V(n=64, words=whole, warps=16),
                V(n=32, words=whole // 4, warps=8),
                V(n=32, words=whole // 4, splits=4, warps=4),
            ]
    folded = {"3": 4, "2": 2, "ternary": 2}.get(kind, 1)  # groups of 128 in a step
    rows = max(16, folded * m)
    if m <= 32:
        words = 32 if kind == "8" else 16
        out += [
            split(m=rows, n=64, words=words, splits=8),
            split(m=rows, n=128, words=words, splits=8, warps=8),
            split(m=rows, n=128, words=words, splits=4, warps=4),
        ]
        if kind == "4":
            out += [
                T(m=rows, n=64, splits=8),
                split(m=rows, n=128, splits=8, warps=4),
                split(m=rows, n=128, splits=4, warps=4, stages=3),
                split(m=rows, n=128, splits=4, warps=8),
                split(m=rows, n=256, splits=8, warps=8),
                split(m=rows, n=32, splits=8, warps=2),
                split(m=rows, n=64, splits=8, warps=2),
                split(m=rows, n=32, splits=1, warps=4),
            ]
        if kind == "3":
            out += [
                split(m=max(16, m), n=64, splits=8, scaling="word"),
                split(m=rows, n=64, splits=4, warps=8),
            ]
    if m >= 32:
        if kind == "4":
            out += [
                split(m=m if m <= 64 else 64, n=128, splits=4, warps=4),
                split(m=m if m <= 64 else 128, n=128, words=32, splits=4 if m <= 64 else 1, warps=8, scaling="word"),
            ]
        out += [("dequantise", T(n=128, words=16, warps=4)), ("dequantise", T(n=256, words=8, warps=4))]
        if kind == "4":
            out += [("dequantise", T(n=256, words=16, warps=8)), ("dequantise", T(n=64, words=16, warps=4))]
    return out


def show(tile) -> str:
    if isinstance(tile, tuple):
        return "dequantise " + show(tile[1])
    default = gpu.Tile()
    fields = [f.name for f in dataclasses.fields(tile)]
    changed = [f"{f}={getattr(tile, f)!r}" for f in fields if f in "mn" or getattr(tile, f) != getattr(default, f)]
    return f"Tile({', '.join(changed)})"


def floors(case: Case) -> tuple[float, float]:
    moved = nbytes(case.operands[0]) + 2 * nbytes([case.x])
    return moved / BANDWIDTH, 2 * case.m * case.k**2 / FLOPS


def row(case: Case, seconds: float, how: str, dense_s: float, dequantised: float | None) -> str:
    us = lambda s: "-" if s is None else f"{1e6 * s:.2f}"
    times = (us(seconds), us(dense_s), us(dequantised), f"{dense_s / seconds:.2f}", *map(us, floors(case)))
    return f"| {case.kind} | {case.m} | {case.k} | {' | '.join(times)} | `{how}` |"


def launch_floor(k: int) -> float:
    """Seconds that a kernel takes in such a chain when it only copies one row."""
    from jax.experimental import pallas as pl

    def copy(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    x = jnp.ones((1, k), jnp.bfloat16)
    call = pl.pallas_call(copy, out_shape=x, interpret=INTERPRET, compiler_params=gpu.plgpu.CompilerParams(num_warps=4))
    operands = [(jnp.zeros(1),)] * 14
    done, _ = compiled_chain(lambda x, _: call(x), operands, x, 150)
    return seconds_of(done, x, operands, 14 * 150)


def sweep(jobs: list, size: int, group: int, log: Log, left) -> None:
    """Compile every candidate of every job side by side, then measure one after the other."""
    cases = {job: Case(*job, size, group) for job in jobs}
    base = {m: dense_seconds(m, size) for m in dict.fromkeys(m for _, m in jobs)}
    log(f"a kernel that does nothing takes {1e6 * launch_floor(size):.2f} us; {time.monotonic() - START:.0f} s")
    for m, seconds in base.items():
        log(f"bfloat16 dot, m={m}: {1e6 * seconds:.2f} us")
    pool = concurrent.futures.ThreadPoolExecutor(16)
    futures = {}
    for depth in range(40):  # the first candidates of every job before the second ones
        for job in jobs:
            found = candidates(*job)
            if depth < len(found):
                futures[pool.submit(cases[job].compile, found[depth])] = (job, found[depth])
    concurrent.futures.wait(futures, timeout=0.55 * left())
    pool.shutdown(wait=True, cancel_futures=True)  # a compiler that still ran would disturb the measurements
    finished = [future for future in futures if not future.cancelled()]
    log(f"{len(finished)} of {len(futures)} candidates compiled, {time.monotonic() - START:.0f} s")
    best: dict = {}
    for future, (job, tile) in futures.items():
        if future.cancelled() or left() < 5:
            log(f"    not done: {job} {show(tile)}")
            continue
        try:
            done, compiling = future.result()
            seconds = cases[job].measure(done)
            log(f"    {job[0]:>8} m={job[1]:<4} {1e6 * seconds:7.2f} us {show(tile)} (compiled in {compiling:.1f} s)")
            if seconds < best.get(job, (math.inf,))[0]:
                best[job] = (seconds, tile)
        except Exception as e:
            log(f"    failed {job} {show(tile)}: {type(e).__name__} {str(e)[:160]!r}")
    header(log)
    for job, (seconds, tile) in best.items():
        log(row(cases[job], seconds, show(tile), base[job[1]], None))


def table(jobs: list, size: int, group: int, log: Log, left) -> None:
    """What the library itself chooses, beside XLA's product of the bfloat16 matrix and of the dequantised one."""
    base = {m: dense_seconds(m, size) for m in dict.fromkeys(m for _, m in jobs)}
    log(f"a kernel that does nothing takes {1e6 * launch_floor(size):.2f} us; {time.monotonic() - START:.0f} s")
    cases = {job: Case(*job, size, group) for job in jobs}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        chosen = {job: pool.submit(case.compile_chosen) for job, case in cases.items()}
        plain = {job: pool.submit(case.compile_dequantised) for job, case in cases.items()}
    header(log)
    for job, case in cases.items():
        if left() < 5:
            log(f"no time left for {job}")
            continue
        try:
            done, compiling = chosen[job].result()
            seconds = case.measure(done)
            how = f"{lowbit_how(case)}, compiled in {compiling:.1f} s"
            log(row(case, seconds, how, base[job[1]], case.measure(plain[job].result()[0])))
        except Exception as e:
            log(f"failed {job}: {type(e).__name__} {str(e)[:300]!r}")


def lowbit_how(case: Case) -> str:
    chosen = lowbit.choose(case.shape, jnp.bfloat16)
    tile = gpu.tile_for(case.shape, jnp.dtype(jnp.bfloat16))
    return chosen if chosen != "gpu" else "dequantise, dot" if tile is None else show(tile)


def header(log: Log) -> None:
    log(
        "\n| bits | m | k = n | kernel, us | bfloat16 dot, us | XLA dequantise + dot, us | speed against bfloat16 | "
        "floor of the bytes, us | floor of the FLOPs, us | how |\n|---|---|---|---|---|---|---|---|---|---|"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--mode", default="parity", choices=["parity", "sweep", "table"])
    parser.add_argument("--bits", default="4,3,2,8,ternary")
    parser.add_argument("--rows", default="1,16,256")
    parser.add_argument("--jobs", help="bits:rows, … instead of all products of --bits and --rows")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=150, help="stop to begin anything new after so long")
    args = parser.parse_args()
    log = Log(args.out)
    left = lambda: args.seconds - (time.monotonic() - START)
    device = jax.devices()[0]
    log(f"# {device.device_kind}, {device.platform}, jax {jax.__version__}; {time.strftime('%Y-%m-%d %H:%M')} UTC")
    if args.jobs:
        jobs = [(job.split(":")[0], int(job.split(":")[1])) for job in args.jobs.split(",")]
    else:
        jobs = [(kind, int(m)) for kind in args.bits.split(",") for m in args.rows.split(",")]
    if args.mode == "parity":
        parity(log)
    else:
        (sweep if args.mode == "sweep" else table)(jobs, args.size, args.group, log, left)
    log(f"\n{time.monotonic() - START:.0f} s in all")


if __name__ == "__main__":
    main()
