"""Checkpoints of transformers 4's Flax classes: read as they are, equal to what those classes answered."""

import json
import shutil

import numpy as np
import pytest
from flax import serialization
from parity import assert_close_scaled, run

import jaxformers as jf
from jaxformers.flax_checkpoint import FlaxFile
from jaxformers.safetensors_io import CheckpointError, open_checkpoint

FOLDERS = ("bert", "bert-sharded", "gpt2", "t5", "vit")


def arrays_of(folder):
    with np.load(folder / "io.npz") as z:
        return dict(z)


def batch_of(arrays):
    names = ("input_ids", "attention_mask", "decoder_input_ids", "pixel_values")
    return {name: arrays[name] for name in names if name in arrays}


@pytest.mark.parametrize("name", FOLDERS)
def test_answers_as_the_flax_classes_did(name, oracles):
    folder = oracles / "flax" / name
    expected = arrays_of(folder)
    batch = batch_of(expected)
    out = run(jf.load(folder), batch)
    real = batch["attention_mask"] == 1 if "attention_mask" in batch and name != "t5" else None
    if "logits" in expected:
        assert_close_scaled(out.logits, expected["logits"], 2e-5, real)
    else:
        assert_close_scaled(out.last_hidden_state, expected["last_hidden_state"], 2e-5, real)
        assert_close_scaled(out.pooled, expected["pooler_output"], 2e-5)


def test_greedy_ids(oracles):
    folder = oracles / "flax" / "gpt2"
    expected = arrays_of(folder)
    prompt = expected["input_ids"][0]
    found = jf.generate(jf.load(folder), prompt, max_new_tokens=5, eos_token_id=())
    assert [*prompt.tolist(), *found] == expected["greedy"][0].tolist()


@pytest.mark.parametrize("name", ["bert", "bert-sharded"])
def test_saved_anew_as_safetensors(name, oracles, tmp_path):
    model = jf.load(oracles / "flax" / name)
    jf.save(model, tmp_path / "new")
    old, new = open_checkpoint(oracles / "flax" / name), open_checkpoint(tmp_path / "new")
    assert set(new) <= set(old)
    for tensor in new:
        np.testing.assert_array_equal(new[tensor].read(), old[tensor].read())


def test_safetensors_come_first(oracles, tmp_path):
    shutil.copytree(oracles / "flax" / "bert", tmp_path / "both")
    jf.save(jf.load(oracles / "flax" / "bert"), tmp_path / "both")
    (tmp_path / "both" / "flax_model.msgpack").write_bytes(b"damaged")
    assert jf.load(tmp_path / "both").head_name == "masked_lm"


def test_statistics_and_convolutions(tmp_path):
    rng = np.random.default_rng(0)
    kernel, mean = rng.random((3, 4, 5, 6)).astype(np.float32), rng.random(6).astype(np.float32)
    tree = {"params": {"stem": {"kernel": kernel, "bias": mean}}, "batch_stats": {"norm": {"mean": mean, "var": mean}}}
    (tmp_path / "x.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    found = FlaxFile(tmp_path / "x.msgpack")
    assert set(found) == {"stem.weight", "stem.bias", "norm.running_mean", "norm.running_var"}
    np.testing.assert_array_equal(found["stem.weight"].read()[2, 1], kernel[:, :, 1, 2])


@pytest.mark.parametrize("content", [
    b"", b"\xc1", b"\x80", b"not msgpack at all", b"\xdf\xff\xff\xff\xff", b"\x81\xa1a\xa1b", b"\x81\x01\x02",
    serialization.msgpack_serialize({"a": np.zeros(4)})[:-8],
])  # fmt: skip
def test_malformed_files_are_named(content, oracles, tmp_path):
    shutil.copy(oracles / "flax" / "bert" / "config.json", tmp_path)
    (tmp_path / "flax_model.msgpack").write_bytes(content)
    with pytest.raises(CheckpointError, match="flax_model.msgpack|missing|no layers|tensors"):
        jf.load(tmp_path)


def test_nan_is_named(oracles, tmp_path):
    shutil.copytree(oracles / "flax" / "bert", tmp_path / "nan")
    file = tmp_path / "nan" / "flax_model.msgpack"
    tree = serialization.msgpack_restore(file.read_bytes())
    layer = tree["bert"]["encoder"]["layer"]["1"]["output"]["dense"]
    layer["kernel"] = np.full_like(layer["kernel"], np.nan)
    file.write_bytes(serialization.msgpack_serialize(tree))
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.1\.output\.dense\.weight.*NaN"):
        jf.load(tmp_path / "nan")


def test_a_shard_is_missing(oracles, tmp_path):
    shutil.copytree(oracles / "flax" / "bert-sharded", tmp_path / "cut")
    (tmp_path / "cut" / "flax_model-00003-of-00005.msgpack").unlink()
    with pytest.raises(CheckpointError, match="flax_model-00003-of-00005.msgpack"):
        jf.load(tmp_path / "cut")
    index = tmp_path / "cut" / "flax_model.msgpack.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="plain name"):
        jf.load(tmp_path / "cut")
