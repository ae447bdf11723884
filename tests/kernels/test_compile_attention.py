"""The TPU kernels of attention, decoding, retention and top-k compile for TPUs that are not here."""

import pytest
from kernels import aot

TPU = """
import jax, jax.numpy as jnp
from jaxformers.kernels.attention import attention, column_sums
from jaxformers.kernels.decode import decode
from jaxformers.kernels.mla import mla_decode
from jaxformers.kernels.retention import retention
from jaxformers.kernels.topk import topk

S, bf16, f32 = jax.ShapeDtypeStruct, jnp.bfloat16, jnp.float32

def everything(q, k, v, bias, valid, prefix):
    mask = dict(causal=True, window=200, valid=valid, prefix=prefix)
    def loss(q, k, v, bias):
        out, lse = attention(q, k, v, bias=bias, return_lse=True, implementation="pallas_tpu", **mask)
        return out.astype(f32).sum() + lse.sum(), lse
    grads, lse = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, bias)
    return grads, column_sums(q, k, lse, lse, implementation="pallas_tpu", **mask)

def plain(q, k, v):
    return attention(q, k, v, causal=True, implementation="pallas_tpu")

def retain(q, k, v, decay, state):
    out, last = retention(q, k, v, decay, state=state, implementation="pallas_tpu")
    return out.astype(f32).sum() + last.sum()

def retained(dtype, key, value):
    args = S((2, 300, 4, key), dtype), S((2, 300, 4, key), dtype), S((2, 300, 4, value), dtype)
    return jax.grad(retain, argnums=(0, 1, 2, 3, 4)), (*args, S((4,), f32), S((2, 4, key, value), f32))

q, k = S((2, 600, 4, 64), bf16), S((2, 600, 2, 64), bf16)
keys, mask = S((4, 4, 3000, 128), bf16), S((4, 3000), jnp.bool_)
cases = {
    "attention": (everything, (q, k, k, S((1, 4, 600, 600), bf16), S((2, 600), jnp.bool_), S((2,), jnp.int32))),
    "attention float32": (plain, 3 * (S((1, 1024, 2, 128), f32),)),
    "decode": (lambda q, k, v, m: decode(q, k, v, allowed=m, implementation="pallas_tpu"),
               (S((4, 12, 128), bf16), keys, keys, mask)),
    "latent": (lambda q, r, c, m: mla_decode(q, r, c, scale=0.1, valid=m, implementation="pallas_tpu"),
               (S((4, 32, 512), bf16), S((4, 32, 64), bf16), S((4, 3000, 576), bf16), mask)),
    "retention": retained(bf16, 50, 100),
    "retention float32": retained(f32, 64, 128),
    "topk": (lambda q, k: topk(q, k, 10, implementation="pallas_tpu"), (S((500, 384), f32), S((50_000, 384), f32))),
}
"""
KERNELS = {"attention": 5, "attention float32": 1, "decode": 1, "latent": 1, "retention": 2, "retention float32": 2}


@pytest.mark.parametrize("topology", aot.TOPOLOGIES)
def test_compiles_for_tpu(topology):
    found = aot.compile_for_tpu(TPU, topology)
    assert {name: r["kernels"] for name, r in found.items()} == KERNELS | {"topk": 1}
