"""T5 against Hugging Face on tiny models, v1.0 and v1.1: both stacks, cached steps, gradients, files, errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import assert_close, assert_close_scaled, batch_of, grads_by_hf_name, read, run
from safetensors.numpy import load_file, save_file

import jaxformers as jf
from jaxformers.losses import cross_entropy
from jaxformers.models import t5

VERSIONS = ("t5-v1_0", "t5-v1_1")
SMALL = t5.Config(
    vocab_size=30, hidden_size=8, head_dim=4, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
)


def load(oracles, version):
    return jf.load(oracles / "backbones" / version), read(oracles / "backbones" / version)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_hidden_states_attentions_and_logits(version, scan_layers, oracles):
    model, expected = load(oracles, version)
    apply, params = jf.functional(model, scan_layers=scan_layers)
    patterns = ("*.embeddings", "*.layers.*.output", "**.{attention,cross_attention}.probs")
    out, seen = jax.jit(jf.reap(apply, patterns))(params, batch_of(expected))
    assert_close_scaled(out.logits, expected["logits"], 2e-5)
    last = {"encoder": out.extra["encoder_last_hidden_state"], "decoder": out.last_hidden_state}
    for stack, depth in (("encoder", 2), ("decoder", 3)):
        hidden = [seen[f"{stack}.embeddings"], *(seen[f"{stack}.layers.{i}.output"] for i in range(depth))]
        hidden[-1] = last[stack]  # after the final norm, as Hugging Face lists it
        assert_close(np.stack(hidden), expected[f"{stack}_hidden_states"], 1e-4)
        probs = np.stack([seen[f"{stack}.layers.{i}.attention.probs"] for i in range(depth)])
        assert_close(probs, expected[f"{stack}_attentions"], 1e-5)
    cross = np.stack([seen[f"decoder.layers.{i}.cross_attention.probs"] for i in range(3)])
    assert_close(cross, expected["cross_attentions"], 1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_loss_and_gradients(version, oracles):
    model, expected = load(oracles, version)
    apply, params = jf.functional(model)
    labels = jnp.asarray(expected["labels"])
    batch = {name: expected[name] for name in ("input_ids", "attention_mask")}
    batch["decoder_input_ids"] = jf.nn.shift_right(labels, model.config.start_id, model.config.pad_token_id)
    np.testing.assert_array_equal(batch["decoder_input_ids"], expected["decoder_input_ids"])
    loss, grads = jax.jit(jax.value_and_grad(lambda p: cross_entropy(apply(p, batch).logits, labels)))(params)
    assert_close(loss, expected["loss"], 1e-5)
    found = grads_by_hf_name(model, grads)
    for name in (name for name in expected if name.startswith("grad.")):
        assert_close_scaled(found[name.removeprefix("grad.")], expected[name], 1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_cached_steps(version, oracles):
    """One token at a time: the logits of each step and the greedy ids, from keys of the memory made once."""
    model, expected = load(oracles, version)
    batch = batch_of(expected)
    apply, params = jf.functional(model)
    memory = model.encode(batch["input_ids"], batch["attention_mask"])
    cache = model.empty_cache(3, 12, memory)  # more slots than steps
    step = jax.jit(lambda params, ids, cache: apply(params, {"decoder_input_ids": ids, "cache": cache}))
    ids = expected["greedy_ids_nostop"]
    for i in range(8):
        out = step(params, ids[:, i : i + 1], cache)
        cache = out.cache
        assert_close_scaled(out.logits[:, 0], expected["greedy_step_logits"][:, i], 2e-5)
        written = ids[:, i + 1] != 0  # Hugging Face pads what has ended
        assert np.array_equal(out.logits[:, 0].argmax(-1)[written], ids[written, i + 1])
    assert out.extra is None and int(cache.used) == 8
    whole = apply(params, {**batch, "decoder_input_ids": ids[:, :8]}).logits
    assert_close_scaled(out.logits[:, 0], whole[:, -1], 2e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_prefill_and_steps_equal_one_pass(oracles, scan_layers):
    model, expected = load(oracles, "t5-v1_1")
    batch = {**batch_of(expected), "decoder_attention_mask": np.ones((3, 9), int)}
    batch["decoder_attention_mask"][1, :2] = 0  # padded on the left: positions count from one another
    apply, params = jf.functional(model, scan_layers=scan_layers)
    whole = apply(params, batch).logits
    one = jf.with_params(model, params)
    memory = one.encode(batch["input_ids"], batch["attention_mask"])
    if scan_layers:
        graph, _ = nnx.split(_stacked(model))
        one = nnx.merge(graph, params)
    cache, found = one.empty_cache(3, 9, memory), []
    for start, end in ((0, 4), (4, 5), (5, 7), (7, 9)):
        part = {name: batch[name][:, start:end] for name in ("decoder_input_ids", "decoder_attention_mask")}
        out = jax.jit(apply)(params, {**part, "cache": cache})
        cache = out.cache
        found.append(out.logits)
    real = batch["decoder_attention_mask"] == 1
    assert_close_scaled(np.concatenate(found, 1), whole, 2e-5, real)
    last = apply(params, {**batch, "logits_to_keep": 2}).logits
    assert_close_scaled(last, whole[:, -2:], 1e-6)


def _stacked(model):
    from jaxformers import surgery
    from jaxformers.nn.block import stack

    model = surgery.copy(model)
    for half in (model.encoder, model.decoder):
        half.layers = stack(half.layers)
    return surgery.named(model)


def test_padding_of_the_input_is_not_seen(oracles):
    model, expected = load(oracles, "t5-v1_0")
    batch = batch_of(expected)
    plain = run(model, batch)
    other = run(model, {**batch, "input_ids": np.where(batch["attention_mask"] == 1, batch["input_ids"], 77)})
    assert_close(other.logits, plain.logits, 1e-6)
    unpadded = {name: value[2:] for name, value in batch.items()}
    unpadded |= {name: unpadded[name][:, :3] for name in ("input_ids", "attention_mask")}
    assert_close(run(model, unpadded).logits, plain.logits[2:], 1e-6)
    attended = {name: value for name, value in batch.items() if name != "attention_mask"}
    assert np.abs(run(model, attended).logits - plain.logits)[1:].max() > 1e-3


def test_a_memory_stands_for_the_input(oracles):
    model, expected = load(oracles, "t5-v1_1")
    batch = batch_of(expected)
    memory = model.encode(batch["input_ids"], batch["attention_mask"])
    out = run(model, {"memory": memory, "decoder_input_ids": batch["decoder_input_ids"]})
    assert_close_scaled(out.logits, expected["logits"], 2e-5)
    table = model.embeddings.token
    embedded = {"inputs_embeds": table(batch["input_ids"]), "attention_mask": batch["attention_mask"]}
    embedded["decoder_inputs_embeds"] = table(batch["decoder_input_ids"])
    assert_close_scaled(run(model, embedded).logits, expected["logits"], 2e-5)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_saved_bit_equal(version, oracles, tmp_path):
    model, _ = load(oracles, version)
    jf.save(model, tmp_path / "x")
    before, after = (load_file(f / "model.safetensors") for f in (oracles / "backbones" / version, tmp_path / "x"))
    assert set(before) == set(after) and all(np.array_equal(before[name], after[name]) for name in before)
    configs = [json.loads((f / "config.json").read_text()) for f in (oracles / "backbones" / version, tmp_path / "x")]
    assert configs[0] == configs[1]
    assert jf.load(tmp_path / "x").config == model.config


def rewritten(oracles, tmp_path, version, change, tensors=None):
    """The checkpoint with another config.json, and other tensors where given."""
    source = oracles / "backbones" / version
    hf = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(change(hf)))
    save_file(tensors or load_file(source / "model.safetensors"), tmp_path / "model.safetensors")
    return jf.load(tmp_path)


def older(hf):
    """config.json as transformers 4 wrote it for v1.1: the tie says whether the states are scaled."""
    hf = {
        name: value
        for name, value in hf.items()
        if name not in ("scale_decoder_outputs", "dense_act_fn", "is_gated_act")
    }
    return {**hf, "tie_word_embeddings": False, "n_positions": 512, "torch_dtype": "float32"}


def test_older_layout_and_an_output_of_its_own(oracles, tmp_path):
    source = oracles / "backbones" / "t5-v1_1"
    tensors, expected = load_file(source / "model.safetensors"), read(source)
    own = np.random.default_rng(0).standard_normal((100, 32)).astype(np.float32)
    tensors |= {"lm_head.weight": own, "encoder.embed_tokens.weight": tensors["shared.weight"]}
    tensors["decoder.embed_tokens.weight"] = tensors["shared.weight"].copy()
    model = rewritten(oracles, tmp_path, "t5-v1_1", older, tensors)
    assert not model.config.scale_decoder_outputs and not model.config.tie_word_embeddings
    out = run(model, batch_of(expected))
    assert_close_scaled(out.last_hidden_state, expected["decoder_hidden_states"][-1], 2e-5)
    assert_close_scaled(out.logits, expected["decoder_hidden_states"][-1] @ own.T, 2e-5)
    jf.save(model, tmp_path / "x")
    after = load_file(tmp_path / "x" / "model.safetensors")
    assert set(tensors) - set(after) == {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert np.array_equal(after["lm_head.weight"], own)
    assert jf.load(tmp_path / "x").config == model.config


def test_a_tied_output_stored_twice_stays_tied(oracles, tmp_path):
    tensors = load_file(oracles / "backbones" / "t5-v1_0" / "model.safetensors")
    twice = {**tensors, "lm_head.weight": tensors["shared.weight"].copy()}
    model = rewritten(oracles, tmp_path, "t5-v1_0", lambda hf: {**hf, "architectures": ["T5WithLMHeadModel"]}, twice)
    assert model.config.tie_word_embeddings and model.head.decoder is None
    assert_close_scaled(run(model, batch_of(z := read(oracles / "backbones" / "t5-v1_0"))).logits, z["logits"], 2e-5)


def test_the_table_under_another_name(oracles, tmp_path):
    tensors = load_file(oracles / "backbones" / "t5-v1_0" / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    model = rewritten(oracles, tmp_path, "t5-v1_0", dict, tensors)
    assert_close_scaled(run(model, batch_of(z := read(oracles / "backbones" / "t5-v1_0"))).logits, z["logits"], 2e-5)
    del tensors["encoder.embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"tensors missing: shared\.weight"):
        rewritten(oracles, tmp_path, "t5-v1_0", dict, tensors)


def test_encoder_of_a_whole_checkpoint(oracles):
    source = oracles / "backbones" / "t5-v1_0"
    expected = read(source)
    batch = {name: expected[name] for name in ("input_ids", "attention_mask")}
    model = jf.load(source, head="none")
    assert model.decoder is None
    assert_close_scaled(run(model, batch).last_hidden_state, expected["encoder_hidden_states"][-1], 2e-5)
    sentences = jf.load(source, head="sentence")
    mask = expected["attention_mask"][:, :, None]
    mean = (expected["encoder_hidden_states"][-1] * mask).sum(1) / mask.sum(1)
    assert_close_scaled(run(sentences, batch).pooled, mean, 2e-5)
    with pytest.raises(ValueError, match="decoder.block.0"):
        jf.load(oracles / "variants" / "t5-encoder", head="seq2seq")


def test_mt5_leaves_the_states_unscaled():
    hf = {"model_type": "mt5", "tie_word_embeddings": True}
    config = t5.Config.from_hf(hf)
    assert (config.vocab_size, config.intermediate_size, config.num_hidden_layers) == (250112, 1024, 8)
    assert config.gated and config.hidden_act == "gelu_new" and not config.scale_decoder_outputs
    assert config.to_hf()["model_type"] == "mt5" and t5.Config.from_hf(config.to_hf()).to_hf() == config.to_hf()
    assert t5.Config.from_hf({"model_type": "t5"}) == t5.Config()


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_dropout_follows_the_key(oracles):
    model, expected = load(oracles, "t5-v1_0")
    apply, params = jf.functional(model)
    draw = lambda key: jax.jit(lambda k: apply(params, batch_of(expected), rngs=k).logits)(key)
    first, again, other = draw(jax.random.key(0)), draw(jax.random.key(0)), draw(jax.random.key(1))
    assert np.array_equal(first, again) and np.abs(first - other).max() > 1e-3
    assert np.abs(first - expected["logits"]).max() > 1e-3


def test_first_weights_are_as_wide_as_the_paper_has_them():
    config = t5.Config(num_hidden_layers=1, vocab_size=200, hidden_size=64, head_dim=16, intermediate_size=256)
    model = jf.init(config, head="seq2seq_lm", key=jax.random.key(0))
    std = lambda module: float(jnp.std(module.kernel.get_value()))
    attention = model.decoder.layers[0].cross_attention
    for module, expected in (
        (attention.query, (64 * 16) ** -0.5),
        (attention.value, 64**-0.5),
        (attention.out, (8 * 16) ** -0.5),
        (model.encoder.layers[0].mlp.up, 64**-0.5),
        (model.encoder.layers[0].mlp.down, 256**-0.5),
    ):
        assert abs(std(module) / expected - 1) < 0.05
    assert abs(float(jnp.std(model.embeddings.token.embedding.get_value())) - 1) < 0.05


def test_parameters_are_cut_as_everywhere():
    _, params = jf.functional(jf.init(SMALL, head="seq2seq_lm", key=jax.random.key(0)))
    mesh = jf.mesh("fsdp=2,tensor=2")
    cut = jf.paths.flatten(jax.tree.map(lambda s: s.spec, jax_shardings(mesh, params)))
    spec = jax.sharding.PartitionSpec
    assert cut["decoder.layers.0.cross_attention.query.kernel"] == spec("fsdp", "tensor")
    assert cut["encoder.layers.0.mlp.down.kernel"] == spec("tensor", "fsdp")
    assert cut["embeddings.token.embedding"] == spec("tensor", "fsdp")


def jax_shardings(mesh, params):
    from jaxformers.mesh import shardings

    return shardings(mesh, params)


def test_errors(oracles):
    model, expected = load(oracles, "t5-v1_0")
    ids = expected["input_ids"]
    memory = model.encode(ids)
    for batch, message in (
        ({"input_ids": ids}, "decoder_input_ids, decoder_inputs_embeds"),
        ({"decoder_input_ids": ids}, "exactly one of the three"),
        ({"input_ids": ids, "memory": memory, "decoder_input_ids": ids}, "exactly one of the three"),
        ({"input_ids": ids, "labels": ids}, "'labels' is no input of T5"),
    ):
        with pytest.raises(ValueError, match=message):
            run(model, batch)
    encoder = jf.init(SMALL, key=jax.random.key(0))
    with pytest.raises(ValueError, match="head None has no decoder"):
        encoder(ids % 30, decoder_input_ids=ids % 30)
    with pytest.raises(ValueError, match="head None has no decoder"):
        encoder.empty_cache(3, 4, memory)
    classifier = jf.init(SMALL, head="sequence_classification", key=jax.random.key(0))
    with pytest.raises(ValueError, match="looks for the end token"):
        classifier(inputs_embeds=jnp.zeros((1, 3, 8)), decoder_input_ids=ids[:1, :3] % 30)
    for hf, message in (
        ({"feed_forward_proj": "doubly-gelu"}, "feed_forward_proj 'doubly-gelu'"),
        ({"feed_forward_proj": "relu", "is_gated_act": True}, "is_gated_act"),
        ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets 2"),
        ({"relative_attention_max_distance": 16}, "relative_attention_max_distance 16"),
        ({"num_decoder_layers": 10**9}, "num_decoder_layers = 1000000000 is beyond reason"),
        ({"relative_attention_max_distance": 10**9}, "relative_attention_max_distance = 1000000000 is beyond reason"),
        ({"eos_token_id": [1, 2]}, "eos_token_id must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            t5.Config.from_hf({"model_type": "t5", **hf})
    with pytest.raises(ValueError, match="'gelish' is unknown"):
        jf.init(t5.Config.from_hf({"model_type": "t5", "feed_forward_proj": "gated-gelish"}), key=jax.random.key(0))
