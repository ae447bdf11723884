"""The presets of AxFormer: the smoke one on the code that every Python carries, and the step of the paper's."""

import json

import jax
import numpy as np
import pytest

import jaxformers as jf
from experiments import axformer, common, sentences
from jaxformers.cost import count_flops


def test_smoke(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "shared_data", lambda name, given=None: given)
    result = axformer.run(axformer.PRESETS["smoke"], tmp_path)
    assert [r["way"] for r in result["rows"]] == ["trained", "specialised", "trained anew"]
    trained, special, anew = result["rows"]
    assert special["validation loss"] <= trained["validation loss"] and anew["parameters"] == special["parameters"]
    (search,) = result["searches"]
    assert search["evaluations"] <= 5
    assert json.loads((tmp_path / "structure-0.json").read_text()) == json.loads(json.dumps(search["structure"]))
    assert jf.load(tmp_path / "model").head_name == "sequence_classification"


def test_presets_are_chosen_by_name():
    assert set(axformer.PRESETS) == {"smoke", "small", "paper"}
    assert common.parse(axformer.PRESETS, ["paper", "--seeds", "7"])[1].seeds == 7


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
def test_the_paper_preset_has_a_step():
    step = axformer.step(axformer.PRESETS["paper"], jf.mesh("data=8"))
    traced = jax.jit(step.function).trace(*step.args)
    assert step.parameters / 1e6 == pytest.approx(108.3, rel=0.01)
    assert 2.5 < count_flops(traced.jaxpr) / 1e12 < 3.2  # 22 TFLOP for 1 000 sentences


def test_data_without_its_parts(tmp_path):
    read = lambda: sentences.parted_texts(tmp_path, None, axformer.PACKAGES)
    with pytest.raises(ValueError, match="has none of train.jsonl"):
        read()
    for part in sentences.PARTS:
        (tmp_path / f"{part}.jsonl").write_text('{"text": "a", "text2": "b", "label": 1}\n')
    parts = read()
    assert parts["val"][0] == [("a", "b")] and parts["val"][1].tolist() == [1]
    (tmp_path / "test.jsonl").write_text('{"sentence": "a"}\n')
    with pytest.raises(ValueError, match="test.jsonl: row 1 has no 'text'; it has 'sentence'"):
        read()
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(ValueError, match="test.jsonl has no rows"):
        read()
    assert np.issubdtype(parts["val"][1].dtype, np.integer)
