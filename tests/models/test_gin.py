"""GIN against the official GNNGraphMVP; padding, order of atoms and running statistics; batches of graphs."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parity import assert_close, assert_close_scaled
from safetensors.numpy import load_file

import jaxformers as jf
from jaxformers import nn
from jaxformers.data.graphs import pack, unpack
from jaxformers.models import gin

SIZES = {"sizes": (120, 3), "edge_sizes": (6, 3)}
STATISTICS = "layers.*.norm.{mean,var}"


def read(folder):
    with np.load(folder / "oracle.npz") as z:
        return {name: z[name] for name in z.files}


def graphs_of(arrays):
    """The oracle's batch taken apart."""
    found = []
    for i in range(int(arrays["batch"].max()) + 1):
        nodes = np.flatnonzero(arrays["batch"] == i)
        edges = np.isin(arrays["edge_index"][0], nodes)
        index = arrays["edge_index"][:, edges] - nodes[0]
        found.append({"x": arrays["x"][nodes], "edge_index": index, "edge_attr": arrays["edge_attr"][edges]})
    return found


@pytest.fixture
def folder(oracles):
    return oracles / "backbones" / "gin" / "gin"


@pytest.mark.parametrize("padded", [False, True])
def test_vectors_of_atoms_and_molecules(folder, padded):
    expected = read(folder)
    graphs = graphs_of(expected)
    exact = {"nodes": 47, "edges": 84, "size": 8}
    batch = pack(graphs, **({"nodes": 61, "edges": 90, "size": 11} if padded else exact), **SIZES)
    apply, params = jf.functional(jf.load(folder))
    out = jax.jit(apply)(params, batch)
    assert_close(np.concatenate(unpack(out.last_hidden_state, batch)), expected["node_eval"], 1e-5)
    assert_close(out.pooled[:8], expected["graph_eval"], 1e-5)
    assert not np.any(out.pooled[8:]) and np.isfinite(out.last_hidden_state).all()


@pytest.mark.parametrize("padded", [False, True])
def test_training_normalises_by_the_batch_and_moves_the_statistics(folder, padded):
    expected = read(folder)
    batch = pack(graphs_of(expected), **({"nodes": 61, "size": 11} if padded else {"nodes": 47, "size": 8}))
    model = jf.load(folder)
    apply, params = jf.functional(model)
    key = jax.random.key(0)
    out, seen = jax.jit(jf.reap(apply, STATISTICS))(params, batch, rngs=key)
    assert_close(np.concatenate(unpack(out.last_hidden_state, batch)), expected["node_train"], 2e-5)
    assert_close(out.pooled[:8], expected["graph_train"], 2e-5)
    new = nn.followed(params, seen, model.config.momentum)
    for i in range(5):
        for part in ("mean", "var"):
            assert_close(new["layers"][str(i)]["norm"][part], expected[f"after_running_{part}_{i}"], 1e-6)
    unchanged = jax.tree.map(np.array_equal, new, params)
    assert all(jax.tree.leaves(unchanged["embeddings"])) and unchanged["layers"]["0"]["norm"]["scale"]

    loss = lambda params: jnp.square(apply(params, batch, rngs=key).pooled[:8]).mean()
    grads = jax.jit(jax.grad(loss))(params)
    assert_close_scaled(grads["embeddings"]["atom"]["embedding"], expected["grad_x_embedding1"], 1e-4)
    assert_close_scaled(grads["layers"]["0"]["mlp"]["up"]["kernel"].T, expected["grad_mlp0"], 1e-4)
    assert not np.any(grads["layers"]["0"]["norm"]["mean"])
    with pytest.raises(ValueError, match=r"seen: layers\.9\.norm\.mean is no running statistic"):
        nn.followed(params, {"layers.9.norm.mean": jnp.zeros(24)})


def test_equals_the_official_batch_of_biomedgpt(shared, folder, tmp_path):
    with np.load(shared / "oracles" / "biomedgpt" / "gin.npz") as z:
        arrays = {name: z[name] for name in z.files}
    from safetensors.numpy import save_file

    weights = {name.removeprefix("w::"): value for name, value in arrays.items() if name.startswith("w::")}
    save_file({name: np.atleast_1d(value) for name, value in weights.items()}, tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    layers = sum(name.endswith("mlp.0.weight") for name in weights)
    config |= {"emb_dim": weights["x_embedding1.weight"].shape[1], "num_layer": layers}
    (tmp_path / "config.json").write_text(json.dumps(config))
    batch = pack(graphs_of(arrays), **SIZES)
    apply, params = jf.functional(jf.load(tmp_path))
    out = jax.jit(apply)(params, batch)
    assert_close(np.concatenate(unpack(out.last_hidden_state, batch)), arrays["node_eval"], 2e-5)
    assert_close(out.pooled, arrays["graph_eval"], 2e-5)


@pytest.mark.parametrize("jumping", ["last", "concat", "max", "sum"])
def test_jumping_knowledge_and_pooling(folder, jumping):
    model = jf.load(folder, jumping=jumping)
    batch = pack(graphs_of(read(folder)))
    apply, params = jf.functional(model)
    out, seen = jax.jit(jf.reap(apply, ("embeddings", "layers.*.output")))(params, batch)
    every = np.stack([seen["embeddings"], *(seen[f"layers.{i}.output"] for i in range(5))])
    whole = np.concatenate(every, axis=-1)
    expected = {"last": every[-1], "concat": whole, "max": every.max(0), "sum": every.sum(0)}[jumping]
    assert_close(out.last_hidden_state, expected, 1e-5)
    for mode, by_hand in (("mean", np.mean), ("sum", np.sum), ("max", np.max)):
        found = nn.graph_pool(out.last_hidden_state, batch["batch"], 9, batch["node_mask"], mode=mode)
        for i, own in enumerate(unpack(out.last_hidden_state, batch)):
            assert_close(found[i], by_hand(own, axis=0), 1e-4)
        assert not np.any(found[8])  # a graph without nodes


@functools.cache
def small():
    """A compiled GIN and its weights."""
    model = jf.init(gin.Config(num_hidden_layers=2, hidden_size=6), key=jax.random.key(0))
    apply, params = jf.functional(model)
    return jax.jit(apply), params


@given(st.integers(0, 2**31 - 1))
def test_order_of_atoms_and_company_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    step, params = small()

    def graph(n, m):
        return {
            "x": np.stack([rng.integers(0, 119, n), rng.integers(0, 3, n)], 1),
            "edge_index": rng.integers(0, n, (2, m)),
            "edge_attr": np.stack([rng.integers(0, 4, m), rng.integers(0, 3, m)], 1),
        }

    first, second = graph(5, 8), graph(3, 0)
    order = rng.permutation(5)
    place = np.argsort(order)
    shuffled = {**first, "x": first["x"][order], "edge_index": place[first["edge_index"]]}
    both = unpack(step(params, batch := pack([first, second])).last_hidden_state, batch)
    alone = unpack(step(params, batch := pack([shuffled])).last_hidden_state, batch)
    assert_close(alone[0], both[0][order], 1e-5)


def test_save_and_load(folder, tmp_path):
    model = jf.load(folder)
    jf.save(model, tmp_path / "copy")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "copy"))
    before = {name: value for name, value in before.items() if not name.endswith("num_batches_tracked")}
    assert set(before) == set(after) and all(np.array_equal(before[k], after[k]) for k in before)
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config == json.loads((folder / "config.json").read_text()) | {
        "architectures": ["GNNGraphMVP"], "dtype": "float32", "loop_bond_type": 4,
    }  # fmt: skip
    assert jf.load(tmp_path / "copy").config == model.config


def test_dropout_and_frozen_statistics(folder):
    batch = pack(graphs_of(read(folder)))
    apply, params = jf.functional(jf.load(folder, hidden_dropout_prob=0.5))
    step = jax.jit(lambda key: apply(params, batch, rngs=key).pooled)
    assert np.abs(step(jax.random.key(0)) - step(jax.random.key(1))).max() > 0.01
    assert np.array_equal(jax.jit(apply)(params, batch).pooled, jax.jit(apply)(params, batch).pooled)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jumping": "first"}, "JK must be one of last, concat, max, sum, got 'first'"),
        ({"graph_pooling": "set2set"}, "graph_pooling must be one of mean, sum, max, got 'set2set'"),
        ({"num_bond_type": 4}, r"loop: features \(4, 0\) are not among 4 kinds"),
    ],
)
def test_configs_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        jf.init(dataclasses.replace(gin.Config(num_hidden_layers=1, hidden_size=4), **settings), key=jax.random.key(0))


ONE = {"x": np.zeros((2, 2), int), "edge_index": np.array([[0, 1], [1, 0]]), "edge_attr": np.zeros((2, 2), int)}


@pytest.mark.parametrize(
    ("graphs", "settings", "message"),
    [
        ([], {}, "expected at least one"),
        ([ONE] * 3, {"nodes": 5}, "nodes=5: the graphs have 6"),
        ([ONE] * 3, {"edges": 5}, "edges=5: the graphs have 6"),
        ([ONE] * 3, {"size": 2}, "size=2: there are 3 graphs"),
        ([ONE, {**ONE, "edge_index": np.array([[0, 2], [1, 0]])}], {}, "item 1 has 2 nodes, its edges go from 0 to 2"),
        ([{**ONE, "x": np.zeros((0, 2), int)}], {}, "item 0 has x int64"),
        ([{**ONE, "x": np.zeros((2, 2))}], {}, "item 0 has x float64"),
        ([{**ONE, "edge_attr": np.zeros((3, 2), int)}], {}, "expected whole numbers"),
        ([{**ONE, "x": np.full((2, 2), 3)}], SIZES, r"x\[0, 1\] is 3, of 3 rows of its table"),
        ([{**ONE, "edge_attr": np.full((2, 2), -1)}], {}, r"edge_attr\[0, 0\] is -1"),
        ([{**ONE, "x": np.zeros((2, 9), int)}], SIZES, "x has 9 features, there are 2 tables"),
    ],
)
def test_graphs_that_are_refused(graphs, settings, message):
    with pytest.raises(ValueError, match=message):
        pack(graphs, **settings)


def test_packing():
    lone = {"x": np.ones((1, 2), int), "edge_index": np.zeros((2, 0)), "edge_attr": np.zeros((0, 2))}
    batch = pack([ONE, lone, ONE], nodes=8, edges=6, size=4)
    assert batch["batch"].tolist() == [0, 0, 1, 2, 2, 3, 3, 3]
    assert batch["edge_index"].tolist() == [[0, 1, 3, 4, 7, 7], [1, 0, 4, 3, 7, 7]]
    assert batch["node_mask"].sum() == 5 and batch["edge_mask"].sum() == 4 and batch["graph_mask"].sum() == 3
    assert [len(rows) for rows in unpack(np.zeros((8, 3)), batch)] == [2, 1, 2]
    assert pack([ONE])["x"].shape == (64, 2) and pack([ONE] * 33)["x"].shape == (128, 2)
    assert all(array.dtype in (np.int32, bool) for array in batch.values())
