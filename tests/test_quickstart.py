"""The quickstart's whole arc, at a size that takes seconds."""

import dataclasses
import json

import jaxformers as jf
from jaxformers import quickstart

TINY = quickstart.Settings(
    vocab=300, width=64, depth=1, heads=2, mlp=64, length=96, batch=2, steps=6, source_bytes=60_000, calibration=4,
    bits=(4,), group_size=32, eval_windows=4,
)  # fmt: skip


def test_the_whole_arc(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "ENCODER", "no/such/encoder/here")
    result = quickstart.run(tmp_path, settings=TINY)
    said = capsys.readouterr().out
    assert [row["model"] for row in result["models"]] == ["float32", "rtn-4bit", "gptq-4bit"]
    dense, _, packed = result["models"]
    assert packed["bytes"] < dense["bytes"] and packed["perplexity"] > 0
    assert len(result["linking"]) == 1 and "no sentence encoder to link with" in said
    assert json.loads((tmp_path / "result.json").read_text())["models"] == result["models"]
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in steps if "loss" in r][-1] == TINY.steps
    reloaded = jf.load(tmp_path / "gptq-4bit")
    assert jf.generate(reloaded, "The value", max_new_tokens=3) is not None


def test_the_tables_have_known_matches_and_no_names():
    left, right, truth = quickstart.docstring_tables()
    assert len(left) == len(truth) > 60 and len(set(right)) == len(right) > 50
    assert max(truth) < len(right)
    i = next(i for i, text in enumerate(left) if text.startswith("Return the cube root"))
    assert "cube-root" in right[truth[i]] and "cbrt" not in right[truth[i]]


def test_pretraining_is_reproducible(tmp_path):
    settings = dataclasses.replace(TINY, steps=2)
    train, held_out = quickstart.corpus(settings)
    runs = [quickstart.pretrain(tmp_path, train, held_out, settings, 0)[4] for _ in range(2)]
    losses = [[r["loss"] for r in history if "loss" in r] for history in runs]
    assert losses[0] == losses[1]
