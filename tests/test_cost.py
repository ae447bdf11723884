"""Counting by hand, by the published figure of DeiT-S, and by what is stored; the clock."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxformers as jf
from jaxformers.compress.gptq import gptq
from jaxformers.cost import count_flops, latencies


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_flops_of_products_scans_branches_and_convolutions():
    count = lambda f, *args: count_flops(jax.make_jaxpr(f)(*args))
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert count(jnp.matmul, a, b) == 2 * 3 * 4 * 5
    assert count(lambda a, b: jnp.einsum("nij,njk->nik", a, b), jnp.ones((7, 3, 4)), jnp.ones((7, 4, 5))) == 7 * 120
    assert count(lambda a: jax.lax.scan(lambda c, _: (c @ c, None), a, None, length=6)[0], jnp.ones((4, 4))) == 6 * 128
    assert count(jax.jit(jax.checkpoint(lambda a, b: jnp.tanh(a @ b))), a, b) == 120
    branches = lambda p, a: jax.lax.cond(p, lambda a: a @ a, lambda a: a, a)
    assert count(branches, True, jnp.ones((4, 4))) == 128
    once = lambda a: jax.lax.while_loop(lambda a: (a @ a).sum() < 9, lambda a: a @ a, a)
    assert count(once, jnp.ones((4, 4))) == 2 * 128
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID")
    assert count(conv, jnp.ones((2, 3, 8, 8)), jnp.ones((5, 3, 3, 3))) == 2 * (2 * 5 * 6 * 6) * (3 * 3 * 3)
    grad = jax.grad(lambda w, x: jnp.sum(x @ w))
    assert count(grad, b, a) <= 2 * 120


def test_each_row_of_a_ragged_product_meets_one_matrix():
    f = lambda x, w, sizes: jax.lax.ragged_dot(x, w, sizes).sum()
    args = jnp.ones((6, 4)), jnp.ones((3, 4, 5)), jnp.array([2, 2, 2])
    assert count_flops(jax.make_jaxpr(f)(*args)) == 2 * 6 * 4 * 5
    assert count_flops(jax.make_jaxpr(jax.grad(f, (0, 1)))(*args)) in (2 * 240, 3 * 240)  # with or without the forward


DEIT_S = {
    "model_type": "vit", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
    "intermediate_size": 1536, "num_labels": 1000,
}  # fmt: skip


def test_deit_s_has_4_6_gmacs_and_22_million_parameters():
    """The published figures (arXiv 2012.12877, tables 1 and 5), without a weight."""
    kept = []

    def build():
        apply, params = jf.functional(jf.init(DEIT_S, head="image_classification", key=jax.random.key(0)))
        kept.append(apply)
        return params

    params = jax.eval_shape(build)
    found = jf.cost(kept[0], params, {"pixel_values": shape(1, 3, 224, 224)})
    n, d = 197, 384
    by_hand = 12 * (12 * n * d**2 + 2 * n**2 * d) + 196 * 16 * 16 * 3 * d + d * 1000
    assert found.macs == by_hand and round(found.macs / 1e9, 1) == 4.6
    assert found.flops == 2 * found.macs
    assert found.parameters == 22_050_664 and found.parameter_bytes == 4 * 22_050_664
    every = jf.cost(kept[0], params, {"pixel_values": shape(1, 3, 224, 224)}, convention="all")
    assert found.flops * 1.005 < every.flops < found.flops * 1.05  # norms, softmax, activations
    assert every.macs == found.macs


def test_scanned_layers_cost_what_a_loop_costs():
    model, batch = tiny.model("bert"), tiny.batch()
    loop, scan = (jf.cost(*jf.functional(model, scan_layers=s), batch) for s in (False, True))
    assert loop.macs == scan.macs > 0
    assert loop.parameter_bytes == scan.parameter_bytes and loop.parameters == scan.parameters


def test_elementwise_operations_and_reductions_count_where_asked():
    f = lambda p, x: jnp.tanh(x @ p).sum(-1)
    args = shape(4, 5), shape(3, 4)
    assert jf.cost(f, *args).flops == 2 * 60
    assert jf.cost(f, *args, convention="all").flops == 2 * 60 + 15 + 15
    moved = lambda p, x: jnp.concatenate([x.T.reshape(-1), p.reshape(-1).astype(jnp.bfloat16)])
    assert jf.cost(moved, *args, convention="all").flops == 0


def test_bytes_of_products_are_their_operands_and_results():
    f = lambda p, x: jnp.tanh(x @ p["a"] + p["bias"]) @ p["b"]
    params = {"a": shape(4, 5), "b": shape(5, 2), "bias": shape(5), "unused": shape(100)}
    found = jf.cost(f, params, shape(3, 4))
    assert found.read_bytes == 4 * (20 + 10 + 5 + 12 + 15)  # the arguments in use, and what the first product wrote
    assert found.written_bytes == 4 * (15 + 6)
    assert found.parameters == 135 and found.parameter_bytes == 4 * 135


def test_a_lookup_reads_the_rows_it_returns():
    found = jf.cost(lambda table, ids: table[ids], shape(1000, 8), shape(3, dtype=jnp.int32))
    assert found.read_bytes == 3 * 8 * 4 + 3 * 4 and found.written_bytes == 3 * 8 * 4


def test_packed_weights_count_their_stored_bytes():
    model = tiny.model("llama", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    packed = gptq(model, method="rtn", bits=4)
    batch = {"input_ids": shape(2, 8, dtype=jnp.int32)}
    dense, small = (jf.cost(*jf.functional(m), batch) for m in (model, packed))
    assert dense.macs == small.macs and dense.parameters == small.parameters
    stored = sum(np.asarray(a).nbytes for a in jax.tree.leaves(jf.functional(packed)[1]))
    assert small.parameter_bytes == stored < dense.parameter_bytes / 3
    assert dense.read_bytes - small.read_bytes == dense.parameter_bytes - stored


def test_an_unknown_convention():
    with pytest.raises(ValueError, match="convention: expected one of products, all, got 'macs'"):
        jf.cost(jnp.matmul, shape(2, 2), shape(2, 2), convention="macs")


def test_latency_compiles_once_and_blocks():
    traced = []

    def f(params, x):
        traced.append(x.shape)
        return {"y": x @ params}

    found = jf.latency(f, jnp.ones((64, 64)), jnp.ones((5, 64)), repeats=3, warmup=1)
    assert traced == [(5, 64)] and len(found.times) == 3 and found.batch == 5
    assert found.seconds == sorted(found.times)[1] > 0 and found.throughput == 5 / found.seconds
    assert found.compile_seconds > 0 and "rows/s" in str(found)
    jitted = jf.latency(jax.jit(f), np.ones((4, 4)), {"a": np.ones((5, 4)), "b": np.ones((2, 4))}["a"], batch=7)
    assert jitted.batch == 7


def test_latency_waits_for_the_result(monkeypatch):
    """The clock is read after the values are there, not after the call has been handed to the device."""
    order = []
    block = jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda x: order.append("blocked") or block(x))
    clock = iter(range(100))
    read = lambda: order.append("clock") or next(clock)
    monkeypatch.setattr(sys.modules["jaxformers.cost"], "time", SimpleNamespace(perf_counter=read))
    found = jf.latency(jnp.sin, np.ones(3), repeats=2, warmup=1)
    assert order == ["blocked", "clock", "clock", "blocked", *["clock", "blocked", "clock"] * 2]
    assert found.times == (1, 1) and found.compile_seconds == 1


def test_programs_take_turns():
    found = latencies({"a": (jnp.sin, np.ones(3)), "b": (jnp.cos, np.ones(4))}, repeats=2, warmup=0)
    assert [(name, x.batch, len(x.times)) for name, x in found.items()] == [("a", 3, 2), ("b", 4, 2)]


@pytest.mark.parametrize(
    ("options", "args", "message"),
    [
        ({"repeats": 0}, (np.ones(3),), "repeats, warmup: expected at least 1 and 0, got 0 and 2"),
        ({"warmup": -1}, (np.ones(3),), "got 10 and -1"),
        ({}, ((np.ones(3), np.ones(4)),), "batch: the arrays of the last argument share no leading axis"),
        ({}, (1.0,), "batch: the arrays"),
    ],
)
def test_latency_refuses(options, args, message):
    with pytest.raises(ValueError, match=message):
        jf.latency(lambda x: x, *args, **options)
