"""ESM against Hugging Face: layers, token dropout, loss, predicted contacts."""

import jax
import numpy as np
import pytest
from parity import assert_close, assert_close_scaled, batch_of, forward, read

import jaxformers as jf
from jaxformers.losses import cross_entropy
from jaxformers.models import esm


@pytest.mark.parametrize("case", ["base", "no_mask"])
def test_layers_loss_and_contacts(case, oracles):
    folder = oracles / "backbones" / "esm" / case
    model, expected = jf.load(folder), read(folder)
    batch = batch_of(expected)
    real = expected["attention_mask"] == 1
    out, hidden, attentions = forward(model, batch)
    assert_close(hidden, expected["hidden_states"], 3e-5, (slice(None), real))
    by_query = attentions.transpose(1, 3, 0, 2, 4)
    assert_close(by_query, expected["attentions"].transpose(1, 3, 0, 2, 4), 3e-5, real)
    assert_close_scaled(out.logits, expected["logits"], 2e-5, real)
    assert_close_scaled(cross_entropy(out.logits, expected["labels"]), expected["loss"], 1e-5)
    apply, params = jf.functional(model)
    contacts = jax.jit(lambda params, batch: esm.predict_contacts(apply, params, batch))(params, batch)
    inside = real[:, 1:-1, None] & real[:, None, 1:-1]
    assert_close(contacts, expected["contacts"], 3e-5, inside)
    assert np.isfinite(out.logits).all()


def test_errors(oracles):
    model = jf.load(oracles / "backbones" / "esm" / "base", contact_head=False, head="masked_lm")
    apply, params = jf.functional(model)
    with pytest.raises(ValueError, match="no contact head"):
        esm.predict_contacts(apply, params, {"input_ids": np.ones((1, 4), int)})
    with pytest.raises(ValueError, match="position_embedding_type 'relative_key'"):
        esm.Config(position_embedding_type="relative_key")
    with pytest.raises(ValueError, match="mask_token_id"):
        esm.Config(token_dropout=True)
