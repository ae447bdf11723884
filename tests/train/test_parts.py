"""The small parts of training: streams, metrics files, rates, FLOPs, TensorBoard files, the compilation cache."""

import json
import os
import struct
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train import toy

import jaxformers as jf
from jaxformers import compilation
from jaxformers.train import flops, logs, placement, stream, tensorboard
from jaxformers.train.state import leaf_paths, narrowed, split
from jaxformers.weights.lowrank import LowRank


def drawn(s, n):
    return [s.next() for _ in range(n)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: [10, 20, 30],
        lambda: (i * i for i in range(100)),
        lambda: grain.MapDataset.range(5).shuffle(seed=1).to_iter_dataset(),
        lambda: grain.DataLoader(
            data_source=grain.sources.RangeDataSource(0, 100, 1),
            sampler=grain.samplers.IndexSampler(100, shuffle=True, seed=3, num_epochs=1),
            worker_count=0,
        ),
    ],
    ids=["list", "generator", "dataset", "loader"],
)
@pytest.mark.parametrize("position", [0, 2, 7])
def test_stream_goes_on_from_a_saved_position(make, position):
    first = stream.Stream(make())
    drawn(first, position)
    state = json.loads(json.dumps(first.state()))
    want = drawn(first, 6)
    second = stream.Stream(make())
    second.restore(state)
    assert drawn(second, 6) == want
    assert second.state() == first.state()


def test_stream_repeats_what_ends_and_says_when_it_cannot():
    assert drawn(stream.Stream([1, 2]), 5) == [1, 2, 1, 2, 1]
    with pytest.raises(ValueError, match="ended after 2 batches"):
        drawn(stream.Stream(iter([1, 2])), 3)
    with pytest.raises(ValueError, match="the checkpoint stands after batch 3, the data end at 2"):
        long = stream.Stream(iter(range(5)))
        drawn(long, 3)
        stream.Stream(iter([1, 2])).restore(long.state())


def test_positions_of_other_process_counts(monkeypatch):
    same, different = {"drawn": 3}, {"drawn": 4}
    assert stream.own_state([same, same]) == same
    with pytest.raises(ValueError, match="positions of 2 processes that differ"):
        stream.own_state([same, different])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert stream.own_state([same, different]) == different


def test_metrics_file_forgets_what_will_be_run_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = logs.MetricsFile(path)
    for step in (5, 10, 15):
        file.write({"kind": "train", "step": step, "loss": np.float32(step), "bad": float("nan")})
    file.close()
    with path.open("a") as f:
        f.write('{"kind": "train", "st')  # killed while writing
    file = logs.MetricsFile(path, resume_at=10)
    file.write({"kind": "train", "step": 15, "loss": 1.0})
    file.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in records] == [5, 10, 15] and records[0]["bad"] is None and records[-1]["loss"] == 1.0
    logs.MetricsFile(path).close()
    assert path.read_text() == "", "a new run begins a new file"


def test_meter_counts_only_the_time_that_was_training():
    now = [0.0]
    meter = logs.Meter(clock=lambda: now[0])
    for loss in (1.0, 3.0):
        meter.add({"loss": loss}, examples=8, tokens=100, flops=5e9)
        now[0] += 1.0
    with meter.paused():
        now[0] += 100.0
        with meter.paused():
            now[0] += 100.0
    got = meter.report(peak=1e10)
    assert got == {"loss": 2.0, "steps_per_s": 1.0, "examples_per_s": 8.0, "tokens_per_s": 100.0, "mfu": 0.5}
    now[0] += 4.0
    meter.add({"loss": 5.0}, 8, 0, 0.0)
    meter.add({}, 8, 0, 0.0, skipped=True)
    got = meter.report(peak=None)
    assert got == {"loss": 5.0, "steps_per_s": 0.5, "examples_per_s": 4.0, "skipped_updates": 1}


def test_progress_line_on_a_terminal(monkeypatch):
    """On a terminal: step of total, loss, rate, MFU, time left. Elsewhere nothing."""
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream_, enabled, shown in ((Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)):
        monkeypatch.setattr(sys, "stderr", stream_)
        bar = logs.Progress(20, 0, enabled)
        bar.update(10, {"loss": 1.2345, "tokens_per_s": 1500.0, "examples_per_s": 3.0, "mfu": 0.42})
        bar.close()
        text = stream_.getvalue()
        for part in ("10/20", "loss 1.234", "1,500 tokens/s", "MFU 42.0 %", "eta"):
            assert (part in text) == shown


def test_batch_size():
    ids = np.ones((4, 6), np.int32)
    assert logs.batch_size({"input_ids": ids}) == (4, 24)
    mask = np.tril(np.ones((4, 6), np.int32))
    assert logs.batch_size({"input_ids": ids, "attention_mask": mask}) == (4, 10)
    assert logs.batch_size({"x": np.ones((3, 2))}) == (3, 0)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12), ("cpu", None),
     ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H200", 989e12), ("TPU v40", None)],
)  # fmt: skip
def test_peak_by_device_kind(kind, peak):
    from types import SimpleNamespace

    assert flops.peak_flops(SimpleNamespace(device_kind=kind)) == peak


def fields(data):
    """Top-level protocol-buffer fields of a message, as (number, value) pairs."""
    found, i = [], 0

    def varint():
        nonlocal i
        value = shift = 0
        while True:
            byte = data[i]
            i += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while i < len(data):
        tag = varint()
        size = {1: 8, 5: 4}.get(tag & 7)
        if tag & 7 == 0:
            found.append((tag >> 3, varint()))
            continue
        size = varint() if size is None else size
        found.append((tag >> 3, data[i : i + size]))
        i += size
    return found


def test_tensorboard_file_by_its_format(tmp_path):
    assert tensorboard._masked_crc(b"123456789") == struct.pack("<I", 0xA282EAD8 + (0xE3069283 >> 15 | 0xE3069283 << 17 & 0xFFFFFFFF) & 0xFFFFFFFF)  # fmt: skip  # noqa: E501
    file = tensorboard.EventFile(tmp_path)
    file.write({"kind": "train", "step": 300, "loss": 1.5, "steps_per_s": 2})
    file.write({"kind": "compile", "flops": 1.0})
    file.close()
    (path,) = tmp_path.iterdir()
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert data[8:12] == tensorboard._masked_crc(data[:8])
        assert data[12 + length : 16 + length] == tensorboard._masked_crc(data[12 : 12 + length])
        events.append(fields(data[12 : 12 + length]))
        data = data[16 + length :]
    assert dict(events[0])[3] == b"brain.Event:2" and len(events) == 2
    event = dict(events[1])
    assert event[2] == 300 and len(event[1]) == 8
    scalars = [dict(fields(value)) for _, value in fields(event[5])]
    assert {s[1].decode(): struct.unpack("<f", s[2])[0] for s in scalars} == {
        "train/loss": 1.5,
        "train/steps_per_s": 2.0,
    }


def cache_report(tmp_path, code, **environment):
    keep = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION") and k != "JAXFORMERS_NO_CACHE"}
    keep |= {"XDG_CACHE_HOME": str(tmp_path), **environment}
    script = f"import jaxformers, jax\nfrom jaxformers.compilation import enable_cache\n{code}"
    done = subprocess.run([sys.executable, "-c", script], env=keep, capture_output=True, text=True, cwd=os.getcwd())
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_cache_is_off_at_import_on_when_asked_and_can_be_forbidden(tmp_path):
    show = "print(jax.config.jax_compilation_cache_dir)"
    assert cache_report(tmp_path, show) == "None"
    assert cache_report(tmp_path, "enable_cache();" + show) == str(tmp_path / "jaxformers" / "xla")
    assert cache_report(tmp_path, "print(enable_cache());" + show, JAXFORMERS_NO_CACHE="1") == "None\nNone"
    mine = str(tmp_path / "mine")
    assert cache_report(tmp_path, "enable_cache();" + show, JAX_COMPILATION_CACHE_DIR=mine) == mine


def test_cache_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="directory"):
        compilation.enable_cache(tmp_path / "file" / "cache")


def test_leaf_paths_reach_into_lists_and_typed_weights():
    weight = jf.weights.Masked(jnp.ones((2, 2)), jnp.ones((2, 2), bool))
    params = {"layers": {"0": {"kernel": weight}}, "list": [jnp.ones(1), jnp.ones(2)]}
    assert leaf_paths(params) == [
        ("layers.0.kernel.base", "layers.0.kernel"), ("layers.0.kernel.mask", "layers.0.kernel"),
        ("list.0", "list.0"), ("list.1", "list.1"),
    ]  # fmt: skip
    trained, frozen, join = split(params)
    assert set(frozen) == {"layers.0.kernel.mask"}, "booleans are never trained"
    assert jax.tree.structure(join(trained, frozen)) == jax.tree.structure(params)
    assert set(split(params, trainable="**.kernel")[0]) == {"layers.0.kernel.base"}


def _packed(shape=(32, 8)):
    from jaxformers.weights.packed import pack_codes

    codes = np.random.default_rng(0).integers(0, 16, shape)
    zeros, scales = np.full((1, shape[1]), 8), np.full((1, shape[1]), 0.05, np.float32)
    return pack_codes(codes, zeros, scales, np.zeros(shape[0], np.int32), bits=4)


def test_scales_of_packed_weights_are_trained_only_where_named():
    params = {"layers": {"0": {"kernel": _packed(), "bias": jnp.ones(8)}}}
    assert set(split(params)[0]) == {"layers.0.bias"}
    assert set(split(params, trainable="**.kernel.scales")[0]) == {"layers.0.kernel.scales"}
    masked = {"kernel": jf.weights.Masked(_packed(), jnp.ones((32, 8), bool)), "bias": jnp.ones(8)}
    assert set(split(masked)[0]) == {"bias"}, "a packed weight inside another kind"


@pytest.mark.parametrize("base", [_packed, lambda: jnp.ones((32, 8))])
def test_lora_and_adapters_are_trained_alone_with_new_heads(base):
    lora = LowRank(base(), jnp.ones((32, 2)), jnp.zeros((2, 8)))
    block = {"kernel": lora, "bias": jnp.ones(8), "adapter": {"up": {"kernel": jnp.ones((4, 8))}}}
    head = {"dense": {"kernel": jnp.ones((8, 8))}, "classifier": {"kernel": jnp.ones((8, 2))}}
    updates = {"layers.0.kernel.a", "layers.0.kernel.b", "layers.0.adapter.up.kernel"}
    params = {"layers": {"0": block}, "norm": {"scale": jnp.ones(8)}, "head": head}
    assert set(split(params)[0]) == updates | {"head.dense.kernel", "head.classifier.kernel"}
    assert set(split(params, freeze="head.**")[0]) == updates
    language = {"layers": {"0": block}, "head": {"decoder": {"kernel": jnp.ones((8, 9))}}}
    assert set(split(language)[0]) == updates, "the head of a language model is no new one"
    below = {"student": params, "teacher": {"head": {"decoder": {"kernel": jnp.ones((8, 9))}}}}
    expected = {f"student.{p}" for p in updates | {"head.dense.kernel", "head.classifier.kernel"}}
    assert set(split(below)[0]) == expected
    everything = split(params, trainable="**")[0]
    assert "norm.scale" in everything and "layers.0.bias" in everything
    distilled = {"student": {"kernel": jnp.ones((3, 3))}, "teacher": params}
    assert set(split(distilled, freeze="teacher.**")[0]) == {"student.kernel"}, "a frozen part decides nothing"


def test_a_narrowed_default_is_told():
    plain = {"layers": {"0": {"kernel": jnp.ones((32, 8)), "ids": jnp.ones(3, int)}}}
    assert narrowed(plain) == ""
    told = narrowed({"kernel": LowRank(jnp.ones((32, 8)), jnp.ones((32, 2)), jnp.zeros((2, 8)))})
    assert "training 80 of 336 numbers" in told and "`trainable`" in told


def test_optimiser_state_is_placed_like_its_parameters():
    import optax

    mesh = jf.mesh("fsdp=2,tensor=4")
    P = jax.sharding.PartitionSpec
    params = {"layers.0.mlp.up.kernel": jnp.ones((8, 16)), "b": jnp.ones(3)}
    places = {"layers.0.mlp.up.kernel": jax.sharding.NamedSharding(mesh, P("fsdp", "tensor")),
              "b": jax.sharding.NamedSharding(mesh, P())}  # fmt: skip
    adam = placement.state_shardings(jax.eval_shape(optax.adam(1e-3).init, params), params, places, mesh)
    assert adam[0].mu["layers.0.mlp.up.kernel"].spec == P("fsdp", "tensor") and adam[0].count.spec == P()
    rule = jf.train.adafactor(1e-3)
    factored = placement.state_shardings(jax.eval_shape(rule.init, params), params, places, mesh)
    assert factored.row["layers.0.mlp.up.kernel"].spec == P("fsdp")
    assert factored.col["layers.0.mlp.up.kernel"].spec == P("tensor")


def test_toy_objective_is_what_the_tests_think():
    """The toy task has something to learn: zero weights score the variance of its targets."""
    batch = toy.arrays()
    zero = jax.tree.map(jnp.zeros_like, toy.parameters())
    assert float(toy.objective(toy.apply, zero, batch, None)[0]) == pytest.approx(
        float((batch["y"] ** 2).mean()), rel=1e-5
    )
