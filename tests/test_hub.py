"""Checkpoints in and out: bit-equal round trips, heads, surgery, and errors that say what is wrong."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from parity import run
from safetensors.numpy import load_file, save_file

import jaxformers as jf
from jaxformers import hub, models, nn, weights
from jaxformers.safetensors_io import CheckpointError

FOLDERS = ("bert/mlm", "distilbert-seqcls", "gpt2", "llama/gqa_untied", "mpnet", "opt", "roberta/seqcls", "xlm-roberta")


def leaves(model):
    return jf.functional(model)[1]


def edited(folder, to, config=None, tensors=None, drop=()):
    """A copy of a checkpoint with some entries changed."""
    to.mkdir(exist_ok=True)
    old = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**old, **(config or {})}))
    found = {**load_file(folder / "model.safetensors"), **(tensors or {})}
    save_file({name: value for name, value in found.items() if name not in drop}, to / "model.safetensors")
    return to


@pytest.mark.parametrize("folder", FOLDERS)
def test_round_trip_is_bit_equal(folder, oracles, tmp_path):
    source = oracles / "backbones" / folder
    jf.save(jf.load(source), tmp_path / "copy")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "copy" / "model.safetensors")
    assert set(before) == set(after)
    for name, value in before.items():
        assert value.dtype == after[name].dtype and np.array_equal(value, after[name]), name
    old, new = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "copy"))
    assert {name: new.get(name) for name in old} == old
    added = set(new) - set(old)
    assert all(new[name] == models.architecture(old["model_type"]).Config().to_hf()[name] for name in added)
    assert tiny.largest_difference(leaves(jf.load(tmp_path / "copy")), leaves(jf.load(source))) == 0


def test_shards_and_mapped_weights(oracles, tmp_path):
    model = jf.load(oracles / "backbones" / "bert" / "mlm")
    jf.save(model, tmp_path / "shards", max_shard_bytes=40_000)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and all((tmp_path / "shards" / file).stat().st_size < 50_000 for file in files)
    assert tiny.largest_difference(leaves(jf.load(tmp_path / "shards")), leaves(model)) == 0
    mapped = jf.load(tmp_path / "shards", mapped=True)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(leaves(mapped)))
    assert tiny.largest_difference(leaves(mapped), leaves(model)) == 0


def test_heads(oracles):
    folder = oracles / "backbones" / "bert" / "seqcls"
    assert jf.load(folder).head_name == "sequence_classification"
    body = jf.load(folder, head="none")
    assert body.head is None and body.pooler is not None
    assert jf.load(folder, head="sentence").head.pooling == "mean"
    message = r"no weights for head\.bias; head\.dense\.bias.*pass key=jax\.random\.key"
    with pytest.raises(CheckpointError, match=message):
        jf.load(folder, head="masked_lm")
    fresh = [jf.load(folder, head="masked_lm", key=jax.random.key(i)) for i in (0, 0, 1)]
    kernels = [np.asarray(model.head.dense.kernel.get_value()) for model in fresh]
    assert np.array_equal(kernels[0], kernels[1]) and not np.array_equal(kernels[0], kernels[2])
    assert np.array_equal(fresh[0].embeddings.token.embedding.get_value(), body.embeddings.token.embedding.get_value())
    with pytest.raises(CheckpointError, match=r"classifier\.weight has shape \(3, 32\), but .* asks for \(5, 32\)"):
        jf.load(folder, num_labels=5, head="token_classification", key=jax.random.key(0))
    lm = oracles / "backbones" / "bert" / "mlm"
    more = jf.load(lm, num_labels=5, head="token_classification", key=jax.random.key(0))
    assert more.head.classifier.kernel.get_value().shape == (32, 5)
    with pytest.raises(CheckpointError, match=r"no weights for .*pooler\.kernel"):  # a masked LM's file has no pooler
        jf.load(lm, head="sequence_classification")
    classifier = jf.load(lm, head="sequence_classification", key=jax.random.key(0))
    assert classifier.pooler.kernel.get_value().shape == (32, 32)
    with pytest.raises(ValueError, match="Bert has no head 'seq2seq_lm'; it has masked_lm, causal_lm, sequence_"):
        jf.load(folder, head="seq2seq_lm")
    with pytest.raises(ValueError, match="head: causal_lm is a decoder's; config.json .* must say is_decoder"):
        jf.load(folder, head="causal_lm")


def test_config_overrides_and_dtype(oracles):
    folder = oracles / "backbones" / "bert" / "mlm"
    short = jf.load(folder, num_hidden_layers=1)
    assert len(short.layers) == 1 and short.config.num_hidden_layers == 1
    half = jf.load(folder, dtype="bfloat16")
    assert {str(a.dtype) for a in jax.tree.leaves(leaves(half))} == {"bfloat16"}
    assert hub.config_json(half)["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="hidden_sise: Config has no such field; it has vocab_size"):
        jf.load(folder, hidden_sise=3)


def test_class_names_of_a_shared_architecture(oracles, tmp_path):
    body = jf.load(oracles / "backbones" / "xlm-roberta", head="none")
    assert hub.config_json(body)["architectures"] == ["XLMRobertaModel"]
    assert hub.config_json(body)["model_type"] == "xlm-roberta"
    french = jf.load(oracles / "variants" / "camembert-mlm")
    assert hub.config_json(french)["architectures"] == ["CamembertForMaskedLM"]
    lm = jf.load(oracles / "backbones" / "gpt2")
    assert hub.config_json(lm)["architectures"] == ["GPT2LMHeadModel"]


def test_errors_name_what_is_wrong(oracles, tmp_path):
    folder = oracles / "backbones" / "bert" / "mlm"
    query = "bert.encoder.layer.0.attention.self.query.weight"
    cases = [
        ({"drop": (query,)}, r"tensors missing: encoder\.layer\.0\.attention\.self\.query\.weight"),
        ({"tensors": {"surprise": np.ones(2, np.float32)}}, "no place in this model: surprise"),
        ({"tensors": {query: np.ones((32, 31), np.float32)}}, r"query\.weight has shape \(32, 31\).*\(32, 32\)"),
        ({"tensors": {query: np.ones((32, 32), np.int32)}}, "has dtype int32, expected a floating-point one"),
        ({"config": {"hidden_size": 16}}, r"config\.json asks for"),
        ({"config": {"hidden_size": 30, "num_attention_heads": 4}}, "not divisible by 4 heads"),
        ({"config": {"model_type": "bort"}}, "model_type 'bort' is not known; known are .*bert"),
        ({"config": {"hidden_act": "swoosh"}}, "activation 'swoosh' is unknown"),
        ({"config": {"num_hidden_layers": 2}}, r"no place in this model: bert\.encoder\.layer\.2"),
        ({"config": {"num_hidden_layers": 10**9}}, "num_hidden_layers = 1000000000 is beyond reason"),
        ({"config": {"vocab_size": "many"}}, "vocab_size must be a whole number"),
        ({"config": {"layer_norm_eps": "tiny"}}, r"layer_norm_eps must be a (finite )?number"),
        ({"config": {"add_cross_attention": True}}, "add_cross_attention is for decoders"),
        ({"config": {"position_embedding_type": "relative_key"}}, "'relative_key' is not supported"),
        ({"config": {"architectures": ["BertForDreams"]}}, "BertForDreams.*choose one with head="),
    ]
    for i, (changes, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message):
            jf.load(edited(folder, tmp_path / str(i), **changes))


def test_names_and_buffers_of_old_checkpoints(oracles, tmp_path):
    bert = oracles / "backbones" / "bert" / "mlm"
    found = load_file(bert / "model.safetensors")
    old = {n: n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta") for n in found}
    extra = {
        "bert.embeddings.position_ids": np.arange(40)[None],
        "cls.predictions.decoder.weight": found["bert.embeddings.word_embeddings.weight"].copy(),  # tied
        "cls.seq_relationship.weight": np.ones((2, 32), np.float32),
        "bert.pooler.dense.weight": np.ones((32, 32), np.float32),
    }
    (tmp_path / "bert").mkdir()
    shutil.copy(bert / "config.json", tmp_path / "bert")
    save_file({**{old[name]: value for name, value in found.items()}, **extra}, tmp_path / "bert" / "model.safetensors")
    assert tiny.largest_difference(leaves(jf.load(tmp_path / "bert")), leaves(jf.load(bert))) == 0

    gpt2 = oracles / "backbones" / "gpt2"
    found = load_file(gpt2 / "model.safetensors")
    plain = {name.removeprefix("transformer."): value for name, value in found.items()}
    plain |= {f"h.{i}.attn.bias": np.ones((1, 1, 32, 32), np.float32) for i in range(3)}  # the causal mask
    (tmp_path / "gpt2").mkdir()
    shutil.copy(gpt2 / "config.json", tmp_path / "gpt2")
    save_file(plain, tmp_path / "gpt2" / "model.safetensors")
    assert tiny.largest_difference(leaves(jf.load(tmp_path / "gpt2")), leaves(jf.load(gpt2))) == 0


def test_where_a_checkpoint_is_not(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        jf.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        jf.load(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file; expected the directory"):
        jf.load(tmp_path / "file")


@pytest.mark.parametrize("name", ["bert/mlm", "gpt2"])
def test_lora_is_saved_rebuilt_and_merged(name, oracles, tmp_path):
    model = jf.load(oracles / "backbones" / name)
    adapted = weights.add_lora(model, "layers.*.attention.{query,value}", rank=2, alpha=4, key=jax.random.key(0))
    params = jax.tree.map(lambda a: a, leaves(adapted))
    for layer in params["layers"].values():
        for target in ("query", "value"):
            kernel = layer["attention"][target]["kernel"]
            noise = 0.1 * jax.random.normal(jax.random.key(1), kernel.b.shape)
            layer["attention"][target]["kernel"] = weights.LowRank(kernel.base, kernel.a, noise, kernel.scale)
    trained = jf.with_params(adapted, params)
    jf.save(trained, tmp_path / "adapted")
    again = jf.load(tmp_path / "adapted")
    assert isinstance(again.layers[0].attention.query.kernel.get_value(), weights.LowRank)
    assert tiny.largest_difference(leaves(again), params) == 0
    assert not isinstance(again.layers[0].attention.key.kernel.get_value(), weights.LowRank)

    merged = weights.merge_lora(again)
    jf.save(merged, tmp_path / "merged")
    plain = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(plain) == set(load_file(oracles / "backbones" / name / "model.safetensors"))
    assert "jaxformers" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    batch = {"input_ids": np.arange(2, 14).reshape(2, 6)}
    assert np.allclose(run(jf.load(tmp_path / "merged"), batch).logits, run(trained, batch).logits, atol=1e-4)
    assert not np.allclose(run(model, batch).logits, run(trained, batch).logits, atol=1e-2)


def test_a_checkpoint_cannot_name_foreign_code(oracles, tmp_path):
    record = {"function": "os:system", "arguments": {"command": "true"}}
    folder = edited(oracles / "backbones" / "gpt2", tmp_path / "x", config={"jaxformers": {"surgery": [record]}})
    with pytest.raises(ValueError, match="'os:system' is no (function|surgery) of jaxformers"):
        jf.load(folder)


def test_sentence_layout(oracles, tmp_path):
    from flax import nnx

    model = jf.load(oracles / "backbones" / "mpnet", head="sentence")
    nn.new_sentence_head(model, pooling="mean", out=6, act="tanh", normalize=True, rngs=nnx.Rngs(3))
    jf.save(model, tmp_path / "s")
    kinds = [m["type"].rpartition(".")[2] for m in json.loads((tmp_path / "s" / "modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", "Dense", "Normalize"]
    again = jf.load(tmp_path / "s")
    assert again.head_name == "sentence" and (again.head.act, again.head.normalize) == ("tanh", True)
    batch = {"input_ids": np.array([[0, 5, 9, 2], [0, 7, 2, 1]]), "attention_mask": np.array([[1] * 4, [1, 1, 1, 0]])}
    pooled = run(again, batch).pooled
    assert pooled.shape == (2, 6) and np.array_equal(pooled, run(model, batch).pooled)
    assert np.allclose(np.linalg.norm(pooled, axis=-1), 1, atol=1e-6)
    shutil.rmtree(tmp_path / "s" / "2_Dense")
    with pytest.raises(ValueError, match="2_Dense"):
        jf.load(tmp_path / "s")


def test_init_is_a_function_of_its_key():
    one, same, other = (jf.init(tiny.BERT, head="masked_lm", key=jax.random.key(i)) for i in (0, 0, 1))
    assert tiny.largest_difference(leaves(one), leaves(same)) == 0
    assert tiny.largest_difference(leaves(one), leaves(other)) > 0.1
    kernel = leaves(one)["layers"]["0"]["mlp"]["up"]["kernel"]
    assert abs(float(kernel.std()) - tiny.BERT.initializer_range) < 0.1
    assert np.array_equal(leaves(one)["embeddings"]["norm"]["scale"], np.ones(8))
    half = jf.init(tiny.BERT.to_hf(), key=jax.random.key(0), dtype="bfloat16")
    assert {str(a.dtype) for a in jax.tree.leaves(leaves(half))} == {"bfloat16"} and half.head is None
    with pytest.raises(ValueError, match="has no head 'seq2seq_lm'"):
        jf.init(tiny.BERT, head="seq2seq_lm", key=jax.random.key(0))
    with pytest.raises(ValueError, match="model_type 'nope' is not known"):
        jf.init({"model_type": "nope"}, key=jax.random.key(0))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_random_models_survive_a_round_trip(name, tmp_path):
    model = tiny.model(name)
    jf.save(model, tmp_path / "x")
    again = jf.load(tmp_path / "x")
    if name == "llama":  # None and what it stands for
        assert again.config == dataclasses.replace(model.config, rotary=model.config.rope)
    else:
        assert again.config == model.config
    assert again.head_name == model.head_name
    assert tiny.largest_difference(leaves(again), leaves(model)) == 0
    assert again.source == str(tmp_path / "x")


def test_the_real_minilm(minilm):
    model = jf.load(minilm)
    assert model.head_name == "sentence" and (model.head.pooling, model.head.normalize) == ("mean", True)
    assert model.config.hidden_size == 384 and len(model.layers) == 6
    assert jf.load("all-MiniLM-L6-v2").source == str(minilm)
