"""What encoder–decoders share: blocks with cross-attention, the memory in the cache, the decoder's inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxformers as jf
from jaxformers import nn, surgery

VALID = np.array([[1] * 7, [1, 1, 1, 0, 0, 0, 0]])


def draw(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Decoder(nnx.Module):
    """Two layers of width 8 over a memory of width 6; everything that an encoder–decoder's second half does."""

    def __init__(self, prenorm=True, rate=0.0):
        self.path = ""
        self.layers = nn.Layers([block(nnx.Rngs(i), prenorm=prenorm, rate=rate) for i in range(2)])

    def empty_cache(self, batch, slots, memory):
        return nn.memory_cache(self.layers, memory, batch, slots, jnp.float32)

    def __call__(self, x, memory=None, cache=None, rngs=None):
        mask, _, cache = nn.causal_mask(x.shape[0], x.shape[1], None, cache)
        context = nn.memory_context(memory, cache)
        layers = None if cache is None else cache.layers
        h, layers = self.layers(x, mask=mask, cache=layers, key=rngs, **context)
        return nn.Output(h, cache=nn.advance(cache, layers, x.shape[1]))


def block(rngs, *, prenorm, rate=0.0, mlp_rate=0.0):
    return nn.Block(
        nn.Attention(8, 2, std=0.4, rngs=rngs),
        nn.MLP(8, 12, act="relu", rate=mlp_rate, std=0.4, rngs=rngs),
        nn.LayerNorm(8),
        nn.LayerNorm(8),
        prenorm=prenorm,
        cross_attention=nn.Attention(8, 2, memory_width=6, std=0.4, rngs=rngs),
        cross_attention_norm=nn.LayerNorm(8),
        rate=rate,
    )


@pytest.mark.parametrize("prenorm", [True, False])
def test_block_is_the_sum_of_its_parts(prenorm):
    one = block(nnx.Rngs(0), prenorm=prenorm)
    x, hidden, causal, padded = draw((2, 5, 8), 0), draw((2, 7, 6), 1), nn.Mask(causal=True), nn.Mask(valid=VALID)
    out, _ = one(x, mask=causal, memory=hidden, memory_mask=padded)
    branches = [
        (one.attention_norm, lambda h: one.attention(h, mask=causal)[0]),
        (one.cross_attention_norm, lambda h: one.cross_attention(h, memory=hidden, mask=padded)[0]),
        (one.mlp_norm, one.mlp),
    ]
    h = x
    for norm, branch in branches:
        h = h + branch(norm(h)) if prenorm else norm(h + branch(h))
    assert np.abs(out - h).max() < 1e-5
    alone, _ = one(x, mask=causal)
    assert np.abs(alone - out).max() > 0.1  # without a memory there is no cross-attention
    other = np.where(VALID[:, :, None] == 1, hidden, 9.0)
    assert np.abs(one(x, mask=causal, memory=other, memory_mask=padded)[0] - out).max() < 1e-5


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("remat", [None, "full"])
def test_cached_steps_equal_one_pass(scan_layers, remat):
    model = surgery.named(Decoder())
    memory = nn.Memory(jnp.asarray(draw((2, 7, 6), 1)), jnp.asarray(VALID))
    x = draw((2, 6, 8), 0)
    expected = model(x, memory).last_hidden_state
    apply, params = jf.functional(model, scan_layers=scan_layers, remat=remat)
    whole = jax.jit(lambda p: apply(p, {"x": x, "memory": memory}).last_hidden_state)(params)
    assert np.abs(whole - expected).max() < 1e-5

    def steps(params):
        layers = nnx.merge(nnx.split(with_layers(model, scan_layers))[0], params)
        cache, found = layers.empty_cache(2, 9, memory), []
        for piece in (x[:, :3], x[:, 3:4], x[:, 4:6]):
            out = apply(params, {"x": piece, "cache": cache})
            cache = out.cache
            found.append(out.last_hidden_state)
        return jnp.concatenate(found, 1), cache

    found, cache = jax.jit(steps)(params)
    assert np.abs(found - expected).max() < 1e-5
    kept = cache.layers["*"].memory.key[0] if scan_layers else cache.layers["0"].memory.key
    made = model.layers[0].cross_attention.remember(memory.hidden).key
    np.testing.assert_allclose(kept, made, atol=1e-6)
    assert int(cache.used) == 6 and cache.memory_valid.dtype == bool


def with_layers(model, stacked):
    model = surgery.copy(model)
    model.layers = nn.block.stack(model.layers) if stacked else model.layers
    return surgery.named(model)


@pytest.mark.parametrize("stacked", [False, True])
def test_sites_of_the_memory(stacked):
    """Making the cache runs the key and value projections: their sites are read there, by each layer's name."""
    model = with_layers(surgery.named(Decoder()), stacked)
    hidden = jnp.asarray(draw((2, 7, 6), 1))
    graph, params = nnx.split(model)
    remember = lambda params: nnx.merge(graph, params).layers.remember(hidden)
    _, seen = jax.jit(jf.reap(remember, "layers.*.cross_attention.{key,value}.output"))(params)
    assert sorted(seen) == [f"layers.{i}.cross_attention.{n}.output" for i in (0, 1) for n in ("key", "value")]
    for name, value in seen.items():
        linear = getattr(Decoder().layers[int(name.split(".")[1])].cross_attention, name.split(".")[3])
        np.testing.assert_allclose(value, linear(hidden), atol=1e-6)


def test_sites_of_cross_attention():
    apply, params = jf.functional(surgery.named(Decoder()))
    batch = {"x": draw((2, 5, 8), 0), "memory": nn.Memory(jnp.asarray(draw((2, 7, 6), 1)), jnp.asarray(VALID))}
    _, seen = jf.reap(apply, "layers.*.{attention,cross_attention}.probs")(params, batch)
    assert seen["layers.1.attention.probs"].shape == (2, 2, 5, 5)
    cross = seen["layers.1.cross_attention.probs"]
    assert cross.shape == (2, 2, 5, 7)
    np.testing.assert_allclose(cross.sum(-1), 1, atol=1e-5)
    assert np.abs(cross[1, :, :, 3:]).max() == 0 and cross[0].min() > 0


def test_dropout_of_the_branches_and_in_the_mlp():
    x, hidden = draw((2, 5, 8), 0), draw((2, 7, 6), 1)
    for rates in ({"mlp_rate": 0.5}, {"rate": 0.5}):
        one = block(nnx.Rngs(0), prenorm=True, **rates)
        calm, wild, again = (one(x, memory=hidden, key=k)[0] for k in (None, jax.random.key(0), jax.random.key(0)))
        assert np.abs(calm - wild).max() > 0.01
        np.testing.assert_array_equal(wild, again)
    mlp = nn.MLP(8, 4000, act="linear", rate=0.25, bias=False, rngs=nnx.Rngs(0))
    mlp.down.kernel.set_value(jnp.eye(4000, 8))
    dropped, kept = mlp(x, key=jax.random.key(1)), mlp(x)
    ratio = np.asarray(dropped / kept)
    assert set(np.unique(ratio.round(4))) == {0.0, np.float32(1.3333)}  # 1 / (1 - 0.25) where not dropped
    assert 0.1 < (ratio == 0).mean() < 0.4


def test_shift_right():
    labels = jnp.array([[5, 6, 1, -100], [7, 1, -100, -100]])
    np.testing.assert_array_equal(nn.shift_right(labels, 2, 0), [[2, 5, 6, 1], [2, 7, 1, 0]])


def test_errors():
    memory = nn.Memory(jnp.zeros((3, 7, 6)))
    with pytest.raises(ValueError, match="memory: encodes 3 sequences, the cache is for 2"):
        Decoder().empty_cache(2, 9, memory)
    parts = [nn.Attention(8, 2, rngs=nnx.Rngs(0)), nn.MLP(8, 8, act="relu", rngs=nnx.Rngs(0))]
    with pytest.raises(ValueError, match="cross_attention_norm go together"):
        nn.Block(*parts, nn.LayerNorm(8), nn.LayerNorm(8), prenorm=True, cross_attention=parts[0])
