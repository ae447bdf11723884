"""The cache of a window: equal to the full pass and to a cache of all slots, however the tokens come in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxformers as jf
from jaxformers import nn
from jaxformers.models import gpt_neo, mistral, qwen2


def layer(window):
    return nn.Attention(8, 4, kv_heads=2, window=window, std=0.5, rngs=nnx.Rngs(0))


@pytest.mark.slow  # every shape drawn compiles anew
@settings(max_examples=8)
@given(
    window=st.integers(1, 7), pieces=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 9),
)  # fmt: skip
def test_pieces_equal_one_pass(window, pieces, seed):
    """With padding anywhere: whatever is not real is not seen, and turns round and round all the same."""
    attention, length = layer(window), sum(pieces)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, length, 8)).astype(np.float32)
    real = rng.random((2, length)) < 0.8
    full, _ = attention(x, mask=nn.Mask(valid=real, causal=True))
    cache = nn.new_cache({}, 2, length + 8)
    store, found, at = attention.empty_cache(2, length + 8, jnp.float32), [], 0
    assert isinstance(store, nn.Rolling) and store.key.shape == (2, 2, window, 2)
    for piece in pieces:
        part = slice(at, at + piece)
        mask, _, cache = nn.causal_mask(2, piece, real[:, part], cache)
        out, store = attention(x[:, part], mask=mask, cache=store)
        cache = nn.advance(cache, {}, piece)
        found.append(out)
        at += piece
    error = np.abs(np.concatenate(found, axis=1) - full)
    assert error[real].max(initial=0) < 1e-5


def test_no_longer_than_the_window_or_the_slots():
    assert isinstance(layer(9).empty_cache(2, 9, jnp.float32), nn.KeyValue)
    assert isinstance(layer(None).empty_cache(2, 9, jnp.float32), nn.KeyValue)
    with pytest.raises(ValueError, match="bias: a cache of a window's length"):
        cache = layer(2).empty_cache(1, 9, jnp.float32)
        layer(2)(jnp.zeros((1, 1, 8)), mask=nn.Mask(causal=True), bias=jnp.zeros((1, 4, 1, 9)), cache=cache)


SMALL = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5)
MODELS = {
    "mistral": mistral.Config(**SMALL, intermediate_size=24, num_key_value_heads=1, sliding_window=4),
    "qwen2": qwen2.Config(
        **SMALL, intermediate_size=24, num_key_value_heads=1, use_sliding_window=True, sliding_window=5,
        max_window_layers=1,
    ),
    "gpt_neo": gpt_neo.Config(**SMALL, attention_layers=("local", "global"), window_size=3),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_generation_beyond_the_window(name):
    """Padded prompts shorter and longer than the window; every token against a full pass without a cache."""
    model = jf.init(MODELS[name], head="causal_lm", key=jax.random.key(1))
    stores = model.empty_cache(2, 40).layers.values()
    assert [type(store) for store in stores].count(nn.Rolling) == {"mistral": 2}.get(name, 1)
    apply, params = jf.functional(model)
    apply = jax.jit(apply)
    prompts = [[3], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20, 21, 22]]
    found = jf.generate(model, prompts, max_new_tokens=20, eos_token_id=())
    assert len({tuple(row[-3:]) for row in found}) > 1
    for prompt, new in zip(prompts, found, strict=True):
        whole = np.zeros((1, 32), np.int32)
        whole[0, : len(prompt) + 20] = prompt + new
        best = np.asarray(apply(params, {"input_ids": whole}).logits[0]).argmax(-1)
        assert best[len(prompt) - 1 : len(prompt) + 19].tolist() == new
    beams = jf.generate(model, prompts, max_new_tokens=8, num_beams=3, eos_token_id=(), return_scores=True)
    for prompt, ids, score in zip(prompts, *beams, strict=True):
        logits = apply(params, {"input_ids": np.array([(prompt + ids + [0] * 32)[:32]])}).logits[0]
        log_p = jax.nn.log_softmax(logits[len(prompt) - 1 : len(prompt) + 7], -1)
        np.testing.assert_allclose(np.take_along_axis(log_p, np.array(ids)[:, None], 1).mean(), score, atol=1e-4)


def test_stacked_layers():
    model = jf.init(MODELS["mistral"], head="causal_lm", key=jax.random.key(1))
    ids = np.random.default_rng(0).integers(0, 60, (2, 12))
    apply, params = jf.functional(model, scan_layers=True)
    whole = jax.jit(apply)(params, {"input_ids": ids}).logits
    one = jf.surgery.copy(model)
    one.layers = nn.block.stack(one.layers)
    cache, found = one.empty_cache(2, 12), []
    assert cache.layers["*"].key.shape == (2, 2, 1, 4, 8)
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 12)):
        out = jax.jit(apply)(params, {"input_ids": ids[:, start:end], "cache": cache})
        cache = out.cache
        found.append(out.logits)
    assert np.abs(np.concatenate(found, 1) - whole).max() < 1e-4 * np.abs(whole).max()
