"""The helpers themselves: a good kernel passes, a bad one is an error, an abort is a skip."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from kernels import aot

SNIPPET = """
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl

def double(x_ref, y_ref):
    y_ref[...] = 2 * x_ref[...]

def bad(x_ref, y_ref):
    y_ref[...] = jnp.sort(x_ref[...], axis=1)

x = jax.ShapeDtypeStruct((128, 128), jnp.float32)
call = lambda kernel: lambda x: pl.pallas_call(kernel, out_shape=x)(x)
cases = {"double": (call(double), (x,))}
"""


def test_tpu_compile():
    found = aot.compile_for_tpu(SNIPPET, "v5e")["double"]
    assert found["kernels"] == 1 and found["arguments"] == 128 * 128 * 4


def test_tpu_rejection_is_a_failure():
    with pytest.raises(AssertionError, match="bad"):
        aot.compile_for_tpu(SNIPPET + "\ncases['bad'] = (call(bad), (x,))", "v5e")


def test_tpu_abort_is_a_skip():
    with pytest.raises(pytest.skip.Exception, match="aborted"):
        aot.compile_for_tpu("import os\ncases = {'abort': (lambda: os.abort(), ())}", "v5e")
    with pytest.raises(pytest.skip.Exception, match="more than 1 s"):
        aot.compile_for_tpu("import time\ntime.sleep(60)", "v5e", timeout=1)


def test_cuda_lowering():
    from jax.experimental.pallas import triton as plgpu

    def double(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...]

    x = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    call = lambda x: pl.pallas_call(double, out_shape=x, compiler_params=plgpu.CompilerParams(num_warps=4))(x)
    assert "triton" in aot.lower_for_cuda(call, x)
    with pytest.raises(Exception, match="power of 2"):
        aot.lower_for_cuda(call, jax.ShapeDtypeStruct((128, 100), jnp.float32))
