"""Flash attention for GPU and TPU against the reference, in the interpreter; the reference against loops in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import aot

from jaxformers.kernels import attention, attention_gpu, attention_tpu, tiles

SMALL = {
    "pallas_gpu": attention_gpu.Tiles(*3 * [attention_gpu.Tile(16, 16)]),
    "pallas_tpu": attention_tpu.Tiles(*3 * [attention_tpu.Tile(128, 128)]),
}


def draw(shape, seed, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def masks(seed, batch, queries, keys, names):
    rng = np.random.default_rng(seed)
    arrays = {
        "valid": rng.random((batch, keys)) < 0.7,
        "prefix": rng.integers(0, keys, batch),
        "segments": (np.sort(rng.integers(0, 3, (batch, queries))), np.sort(rng.integers(0, 3, (batch, keys)))),
        "causal": True,
        "window": max(1, keys // 3),
        "start": keys - queries,
    }
    return jax.tree.map(lambda a: a if isinstance(a, int) else jnp.asarray(a), {n: arrays[n] for n in names})


def loops(q, k, v, *, bias=None, causal=False, window=None, valid=None, prefix=None, segments=None, start=0):
    """The definition for one entry after the other, in float64: (out, log-sum-exp, probabilities)."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    (batch, queries, heads, size), keys, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    out, lse = np.zeros((batch, queries, heads, v.shape[3])), np.full((batch, heads, queries), -1e30)
    probs = np.zeros((batch, heads, queries, keys))
    for b, h, i in np.ndindex(batch, heads, queries):
        scores = {}
        for j in range(keys):
            seen = not causal or j <= i + start or (prefix is not None and j < prefix[b])
            seen &= not causal or window is None or i + start - j < window
            seen &= segments is None or segments[0][b, i] == segments[1][b, j]
            seen &= valid is None or bool(valid[b, j])
            if seen:
                extra = 0 if bias is None else bias[b % bias.shape[0], h % bias.shape[1], i, j]
                scores[j] = q[b, i, h] @ k[b, j, h // group] * size**-0.5 + extra
        if scores:
            lse[b, h, i] = np.log(sum(np.exp(s) for s in scores.values()))
            for j, s in scores.items():
                probs[b, h, i, j] = np.exp(s - lse[b, h, i])
                out[b, i, h] += probs[b, h, i, j] * v[b, j, h // group]
    return out, lse, probs


RULES = ["", "causal", "valid", "causal window", "causal prefix valid", "causal segments start", "causal window prefix"]


@pytest.mark.parametrize("rules", RULES)
def test_reference_equals_loops(rules):
    q, k, v, bias = draw((2, 7, 4, 5), 0), draw((2, 9, 2, 5), 1), draw((2, 9, 2, 3), 2), draw((1, 4, 7, 9), 3)
    mask = masks(4, 2, 7, 9, rules.split())
    expected, lse, probs = loops(q, k, v, bias=bias, **mask)
    out, found = attention.attention(q, k, v, bias=bias, return_lse=True, implementation="xla", **mask)
    assert np.abs(out - expected).max() < 2e-6 and np.abs(found - lse).max() < 2e-6
    votes = np.abs(draw((2, 4, 7), 5))
    sums = attention.column_sums(q, k, found, votes, bias=bias, implementation="xla", **mask)
    assert np.abs(sums - np.einsum("bhqk,bhq->bhk", probs, votes)).max() < 1e-5


def everything(how, args, mask, dtype=jnp.float32, **settings):
    """Output, log-sum-exp, gradients of a sum that weighs both, and column sums."""
    q, v = args[0], args[2]
    weight, votes = draw((*q.shape[:3], v.shape[3]), 7), jnp.abs(draw((q.shape[0], q.shape[2], q.shape[1]), 8))

    def loss(*args):
        args = [a.astype(dtype) for a in args]
        bias = args[3] if len(args) > 3 else None
        out, lse = attention.attention(*args[:3], bias=bias, return_lse=True, implementation=how, **mask, **settings)
        total = (out.astype(jnp.float32) * weight).sum() + (jnp.where(lse > -1e29, lse, 0.0) * votes).sum()
        sums = attention.column_sums(
            *(jax.lax.stop_gradient(a) for a in (*args[:2], lse)),
            votes,
            bias=None if bias is None else jax.lax.stop_gradient(bias),
            implementation=how,
            **mask,
            **settings,
        )
        return total, (out, lse, sums)

    grads, found = jax.jit(jax.grad(loss, argnums=tuple(range(len(args))), has_aux=True))(*args)
    return [np.asarray(a, np.float32) for a in (*found, *grads)]


# heads and key heads, sizes of keys and values, queries and keys, bias, rules: odd lengths, all features
CASES = {
    "all at once": ((4, 2), (24, 40), (37, 53), (1, 4), "causal window prefix valid start"),
    "plain, whole tiles": ((2, 2), (32, 32), (32, 48), None, ""),
    "causal": ((2, 1), (16, 16), (45, 45), None, "causal"),
    "own bias, packed": ((2, 2), (16, 16), (35, 35), (2, 1), "causal segments valid"),
}


@pytest.mark.parametrize("how", SMALL)
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_reference(how, case):
    (heads, kv_heads), (size, value), (queries, keys), bias, rules = CASES[case]
    if how == "pallas_tpu":  # more than one tile of 128
        queries, keys = queries * 4, keys * 4
    args = [draw((2, queries, heads, size), 0), draw((2, keys, kv_heads, size), 1), draw((2, keys, kv_heads, value), 2)]
    args += [draw((*bias, queries, keys), 3)] if bias else []
    mask = masks(4, 2, queries, keys, rules.split())
    expected = everything("xla", args, mask)
    for found, right in zip(everything(how, args, mask, tiles=SMALL[how], interpret=True), expected, strict=True):
        assert np.abs(found - right).max() <= 1e-5 * max(1.0, np.abs(np.where(np.abs(right) > 1e29, 0, right)).max())


@pytest.mark.parametrize("how", SMALL)
def test_bfloat16(how):
    args = [draw((1, 50, 4, 64), 0), draw((1, 50, 2, 64), 1), draw((1, 50, 2, 64), 2)]
    args = [a.astype(jnp.bfloat16).astype(jnp.float32) for a in args]
    expected = everything("xla", args, {"causal": True})
    found = everything(how, args, {"causal": True}, jnp.bfloat16, tiles=SMALL[how], interpret=True)
    for a, b in zip(found, expected, strict=True):  # eight bits, rounded a few times
        assert np.abs(a - b).max() <= 2e-2 * np.abs(b).max()


@settings(max_examples=4)
@given(
    how=st.sampled_from(sorted(SMALL)),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    size=st.sampled_from([8, 20, 33, 64]),
    queries=st.integers(1, 40),
    more=st.integers(0, 140),
    rules=st.sampled_from(["", "causal start", "causal window start", "valid", "causal start prefix"]),
)
def test_odd_shapes(how, batch, kv_heads, group, size, queries, more, rules):
    keys = queries + more
    q, k, v = (
        draw((batch, n, h, size), i) for i, (n, h) in enumerate([(queries, kv_heads * group)] + 2 * [(keys, kv_heads)])
    )
    mask = masks(queries, batch, queries, keys, rules.split())
    expected = attention.attention(q, k, v, implementation="xla", **mask)
    found = attention.attention(q, k, v, implementation=how, tiles=SMALL[how], interpret=True, **mask)
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("how", ["xla", *SMALL])
def test_queries_without_keys_are_zero_and_finite(how):
    q, k, v = (draw((1, 20, 1, 16), i) for i in range(3))
    valid = jnp.arange(20)[None] >= 10
    f = functools.partial(
        attention.attention,
        causal=True,
        valid=valid,
        return_lse=True,
        implementation=how,
        tiles=SMALL.get(how),
        interpret=True,
    )
    (out, lse), pull = jax.vjp(f, q, k, v)
    assert (out[:, :10] == 0).all() and (lse[..., :10] == -1e30).all()
    assert np.abs(out[:, 10] - v[:, 10]).max() < 1e-6
    grads = pull((jnp.ones_like(out), jnp.ones_like(lse)))
    assert all(np.isfinite(g).all() for g in grads) and (grads[0][:, :10] == 0).all()


@settings(max_examples=40)
@given(
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    start=st.integers(-5, 30),
    window=st.none() | st.integers(1, 30),
    prefix=st.none() | st.integers(0, 40),
    block_q=st.sampled_from([4, 7, 16]),
    block_k=st.sampled_from([4, 7, 16]),
)
def test_tile_ranges(queries, keys, start, window, prefix, block_q, block_k):
    """Every tile that holds a visible pair is visited, and inner tiles are visible throughout; dense masks decide."""
    rules = tiles.Rules(queries, keys, True, window, prefix is not None)
    slots, at = np.arange(queries)[:, None] + start, np.arange(keys)[None]
    seen = np.asarray(tiles.seen(rules, slots, at, prefix, None, None, positional=True))
    rows, columns = -(-queries // block_q), -(-keys // block_k)
    for i in range(rows):
        low, a, b, high = (int(x) for x in tiles.key_tiles(rules, i * block_q, block_q, block_k, start, prefix))
        assert 0 <= low <= a <= b <= high <= columns
        for j in range(columns):
            tile = seen[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
            assert low <= j < high or not tile.any()
            assert not a <= j < b or (tile.all() and tile.shape[1] == block_k)
    for j in range(columns):
        low, a, b, high = (int(x) for x in tiles.query_tiles(rules, j * block_k, block_q, block_k, start, prefix))
        assert 0 <= low <= a <= b <= high <= rows
        for i in range(rows):
            tile = seen[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
            assert low <= i < high or not tile.any()
            assert not a <= i < b or tile.all()


def test_lowers_for_cuda():
    for dtype, size, bias, rules in (
        (jnp.bfloat16, 80, True, "causal window prefix"),
        (jnp.float32, 128, False, "valid"),
    ):
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
        args = [shape((2, 300, 4, size)), shape((2, 300, 2, size)), shape((2, 300, 2, size))]
        args += [shape((1, 4, 300, 300))] if bias else []
        mask = masks(0, 2, 300, 300, rules.split())

        def f(*args, bias=bias, mask=mask):
            def loss(*args):
                extra = args[3] if bias else None
                out, lse = attention.attention(
                    *args[:3], bias=extra, return_lse=True, implementation="pallas_gpu", **mask
                )
                return out.astype(jnp.float32).sum() + lse.sum(), lse

            grads, lse = jax.grad(loss, argnums=tuple(range(len(args))), has_aux=True)(*args)
            return grads, attention.column_sums(*args[:2], lse, lse, implementation="pallas_gpu", **mask)

        text = aot.lower_for_cuda(f, *args)
        for name in ("forward_kernel", "dq_kernel", "dkv_kernel", "sums_kernel") + (("dbias_kernel",) if bias else ()):
            assert name in text


def test_the_choice(monkeypatch):
    def chosen(platform, length=4096, size=64, dtype=jnp.bfloat16, queries=None, cut=False, return_lse=False, **mask):
        monkeypatch.setattr(attention, "platform", lambda: platform)
        monkeypatch.setattr(attention, "partitioned", lambda: cut)
        q = jax.ShapeDtypeStruct((1, queries or length, 2, size), dtype)
        k = jax.ShapeDtypeStruct((1, length, 2, size), dtype)
        return attention.choose(*attention.operands(q, k, k, **mask), return_lse=return_lse)

    ones = jnp.ones((1, 4096), bool)
    assert chosen("cpu") == chosen("gpu", 512) == chosen("tpu", 512) == "xla"
    assert chosen("gpu") == chosen("gpu", causal=True) == chosen("gpu", causal=True, window=99) == "cudnn"
    for lacking in ({"valid": ones}, {"dtype": jnp.float32}, {"size": 36}, {"return_lse": True}):
        assert chosen("gpu", **lacking) == "pallas_gpu"
    assert chosen("gpu", causal=True, start=3) == chosen("gpu", causal=True, queries=100) == "pallas_gpu"
    assert chosen("tpu", causal=True, valid=ones) == "pallas_tpu"
    assert chosen("gpu", cut=True) == "cudnn"
    assert chosen("gpu", valid=ones, cut=True) == chosen("tpu", cut=True) == "xla"


def test_only_programs_of_one_device_are_whole():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    found = []
    ask = lambda x: found.append(tiles.partitioned()) or x
    for axes in ({"a", "b"}, {"a"}):
        spec = jax.sharding.PartitionSpec("a")
        jax.jit(jax.shard_map(ask, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes, check_vma=False))(
            jnp.ones(4)
        )
    jax.jit(ask)(jnp.ones(4))  # the tests have eight devices
    assert found == [False, True, True]


def test_what_does_not_fit_is_refused():
    q, k = jnp.zeros((2, 5, 4, 8)), jnp.zeros((2, 6, 2, 8))
    wrong = [
        ({"k": jnp.zeros((2, 6, 2, 7))}, "q and k"),
        ({"k": jnp.zeros((2, 6, 3, 8)), "v": jnp.zeros((2, 6, 3, 8))}, "4 heads are no multiple of 3"),
        ({"v": jnp.zeros((2, 7, 2, 8))}, "v: expected"),
        ({"window": 3}, "causal=True"),
        ({"window": 0, "causal": True}, "window: expected at least 1"),
        ({"bias": jnp.zeros((2, 4, 5, 7))}, "bias: expected"),
        ({"valid": jnp.ones((2, 5), bool)}, "valid: expected"),
        ({"segments": jnp.ones((2, 5), int)}, "segments: expected"),
        ({"prefix": jnp.ones(3, int), "causal": True}, "prefix: expected"),
        ({"implementation": "triton"}, "implementation: expected"),
        ({"implementation": "cudnn", "return_lse": True}, "cudnn has no log-sum-exp"),
    ]
    for changed, message in wrong:
        with pytest.raises(ValueError, match=message):
            attention.attention(**({"q": q, "k": k, "v": k} | changed))
    with pytest.raises(ValueError, match="votes: expected"):
        attention.column_sums(q, k, jnp.zeros((2, 4, 5)), jnp.zeros((2, 4, 6)))
    sums = lambda q: attention.column_sums(
        q, q, *2 * (jnp.ones((2, 4, 5)),), implementation="pallas_gpu", interpret=True
    )
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda q: sums(q).sum())(q)
