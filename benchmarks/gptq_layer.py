"""GPTQ of one linear layer: this library against the plain column algorithm in PyTorch, on the same CPU in one run.

    python benchmarks/gptq_layer.py [--repeat 5] [--out benchmarks/results/gptq_layer.json]

The baseline is algorithm 1 of the paper as it is usually written: factorise, invert, factorise again, then a Python
loop over columns within blocks of 128. Both start from the same kernel and Hessian and must agree on the integers.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxformers.compress.columns import dense, solve
from jaxformers.compress.grids import Grid

SHAPES = ((768, 3072), (3072, 768))  # (in, out)


def torch_grid(x, maxq):
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -torch.ones_like(low), low), torch.where(empty, torch.ones_like(high), high)
    scale = (high - low) / maxq
    return scale[:, None], torch.round(-low / scale)[:, None]


def torch_solve(W, H, bits, group_size, damp=0.01, blocksize=128):
    W, H, maxq = W.clone(), H.clone(), 2**bits - 1
    out, n = W.shape
    scale, zero = torch_grid(W, maxq)
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(damp * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q, losses = torch.zeros_like(W), torch.zeros_like(W)
    for i1 in range(0, n, blocksize):
        i2 = min(i1 + blocksize, n)
        W1, U1, E = W[:, i1:i2].clone(), U[i1:i2, i1:i2], torch.zeros(out, i2 - i1)
        for i in range(i2 - i1):
            w, d = W1[:, i], U1[i, i]
            if group_size != -1 and (i1 + i) % group_size == 0:
                scale, zero = torch_grid(W[:, i1 + i : i1 + i + group_size], maxq)
            q = torch.clamp(torch.round(w[:, None] / scale) + zero, 0, maxq)
            q = (scale * (q - zero)).flatten()
            Q[:, i1 + i] = q
            losses[:, i1 + i] = (w - q) ** 2 / d**2
            e = (w - q) / d
            W1[:, i:] -= e[:, None].matmul(U1[i, i:][None])
            E[:, i] = e
        W[:, i2:] -= E.matmul(U[i1:i2, i2:])
    return Q, losses.sum().item() / 2


def timed(f, repeat):
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        result = f()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def measure(n, out, bits, group_size, repeat):
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((n, n)).astype(np.float32) / n**0.5 + np.eye(n, dtype=np.float32)
    X = rng.standard_normal((2 * n, n)).astype(np.float32) @ mix
    H, kernel = X.T @ X / n, 0.02 * rng.standard_normal((n, out)).astype(np.float32)
    grid = Grid(bits)
    K, HJ, WT, HT = jnp.asarray(kernel), jnp.asarray(H), torch.tensor(kernel.T.copy()), torch.tensor(H)

    start = time.perf_counter()
    compiled = solve.lower(K, HJ, 0.01, grid=grid, group_size=group_size).compile()
    compile_s = time.perf_counter() - start

    def ours():
        return jax.block_until_ready(compiled(K, HJ, 0.01, grid=grid))

    ours(), torch_solve(WT, HT, bits, group_size)
    # alternate, so that whatever else the machine does falls on both
    pairs = [(timed(ours, 1), timed(lambda: torch_solve(WT, HT, bits, group_size), 1)) for _ in range(repeat)]
    jax_s, torch_s = (statistics.median(p[k][0] for p in pairs) for k in (0, 1))
    (_, solved), (_, (Q, loss)) = pairs[-1]
    step = np.asarray(solved.scales[solved.g_idx]) / 2
    same = float((np.abs(np.asarray(dense(grid, solved)) - Q.numpy().T) < step).mean())
    return {
        "in": n,
        "out": out,
        "bits": bits,
        "group_size": group_size,
        "jaxformers_s": round(jax_s, 4),
        "torch_s": round(torch_s, 4),
        "ratio": round(jax_s / torch_s, 3),
        "compile_s": round(compile_s, 2),
        "equal_integers": round(same, 5),
        "loss_ratio": round(float(solved.loss) / loss, 6),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    torch.set_grad_enabled(False)
    rows = [measure(n, out, 4, g, args.repeat) for n, out in SHAPES for g in (-1, 128)]
    for row in rows:
        print("  ".join(f"{k}={v}" for k, v in row.items()))
    if args.out:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        versions = {"jax": jax.__version__, "torch": torch.__version__}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine, **versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
