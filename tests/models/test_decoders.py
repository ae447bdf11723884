"""Decoders against Hugging Face on tiny models: layers, padding on both sides, cache, greedy ids, gradients."""

import json

import jax
import numpy as np
import pytest
from parity import assert_close, assert_close_scaled, batch_of, forward, grads_by_hf_name, read, run

import jaxformers as jf
from jaxformers.losses import cross_entropy

LEARNED = ("gpt2", "opt", "gpt_neo", "gpt_neox", "gptj", "mistral", "qwen2")
LLAMAS = ("gqa_tied_llama3rope", "gqa_untied", "mha_leftpad")
LOGITS = 2e-5  # relative to the output's scale


def load(oracles, folder):
    return jf.load(oracles / "backbones" / folder), read(oracles / "backbones" / folder)


def decode(apply, params, cache, batch, prefill):
    """Logits of all positions: ``prefill`` tokens at once, then one at a time through one compiled step."""
    step = jax.jit(apply)
    length, found = batch["input_ids"].shape[1], []
    for start, end in [(0, prefill), *((i, i + 1) for i in range(prefill, length))]:
        part = {name: value[:, start:end] for name, value in batch.items()}
        out = step(params, {**part, "cache": cache})
        cache = out.cache
        found.append(out.logits)
    return np.concatenate(found, axis=1), cache


@pytest.mark.parametrize("kind", ["plain", "rightpad", "leftpad"])
@pytest.mark.parametrize("folder", LEARNED)
def test_learned_positions(folder, kind, oracles):
    model, expected = load(oracles, folder)
    batch = batch_of(expected, f"{kind}.")
    real = batch.get("attention_mask", np.ones_like(batch["input_ids"])) == 1
    out, hidden, attentions = forward(model, batch)
    assert_close(hidden, expected[f"{kind}.hidden_states"], 1e-4, (slice(None), real))
    by_query = attentions.transpose(1, 3, 0, 2, 4)  # (B, query, n, H, key)
    assert_close(by_query, expected[f"{kind}.attentions"].transpose(1, 3, 0, 2, 4), 1e-5, real)
    assert_close_scaled(out.logits, expected[f"{kind}.logits"], LOGITS, real)


@pytest.mark.parametrize("layout", ["config.json", "config_v4.json"])
@pytest.mark.parametrize("folder", LLAMAS)
def test_llama(folder, layout, oracles, tmp_path):
    source = oracles / "backbones" / "llama" / folder
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    (tmp_path / "config.json").write_text((source / layout).read_text())
    model, expected = jf.load(tmp_path), read(source)
    batch = {name: expected[name] for name in ("input_ids", "attention_mask")}
    real = batch["attention_mask"] == 1
    out, hidden, attentions = forward(model, batch)
    assert_close(hidden, expected["hidden_states"], 3e-5, (slice(None), real))
    by_query = attentions.transpose(1, 3, 0, 2, 4)
    assert_close(by_query, expected["attentions"].transpose(1, 3, 0, 2, 4), 3e-5, real)
    assert_close_scaled(out.logits, expected["logits"], LOGITS, real)


@pytest.mark.parametrize("folder", LLAMAS)
def test_llama_positions_and_padding(folder, oracles):
    model, expected = load(oracles, f"llama/{folder}")
    real = expected["attention_mask"] == 1
    out = run(model, batch_of(expected))  # with the oracle's position_ids
    assert_close_scaled(out.logits, expected["logits_with_position_ids"], LOGITS, real)
    unpadded = expected["input_ids"][:1, real[0]]
    out = run(model, {"input_ids": unpadded})
    assert_close_scaled(out.logits, expected["logits_unpadded_row0"], LOGITS)


@pytest.mark.parametrize("folder", LEARNED)
def test_cached_decoding(folder, oracles):
    model, expected = load(oracles, folder)
    apply, params = jf.functional(model)
    prefill = json.loads(str(expected["options"]))["prefill"]
    for kind in ("plain", "leftpad"):
        batch = batch_of(expected, f"{kind}.")
        cache = model.empty_cache(*batch["input_ids"].shape)
        logits, cache = decode(apply, params, cache, batch, prefill)
        real = batch.get("attention_mask", np.ones_like(batch["input_ids"])) == 1
        assert_close_scaled(logits, expected[f"incremental_{kind}.logits"], LOGITS, real)
        assert int(cache.used) == batch["input_ids"].shape[1]
        assert np.array_equal(cache.valid, real)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_cached_decoding_of_llama_equals_the_full_pass(oracles, scan_layers):
    model, expected = load(oracles, "llama/gqa_untied")
    apply, params = jf.functional(model, scan_layers=scan_layers)
    batch = batch_of(expected)
    cache = model.empty_cache(batch["input_ids"].shape[0], 20)  # more slots than tokens
    if scan_layers:
        cache = jf.with_params(model, params).empty_cache(batch["input_ids"].shape[0], 20)
        layers = {"*": jax.tree.map(lambda *a: np.stack(a), *cache.layers.values())}
        cache = type(cache)(layers, cache.used, cache.valid)
    logits, _ = decode(apply, params, cache, batch, 3)
    real = batch["attention_mask"] == 1
    assert_close_scaled(logits, expected["logits_with_position_ids"], LOGITS, real)


@pytest.mark.parametrize("folder", [*LEARNED, *(f"llama/{name}" for name in LLAMAS)])
def test_greedy_ids(folder, oracles):
    model, expected = load(oracles, folder)
    apply, params = jf.functional(model)
    ids = expected["greedy_ids"]
    prompt = expected["greedy_prompt"].shape[1] if "greedy_prompt" in expected else 4
    step = jax.jit(lambda params, batch: apply(params, {**batch, "logits_to_keep": 1}))
    out = step(params, {"input_ids": ids[:, :prompt], "cache": model.empty_cache(*ids.shape)})
    for i in range(prompt, ids.shape[1]):
        assert out.logits.shape[1] == 1
        token = out.logits.argmax(-1)
        assert np.array_equal(token[:, 0], ids[:, i]), f"token {i}"
        if i + 1 < ids.shape[1]:
            out = step(params, {"input_ids": token, "cache": out.cache})


@pytest.mark.parametrize("folder", [*LEARNED, *(f"llama/{name}" for name in LLAMAS)])
def test_loss_and_gradients(folder, oracles):
    model, expected = load(oracles, folder)
    apply, params = jf.functional(model)
    if folder in LEARNED:
        batch = batch_of(expected, "plain.")
    else:
        batch = {name: expected[name] for name in ("input_ids", "attention_mask")}

    def loss(params):
        return cross_entropy(apply(params, batch).logits[:, :-1], expected["labels"][:, 1:])

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert_close_scaled(value, expected["loss"], 1e-5)
    grads = grads_by_hf_name(model, grads)
    names = [name for name in expected if name.startswith("grad.")]
    assert names
    for name in names:
        stored = name.removeprefix("grad.")
        found = np.array(grads[stored.replace("lm_head", "embed_out") if folder == "gpt_neox" else stored])
        if "embed_tokens" in name and folder == "llama/mha_leftpad":
            found[model.config.pad_token_id] = 0  # torch's padding_idx: no gradient for that row, though it is used
        assert_close_scaled(found, expected[name], 1e-4)


@pytest.mark.parametrize("folder", ["gpt2", "opt", "llama/gqa_untied"])
def test_logits_to_keep_and_full_cache(folder, oracles):
    model, expected = load(oracles, folder)
    apply, params = jf.functional(model)
    ids = expected["input_ids" if "input_ids" in expected else "plain.input_ids"][:2, :6]
    full = run(model, {"input_ids": ids})
    kept = jax.jit(lambda params, ids: apply(params, {"input_ids": ids, "logits_to_keep": 2}))(params, ids)
    assert_close(kept.logits, full.logits[:, -2:], 1e-5)
    assert full.cache is None
    cache = run(model, {"input_ids": ids, "cache": model.empty_cache(2, 6)}).cache
    with pytest.raises(ValueError, match="6 of 6 slots are used"):
        apply(params, {"input_ids": ids[:, :1], "cache": cache})
    with pytest.raises(ValueError, match="made for 3 sequences"):
        apply(params, {"input_ids": ids, "cache": model.empty_cache(3, 6)})


def test_gpt2_positions_end(oracles):
    model, _ = load(oracles, "gpt2")
    apply, params = jf.functional(model)
    cache = model.empty_cache(1, 40)
    cache = run(model, {"input_ids": np.ones((1, 32), int), "cache": cache}).cache
    with pytest.raises(ValueError, match="length 1 after 32 cached tokens exceeds this model's 32 positions"):
        apply(params, {"input_ids": np.ones((1, 1), int), "cache": cache})


@pytest.mark.parametrize("folder", ["gpt2", "opt", "llama/gqa_untied"])
def test_bfloat16_is_close(folder, oracles):
    model, expected = load(oracles, folder)
    kind = "" if "input_ids" in expected else "plain."
    ids = expected[f"{kind}input_ids"]
    exact = np.asarray(run(model, {"input_ids": ids}).logits)
    half = jf.load(oracles / "backbones" / folder, dtype="bfloat16")
    out = run(half, {"input_ids": ids, "cache": half.empty_cache(*ids.shape)})
    assert out.logits.dtype == "bfloat16" and jax.tree.leaves(out.cache.layers)[0].dtype == "bfloat16"
    assert np.sqrt(np.mean((np.asarray(out.logits, np.float32) - exact) ** 2)) < 0.03 * exact.std()


def test_glm(oracles):
    model, expected = load(oracles, "glm/base")
    real = expected["attention_mask"] == 1
    out, hidden, attentions = forward(model, batch_of(expected))
    assert_close(hidden, expected["hidden_states"], 3e-5, (slice(None), real))
    assert_close(attentions.transpose(1, 3, 0, 2, 4), expected["attentions"].transpose(1, 3, 0, 2, 4), 3e-5, real)
    assert_close_scaled(out.logits, expected["logits"], LOGITS, real)
    assert_close_scaled(cross_entropy(out.logits[:, :-1], expected["labels"][:, 1:]), expected["loss"], 1e-5)
    apply, params = jf.functional(model)
    batch = batch_of(expected)
    logits, _ = decode(apply, params, model.empty_cache(*batch["input_ids"].shape), batch, 8)
    assert_close_scaled(logits[:, -2:], expected["cached_last2_logits"], LOGITS, real[:, -2:])


@pytest.mark.parametrize("folder", [*LEARNED, "glm/base"])
def test_generate_and_scan_agree_with_the_loop(folder, oracles):
    model, _ = load(oracles, folder)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13]]
    both = jf.generate(model, prompts, max_new_tokens=6, eos_token_id=())
    alone = jf.generate(model, prompts[1], max_new_tokens=6, eos_token_id=())
    assert both[1] == alone and len(both[0]) == 6
    apply, params = jf.functional(model)
    ids = np.array([prompts[0]])
    loop = jax.jit(apply)(params, {"input_ids": ids}).logits
    assert int(loop[0, -1].argmax()) == both[0][0]
    if folder != "gpt_neo":  # whose layers differ: they take turns in what they see
        apply, params = jf.functional(model, scan_layers=True)
        assert_close_scaled(jax.jit(apply)(params, {"input_ids": ids}).logits, loop, 1e-5)
