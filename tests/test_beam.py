"""Beam search: against all hypotheses there are, Hugging Face's beams of T5, batches, endings, compilations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxformers as jf
from jaxformers import beam, decoding
from jaxformers.models import gpt2, t5
from jaxformers.nn import cache as caches

VOCAB = 6


@pytest.fixture(scope="module")
def model():
    """A tiny decoder whose scores are far apart."""
    config = gpt2.Config(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32
    )
    model = jf.init(config, head="causal_lm", key=jax.random.key(1))
    nnx.update(model, jax.tree.map(lambda a: 12 * a if a.ndim > 1 else a, nnx.state(model)))
    return model


def every_hypothesis(model, prompt, new, end, stop=None):
    """{ids: Σ log p} of all texts that end with ``end`` or ``stop`` or after ``new`` tokens, one full pass each."""
    apply, params = jf.functional(model)
    texts = np.array(list(itertools.product(range(VOCAB), repeat=new)))
    whole = np.concatenate([np.broadcast_to(prompt, (len(texts), len(prompt))), texts], axis=1)
    log_p = jax.nn.log_softmax(jax.jit(apply)(params, {"input_ids": whole}).logits[:, len(prompt) - 1 : -1], -1)
    log_p = np.take_along_axis(np.asarray(log_p), texts[:, :, None], axis=2)[..., 0]
    found = {}
    for ids, scores in zip(texts.tolist(), log_p, strict=True):
        n = next((i + 1 for i in range(new) if ids[i] == end or (stop and ids[: i + 1][-len(stop) :] == stop)), new)
        found[tuple(ids[:n])] = float(scores[:n].sum())
    return found


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0, -1.0])
@pytest.mark.parametrize("stop", [None, [2, 4]])
def test_with_a_beam_for_everything_the_best_text_is_found(model, length_penalty, stop):
    prompt, new, end = [1, 3, 0], 3, 5
    score = lambda ids, total: total / len(ids) ** length_penalty
    expected = {ids: score(ids, total) for ids, total in every_hypothesis(model, prompt, new, end, stop).items()}
    ranked = sorted(expected, key=expected.get, reverse=True)[:4]
    found, scores = jf.generate(
        model, prompt, max_new_tokens=new, num_beams=VOCAB**2, length_penalty=length_penalty, early_stopping="never",
        eos_token_id=end, num_return_sequences=4, return_scores=True, stop_sequences=[] if stop is None else [stop],
    )  # fmt: skip
    assert [tuple(ids) for ids in found] == ranked
    np.testing.assert_allclose(scores, [expected[ids] for ids in ranked], atol=1e-5)


@pytest.mark.parametrize("version", ["t5-v1_0", "t5-v1_1"])
def test_beams_of_t5(version, oracles):
    folder = oracles / "backbones" / version
    oracle, model = np.load(folder / "io.npz"), jf.load(folder)
    prompts = [row[real == 1].tolist() for row, real in zip(oracle["input_ids"], oracle["attention_mask"], strict=True)]
    found, scores = jf.generate(model, prompts, max_new_tokens=8, num_beams=3, return_scores=True)
    np.testing.assert_allclose(scores, oracle["generate_beam3_scores"], atol=1e-5)
    for ids, row in zip(found, oracle["generate_beam3"][:, 1:].tolist(), strict=True):
        assert ids == row[: len(ids)] and (len(ids) == 8 or ids[-1] == 1)
    greedy = jf.generate(model, prompts, max_new_tokens=8)
    for ids, row in zip(greedy, oracle["generate_greedy"][:, 1:].tolist(), strict=True):
        assert ids == row[: len(ids)] and (len(ids) == 8 or ids[-1] == 1)
    free = jf.generate(model, prompts, max_new_tokens=8, eos_token_id=())
    for ids, row in zip(free, oracle["greedy_ids_nostop"][:, 1:].tolist(), strict=True):
        assert [i for i, expected in zip(ids, row, strict=True) if expected != 0] == [i for i in row if i != 0]


@pytest.mark.parametrize("folder", ["llama/gqa_untied", "opt", "gptj", "deepseek_v3/moe_mla", "deepseek_v3/dense_mla"])
def test_scores_are_those_of_full_passes(folder, oracles):
    """Through prefill, steps and caches that are handed from beam to beam, keys and values or latents: at each step of
    each hypothesis as a pass over all of it without a cache."""
    model = jf.load(oracles / "backbones" / folder)
    apply, params = jf.functional(model)
    log_p = jax.jit(lambda params, ids: jax.nn.log_softmax(apply(params, {"input_ids": ids}).logits, -1))
    prompts, new = [[5, 6, 7, 8, 9, 10], [11, 12]], 7
    rows, scores = jf.generate(
        model, prompts, max_new_tokens=new, num_beams=3, num_return_sequences=3, return_scores=True, eos_token_id=()
    )
    for prompt, hypotheses, expected in zip(prompts, rows, scores, strict=True):
        whole = np.array([prompt + ids for ids in hypotheses])
        found = np.take_along_axis(log_p(params, whole)[:, len(prompt) - 1 : -1], whole[:, len(prompt) :, None], 2)
        np.testing.assert_allclose(found[..., 0].mean(1), expected, atol=2e-5)
        assert len({tuple(ids) for ids in hypotheses}) == 3 and expected == sorted(expected, reverse=True)


def test_a_prompt_has_the_same_beams_alone_and_in_any_batch(model):
    prompts = [[1], [2, 3, 4, 5, 0, 1, 2], [3, 3]]
    settings = dict(max_new_tokens=6, num_beams=3, num_return_sequences=3, return_scores=True, eos_token_id=[0, 3])
    together, scores = jf.generate(model, prompts, **settings)
    assert len({len(ids) for row in together for ids in row}) > 1
    for prompt, ids, score in zip(prompts, together, scores, strict=True):
        alone, own = jf.generate(model, prompt, **settings)
        assert alone == ids
        np.testing.assert_allclose(own, score, atol=1e-5)
    few = jf.generate(model, prompts, **settings, batch_size=3)[0]  # one prompt at a time
    assert few == together


def test_ends_at_the_first_step_and_when_all_beams_end(model):
    first = [row[0] for row in jf.generate(model, [[1], [2]], max_new_tokens=1, eos_token_id=())]
    rows = jf.generate(
        model, [[1], [2]], max_new_tokens=5, eos_token_id=list(range(VOCAB)), num_beams=4, num_return_sequences=4
    )
    assert [row[0] for row in rows] == [[token] for token in first]
    assert all(len(ids) == 1 for row in rows for ids in row)
    assert jf.generate(model, [[1], [2]], max_new_tokens=1, num_beams=3, eos_token_id=()) == [[t] for t in first]


def test_early_stopping_is_content_with_as_many_texts_as_beams(model):
    ends = dict(max_new_tokens=12, num_beams=2, eos_token_id=[0, 3], num_return_sequences=2)
    hasty = jf.generate(model, [2, 1], early_stopping=True, **ends)
    patient = jf.generate(model, [2, 1], early_stopping="never", length_penalty=4.0, **ends)
    assert max(map(len, hasty)) < max(map(len, patient))


def test_settings_compile_nothing(model):
    beam.search.clear_cache()
    run = lambda **more: jf.generate(model, [[1, 2], [3]], max_new_tokens=6, num_beams=3, **more)
    run()
    for penalty, early, repeat in itertools.product((0.5, 2.0), (True, False, "never"), (None, 1.5)):
        run(length_penalty=penalty, early_stopping=early, repetition_penalty=repeat, eos_token_id=[1, 2])
    run(stop_sequences=[[1, 2, 3], [4]])
    assert beam.search._cache_size() == 1
    run(num_return_sequences=2)
    assert beam.search._cache_size() == 1


def test_an_encoder_decoder_compiles_once_a_bucket(oracles):
    model = jf.load(oracles / "backbones" / "t5-v1_0")
    for program in (decoding.start, decoding.go_on):
        program.clear_cache()
    run = lambda *lengths, **more: jf.generate(model, [[5] * n for n in lengths], max_new_tokens=6, **more)
    run(3, 5)
    run(16, 1, temperature=0.7, top_k=5, min_p=0.1, key=jax.random.key(0), repetition_penalty=2.0)
    run(9, 4, decoder_prompt=[7], eos_token_id=[3, 4], stop_sequences=[[5, 6]])
    assert (decoding.start._cache_size(), decoding.go_on._cache_size()) == (1, 1)
    run(17, 1)  # a longer input
    assert (decoding.start._cache_size(), decoding.go_on._cache_size()) == (2, 2)


def test_caches_repeated_and_reordered():
    """Also where layers are stacked, and without touching what beams share."""
    own = jnp.arange(2 * 3 * 4.0).reshape(2, 1, 3, 4)
    pair = lambda a: caches.KeyValue(a, -a)
    layers = {"0": pair(own), "1": caches.WithMemory(pair(own), pair(own + 100))}
    cache = caches.new_cache(layers, 2, 3, jnp.array([[True, False], [True, True]]))
    more = caches.repeat(cache, 2)
    np.testing.assert_array_equal(more.layers["0"].key[:, 0, 0, 0], [0, 0, 12, 12])
    np.testing.assert_array_equal(more.layers["1"].memory.key[:, 0, 0, 0], [100, 100, 112, 112])
    assert more.valid.shape == (4, 3) and more.memory_valid.tolist() == [[True, False]] * 2 + [[True, True]] * 2
    turned = caches.reorder(more, jnp.array([1, 0, 3, 2]) + jnp.array([2, 2, -2, -2]))
    np.testing.assert_array_equal(turned.layers["1"].own.value[:, 0, 0, 0], [-12, -12, 0, 0])
    np.testing.assert_array_equal(turned.layers["1"].memory.key, more.layers["1"].memory.key)
    stacked = caches.new_cache({"*": pair(jnp.stack([own, 2 * own]))}, 2, 3)
    turned = caches.reorder(stacked, jnp.array([1, 0]))
    np.testing.assert_array_equal(turned.layers["*"].key[:, :, 0, 0, 0], [[12, 0], [24, 0]])


def test_decoder_prompts(oracles):
    model = jf.load(oracles / "backbones" / "t5-v1_1")
    free = jf.generate(model, [[5, 6], [7]], max_new_tokens=6, eos_token_id=())
    more = jf.generate(model, [[5, 6], [7]], max_new_tokens=4, eos_token_id=(), decoder_prompt=[0, *free[0][:2]])
    assert more[0] == free[0][2:]
    other = jf.generate(model, [[5, 6], [7]], max_new_tokens=6, eos_token_id=(), decoder_prompt=[9])
    assert other != free
    config = t5.Config(
        vocab_size=30, hidden_size=8, head_dim=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        decoder_start_token_id=7,
    )  # fmt: skip
    own = jf.init(config, head="seq2seq_lm", key=jax.random.key(0))
    settings = dict(max_new_tokens=3, eos_token_id=())
    assert jf.generate(own, [3, 4], **settings) == jf.generate(own, [3, 4], decoder_prompt=[7], **settings)


def test_errors(model, oracles):
    encoder_decoder = jf.load(oracles / "backbones" / "t5-v1_0")
    cases = [
        (dict(num_beams=0), "num_beams=0"),
        (dict(length_penalty=1.0), "give 2 beams or more"),
        (dict(early_stopping=True), "give 2 beams or more"),
        (dict(return_scores=True), "give 2 beams or more"),
        (dict(num_return_sequences=2), "num_return_sequences=2"),
        (dict(num_beams=2, num_return_sequences=3), "num_return_sequences=3"),
        (dict(num_beams=2, num_return_sequences=0), "num_return_sequences=0"),
        (dict(num_beams=2, temperature=1.0, key=jax.random.key(0)), "give no temperature"),
        (dict(num_beams=2, length_penalty=float("nan")), "length_penalty=nan"),
        (dict(num_beams=2, early_stopping="soon"), "early_stopping='soon'"),
        (dict(num_beams=2, early_stopping=1), "early_stopping=1"),
        (dict(num_beams=2, stream=print), "no stream"),
        (dict(decoder_prompt=[1]), "has no encoder"),
        (dict(prompts=None), "prompts: give texts or token ids"),
    ]
    for changed, message in cases:
        with pytest.raises(ValueError, match=message):
            jf.generate(model, **({"prompts": [1, 2], "max_new_tokens": 4} | changed))
    for changed, message in (
        (dict(decoder_prompt=[]), r"decoder_prompt=\[\]"),
        (dict(decoder_prompt=[100]), "decoder_prompt has ids from 100 to 100"),
        (dict(pixel_values=np.zeros((1, 3, 2, 2))), "reads no images"),
        (dict(prompts=None), "prompts: give texts or token ids"),
    ):
        with pytest.raises(ValueError, match=message):
            jf.generate(encoder_decoder, **({"prompts": [1, 2], "max_new_tokens": 4} | changed))
