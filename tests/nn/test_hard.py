"""Hard attention as an option: in every encoder, on masked keys, in training, saved and reloaded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jaxformers as jf
from jaxformers import hub, nn, sites

ENCODERS = ("bert/seqcls", "roberta/seqcls", "distilbert-seqcls", "mpnet", "electra", "esm/base", "vit", "beit", "swin")


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(1, 6))
def test_by_sorting(rows, k):
    """Of equal ones the first stay."""
    probs = np.asarray(rows, np.float32)
    expected = np.zeros_like(probs)
    for row, out in zip(probs, expected, strict=True):
        for i in sorted(range(5), key=lambda i: (-row[i], i))[:k]:
            out[i] = row[i]
    assert (np.asarray(nn.keep_largest(jnp.asarray(probs), k)) == expected).all()


def test_one_key_is_one_hot_scaled_by_its_probability():
    probs = jax.nn.softmax(jnp.asarray(np.random.default_rng(0).standard_normal((3, 7))), -1)
    found = np.asarray(nn.keep_largest(probs, 1))
    assert ((found > 0).sum(-1) == 1).all() and (found.max(-1) == np.asarray(probs).max(-1)).all()


def run(model, batch, edited=None):
    apply, params = jf.functional(model)
    apply = apply if edited is None else sites.edit(apply, edited)
    return np.asarray(jax.jit(apply)(params, batch).last_hidden_state)


def test_it_is_the_edit_of_the_probabilities_and_survives_a_round_trip(tmp_path):
    model, batch = tiny.model("bert"), tiny.batch()  # the second row has four real keys
    hard = nn.hard_attention(model, "layers.{0,2}.attention", k=3)
    expected = run(model, batch, {"layers.{0,2}.attention.probs": lambda p: nn.keep_largest(p, 3)})
    real = batch["attention_mask"].astype(bool)
    np.testing.assert_allclose(run(hard, batch)[real], expected[real], rtol=0, atol=1e-5)
    assert np.abs(run(hard, batch) - run(model, batch))[real].max() > 1e-3
    jf.save(hard, tmp_path / "hard")
    again = jf.load(tmp_path / "hard")
    assert (run(again, batch) == run(hard, batch)).all()
    soft = nn.hard_attention(again, "**.attention", k=None)
    assert (run(soft, batch) == run(model, batch)).all()


def test_as_many_keys_as_there_are_is_soft_attention():
    """Masked keys do not count: of four real keys the four largest are all of them."""
    model, batch = tiny.model("bert"), tiny.batch()
    assert (run(nn.hard_attention(model, k=6), batch) == run(model, batch)).all()
    row = {name: x[1:] for name, x in batch.items()}
    four, soft = (run(m, row)[:, :4] for m in (nn.hard_attention(model, k=4), model))
    np.testing.assert_allclose(four, soft, rtol=0, atol=1e-6)


def test_dropout_comes_first():
    """In training the largest of what dropout has left are kept, as in the official code."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 6, 1, 4)).astype(np.float32)
    key = jax.random.key(0)
    found = nn.attend(q, k, v, rate=0.5, key=key, top_k=2)
    probs = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k) / 2, -1)
    kept = nn.keep_largest(nn.dropout(probs, 0.5, key), 2)
    np.testing.assert_allclose(found, jnp.einsum("bhqk,bkhe->bqhe", kept, v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*ENCODERS, "deberta"])
def test_every_encoder_has_it(name, oracles):
    folder = oracles / "backbones" / name
    if name == "deberta":
        folder = oracles / "variants" / "deberta-sequence"
    elif not (folder / "config.json").is_file():
        folder = sorted(folder.glob("*/config.json"))[0].parent
    hf = hub.read_config(folder)
    model = jf.surgery.named(nnx.eval_shape(lambda: jf.init(hf, key=jax.random.key(0))))
    hard = nn.hard_attention(model, "**.attention", k=2)
    modules = [m for _, m in nnx.iter_modules(hard) if hasattr(m, "top_k")]
    assert modules and all(m.top_k == 2 for m in modules)
    (record,) = jf.surgery.to_json(hard)
    assert len(record["arguments"]["targets"]) == len(modules)


def test_errors():
    model = tiny.model("bert")
    with pytest.raises(ValueError, match="k: hard attention keeps at least one key, got 0"):
        nn.hard_attention(model, k=0)
    with pytest.raises(ValueError, match="no module matches; attention with this option: layers.0.attention"):
        nn.hard_attention(model, "layers.7.attention", k=2)
    with pytest.raises(ValueError, match="layers.0.mlp .* has no hard attention"):
        nn.hard_attention(model, "layers.0.mlp", k=2)
