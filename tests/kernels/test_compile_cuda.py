"""The GPU kernels that are chosen on an H100, compiled to its machine code where JAX's plugin for CUDA is installed."""

import pytest
from kernels import aot

PRELUDE = """
import jax, jax.numpy as jnp, numpy as np
from jaxformers.kernels import attention, decode, mla, planes, planes_layout, retention, topk

S = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype)
cases = {}
"""

LOWBIT = """
for bits, ternary in ((2, False), (3, False), (4, False), (8, False), (2, True)):
    for m in (1, 16, 64, 256, 1024):
        k, n, group = 4096, 1000, 128
        plane = planes_layout.plane_of(group, k // group, bits)
        shape = planes_layout.Shape(m, k, n, bits, group, k // group, plane, ternary)
        tables = S(k // group, n, dtype="int32"), S(k // group, n, dtype="float32") if ternary else None
        made = planes_layout.Planes(S(*shape.cells, dtype="int16"), *tables)
        f = lambda x, made, bits=bits: planes.matmul(x, made, bits=bits, k=4096, group_size=128, implementation="gpu")
        cases[f"{bits} bits, ternary={ternary}, m={m}"] = (f, (S(m, k), made))
"""

ATTENTION = """
def with_gradient(f):
    return jax.grad(lambda *a: f(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2))

for size in (64, 128):
    f = lambda q, k, v: attention.attention(q, k, v, causal=True, implementation="pallas_gpu")
    cases[f"attention, {size}"] = (with_gradient(f), (S(1, 1024, 8, size), S(1, 1024, 2, size), S(1, 1024, 2, size)))
    g = lambda q, k, v: attention.attention(q, k, v, causal=True, window=100, implementation="pallas_gpu")
    cases[f"window, {size}"] = (with_gradient(g), (S(1, 1000, 8, size),) * 3)
    for dtype in ("bfloat16", "float32"):
        decay = np.log(1 - 2.0 ** -(5 + np.arange(8.0)))
        h = lambda q, k, v: retention.retention(q, k, v, decay, implementation="pallas_gpu")[0]
        cases[f"retention, {size}, {dtype}"] = (with_gradient(h), (S(2, 1000, 8, size, dtype=dtype),) * 3)
cases["decoding"] = (
    lambda q, k, v: decode.decode(q, k, v, implementation="pallas_gpu"),
    (S(8, 32, 128), S(8, 8, 4096, 128), S(8, 8, 4096, 128)),
)
cases["latent attention"] = (
    lambda q, r, c: mla.mla_decode(q, r, c, scale=0.05, implementation="pallas_gpu"),
    (S(8, 32, 512), S(8, 32, 64), S(8, 4096, 576)),
)
cases["top-k"] = (
    lambda q, k: topk.topk(q, k, k=10, implementation="pallas_gpu"),
    (S(1024, 384, dtype="float32"), S(8192, 384, dtype="float32")),
)
"""


@pytest.mark.parametrize("snippet", [LOWBIT, ATTENTION], ids=["low-bit", "attention"])
def test_the_chosen_kernels_compile_for_an_h100(snippet):
    found = aot.compile_for_cuda(PRELUDE + snippet, timeout=300)
    assert len(found) == (25 if snippet is LOWBIT else 11)
    assert all(case["kernels"] > 0 for case in found.values()), found
