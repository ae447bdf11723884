"""The Hopper kernel of attention: it lowers, and its schedule is right and free of races under JAX's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu
from jax.sharding import AbstractDevice
from kernels import aot

from jaxformers.kernels import attention, attention_gpu, attention_mosaic
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


def test_vectorized(interpreter):
    rng = np.random.default_rng(0)
    shapes = (2, 1, 128, 2, 64), (2, 1, 256, 1, 64), (2, 1, 256, 1, 64)
    q, k, v = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes)
    f = lambda q, k, v: forward(q, k, v, causal=True, scale=0.1, start=128, interpret=interpreter)[0]
    for found, *args in zip(jax.vmap(f)(q, k, v), q, k, v, strict=True):
        expected, _ = reference(*args, True, 0.1, 128)
        assert np.abs(np.asarray(found, np.float32) - expected).max() < 5e-3 * np.abs(expected).max()


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


A100 = AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")


def test_the_choice():
    """On Hopper attention with a log-sum-exp takes it, and Triton's backward pass; elsewhere Triton's forward pass."""

    def kernels(device=aot.H100, size=64, dtype=jnp.bfloat16, queries=1024, **how):
        q = jax.ShapeDtypeStruct((1, queries, 4, size), dtype)
        k = jax.ShapeDtypeStruct((1, 1024, 2, size), dtype)

        def loss(q, k, v):
            out, lse = attention.attention(q, k, v, return_lse=True, **how)
            return out.astype(jnp.float32).sum() + lse.sum()

        text = aot.lower_for_cuda(jax.grad(loss, argnums=(0, 1, 2)), q, k, k, device=device)
        assert "dq_kernel" in text and "dkv_kernel" in text
        found = {"mosaic": "mosaic_gpu" in text, "triton": "forward_kernel" in text}
        assert sum(found.values()) == 1
        return next(name for name in found if found[name])

    assert kernels() == kernels(causal=True) == kernels(causal=True, size=128, dtype=jnp.float16) == "mosaic"
    assert kernels(causal=True, queries=512, start=512) == "mosaic"
    assert kernels(device=A100, causal=True) == "triton"
    valid = jnp.ones((1, 1024), bool)
    for other in (
        {"window": 99},
        {"valid": valid},
        {"prefix": jnp.ones(1, int)},
        {"segments": jnp.ones((1, 1024), int)},
    ):
        assert kernels(causal=True, **other) == "triton"
    assert kernels(bias=jnp.zeros((1, 1, 1024, 1024))) == "triton"
    assert kernels(size=96) == kernels(dtype=jnp.float32) == kernels(queries=1000) == "triton"
    assert kernels(causal=True, start=jnp.int32(0)) == kernels(causal=True, start=-128) == "triton"
    pinned = attention_gpu.default_tiles(64, jnp.bfloat16)
    assert kernels(tiles=pinned) == "triton"


def test_a_mask_that_it_lacks_is_refused():
    q, backward = jnp.zeros((1, 128, 2, 64), jnp.bfloat16), attention_gpu.Tile(16, 16)
    tiles = attention_gpu.Tiles(Tile(), backward, backward)
    for how in ({"window": 9}, {"start": jnp.int32(0)}, {"interpret": True}, {"valid": jnp.ones((1, 128), bool)}):
        with pytest.raises(ValueError, match="only causal masks of whole tiles"):
            attention.attention(q, q, q, causal=True, implementation="pallas_gpu", tiles=tiles, **how)
