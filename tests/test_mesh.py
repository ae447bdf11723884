"""Sharding: what a path's array is cut along, models loaded slice by slice, and the collectives that result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

import jaxformers as jf
from jaxformers import weights
from jaxformers.hlo import collectives
from jaxformers.mesh import RULES, batch_sharding, cache_shardings, constrained, sharding, shardings, spec
from jaxformers.models import t5, vit

eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
P = PartitionSpec


def counted(fn, *args, **options) -> dict[str, int]:
    """How often each kind of collective runs in the compiled program."""
    text = jax.jit(fn, **options).lower(*args).compile().as_text()
    return {kind: found.count for kind, found in collectives(text, jax.device_count()).items()}


@eight
def test_mesh_from_text():
    assert dict(jf.mesh("data=2,fsdp=4").shape) == {"data": 2, "fsdp": 4}
    assert dict(jf.mesh("tensor=2, data=-1").shape) == {"tensor": 2, "data": 4}
    assert jf.mesh("data=2", devices=jax.devices()[4:]).devices.tolist() == jax.devices()[4:6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("date=2", "'date=2' is not one of data, fsdp, tensor"),
        ("data", "'data' is not one of"),
        ("data=two", "'data=two' is not one of"),
        ("data=2,data=2", "'data=2' is not one of"),
        ("data=0", "devices asked for"),
        ("data=4096", "4096 devices asked for"),
        ("data=-1,fsdp=-1", "devices asked for"),
    ],
)
def test_mesh_text_that_makes_no_sense(text, message):
    with pytest.raises(ValueError, match=message):
        jf.mesh(text)


@eight
def test_rules():
    mesh = jf.mesh("data=2,fsdp=2,tensor=2")

    def cut(path, *shape):
        return spec(mesh, path, shape)

    assert cut("layers.0.attention.query.kernel", 8, 8) == P("fsdp", "tensor")
    assert cut("decoder.layers.3.cross_attention.out.kernel", 8, 8) == P("tensor", "fsdp")
    assert cut("layers.0.mlp.up.kernel", 8, 12) == P("fsdp", "tensor")
    assert cut("layers.0.mlp.down.kernel", 12, 8) == P("tensor", "fsdp")
    assert cut("layers.0.mlp.up.bias", 12) == P("tensor")
    assert cut("layers.0.mlp.down.bias", 8) == P()
    assert cut("layers.*.attention.query.kernel", 3, 8, 8) == P(None, "fsdp", "tensor")  # stacked for a scan
    assert cut("embeddings.token.embedding", 20, 8) == P("tensor", "fsdp")
    assert cut("embeddings.token.embedding", 21, 8) == P(None, "fsdp")  # 21 rows cannot be halved
    assert cut("embeddings.position.embedding", 12, 8) == P(None, "fsdp")
    assert cut("head.decoder.kernel", 8, 20) == P("fsdp", "tensor")
    assert cut("head.bias", 20) == P("tensor") == cut("head.decoder.bias", 20)
    assert cut("layers.0.mlp_norm.scale", 8) == P() == cut("final_norm.scale", 8)
    assert cut("layers.0.attention.kv_down.kernel", 8, 12) == P("fsdp", None)  # one line for all heads
    assert cut("layers.0.attention.kv_up.kernel", 6, 16) == P(None, "tensor")
    assert cut("layers.0.mlp.experts.up.kernel", 4, 8, 12) == P(None, "fsdp", "tensor")
    assert cut("layers.*.mlp.experts.down.kernel", 3, 4, 12, 8) == P(None, None, "tensor", "fsdp")
    assert spec(jf.mesh("expert=4,fsdp=2"), "layers.0.mlp.experts.down.kernel", (4, 12, 8)) == P("expert", None, "fsdp")
    assert cut("layers.0.mlp.router.kernel", 8, 4) == P("fsdp", None)
    assert cut("layers.0.mlp.shared.down.kernel", 12, 8) == P("tensor", "fsdp")
    assert cut("layers.0.attention.query.kernel.base", 8, 8) == P("fsdp", "tensor")  # inside a typed weight
    assert cut("layers.0.attention.query.kernel.a", 8, 4) == P("fsdp", None)  # low-rank factors: the shared axis
    assert cut("layers.0.attention.query.kernel.b", 4, 8) == P(None, "tensor")
    assert cut("layers.*.attention.query.kernel.base.qweight", 3, 4, 8) == P(None, "fsdp", "tensor")
    assert cut("layers.0.mlp.down.kernel.g_idx", 12) == P("tensor")
    assert cut("layers.0.mlp.experts.up.kernel", 4, 8, 12) == P(None, "fsdp", "tensor")
    assert spec(jf.mesh("expert=4,fsdp=2"), "layers.0.mlp.experts.down.kernel", (4, 12, 8)) == P("expert", None, "fsdp")
    assert spec(jf.mesh("data=8"), "layers.0.attention.query.kernel", (8, 8)) == P(None, None)
    both = {**RULES, "embed": ("fsdp", "data")}
    assert spec(mesh, "layers.0.mlp.up.kernel", (8, 12), both) == P(("fsdp", "data"), "tensor")
    assert batch_sharding(mesh).spec == P(("data", "fsdp"))
    assert batch_sharding(jf.mesh("tensor=8")).spec == P()


@eight
@pytest.mark.parametrize("folder", ["bert/mlm", "llama/gqa_untied"])
@pytest.mark.parametrize("shape", ["data=2,fsdp=2,tensor=2", "fsdp=8"])
def test_sharded_loading_and_forward(folder, shape, oracles):
    source, mesh = oracles / "backbones" / folder, jf.mesh(shape)
    apply, params = jf.functional(jf.load(source))
    model = jf.load(source, mesh=mesh)
    sharded_apply, sharded = jf.functional(model)
    for path, array in jf.paths.flatten(sharded).items():
        assert array.sharding == sharding(mesh, path, array.shape), path
        assert len(array.sharding.device_set) == 8
    kernel = sharded["layers"]["0"]["attention"]["query"]["kernel"]
    block = 32 // mesh.shape["fsdp"], 32 // mesh.shape.get("tensor", 1)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {block}
    assert tiny.largest_difference(sharded, params) == 0

    ids = np.arange(2, 50).reshape(8, 6)
    expected = jax.jit(apply)(params, {"input_ids": ids}).logits
    sharded_apply = constrained(sharded_apply, mesh)
    placed = jax.device_put(ids, batch_sharding(mesh))
    found = jax.jit(sharded_apply)(sharded, {"input_ids": placed}).logits
    assert np.abs(np.asarray(found) - np.asarray(expected)).max() < 1e-5 * np.abs(expected).max()


@eight
def test_typed_weights_are_cut_like_the_kernels_they_stand_for(oracles, tmp_path):
    model = weights.add_lora(jf.load(oracles / "backbones" / "bert" / "mlm"), rank=4, key=jax.random.key(0))
    jf.save(model, tmp_path / "x")
    sharded = jf.load(tmp_path / "x", mesh=jf.mesh("fsdp=4,tensor=2"))
    kernel = sharded.layers[0].attention.query.kernel.get_value()
    cuts = [a.sharding.spec for a in (kernel.base, kernel.a, kernel.b)]
    assert cuts == [P("fsdp", "tensor"), P("fsdp", None), P(None, "tensor")]
    assert tiny.largest_difference(jf.functional(sharded)[1], jf.functional(model)[1]) == 0


def next_tokens(apply, batch):
    """A loss that reaches every parameter: cross entropy of the logits, or a weighted sum of the hidden states."""

    def loss(params):
        out = apply(params, batch)
        if out.logits is None:
            found = out.last_hidden_state.astype(jnp.float32)
            return jnp.mean(found * jnp.cos(jnp.arange(found.size, dtype=jnp.float32)).reshape(found.shape))
        chosen = jax.nn.log_softmax(out.logits.astype(jnp.float32))
        labels = jnp.arange(chosen[..., 0].size).reshape(chosen.shape[:-1]) % chosen.shape[-1]
        return -jnp.take_along_axis(chosen, labels[..., None], axis=-1).mean()

    return loss


def family(name):
    """(model, batch of eight) of an architecture family."""
    if name == "vit":
        config = vit.Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=(8, 8),
            patch_size=(4, 4), initializer_range=0.4, num_labels=4,
        )  # fmt: skip
        model = jf.init(config, head="image_classification", key=jax.random.key(0))
        return model, {"pixel_values": np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)}
    if name == "t5":
        config = t5.Config(
            vocab_size=24, hidden_size=16, head_dim=8, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            relative_attention_num_buckets=8, relative_attention_max_distance=16, feed_forward_proj="gated-gelu",
            tie_word_embeddings=False, scale_decoder_outputs=False,
        )  # fmt: skip
        batch = ids()
        return jf.init(config, head="seq2seq_lm", key=jax.random.key(0)), {
            **batch, "decoder_input_ids": batch["input_ids"][:, ::-1].copy()
        }  # fmt: skip
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 24, "initializer_range": 0.4}
    if name == "gqa":
        return tiny.model("llama", num_attention_heads=4, num_key_value_heads=2, intermediate_size=32, **sizes), ids()
    return tiny.model(name, **sizes, **({} if name == "gpt2" else {"intermediate_size": 32})), ids()


def ids():
    return tiny.batch(rows=8, length=8)


ALONE = ("data=8", "fsdp=8", "tensor=2", "sequence=4")
PRODUCTS = ("data=2,fsdp=2,tensor=2", "fsdp=2,tensor=2,sequence=2")


@eight
@pytest.mark.parametrize(
    ("name", "meshes"),
    [
        ("bert", PRODUCTS),
        ("gpt2", PRODUCTS[1:]),
        ("gqa", ALONE + PRODUCTS),
        ("vit", PRODUCTS[:1]),
        ("t5", ("data=2,fsdp=2,tensor=2", "sequence=4")),
    ],  # fmt: skip
)
def test_every_rule_set_gives_the_numbers_of_one_device(name, meshes):
    """Forward and gradient of each family, sharded by each rule set, against one device."""
    model, batch = family(name)
    apply, params = jf.functional(model, scan_layers=True)
    value, grads = jax.jit(jax.value_and_grad(next_tokens(apply, batch)))(params)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    for shape in meshes:
        mesh = jf.mesh(shape)
        placed = jax.device_put(params, shardings(mesh, params))
        spread = jax.device_put(batch, batch_sharding(mesh))
        # the gradients leave as the parameters lie, as an optimiser needs them
        out = (None, shardings(mesh, params))
        held = constrained(apply, mesh)
        loss = lambda params, batch, held=held: next_tokens(held, batch)(params)
        found, slopes = jax.jit(jax.value_and_grad(loss), out_shardings=out)(placed, spread)
        np.testing.assert_allclose(found, value, rtol=1e-5, err_msg=shape)
        assert tiny.largest_difference(slopes, grads) < 1e-5 * scale, shape


@eight
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_counted_collectives(name):
    """None where none is needed, and no more than the rules promise."""
    model = tiny.model(name, **({"num_key_value_heads": 2} if name == "llama" else {}))
    layers = len(model.layers)

    def of(shape, **settings):
        mesh = jf.mesh(shape)
        apply, params = jf.functional(model, **settings)
        apply = constrained(apply, mesh)
        params = jax.device_put(params, shardings(mesh, params))
        batch = jax.device_put(np.ones((8, 6), int), batch_sharding(mesh))
        return counted(lambda params, ids: apply(params, {"input_ids": ids}).last_hidden_state, params, batch)

    assert of("data=8") == {}  # a data-parallel forward pass needs no communication
    assert of("data=8", scan_layers=True) == {}
    for settings in ({}, {"scan_layers": True}):
        tensor = of("tensor=2", **settings)  # sums after attention's output and the MLP's, and of the vocabulary
        assert set(tensor) == {"all-reduce"} and 2 * layers <= tensor["all-reduce"] <= 2 * layers + 1
        fsdp = of("fsdp=2", **settings)
        assert set(fsdp) == {"all-gather"}  # weights are gathered as needed, activations stay where they are
    assert of("data=2,fsdp=2").keys() == {"all-gather"}
    sequence = of("sequence=2", scan_layers=True)  # keys and values of each layer
    assert set(sequence) == {"all-gather"} and sequence["all-gather"] <= 2 * layers + 1


@eight
def test_counted_collectives_of_an_encoder_and_a_decoder():
    """An encoder's layer sums twice under tensor parallelism, a decoder's once more for cross-attention; the table of
    tokens is read by both. Going back, as many sums again, and one for each norm's and bias' gradient of a batch."""
    model, batch = family("t5")
    layers = model.config.num_hidden_layers

    def of(shape, backward=False):
        mesh = jf.mesh(shape)
        apply, params = jf.functional(model, scan_layers=True)
        apply = constrained(apply, mesh)
        places = shardings(mesh, params)
        args = jax.device_put(params, places), jax.device_put(batch, batch_sharding(mesh))
        if backward:
            loss = lambda params, batch: next_tokens(apply, batch)(params)
            return counted(jax.grad(loss), *args, out_shardings=places)
        return counted(lambda params, batch: apply(params, batch).last_hidden_state, *args)

    assert of("data=8") == {}
    assert set(of("data=8", backward=True)) == {"all-reduce"}
    sums = 2 * layers + 3 * layers
    tensor = of("tensor=2")
    assert set(tensor) == {"all-reduce"} and sums <= tensor["all-reduce"] <= sums + 2
    assert set(of("fsdp=2")) == {"all-gather"}


@eight
def test_a_decoding_step_with_a_sharded_cache():
    """Under data and tensor parallelism a step only sums activations; the cache stays where it lies."""
    mesh, model = jf.mesh("data=2,tensor=2"), tiny.model("llama", num_attention_heads=4, num_key_value_heads=2)
    apply, params = jf.functional(model)
    tokens, cache = tiny.batch(rows=4)["input_ids"], model.empty_cache(4, 8)
    expected = jax.jit(apply)(params, {"input_ids": tokens, "cache": cache})
    params = jax.device_put(params, shardings(mesh, params))
    places = cache_shardings(mesh, cache)
    cache = jax.device_put(cache, places)
    assert cache.layers["0"].key.sharding.spec == P("data", "tensor", None, None)

    def step(params, cache, tokens):
        out = constrained(apply, mesh)(params, {"input_ids": tokens, "cache": cache})
        return out.last_hidden_state, out.cache

    args = (params, cache, jax.device_put(tokens, batch_sharding(mesh)))
    hidden, after = jax.jit(step, out_shardings=(None, places))(*args)
    np.testing.assert_allclose(hidden, expected.last_hidden_state, atol=1e-5)
    assert tiny.largest_difference(after.layers, expected.cache.layers) < 1e-5
    assert set(counted(step, *args, out_shardings=(None, places))) == {"all-reduce"}


@eight
def test_packed_weights_multiply_where_they_lie():
    """A model whose kernels are packed words gives the same numbers when the words are spread over the mesh."""
    model = tiny.model("llama", hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4)
    small = jf.compress.gptq(model, method="rtn", bits=4, group_size=32)
    apply, params = jf.functional(small)
    batch = tiny.batch(rows=4)
    expected = jax.jit(apply)(params, batch).logits
    for shape in ("fsdp=2", "tensor=2", "fsdp=2,tensor=2"):
        mesh = jf.mesh(shape)
        placed = jax.device_put(params, shardings(mesh, params))
        kernel = placed["layers"]["0"]["mlp"]["up"]["kernel"]
        assert {a.sharding.spec for a in (kernel.qweight, kernel.qzeros, kernel.scales)} == {
            P(*(name if name in mesh.shape else None for name in ("fsdp", "tensor")))
        }
        found = jax.jit(constrained(apply, mesh))(placed, jax.device_put(batch, batch_sharding(mesh))).logits
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


@eight
def test_data_parallel_gradients_are_summed():
    mesh, batch = jf.mesh("data=8"), tiny.batch(rows=8)
    apply, params = jf.functional(tiny.model("llama"))

    def loss(params, batch):
        return (apply(params, batch).logits ** 2).mean()

    expected = jax.jit(jax.grad(loss))(params, batch)
    params = jax.device_put(params, NamedSharding(mesh, P()))
    batch = jax.device_put(batch, batch_sharding(mesh))
    found = jax.jit(jax.grad(loss))(params, batch)
    scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(expected))
    assert tiny.largest_difference(found, expected) < 1e-5 * scale
    assert set(counted(jax.grad(loss), params, batch)) <= {"all-reduce"}
