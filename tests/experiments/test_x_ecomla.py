"""The smoke preset, on the text that every Python carries."""

import numpy as np

import jaxformers as jf
from experiments import common, x_ecomla


def test_smoke(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "shared_data", lambda name, given=None: given)
    config = x_ecomla.PRESETS["smoke"]
    result = x_ecomla.run(config, tmp_path)
    assert [r["way"] for r in result["rows"]] == ["source", *x_ecomla.ways(config)]
    assert set(result["gaps"]) == {r["way"] for r in result["rows"]} and result["gaps"]["source"] == [0]
    assert all(np.isfinite(r["after"]) for r in result["rows"])
    assert [r["cache bytes"] for r in result["rows"]] == [128, *[2 * 2 * (4 + 4)] * 3]
    assert jf.load(tmp_path / "model").layers[0].attention.rank == 4
