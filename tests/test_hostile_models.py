"""`jf.load` and `jf.save` on hostile and unlucky input, end to end."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corpus import CORPUS, FILE, LAYER, WORD, edit_json, edit_tensors, spoilt, write, write_valid
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import jaxformers as jf
from jaxformers.safetensors_io import CheckpointError, open_checkpoint

QUERY = LAYER + "attention.self.query.weight"


def config(**changes):
    return edit_json("config.json", lambda values: values.update(changes))


def tensors(change):
    return edit_tensors(FILE, change)


def put(name, array):
    return tensors(lambda found: found.update({name: array}))


def surgery(function, arguments=None):
    return config(jaxformers={"surgery": [{"function": function, "arguments": arguments or {}}]})


def dense(settings, **arrays):
    """A sentence-transformers layout whose Dense module has these settings and weights."""

    def spoil(d: Path) -> None:
        (d / "2_Dense").mkdir()
        (d / "2_Dense" / "config.json").write_text(json.dumps(settings))
        save_file({name.replace("_", "."): array for name, array in arrays.items()}, d / "2_Dense" / FILE)
        (d / "modules.json").write_text(json.dumps([{"type": "x.Dense", "path": "2_Dense"}]))

    return spoil


def modules(text: str):
    return write("modules.json", text)


LORA = "jaxformers.weights.lowrank:_abstract_lora"
CASES = {
    "no config.json": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config is not JSON": (write("config.json", "{"), "config.json: not valid JSON"),
    "config is a list": (write("config.json", "[]"), "config.json: holds a JSON list"),
    "config nested without end": (write("config.json", "[" * 1_000_000), "config.json: not valid JSON"),
    "config with a key twice": (write("config.json", '{"a": 1, "a": 2}'), "config.json: key 'a' occurs twice"),
    "no model_type": (edit_json("config.json", lambda c: c.pop("model_type")), "config.json: no model_type"),
    "model_type is a list": (config(model_type=["bert"]), "config.json: no model_type"),
    "model_type unknown": (config(model_type="nope"), "model_type 'nope' is not known; known are .*bert, "),
    "model_type is a path": (config(model_type="../../x"), "config.json: model_type '../../x' is not known"),
    "model_type without end": (config(model_type="\n" * 10**6), r"model_type '\\n\\n.*'\.\.\. is not known"),
    "architectures is text": (config(architectures="BertModel"), "architectures must be a list of class names"),
    "architectures unknown": (config(architectures=["Foo"]), "architectures names 'Foo'"),
    "architectures of another head": (config(architectures=["T5WithLMHeadModel"]), "no head 'seq2seq_lm'; it has"),
    "head without weights": (config(architectures=["BertForTokenClassification"]), "no weights for head.classifier"),
    "hidden_size 16": (config(hidden_size=16), r"embeddings.LayerNorm.bias has shape \(8,\), .* asks for \(16,\)"),
    "hidden_size 0": (config(hidden_size=0), "hidden_size must be 1 or more, got 0"),
    "hidden_size negative": (config(hidden_size=-8), "hidden_size must be a whole number of 0 or more, got -8"),
    "hidden_size text": (config(hidden_size="8"), "hidden_size must be a whole number of 0 or more, got '8'"),
    "hidden_size fraction": (config(hidden_size=8.5), "hidden_size must be a whole number of 0 or more, got 8.5"),
    "hidden_size 2^70": (config(hidden_size=2**70), "hidden_size must be a whole number"),
    "sizes of 2^40": (config(hidden_size=2**40, intermediate_size=2**40, vocab_size=2**40), "asks for"),
    "heads that do not divide": (config(num_attention_heads=3), "width 8 is not divisible by 3 heads"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads must be 1 or more, got 0"),
    "a layer too many": (config(num_hidden_layers=2), "tensors missing: encoder.layer.1.attention.self.key.bias"),
    "a layer too few": (config(num_hidden_layers=0), "tensors that have no place in this model: encoder.layer.0"),
    "2000 layers": (config(num_hidden_layers=2000), "asks for 2000 layers; there are 23 tensors"),
    "10^9 layers": (config(num_hidden_layers=10**9), "num_hidden_layers = 1000000000 is beyond reason"),
    "vocabulary too large": (config(vocab_size=12), rf"{WORD} has shape \(11, 8\), .* asks for \(12, 8\)"),
    "vocabulary too small": (config(vocab_size=10), rf"{WORD} has shape \(11, 8\), .* asks for \(10, 8\)"),
    "positions": (config(max_position_embeddings=13), r"position_embeddings.weight has shape \(12, 8\)"),
    "intermediate_size": (config(intermediate_size=32), r"output.dense.weight has shape \(8, 16\), .* \(8, 32\)"),
    "hidden_act unknown": (config(hidden_act="foo"), "activation 'foo' is unknown; there are gelu"),
    "hidden_act is a list": (config(hidden_act=["gelu"]), r"hidden_act must be text, got \['gelu'\]"),
    "eps NaN": (config(layer_norm_eps=float("nan")), "layer_norm_eps must be a number, got nan"),
    "eps negative": (config(layer_norm_eps=-1.0), "layer_norm_eps must be a number of 0 or more, got -1.0"),
    "dropout 7": (config(hidden_dropout_prob=7), "hidden_dropout_prob must be a number from 0 to 1, got 7"),
    "10^9 labels": (config(num_labels=10**9), "num_labels = 1000000000 is beyond reason"),
    "a decoder's head": (config(architectures=["BertForCausalLM"]), "causal_lm is a decoder's; .* is_decoder"),
    "a decoder's attention": (config(add_cross_attention=True), "add_cross_attention is for decoders"),
    "surgery is text": (config(jaxformers="x"), "jaxformers.surgery must be a list of records"),
    "surgery is a list of numbers": (config(jaxformers={"surgery": [3]}), "jaxformers.surgery must be a list"),
    "surgery elsewhere": (surgery("os:system", {"command": "true"}), "'os:system' is no surgery of jaxformers"),
    "surgery that saves": (surgery("jaxformers.hub:save", {"directory": "x"}), "'jaxformers.hub:save' is no surgery"),
    "surgery through a module": (surgery("jaxformers.hub:os.mkdir"), "is no surgery of jaxformers"),
    "surgery not there": (surgery("jaxformers.hub:abstract_x"), "has no jaxformers.hub:abstract_x"),
    "surgery with other arguments": (surgery(LORA, {"foo": 1}), "surgery .*_abstract_lora: .*'foo'"),
    "surgery of rank 2^40": (
        surgery(LORA, {"targets": ["**.query"], "rank": 2**40, "alpha": 1}),
        "lora_A.* is missing",
    ),
    "surgery without its weights": (surgery(LORA, {"targets": ["**.query"], "rank": 2, "alpha": 1}), "lora_A.*missing"),
    "quantisation is text": (config(quantization_config="x"), "quantization_config"),
    "quantisation of another kind": (config(quantization_config={"quant_method": "awq"}), "'awq' is not supported"),
    "5 bits": (config(quantization_config={"bits": 5, "group_size": 4, "sym": True}), "bits must be one of .*got 5"),
    "a tensor missing": (tensors(lambda t: t.pop(QUERY)), f"tensors missing: {QUERY}"),
    "a tensor too many": (put("foo.bar", np.zeros(2)), "tensors that have no place in this model: foo.bar"),
    "20000 tensors too many": (
        tensors(lambda t: t.update({f"foo.{i}": np.zeros(1) for i in range(20_000)})),
        "no place in this model: foo.0; foo.1; .* and 19995 more",
    ),
    "a name made for terminals": (
        put("\x1b[2J\n" + "x" * 10**5, np.zeros(2)),
        r"no place in this model: \\x1b\[2J\\nxxx",
    ),
    "a tensor under two names": (tensors(lambda t: t.update({"bert." + QUERY: t[QUERY]})), "several tensors for one"),
    "old and new spelling": (put("embeddings.LayerNorm.gamma", np.zeros(8)), "several tensors for one parameter"),
    "shape": (
        put(QUERY, np.zeros((8, 9), np.float32)),
        rf"{QUERY} has shape \(8, 9\), but config.json asks for \(8, 8\)",
    ),
    "one dimension": (put(QUERY, np.zeros(64, np.float32)), rf"{QUERY} has shape \(64,\)"),
    "no dimension": (put(QUERY, np.zeros((), np.float32)), rf"{QUERY} has shape \(\)"),
    "three dimensions": (put(QUERY, np.zeros((8, 8, 1), np.float32)), rf"{QUERY} has shape \(8, 8, 1\)"),
    "no rows": (put(QUERY, np.zeros((0, 8), np.float32)), rf"{QUERY} has shape \(0, 8\)"),
    "whole numbers": (
        put(QUERY, np.zeros((8, 8), np.int64)),
        f"{QUERY} has dtype int64, expected a floating-point one",
    ),
    "complex numbers": (put(QUERY, np.zeros((8, 8), np.complex64)), f"{QUERY} has dtype complex64"),
    "NaN": (tensors(lambda t: t[QUERY].__setitem__((3, 4), np.nan)), f"{FILE}: tensor '{QUERY}' contains NaN or inf"),
    "infinity": (tensors(lambda t: t[WORD].__setitem__((10, 7), -np.inf)), f"{FILE}: tensor '{WORD}' contains NaN"),
    "modules.json is an object": (modules("{}"), "modules.json: holds a JSON dict, not a list"),
    "modules.json of numbers": (modules("[3]"), "modules.json: holds 3, not a module"),
    "module unknown": (modules('[{"type": "x.Foo", "path": ""}]'), "modules.json: module 'Foo' is not supported"),
    "module elsewhere": (modules('[{"type": "x.Pooling", "path": "../x"}]'), "path '../x' leaves the checkpoint"),
    "module with NUL": (modules('[{"type": "x.Pooling", "path": "a\\u0000"}]'), "cannot be read"),
    "module missing": (modules('[{"type": "x.Pooling", "path": "1_P"}]'), "1_P/config.json: cannot be read"),
    "dense without weights": (dense({}), "2_Dense: expected a linear.weight of shape"),
    "dense of another width": (
        dense({}, linear_weight=np.zeros((4, 9), np.float32)),
        "2_Dense: expected a linear.weight",
    ),
    "dense of one dimension": (dense({}, linear_weight=np.zeros(8, np.float32)), "2_Dense: expected a linear.weight"),
    "dense with NaN": (dense({}, linear_weight=np.full((4, 8), np.nan, np.float32)), "'linear.weight' contains NaN"),
    "dense activation": (dense({"activation_function": []}), r"2_Dense: activation_function \[\] is not supported"),
}


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """What the first load imports and compiles is not the malformed input's time."""
    jf.load(write_valid(tmp_path_factory.mktemp("warm") / "c", shards=False))


@pytest.mark.parametrize("case", CASES)
def test_load_refuses_by_name_within_a_second(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    spoil, message = CASES[case]
    spoil(write_valid(tmp_path / "c", shards=False))
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        jf.load(tmp_path / "c")
    assert time.process_time() - start < 1
    assert len(str(caught.value)) < 2000 and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("case", CORPUS)
def test_load_refuses_malformed_files(tmp_path, case):
    spoilt(tmp_path / "c", case)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=CORPUS[case][2]):
        jf.load(tmp_path / "c")
    assert time.process_time() - start < 1
    assert not (tmp_path / "c" / "sprung").exists()


@pytest.mark.parametrize("shards", [False, True])
def test_load_takes_the_unspoilt_one(tmp_path, shards):
    directory = write_valid(tmp_path / "c", shards=shards)
    model = jf.load(directory)
    apply, params = jf.functional(model)
    word = {name: tensor.read() for name, tensor in open_checkpoint(directory).items()}[WORD]
    assert np.array_equal(params["embeddings"]["token"]["embedding"], word)
    assert apply(params, {"input_ids": np.array([[1, 2, 3]])}).last_hidden_state.shape == (1, 3, 8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dtype": "float99"}, "dtype: expected a floating-point type"),
        ({"dtype": "int8"}, "dtype: expected a floating-point type"),
        ({"head": "foo"}, "head: Bert has no head 'foo'; it has masked_lm"),
        ({"hiden_size": 8}, "hiden_size: Config has no such field"),
        ({"mapped": True, "dtype": "bfloat16"}, "mapped"),
    ],
)
def test_bad_arguments_of_load_are_named(tmp_path, arguments, message):
    directory = write_valid(tmp_path / "c", shards=False)
    with pytest.raises(ValueError, match=message):
        jf.load(directory, **arguments)


def test_a_file_and_a_missing_directory(tmp_path):
    directory = write_valid(tmp_path / "c", shards=False)
    with pytest.raises(CheckpointError, match="is a file"):
        jf.load(directory / FILE)
    with pytest.raises(CheckpointError, match="no such directory"):
        jf.load(tmp_path / "missing")


config_values = (
    st.none() | st.booleans() | st.integers(-3, 40) | st.integers(2**31, 2**80) | st.floats() | st.text(max_size=3)
    | st.lists(st.integers(0, 3), max_size=3) | st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2)
)  # fmt: skip
KEYS = [
    "architectures", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size", "hidden_act", "layer_norm_eps", "pad_token_id", "hidden_dropout_prob",
    "id2label", "num_labels", "jaxformers", "quantization_config", "tie_word_embeddings", "torch_dtype", "is_decoder",
    "position_embedding_type", "classifier_dropout", "initializer_range", "dtype",
]  # fmt: skip


@settings(max_examples=60)
@given(changes=st.dictionaries(st.sampled_from(KEYS), config_values, min_size=1, max_size=3))
def test_any_config_gives_a_named_error_or_a_model(tmp_path_factory, changes):
    directory = write_valid(tmp_path_factory.mktemp("any") / "c", shards=False)
    config(**changes)(directory)
    try:
        model = jf.load(directory)
    except ValueError as error:
        assert len(str(error)) < 2000
    else:
        assert model.config.hidden_size == 8


def other_model() -> object:
    model = jf.init(
        {"model_type": "bert", "vocab_size": 7, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 8, "max_position_embeddings": 8},
        key=jax.random.key(0),
    )  # fmt: skip
    return model


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "mkdir"])
def test_a_failing_save_leaves_the_old_checkpoint(tmp_path, monkeypatch, code, call):
    directory = write_valid(tmp_path / "c", shards=False)
    before = {p.name: p.read_bytes() for p in directory.iterdir()}

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="which is as it was before: " + os.strerror(code)):
        jf.save(other_model(), directory)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    jf.load(directory)


def test_saving_over_another_checkpoint_leaves_nothing_that_changes_how_it_is_read(tmp_path):
    directory = write_valid(tmp_path / "c", shards=True)
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    modules(json.dumps([{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}]))(directory)
    write("quantize_config.json", '{"bits": 4}')(directory)
    write("README.md", "mine")(directory)
    assert jf.load(directory).head_name == "sentence"
    model = other_model()
    jf.save(model, directory)
    assert sorted(p.name for p in directory.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = jf.load(directory)
    assert again.head_name is None and again.config.hidden_size == 4
    jax.tree.map(np.testing.assert_array_equal, jf.functional(again)[1], jf.functional(model)[1])


def test_saving_over_the_checkpoint_that_the_model_came_from(tmp_path):
    directory = write_valid(tmp_path / "c", shards=False)
    before = load_file(directory / FILE)
    jf.save(jf.load(directory, mapped=True), directory, max_shard_bytes=1000)  # weights still in the old file
    after = {name: tensor.read() for name, tensor in open_checkpoint(directory).items()}
    assert len(list(directory.glob("model-*.safetensors"))) > 1 and not (directory / FILE).exists()
    assert set(after) == set(before) and all(np.array_equal(after[name], before[name]) for name in before)


def test_loaded_weights_are_no_alias_of_the_file(tmp_path):
    directory = write_valid(tmp_path / "c", shards=False)
    params = jf.functional(jf.load(directory))[1]
    before = jax.tree.map(lambda a: np.array(a), params)
    with open(directory / FILE, "r+b") as file:  # in place, as another program might
        file.seek(-200, os.SEEK_END)
        file.write(bytes(200))
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_unaligned_files_and_other_dtypes_load(tmp_path):
    directory = write_valid(tmp_path / "c", shards=False)
    data = (directory / FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b"   "
    header += b" " * (1 - len(header) % 2)  # an odd length: nothing is aligned
    write(FILE, len(header).to_bytes(8, "little") + header + data[8 + length :])(directory)
    assert (8 + len(header)) % 2 == 1
    params = jf.functional(jf.load(directory))[1]
    expected = load_file(directory / FILE)
    assert np.array_equal(params["layers"]["0"]["attention"]["query"]["kernel"], expected[QUERY].T)
    for dtype in ("float16", "bfloat16", jnp.float32):
        params = jf.functional(jf.load(directory, dtype=dtype))[1]
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        assert np.array_equal(params["embeddings"]["token"]["embedding"], expected[WORD].astype(jnp.dtype(dtype)))


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A tiny Llama in GPTQ's layout, 4 bits in groups of 16."""
    config = {
        "model_type": "llama", "vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 16,
    }  # fmt: skip
    model = jf.init(config, head="causal_lm", key=jax.random.key(0))
    directory = tmp_path_factory.mktemp("packed") / "v"
    jf.save(jf.compress.gptq(model, method="rtn", bits=4, group_size=16), directory)
    return directory


Q = "model.layers.0.self_attn.q_proj."


def quantisation(**changes):
    return edit_json("config.json", lambda c: c["quantization_config"].update(changes))


def words(name, change):
    return tensors(lambda t: t.update({Q + name: np.array(change(t[Q + name]))}))


PACKED = {
    "other bits": (quantisation(bits=8), "q_proj: qzeros: expected .* 8 bits"),
    "bits that are none": (quantisation(bits=5), r"bits must be one of \(2, 3, 4, 8\), got 5"),
    "bits as a fraction": (quantisation(bits=4.0), "bits must be one of .*, got 4.0"),
    "group_size 0": (quantisation(group_size=0), "group_size must be -1 or positive, got 0"),
    "group_size true": (quantisation(group_size=True), "group_size must be -1 or positive, got True"),
    "group_size 2^70": (quantisation(group_size=2**70), "q_proj: qzeros: expected"),
    "format unknown": (quantisation(checkpoint_format="x"), "checkpoint_format must be one of"),
    "a pattern that never ends": (
        quantisation(dynamic={"(.|.)*x$": {"bits": 4}}),
        "repeated groups and more than five",
    ),
    "a pattern that ends late": (
        quantisation(dynamic={".*" * 20 + "x$": {"bits": 4}}),
        "repeated groups and more than",
    ),
    "a pattern that is none": (quantisation(dynamic={"(": {"bits": 4}}), "dynamic has the pattern '\\('"),
    "words of 64 bits": (words("qweight", lambda a: a.astype(np.int64)), "q_proj: qweight: expected a matrix of int32"),
    "words without shape": (words("qweight", lambda a: a[0, 0]), r"q_proj: qweight: expected a matrix .* int32 \(\)"),
    "words missing": (words("qweight", lambda a: a[:-1]), "q_proj: "),
    "words turned": (words("qweight", lambda a: np.ascontiguousarray(a.T)), "q_proj: qzeros: expected"),
    "zeros cut": (words("qzeros", lambda a: a[:-1]), r"q_proj: qzeros: expected \(2, 4\) .* found \(1, 4\)"),
    "no zeros": (tensors(lambda t: t.pop(Q + "qzeros")), "q_proj: tensor qzeros is missing"),
    "scales cut": (words("scales", lambda a: np.ascontiguousarray(a[:, 1:])), r"q_proj: scales: expected \(2, 32\)"),
    "scales of whole numbers": (words("scales", lambda a: a.astype(np.int32)), "q_proj: scales: expected floating"),
    "scales NaN": (words("scales", lambda a: a * np.float16(np.nan)), "q_proj.scales.* contains NaN"),
    "groups out of range": (words("g_idx", lambda a: a + 1000), "q_proj: g_idx: expected values from 0 to 1"),
    "groups negative": (words("g_idx", lambda a: a - 1000), "q_proj: g_idx: expected values from 0 to 1"),
    "groups cut": (words("g_idx", lambda a: a[:3]), r"q_proj: g_idx: expected shape \(32,\), found \(3,\)"),
    "groups of fractions": (words("g_idx", lambda a: a + 0.5), "q_proj: g_idx: expected whole numbers, found float"),
    "packed and not": (put(Q + "weight", np.zeros((32, 32), np.float32)), "no place in this model: .*q_proj.weight"),
    "something beside": (put(Q + "foo", np.zeros(3)), "no place in this model: .*q_proj.foo"),
    "a bias that the config denies": (
        put(Q + "bias", np.ones(32, np.float32)),
        "no place in this model: .*q_proj.bias",
    ),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_checkpoints_are_refused_by_layer(packed, tmp_path, case):
    spoil, message = PACKED[case]
    shutil.copytree(packed, tmp_path / "c")
    spoil(tmp_path / "c")
    start = time.process_time()
    with pytest.raises(ValueError, match=message):
        jf.load(tmp_path / "c")
    assert time.process_time() - start < 1


def test_packed_checkpoints_as_others_write_them(packed, tmp_path):
    expected = jf.functional(jf.load(packed))[1]
    for name, spoil in {
        "zero biases": put(Q + "bias", np.zeros(32, np.float32)),
        "no g_idx": tensors(lambda t: t.pop(Q + "g_idx")),
        "patterns": quantisation(dynamic={r"+:.*\.(?:1[0-5])\..*(?:up|gate)_proj.*": {"bits": 8}, "-:lm_head": {}}),
    }.items():
        shutil.copytree(packed, tmp_path / name)
        spoil(tmp_path / name)
        jax.tree.map(np.testing.assert_array_equal, jf.functional(jf.load(tmp_path / name))[1], expected)
