"""Configs: both layouts of config.json, round trips, and the tables of names."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from jaxformers import models, nn, paths
from jaxformers.models import gpt2, keymap, llama, mpnet, opt, roberta

NAMES = ("bert", "distilbert", "gpt2", "llama", "mpnet", "opt", "roberta", "t5")
SMALL = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}


@pytest.mark.parametrize("name", NAMES)
def test_defaults_survive_a_round_trip(name):
    cls = models.architecture(name).Config
    default = cls()
    if name == "llama":  # two fields whose None stands for these
        default = cls(num_key_value_heads=32, rotary=default.rope)
    assert cls.from_hf(cls().to_hf()) == default
    changed = cls(**SMALL, num_labels=5)
    hf = json.loads(json.dumps(changed.to_hf()))
    assert hf["model_type"] == name
    assert cls.from_hf(hf) == cls.from_hf({**hf, "unknown_future_key": 1})
    again = cls.from_hf(hf)
    assert {f: getattr(again, f) for f in (*SMALL, "num_labels")} == {**SMALL, "num_labels": 5}
    assert again.to_hf() == hf


def test_hugging_faces_defaults_fill_what_is_left_out():
    assert gpt2.Config.from_hf({"model_type": "gpt2"}) == gpt2.Config()
    assert opt.Config.from_hf({"model_type": "opt", "word_embed_proj_dim": None}).token_width == 768
    assert llama.Config.from_hf({"model_type": "llama", "num_key_value_heads": None}).head_size == 128


def test_what_is_read_is_kept():
    hf = {"model_type": "gpt2", "n_embd": 12, "n_layer": 3, "n_head": 3, "task_specific_params": {"a": 1}, "n_ctx": 7}
    saved = gpt2.Config.from_hf(hf).to_hf()
    assert {name: saved[name] for name in hf} == hf


def test_old_and_new_rope_layouts_mean_the_same():
    base = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    new = {**base, "rope_parameters": {**scaling, "rope_type": "llama3", "rope_theta": 5e5}}
    old = {**base, "rope_theta": 5e5, "rope_scaling": {**scaling, "type": "llama3"}}
    assert llama.Config.from_hf(new).rope == llama.Config.from_hf(old).rope
    assert llama.Config.from_hf(base).rope.theta == 10000.0 and llama.Config.from_hf(base).rope.size == 8


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "yarn", "llama3"])
def test_a_rotary_embedding_made_here_is_saved(kind):
    rotary = nn.Rotary(
        16, theta=777.0, kind=kind, factor=2.0, trained_length=32, low_freq=1.5, high_freq=3.0, beta_fast=16.0,
        truncate=False, magnitude=1.25 if kind == "yarn" else None,
    )  # fmt: skip
    config = llama.Config(hidden_size=32, num_attention_heads=2, max_position_embeddings=64, rotary=rotary)
    read = llama.Config.from_hf(config.to_hf())
    positions = np.arange(80)[None]
    for found, expected in zip(nn.rotary_table(read.rope, positions), nn.rotary_table(rotary, positions), strict=True):
        assert np.array_equal(found, expected)
    changed = dataclasses.replace(read, rotary=nn.Rotary(16, theta=5.0))  # an override wins over what was read
    assert llama.Config.from_hf(changed.to_hf()).rope.theta == 5.0


@pytest.mark.parametrize(
    ("module", "hf", "message"),
    [
        (roberta, {"add_cross_attention": True}, "add_cross_attention is for decoders"),
        (roberta, {"position_embedding_type": "relative_key"}, "relative_key"),
        (opt, {"layerdrop": 0.1}, "layerdrop 0.1 is not supported"),
        (mpnet, {"relative_attention_num_buckets": 16}, "relative_attention_num_buckets 16: MPNet needs 32 or more"),
        (gpt2, {"n_embd": -4}, "n_embd must be a whole number of 0 or more"),
        (gpt2, {"n_layer": True}, "n_layer must be a whole number"),
        (opt, {"do_layer_norm_before": "yes"}, "do_layer_norm_before must be true or false"),
        (opt, {"dropout": "0.1"}, r"dropout must be a (finite )?number"),
        (llama, {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type 'longrope' is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(module, hf, message):
    with pytest.raises(ValueError, match=message):
        module.Config.from_hf(hf)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_name_of_its_own(name):
    arch = models.architecture(name)
    for head in (None, *arch.HEADS):
        for tied in (True, False):
            fields = {field.name for field in dataclasses.fields(arch.Config)}
            crossed = dict.fromkeys(fields & {"is_decoder", "add_cross_attention"}, head == "causal_lm")
            config = arch.Config(**SMALL, tie_word_embeddings=tied, **crossed)
            model = nnx.eval_shape(lambda head=head, config=config: arch.Model(config, head=head, rngs=nnx.Rngs(0)))
            keys = keymap.all_keys(model, arch)
            found = {}
            for path, leaf in paths.flatten(nnx.to_pure_dict(nnx.state(model))).items():
                entry, suffix = keymap.lookup(keys, path)
                place = (f"{entry.name}.{suffix}", entry.part[0])
                assert place not in found, f"{path} and {found[place]} are both {place}"
                found[place] = path
                assert isinstance(leaf, jax.ShapeDtypeStruct)


def test_lookup():
    keys = {"layers.{}.mlp.up": keymap.HF("h.{}.fc", conv1d=True), "head.bias": "lm_head.bias", "norm": "ln"}
    assert keymap.lookup(keys, "layers.11.mlp.up.kernel") == (keymap.HF("h.11.fc", conv1d=True), "weight")
    assert keymap.lookup(keys, "layers.11.mlp.up.bias")[1] == "bias"
    assert keymap.lookup(keys, "head.bias") == (keymap.HF("lm_head"), "bias")
    assert keymap.lookup(keys, "norm.scale") == (keymap.HF("ln"), "weight")
    assert keymap.lookup(keys, "layers.11.mlp.down.kernel") is None
    assert keymap.expected(keys, ["h.3.fc.weight", "h.x.fc.weight", "ln.bias"]) == {"h.3.fc.weight", "ln.bias"}
