"""The Hopper kernel of attention: it lowers, and its schedule is right and free of races under JAX's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu
from kernels import aot

from jaxformers.kernels import attention_mosaic
from jaxformers.kernels.attention_mosaic import Tile, forward, takes


class Accumulator:
    """The interpreter knows accumulators only as far as ``acc += a[...] @ b[...]``: here they are values."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype, self.value = shape, dtype, jnp.zeros(shape, dtype)

    def __getitem__(self, _):
        return self.value

    def __setitem__(self, _, value):
        self.value = value


class Emulated:
    """A module, some of its functions replaced."""

    def __init__(self, module, **replaced):
        self.module, self.replaced = module, replaced

    def __getattr__(self, name):
        return self.replaced[name] if name in self.replaced else getattr(self.module, name)


@pytest.fixture
def interpreter(monkeypatch):
    if not hasattr(mosaic_gpu, "InterpretGPUParams"):
        pytest.skip("this version of JAX has no interpreter of such kernels")
    wide = lambda a: a[...].astype(jnp.float32)

    def wgmma(acc, a, b):
        acc.value = acc.value + jnp.dot(wide(a), wide(b))

    def arrive(barrier):  # products read memory as copies do; here they are ordinary reads, which need a fence between
        mosaic_gpu.commit_smem()
        mosaic_gpu.barrier_arrive(barrier)

    emulated = Emulated(
        attention_mosaic.plmgpu,
        ACC=Accumulator,
        wgmma=wgmma,
        wgmma_accumulator_load=lambda acc, wait_n: acc.value,
        wgmma_wait=lambda n: None,
        barrier_arrive=arrive,
    )
    monkeypatch.setattr(attention_mosaic, "plmgpu", emulated)
    pl = Emulated(attention_mosaic.pl, run_scoped=lambda f, *accumulators: f(*accumulators))
    monkeypatch.setattr(attention_mosaic, "pl", pl)
    monkeypatch.setattr(attention_mosaic, "_add_product", lambda acc, p, v: acc + jnp.dot(wide(p), wide(v)))
    monkeypatch.setattr(attention_mosaic, "_settle", lambda sums: None)
    return mosaic_gpu.InterpretGPUParams(detect_races=True)


def reference(q, k, v, causal, scale, start):
    q, k, v = (np.asarray(x, np.float32) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    s = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if causal:
        s = np.where(np.arange(s.shape[2])[:, None] + start >= np.arange(s.shape[3]), s, -np.inf)
    top = s.max(axis=-1, keepdims=True)
    p = np.exp(s - top)
    total = p.sum(axis=-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", p / total, v), (top + np.log(total))[..., 0]


CASES = [  # size, queries, keys, start, tile, causal
    (64, 256, 256, 0, Tile(), True),
    (64, 128, 256, 0, Tile(k=64, stages=4), False),
    (64, 256, 256, 0, Tile(k=64, rows=128, groups=1), True),
    (64, 384, 512, 64, Tile(groups=3), True),
    (128, 256, 512, 128, Tile(stages=1), False),
]


@pytest.mark.parametrize("size,queries,keys,start,tile,causal", CASES)
def test_interpreted(interpreter, size, queries, keys, start, tile, causal):
    rng = np.random.default_rng(0)
    shapes = (1, queries, 2, size), (1, keys, 1, size), (1, keys, 1, size)
    q, k, v = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes)
    out, lse = forward(q, k, v, causal=causal, scale=size**-0.5, start=start, tile=tile, interpret=interpreter)
    expected, expected_lse = reference(q, k, v, causal, size**-0.5, start)
    assert np.abs(np.asarray(out, np.float32) - expected).max() < 5e-3 * np.abs(expected).max()
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size,queries,keys,start,tile,causal", CASES)
def test_lowers(size, queries, keys, start, tile, causal, dtype):
    q = jax.ShapeDtypeStruct((2, queries, 4, size), dtype)
    k = jax.ShapeDtypeStruct((2, keys, 2, size), dtype)
    f = lambda q, k, v: forward(q, k, v, causal=causal, scale=0.1, start=start, tile=tile)
    assert "mosaic_gpu" in aot.lower_for_cuda(f, q, k, k)


def test_takes():
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    q, k = array(1, 256, 4, 64), array(1, 512, 2, 64)
    whole = dict(causal=True, scale=0.1, tile=Tile())
    assert (
        takes(q, k, k, **whole) and takes(q, k, k, **whole | {"start": 256}) and takes(q, k, k, causal=True, scale=0.1)
    )
    assert not takes(q, k, k, **whole | {"start": 320})  # beyond the last key
    assert not takes(q, k, k, **whole | {"start": 32})  # the mask would cut more tiles
    assert not takes(q, k, k, **whole | {"scale": 0.0})
    assert not takes(q, k, k, **whole | {"tile": Tile(stages=8)})  # shared memory
    assert not takes(array(1, 200, 4, 64), k, k, **whole)
    assert not takes(array(1, 256, 3, 64), k, k, **whole)
    assert not takes(array(1, 256, 4, 64, dtype=jnp.float32), k, k, **whole)
    assert not takes(q, k, array(1, 512, 2, 128), **whole)
    with pytest.raises(ValueError, match="queries by 128"):
        forward(array(1, 200, 4, 64), k, k, causal=True, scale=0.1, tile=Tile())
