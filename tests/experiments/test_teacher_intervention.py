"""The smoke preset, on the text that every Python carries."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxformers as jf
from experiments import common
from experiments import teacher_intervention as experiment
from jaxformers.data.tokenizers import train_wordpiece
from jaxformers.evaluation import accuracy
from jaxformers.models import bert


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


def test_a_pretrained_encoder_becomes_the_teacher(tmp_path):
    words = ["good film", "bad film", "good good", "bad bad"]
    tokenizer = train_wordpiece(words, 60, max_length=8)
    shape = bert.Config(tokenizer.vocab_size, 16, 1, 2, 32, max_position_embeddings=8, initializer_range=0.2)
    encoder = jf.init(shape, head="masked_lm", key=jax.random.key(0))
    jf.save(encoder, tmp_path / "encoder", tokenizer=tokenizer)
    train = (words, np.asarray([1, 0, 1, 0], np.int32))
    config = dataclasses.replace(
        experiment.PRESETS["smoke"], encoder=str(tmp_path / "encoder"), teacher_steps=60, teacher_rate=1e-2
    )
    teacher, same = experiment.teacher_of(config, train)
    assert same.vocab_size == tokenizer.vocab_size
    assert accuracy(teacher, experiment.encoded(same, train, 8)) == 1
    tables = [np.ravel(m.embeddings.token.embedding.get_value()) for m in (teacher, encoder)]
    assert 0.5 < np.corrcoef(*tables)[0, 1] < 0.9999  # from there, not from random weights
    with pytest.raises(ValueError, match="teacher, encoder: give one"):
        experiment.teacher_of(dataclasses.replace(config, teacher="t"), train)
