"""The smoke preset, on the text that every Python carries."""

import pytest

import jaxformers as jf
from experiments import common, gptq


def test_smoke(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(common, "shared_data", lambda name, given=None: given)
    result = gptq.run(gptq.PRESETS["smoke"], tmp_path)
    assert [r["way"] for r in result["rows"]] == ["dense", *gptq.ways(gptq.PRESETS["smoke"])]
    assert all(r["perplexity"] > 1 for r in result["rows"])
    assert set(result["excess removed"]) == {f"{w}, 3 bits" for w in list(gptq.ways(gptq.PRESETS["smoke"]))[1:]}
    assert (tmp_path / "figure.png").is_file() and jf.load(tmp_path / "model-4bit").config.hidden_size == 64


def test_data_and_test_go_together(tmp_path):
    with pytest.raises(ValueError, match="give both or neither"):
        gptq.run(gptq.Config(data=tmp_path), tmp_path)
