"""The smoke preset, on the text that every Python carries."""

import jaxformers as jf
from experiments import common, rmsnorm
from jaxformers import nn


def test_smoke(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "shared_data", lambda name, given=None: given)
    config = rmsnorm.PRESETS["smoke"]
    result = rmsnorm.run(config, tmp_path)
    first, second = result["rows"]
    assert [first["form"], second["form"]] == list(config.forms)
    assert 1 < first["float32"] < 400 and abs(first["float32"] / second["float32"] - 1) < 1e-5
    assert abs(first["float32"] / second["bfloat16"] - 1) < 0.05
    (gaps,) = result["paths"]
    assert gaps["in every pass"] <= 1e-5 < 1e-4 < gaps["once"]
    assert set(result["milliseconds"]["forward"]) == set(config.forms)
    assert isinstance(jf.load(tmp_path / "model-crms").final_norm, nn.CRMSNorm)
