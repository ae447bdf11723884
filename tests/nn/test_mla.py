"""Latent attention against the official layer of X-EcoMLA: without and with latent norms, plain, stretched, padded."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import assert_close

from jaxformers import nn, sites

FILES = ("gqa_rank16", "gqa_yarn_dynamic", "mha_latent_norm")
NAMES = {
    "query_down.kernel": "q_a_proj", "query_norm.scale": "q_a_layernorm", "query_up.kernel": "q_b_proj",
    "kv_down.kernel": "kv_a_proj_with_mqa", "kv_norm.scale": "kv_a_layernorm", "kv_up.kernel": "kv_b_proj",
    "out.kernel": "out_proj",
}  # fmt: skip


def load(oracles, name, decode="absorbed", **changes):
    """(the layer, the oracle's arrays, cosine and sine of every position)."""
    with np.load(oracles / "x_ecomla" / f"{name}.npz") as z:
        arrays = {key: z[key].astype(np.float32) if z[key].dtype == np.float64 else z[key] for key in z.files}
    o = json.loads(str(arrays["options"]))
    settings = {
        "query_rank": o["q_rank"], "rank": o["kv_rank"], "nope": o["dn"], "rope": o["dr"], "value_size": o["dh"],
        "latent_norm": bool(o.get("ln")), "decode": decode,
    }  # fmt: skip
    layer = nn.LatentAttention(o["D"], o["nh"], **(settings | changes), rngs=nnx.Rngs(0))
    for path, theirs in NAMES.items():
        module, leaf = path.split(".")
        if getattr(layer, module) is not None:
            value = arrays[f"mla.{theirs}.weight"]
            getattr(getattr(layer, module), leaf).set_value(jnp.asarray(value.T))
    config = {"rope_theta": o["theta"], "rope_scaling": o.get("rope_scaling"), "max_position_embeddings": 4096}
    rotary = nn.rotary_from_hf(config, o["dr"])
    return layer, arrays, nn.rotary_table(rotary, jnp.arange(arrays["x"].shape[1])[None])


def attend(layer, arrays, table):
    mask = nn.Mask(valid=arrays["attention_mask"], causal=True)
    return layer(arrays["x"], mask=mask, rotary=table)[0]


def decode(layer, arrays, table, *, prefill=3, slots=12):
    """The outputs of ``prefill`` tokens at once and then one by one, and the cache after them."""
    batch, length, _ = arrays["x"].shape
    cache = layer.empty_cache(batch, slots, jnp.float32)
    valid = np.zeros((batch, slots), bool)
    valid[:, :length] = arrays["attention_mask"]
    graph, state = nnx.split(layer)

    @jax.jit
    def step(x, table, start, cache):
        mask = nn.Mask(valid=valid, start=start, causal=True)
        return nnx.merge(graph, state)(x, mask=mask, rotary=table, cache=cache)

    found = []
    for start, end in [(0, prefill), *((i, i + 1) for i in range(prefill, length))]:
        y, cache = step(arrays["x"][:, start:end], tuple(t[:, start:end] for t in table), start, cache)
        found.append(y)
    return np.concatenate(found, axis=1), cache


@pytest.mark.parametrize("name", FILES)
def test_equals_the_official_layer(name, oracles):
    layer, expected, table = load(oracles, name)
    real = expected["attention_mask"] == 1
    assert abs(layer.scale - expected["softmax_scale"]) < 1e-7
    y, seen = jax.jit(sites.reap(lambda: attend(layer, expected, table), ".probs"))()
    assert_close(y, expected["output"], 1e-5, real)
    by_query = (0, 2, 1, 3)
    assert_close(seen[".probs"].transpose(by_query), expected["attn_probs"].transpose(by_query), 1e-5, real)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("name", FILES)
def test_decoding_equals_the_full_pass(name, form, oracles):
    layer, expected, table = load(oracles, name, form)
    found, cache = decode(layer, expected, table)
    real = expected["attention_mask"] == 1
    assert_close(found, expected["output"], 1e-5, real)
    batch, length, _ = expected["x"].shape
    if form == "expanded":
        assert cache.key.shape == (batch, 4, 12, 8) and cache.value.shape == (batch, 4, 12, 8)
        return
    rank = expected["cache_latent"].shape[-1]
    assert cache.line.shape == (batch, 12, rank + 4)  # 4 rotary numbers beside the latent, and nothing for the heads
    assert_close(cache.line[:, :length, :rank], expected["cache_latent"], 1e-5)
    turned = np.asarray(cache.line[:, :length, rank:])  # the official layer keeps pairs apart: first, then second parts
    assert_close(np.concatenate([turned[..., 0::2], turned[..., 1::2]], -1), expected["cache_rope_key"], 1e-5)
    assert not np.any(cache.line[:, length:])


def test_a_long_prompt_is_expanded_and_a_token_absorbed(oracles):
    layer, expected, table = load(oracles, "gqa_rank16")
    products = lambda length: layer._absorbs(length)
    assert (
        products(1) and products(8) and not products(9)
    )  # 16 · 12 products an expanded token, 24 more an absorbed query
    shapes = lambda length: [
        v.aval.shape
        for e in jax.make_jaxpr(
            lambda x, c: layer(x, mask=nn.Mask(causal=True), cache=c),
        )(jnp.zeros((1, length, 32)), layer.empty_cache(1, 64, jnp.float32)).eqns
        for v in e.outvars
    ]
    assert (1, 64, 48) in shapes(9) and (1, 64, 48) not in shapes(1)  # every cached token through kv_up


def test_sites_of_kv_up_are_never_passed_by(oracles):
    layer, expected, table = load(oracles, "gqa_rank16")
    layer.kv_up.path = "kv_up"

    def step():
        cache = layer.empty_cache(2, 12, jnp.float32)
        return layer(expected["x"][:, :1], mask=nn.Mask(causal=True), cache=cache)[0]

    plain = jax.jit(step)()
    read, seen = jax.jit(sites.reap(step, "kv_up.output"))()
    assert seen["kv_up.output"].shape == (2, 12, 48)
    assert_close(read, plain, 1e-5)
    assert np.abs(jax.jit(sites.edit(step, {"kv_up.output": lambda y: 2 * y}))() - plain).max() > 0.01


def test_context_and_scores_are_the_same_in_both_forms(oracles):
    names = (".scores", ".probs", ".context")

    def step(form):
        layer, expected, table = load(oracles, "mha_latent_norm", form)
        cache = layer.empty_cache(2, 9, jnp.float32)
        part = tuple(t[:, :3] for t in table)
        return layer(expected["x"][:, :3], mask=nn.Mask(causal=True), rotary=part, cache=cache)[0]

    (_, absorbed), (_, expanded) = (
        jax.jit(sites.reap(step, names), static_argnums=0)(form) for form in ("absorbed", "expanded")
    )
    assert absorbed[".context"].shape == (2, 3, 4, 8)
    for name in names:
        assert_close(absorbed[name], expanded[name], 1e-5)


def test_gradients_flow_to_every_projection(oracles):
    layer, expected, table = load(oracles, "mha_latent_norm")
    graph, state = nnx.split(layer)
    loss = lambda state: jnp.square(nnx.merge(graph, state)(expected["x"], mask=nn.Mask(causal=True), rotary=table)[0])
    grads = jax.jit(jax.grad(lambda state: loss(state).sum()))(state)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(grads)) and len(jax.tree.leaves(grads)) == 7


def test_unknown_decode_is_refused(oracles):
    with pytest.raises(ValueError, match="decode: expected one of absorbed, expanded, got 'latent'"):
        load(oracles, "gqa_rank16", "latent")
