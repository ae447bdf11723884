"""Generation: greedy ids against Hugging Face's, sampling against NumPy, batches, end tokens, compilations, errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxformers as jf
from jaxformers import decoding, generation, prompts, surgery
from jaxformers.data.tokenizers import train_bpe
from jaxformers.models import bert, gpt2, llama

TEXTS = ["the quick brown fox jumps over the lazy dog", "a function that returns the name of a module", "Grüße, 日本"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS * 3, 300)


@pytest.fixture(scope="module")
def model():
    """A tiny decoder whose scores are far apart, so that its texts vary."""
    config = gpt2.Config(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=96
    )
    model = jf.init(config, head="causal_lm", key=jax.random.key(0))
    nnx.update(model, jax.tree.map(lambda a: 8 * a if a.ndim > 1 else a, nnx.state(model)))
    return model


@pytest.mark.parametrize("case", ["gqa_tied_llama3rope", "gqa_untied", "mha_leftpad"])
def test_greedy_ids_of_llama(oracles, case):
    path = oracles / "backbones" / "llama" / case
    oracle = np.load(path / "oracle.npz")
    prompt, expected = oracle["greedy_prompt"], oracle["greedy_ids"]
    found = jf.generate(jf.load(path), prompt, max_new_tokens=12, eos_token_id=())
    assert found == expected[:, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("case", ["gpt2", "opt"])
def test_greedy_ids_of_learned_positions(oracles, case):
    path = oracles / "backbones" / case
    oracle = np.load(path / "oracle.npz")
    ids = oracle["greedy_ids"]
    model = jf.load(path)
    assert jf.generate(model, ids[:, :4], max_new_tokens=8, eos_token_id=()) == ids[:, 4:].tolist()
    # prompts of unequal lengths: the last row goes on from three tokens more
    prompts = [ids[0, :4].tolist(), ids[1, :4].tolist(), ids[2, :7].tolist()]
    expected = [ids[0, 4:9].tolist(), ids[1, 4:9].tolist(), ids[2, 7:12].tolist()]
    assert jf.generate(model, prompts, max_new_tokens=5, eos_token_id=()) == expected


def test_a_prompt_gives_the_same_alone_and_in_any_batch(model):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 300, n).tolist() for n in (1, 24, 2, 17)]
    together = jf.generate(model, prompts, max_new_tokens=9, eos_token_id=())
    assert len({tuple(row) for row in together}) > 1
    for prompt, found in zip(prompts, together, strict=True):
        assert jf.generate(model, prompt, max_new_tokens=9, eos_token_id=()) == found
    assert jf.generate(model, prompts, max_new_tokens=9, eos_token_id=(), batch_size=2) == together
    # drawn tokens depend on the row's number, not on what it is batched with
    draw = dict(max_new_tokens=9, eos_token_id=(), temperature=1.0, key=jax.random.key(3))
    together = jf.generate(model, prompts, **draw)
    assert jf.generate(model, prompts[:1], **draw) == together[:1]
    assert jf.generate(model, prompts, batch_size=2, **draw) == together


def test_without_a_cache_the_ids_are_the_same(model):
    apply, params = jf.functional(model)
    apply = jax.jit(apply)
    ids = [7, 200, 31]
    padded = np.zeros((1, 32), np.int32)
    for _ in range(20):
        padded[0, : len(ids)] = ids
        ids.append(int(apply(params, {"input_ids": padded}).logits[0, len(ids) - 1].argmax()))
    assert jf.generate(model, [7, 200, 31], max_new_tokens=20, eos_token_id=()) == ids[3:]


def test_forms_of_prompts(model, tokenizer):
    text = "the quick brown"
    ids = tokenizer.encode(text)
    new = jf.generate(model, ids, max_new_tokens=6, eos_token_id=())
    assert len(new) == 6 and all(isinstance(i, int) for i in new)
    assert jf.generate(model, [ids, ids], max_new_tokens=6, eos_token_id=()) == [new, new]
    assert jf.generate(model, np.asarray(ids), max_new_tokens=6, eos_token_id=()) == new
    assert jf.generate(model, jnp.asarray([ids]), max_new_tokens=6, eos_token_id=()) == [new]
    one = jf.generate(model, text, max_new_tokens=6, tokenizer=tokenizer, eos_token_id=())
    assert text + one == tokenizer.decode(ids + new)
    assert jf.generate(model, [text], max_new_tokens=6, tokenizer=tokenizer, eos_token_id=()) == [one]
    assert jf.generate(model, [], max_new_tokens=6) == []


def test_rows_stop_at_their_end_token(model, tokenizer, tmp_path):
    prompts = [[5], [6, 7], [8, 9, 10]]
    free = jf.generate(model, prompts, max_new_tokens=12, eos_token_id=())
    end = free[0][4]
    expected = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert jf.generate(model, prompts, max_new_tokens=12, eos_token_id=end) == expected
    assert len(expected[0]) <= 5
    assert jf.generate(model, prompts, max_new_tokens=12, eos_token_id=[299, end]) == expected
    # by the checkpoint's files: generation_config.json wins over config.json, which wins over the tokenizer
    jf.save(model, tmp_path / "a", tokenizer=tokenizer)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"eos_token_id": end}))
    assert jf.generate(jf.load(tmp_path / "a"), prompts, max_new_tokens=12) == expected
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[1][0]]}))
    assert jf.generate(jf.load(tmp_path / "a"), prompts, max_new_tokens=12)[1] == free[1][:1]
    loaded = jf.generate(jf.load(tmp_path / "a"), "the quick", max_new_tokens=4, eos_token_id=())
    assert loaded == jf.generate(model, "the quick", max_new_tokens=4, tokenizer=tokenizer, eos_token_id=())


def test_end_token_of_the_tokenizer(model, tokenizer):
    ids = tokenizer.encode("the quick")
    new = jf.generate(model, ids, max_new_tokens=12, eos_token_id=())
    other = train_bpe(TEXTS * 3, 300)
    other.eos_id = new[3]
    found = jf.generate(model, "the quick", max_new_tokens=12, tokenizer=other)
    assert found == jf.generate(model, "the quick", max_new_tokens=new.index(new[3]) + 1, tokenizer=other)


def numpy_restrict(logits, top_k, top_p):
    """Sorted by falling logit, the first k, then the shortest beginning that reaches p: one row at a time."""
    out = np.full(logits.shape, -np.inf)
    for row, x in enumerate(logits):
        order = np.argsort(-x, kind="stable")[:top_k]
        p = np.exp(x[order] - x[order].max())
        p /= p.sum()
        n = next((i + 1 for i in range(len(p)) if p[: i + 1].sum() >= top_p - 1e-7), len(p))
        out[row, order[:n]] = x[order[:n]]
    return out


@pytest.mark.parametrize("top_k", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_restriction_against_numpy(top_k, top_p):
    logits = (3 * np.random.default_rng(1).standard_normal((5, 50))).astype(np.float32)
    found = np.asarray(decoding.restrict(logits, np.int32(top_k), np.float32(top_p)))
    np.testing.assert_array_equal(found, numpy_restrict(logits, min(top_k, 50), top_p))


def test_restriction_keeps_ties_and_at_least_one():
    logits = np.array([[2.0, 2.0, 2.0, 1.0], [0.0, -np.inf, -np.inf, -np.inf]], np.float32)
    found = np.asarray(decoding.restrict(logits, np.int32(2), np.float32(1)))
    np.testing.assert_array_equal(found, [[2, 2, 2, -np.inf], [0, -np.inf, -np.inf, -np.inf]])
    found = np.asarray(decoding.restrict(logits, np.int32(4), np.float32(1e-6)))
    assert np.isfinite(found).any(axis=1).all()


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, None, None), (0.5, None, None), (2.0, 5, None), (1.0, None, 0.8), (1.5, 8, 0.7)]
)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    n, vocab = 20000, 12
    logits = (2 * np.random.default_rng(2).standard_normal(vocab)).astype(np.float32)
    sampler = generation._sampler(vocab, temperature, top_k, top_p, key=jax.random.key(4))
    sampler = sampler._replace(key=jax.random.split(sampler.key, n))
    drawn = np.asarray(jax.jit(decoding.next_token)(np.broadcast_to(logits, (n, vocab)), sampler))
    kept = numpy_restrict(logits[None] / np.float32(temperature), top_k or vocab, top_p or 1.0)[0]
    p = np.exp(kept - kept.max())
    p /= p.sum()
    counts = np.bincount(drawn, minlength=vocab)
    assert counts[p == 0].sum() == 0
    expected = n * p[p > 0]
    chi2 = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert chi2 < 40  # at most 11 degrees of freedom: exceeded by chance once in 20,000 keys


def test_sampling_follows_the_models_first_step(model):
    """Through the whole of generate: the first token's frequencies over many rows against softmax of the logits."""
    apply, params = jf.functional(model)
    logits = np.asarray(apply(params, {"input_ids": np.array([[3, 1, 4]])}).logits[0, -1])
    n = 2000
    rows = jf.generate(model, [[3, 1, 4]] * n, max_new_tokens=1, temperature=0.7, top_k=5, key=jax.random.key(1))
    counts = np.bincount([row[0] for row in rows], minlength=300)
    kept = numpy_restrict(logits[None] / np.float32(0.7), 5, 1.0)[0]
    p = np.exp(kept - kept.max())
    p /= p.sum()
    assert counts[p == 0].sum() == 0
    np.testing.assert_allclose(counts / n, p, atol=4.5 * np.sqrt(0.25 / n))


def test_keys_decide(model):
    draw = lambda seed, **more: jf.generate(
        model, [[1, 2], [1, 2]], max_new_tokens=16, temperature=1.5, key=jax.random.key(seed), eos_token_id=(), **more
    )
    first = draw(0)
    assert first == draw(0) and first != draw(1) and first[0] != first[1]
    old_style = jf.generate(
        model, [[1, 2], [1, 2]], max_new_tokens=16, temperature=1.5, key=jax.random.PRNGKey(0), eos_token_id=()
    )
    assert old_style == first
    plain = dict(max_new_tokens=16, eos_token_id=())
    greedy = jf.generate(model, [1, 2], **plain)
    assert draw(0, top_k=1)[0] == greedy and draw(5, top_p=1e-6)[0] == greedy
    assert (
        jf.generate(model, [1, 2], max_new_tokens=16, temperature=0.0, key=jax.random.key(9), eos_token_id=()) == greedy
    )


def fresh_counts():
    """A function that says how many programs there are from now on: for the first token, and for more."""
    for program in (decoding.start, decoding.go_on):
        program.clear_cache()
    return lambda: (decoding.start._cache_size(), decoding.go_on._cache_size())


def test_settings_compile_nothing(model):
    """One pair of programs per bucket; settings, end tokens, lengths within a bucket and weights are arguments."""
    compiled = fresh_counts()
    jf.generate(model, [1, 2, 3], max_new_tokens=8)
    assert compiled() == (1, 1)
    jf.generate(model, [1, 2, 3], max_new_tokens=8, eos_token_id=5)
    for temperature in (0.0, 0.3, 1, 2.5):
        for top_k in (None, 1, 40, 10**6):
            key = jax.random.key(top_k or 0)
            jf.generate(
                model, [4] * 11, max_new_tokens=8, temperature=temperature, top_k=top_k, top_p=0.9, key=key,
                min_p=0.01 if top_k else None, repetition_penalty=1 + temperature, stop_sequences=[[1, 2]] * 3,
            )  # fmt: skip
    jf.generate(model, [1], max_new_tokens=16, temperature=1.0, top_p=0.5, key=jax.random.key(1), eos_token_id=[1, 2])
    other = surgery.copy(model)
    nnx.update(other, jax.tree.map(lambda a: a * 1.1, nnx.state(other)))
    jf.generate(other, [1, 2, 3], max_new_tokens=3)
    assert compiled() == (1, 1)
    jf.generate(model, [1] * 17, max_new_tokens=8)  # a longer prompt, more rows and more tokens: each its own bucket
    assert compiled() == (2, 2)
    jf.generate(model, [[1] * 3, [2] * 20, [3]], max_new_tokens=24)
    assert compiled() == (3, 3)
    jf.generate(model, [[1] * 18, [2] * 24, [3] * 5], max_new_tokens=17)
    assert compiled() == (3, 3)


def test_to_the_last_position(model):
    """96 positions: every split of them between prompt and new tokens works, whatever the buckets."""
    apply, params = jf.functional(model)
    apply = jax.jit(apply)
    for length in (95, 80, 1):
        prompt = np.random.default_rng(length).integers(0, 300, length).tolist()
        new = jf.generate(model, [prompt, [1]], max_new_tokens=96 - length, eos_token_id=())[0]
        whole = np.asarray([prompt + new])
        best = np.asarray(apply(params, {"input_ids": whole}).logits[0]).argmax(-1)
        assert best[length - 1 : -1].tolist() == new
    with pytest.raises(ValueError, match="96 positions"):
        jf.generate(model, [1] * 80, max_new_tokens=17)


def numpy_greedy(model, prompt, new, penalty):
    """Greedy with a repetition penalty, by full passes and in numpy."""
    apply, params = jf.functional(model)
    apply, ids, padded = jax.jit(apply), list(prompt), np.zeros((1, 32), np.int32)
    for _ in range(new):
        padded[0, : len(ids)] = ids
        logits = np.array(apply(params, {"input_ids": padded}).logits[0, len(ids) - 1])
        seen = sorted(set(ids))
        logits[seen] = np.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def test_repetition_penalty(model):
    prompts = [[7, 200, 31], [5] * 9]
    plain = jf.generate(model, prompts, max_new_tokens=12, eos_token_id=())
    for penalty in (0.5, 1.5, 100.0):
        found = jf.generate(model, prompts, max_new_tokens=12, eos_token_id=(), repetition_penalty=penalty)
        assert found == [numpy_greedy(model, prompt, 12, penalty) for prompt in prompts]
        assert found != plain
    assert all(len(set(row)) == 12 and not set(row) & set(p) for row, p in zip(found, prompts, strict=True))
    assert jf.generate(model, prompts, max_new_tokens=12, eos_token_id=(), repetition_penalty=1.0) == plain


def test_min_p_against_numpy(model):
    logits = (3 * np.random.default_rng(5).standard_normal((4, 50))).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for min_p in (0.0, 0.05, 0.5, 1.0):
        found = np.asarray(decoding.likely(logits, np.float32(min_p)))
        np.testing.assert_array_equal(found, np.where(p >= min_p * p.max(-1, keepdims=True), logits, -np.inf))
    draw = dict(max_new_tokens=9, eos_token_id=(), temperature=1.0, key=jax.random.key(3))
    assert jf.generate(model, [1, 2], min_p=1.0, **draw) == jf.generate(
        model, [1, 2], max_new_tokens=9, eos_token_id=()
    )
    assert jf.generate(model, [1, 2], min_p=0.0, **draw) == jf.generate(model, [1, 2], **draw)


def cut_at(row, stops):
    n = next((i for i in range(1, len(row) + 1) if any(row[:i][-len(s) :] == s for s in stops)), len(row))
    return row[:n]


def test_stop_sequences_of_tokens(model):
    prompts = [[5], [6, 7], [8, 9, 10]]
    free = jf.generate(model, prompts, max_new_tokens=12, eos_token_id=())
    stops = [free[0][3:5], free[1][6:9], [299] * 9]
    expected = [cut_at(row, stops) for row in free]
    assert len(expected[0]) == 5 and len(expected[1]) == 9
    assert jf.generate(model, prompts, max_new_tokens=12, eos_token_id=(), stop_sequences=stops) == expected
    # the prompt's own tokens complete nothing
    begun = [[prompts[0][-1], free[0][0]]]
    assert jf.generate(model, prompts[0], max_new_tokens=3, eos_token_id=(), stop_sequences=begun) == free[0][:3]
    ends = dict(max_new_tokens=12, eos_token_id=free[2][1])
    assert jf.generate(model, prompts, **ends, stop_sequences=stops)[2] == free[2][:2]


def test_stop_sequences_of_text(model, tokenizer):
    texts = ["the quick brown", "a function"]
    settings = dict(max_new_tokens=12, tokenizer=tokenizer, eos_token_id=())
    free = jf.generate(model, texts, **settings)
    stop = free[0][4:6]
    found = jf.generate(model, texts, stop_sequences=[stop, "nowhere"], **settings)
    assert found == [text[: text.index(stop)] if stop in text else text for text in free]
    ids = [tokenizer.encode(text) for text in texts]
    free_ids = jf.generate(model, ids, **settings)
    stopped = jf.generate(model, ids, stop_sequences=stop, **settings)
    assert stopped[0] == free_ids[0][: len(stopped[0])] and len(stopped[0]) < 12
    assert stop in tokenizer.decode(stopped[0]) and stop not in tokenizer.decode(stopped[0][:-1])
    of_tokens = jf.generate(model, texts, stop_sequences=[free_ids[0][2:4]], **settings)[0]
    assert of_tokens == free[0][: len(tokenizer.decode(free_ids[0][:2]))]


def test_stream_hands_out_each_step_in_order(model):
    prompts = [[5], [6, 7], [8, 9, 10]]
    end = jf.generate(model, prompts, max_new_tokens=12, eos_token_id=())[0][4]
    settings = dict(max_new_tokens=12, eos_token_id=end)
    expected = jf.generate(model, prompts, **settings)
    compiled = fresh_counts()
    calls = []
    found = jf.generate(model, prompts, **settings, stream=lambda step, tokens: calls.append((step, tokens)))
    assert found == expected
    assert [step for step, _ in calls] == list(range(max(map(len, expected))))
    rows = [[tokens[i] for _, tokens in calls if i in tokens] for i in range(3)]
    assert rows == expected
    assert compiled() == (1, 1)  # and without a stream the same two
    assert jf.generate(model, prompts, **settings) == expected and compiled() == (1, 1)
    calls.clear()
    jf.generate(model, prompts, **settings, batch_size=1, stream=lambda step, tokens: calls.append((step, tokens)))
    assert [[tokens[i] for _, tokens in calls if i in tokens] for i in range(3)] == expected
    assert next(iter(calls[0][1])) == 2  # the longest first
    drawn = dict(max_new_tokens=6, temperature=1.0, key=jax.random.key(0), eos_token_id=())
    assert jf.generate(model, prompts, **drawn, stream=lambda *_: None) == jf.generate(model, prompts, **drawn)


def test_packed_weights(model):
    """Generation runs from packed 4-bit weights and agrees with their dense values."""
    from jaxformers.weights.packed import pack_codes

    rng = np.random.default_rng(0)

    def pack(kernel):
        d_in, d_out = kernel.shape
        codes = rng.integers(0, 16, (d_in, d_out), np.uint8)
        zeros, scales = np.full((1, d_out), 8, np.uint8), np.full((1, d_out), 0.05, np.float32)
        return pack_codes(codes, zeros, scales, np.zeros(d_in, np.int32), bits=4)

    packed, plain = surgery.copy(model), surgery.copy(model)
    for path, linear in surgery.find_linears(packed, "layers.**"):
        weight = pack(linear.kernel.get_value())
        linear.kernel.set_value(weight)
        dict(surgery.find_linears(plain, path))[path].kernel.set_value(weight.dense())
    prompts = [[1, 2, 3], [250] * 9]
    found = jf.generate(packed, prompts, max_new_tokens=10, eos_token_id=())
    assert found == jf.generate(plain, prompts, max_new_tokens=10, eos_token_id=())


def test_bfloat16(model):
    half = surgery.copy(model)
    nnx.update(half, jax.tree.map(lambda a: a.astype(jnp.bfloat16), nnx.state(half)))
    assert len(jf.generate(half, [1, 2, 3], max_new_tokens=5, eos_token_id=())) == 5


def test_text_that_goes_on_from_its_prompt():
    class Words:  # decodes as SentencePiece does: the first word loses its space
        eos_id = None

        def encode(self, text):
            return [int(word) for word in text.split()]

        def decode(self, ids):
            return " ".join(str(i) for i in ids)

    assert prompts.continuation(Words(), [3, 4], [5, 6]) == " 5 6"
    assert prompts.continuation(Words(), [3, 4], []) == ""


def test_errors(model, tokenizer):
    good = dict(max_new_tokens=4, tokenizer=tokenizer)
    key = jax.random.key(0)
    cases = [
        (dict(prompts=""), "prompts: item 0 is empty"),
        (dict(prompts=["a", ""]), "prompts: item 1 is empty"),
        (dict(prompts=[[1], []]), "prompts: item 1 is empty"),
        (dict(prompts=[300]), "0 to 299"),
        (dict(prompts=[-1]), "0 to 299"),
        (dict(prompts=[[1.5]]), "token ids"),
        (dict(prompts=[[[1]]]), "token ids"),
        (dict(prompts=[[1], 2]), "token ids"),
        (dict(prompts=["a", [1]]), "not both"),
        (dict(prompts=b"abc"), "prompts"),
        (dict(prompts=7), "prompts"),
        (dict(prompts=[1] * 93), "96 positions"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(max_new_tokens=2.0), "max_new_tokens=2.0"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(temperature=1.0), "key"),
        (dict(key=key), "temperature"),
        (dict(top_k=3), "temperature"),
        (dict(temperature=-0.1, key=key), "temperature=-0.1"),
        (dict(temperature=float("nan"), key=key), "temperature=nan"),
        (dict(temperature=1.0, key=key, top_k=0), "top_k=0"),
        (dict(temperature=1.0, key=key, top_k=2.5), "top_k=2.5"),
        (dict(temperature=1.0, key=key, top_p=0.0), "top_p=0.0"),
        (dict(temperature=1.0, key=key, top_p=1.01), "top_p=1.01"),
        (dict(temperature=1.0, key=key, min_p=1.5), "min_p=1.5"),
        (dict(min_p=0.5), "temperature"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0"),
        (dict(stop_sequences=[1, 2]), "stop_sequences: item 0 is 1"),
        (dict(stop_sequences=[[]]), "stop_sequences: item 0"),
        (dict(stop_sequences=["", "a"]), "stop_sequences: item 0"),
        (dict(stop_sequences=[[5], [300]]), "stop_sequences: item 1 has ids"),
        (dict(stop_sequences="a", tokenizer=None), "tokenizer"),
        (dict(pixel_values=np.zeros((1, 3, 4, 4))), "reads no images"),
        (dict(eos_token_id=-2), "eos_token_id=-2"),
        (dict(prompts="a", tokenizer=None), "tokenizer"),
    ]
    for changed, message in cases:
        arguments = {"prompts": [1, 2]} | good | changed
        with pytest.raises(ValueError, match=message):
            jf.generate(model, **arguments)


def test_models_without_a_next_token():
    encoder = bert.Config(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    body = llama.Config(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    for config, head in ((encoder, "masked_lm"), (body, None)):
        with pytest.raises(ValueError, match="causal_lm"):
            jf.generate(jf.init(config, head=head, key=jax.random.key(0)), [1], max_new_tokens=2)
