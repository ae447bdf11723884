"""Attention takes a kernel exactly when nobody looks at its probabilities; the kernels run in the interpreter here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformers import nn, search, sites
from jaxformers.kernels import attention_gpu
from jaxformers.nn import attention as module
from jaxformers.nn import mla


@pytest.fixture
def gpu(monkeypatch):
    """As on a GPU, with kernels worth while at any length, and interpreted; the list says which ones ran."""
    calls = []

    def record(name, f, **settings):
        return lambda *a, **kw: calls.append(name) or f(*a, **(kw | settings))

    tiles = attention_gpu.Tiles(*3 * [attention_gpu.Tile(16, 16)])
    flash = functools.partial(module.kernel.attention, tiles=tiles, interpret=True)
    one = functools.partial(module.decode.decode, implementation="pallas_gpu", interpret=True)
    latent = functools.partial(mla.mla_decode, implementation="pallas_gpu", interpret=True)
    monkeypatch.setattr(module, "platform", lambda: "gpu")
    monkeypatch.setattr(module.kernel, "choose", lambda x, rules, **_: "pallas_gpu")
    monkeypatch.setattr(module.kernel, "attention", record("flash", flash))
    monkeypatch.setattr(module.kernel, "WORTH", 1)
    monkeypatch.setattr(module.decode, "decode", record("decode", one))
    monkeypatch.setattr(module.decode, "choose", lambda slots: "pallas_gpu")
    monkeypatch.setattr(mla, "mla_decode", record("latent", latent))
    return calls


def draw(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


VALID = jnp.asarray(np.random.default_rng(9).random((2, 21)) < 0.7).at[:, 0].set(True)
MASKS = {
    "none": None,
    "padding": nn.Mask(valid=VALID),
    "causal padding window": nn.Mask(valid=VALID.astype(int), causal=True, window=9, start=jnp.int32(4)),
    "prefix": nn.Mask(causal=True, prefix=jnp.array([3, 19]), start=4),
}


@pytest.mark.parametrize("mask", MASKS)
def test_flash_equals_xla(gpu, monkeypatch, mask):
    q, k, v, bias = draw((2, 17, 4, 16), 0), draw((2, 21, 2, 16), 1), draw((2, 21, 2, 16), 2), draw((1, 4, 17, 21), 3)
    attend = lambda q, k, v: nn.attend(q, k, v, mask=MASKS[mask], bias=bias, scale=0.3, path="a")
    found = attend(q, k, v)
    assert gpu == ["flash"]
    monkeypatch.setattr(module, "platform", lambda: "cpu")
    expected = attend(q, k, v)
    assert gpu == ["flash"]
    seen = np.ones((2, 17), bool)
    if MASKS[mask] is not None:  # what a query without keys gives has no meaning
        seen = np.broadcast_to(MASKS[mask].dense(17, 21), (2, 1, 17, 21)).any(-1)[:, 0]
    assert np.abs(found - expected)[seen].max() < 1e-5


def test_one_query_is_decoded(gpu, monkeypatch):
    q, k, v = draw((2, 1, 4, 16), 0), draw((2, 21, 2, 16), 1), draw((2, 21, 2, 16), 2)
    mask = nn.Mask(valid=VALID, causal=True, start=jnp.int32(12), window=8)
    found = jax.jit(lambda *a: nn.attend(*a, mask=mask))(q, k, v)
    assert gpu == ["decode"]
    monkeypatch.setattr(module, "platform", lambda: "cpu")
    assert np.abs(found - nn.attend(q, k, v, mask=mask)).max() < 1e-5


def test_whoever_looks_or_drops_out_gets_xla(gpu):
    q = draw((1, 5, 2, 16), 0)
    attend = lambda q: nn.attend(q, q, q, path="a")
    for pattern in ("a.scores", "a.probs", "**"):
        sites.reap(attend, pattern)(q)
        sites.edit(attend, {pattern: lambda x: x})(q)
    nn.attend(q, q, q, path="a", rate=0.5, key=jax.random.key(0))
    assert gpu == []
    nn.attend(q, q, q, path="a", rate=0.5)  # no key: no dropout
    sites.reap(lambda q: sites.site("b.context", attend(q)), "b.context")(q)
    assert gpu == ["flash", "flash"]


def test_latent_attention_reads_its_cache_once(gpu, monkeypatch):
    rotary = nn.rotary_table(nn.Rotary(4), jnp.arange(6)[None])
    layer = mla.LatentAttention(
        16, 2, query_rank=None, rank=8, nope=6, rope=4, value_size=8, decode="absorbed", rngs=nnx.Rngs(0)
    )
    layer.path = "a"
    x = draw((2, 6, 16), 0)

    def steps():
        cache, outs = layer.empty_cache(2, 7, jnp.float32), []
        for i in range(6):
            here = tuple(t[:, i : i + 1] for t in rotary)
            mask = nn.Mask(causal=True, start=i)
            out, cache = layer(x[:, i : i + 1], mask=mask, rotary=here, cache=cache)
            outs.append(out)
        return jnp.concatenate(outs, 1)

    found = steps()
    assert gpu == 6 * ["latent"]
    monkeypatch.setattr(module.decode, "choose", lambda slots: "xla")
    monkeypatch.setattr(module, "platform", lambda: "cpu")
    assert np.abs(found - steps()).max() < 1e-5


def test_search_by_the_kernel(monkeypatch):
    queries, keys = (np.random.default_rng(i).integers(-2, 3, (n, 6)) for i, n in ((0, 30), (1, 100)))
    expected = search.topk(queries, keys, 4, query_block=16, key_block=32)
    run, calls = functools.partial(search.kernel.topk, implementation="pallas_gpu", interpret=True), []
    monkeypatch.setattr(search.kernel, "choose", lambda keys, k: "pallas_gpu")
    monkeypatch.setattr(search.kernel, "topk", lambda *a, **kw: calls.append(1) or run(*a, **kw))
    for found in (
        search.topk(queries, keys, 4, query_block=17, key_block=64),  # shapes that were not compiled above
        search.topk(queries, keys, 4, query_block=18, key_block=16, mesh=jax.make_mesh((4,), ("data",))),
    ):
        for a, b in zip(found, expected, strict=True):
            assert np.array_equal(a, b)
    assert len(calls) == 2
