"""Packed low-bit products on a GPU: parity, a search over tiles, and times beside plain XLA and two floors.

    PYTHONPATH=. python benchmarks/kernels_lowbit.py --out FILE.md [--mode parity,tune] [--bits 4,3] [--rows 1,16]

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
    zeros = jax.lax.bitcast_convert_type(jax.random.bits(keys[1], (groups, -(-n * bits // 32)), jnp.uint32), jnp.int32)
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


class Case:
    """One product (kind of weight, m, k = n): its operands, so many that the cache does not help."""

    def __init__(self, kind: str, m: int, k: int, group: int):
        self.kind, self.m, self.k, self.group = kind, m, k, group
        copies = 1
        one = weights(kind, k, k, group, 0)
        copies = max(4, math.ceil(CACHE / nbytes(one)))
        self.operands = [one] + [weights(kind, k, k, group, seed) for seed in range(1, copies)]
        self.x = jax.random.normal(jax.random.key(1), (m, k), jnp.bfloat16)
        self.repeats = max(4, math.ceil(2000 / copies) if m <= 64 else math.ceil(600 / copies))
        self.shape = shape_of(kind, m, k, k, group)

    def compile(self, tile):
        product = lambda x, *w: gpu.matmul(x, *w, None, self.shape, tile, interpret=INTERPRET)
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
    """Every kernel and way of scaling against the definition in float64, on the device itself."""
    rng = np.random.default_rng(0)
    T = gpu.Tile
    tiles = {
        "tensor": T(),
        "tensor, split": T(n=32, splits=2, x_load="split", warps=2),
        "tensor, word": T(m=32, words=32, scaling="word", x_load="permuted"),
        "tensor, transposed": T(m=64, n=64, transposed=True, x_load="permuted"),
        "vector": T(m=1, n=32, vector=True, splits=2),
    }
    cases = []
    for kind in ("2", "3", "4", "8", "ternary"):
        for name, tile in tiles.items():
            for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
                for m, k, n, group, order in (
                    (3, 1056, 80, 32, False),
                    (1, 544, 72, 128, False),
                    (5, 96, 48, 40, True),
                ):
                    if dtype == jnp.bfloat16 or (m == 3 and name in ("tensor", "vector")):
                        cases.append((kind, name, tile, dtype, m, k, n, group, order))

    def one(case):
        kind, name, tile, dtype, m, k, n, group, order = case
        w = weights(kind, k, n, group, 3)
        g_idx = jnp.asarray(rng.permutation(np.arange(k) // group), jnp.int32) if order else None
        x = jnp.asarray(np.random.default_rng(1).standard_normal((m, k)), dtype)
        shape = shape_of(kind, m, k, n, group, order)
        y = jax.jit(lambda x, *w: gpu.matmul(x, *w, shape, tile, interpret=INTERPRET))(x, *w, g_idx)
        expected = np.asarray(x, np.float64) @ np.asarray(dense(kind, w, k, group, jnp.float32, g_idx), np.float64)
        return np.abs(np.asarray(y, np.float64) - expected).max() / np.abs(expected).max()

    bounds = {"bfloat16": 8e-3, "float16": 1.5e-3, "float32": 1e-5}
    worst, failed = {}, 0
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        for case, future in [(case, pool.submit(one, case)) for case in cases]:
            kind, name, _, dtype, m, k, n, group, order = case
            key = (name, jnp.dtype(dtype).name)
            try:
                error = future.result()
                worst[key] = max(worst.get(key, 0), error)
                if error <= bounds[key[1]]:
                    continue
                reason = f"error {error:.1e}"
            except Exception as e:
                reason = f"{type(e).__name__}: {str(e)[:300]!r}"
            failed += 1
            log(f"PARITY FAILED {kind} {name} {key[1]} m={m} k={k} n={n} group={group} act_order={order}: {reason}")
    log(f"parity: {len(cases)} cases, {failed} failed, {time.monotonic() - START:.0f} s; worst by kernel:")
    log("; ".join(f"{name} {dtype} {error:.1e}" for (name, dtype), error in sorted(worst.items())))


def seeds(kind: str, m: int) -> list:
    T = gpu.Tile
    if m <= 32:
        rows = 16 if m <= 16 else 32
        if kind in ("2", "3", "ternary"):
            rows = max(rows, 4 * m if kind == "3" else 2 * m)
        out = [
            T(m=rows, n=32, splits=1, warps=4, stages=4),
            T(m=rows, n=64, splits=4, warps=4, stages=4),
            T(m=rows, n=64, splits=4, warps=4, stages=4, x_load="split"),
            T(m=rows, n=64, splits=4, warps=4, stages=4, x_load="permuted"),
            T(m=rows, n=64, splits=4, warps=4, stages=3, x_load="permuted", transposed=True),
            T(m=max(16, m), n=64, words=32, splits=2, stages=3, x_load="permuted", scaling="word"),
            T(
                m=max(16, m),
                n=64,
                words=32,
                splits=2,
                warps=4,
                stages=3,
                x_load="permuted",
                scaling="word",
                transposed=True,
            ),
        ]
        if m <= 4:
            out += [
                T(m=m, n=32, words=64, warps=8, vector=True),
                T(m=m, n=64, words=32, splits=4, warps=4, vector=True),
                T(m=m, n=128, words=16, splits=8, warps=4, vector=True),
            ]
        return out
    T = functools.partial(T, warps=4, stages=3, x_load="permuted")
    rows, more = min(m, 64), 128 if m > 64 else 64
    return [
        T(m=rows, n=64),
        T(m=rows, n=128, transposed=True),
        T(m=rows, n=128, words=32, scaling="word"),
        T(m=rows, n=128, words=32, scaling="word", transposed=True),
        T(m=more, n=64, words=32, scaling="word"),
        T(m=more, n=128, words=32, warps=8, scaling="word", transposed=True),
        T(m=more, n=128, warps=8, transposed=True),
    ]


def neighbours(tile, m: int) -> list:
    """Tiles that differ in one respect."""
    change = lambda **c: dataclasses.replace(tile, **c)
    out = [change(n=tile.n * 2), change(n=tile.n // 2), change(splits=tile.splits * 2), change(splits=tile.splits // 2)]
    out += [change(warps=tile.warps * 2), change(warps=tile.warps // 2), change(unroll=3 - min(tile.unroll, 2))]
    out += [change(words=tile.words * 2), change(words=tile.words // 2), change(unroll=tile.unroll * 2)]
    if not tile.vector:
        out += [change(stages=tile.stages + 1), change(stages=tile.stages - 1)]
        out += [change(x_load=x) for x in ("strided", "permuted", "split") if x != tile.x_load]
        out += [change(transposed=not tile.transposed), change(scaling="word" if tile.scaling == "group" else "group")]
        if m > 16:
            out += [change(m=tile.m * 2), change(m=tile.m // 2)]
    ok = lambda t: (
        t.n >= 16 and t.splits >= 1 and 1 <= t.warps <= 16 and t.stages >= 1 and t.words >= (4 if t.vector else 16)
        and (t.vector or t.m >= 16) and t.words * t.n <= 8192
    )  # fmt: skip
    return [t for t in out if ok(t)]


def show(tile) -> str:
    default = gpu.Tile()
    fields = [f.name for f in dataclasses.fields(tile)]
    changed = [f"{f}={getattr(tile, f)!r}" for f in fields if f in "mn" or getattr(tile, f) != getattr(default, f)]
    return f"Tile({', '.join(changed)})"


def tune(case: Case, log: Log, rounds: int, budget: float) -> tuple:
    """(seconds, tile) of the best tile found by going to better neighbours; `budget` in seconds."""
    deadline = time.monotonic() + budget
    known: dict = {}
    candidates = seeds(case.kind, case.m)
    for turn in range(rounds):
        fresh = [t for t in dict.fromkeys(candidates) if t not in known]
        pool = concurrent.futures.ThreadPoolExecutor(12)
        futures = [(t, pool.submit(case.compile, t)) for t in fresh]
        ready = []
        for tile, future in futures:
            try:
                ready.append((tile, *future.result(timeout=max(1, deadline - time.monotonic()))))
            except Exception as e:
                known[tile] = math.inf
                log(f"    failed {show(tile)}: {type(e).__name__} {str(e)[:160]!r}")
        pool.shutdown(wait=False, cancel_futures=True)
        for tile, done, compiling in ready:
            try:
                known[tile] = case.measure(done)
                log(f"    {1e6 * known[tile]:7.2f} us {show(tile)} (compiled in {compiling:.1f} s)")
            except Exception as e:
                known[tile] = math.inf
                log(f"    failed {show(tile)}: {type(e).__name__} {str(e)[:160]!r}")
        if not known or time.monotonic() > deadline:
            break
        ranked = sorted(known, key=known.get)
        candidates = neighbours(ranked[0], case.m) + (neighbours(ranked[1], case.m)[::2] if turn == 0 else [])
    best = min(known, key=known.get)
    return known[best], best


def floors(case: Case) -> tuple[float, float]:
    moved = nbytes(case.operands[0]) + 2 * nbytes([case.x])
    return moved / BANDWIDTH, 2 * case.m * case.k**2 / FLOPS


def row(case: Case, seconds: float, tile, dense_s: float, dequantised: float | None) -> str:
    us = lambda s: "-" if s is None else f"{1e6 * s:.2f}"
    times = (us(seconds), us(dense_s), us(dequantised), f"{dense_s / seconds:.2f}", *map(us, floors(case)))
    return f"| {case.kind} | {case.m} | {case.k} | {' | '.join(times)} | `{show(tile)}` |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--mode", default="parity,tune")
    parser.add_argument("--bits", default="4,3,2,8,ternary")
    parser.add_argument("--rows", default="1,16,256,64,32,8")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=150, help="stop to begin anything new after so long")
    args = parser.parse_args()
    log = Log(args.out)
    left = lambda: args.seconds - (time.monotonic() - START)
    device = jax.devices()[0]
    log(f"# {device.device_kind}, {device.platform}, jax {jax.__version__}; {time.strftime('%Y-%m-%d %H:%M')} UTC")
    if "parity" in args.mode:
        parity(log)
    if args.mode == "parity":
        return
    rows = [int(m) for m in args.rows.split(",")]
    table = []
    if "tune" in args.mode:
        base = {}
        for m in rows:
            base[m] = dense_seconds(m, args.size)
            log(f"bfloat16 dot, m={m}: {1e6 * base[m]:.2f} us; {time.monotonic() - START:.0f} s")
        jobs = [(kind, m) for kind in args.bits.split(",") for m in rows]
        for i, (kind, m) in enumerate(jobs):
            if left() < 5:
                log(f"no time left for {kind} bits, m={m}")
                continue
            try:
                case = Case(kind, m, args.size, args.group)
                log(f"## {kind} bits, m={m}, {len(case.operands)} weights in a chain; {time.monotonic() - START:.0f} s")
                dequantised = case.measure(case.compile_dequantised()[0])
                log(f"    {1e6 * dequantised:7.2f} us dequantise, then dot")
                seconds, tile = tune(case, log, args.rounds, max(10, left() / (len(jobs) - i) * 1.5))
                table.append(row(case, seconds, tile, base[m], dequantised))
                log(table[-1])
            except Exception as e:
                log(f"failed {kind} bits, m={m}: {type(e).__name__} {str(e)[:500]!r}")
    log(
        "\n| bits | m | k = n | kernel, us | bfloat16 dot, us | dequantise + dot, us | speed against bfloat16 | "
        "floor of the bytes, us | floor of the FLOPs, us | tile |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    log("\n".join(table))
    log(f"\n{time.monotonic() - START:.0f} s in all")


if __name__ == "__main__":
    main()
