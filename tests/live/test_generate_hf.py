"""Generation against Hugging Face's own: beams and their scores, penalties, filters, end tokens; padded batches."""

import itertools

import numpy as np
import pytest

import jaxformers as jf
from jaxformers import decoding

torch = pytest.importorskip("torch", reason="live comparison: pip install 'jaxformers[oracle]'")
transformers = pytest.importorskip("transformers", reason="live comparison: pip install 'jaxformers[oracle]'")

T5 = {"vocab_size": 24, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "pad_token_id": 0,
      "decoder_start_token_id": 0, "eos_token_id": 1}  # fmt: skip
GPT2 = {"vocab_size": 24, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "pad_token_id": 0,
        "bos_token_id": 2, "eos_token_id": 1}  # fmt: skip
NEW = 9
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16, 17]]


@pytest.fixture(scope="module", params=["t5", "gpt2"])
def pair(request, tmp_path_factory):
    """(Hugging Face's model, ours), random and with their scores far apart."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    classes = {"t5": (transformers.T5ForConditionalGeneration, T5), "gpt2": (transformers.GPT2LMHeadModel, GPT2)}
    cls, settings = classes[request.param]
    theirs = cls(cls.config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.8)
        table = theirs.get_input_embeddings().weight
        table[:] = 0.6 * torch.randn(table.shape)
    theirs.save_pretrained(folder)
    return theirs, jf.load(folder)


def theirs_generate(model, **settings):
    """(ids without the prompt and up to the end token, scores) as Hugging Face generates them, padded in one batch."""
    encoder = model.config.is_encoder_decoder
    width = max(map(len, PROMPTS))
    ids, mask = np.zeros((3, width), int), np.zeros((3, width), int)
    for row, prompt in enumerate(PROMPTS):
        where = slice(0, len(prompt)) if encoder else slice(width - len(prompt), width)
        ids[row, where], mask[row, where] = prompt, 1
    out = model.generate(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    new = out.sequences.numpy()[:, 1 if encoder else width :]
    ends = np.atleast_1d(settings.get("eos_token_id", 1)).tolist()
    rows = [row.tolist() for row in new]
    rows = [row[: next((i + 1 for i, t in enumerate(row) if t in ends), NEW)] for row in rows]
    scores = getattr(out, "sequences_scores", None)
    return rows, None if scores is None else scores.numpy()


def ends_of(theirs):
    """Tokens at which some beams end early and others do not."""
    return [18, 22] if theirs.config.is_encoder_decoder else [6, 19]


BEAMS = [*itertools.product((2, 5), (0.0, 1.0), (False, True, "never"))]
BEAMS += [(3, 2.5, False), (3, 2.5, "never"), (3, -1.0, False), (3, -1.0, "never"), (20, 1.0, False)]


@pytest.mark.parametrize("num_beams, length_penalty, early_stopping", BEAMS)
def test_beams(pair, num_beams, length_penalty, early_stopping):
    theirs, ours = pair
    settings = dict(num_beams=num_beams, length_penalty=length_penalty, early_stopping=early_stopping)
    settings["eos_token_id"] = ends_of(theirs)
    expected, expected_scores = theirs_generate(theirs, **settings, num_return_sequences=num_beams)
    found, scores = jf.generate(
        ours, PROMPTS, max_new_tokens=NEW, **settings, num_return_sequences=num_beams, return_scores=True
    )
    np.testing.assert_allclose(np.ravel(scores), expected_scores, atol=2e-5)
    assert [ids for row in found for ids in row] == expected


def test_the_ends_above_cut_some_texts_and_not_all(pair):
    theirs, _ = pair
    rows, _ = theirs_generate(theirs, num_beams=5, num_return_sequences=5, eos_token_id=ends_of(theirs))
    assert len({len(row) for row in rows}) > 2 and NEW in map(len, rows)


def test_best_beam_alone_and_several_end_tokens(pair):
    theirs, ours = pair
    for settings in (dict(num_beams=3), dict(num_beams=4, eos_token_id=[1, 7, 9]), dict(eos_token_id=[1, 7])):
        expected, _ = theirs_generate(theirs, **settings)
        assert jf.generate(ours, PROMPTS, max_new_tokens=NEW, **settings) == expected


@pytest.mark.parametrize("penalty", [0.6, 1.4, 5.0])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_repetition_penalty(pair, penalty, num_beams):
    """Hugging Face also counts the padding as seen: so one prompt at a time."""
    theirs, ours = pair
    for prompt in PROMPTS:
        out = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=int), do_sample=False,
            max_new_tokens=NEW, repetition_penalty=penalty, num_beams=num_beams,
        )  # fmt: skip
        expected = out[0, 1 if theirs.config.is_encoder_decoder else len(prompt) :].tolist()
        found = jf.generate(ours, prompt, max_new_tokens=NEW, repetition_penalty=penalty, num_beams=num_beams)
        assert found == expected[: len(found)] and set(expected[len(found) :]) <= {0}


def test_filters():
    from transformers.generation import logits_process as theirs

    logits = (3 * np.random.default_rng(0).standard_normal((6, 40))).astype(np.float32)
    for min_p in (0.0, 0.01, 0.2, 0.9, 1.0):
        expected = theirs.MinPLogitsWarper(min_p)(None, torch.from_numpy(logits)).numpy()
        np.testing.assert_array_equal(decoding.likely(logits, np.float32(min_p)), expected)
    for top_k, top_p, min_p in ((5, 1.0, 0.3), (40, 0.8, 0.1), (12, 0.9, 0.02)):
        scores = torch.from_numpy(logits)
        for warper in (theirs.TopKLogitsWarper(top_k), theirs.TopPLogitsWarper(top_p), theirs.MinPLogitsWarper(min_p)):
            scores = warper(None, scores)
        found = decoding.restrict(logits, np.int32(top_k), np.float32(top_p))
        np.testing.assert_array_equal(decoding.likely(found, np.float32(min_p)), scores.numpy())
    seen = np.random.default_rng(1).integers(0, 40, (6, 9))
    where = np.zeros((6, 40), bool)
    np.put_along_axis(where, seen, True, axis=1)
    for penalty in (0.7, 1.0, 1.9):
        expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(torch.from_numpy(seen), torch.from_numpy(logits))
        found = decoding.penalised(logits, where, np.float32(penalty))
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_stop_sequences(pair):
    """Against cutting the text that Hugging Face generates without one."""
    theirs, ours = pair
    free, _ = theirs_generate(theirs, eos_token_id=23)
    stop = free[0][2:4]
    found = jf.generate(ours, PROMPTS, max_new_tokens=NEW, eos_token_id=23, stop_sequences=[stop])
    assert found[0] == free[0][: next(i for i in range(NEW) if free[0][i : i + 2] == stop) + 2]
