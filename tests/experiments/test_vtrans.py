"""The presets of VTrans: the smoke one on the code that every Python carries, and its baselines."""

import jax
import numpy as np
import pytest

import jaxformers as jf
from experiments import common, vtrans
from jaxformers.compress import vtrans as gates
from jaxformers.models import bert


@pytest.mark.slow
def test_smoke(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "shared_data", lambda name, given=None: given)
    result = vtrans.run(vtrans.PRESETS["smoke"], tmp_path)
    assert [row["method"] for row in result["rows"]] == ["dense", "full", "magnitude"]
    for row in result["rows"][1:]:
        assert 0 <= row["test"] <= 1 and abs(row["actual_sparsity"] - 0.5) < 0.02
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_presets_are_chosen_by_name():
    assert set(vtrans.PRESETS) == {"smoke", "small", "paper"}
    assert common.parse(vtrans.PRESETS, ["paper", "--seeds", "7"])[1].seeds == 7


@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_baselines_meet_the_budget_and_magnitude_keeps_what_is_large(method):
    config = vtrans.PRESETS["smoke"]
    size = bert.Config(50, 16, 2, 2, 32, max_position_embeddings=12, num_labels=2)
    model = jf.init(size, head="sequence_classification", key=jax.random.key(0))
    large = model.layers[0].mlp
    large.down.kernel.set_value(large.down.kernel.get_value().at[:8].multiply(50))
    cost = gates.costs(model)
    masks = vtrans.baseline_masks(model, cost, config.keep[0], method, 0)
    left = 1 - float(cost.sparsity(jax.tree.map(lambda m: (m != 0) * 1.0, masks)))
    assert config.keep[0] - 0.02 <= left <= config.keep[0] + 0.005
    if method == "magnitude":
        assert np.all(masks["ffn"]["layers.0.mlp"][:8] == 1)
