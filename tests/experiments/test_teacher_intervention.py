"""The smoke preset, on the text that every Python carries."""

import dataclasses

import pytest

import jaxformers as jf
from experiments import common
from experiments import teacher_intervention as experiment


def test_smoke(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(common, "shared_data", lambda name, given=None: given)
    preset = experiment.PRESETS["smoke"]
    result = experiment.run(preset, tmp_path)
    assert result["task"] == "package of a line of code" and 0 <= result["ternary without training"] <= 1
    assert [r["intervention"] for r in result["rows"]] == ["map"]
    assert all(r["packed"] == pytest.approx(r["eval_accuracy"]) for r in result["rows"])
    assert [p["step"] for p in result["curves"]["map"][0]] == [3, 5]
    assert (tmp_path / "figure.png").is_file()
    assert jf.load(tmp_path / "student" / "packed").config.num_hidden_layers == 1
    saved = dataclasses.replace(preset, teacher=str(tmp_path / "student" / "shadow"), interventions=(), seeds=0)
    with pytest.raises(ValueError, match="has no|tokenizer"):  # a checkpoint without its tokenizer says so
        experiment.run(saved, tmp_path / "again")
