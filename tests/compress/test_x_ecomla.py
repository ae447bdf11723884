"""X-EcoMLA against the official conversion: matrices, ranks, outputs; what is exact, saved, generated and refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_close

import jaxformers as jf
from jaxformers import nn, paths
from jaxformers.compress.gptq import gptq
from jaxformers.compress.x_ecomla import LayerReport, cache_bytes, report_table, upcycle_mla, with_decode
from jaxformers.compress.x_ecomla_init import Sizes, energy_rank, svd_kv
from jaxformers.mesh import cache_shardings, shardings
from jaxformers.models import llama

FILES = ("gqa_rank16", "gqa_full_rank", "gqa_yarn_dynamic", "mha_latent_norm")


@pytest.fixture(scope="module", params=FILES)
def case(request, oracles):
    """(the source as a llama of one layer, the options of the conversion, what was found, and its sizes)."""
    with np.load(oracles / "x_ecomla" / f"{request.param}.npz") as z:
        arrays = {name: z[name].astype(np.float32) if z[name].dtype == np.float64 else z[name] for name in z.files}
    o = json.loads(str(arrays["options"]))
    scaling = o.get("rope_scaling")
    source = llama.Config(
        vocab_size=5, hidden_size=o["D"], num_hidden_layers=1, num_attention_heads=o["nh"], head_dim=o["dh"],
        num_key_value_heads=o["nkv"], intermediate_size=4,
        rotary=scaling and nn.Rotary(o["dh"], o["theta"], "llama3", scaling["factor"], 8192),
    )  # fmt: skip
    model = jf.init(source, key=jax.random.key(0))
    attention = model.layers[0].attention
    for name, theirs in (("query", "W_q"), ("key", "W_k"), ("value", "W_v"), ("out", "W_o")):
        getattr(attention, name).kernel.set_value(jnp.asarray(arrays[theirs].T))
    options = {
        "d_n": o["dn"], "d_r": o["dr"], "query_rank": o["rq"], "kv_rank": o["rkv"], "query_energy": o.get("qe"),
        "kv_energy": o.get("kve"), "latent_norm": bool(o.get("ln")), "fixed_ends": False,
    }  # fmt: skip
    return model, options, arrays, o


def test_matrices_ranks_and_errors_are_the_official_ones(case):
    model, options, expected, o = case
    report: list[LayerReport] = []
    layer = upcycle_mla(model, **options, report=report).layers[0].attention
    kernel = lambda name: np.asarray(getattr(layer, name).kernel.get_value()).T
    down = kernel("kv_down")
    assert (report[0].query_rank, report[0].kv_rank) == (o["q_rank"], o["kv_rank"])
    assert (len(kernel("query_down")), layer.rank) == (o["q_rank"], o["kv_rank"])
    assert_close(kernel("query_up") @ kernel("query_down"), expected["product_q"], 1e-4)
    assert_close(kernel("kv_up") @ down[: layer.rank], expected["product_kv"], 1e-4)
    assert_close(down[layer.rank :], expected["rope_key_rows"], 1e-6)
    assert_close(kernel("out"), expected["W_o"], 0)
    singular = np.linalg.norm(down[: layer.rank], axis=1)  # all singular values go to the down projection
    assert_close(singular, expected["sigma_kv"][: layer.rank], 1e-4)
    assert report[0].query_error == pytest.approx(float(expected["recon_err_q"]), abs=1e-4)
    assert report[0].kv_error == pytest.approx(float(expected["recon_err_kv"]), abs=1e-4)
    if o["kv_rank"] == 32:  # full rank: what is projected without positions is what the source projects
        sizes = Sizes(o["nh"], o["nkv"], o["dh"], o["dn"], o["dr"])
        assert_close(kernel("query_up") @ kernel("query_down"), sizes.query_rows(expected["W_q"]), 1e-5)
        rows = sizes.kv_rows(expected["W_k"], expected["W_v"])
        assert_close(kernel("kv_up") @ down[: layer.rank], rows, 1e-5)
    assert report[0].cache == o["kv_rank"] + o["dr"] and report[0].cache_before == 2 * o["nkv"] * o["dh"]
    assert f"{report[0].cache / report[0].cache_before:.1%}" in report_table(report)
    assert layer.scale == pytest.approx(float(expected["softmax_scale"]))


def test_the_layer_is_the_official_one_with_its_own_positions(case):
    """Attention within the model: the rotation comes from the positions that the model hands on."""
    model, options, expected, o = case
    layer = upcycle_mla(model, **options).layers[0].attention
    names = {"query_down": "q_a_proj", "query_up": "q_b_proj", "kv_down": "kv_a_proj_with_mqa", "kv_up": "kv_b_proj"}
    for name, theirs in names.items():  # their factors: signs are arbitrary, and norms see them
        getattr(layer, name).kernel.set_value(jnp.asarray(expected[f"mla.{theirs}.weight"].T))
    for name, theirs in (("query_norm", "q_a_layernorm"), ("kv_norm", "kv_a_layernorm")):
        assert (getattr(layer, name) is not None) == bool(o.get("ln"))
        if o.get("ln"):
            assert np.all(getattr(layer, name).scale.get_value() == 1)
            getattr(layer, name).scale.set_value(jnp.asarray(expected[f"mla.{theirs}.weight"]))
    positions = jnp.arange(expected["x"].shape[1])[None]
    turns = nn.Turns(*nn.rotary_table(model.config.rope, positions), positions)
    mask = nn.Mask(valid=expected["attention_mask"], causal=True)
    y = jax.jit(lambda x: layer(x, mask=mask, rotary=turns)[0])(expected["x"])
    assert_close(y, expected["output"], 1e-5, expected["attention_mask"] == 1)


def test_energy_ranks_are_the_official_ones(oracles):
    with np.load(oracles / "x_ecomla" / "rank_kl_dpo.npz") as z:
        for i, energy, rank in z["rank_table"]:
            sigma = np.linalg.svd(z[f"W_{int(i)}"].astype(np.float32), compute_uv=False)
            assert energy_rank(sigma, energy, 8) == rank
    assert energy_rank(np.array([3.0, 1.0]), 0.1, 1) == 1  # at least one


def small(**changes):
    """A llama of four heads of 16 with two key/value heads."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    return tiny.model("llama", **{**sizes, "initializer_range": 0.2, "max_position_embeddings": 64, **changes})


RANKS = {"d_n": 8, "d_r": 8, "kv_rank": 32, "query_rank": 32}


@settings(max_examples=6)
@given(heads=st.sampled_from([1, 2, 4]), rank=st.integers(1, 24), seed=st.integers(0, 99))
def test_eckart_young_and_the_exactness_of_full_rank(heads, rank, seed):
    K, V = (np.random.default_rng(seed + i).normal(size=(heads * 4, 24)).astype(np.float32) for i in (0, 1))
    sizes = Sizes(4, heads, 4, 4, 2)
    repeated = np.concatenate([np.repeat(W.reshape(heads, 4, -1), 4 // heads, 0).reshape(16, -1) for W in (K, V)])
    sigma = np.linalg.svd(repeated, compute_uv=False)
    _, found = svd_kv(jnp.asarray(K), jnp.asarray(V), sizes, rank, None, 1)
    product = np.asarray(found["kv_up"] @ found["kv_down"][:rank])
    rows = np.concatenate([W.reshape(4, 4, -1) for W in np.split(repeated, 2)], axis=1).reshape(product.shape)
    assert np.square(product - rows).sum() == pytest.approx(np.square(sigma[rank:]).sum(), rel=1e-3, abs=1e-6)
    if rank >= min(24, 8 * heads):
        assert_close(product, rows, 2e-5)
    up = np.asarray(found["kv_up"])
    assert_close(up.T @ up, np.eye(rank, dtype=np.float32), 1e-4)  # orthonormal columns, those of rank 0 too


@pytest.fixture(scope="module")
def hybrid():
    """A model of which the first and last layer are converted, and what it was made from."""
    source = small()
    return source, upcycle_mla(source, **RANKS, mla_layers=[2, 0])


def logits(model, batch):
    apply, params = jf.functional(model)
    return np.asarray(jax.jit(apply)(params, batch).logits)


def test_only_the_chosen_attention_changes(hybrid):
    source, model = hybrid
    assert [type(b.attention).__name__ for b in model.layers] == ["LatentAttention", "Attention", "LatentAttention"]
    before, after = (paths.flatten(jf.functional(m)[1]) for m in hybrid)
    new = {"query_down", "query_up", "kv_down", "kv_up"}
    gone = {"query", "key", "value"}
    assert after.keys() - before.keys() == {f"layers.{i}.attention.{n}.kernel" for i in (0, 2) for n in new}
    assert before.keys() - after.keys() == {f"layers.{i}.attention.{n}.kernel" for i in (0, 2) for n in gone}
    assert all(np.array_equal(before[path], after[path]) for path in before.keys() & after.keys())
    assert isinstance(source.layers[0].attention, nn.Attention)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_sixteen_steps_over_hybrid_caches_equal_the_full_pass(hybrid, form):
    model = with_decode(hybrid[1], form)
    ids = np.random.default_rng(0).integers(0, 20, (2, 20))
    mask = np.ones_like(ids)
    mask[1, :3] = 0  # padded on the left, with positions of its own
    places = np.maximum(np.cumsum(mask, 1) - 1, 0)
    apply, params = jf.functional(model)
    full = np.asarray(jax.jit(apply)(params, {"input_ids": ids, "attention_mask": mask, "position_ids": places}).logits)
    cache = model.empty_cache(2, 20)
    kinds = {"absorbed": nn.Latent, "expanded": type(cache.layers["1"])}
    assert [type(cache.layers[i]) for i in "012"] == [kinds[form], type(cache.layers["1"]), kinds[form]]
    step = jax.jit(apply)
    for start, end in [(0, 4), *((i, i + 1) for i in range(4, 20))]:
        part = slice(start, end)
        batch = {"input_ids": ids[:, part], "attention_mask": mask[:, part], "position_ids": places[:, part]}
        out = step(params, {**batch, "cache": cache})
        cache = out.cache
        assert_close(out.logits, full[:, part], 1e-5, mask[:, part] == 1)


def test_generation_and_the_bytes_of_its_cache(hybrid):
    source, model = hybrid
    found = np.array(jf.generate(model, [[1, 2, 3], [4, 5, 6]], max_new_tokens=5, eos_token_id=()))
    whole = np.concatenate([[[1, 2, 3], [4, 5, 6]], found], axis=1)
    assert np.array_equal(logits(model, {"input_ids": whole})[:, 2:-1].argmax(-1), found)
    # two layers of r_kv + d_r numbers, one of 2 · n_kv · d_h, 2 bytes each
    assert cache_bytes(model) == 2 * (2 * (32 + 8) + 2 * 2 * 16) and cache_bytes(source) == 2 * 3 * 2 * 2 * 16
    assert cache_bytes(with_decode(model, "expanded"), "float32") == 4 * (2 * 4 * (16 + 16) + 2 * 2 * 16)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
def test_heads_are_cut_and_the_latent_is_not(hybrid):
    grid = jf.mesh("data=2,tensor=4")
    apply, params = jf.functional(hybrid[1])
    cut = {path: tuple(s.spec) for path, s in paths.flatten(shardings(grid, params)).items() if ".0.attention." in path}
    heads = {f"layers.0.attention.{name}.kernel" for name in ("query_up", "kv_up")}
    assert {path for path, spec in cut.items() if spec == (None, "tensor")} == heads
    assert cut["layers.0.attention.out.kernel"] == ("tensor", None)
    assert not any("tensor" in cut[f"layers.0.attention.{name}.kernel"] for name in ("query_down", "kv_down"))
    assert tuple(cache_shardings(grid, hybrid[1].empty_cache(2, 8)).layers["0"].line.spec) == ("data", None, None)
    batch = {"input_ids": np.arange(12).reshape(2, 6)}
    spread = jax.jit(apply)(jax.device_put(params, shardings(grid, params)), batch).logits
    assert_close(spread, logits(hybrid[1], batch), 2e-5)


def test_ragged_ranks_save_and_load(tmp_path):
    report: list[LayerReport] = []
    options = {"query_rank": 64, "kv_rank": 48, "query_energy": 0.9, "kv_energy": 0.6, "rope_layout": "half"}
    source = small(head_dim=24)  # heads of other sizes than the width suggests
    model = upcycle_mla(source, d_n=8, d_r=6, **options, report=report)
    ranks = [(r.query_rank, r.kv_rank) for r in report]
    assert ranks[0] == ranks[2] == (64, 48) and ranks[1][0] < 64 and ranks[1][1] < 48 and ranks[1][1] % 8 == 0
    assert all(a.rank == r[1] and not a.interleaved for a, r in zip([b.attention for b in model.layers], ranks))
    jf.save(model, tmp_path / "m")
    again = jf.load(tmp_path / "m")
    batch = tiny.batch()
    assert np.array_equal(logits(model, batch), logits(again, batch))
    assert again.surgery == model.surgery
    assert tiny.largest_difference(*(jf.functional(m)[1] for m in (model, again))) == 0
    jf.save(again, tmp_path / "twice")
    config, second = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("m", "twice"))
    assert config == second
    everywhere = upcycle_mla(source, d_n=8, d_r=6, **options, fixed_ends=False)
    assert all(block.attention.rank < 48 for block in everywhere.layers)

    for damage, message in (({"0": [8]}, "ranks of x_ecomla must be"), ({"7": [8, 8]}, "layers 0 to 2, got 7")):
        config["jaxformers"]["surgery"][0]["arguments"]["ranks"] = damage
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            jf.load(tmp_path / "m")


def test_quantised_projections_decode_from_the_latent_cache(tmp_path):
    """X-EcoMLA, then GPTQ of every projection, then a file of both, then absorbed decoding."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = upcycle_mla(small(**sizes), d_n=4, d_r=8, kv_rank=32, query_rank=32)
    ids = np.random.default_rng(0).integers(1, 20, (4, 12))
    packed = gptq(model, ids, bits=4)
    attention = packed.layers[0].attention
    names = ("query_down", "query_up", "kv_down", "kv_up", "out")
    kinds = [type(getattr(attention, n).kernel.get_value()).__name__ for n in names]
    assert kinds == ["PackedWeight"] * 5 and isinstance(packed.empty_cache(1, 4).layers["0"], nn.Latent)
    jf.save(packed, tmp_path)
    again = jf.load(tmp_path)
    assert tiny.largest_difference(*(jf.functional(m)[1] for m in (packed, again))) == 0
    found = jf.generate(again, ids[:2, :5].tolist(), max_new_tokens=4, eos_token_id=())
    whole = np.concatenate([ids[:2, :5], found], axis=1)
    best = logits(again, {"input_ids": whole})[:, 4:-1].argmax(-1)  # in one pass, without any cache
    assert best.tolist() == found


def test_random_start_and_low_rank_updates(hybrid):
    source, _ = hybrid
    draw = lambda k: upcycle_mla(source, **RANKS, mla_layers=[1], init="random", key=jax.random.key(k))
    one, same, other = draw(0), draw(0), draw(1)
    kernel = lambda m: np.asarray(m.layers[1].attention.kv_down.kernel.get_value())
    assert np.array_equal(kernel(one), kernel(same)) and not np.array_equal(kernel(one), kernel(other))
    assert kernel(one).shape == (64, 40) and 0.9 / 8 < np.abs(kernel(one)).max() <= 1 / 8
    lora = jf.weights.add_lora(source, "layers.1.attention.key", rank=2, key=jax.random.key(0))
    weight = lora.layers[1].attention.key.kernel.get_value()
    weight = dataclasses.replace(weight, b=jnp.ones_like(weight.b))
    lora.layers[1].attention.key.kernel.set_value(weight)
    full = upcycle_mla(lora, d_n=8, d_r=8, kv_rank=64, mla_layers=[1]).layers[1].attention
    up, down = (np.asarray(getattr(full, n).kernel.get_value()) for n in ("kv_up", "kv_down"))
    keys = (down[:, :64] @ up).reshape(64, 4, 24)[:, ::2, :8]
    assert full.query is not None and full.query_down is None
    assert_close(keys.reshape(64, -1), np.asarray(weight.dense()).reshape(64, 2, 16)[..., :8].reshape(64, -1), 2e-5)


BAD = [
    ({"kv_rank": 72}, "kv_rank: expected 1 to 64, the smaller side"),
    ({"query_rank": 0}, "query_rank: expected 1 to 64"),
    ({"kv_rank": 12}, "kv_rank: expected a multiple of 8"),
    ({"kv_rank": None}, "kv_rank: layer 0 has a fixed rank"),
    ({"query_rank": None, "query_energy": 0.5}, "query_rank: layer 0 has a fixed rank"),
    ({"d_n": 17}, "d_n: expected 1 to 16"),
    ({"d_r": 18}, "d_r: expected 1 to 16"),
    ({"d_r": 7}, "d_r: rotary positions turn pairs"),
    ({"d_v": 8}, "d_v: values keep the size of the source's heads, 16, got 8"),
    ({"mla_layers": [3]}, "mla_layers: the model has layers 0 to 2, got 3"),
    ({"mla_layers": [-1]}, "mla_layers: the model has layers 0 to 2, got -1"),
    ({"mla_layers": [1, 1]}, "mla_layers: expected different layers"),
    ({"mla_layers": []}, "mla_layers: expected different layers"),
    ({"kv_energy": 1.5}, r"kv_energy: expected a share in \(0, 1\], got 1.5"),
    ({"query_energy": 0.0}, r"query_energy: expected a share in \(0, 1\]"),
    ({"rope_layout": "pairs"}, "rope_layout: expected one of interleaved, half"),
    ({"init": "zeros"}, "init: expected one of svd, random"),
    ({"init": "random"}, "key: init='random' draws with it"),
    ({"decode": "latent"}, "decode: expected one of absorbed, expanded"),
    ({"rank_divisor": 0}, "rank_divisor: expected 1 or more"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_arguments(hybrid, number):
    options, message = BAD[number]
    with pytest.raises(ValueError, match=message):
        upcycle_mla(hybrid[0], **RANKS | options)


def test_bad_models(hybrid):
    refused = lambda model, **options: upcycle_mla(model, **RANKS | options)
    biased = jf.surgery.copy(hybrid[0])
    biased.layers[0].attention.query.bias = nnx.data(nnx.Param(np.zeros(64, np.float32)))
    with pytest.raises(ValueError, match="layers.0.attention.query has a bias"):
        refused(biased)
    with pytest.raises(ValueError, match="layers.0.attention is LatentAttention"):
        refused(hybrid[1])
    with pytest.raises(ValueError, match="expected a decoder with rotary positions"):
        refused(tiny.model("gpt2"))
    windowed = jf.surgery.copy(hybrid[0])
    windowed.layers[1].attention.window = 4
    with pytest.raises(ValueError, match="layers.1.attention has a window"):
        refused(windowed)
    with pytest.raises(ValueError, match="4 heads are not divisible by 3"):
        small(num_key_value_heads=3)
    with pytest.raises(ValueError, match="it has no latent attention"):
        with_decode(hybrid[0], "absorbed")
    with pytest.raises(ValueError, match="decode: expected one of"):
        with_decode(hybrid[1], "latent")
