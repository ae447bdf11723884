"""Sentence embeddings: all-MiniLM-L6-v2 against Hugging Face's numbers; order, batches, compile counts, errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxformers as jf
from jaxformers import embedding, surgery
from jaxformers.data.tokenizers import train_bpe, train_wordpiece
from jaxformers.models import bert, llama

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew potions in old kettles".split()


# ------------------------------------------------------------------------------------- the real checkpoint, where it is


@pytest.fixture(scope="module")
def oracle(oracles):
    return dict(np.load(oracles / "all-minilm-l6-v2" / "minilm.npz"))


@pytest.fixture(scope="module")
def texts(oracles):
    return json.loads((oracles / "all-minilm-l6-v2" / "minilm_texts.json").read_text())


@pytest.fixture(scope="module")
def encoder(minilm):
    return jf.load("all-MiniLM-L6-v2")


def test_minilm_token_ids(minilm, texts, oracle):
    tokenizer = jf.load_tokenizer(minilm)
    batch = tokenizer(texts["texts"])
    np.testing.assert_array_equal(batch["input_ids"], oracle["input_ids"])
    np.testing.assert_array_equal(batch["attention_mask"], oracle["attention_mask"])
    first, second = zip(*texts["pairs"], strict=True)
    batch = tokenizer(first, second)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        np.testing.assert_array_equal(batch[name], oracle[f"pair_{name}"])


def test_minilm_embeddings(encoder, texts, oracle):
    found = jf.embed(encoder, texts["texts"])
    assert found.dtype == np.float32 and found.shape == (12, 384)
    np.testing.assert_allclose(found, oracle["embeddings"], atol=2e-6)
    np.testing.assert_allclose(found @ found.T, oracle["cosine"], atol=2e-6)
    found = jf.embed(encoder, texts["texts"], normalize=False, batch_size=5)
    np.testing.assert_allclose(found, oracle["mean_pooled"], atol=1e-5)
    assert encoder.head.normalize  # the model itself is left as it was


def test_minilm_states_and_attention(encoder, texts, oracle):
    """Padded to 256 as the reference was: hidden states of all layers, probabilities through sites."""
    apply, params = jf.functional(encoder)
    batch = {name: oracle[name].astype(np.int32) for name in ("input_ids", "attention_mask")}
    sites = ["embeddings", "layers.*.output", "layers.0.attention.probs", "layers.5.attention.probs"]
    out, seen = jax.jit(jf.reap(apply, sites))(params, batch)
    real = oracle["attention_mask"].astype(bool)
    hidden = np.asarray(out.last_hidden_state)[:, :12, :32]
    close = lambda a, b, at: np.testing.assert_allclose(np.asarray(a)[at], b[at], atol=2e-5)
    close(hidden, oracle["last_hidden_slice"], real[:, :12])
    for layer, name in enumerate(("embeddings", *(f"layers.{i}.output" for i in range(6)))):
        np.testing.assert_allclose(np.asarray(seen[name])[:, 0], oracle["cls_all_layers"][layer], atol=2e-5)
    for name, head, site in (("layer0", 0, "layers.0"), ("last", 5, "layers.5")):
        probs = np.asarray(seen[f"{site}.attention.probs"])[:, head, :16, :16]
        close(probs, oracle[f"attention_{name}_head{head}"], real[:, :16])
    np.testing.assert_allclose(out.pooled, oracle["embeddings"], atol=2e-6)


def test_minilm_pooler_and_pairs(minilm, oracle):
    apply, params = jf.functional(jf.load(minilm, head="none"))
    apply = jax.jit(apply)
    names = ("input_ids", "attention_mask", "token_type_ids")
    batch = {name: oracle[name].astype(np.int32) for name in names[:2]}
    np.testing.assert_allclose(apply(params, batch).pooled, oracle["pooler_output"], atol=2e-5)
    out = apply(params, {name: oracle[f"pair_{name}"] for name in names})
    np.testing.assert_allclose(out.last_hidden_state[:, 0], oracle["pair_last_hidden_cls"], atol=2e-5)


def test_minilm_against_the_whole_reference(minilm, encoder, shared):
    whole = dict(np.load(shared / "oracles" / "all-minilm-l6-v2" / "minilm.npz"))
    apply, params = jf.functional(encoder)
    batch = {name: whole[name] for name in ("input_ids", "attention_mask")}
    sites = ["layers.0.attention.probs", "layers.5.attention.probs"]
    out, seen = jax.jit(jf.reap(apply, sites))(params, batch)
    real = whole["attention_mask"].astype(bool)
    slice_ = whole["last_hidden_slice"]
    hidden = np.asarray(out.last_hidden_state)[:, : slice_.shape[1], : slice_.shape[2]]
    np.testing.assert_allclose(hidden[real[:, :24]], slice_[real[:, :24]], atol=2e-5)
    for site, head, name in ((sites[0], 0, "attention_layer0_head0"), (sites[1], 5, "attention_last_head5")):
        np.testing.assert_allclose(np.asarray(seen[site])[:, head][real], whole[name][real], atol=2e-5)


# --------------------------------------------------------------------------------------------- small models of any kind


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([" ".join(WORDS)] * 3, 200, max_length=40)


@pytest.fixture(scope="module")
def model():
    config = bert.Config(
        vocab_size=200, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=48,
    )  # fmt: skip
    return jf.init(config, key=jax.random.key(0))


def sentences(n, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(n)]


def states(model, tokenizer, texts, max_length=None):
    """The last hidden states of each text's real tokens, all texts padded to 48."""
    apply, params = jf.functional(model)
    batch = tokenizer(texts, max_length=max_length, buckets=(48,))
    if not isinstance(model, bert.Bert):
        del batch["token_type_ids"]
    hidden = np.asarray(jax.jit(apply)(params, batch).last_hidden_state)
    return [h[m == 1] for h, m in zip(hidden, batch["attention_mask"], strict=True)]


def test_order_duplicates_and_padding_change_nothing(model, tokenizer):
    texts = sentences(30) + ["", "the fox", ""] + sentences(5)
    found = jf.embed(model, texts, tokenizer=tokenizer, batch_size=7)
    assert found.shape == (38, 16)
    for z, h in zip(found, states(model, tokenizer, texts), strict=True):
        np.testing.assert_allclose(z, h.mean(0), atol=2e-6)
    np.testing.assert_array_equal(found[30], found[32])
    np.testing.assert_array_equal(found[33:], found[:5])
    np.testing.assert_allclose(jf.embed(model, texts, tokenizer=tokenizer, batch_size=128), found, atol=2e-6)
    np.testing.assert_array_equal(jf.embed(model, texts[:1], tokenizer=tokenizer).shape, (1, 16))


def test_each_distinct_text_is_encoded_once(model, tokenizer, monkeypatch):
    rows = []
    forward = embedding._forward
    count = lambda graph, params, batch, **more: (
        rows.append(len(batch["input_ids"])) or forward(graph, params, batch, **more)
    )
    monkeypatch.setattr(embedding, "_forward", count)
    jf.embed(model, ["the quick fox", "a dog"] * 500, tokenizer=tokenizer)
    assert rows == [8]


def test_many_texts_go_through_in_parts(model, tokenizer, monkeypatch):
    texts = sentences(50, longest=12)
    whole = jf.embed(model, texts, tokenizer=tokenizer)
    monkeypatch.setattr(embedding, "TEXTS_AT_A_TIME", 16)
    np.testing.assert_allclose(jf.embed(model, texts, tokenizer=tokenizer), whole, atol=2e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "last"])
def test_pooling_and_unit_length(model, tokenizer, pooling):
    texts = sentences(4, seed=3)
    found = jf.embed(model, texts, tokenizer=tokenizer, pooling=pooling)
    for z, h in zip(found, states(model, tokenizer, texts), strict=True):
        expected = {"cls": h[0], "mean": h.mean(0), "max": h.max(0), "last": h[-1]}[pooling]
        np.testing.assert_allclose(z, expected, atol=2e-6)
    unit = jf.embed(model, texts, tokenizer=tokenizer, pooling=pooling, normalize=True)
    np.testing.assert_allclose(unit, found / np.linalg.norm(found, axis=1, keepdims=True), atol=2e-6)


def test_the_checkpoint_decides(model, tokenizer, tmp_path):
    """Pooling, Dense, Normalize and the tokenizer's limit are read from the directory, and survive jf.save."""
    from jaxformers.nn import new_sentence_head

    changed = surgery.copy(model)
    changed.pooler = None
    new_sentence_head(changed, pooling="max", out=6, act="tanh", normalize=True, rngs=nnx.Rngs(1))
    surgery.named(changed)
    texts = sentences(6, seed=4)
    found = jf.embed(changed, texts, tokenizer=tokenizer)
    raw = jf.embed(model, texts, tokenizer=tokenizer, pooling="max")
    dense = changed.head.dense
    expected = np.tanh(raw @ np.asarray(dense.kernel.get_value()) + np.asarray(dense.bias.get_value()))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    jf.save(changed, tmp_path / "m", tokenizer=tokenizer)
    np.testing.assert_allclose(jf.embed(jf.load(tmp_path / "m"), texts), found, atol=1e-6)


def test_texts_are_cut(model, tokenizer):
    text = " ".join(WORDS * 10)
    found = jf.embed(model, [text], tokenizer=tokenizer)[0]  # to the tokenizer's 40
    np.testing.assert_allclose(found, states(model, tokenizer, [text], 40)[0].mean(0), atol=2e-6)
    found = jf.embed(model, [text, "the fox"], tokenizer=tokenizer, max_length=9)[0]
    np.testing.assert_allclose(found, states(model, tokenizer, [text], 9)[0].mean(0), atol=2e-6)
    found = jf.embed(model, [text], tokenizer=tokenizer, max_length=1000)[0]  # to the model's 48 positions
    np.testing.assert_allclose(found, states(model, tokenizer, [text], 48)[0].mean(0), atol=2e-6)


def test_decoders():
    tokenizer = train_bpe([" ".join(WORDS)] * 3, 300)
    config = llama.Config(
        vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64,
    )  # fmt: skip
    model = jf.init(config, head="causal_lm", key=jax.random.key(1))
    texts = ["the fox", " ".join(WORDS), "", "seven wizards brew"]
    found = jf.embed(model, texts, tokenizer=tokenizer)
    last = jf.embed(model, texts, tokenizer=tokenizer, pooling="last")
    expected = states(model, tokenizer, texts)
    for i in (0, 1, 3):
        np.testing.assert_allclose(found[i], expected[i].mean(0), atol=2e-6)
        np.testing.assert_allclose(last[i], expected[i][-1], atol=2e-6)
    assert model.head_name == "causal_lm"
    assert not found[2].any()  # no token at all


def test_bfloat16(model, tokenizer):
    texts = sentences(5)
    found = jf.embed(model, texts, tokenizer=tokenizer, dtype="bfloat16")
    exact = jf.embed(model, texts, tokenizer=tokenizer)
    assert found.dtype == np.float32
    assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()
    assert model.embeddings.token.embedding.get_value().dtype == jnp.float32


def test_few_programs_are_compiled(model, tokenizer):
    embedding._forward.clear_cache()
    jf.embed(model, sentences(300, seed=5), tokenizer=tokenizer, batch_size=16)
    assert embedding._forward._cache_size() <= 6 + 2  # buckets 8, 12, 16, 24, 32, 40; batches of fewer rows
    before = embedding._forward._cache_size()
    jf.embed(model, sentences(300, seed=6), tokenizer=tokenizer, batch_size=16)
    other = surgery.copy(model)
    nnx.update(other, jax.tree.map(lambda a: a + 0.1, nnx.state(other)))
    other.source = "elsewhere"
    jf.embed(other, sentences(300, seed=5), tokenizer=tokenizer, batch_size=16)
    assert embedding._forward._cache_size() <= before + 1


def test_many_batches_are_padded_to_finer_lengths(model, tokenizer, monkeypatch):
    texts = sentences(300, seed=5)
    widths = lambda: {b["input_ids"].shape[1] for _, b in embedding._batches(texts, False, tokenizer, 40, 16, 1)}
    coarse, plain = widths(), jf.embed(model, texts, tokenizer=tokenizer, batch_size=16)
    monkeypatch.setattr(embedding, "FINELY", 300 // 16)
    assert coarse <= {8, 12, 16, 24, 32, 40} and widths() & {10, 14, 20, 28}
    np.testing.assert_allclose(jf.embed(model, texts, tokenizer=tokenizer, batch_size=16), plain, atol=1e-6)


def test_long_and_short_texts_do_not_share_a_batch(model, tokenizer):
    shapes = [
        batch["input_ids"].shape
        for _, batch in embedding._batches(
            sentences(9, longest=3) + [" ".join(WORDS * 3)], False, tokenizer, 40, 128, 1
        )
    ]
    assert shapes == [(8, 40), (16, 8)]


def test_classifiers_and_pairs(tokenizer):
    config = bert.Config(
        vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=48, num_labels=3,
    )  # fmt: skip
    model = jf.init(config, head="sequence_classification", key=jax.random.key(2))
    left, right = sentences(9, seed=7, longest=8), sentences(9, seed=8, longest=8)
    found = embedding.forward_texts(model, left, "logits", pairs=right, tokenizer=tokenizer, batch_size=4)
    apply, params = jf.functional(model)
    expected = jax.jit(apply)(params, tokenizer(left, right)).logits
    np.testing.assert_allclose(found, expected, atol=2e-6)
    with pytest.raises(ValueError, match="pairs"):
        embedding.forward_texts(model, left, "logits", pairs=right[:3], tokenizer=tokenizer)
    plain = jf.init(config, head="token_classification", key=jax.random.key(2))
    with pytest.raises(ValueError, match="logits"):
        embedding.forward_texts(plain, left, "logits", tokenizer=tokenizer)


def test_on_a_mesh(model, tokenizer):
    """Weights on eight devices, batches cut over four: the same numbers."""
    mesh = jf.mesh("data=4,tensor=2")
    from jaxformers.mesh import shardings

    apply, params = jf.functional(model)
    spread = jf.with_params(model, jax.device_put(params, shardings(mesh, params)))
    texts = sentences(21, seed=9)
    expected = jf.embed(model, texts, tokenizer=tokenizer)
    np.testing.assert_allclose(jf.embed(spread, texts, tokenizer=tokenizer, batch_size=10), expected, atol=3e-6)


def test_nothing_and_errors(model, tokenizer):
    assert jf.embed(model, [], tokenizer=tokenizer).shape == (0, 16)
    cases = [
        (dict(texts="the fox"), r"texts: .*\[text\]"),
        (dict(texts=["a", None]), "texts: item 1 is None"),
        (dict(texts=["a", float("nan")]), "texts: item 1 is nan, a float"),
        (dict(texts=[b"a"]), "texts: item 0"),
        (dict(texts=["\ud800"]), "texts: item 0"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(batch_size=2.5), "batch_size=2.5"),
        (dict(max_length=0), "max_length=0"),
        (dict(max_length=2), "max_length=2"),  # [CLS] and [SEP] leave no room
        (dict(pooling="median"), "pooling='median'"),
        (dict(tokenizer=None), "tokenizer"),
    ]
    for changed, message in cases:
        arguments = dict(texts=["the fox"], tokenizer=tokenizer) | changed
        with pytest.raises(ValueError, match=message):
            jf.embed(model, **arguments)
    broken = surgery.copy(model)
    norm = broken.layers[1].mlp_norm
    norm.scale.set_value(norm.scale.get_value().at[0].set(jnp.nan))
    with pytest.raises(ValueError, match=r"texts\[0\] is not finite"):
        jf.embed(broken, ["the fox"], tokenizer=tokenizer)
