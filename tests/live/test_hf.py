"""Against Hugging Face itself, both ways: what it writes is read alike, what is written here it reads alike."""

import pytest
from parity import assert_close_scaled, batch_of, read

import jaxformers as jf

pytest.importorskip("torch", reason="live comparison: pip install 'jaxformers[oracle]'")
transformers = pytest.importorskip("transformers", reason="live comparison: pip install 'jaxformers[oracle]'")

from live import freeze  # noqa: E402


@pytest.mark.parametrize("name", freeze.VARIANTS)
def test_hugging_face_reads_what_is_written_here(name, oracles, tmp_path):
    folder = oracles / "variants" / name
    jf.save(jf.load(folder), tmp_path / "x")
    cls = getattr(transformers, freeze.VARIANTS[name][0])
    model, report = cls.from_pretrained(tmp_path / "x", attn_implementation="eager", output_loading_info=True)
    untied = name.endswith(("mlm-untied", "roberta-decoder"))
    unread = {"cls.predictions.bias", "lm_head.bias"} if untied else set()  # a bias without use
    lost = {key for key in report["missing_keys"] if not key.endswith("inv_freq")}  # computed, no weight
    assert lost <= unread and not report["unexpected_keys"] and not report["mismatched_keys"]
    expected = read(folder)
    found = freeze.run(model.eval(), batch_of(expected))
    real = expected.get("decoder_attention_mask", expected["attention_mask"]) == 1
    for part, value in found.items():
        assert_close_scaled(value, expected[part], 1e-5, real if value.ndim == 3 else None)


@pytest.mark.parametrize("name", freeze.VARIANTS)
def test_the_frozen_values_are_those_of_the_installed_version(name, oracles):
    expected = read(oracles / "variants" / name)
    found = freeze.run(freeze.build(name), freeze.batch(name))
    real = expected.get("decoder_attention_mask", expected["attention_mask"]) == 1
    for part, value in found.items():
        assert_close_scaled(value, expected[part], 1e-5, real if value.ndim == 3 else None)


@pytest.mark.parametrize("name", ["bert-base", "gpt2-unscaled", "llama-biased"])
def test_a_random_model_made_here(name, oracles, tmp_path):
    import jax

    head = {"bert-base": None}.get(name, "causal_lm")
    model = jf.init(jf.load(oracles / "variants" / name).config, head=head, key=jax.random.key(0))
    jf.save(model, tmp_path / "x")
    theirs = getattr(transformers, freeze.VARIANTS[name][0]).from_pretrained(tmp_path / "x")
    batch = batch_of(read(oracles / "variants" / name))
    apply, params = jf.functional(model)
    found = freeze.run(theirs.eval(), batch)
    real = batch["attention_mask"] == 1
    assert_close_scaled(apply(params, batch).last_hidden_state, found["hidden"], 2e-5, real)
