"""The smoke preset, on the text that every Python carries."""

import pytest

import jaxformers as jf
from experiments import common, essential_sparsity


def test_smoke(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(common, "shared_data", lambda name, given=None: given)
    config = essential_sparsity.PRESETS["smoke"]
    result = essential_sparsity.run(config, tmp_path)
    ways = [(c["method"], c["finetuned"]) for c in result["curves"]]
    assert ways == [(m, False) for m in config.methods] + [(m, True) for m in config.methods[:2]]
    assert all(len(c["metric"]) == 2 and max(c["metric"]) < 0 for c in result["curves"])
    assert 0.5 < result["tickets"][0]["similarity"] <= 1
    assert result["tickets"][0]["sparsity"] == pytest.approx(0.2, abs=0.001)
    for name in ("figure.png", "seed-0/sparsity.json", "seed-0/sparsity.csv"):
        assert (tmp_path / name).is_file()
    assert jf.load(tmp_path / "model-essential").config.hidden_size == config.width
