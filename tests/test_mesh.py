"""Sharding: what a path's array is cut along, models loaded slice by slice, and the collectives that result."""

import re

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

import jaxformers as jf
from jaxformers import weights
from jaxformers.mesh import RULES, batch_sharding, constrained, sharding, shardings, spec

eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
P = PartitionSpec


def collectives(fn, *args) -> dict[str, int]:
    """How often each kind of collective occurs in the compiled program."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    found = {kind: len(re.findall(rf"= \S+ {kind}(?:-start)?\(", text)) for kind in kinds}
    return {kind: n for kind, n in found.items() if n}


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
    assert cut("layers.0.attention.query.kernel.b", 2, 8) == P("fsdp", "tensor")
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
    assert [a.sharding.spec for a in (kernel.base, kernel.a, kernel.b)] == [P("fsdp", "tensor")] * 3
    assert tiny.largest_difference(jf.functional(sharded)[1], jf.functional(model)[1]) == 0


@eight
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_collectives(name):
    model = tiny.model(name)
    layers = len(model.layers)

    def counted(shape, **settings):
        mesh = jf.mesh(shape)
        apply, params = jf.functional(model, **settings)
        apply = constrained(apply, mesh)
        params = jax.device_put(params, shardings(mesh, params))
        ids = jax.device_put(np.ones((8, 6), int), batch_sharding(mesh))
        return collectives(lambda params, ids: apply(params, {"input_ids": ids}).last_hidden_state, params, ids)

    assert counted("data=8") == {}  # a data-parallel forward pass needs no communication
    assert counted("data=8", scan_layers=True) == {}
    tensor = counted("tensor=2")  # one sum after attention's output, one after the MLP's; one for the vocabulary
    assert tensor.get("all-reduce", 0) <= 2 * layers + 1 and tensor.get("all-reduce", 0) >= 2 * layers
    for settings in ({}, {"scan_layers": True}):
        fsdp = counted("fsdp=2", **settings)
        assert set(fsdp) == {"all-gather"}  # weights are gathered as needed, activations stay where they are
    assert counted("data=2,fsdp=2").keys() == {"all-gather"}


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
    assert set(collectives(jax.grad(loss), params, batch)) <= {"all-reduce"}
