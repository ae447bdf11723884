"""The authors' layout of X-EcoMLA's checkpoints is read, and DeepSeek-V3's written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

import jaxformers as jf
from jaxformers import hub, nn
from jaxformers.compress.x_ecomla import upcycle_mla
from jaxformers.compress.x_ecomla_published import as_deepseek_v3, load_published
from jaxformers.models.writing import to_tensors

THEIRS = {
    "query_down": "q_a_proj", "query_up": "q_b_proj", "kv_down": "kv_a_proj_with_mqa", "kv_up": "kv_b_proj",
    "query_norm": "q_a_layernorm", "kv_norm": "kv_a_layernorm",
}  # fmt: skip
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}


def source(**rotary):
    rotary = nn.Rotary(8, 10000.0, **rotary) if rotary else None
    sizes = {**SIZES, "max_position_embeddings": 32, "initializer_range": 0.2, "rotary": rotary}
    return tiny.model("llama", **sizes)


def publish(model, directory, *, sizes, kept):
    """What the official code would have saved of ``model``: its tensors under their names, and two more files."""
    directory.mkdir()
    named = {}
    for name, _, _, read in to_tensors(model, hub.module_of(model.config))[0]:
        parts = name.split(".")
        if parts[0] == "jaxformers":
            name = f"model.layers.{parts[2]}.mla.{THEIRS[parts[4]]}.weight"
        elif ".self_attn.o_proj." in name and int(parts[2]) not in kept:
            name = f"model.layers.{parts[2]}.mla.out_proj.weight"
        named[name] = np.ascontiguousarray(read())
    save_file(named, directory / "model.safetensors")
    hf = {name: value for name, value in hub.config_json(model).items() if name != "jaxformers"}
    (directory / "config.json").write_text(json.dumps(hf))
    (directory / "MLA_config.json").write_text(json.dumps({"d_model": 32, "n_layer": 3, "attn_layers": kept}))
    base = {"num_attention_heads": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
    (directory / "mla_layer_config.json").write_text(json.dumps({**base, **sizes}))
    return named


def test_a_published_hybrid_is_the_model_that_made_it(tmp_path):
    stretched = {"kind": "llama3", "factor": 32.0, "trained_length": 8192}
    model = upcycle_mla(
        source(**stretched), d_n=4, d_r=4, query_rank=24, kv_rank=16, kv_energy=0.5, latent_norm=True,
        mla_layers=[0, 1], original_length=8192,
    )  # fmt: skip
    kv_norm = model.layers[0].attention.kv_norm.scale
    kv_norm.set_value(kv_norm.get_value() * jnp.arange(1.0, 17.0))
    ranks = {str(i): {"q_rank": 24, "kv_rank": model.layers[i].attention.rank} for i in (0, 1)}
    assert ranks["1"]["kv_rank"] == 8
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
    sizes = {"layer_rank_list": ranks, "use_lora_layer_norm": True, "rope_scaling": scaling}
    named = publish(model, tmp_path / "published", sizes=sizes, kept=[2])
    assert "model.layers.1.mla.kv_a_proj_with_mqa.weight" in named and "model.layers.2.self_attn.q_proj.weight" in named
    found = load_published(tmp_path / "published")
    assert found.surgery == model.surgery and found.layers[1].attention.rotary == model.layers[1].attention.rotary
    assert tiny.largest_difference(*(jf.functional(m)[1] for m in (found, model))) == 0
    jf.save(found, tmp_path / "own")
    again = jf.load(tmp_path / "own")
    assert tiny.largest_difference(*(jf.functional(m)[1] for m in (again, model))) == 0
    assert again.surgery == model.surgery

    settings = tmp_path / "published" / "mla_layer_config.json"
    good = settings.read_text()
    for change, message in (
        ({"attention_bias": True}, "attention_bias true is not supported"),
        ({"v_head_dim": 16}, "its heads are not those of config.json"),
        ({"rope_type": "linear"}, "rope_type must be 'yarn'"),
        ({"kv_lora_rank": 8, "layer_rank_list": {}}, "query_down.weight has shape"),
    ):
        settings.write_text(json.dumps({**json.loads(good), **change}))
        with pytest.raises(ValueError, match=message):
            load_published(tmp_path / "published")
    settings.unlink()
    with pytest.raises(ValueError, match="has no mla_layer_config.json"):
        load_published(tmp_path / "published")


def test_published_defaults_without_stretched_positions(tmp_path):
    model = upcycle_mla(source(), d_n=4, d_r=4, kv_rank=16, query_rank=24)
    publish(model, tmp_path / "published", sizes={"kv_lora_rank": 16, "q_lora_rank": 24}, kept=[])
    found = load_published(tmp_path / "published", dtype="bfloat16")
    assert found.layers[2].attention.kv_up.kernel.get_value().dtype == jnp.bfloat16
    table = lambda m: nn.rotary_table(m.layers[0].attention.rotary, jnp.arange(9)[None])
    assert all(np.array_equal(a, b) for a, b in zip(table(found), table(model), strict=True))


def normed(**options):
    return upcycle_mla(source(), **{"d_n": 4, "d_r": 4, "kv_rank": 16, "latent_norm": True, **options})


def test_as_deepseek_v3_is_the_same_function(tmp_path):
    model = normed(query_rank=24)
    jf.save(as_deepseek_v3(model), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3" and "jaxformers" not in config and config["kv_lora_rank"] == 16
    logits = lambda m: np.asarray(jax.jit(jf.functional(m)[0])(jf.functional(m)[1], tiny.batch()).logits)
    np.testing.assert_allclose(logits(jf.load(tmp_path)), logits(model), atol=1e-6)


def test_what_deepseek_v3_cannot_be():
    with pytest.raises(ValueError, match="latent attention with norms"):
        as_deepseek_v3(normed(latent_norm=False))
    with pytest.raises(ValueError, match="latent attention with norms"):
        as_deepseek_v3(normed(mla_layers=[0]))
    with pytest.raises(ValueError, match="the same ranks in every layer"):
        as_deepseek_v3(normed(query_rank=24, query_energy=0.5))
