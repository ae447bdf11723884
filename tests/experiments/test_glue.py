"""GLUE's and SQuAD's tasks in the experiments: tiny tables in their official layout, through each one's smoke preset."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jaxformers as jf
from experiments import axformer, common, essential_sparsity, glue, minilm, teacher_intervention, vtrans
from jaxformers.data.glue import TASKS
from jaxformers.data.tokenizers import train_wordpiece
from jaxformers.models import bert


@pytest.fixture
def stsb(tmp_path):
    """Forty pairs whose score says how many of their five words are shared."""
    random, words = np.random.default_rng(0), [f"word{i}" for i in range(20)]
    header = "index genre filename year old_index source1 source2 sentence1 sentence2 score".split()
    for part, n in (("train", 40), ("dev", 16)):
        lines = ["\t".join(header)]
        for i in range(n):
            a, shared = random.permutation(words), int(random.integers(0, 6))
            b = [*a[:shared], *a[10 : 15 - shared]]
            lines.append("\t".join([str(i), *"gfyooo"[:6], " ".join(a[:5]), " ".join(b), f"{shared:.3f}"]))
        (tmp_path / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_teacher_intervention(stsb, tmp_path):
    preset = teacher_intervention.PRESETS["smoke"]
    config = dataclasses.replace(preset, task="stsb", data=stsb, length=14, rows=None, step1_eval_every=1)
    result = teacher_intervention.run(config, tmp_path / "run")
    (row,) = result["rows"]
    assert result["task"] == "stsb" and {"eval_pearson", "eval_spearman"} < set(row) and "eval_accuracy" not in row
    assert row["packed"] == pytest.approx(row["eval_pearson"], abs=1e-3) and -1 <= row["packed"] <= 1
    assert [p["step"] for p in result["curves"]["map"][0]] == [1, 2, 3, 5]
    assert jf.load(tmp_path / "run/student/shadow").config.num_labels == 1
    with pytest.raises(ValueError, match="task: Teacher Intervention distils classes and scores, squad has neither"):
        teacher_intervention.run(dataclasses.replace(config, task="squad"), tmp_path)
