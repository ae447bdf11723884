"""The smoke presets, on the text that every Python carries."""

import pytest

from experiments import common, minilm, star


@pytest.fixture(autouse=True)
def embedded_data(monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(common, "shared_data", lambda name, given=None: given)


def test_minilm(tmp_path):
    result = minilm.run(minilm.PRESETS["smoke"], tmp_path)
    assert {r["student"] for r in result["rows"]} == {"random", "v1", "v1 without values", "v2"}
    assert all(0 <= r["probe"] <= 1 for r in result["rows"])
    assert all(r["held-out KL"] < r["held-out KL at start"] for r in result["rows"] if r["student"] != "random")
    assert (tmp_path / "figure.png").is_file() and (tmp_path / "student" / "model.safetensors").is_file()


def test_star(tmp_path):
    result = star.run(star.PRESETS["smoke"], tmp_path)
    assert result["source"] == "modules of the standard library" and result["unseen"] > 1
    trigrams = result["rows"][0]
    assert trigrams["encoder"] == "character trigrams" and trigrams["seen k=8"] > 0.5  # code is easily told apart
    assert (tmp_path / "figure.png").is_file() and (tmp_path / "style" / "style.json").is_file()


def test_star_takes_the_lowest_layers_of_a_checkpoint(tmp_path):
    import jax
    import numpy as np

    import jaxformers as jf
    from jaxformers.data.tokenizers import train_wordpiece
    from jaxformers.models import bert

    tokenizer = train_wordpiece(["some words of some text"] * 3, 60)
    whole = jf.init(bert.Config(tokenizer.vocab_size, 16, 4, 2, 32, max_position_embeddings=16), key=jax.random.key(0))
    jf.save(whole, tmp_path, tokenizer)
    config = star.Config(backbone=str(tmp_path), layers=2, tuned=1)
    described, make, tuned, _ = star.encoder(config, [])
    lower = make(jax.random.key(0))
    assert described.startswith("2 of 4 layers") and tuned == 1 and lower.config.num_hidden_layers == 2
    batch = {"input_ids": np.arange(8)[None] + 5}
    apply, params = jf.functional(whole)
    _, seen = jf.reap(apply, "layers.1.output")(params, batch)
    apply, params = jf.functional(lower)
    np.testing.assert_allclose(apply(params, batch).last_hidden_state, seen["layers.1.output"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="layers: .* has 4 layers, of which 5"):
        star.encoder(star.Config(backbone=str(tmp_path), layers=5), [])


def test_without_the_package_models_are_trained(monkeypatch):
    monkeypatch.setattr(star, "packaged", lambda name: None)
    described, _, tuned, _ = star.encoder(star.Config(vocab=60), ["some words of some text"] * 3)
    assert described == "a random BERT of 2 x 64" and tuned == 0
