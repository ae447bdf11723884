"""DeepSeek-V3 against Hugging Face on tiny models: every array, both forms of decoding, and all layouts of experts."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_close, assert_close_scaled, batch_of, forward, grads_by_hf_name, read, run
from safetensors.numpy import load_file, save_file

import jaxformers as jf
from jaxformers.losses import cross_entropy
from jaxformers.mesh import constrained, sharding, shardings
from jaxformers.models import deepseek_v3
from jaxformers.nn import experts
from jaxformers.safetensors_io import CheckpointError

CASES = ("dense_mla", "moe_mla")
LOGITS = 2e-5  # relative to the output's scale
EXPERTS = "model.layers.1.mlp.experts"
eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")


def load(oracles, case, **settings):
    folder = oracles / "backbones" / "deepseek_v3" / case
    return jf.load(folder, **settings), read(folder)


def copy(oracles, to, case="moe_mla", change=lambda tensors: None, layout="config.json", **config):
    """The checkpoint ``case`` at ``to`` with changed tensors and settings."""
    source = oracles / "backbones" / "deepseek_v3" / case
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    to.mkdir(exist_ok=True)
    save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_text(json.dumps(json.loads((source / layout).read_text()) | config))
    return to


@pytest.mark.parametrize("layout", ["config.json", "config_v4.json"])
@pytest.mark.parametrize("case", CASES)
def test_every_layer(case, layout, oracles, tmp_path):
    model, expected = jf.load(copy(oracles, tmp_path / "x", case, layout=layout)), load(oracles, case)[1]
    batch = {name: expected[name] for name in ("input_ids", "attention_mask")}
    real = batch["attention_mask"] == 1
    out, hidden, attentions = forward(model, batch)
    assert_close(hidden, expected["hidden_states"], 3e-5, (slice(None), real))
    by_query = attentions.transpose(1, 3, 0, 2, 4)
    assert_close(by_query, expected["attentions"].transpose(1, 3, 0, 2, 4), 3e-5, real)
    assert_close_scaled(out.logits, expected["logits"], LOGITS, real)


@pytest.mark.parametrize("case", CASES)
def test_positions_and_padding(case, oracles):
    model, expected = load(oracles, case)
    real = expected["attention_mask"] == 1
    assert_close_scaled(run(model, batch_of(expected)).logits, expected["logits_with_position_ids"], LOGITS, real)
    out = run(model, {"input_ids": expected["input_ids"][:1, real[0]]})
    assert_close_scaled(out.logits, expected["logits_unpadded_row0"], LOGITS)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case, oracles):
    model, expected = load(oracles, case)
    apply, params = jf.functional(model)
    batch = {name: expected[name] for name in ("input_ids", "attention_mask")}

    def loss(params):
        return cross_entropy(apply(params, batch).logits[:, :-1], expected["labels"][:, 1:])

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert_close_scaled(value, expected["loss"], 1e-5)
    grads = grads_by_hf_name(model, grads)
    names = [name for name in expected if name.startswith("grad.")]
    assert len(names) == 2
    for name in names:
        assert_close_scaled(grads[name.removeprefix("grad.")], expected[name], 1e-4)
    if case == "moe_mla":
        used = [e for e in range(8) if np.any(grads[f"{EXPERTS}.{e}.up_proj.weight"])]
        assert 2 <= len(used)
        assert not np.any(grads["model.layers.1.mlp.gate.e_score_correction_bias"])  # it chooses; it does not weigh


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("case", CASES)
def test_greedy_ids_and_cached_decoding(case, form, oracles):
    model, expected = load(oracles, case, decode=form)
    new = jf.generate(model, expected["greedy_prompt"], max_new_tokens=12, eos_token_id=())
    assert new[0] == expected["greedy_ids"][0, 5:].tolist()

    apply, params = jf.functional(model)
    step, batch, found = jax.jit(apply), batch_of(expected), []
    length = batch["input_ids"].shape[1]
    cache = model.empty_cache(2, length + 3)
    for start, end in [(0, 3), *((i, i + 1) for i in range(3, length))]:
        part = {name: value[:, start:end] for name, value in batch.items()}
        out = step(params, {**part, "cache": cache})
        cache, found = out.cache, [*found, out.logits]
    real = expected["attention_mask"] == 1
    assert_close_scaled(np.concatenate(found, axis=1), expected["logits_with_position_ids"], LOGITS, real)
    numbers = sum(array.size for array in jax.tree.leaves(cache.layers)) / (2 * 2 * (length + 3))
    assert numbers == {"absorbed": 16 + 4, "expanded": 4 * (8 + 4 + 8)}[form]  # a layer and token


def test_scanned_layers_decode_from_a_latent_cache(oracles):
    model, expected = load(oracles, "dense_mla")
    apply, params = jf.functional(model, scan_layers=True)
    batch = batch_of(expected)
    layers = model.empty_cache(2, 20).layers
    cache = model.empty_cache(2, 20)
    cache = type(cache)({"*": jax.tree.map(lambda *a: jnp.stack(a), *layers.values())}, cache.used, cache.valid)
    out = jax.jit(apply)(params, {**batch, "cache": cache})
    real = expected["attention_mask"] == 1
    assert_close_scaled(out.logits, expected["logits_with_position_ids"], LOGITS, real)
    with pytest.raises(ValueError, match="layer 1 differs from layer 0"):
        jf.functional(load(oracles, "moe_mla")[0], scan_layers=True)


@pytest.mark.parametrize("case", CASES)
def test_save_is_bit_equal(case, oracles, tmp_path):
    model, _ = load(oracles, case)
    jf.save(model, tmp_path / "copy")
    source = oracles / "backbones" / "deepseek_v3" / case
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "copy"))
    assert set(before) == set(after)
    assert all(np.array_equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    config = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == config


def fuse(tensors):
    """As Hugging Face holds experts in memory, and some writers on disk: one tensor for all of them."""
    take = lambda e, name: tensors.pop(f"{EXPERTS}.{e}.{name}_proj.weight")
    both = [np.concatenate([take(e, "gate"), take(e, "up")]) for e in range(8)]
    tensors[f"{EXPERTS}.gate_up_proj"] = np.stack(both)
    tensors[f"{EXPERTS}.down_proj"] = np.stack([take(e, "down") for e in range(8)])


def test_fused_experts_are_read_alike(oracles, tmp_path):
    model, expected = load(oracles, "moe_mla")
    fused = jf.load(copy(oracles, tmp_path / "x", change=fuse))
    ours, theirs = (jf.functional(m)[1] for m in (model, fused))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))
    assert ours["layers"]["1"]["mlp"]["experts"]["up"]["kernel"].shape == (8, 32, 24)


def test_layers_behind_the_last_are_not_read(oracles, tmp_path):
    def change(tensors):
        tensors["model.layers.2.eh_proj.weight"] = np.zeros((32, 64), np.float32)
        tensors["model.layers.2.mlp.gate.weight"] = np.zeros((8, 32), np.float32)

    model, expected = load(oracles, "moe_mla")
    out = run(jf.load(copy(oracles, tmp_path / "x", change=change)), batch_of(expected))
    assert np.array_equal(out.logits, run(model, batch_of(expected)).logits)
    with pytest.raises(CheckpointError, match=r"no place in this model: .*layers\.2\.eh_proj"):
        jf.load(copy(oracles, tmp_path / "x", change=change, num_nextn_predict_layers=0))


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, *shape, dtype=np.float32):
    return lambda tensors: tensors.update({name: np.zeros(shape, dtype)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{EXPERTS}.3.up_proj.weight"), r"tensors missing: layers\.1\.mlp\.experts\.3\.up_proj\.weight"),
        (
            put(f"{EXPERTS}.3.up_proj.weight", 24, 31),
            r"experts\.3\.up_proj\.weight has shape \(24, 31\), .* \(24, 32\)",
        ),
        (put(f"{EXPERTS}.3.up_proj.weight", 24, 32, dtype=np.int32), r"has dtype int32, expected a floating-point"),
        (put(f"{EXPERTS}.3.up_proj.weight", 24, 32, dtype=np.float16), r"dtype float16, other experts have float32"),
        (put(f"{EXPERTS}.8.up_proj.weight", 24, 32), r"no place in this model: .*experts\.8\.up_proj"),
        (drop("model.layers.1.mlp.gate.e_score_correction_bias"), "missing: .*e_score_correction_bias"),
        (lambda tensors: [fuse(tensors), put(f"{EXPERTS}.down_proj", 8, 32, 23)(tensors)], r"shape \(8, 32, 23\)"),
    ],
)
def test_checkpoints_that_do_not_fit(change, message, oracles, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        jf.load(copy(oracles, tmp_path / "x", change=change))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported, only 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method 'greedy' is not supported, only 'noaux_tc'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported, only 1"),
        ({"num_experts_per_tok": 9}, "k: expected 1 to 4 experts a token, got 9"),
        ({"n_group": 3}, "8 experts do not form 3 equal groups"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads must be num_attention_heads \(4\), .* got 2"),
        ({"qk_rope_head_dim": 5}, "an even number of dimensions is needed, got 5"),
    ],
)
def test_configs_that_are_refused(config, message, oracles, tmp_path):
    with pytest.raises(ValueError, match=message):
        jf.load(copy(oracles, tmp_path / "x", **config))


def test_settings_of_the_scores_are_saved(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 5e4,
            "mscale": 1.0, "mscale_all_dim": 0.7}  # fmt: skip
    base = {"model_type": "deepseek_v3", "max_position_embeddings": 32}
    new = deepseek_v3.Config.from_hf({**base, "rope_parameters": rope})
    old = {name: value for name, value in rope.items() if name not in ("rope_type", "rope_theta")}
    old = deepseek_v3.Config.from_hf({**base, "rope_theta": 5e4, "rope_scaling": {**old, "type": "yarn"}})
    assert (new.rope, new.scale) == (old.rope, old.scale)
    grow = lambda m: 0.1 * m * np.log(4) + 1
    assert np.isclose(new.scale, 192**-0.5 * grow(0.7) ** 2) and np.isclose(new.rope.magnitude, grow(1) / grow(0.7))
    made = deepseek_v3.Config(rotary=new.rotary, mscale_all_dim=0.7, max_position_embeddings=32)
    again = deepseek_v3.Config.from_hf(json.loads(json.dumps(made.to_hf())))
    assert (again.rope, again.scale) == (made.rope, made.scale)
    assert deepseek_v3.Config.from_hf({**base, "q_lora_rank": None}).to_hf()["q_lora_rank"] is None


@pytest.mark.parametrize("how", ["load", "init"])
def test_routers_stay_in_float32(how, oracles, tmp_path):
    model, expected = load(oracles, "moe_mla", dtype="bfloat16")
    if how == "init":
        model = jf.init(model.config, head="causal_lm", key=jax.random.key(0), dtype="bfloat16")
    kept = {path: a.dtype for path, a in jf.paths.flatten(jf.functional(model)[1]).items()}
    wide = [path for path, dtype in kept.items() if dtype == np.float32]
    assert wide == ["layers.1.mlp.correction", "layers.1.mlp.router.kernel"]
    jf.save(model, tmp_path / "x")
    assert json.loads((tmp_path / "x" / "config.json").read_text())["dtype"] == "bfloat16"
    if how == "load":
        assert np.isfinite(np.asarray(run(model, batch_of(expected)).logits, np.float32)).all()


@eight
def test_experts_on_devices_of_their_own(oracles):
    model, expected = load(oracles, "moe_mla")
    mesh = jf.mesh("fsdp=2,expert=4")
    sharded = load(oracles, "moe_mla", mesh=mesh)[0]
    apply, params = jf.functional(sharded)
    up = params["layers"]["1"]["mlp"]["experts"]["up"]["kernel"]
    assert up.sharding == sharding(mesh, "layers.1.mlp.experts.up.kernel", up.shape)
    assert {s.data.shape for s in up.addressable_shards} == {(2, 16, 24)}
    assert_close(jax.jit(apply)(params, batch_of(expected)).logits, run(model, batch_of(expected)).logits, 1e-5)


@eight
@pytest.mark.parametrize(
    ("shape", "moved"),
    [("expert=8", 0), ("fsdp=2,expert=4", None), ("data=2,expert=2,tensor=2", None), ("tensor=8", None)],
)
@pytest.mark.parametrize("way", ["_fastest", "_sorted", "_gathered"])
def test_experts_stay_where_they_are(shape, moved, way, oracles, monkeypatch):
    model, expected = load(oracles, "moe_mla")
    apply, params = jf.functional(model)
    batch = {name: np.concatenate([value] * 2) for name, value in batch_of(expected).items()}
    loss = lambda apply: lambda params: jnp.square(apply(params, batch).logits).mean()
    expected_logits = jax.jit(apply)(params, batch).logits
    expected_grads = jax.jit(jax.grad(loss(apply)))(params) if way == "_sorted" else None
    monkeypatch.setattr(experts, "_fastest", getattr(experts, way))
    mesh = jf.mesh(shape)
    held, placed = constrained(apply, mesh), jax.device_put(params, shardings(mesh, params))
    program = jax.jit(held).lower(placed, batch).compile()
    assert_close(program(placed, batch).logits, expected_logits, 1e-5)
    if moved is not None:  # one sum over the axis, and no weights sent around
        count = lambda kind: len(re.findall(rf"= \S+ {kind}(?:-start)?\(", program.as_text()))
        assert (count("all-reduce"), count("all-gather"), count("all-to-all")) == (1, moved, 0)
    if expected_grads is not None:
        found = jax.jit(jax.grad(loss(held)))(placed)
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected_grads), strict=True):
            assert_close(ours, theirs, 1e-5 * float(np.abs(theirs).max()) + 1e-9)


def test_balance_of_experts_from_sites(oracles):
    model, expected = load(oracles, "moe_mla")
    apply, params = jf.functional(model)
    names = ("layers.*.mlp.router.output", "layers.*.mlp.ids")
    _, seen = jax.jit(jf.reap(apply, names))(params, batch_of(expected))
    logits, ids = (seen[name.replace("*", "1")] for name in names)
    assert logits.shape == (2, 13, 8) and ids.shape == (2, 13, 2)
    loss = jf.nn.balance_loss(jax.nn.sigmoid(logits), ids, expected["attention_mask"], per_sequence=True)
    assert 0.5 < float(loss) < 8


def test_stacked_experts_are_no_target_for_surgery(oracles):
    model, _ = load(oracles, "moe_mla")
    with pytest.raises(ValueError, match=r"experts\.\w+ has a kernel of shape \(8, .*leave it out"):
        jf.weights.add_lora(model, "layers.*.mlp.**", rank=2, alpha=4, key=jax.random.key(0))
    jf.weights.add_lora(model, "layers.*.{attention,mlp.shared}.*", rank=2, alpha=4, key=jax.random.key(0))
