"""The smoke preset, on docstrings that every Python carries; the data sets' splits where they are on the machine."""

import json

import numpy as np
import pytest

from experiments import linktransformer

pytest.importorskip("sklearn")


def test_smoke(tmp_path):
    pytest.importorskip("matplotlib")
    result = linktransformer.run(linktransformer.PRESETS["smoke"], tmp_path)
    assert set(result["accuracy@1"]["methods"]) == {"trigram TF-IDF", "zero-shot", "supcon"}
    assert result["accuracy@1"]["methods"]["trigram TF-IDF"][0] > 0.5
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in r for r in records) and any("eval_accuracy@1" in r for r in records)
    assert (tmp_path / "figure.png").is_file()


def test_tested_intents_are_never_trained_on(shared):
    config = linktransformer.PRESETS["small"]
    splits = [linktransformer.banking77(config, seed) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    split = splits[0]
    assert len(split.train) == 51 and all(len(texts) == 8 for texts in split.train)
    assert len(split.val.queries) == 26 * 20 and len(split.val.corpus) == 77 * 8
    trained = {text for texts in split.train for text in texts}
    assert not trained & set(split.val.queries)
    assert not trained & {split.val.corpus[i] for relevant in split.val.relevant for i in relevant}


def test_known_intents_are_asked_about_with_other_questions(shared):
    config = linktransformer.PRESETS["small"]
    held_out, known = linktransformer.banking77(config, 1), linktransformer.known(config, 1)
    assert known.train == held_out.train and known.val.corpus == held_out.val.corpus
    trained = {text for texts in known.train for text in texts}
    assert len(known.val.queries) == 51 * 20 - 1 and not trained & set(known.val.queries)
    assert all(known.val.corpus[i] in trained for relevant in known.val.relevant for i in relevant)


def test_record_matches(shared):
    split = linktransformer.itunes(linktransformer.PRESETS["small"], 0)
    assert (len(split.train), len(split.val.queries), len(split.val.corpus)) == (78, 27, 483)
    scores = split.val.score(linktransformer.tfidf([*split.val.queries, *split.val.corpus]))
    assert scores["accuracy@1"] == pytest.approx(21 / 27) and np.isfinite(list(scores.values())).all()
