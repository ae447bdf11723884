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
