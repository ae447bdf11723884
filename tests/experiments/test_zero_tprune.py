"""The presets of Zero-TPrune: the smoke one on scikit-learn's digits, and the step of the paper's."""

import jax
import pytest

import jaxformers as jf
from experiments import common, zero_tprune
from jaxformers.cost import count_flops


def test_smoke(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(common, "shared_data", lambda name, given=None: given)
    result = zero_tprune.run(zero_tprune.PRESETS["smoke"], tmp_path)
    assert [r["way"] for r in result["rows"]] == ["dense", "Zero-TPrune", "random", "searched schedule"]
    assert all(0 <= r["accuracy"] <= 1 for r in result["rows"]) and (tmp_path / "figure.png").is_file()


def test_presets_are_chosen_by_name():
    assert set(zero_tprune.PRESETS) == {"smoke", "small", "paper"}
    assert common.parse(zero_tprune.PRESETS, ["paper", "--seeds", "7"])[1].seeds == 7


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
def test_the_paper_preset_has_a_step():
    step = zero_tprune.step(zero_tprune.PRESETS["paper"], jf.mesh("data=8"))
    traced = jax.jit(step.function).trace(*step.args)
    assert step.parameters == 22_050_664
    assert 2 * 3.0e9 * 256 < count_flops(traced.jaxpr) < 2 * 3.3e9 * 256
    with pytest.raises(ValueError, match="this preset trains its own"):
        zero_tprune.step(zero_tprune.PRESETS["small"], jf.mesh("data=1"))


def test_a_directory_of_classes_is_for_a_checkpoint(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="model: a directory of classes is for a checkpoint"):
        zero_tprune.images(zero_tprune.Config(data=tmp_path))
    with pytest.raises(ValueError, match="has 0 images in 1 folders"):
        zero_tprune.images(zero_tprune.Config(data=tmp_path, model="a"))
