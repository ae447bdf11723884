"""Encoders against Hugging Face's outputs on tiny models: every layer, head, pooler, loss and gradient."""

import jax
import numpy as np
import pytest
from flax import nnx
from parity import assert_close, assert_close_scaled, batch_of, forward, grads_by_hf_name, read, run

import jaxformers as jf
from jaxformers import nn
from jaxformers.losses import cross_entropy

# folder: absolute tolerance of hidden states and attentions, by the oracles' READMEs
FOLDERS = {
    "bert/mlm": 2e-5,
    "bert/seqcls": 2e-5,
    "roberta/mlm": 2e-5,
    "roberta/seqcls": 2e-5,
    "distilbert": 1e-4,
    "distilbert-seqcls": 1e-4,
    "mpnet": 1e-4,
    "xlm-roberta": 1e-4,
    "xlm-roberta-mlm": 1e-4,
    "electra": 1e-4,
    "electra-generator": 1e-4,
}
LOGITS = 2e-5  # relative to the output's scale
GRADIENTS = 1e-4  # likewise


@pytest.fixture(params=FOLDERS)
def case(request, oracles):
    folder = oracles / "backbones" / request.param
    return jf.load(folder), read(folder), FOLDERS[request.param]


def test_every_layer_and_output(case):
    model, expected, tolerance = case
    out, hidden, attentions = forward(model, batch_of(expected))
    assert_close(hidden, expected["hidden_states"], tolerance)
    assert_close(attentions, expected["attentions"], tolerance)
    assert_close(out.last_hidden_state, expected["hidden_states"][-1], tolerance)
    assert (out.logits is not None) == ("logits" in expected)
    if "logits" in expected:
        assert_close_scaled(out.logits, expected["logits"], LOGITS)
    if "pooler_output" in expected:
        assert_close_scaled(out.pooled, expected["pooler_output"], LOGITS)


def test_without_mask_or_token_types(case):
    model, expected, _ = case
    if "nomask_output" in expected:
        out = run(model, {name: expected[name] for name in ("input_ids", "token_type_ids") if name in expected})
        found = out.last_hidden_state if out.logits is None else out.logits
        assert_close_scaled(found, expected["nomask_output"], LOGITS)
    if "logits_no_token_type" in expected:
        batch = {name: expected[name] for name in ("input_ids", "attention_mask")}
        assert_close_scaled(run(model, batch).logits, expected["logits_no_token_type"], LOGITS)


@pytest.mark.parametrize("folder", ["bert/mlm", "roberta/mlm", "distilbert", "mpnet"])
def test_inputs_embeds_stand_for_ids(folder, oracles):
    model, expected = jf.load(oracles / "backbones" / folder), read(oracles / "backbones" / folder)
    ids = expected["input_ids"][:1, :4]
    ids = np.where(ids == 1, 5, ids)  # no padding: positions then count the slots
    rows = model.embeddings.token.embedding.get_value()[ids]
    by_rows, by_ids = run(model, {"inputs_embeds": rows}), run(model, {"input_ids": ids})
    assert_close(by_rows.last_hidden_state, by_ids.last_hidden_state, 1e-6)


@pytest.mark.parametrize("folder", ["bert/mlm", "bert/seqcls", "roberta/mlm", "roberta/seqcls", "xlm-roberta"])
def test_loss_and_gradients(folder, oracles):
    model, expected = jf.load(oracles / "backbones" / folder), read(oracles / "backbones" / folder)
    apply, params = jf.functional(model)

    def loss(params):
        return cross_entropy(apply(params, batch_of(expected)).logits, expected["labels"])

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert_close_scaled(value, expected["loss"], 1e-5)
    grads = grads_by_hf_name(model, grads)
    names = [name for name in expected if name.startswith("grad.")]
    assert names
    for name in names:
        assert_close_scaled(grads[name.removeprefix("grad.")], expected[name], GRADIENTS)


def test_masked_lm_loss_of_xlm_roberta(oracles):
    folder = oracles / "backbones" / "xlm-roberta-mlm"
    model, expected = jf.load(folder), read(folder)
    loss = cross_entropy(run(model, batch_of(expected)).logits, expected["mlm_labels"])
    assert_close_scaled(loss, expected["mlm_loss"], 1e-5)


@pytest.mark.parametrize("folder", ["distilbert", "mpnet"])
def test_sentence_embeddings(folder, oracles):
    model = jf.load(oracles / "backbones" / folder, head="sentence")
    expected = read(oracles / "backbones" / folder)
    assert_close_scaled(run(model, batch_of(expected)).pooled, expected["mean_pooled"], LOGITS)
    nn.new_sentence_head(model, pooling="mean", normalize=True, rngs=nnx.Rngs(0))
    assert_close_scaled(run(model, batch_of(expected)).pooled, expected["sentence_embedding"], LOGITS)


def test_roberta_positions_skip_padding(oracles):
    expected = read(oracles / "backbones" / "roberta" / "mlm")
    assert np.array_equal(nn.padded_positions(expected["input_ids"], 1), expected["position_ids_expected"])


@pytest.mark.parametrize("folder", ["bert/mlm", "roberta/mlm", "distilbert", "mpnet"])
def test_too_long_an_input_is_refused(folder, oracles):
    model = jf.load(oracles / "backbones" / folder)
    apply, params = jf.functional(model)
    limit = getattr(model.config, "max_length", model.config.max_position_embeddings)
    assert limit == {"roberta/mlm": 28, "mpnet": 38}.get(folder, 40)  # two positions of theirs serve padding
    jax.eval_shape(apply, params, {"input_ids": np.full((1, limit), 5)})
    with pytest.raises(ValueError, match=f"length {limit + 1} exceeds"):
        apply(params, {"input_ids": np.full((1, limit + 1), 5)})


@pytest.mark.parametrize("folder", ["bert/mlm", "mpnet", "distilbert"])
def test_bfloat16_is_close(folder, oracles):
    expected = read(oracles / "backbones" / folder)
    model = jf.load(oracles / "backbones" / folder, dtype="bfloat16")
    assert all(leaf.dtype == "bfloat16" for leaf in jax.tree.leaves(nnx.state(model)))
    h = run(model, batch_of(expected)).last_hidden_state
    assert h.dtype == "bfloat16"
    reference = expected["hidden_states"][-1]
    error = np.asarray(h, np.float32) - reference
    assert np.sqrt(np.mean(error**2)) < 0.03 * reference.std()
