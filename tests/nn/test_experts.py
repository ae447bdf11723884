"""Routing and experts against loops over tokens in float64; every way to the sum; the balance loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from parity import assert_close

from jaxformers import nn, sites
from jaxformers.nn import experts as module

WAYS = {"gathered": module._gathered, "masked": module._masked, "sorted": module._sorted}


def routed(logits, k, score, correction, groups, top_groups, normalize, scale):
    """What nn.route does for one token, said once more."""
    logits = np.asarray(logits, np.float64)
    p = 1 / (1 + np.exp(-logits)) if score == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    choose = p + correction
    size = len(p) // groups
    value = [np.sort(choose[g * size : (g + 1) * size])[-2:].sum() for g in range(groups)]
    best = sorted(range(groups), key=lambda g: -value[g])[:top_groups] if groups > 1 else [0]
    open_to = [e for e in range(len(p)) if e // size in best]
    ids = sorted(open_to, key=lambda e: -choose[e])[:k]
    gates = p[ids] / p[ids].sum() if normalize else p[ids]
    return ids, gates * scale


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (3, 2), (4, 1)])
@pytest.mark.parametrize("normalize", [False, True])
def test_routing_equals_a_loop(score, groups, top_groups, normalize):
    rng = np.random.default_rng(0)
    logits, correction = rng.standard_normal((2, 7, 12)).astype(np.float32), rng.standard_normal(12) * 0.5
    k = 3
    settings = {"score": score, "groups": groups, "top_groups": top_groups, "normalize": normalize, "scale": 2.5}
    ids, gates = nn.route(logits, k, correction=jnp.asarray(correction, jnp.float32), **settings)
    for b, t in np.ndindex(2, 7):
        own, weight = routed(logits[b, t], k, correction=correction, **settings)
        assert ids[b, t].tolist() == own
        assert np.abs(gates[b, t] - weight).max() < 1e-6


def test_of_equal_scores_the_first_counts_and_correction_does_not_weigh():
    ids, gates = nn.route(jnp.zeros((1, 4)), 2)
    assert ids.tolist() == [[0, 1]] and np.allclose(gates, 0.25)
    ids, gates = nn.route(jnp.zeros((1, 4)), 2, correction=jnp.array([0.0, 0, 0.1, 0.2]))
    assert ids.tolist() == [[3, 2]] and np.allclose(gates, 0.25)


@pytest.mark.parametrize(
    ("k", "settings", "message"),
    [
        (0, {}, "k: expected 1 to 6 experts"),
        (7, {}, "k: expected 1 to 6 experts"),
        (3, {"groups": 3}, "k: expected 1 to 2 experts"),
        (1, {"groups": 4}, "6 experts do not form 4 equal groups"),
        (1, {"groups": 6}, "6 experts do not form 6 equal groups of two or more"),
        (1, {"groups": 3, "top_groups": 4}, "top_groups: expected 1 to 3, got 4"),
        (1, {"score": "relu"}, "score: expected one of softmax, sigmoid, got 'relu'"),
    ],
)
def test_routing_that_cannot_be(k, settings, message):
    with pytest.raises(ValueError, match=message):
        nn.route(jnp.zeros((2, 6)), k, **settings)


def problem(tokens=10, k=2, experts=5, width=6, hidden=8, gated=True, bias=True, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    names = ("gate", "up", "down") if gated else ("up", "down")
    sizes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    kernels = {n: (draw(experts, *sizes[n]), draw(experts, sizes[n][1]) if bias else None) for n in names}
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k].astype(np.int32)
    return draw(tokens, width), ids, rng.random((tokens, k)).astype(np.float32), kernels


def looped(x, ids, gates, kernels):
    """Token by token, expert by expert, in float64; SiLU."""
    out = np.zeros(x.shape)
    linear = lambda name, e, v: (
        v @ kernels[name][0][e].astype(np.float64) + (0 if kernels[name][1] is None else kernels[name][1][e])
    )
    silu = lambda v: v / (1 + np.exp(-v))
    for t, j in np.ndindex(ids.shape):
        e, v = ids[t, j], x[t].astype(np.float64)
        h = silu(linear("gate", e, v)) * linear("up", e, v) if "gate" in kernels else silu(linear("up", e, v))
        out[t] += gates[t, j] * linear("down", e, h)
    return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_way_equals_a_loop(way, gated, bias):
    args = problem(gated=gated, bias=bias)
    y = jax.jit(WAYS[way], static_argnums=4)(*args, "silu")
    assert_close(y, looped(*args).astype(np.float32), 1e-4)


@pytest.mark.parametrize("way", ["gathered", "sorted"])
def test_every_way_has_the_same_gradients(way):
    x, ids, gates, kernels = problem(bias=False)
    loss = lambda fn: lambda x, gates, kernels: jnp.square(fn(x, jnp.asarray(ids), gates, kernels, "silu")).sum()
    both = [jax.jit(jax.grad(loss(WAYS[w]), argnums=(0, 1, 2)))(x, gates, kernels) for w in (way, "masked")]
    for found, expected in zip(*map(jax.tree.leaves, both), strict=True):
        assert_close(found, expected, 1e-4 * float(np.abs(expected).max()))


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 9))
def test_all_tokens_may_choose_one_expert(tokens, k, seed):
    x, ids, gates, kernels = problem(tokens=9, k=k, bias=False, seed=seed)
    ids[:tokens, 0] = ids[0, 0]  # several tokens fall on one expert; others may get none
    rows = [t for t in range(9) if len(set(ids[t])) == k]
    y = jax.jit(module._sorted, static_argnums=4)(x, ids, gates, kernels, "silu")
    assert_close(y[np.array(rows)], looped(x, ids, gates, kernels)[rows].astype(np.float32), 1e-4)


def layer(**settings):
    settings = {"experts": 4, "k": 2, "act": "silu", "normalize": True, "shared": 5, "std": 0.5} | settings
    return nn.MoE(6, 8, **settings, rngs=nnx.Rngs(0))


def test_layer_is_the_sum_of_its_parts():
    moe = layer()
    x = np.random.default_rng(1).standard_normal((2, 7, 6)).astype(np.float32)
    y, seen = jax.jit(sites.reap(lambda x: moe(x), (".ids", ".gates")))(x)
    kernels = {n: (np.asarray(getattr(moe.experts, n).kernel.get_value()), None) for n in ("gate", "up", "down")}
    flat = [np.asarray(a).reshape(14, -1) for a in (x, seen[".ids"], seen[".gates"])]
    expected = looped(*flat, kernels).reshape(x.shape) + np.asarray(moe.shared(x))
    assert_close(y, expected.astype(np.float32), 1e-5)
    assert np.allclose(seen[".gates"].sum(-1), 1, atol=1e-6)


def test_hidden_can_be_read_and_rewritten():
    moe = layer(shared=0)
    moe.experts.path = "experts"
    x = np.random.default_rng(1).standard_normal((2, 7, 6)).astype(np.float32)
    plain = jax.jit(lambda x: moe(x))(x)
    y, seen = jax.jit(sites.reap(lambda x: moe(x), "experts.hidden"))(x)
    assert seen["experts.hidden"].shape == (2, 7, 2, 8)
    assert_close(y, plain, 1e-5)
    first = lambda h: h.at[:, :, 1].set(0)  # without each token's second expert
    _, routing = jax.jit(sites.reap(lambda x: moe(x), (".ids", ".gates")))(x)
    edited = jax.jit(sites.edit(lambda x: moe(x), {"experts.hidden": first}))(x)
    alone = moe.experts(x, routing[".ids"][..., :1], routing[".gates"][..., :1])
    assert_close(edited, alone, 1e-5)


def test_choice_is_made_in_float32():
    moe = layer()
    x = np.random.default_rng(1).standard_normal((1, 9, 6)).astype(jnp.bfloat16)
    y, seen = jax.jit(sites.reap(lambda x: moe(x), ".gates"))(x)
    assert y.dtype == jnp.bfloat16 and seen[".gates"].dtype == jnp.float32


def test_balance_loss():
    rng = np.random.default_rng(0)
    even = np.tile(np.arange(4), 4).reshape(2, 8, 1)
    assert np.isclose(nn.balance_loss(np.full((2, 8, 4), 0.25), even), 1)
    alone = np.zeros((2, 8, 1), int)
    assert np.isclose(nn.balance_loss(np.eye(4)[alone[..., 0]], alone), 4)
    probs, ids = rng.random((2, 5, 4)), np.argsort(rng.random((2, 5, 4)))[..., :2]
    valid = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    p = probs / probs.sum(-1, keepdims=True)
    rows = []
    for b in range(2):
        real = np.flatnonzero(valid[b])
        f = np.bincount(ids[b, real].ravel(), minlength=4) * 4 / (2 * len(real))
        rows.append((f * p[b, real].mean(0)).sum())
    assert np.isclose(nn.balance_loss(probs, ids, valid, per_sequence=True), np.mean(rows))
    chosen = np.flatnonzero(valid.ravel())
    f = np.bincount(ids.reshape(10, 2)[chosen].ravel(), minlength=4) * 4 / 16
    assert np.isclose(nn.balance_loss(probs, ids, valid), (f * p.reshape(10, 4)[chosen].mean(0)).sum())
    grads = jax.grad(lambda logits: nn.balance_loss(jax.nn.softmax(logits), alone))(jnp.zeros((2, 8, 4)))
    assert (grads[..., 0] > 0).all() and (grads[..., 1:] < 0).all()  # away from the crowded expert
    assert nn.balance_loss(probs, ids, np.zeros((2, 5))) == 0
