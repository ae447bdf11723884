"""One new token against a cache: the kernels in the interpreter against the reference, and that against attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import aot

from jaxformers.kernels import attention, decode
from jaxformers.kernels.mla import mla_decode

KERNELS = {"pallas_gpu": decode.Tile(16, 16, 3), "pallas_tpu": None}


def draw(shape, seed, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def visible(batch, slots, seed=9):
    """Random slots, none behind a random last one; the first sequence of several sees none at all."""
    rng = np.random.default_rng(seed)
    allowed = (rng.random((batch, slots)) < 0.6) & (np.arange(slots) < rng.integers(1, slots + 1, (batch, 1)))
    allowed[0] &= batch == 1
    return jnp.asarray(allowed)


def test_reference_is_attention():
    q, k, v, allowed = draw((3, 6, 8), 0), draw((3, 2, 11, 8), 1), draw((3, 2, 11, 5), 2), visible(3, 11)
    expected = attention.attention(q[:, None], k.swapaxes(1, 2), v.swapaxes(1, 2), valid=allowed, implementation="xla")[
        :, 0
    ]
    out = decode.decode(q, k, v, allowed=allowed, implementation="xla")
    assert np.abs(out - expected).max() < 1e-6 and (out[0] == 0).all()


@settings(max_examples=4)
@given(
    how=st.sampled_from(sorted(KERNELS)),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 4, 20]),
    slots=st.integers(1, 150),
    sizes=st.sampled_from([(24, 40), (64, 64), (16, 8)]),
    masked=st.booleans(),
)
def test_decode(how, batch, kv_heads, group, slots, sizes, masked):
    q, k = draw((batch, kv_heads * group, sizes[0]), 0), draw((batch, kv_heads, slots, sizes[0]), 1)
    v, allowed = draw((batch, kv_heads, slots, sizes[1]), 2), visible(batch, slots) if masked else None
    expected = decode.decode(q, k, v, allowed=allowed, implementation="xla")
    found = decode.decode(q, k, v, allowed=allowed, implementation=how, tile=KERNELS[how], interpret=True)
    assert np.abs(found - expected).max() < 1e-5


@settings(max_examples=4)
@given(
    how=st.sampled_from(sorted(KERNELS)),
    heads=st.sampled_from([3, 16, 20]),
    rank=st.sampled_from([48, 64]),
    rope=st.sampled_from([8, 32]),
    slots=st.integers(1, 150),
    masked=st.booleans(),
)
def test_latent(how, heads, rank, rope, slots, masked):
    q, turned, cache = draw((2, heads, rank), 0), draw((2, heads, rope), 1), draw((2, slots, rank + rope), 2)
    valid = visible(2, slots) if masked else None
    expected = mla_decode(q, turned, cache, scale=0.2, valid=valid, implementation="xla")
    # the definition once more: the cache is the only key, and its first columns the only value
    whole = decode.decode(
        jnp.concatenate([q, turned], -1), cache[:, None], cache[:, None, :, :rank], allowed=valid, scale=0.2
    )
    assert np.abs(expected - whole).max() < 1e-5
    found = mla_decode(q, turned, cache, scale=0.2, valid=valid, implementation=how, tile=KERNELS[how], interpret=True)
    assert np.abs(found - expected).max() < 1e-5


def test_bfloat16():
    q, k, v = draw((2, 8, 64), 0, jnp.bfloat16), *(draw((2, 2, 90, 64), i, jnp.bfloat16) for i in (1, 2))
    exact = decode.decode(*(a.astype(jnp.float32) for a in (q, k, v)), implementation="xla")
    for how, tile in {"xla": None, **KERNELS}.items():
        found = decode.decode(q, k, v, implementation=how, tile=tile, interpret=True)
        assert found.dtype == jnp.bfloat16 and np.abs(found - exact).max() < 1e-2


def test_gradients():
    """Of a single trained query, such as one that pools: those of the reference, through the kernel."""
    q, k, v, allowed = draw((2, 4, 16), 0), draw((2, 2, 33, 16), 1), draw((2, 2, 33, 16), 2), visible(2, 33)
    run = lambda how: lambda *a: (decode.decode(*a, allowed=allowed, implementation=how, interpret=True) ** 2).sum()
    for a, b in zip(*(jax.grad(run(how), argnums=(0, 1, 2))(q, k, v) for how in ("pallas_gpu", "xla")), strict=True):
        assert np.abs(a - b).max() < 1e-5 and np.abs(b).max() > 0.1
    cache = draw((2, 33, 24), 3)
    one = lambda how: lambda q, r, c: mla_decode(q, r, c, scale=0.2, implementation=how, interpret=True).sum()
    args = draw((2, 4, 16), 4), draw((2, 4, 8), 5), cache
    for a, b in zip(*(jax.grad(one(how), argnums=(0, 1, 2))(*args) for how in ("pallas_gpu", "xla")), strict=True):
        assert np.abs(a - b).max() < 1e-5 and np.abs(b).max() > 0.1


def test_lowers_for_cuda():
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((4, 3000), bool)
    run = functools.partial(decode.decode, implementation="pallas_gpu")
    args = shape((4, 12, 80)), shape((4, 4, 3000, 80)), shape((4, 4, 3000, 80)), mask
    assert "decode_kernel" in aot.lower_for_cuda(lambda q, k, v, m: run(q, k, v, allowed=m), *args)
    latent = functools.partial(mla_decode, implementation="pallas_gpu", scale=0.1)
    for rank, heads in ((48, 32), (512, 128), (816, 24)):
        args = shape((4, heads, rank)), shape((4, heads, 64)), shape((4, 3000, rank + 64)), mask
        assert "decode_kernel" in aot.lower_for_cuda(lambda q, r, c, m: latent(q, r, c, valid=m), *args)


def test_the_choice(monkeypatch):
    for where, expected in (("cpu", "xla"), ("tpu", "xla"), ("gpu", "pallas_gpu")):
        monkeypatch.setattr(decode, "platform", lambda where=where: where)
        monkeypatch.setattr(decode, "partitioned", lambda: False)
        assert decode.choose(4096) == expected and decode.choose(100) == "xla"
    monkeypatch.setattr(decode, "partitioned", lambda: True)
    assert decode.choose(4096) == "xla"


def test_what_does_not_fit_is_refused():
    q, k = jnp.zeros((2, 4, 8)), jnp.zeros((2, 2, 9, 8))
    for changed, message in (
        ({"k": jnp.zeros((2, 2, 9, 7))}, "k, v: expected"),
        ({"v": jnp.zeros((2, 2, 8, 8))}, "k, v: expected"),
        ({"q": jnp.zeros((2, 3, 8))}, "3 heads are no multiple of 2"),
        ({"allowed": jnp.ones((2, 8), bool)}, "allowed: expected"),
        ({"implementation": "cudnn"}, "implementation: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            decode.decode(**({"q": q, "k": k, "v": k} | changed))
    cache = jnp.zeros((2, 9, 10))
    for changed, message in (
        ({"q_rope": jnp.zeros((2, 3, 2))}, "q_rope: expected"),
        ({"cache": jnp.zeros((2, 9, 9))}, "cache: expected"),
        ({"valid": jnp.ones((2, 8), bool)}, "valid: expected"),
        ({"implementation": "cudnn"}, "implementation: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            mla_decode(**({"q_latent": q, "q_rope": q[..., :2], "cache": cache, "scale": 1.0} | changed))
