"""Masks and attention against brute force in numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformers import nn, sites


def visible(b, q, k, *, causal, window, prefix, segments, valid, start):
    """The rules of nn.Mask for one query and one key, said once more."""
    if valid is not None and not valid[b, k]:
        return False
    if segments is not None and segments[b, q] != segments[b, k]:
        return False
    if not causal:
        return True
    slot = q + start
    if k > slot and not (prefix is not None and k < prefix[b]):
        return False
    return window is None or slot - k < window


OPTIONS = list(itertools.product((False, True), (None, 3), (False, True), (False, True), (False, True)))


@pytest.mark.parametrize(("causal", "window", "prefix", "segments", "valid"), OPTIONS)
def test_mask_equals_brute_force(causal, window, prefix, segments, valid):
    rng = np.random.default_rng(0)
    batch, length = 2, 9
    rules = {
        "causal": causal,
        "window": window,
        "prefix": np.array([4, 0]) if prefix else None,
        "segments": np.sort(rng.integers(0, 3, (batch, length)), axis=1) if segments else None,
        "valid": rng.integers(0, 2, (batch, length)) if valid else None,
    }
    for queries, start in ((length, 0),) if segments else ((length, 0), (2, 5)):
        expected = np.array(
            [
                [[visible(b, q, k, start=start, **rules) for k in range(length)] for q in range(queries)]
                for b in range(batch)
            ]
        )
        dense = nn.Mask(start=start, **rules).dense(queries, length)
        if dense is None:
            assert expected.all()
        else:
            assert np.array_equal(np.broadcast_to(dense, (batch, 1, queries, length))[:, 0], expected)


def reference(q, k, v, *, allowed=None, bias=None, scale=None):
    """Attention by loops over batch and head, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, queries, heads, size = q.shape
    group = heads // k.shape[2]
    out, probs = np.zeros((batch, queries, heads, v.shape[-1])), np.zeros((batch, heads, queries, k.shape[1]))
    for b in range(batch):
        for h in range(heads):
            scores = q[b, :, h] @ k[b, :, h // group].T * (size**-0.5 if scale is None else scale)
            scores = scores if bias is None else scores + bias[b % bias.shape[0], h]
            if allowed is not None:
                scores = np.where(np.broadcast_to(allowed, (batch, 1, queries, k.shape[1]))[b, 0], scores, -np.inf)
            e = np.exp(scores - scores.max(-1, keepdims=True))
            probs[b, h] = e / e.sum(-1, keepdims=True)
            out[b, :, h] = probs[b, h] @ v[b, :, h // group]
    return out, probs


def draw(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("observed", [False, True])
def test_attend(kv_heads, observed):
    q, k, v = draw((2, 5, 4, 8), 0), draw((2, 7, kv_heads, 8), 1), draw((2, 7, kv_heads, 8), 2)
    bias, mask = draw((1, 4, 5, 7), 3), nn.Mask(causal=True, start=2)
    allowed = np.asarray(mask.dense(5, 7))
    expected, probs = reference(q, k, v, allowed=allowed, bias=bias, scale=0.3)

    def attention(q, k, v):
        return nn.attend(q, k, v, mask=mask, bias=bias, scale=0.3, path="a")

    if observed:
        out, seen = sites.reap(attention, ("a.probs", "a.scores"))(q, k, v)
        assert np.abs(seen["a.probs"] - probs).max() < 1e-6
        raw = np.einsum("bqhd,bkhd->bhqk", q, np.repeat(k, 4 // kv_heads, axis=2)) * 0.3 + bias
        assert np.abs(seen["a.scores"] - raw).max() < 1e-5  # scaled, biased, before the mask
    else:
        out = attention(q, k, v)
    assert np.abs(out - expected).max() < 2e-6


def test_the_fused_path_is_taken_when_nobody_asks_for_probabilities(monkeypatch):
    from jaxformers.nn import attention as module

    calls = []
    fused = module.unnormalized_softmax
    monkeypatch.setattr(module, "unnormalized_softmax", lambda x: calls.append(1) or fused(x))
    q = draw((1, 3, 2, 4), 0)

    def attention(q):
        return sites.site("b.context", nn.attend(q, q, q, path="a"))

    attention(q)
    sites.reap(attention, "*.context")(q)
    assert len(calls) == 2
    for pattern in ("a.scores", "a.probs", "**"):
        sites.reap(attention, pattern)(q)
        sites.edit(attention, {pattern: lambda x: x})(q)
    assert len(calls) == 2
    # dropout acts alike on both paths
    dropped = lambda q: nn.attend(q, q, q, rate=0.5, key=jax.random.key(0), path="a")
    out = dropped(q)
    assert len(calls) == 3
    assert np.abs(sites.reap(dropped, "a.probs")(q)[0] - out).max() < 1e-6


@pytest.mark.parametrize("observed", [False, True])
def test_a_query_without_keys_is_finite(observed):
    q, v = draw((1, 3, 2, 4), 0), draw((1, 3, 2, 4), 1)
    mask = nn.Mask(valid=np.array([[0, 1, 1]]), causal=True)

    def attention(q):
        return nn.attend(q, q, v, mask=mask, path="a")

    out = (lambda q: sites.reap(attention, "a.probs")(q)[0])(q) if observed else attention(q)
    assert np.allclose(out[:, 0], v.mean(1), atol=1e-6)
    assert np.isfinite(jax.grad(lambda q: attention(q).sum())(q)).all()


def test_dropout_keeps_the_mean_and_needs_a_key():
    q, v = draw((1, 4, 2, 8), 0), np.ones((1, 4, 2, 8), np.float32)
    out = jax.vmap(lambda key: nn.attend(q, q, v, rate=0.4, key=key))(jax.random.split(jax.random.key(0), 1000))
    assert abs(float(out.mean()) - 1) < 0.02 and float(out.std()) > 0.2
    x = jnp.ones(20_000)
    dropped = nn.dropout(x, 0.25, jax.random.key(1))
    assert abs(float((dropped == 0).mean()) - 0.25) < 0.02
    assert np.allclose(dropped[dropped != 0], 1 / 0.75)
    assert nn.dropout(x, 0.25, None) is x and nn.dropout(x, 0.0, jax.random.key(1)) is x


def module(**settings):
    attention = nn.Attention(8, 4, std=0.5, rngs=nnx.Rngs(0), **settings)
    attention.path = "a"
    return attention


def project(linear, x, heads, size):
    y = np.asarray(x, np.float64) @ np.asarray(linear.kernel.get_value(), np.float64)
    y = y if linear.bias is None else y + np.asarray(linear.bias.get_value())
    return y.reshape(*x.shape[:-1], heads, size)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cross_attention(kv_heads):
    attention = module(kv_heads=kv_heads, head_size=3, memory_width=6, bias=False)
    assert attention.key.kernel.get_value().shape == (6, 3 * kv_heads)
    x, memory, valid = draw((2, 5, 8), 0), draw((2, 7, 6), 1), np.array([[1] * 7, [1, 1, 1, 0, 0, 0, 0]])
    out, cache = attention(x, memory=memory, mask=nn.Mask(valid=valid))
    assert cache is None
    q = project(attention.query, x, 4, 3)
    k, v = (project(linear, memory, kv_heads, 3) for linear in (attention.key, attention.value))
    context, _ = reference(q, k, v, allowed=valid[:, None, None, :] == 1)
    expected = context.reshape(2, 5, 12) @ np.asarray(attention.out.kernel.get_value())
    assert np.abs(out - expected).max() < 1e-5


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_positions_turn_queries_and_keys(interleaved):
    attention, x = module(kv_heads=2, head_size=6, interleaved=interleaved), draw((2, 5, 8), 0)
    rotary = nn.rotary_table(nn.Rotary(4), np.array([[0, 1, 2, 3, 4], [7, 3, 9, 1, 0]]))  # 4 of 6 dimensions
    out, _ = attention(x, rotary=rotary)
    q, k, v = (project(getattr(attention, n), x, h, 6) for n, h in (("query", 4), ("key", 2), ("value", 2)))
    q, k = (np.asarray(nn.rotate(jnp.asarray(a, jnp.float32), rotary, interleaved)) for a in (q, k))
    context, _ = reference(q, k, v)
    assert np.abs(out - project(attention.out, context.reshape(2, 5, 24), 1, 8)[:, :, 0]).max() < 1e-5


@pytest.mark.parametrize("window", [None, 3])
def test_cached_steps_equal_one_pass(window):
    attention, x = module(kv_heads=2), draw((2, 6, 8), 0)
    full, _ = attention(x, mask=nn.Mask(causal=True, window=window))
    cache, steps = attention.empty_cache(2, 9, jnp.float32), []
    for i in range(6):
        out, cache = attention(x[:, i : i + 1], mask=nn.Mask(causal=True, window=window, start=i), cache=cache)
        steps.append(out)
    assert np.abs(np.concatenate(steps, 1) - full).max() < 1e-5
    assert cache.key.size == 2 * 9 * 2 * 2 and np.count_nonzero(cache.key) == 2 * 6 * 2 * 2


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="width 8 is not divisible by 3 heads"):
        nn.Attention(8, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="4 heads are not divisible by 3 key/value heads"):
        nn.Attention(8, 4, kv_heads=3, rngs=nnx.Rngs(0))
