"""Attention, decoding, latent attention, retention and top-k kernels on one accelerator, against XLA and cuDNN.

    python benchmarks/kernels_attention.py [--out FILE] [--only parity,attention,…] [--sweep] [--seconds 140] [--smoke]
    XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false" halves the time that it takes to compile

Needs jax and this checkout, nothing else. First every kernel is compared with its reference on the device itself: what
is wrong is not worth timing. Then tables: seconds to compile and microseconds to run apart, and beside each two floors:
its FLOPs over the chip's peak and its bytes over the memory's bandwidth. ``--sweep`` also tries tiles, warps, stages.

A time is that of N runs inside one program (each made to depend on the one before by an optimization barrier, so that
none is hoisted or shared), the median of five such programs, over N. Eight threads compile all programs of a table
before the first of them is timed: compiling tries products on the device, and disturbs whatever runs there.
Each line is written as soon as it is known, as JSON; a case that fails is a line with its error.
"""

import argparse
import datetime
import functools
import json
import os
import statistics
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import jax
import jax.numpy as jnp
import numpy as np
from bare import kernel

attention, attention_gpu = kernel("attention"), kernel("attention_gpu")
attention_mosaic = kernel("attention_mosaic")
decode, mla, topk = kernel("decode"), kernel("mla"), kernel("topk")
retention, retention_gpu = kernel("retention"), kernel("retention_gpu")

PEAK = {"flops16": 989e12, "flops32": 495e12 / 3, "bytes": 3.35e12}  # H100 SXM: dense bf16, three TF32 passes, HBM3
BF16, F32 = jnp.bfloat16, jnp.float32
BEGIN = time.perf_counter()


class Run:
    """Where lines go, what is left of the time, and the pool that compiles."""

    def __init__(self, out: str | None, seconds: float, smoke: bool):
        self.file = open(out, "a") if out else None
        self.seconds, self.smoke = seconds, smoke
        self.pool = ThreadPoolExecutor(1 if smoke else 8)

    def line(self, **fields: Any) -> None:
        text = json.dumps({"at": round(time.perf_counter() - BEGIN, 1), **fields})
        print(text, flush=True)
        if self.file:
            self.file.write(text + "\n")
            self.file.flush()

    def wants(self, name: str) -> bool:
        return self.parity in name

    def late(self) -> bool:
        return time.perf_counter() - BEGIN > self.seconds


@functools.lru_cache
def _noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(4_000_037, np.float32)


@functools.lru_cache
def draw(shape: tuple[int, ...], dtype: Any = BF16, seed: int = 0) -> jax.Array:
    """Normal numbers, made on the host: no program is compiled for them."""
    flat = np.roll(_noise(), 1_000_003 * seed).astype(dtype)
    return jnp.asarray(np.resize(flat, shape))


# --------------------------------------------------------------------------------------------------------- timing


def repeated(f: Any, n: int) -> Any:
    """``f`` n times in one program, each run behind a barrier that waits for the one before."""

    def program(*args):
        def step(_, out):
            held, _ = jax.lax.optimization_barrier((args, out))
            return f(*held)

        return jax.lax.fori_loop(
            0, n, step, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(f, *args))
        )

    return jax.jit(program)


def measure(run: Run, tables: list[Any]) -> None:
    """For each table compile its cases in the pool, and then time them one after the other.

    A case: name, f, args, flops, bytes, …"""

    def compiled(case: dict[str, Any]) -> tuple[Any, float]:
        if run.late():
            raise TimeoutError("out of time")
        floor = max(case["flops"] / PEAK[case.get("peak", "flops16")], case["bytes"] / PEAK["bytes"])
        case["runs"] = 1 if run.smoke else int(min(max(10e-3 / max(3 * floor, 5e-6), 2), 300))
        start = time.perf_counter()
        program = repeated(case["f"], case["runs"]).lower(*case["args"]).compile()
        return program, time.perf_counter() - start

    for table in tables:
        cases = []
        try:
            cases = table(run, run.smoke)
        except Exception as error:
            run.line(part=table.__name__, error=f"{type(error).__name__}: {error}"[:600])
            traceback.print_exc(limit=6)
        futures = [(case, run.pool.submit(compiled, case)) for case in cases]
        wait([future for _, future in futures])
        for case, future in futures:
            _time(run, case, future)


def _time(run: Run, case: dict[str, Any], future: Any) -> None:
    """Run one compiled case and write its line."""
    shown = {k: v for k, v in case.items() if k not in ("f", "args", "flops", "bytes", "peak", "runs")}
    if run.late():
        run.line(**shown, skipped="out of time")
        return
    try:
        program, seconds = future.result()
        jax.block_until_ready(program(*case["args"]))
        times = []
        for _ in range(1 if run.smoke else 5):
            start = time.perf_counter()
            jax.block_until_ready(program(*case["args"]))
            times.append((time.perf_counter() - start) / case["runs"])
        best = statistics.median(times)
        run.line(
            **shown,
            us=round(best * 1e6, 2),
            spread=round((max(times) - min(times)) / best, 3),
            compile_s=round(seconds, 2),
            tflops=round(case["flops"] / best / 1e12, 1),
            gbytes_s=round(case["bytes"] / best / 1e9, 1),
            floor_flops_us=round(case["flops"] / PEAK[case.get("peak", "flops16")] * 1e6, 2),
            floor_bytes_us=round(case["bytes"] / PEAK["bytes"] * 1e6, 2),
        )
    except Exception as error:
        run.line(**shown, error=f"{type(error).__name__}: {error}"[:600])


# --------------------------------------------------------------------------------------------------------- parity


def check(run: Run, name: str, found: Any, expected: Any, args: list[Any], tolerance: float) -> None:
    """Compare two functions' trees, each relative to the expected leaf's largest magnitude."""
    if not run.wants(name):
        return
    try:
        a, b = (jax.tree.leaves(jax.jit(f)(*args)) for f in (found, expected))
        errors = []
        for x, y in zip(a, b, strict=True):
            x, y = (np.asarray(z.astype(F32)) for z in (x, y))
            y_seen = np.abs(np.where(np.abs(y) > 1e29, 0, y)).max()
            errors.append(float(np.abs(x - y).max() / max(y_seen, 1e-6)))
        run.line(parity=name, ok=bool(max(errors) <= tolerance), errors=[f"{e:.1e}" for e in errors])
    except Exception as error:
        run.line(parity=name, ok=False, error=f"{type(error).__name__}: {error}"[:600])
        traceback.print_exc(limit=4)


def parity_attention(run: Run, interpret: bool) -> None:
    rng = np.random.default_rng(0)
    segments = jnp.asarray(np.sort(rng.integers(0, 4, (2, 333)), axis=1))
    valid = jnp.asarray(rng.random((2, 333)) < 0.7)
    prefix = jnp.asarray([0, 150])
    cases = [  # name, queries, keys, heads, kv heads, sizes, dtype, bias shape, mask
        ("plain d64", 256, 256, 4, 4, (64, 64), BF16, None, {}),
        ("causal gqa d128 odd", 333, 333, 4, 2, (128, 128), BF16, None, {"causal": True}),
        ("causal gqa d128 whole", 512, 512, 4, 2, (128, 128), BF16, None, {"causal": True}),
        ("causal start d64 whole", 256, 512, 4, 4, (64, 64), BF16, None, {"causal": True, "start": 256}),
        ("causal start d80", 77, 333, 4, 4, (80, 80), BF16, None, {"causal": True, "start": 256}),
        ("window", 333, 333, 2, 1, (64, 64), BF16, None, {"causal": True, "window": 100}),
        ("prefix valid", 333, 333, 2, 2, (64, 64), BF16, None, {"causal": True, "prefix": prefix, "valid": valid}),
        ("segments", 333, 333, 2, 2, (32, 32), BF16, None, {"causal": True, "segments": segments}),
        ("valid d256", 333, 333, 2, 2, (256, 256), BF16, None, {"valid": valid}),
        ("bias shared", 333, 333, 4, 2, (64, 64), BF16, (1, 4, 333, 333), {}),
        ("bias own", 333, 333, 2, 2, (64, 64), BF16, (2, 2, 333, 333), {"causal": True}),
        ("value size", 333, 333, 2, 2, (96, 64), BF16, None, {"causal": True}),
        ("float32", 333, 333, 4, 2, (64, 64), F32, (2, 1, 333, 333), {"causal": True, "valid": valid}),
        ("float32 d128", 200, 333, 4, 2, (128, 128), F32, None, {}),
    ]

    def one(case):
        name, queries, keys, heads, kv_heads, (size, value), dtype, shape, mask = case
        args = [draw((2, queries, heads, size), dtype, 1), draw((2, keys, kv_heads, size), dtype, 2)]
        args += [draw((2, keys, kv_heads, value), dtype, 3)] + ([draw(shape, dtype, 4)] if shape else [])
        weight, votes = draw((2, queries, heads, value), F32, 5), jnp.abs(draw((2, heads, queries), F32, 6))

        def f(implementation, dtype):
            def loss(*args):
                args = [a.astype(dtype) for a in args]
                out, lse = attention.attention(
                    *args[:3],
                    bias=args[3] if shape else None,
                    return_lse=True,
                    implementation=implementation,
                    interpret=interpret,
                    **mask,
                )
                return (out.astype(F32) * weight).sum() + jnp.where(lse > -1e29, lse, 0).sum(), (out, lse)

            def everything(*args):
                (_, (out, lse)), grads = jax.value_and_grad(loss, argnums=tuple(range(len(args))), has_aux=True)(*args)
                bias = args[3].astype(dtype) if shape else None
                q, k = (a.astype(dtype) for a in args[:2])
                sums = attention.column_sums(
                    q, k, lse, votes, bias=bias, implementation=implementation, interpret=interpret, **mask
                )
                return out, lse, grads, sums

            return everything

        # the reference in float32 on the same numbers: bfloat16 has eight bits, of which a gradient keeps fewer
        check(run, "attention " + name, f("pallas_gpu", dtype), f("xla", F32), args, 2e-2 if dtype == BF16 else 2e-5)

    list(run.pool.map(one, cases[:2] if run.smoke else cases))


def parity_rest(run: Run, interpret: bool) -> None:
    def decoding(dtype, batch, heads, kv_heads, slots, size):
        q, k, v = draw((batch, heads, size), dtype), draw((batch, kv_heads, slots, size), dtype, 1), None
        v, allowed = draw(k.shape, dtype, 2), jax.random.uniform(jax.random.key(3), (batch, slots)) < 0.5
        allowed = allowed.at[:, slots // 2 :].set(False).at[0].set(False)
        f = lambda how, dtype: (
            lambda allowed, *a: decode.decode(
                *(x.astype(dtype) for x in a), allowed=allowed, implementation=how, interpret=interpret
            )
        )
        name = f"decode {jnp.dtype(dtype).name} {size}"
        check(run, name, f("pallas_gpu", dtype), f("xla", F32), [allowed, q, k, v], 1e-2 if dtype == BF16 else 2e-5)

    def latent(dtype, heads, rank, rope, slots):
        q, r, c = (
            draw((2, heads, rank), dtype),
            draw((2, heads, rope), dtype, 1),
            draw((2, slots, rank + rope), dtype, 2),
        )
        valid = jax.random.uniform(jax.random.key(3), (2, slots)) < 0.5
        f = lambda how, dtype: (
            lambda valid, *a: mla.mla_decode(
                *(x.astype(dtype) for x in a), scale=0.05, valid=valid, implementation=how, interpret=interpret
            )
        )
        name = f"mla {jnp.dtype(dtype).name} {heads} heads {rank}+{rope}"
        check(run, name, f("pallas_gpu", dtype), f("xla", F32), [valid, q, r, c], 1e-2 if dtype == BF16 else 2e-5)

    def retain(dtype, length, key, value, xpos, irregular):
        heads = 4
        args = [draw((2, length, heads, n), dtype, i) for i, n in enumerate((key, key, value))]
        decay = jnp.log(1 - jnp.exp(jnp.linspace(np.log(1 / 32), np.log(1 / 512), heads)))
        state, weight = draw((2, heads, key, value), F32, 4), draw((2, length, heads, value), F32, 5)
        times = (
            jnp.cumsum(jax.random.randint(jax.random.key(6), (2, length), 0, 5), 1).astype(F32) if irregular else None
        )
        positions = retention.xpos(heads * key, heads) if xpos else None

        def f(how, dtype):
            def loss(q, k, v, decay, state):
                out, last = retention.retention(
                    *(a.astype(dtype) for a in (q, k, v)),
                    decay,
                    state=state,
                    times=times,
                    state_time=None if times is None else times[:, 0] - 1,
                    positions=positions,
                    interpret=interpret,
                    **how,
                )
                return (out.astype(F32) * weight).sum() + last.sum(), (out, last)

            return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)

        name = f"retention {jnp.dtype(dtype).name} {length} {key}/{value} xpos={xpos} irregular={irregular}"
        ours = {"implementation": "pallas_gpu", "chunk": 64 if length < 300 else 128}
        tolerance = 3e-2 if dtype == BF16 else 5e-5
        check(run, name, f(ours, dtype), f({"form": "parallel"}, F32), [*args, decay, state], tolerance)

    def best(dtype, n, m, width, k):
        whole = lambda shape, seed: jax.random.randint(jax.random.key(seed), shape, -3, 4).astype(dtype)
        q, keys = whole((n, width), 0), whole((m, width), 1)  # whole numbers: exact, and full of ties
        f = lambda how: lambda *a: topk.topk(*a, k, count=m - 5, implementation=how, interpret=interpret)
        check(run, f"topk {jnp.dtype(dtype).name} {n}x{m}x{width} k={k}", f("pallas_gpu"), f("xla"), [q, keys], 0.0)

    jobs = [
        (decoding, BF16, 3, 8, 2, 1000, 128),
        (decoding, F32, 2, 4, 4, 777, 80),
        (latent, BF16, 16, 512, 64, 700),
        (latent, BF16, 40, 48, 32, 700),
        (latent, F32, 16, 128, 32, 300),
        (retain, BF16, 500, 64, 64, False, False),
        (retain, BF16, 500, 50, 100, True, True),
        (retain, F32, 200, 64, 128, True, True),
        (best, F32, 200, 3000, 100, 10),
        (best, BF16, 33, 2000, 384, 1),
        (best, F32, 100, 1000, 64, 50),
    ]
    if run.smoke:
        jobs = [(decoding, F32, 2, 2, 1, 40, 16), (latent, BF16, 3, 32, 16, 40), (best, F32, 20, 50, 10, 3)]
        jobs += [(retain, F32, 70, 8, 12, True, True)]
    list(run.pool.map(lambda job: job[0](*job[1:]), jobs))


# --------------------------------------------------------------------------------------------------------- tables


def with_gradient(f: Any) -> Any:
    """f(*args) and its gradients in all args, pulled back from the last argument.

    The value is an output: a backward pass that does not need it would leave the forward pass out.
    """

    def both(*args):
        *args, cotangent = args
        value, pull = jax.vjp(f, *args)
        return value, pull(cotangent)

    return both


def attention_cases(run: Run, interpret: bool) -> list[dict[str, Any]]:
    tokens, heads, cases = 16384, 16, []
    lengths = (1024, 2048, 4096, 8192, 16384)
    if run.smoke:
        tokens, heads, lengths = 128, 2, (64,)

    def add(length, size, how, f, mask, *, backward, bias=None, kv_heads=None, **extra):
        batch = tokens // length
        args = [
            draw((batch, length, n, size), BF16, i) for i, n in enumerate((heads, kv_heads or heads, kv_heads or heads))
        ]
        if bias is not None:
            args.append(draw((1, heads, length, length), BF16, 4))
        pairs = batch * heads * length**2 * (0.5 if mask.get("causal") else 1.0)
        if mask.get("window"):
            pairs = batch * heads * length * min(mask["window"], length)
        bytes_ = sum(a.nbytes for a in args) + args[0].nbytes
        flops = 4 * pairs * size * (3.5 if backward else 1)
        if backward:
            f = with_gradient(f)
            args.append(draw((batch, length, heads, size), BF16, 5))
        cases.append(
            dict(table="attention", length=length, size=size, how=how, **extra, **_plain(mask), backward=backward, f=f)
            | dict(args=args, flops=flops, bytes=bytes_ * (2 if backward else 1))
        )

    def ours(mask, tiles=None):
        return lambda q, k, v, bias=None: attention.attention(
            q, k, v, bias=bias, implementation="pallas_gpu", interpret=interpret, tiles=tiles, **mask
        )

    def xla(mask):
        return lambda q, k, v, bias=None: attention.attention(q, k, v, bias=bias, implementation="xla", **mask)

    def cudnn(mask):
        window = (mask["window"] - 1, 0) if "window" in mask else None
        return lambda q, k, v, bias=None: jax.nn.dot_product_attention(
            q, k, v, bias, is_causal=mask.get("causal", False), local_window_size=window, implementation="cudnn"
        )

    causal = {"causal": True}
    for length in lengths:
        for backward in (False, True):
            add(length, 128, "ours", ours(causal), causal, backward=backward)
            add(length, 128, "cudnn", cudnn(causal), causal, backward=backward)
            if length <= (4096 if backward else 8192):
                add(length, 128, "xla", xla(causal), causal, backward=backward)
    middle = lengths[len(lengths) // 2]
    for size in (64, 128):  # tiles of Triton's keep its forward kernel on Hopper
        triton = ours(causal, attention_gpu.default_tiles(size, BF16))
        add(middle, size, "ours, Triton forward", triton, causal, backward=False)
    for backward in (False, True):
        for how, f in (("ours", ours), ("cudnn", cudnn)):
            add(middle, 64, how, f(causal), causal, backward=backward)
            add(middle, 128, how, f({}), {}, backward=backward)
            add(middle, 128, how, f(causal), causal, backward=backward, kv_heads=heads // 2, grouped=2)
            add(lengths[-1], 128, how, f({**causal, "window": 1024}), {**causal, "window": 1024}, backward=backward)
        for how, f in (("ours", ours), ("cudnn", cudnn), ("xla", xla)):
            for length in lengths[:2] if backward else lengths[1:2]:
                add(length, 64, how, f({}), {}, backward=backward, bias=True, biased=True)
        for length in (lengths[0], middle):
            valid = (
                jnp.arange(length)[None, :] < jnp.linspace(length // 2, length, tokens // length).astype(int)[:, None]
            )
            for how, f in (("ours", ours), ("xla", xla)):
                add(length, 64, how, f({"valid": valid}), {"valid": valid}, backward=backward)
    return cases


def _plain(mask: dict[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, bool | int) else True for k, v in mask.items()}


def sums_cases(run: Run, interpret: bool) -> list[dict[str, Any]]:
    cases = []
    for length, batch in ((256, 64), (1024, 16), (4096, 4)) if not run.smoke else ((64, 1),):
        q, k = draw((batch, length, 12, 64)), draw((batch, length, 12, 64), BF16, 1)
        lse, votes = draw((batch, 12, length), F32, 2) + 5, jnp.abs(draw((batch, 12, length), F32, 3))
        for how in ("pallas_gpu", "xla"):
            f = lambda *a, how=how: attention.column_sums(*a, implementation=how, interpret=interpret)
            flops = 2 * batch * 12 * length**2 * 64
            cases.append(
                dict(table="column sums", length=length, how=how, f=f, args=[q, k, lse, votes], flops=flops)
                | dict(bytes=q.nbytes * 2)
            )
    return cases


def decode_cases(run: Run, interpret: bool) -> list[dict[str, Any]]:
    cases = []
    grid = [(8, 32, 8, 4096), (8, 32, 8, 16384), (1, 32, 8, 32768), (64, 32, 8, 2048)]
    for batch, heads, kv_heads, slots in grid if not run.smoke else [(1, 2, 1, 64)]:
        q, k, v = draw((batch, heads, 128)), draw((batch, kv_heads, slots, 128), BF16, 1), None
        v, allowed = draw(k.shape, BF16, 2), jnp.ones((batch, slots), bool)
        flops, bytes_ = 4 * batch * heads * slots * 128, 2 * k.nbytes
        tiles = {"ours": None}
        if run.sweep and (batch, slots) == (8, 4096):
            many = max(1, 528 // (batch * kv_heads))
            for n, stages, splits in ((32, 4, None), (64, 2, None), (128, 2, None), (128, 3, many), (64, 4, many)):
                tiles[f"ours {n} slots {stages} stages {splits} splits"] = decode.Tile(16, n, splits, 4, stages)
        for how, tile in tiles.items():
            f = lambda q, k, v, a, tile=tile: decode.decode(
                q, k, v, allowed=a, implementation="pallas_gpu", tile=tile, interpret=interpret
            )
            cases.append(dict(table="decode", batch=batch, heads=heads, kv_heads=kv_heads, slots=slots, how=how, f=f))
        f = lambda q, k, v, a: decode.decode(q, k, v, allowed=a, implementation="xla")
        cases.append(dict(table="decode", batch=batch, heads=heads, kv_heads=kv_heads, slots=slots, how="xla", f=f))
        f = lambda q, k, v, a: jax.nn.dot_product_attention(
            q[:, None], k.swapaxes(1, 2), v.swapaxes(1, 2), implementation="cudnn"
        )
        cases.append(dict(table="decode", batch=batch, heads=heads, kv_heads=kv_heads, slots=slots, how="cudnn", f=f))
        for case in cases:
            case.setdefault("args", [q, k, v, allowed])
            case.setdefault("flops", flops)
            case.setdefault("bytes", bytes_)
    return cases


def mla_cases(run: Run, interpret: bool) -> list[dict[str, Any]]:
    cases = []
    for batch, heads, slots in ((8, 16, 4096), (8, 32, 16384), (8, 128, 4096), (1, 128, 32768)):
        rank, rope = 512, 64
        if run.smoke:
            batch, heads, slots, rank, rope = 1, 2, 64, 32, 16
        args = [
            draw((batch, heads, rank)),
            draw((batch, heads, rope), BF16, 1),
            draw((batch, slots, rank + rope), BF16, 2),
        ]
        args.append(jnp.ones((batch, slots), bool))
        tiles = {"ours": None}
        if run.sweep and heads in (32, 128) and batch == 8:
            for h, n, warps, stages in ((16, 64, 4, 2), (32, 64, 8, 1), (32, 32, 4, 2), (64, 32, 8, 2), (64, 64, 8, 1)):
                tiles[f"ours {h}x{n} {warps} warps {stages} stages"] = decode.Tile(h, n, None, warps, stages)
        for how, tile in {**tiles, "xla": None}.items():
            f = lambda q, r, c, a, how=how, tile=tile: mla.mla_decode(
                q,
                r,
                c,
                scale=0.05,
                valid=a,
                implementation="xla" if how == "xla" else "pallas_gpu",
                tile=tile,
                interpret=interpret,
            )
            cases.append(
                dict(table="mla", batch=batch, heads=heads, slots=slots, how=how, f=f, args=args)
                | dict(flops=2 * batch * slots * heads * (2 * rank + rope), bytes=args[2].nbytes)
            )
        if run.smoke:
            break
    return cases


def retention_cases(run: Run, interpret: bool) -> list[dict[str, Any]]:
    tokens, heads, cases = 32768, 8, []
    lengths = (512, 1024, 2048, 4096, 8192, 32768)
    if run.smoke:
        tokens, heads, lengths = 64, 2, (64,)
    decay = jnp.log(1 - jnp.exp(jnp.linspace(np.log(1 / 32), np.log(1 / 512), heads)))

    def add(length, size, how, f, backward, block, dtype=BF16):
        batch = tokens // length
        args = [draw((batch, length, heads, size), dtype, i) for i in range(3)]
        flops = batch * length * heads * (2 * block * size + 4 * size * size)  # half of each block of scores is masked
        if backward:
            f, flops = with_gradient(f), flops * 3.5
            args.append(draw(args[0].shape, dtype, 4))
        kind = dict(length=length, size=size, dtype=jnp.dtype(dtype).name, how=how, backward=backward)
        peak = "flops16" if dtype == BF16 else "flops32"
        moved = 4 * args[0].nbytes * (2 if backward else 1)
        cases.append(dict(table="retention", **kind, f=f, args=args, flops=flops, bytes=moved, peak=peak))

    def ours(chunk=None, implementation="pallas_gpu", tiles=None):
        return lambda q, k, v: retention.retention(
            q, k, v, decay, chunk=chunk, implementation=implementation, tiles=tiles, interpret=interpret
        )[0]

    cudnn = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    for length in lengths:
        for backward in (False, True):
            add(length, 64, "ours", ours(), backward, 64)
            add(length, 64, "xla chunkwise", ours(implementation="xla"), backward, 128)
            add(length, 64, "cudnn attention", cudnn, backward, length)
    for size, dtype in ((128, BF16), (64, F32), (128, F32), (32, BF16)):  # where a state may not fit in registers
        for backward in (False, True):
            add(lengths[len(lengths) // 2], size, "ours", ours(), backward, 64, dtype)
            add(lengths[len(lengths) // 2], size, "xla chunkwise", ours(implementation="xla"), backward, 128, dtype)
    if run.sweep:
        tried = [(chunk, 64, 4, 2) for chunk in (64, 128, 256, 512, 1024)]
        tried += [(256, 64, 4, 1), (256, 64, 4, 3), (256, 64, 8, 2), (256, 128, 8, 2), (256, 32, 4, 2)]
        for chunk, steps, warps, stages in tried:
            f = ours(chunk, tiles=retention_gpu.Tiles(steps, warps, stages))
            for backward in (False, True):
                how = f"ours chunk {chunk} tile {steps} warps {warps} stages {stages}"
                add(lengths[min(2, len(lengths) - 1)], 64, how, f, backward, steps)
    return cases


def topk_cases(run: Run, interpret: bool) -> list[dict[str, Any]]:
    cases = []

    def scan(k):
        """As ``jaxformers.search`` does it in XLA: blocks of keys, a running top-k."""

        def f(queries, keys):
            blocks = keys.reshape(-1, min(8192, len(keys)), keys.shape[1])

            def merge(best, item):
                offset, block = item
                s, i = jax.lax.top_k(jnp.matmul(queries, block.T, precision="highest"), k)
                s, i = jnp.concatenate([best[0], s], 1), jnp.concatenate([best[1], offset + i], 1)
                s, place = jax.lax.top_k(s, k)
                return (s, jnp.take_along_axis(i, place, 1)), None

            none = jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1, jnp.int32)
            return jax.lax.scan(merge, none, (jnp.arange(len(blocks)) * blocks.shape[1], blocks))[0]

        return f

    for n, m, k in ((1024, 131072, 1), (1024, 131072, 10), (1024, 131072, 50), (8192, 524288, 10)):
        width = 384
        if run.smoke:
            n, m, k, width = 16, 64, 3, 16
        args = [draw((n, width), F32, 0), draw((m, width), F32, 1)]
        tiles = {"ours": None}
        if run.sweep and (n, k) == (1024, 10):
            for q, keys, columns, warps, stages in (
                (64, 64, 32, 4, 3),
                (128, 64, 32, 4, 3),
                (128, 128, 32, 8, 3),
                (64, 128, 32, 8, 3),
                (32, 128, 32, 4, 3),
            ):
                tile = topk.Tile(q, keys, columns, None, warps, stages)
                tiles[f"ours {q}x{keys}x{columns} {warps} warps {stages} stages"] = tile
        for how, tile in {**tiles, "xla scan": None}.items():
            f = (
                scan(k)
                if how == "xla scan"
                else functools.partial(topk.topk, k=k, implementation="pallas_gpu", tile=tile, interpret=interpret)
            )
            cases.append(
                dict(table="topk", n=n, m=m, k=k, how=how, f=f, args=args, peak="flops32")
                | dict(flops=2 * n * m * width, bytes=args[1].nbytes)
            )
        if run.smoke:
            break
    return cases


def sweep_attention(run: Run, interpret: bool) -> list[dict[str, Any]]:
    """Each kernel of attention alone, causal, over tiles."""
    Mosaic = attention_mosaic.Tile
    batch, length, heads, cases = 4, 4096, 16, []
    if run.smoke:
        batch, length, heads = 1, 64, 2
    for size in (64, 128):
        q, k, v, do = (draw((batch, length, heads, size), BF16, i) for i in range(4))
        lse, delta = jnp.full((batch, heads, length), 8.0), jnp.zeros((batch, heads, length))
        x, rules = attention.operands(q, k, v, causal=True)
        x = {**x, "do": do, "lse": lse, "delta": delta}
        pairs = batch * heads * length**2 / 2
        forward = {  # the best of those that were tried, the default first
            64: [(64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 4, 3)],
            128: [(128, 64, 4, 2), (128, 64, 8, 3), (64, 64, 4, 3)],
        }[size]
        mosaic = {
            64: [Mosaic(stages=4), Mosaic(64, stages=4), Mosaic(64, rows=128, stages=4)],
            128: [Mosaic(), Mosaic(64, stages=4)],
        }[size]
        back = [(64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2), (128, 64, 8, 2), (32, 64, 4, 3), (128, 128, 8, 1)]
        for part, tiles, products in (("forward", forward, 2), ("dq", back, 3), ("dkv", back, 4)):
            function = {
                "forward": attention_gpu.forward,
                "dq": attention_gpu.backward_queries,
                "dkv": attention_gpu.backward_keys,
            }[part]
            used = ("q", "k", "v") if part == "forward" else tuple(x)
            tiles = {
                f"{q}x{k} {warps} warps {stages} stages": attention_gpu.Tile(q, k, warps, stages)
                for q, k, warps, stages in (tiles[:1] if run.smoke else tiles)
            }
            if part == "forward" and not interpret:
                tiles |= {f"Mosaic {t.groups} groups of {t.rows}, {t.k} keys, {t.stages} buffers": t for t in mosaic}
            for how, tile in tiles.items():
                f = lambda y, function=function, tile=tile, size=size, rules=rules: function(
                    y, rules, size**-0.5, tile, interpret
                )
                cases.append(
                    dict(table="sweep", part=part, size=size, how=how, f=f)
                    | dict(args=[{n: x[n] for n in used}], flops=2 * products * pairs * size, bytes=4 * q.nbytes)
                )
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--only", default="parity,attention,sums,decode,mla,retention,topk")
    parser.add_argument("--parity", default="", help="check only names that hold this")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--seconds", type=float, default=140, help="no case is begun later")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, interpreted: does the script run?")
    args = parser.parse_args()
    run = Run(args.out, args.seconds, args.smoke)
    run.sweep, run.parity = args.sweep, args.parity
    device = jax.devices()[0]
    versions = {"jax": jax.__version__, "python": sys.version.split()[0]}
    run.line(device=device.device_kind, platform=device.platform, **versions, date=str(datetime.date.today()))
    tables = {
        "attention": attention_cases,
        "sums": sums_cases,
        "decode": decode_cases,
        "mla": mla_cases,
        "retention": retention_cases,
        "topk": topk_cases,
        "sweep": sweep_attention,
    }
    chosen = args.only.split(",") + (["sweep"] if args.sweep else [])
    if "parity" in chosen:
        parity_attention(run, args.smoke)
        parity_rest(run, args.smoke)
    measure(run, [tables[name] for name in chosen if name != "parity"])
    run.line(done=True)
    os._exit(0)  # whatever is still being compiled is not waited for


if __name__ == "__main__":
    main()
