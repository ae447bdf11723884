"""The smoke preset, on the text that every Python carries."""

import numpy as np
import pytest

import jaxformers as jf
from experiments import common, fusegpt


def test_smoke(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(common, "shared_data", lambda name, given=None: given)
    config = fusegpt.PRESETS["smoke"]
    result = fusegpt.run(config, tmp_path)
    ways = ["dense", "random", "block influence", "MI", *fusegpt.settings(config)]
    assert [r["way"] for r in result["rows"]] == ways
    assert all(r["perplexity"] > 1 and len(r["removed"]) == (r["way"] != "dense") for r in result["rows"])
    assert set(result["won back"]) == set(ways[4:]) and np.all(np.isfinite(list(result["won back"].values())))
    assert (tmp_path / "figure.png").is_file() and jf.load(tmp_path / "model-fused").config.num_hidden_layers == 3


def test_presets_are_chosen_by_name():
    assert set(fusegpt.PRESETS) == {"smoke", "small", "paper"}
    assert common.parse(fusegpt.PRESETS, ["paper", "--seeds", "7"])[1].seeds == 7
    official = fusegpt.settings(fusegpt.PRESETS["paper"])["FuseGPT"]
    assert official == fusegpt.FuseConfig(rate=0.25)  # the defaults are the paper's
