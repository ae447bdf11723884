"""GLUE's tables in their official layout, and as others write them; its scores against scikit-learn and scipy."""

import gzip
import json

import numpy as np
import pytest

from jaxformers import metrics
from jaxformers.data.glue import TASKS, glue_rows, glue_scores, outputs_of, read_glue

MNLI = [
    "index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse",
    "sentence2_parse", "sentence1", "sentence2",
]  # fmt: skip
OFFICIAL = {  # the header of the file of each task, a row of it, and what is in it
    "cola": (None, ["gj04", "0", "*", "Fred watered flat."], "Fred watered flat.", 0),
    "sst2": (["sentence", "label"], ['the "best" film ', "1"], 'the "best" film ', 1),
    "mrpc": (["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["1", "7", "8", 'He "said', "He said"],
             ('He "said', "He said"), 1),
    "qqp": (["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], ["5", "1", "2", "Why?", "", "0"],
            ("Why?", ""), 0),
    "stsb": (["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2",
              "score"], ["0", "main", "x", "2012", "1", "none", "none", "A man.", "A boy.", "3.800"],
             ("A man.", "A boy."), 3.8),
    "mnli": ([*MNLI, "label1", "gold_label"], ["0", *"abcdefg", "It rains.", "It is wet.", "neutral", "neutral"],
             ("It rains.", "It is wet."), 1),
    "qnli": (["index", "question", "sentence", "label"], ["0", "Who?", "Nobody.", "not_entailment"],
             ("Who?", "Nobody."), 1),
    "rte": (["index", "sentence1", "sentence2", "label"], ["0", "a", "b", "not_entailment"], ("a", "b"), 1),
    "wnli": (["index", "sentence1", "sentence2", "label"], ["0", "a", "b", "1"], ("a", "b"), 1),
}  # fmt: skip


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows if row is not None))


@pytest.mark.parametrize("task", OFFICIAL)
def test_official_tables(task, tmp_path):
    header, row, text, label = OFFICIAL[task]
    stem = {"mnli": "dev_matched"}.get(task, "dev")
    write(tmp_path / TASKS[task].name / f"{stem}.tsv", header, row, row)
    for directory in (tmp_path, tmp_path / TASKS[task].name):  # all of GLUE, or one task
        texts, labels = read_glue(directory, task, "dev")
        assert texts == [text, text] and labels.tolist() == pytest.approx([label] * 2)
        assert labels.dtype == (np.float32 if task == "stsb" else np.int32)
    assert len(read_glue(tmp_path, task, "dev", 1)[0]) == 1


def test_mismatched_is_a_table_of_its_own(tmp_path):
    header, row, *_ = OFFICIAL["mnli"]
    more = [*header[:-1], "label2", "label3", "label4", "label5", "gold_label"]
    write(tmp_path / "dev_matched.tsv", header, row)
    with pytest.raises(ValueError, match="has none of dev_mismatched.tsv, validation_mismatched.jsonl; for MNLI"):
        read_glue(tmp_path, "mnli_mismatched", "dev")
    write(tmp_path / "dev_mismatched.tsv", more, [*row[:-1], *["neutral"] * 4, "contradiction"])
    assert read_glue(tmp_path, "mnli_mismatched", "dev")[1].tolist() == [2]
    assert read_glue(tmp_path, "mnli", "dev")[1].tolist() == [1]


def test_broken_lines(tmp_path):
    header, row, *_ = OFFICIAL["qqp"]
    write(tmp_path / "train.tsv", header, row, row[:4], row)  # the known case: a row that a line break cuts
    assert len(read_glue(tmp_path, "qqp", "train")[0]) == 2
    write(tmp_path / "train.tsv", header, row, [*row, "more"])
    with pytest.raises(ValueError, match="train.tsv, line 3: 7 cells, expected 6"):
        read_glue(tmp_path, "qqp", "train")
    header, row, *_ = OFFICIAL["mrpc"]
    write(tmp_path / "train.tsv", header, row, row[:4])
    with pytest.raises(ValueError, match="train.tsv, line 3: 4 cells, expected 5"):
        read_glue(tmp_path, "mrpc", "train")
    write(tmp_path / "train.tsv", OFFICIAL["rte"][0], ["0", "a", "b", "maybe"])
    with pytest.raises(ValueError, match="line 2: the label is 'maybe'; RTE has 0 or entailment, 1 or not_entailment"):
        read_glue(tmp_path, "rte", "train")
    write(tmp_path / "train.tsv", OFFICIAL["stsb"][0], [*OFFICIAL["stsb"][1][:-1], "5.5"])
    with pytest.raises(ValueError, match="line 2: the score is '5.5'; expected a number from 0 to 5"):
        read_glue(tmp_path, "stsb", "train")
    write(tmp_path / "train.tsv", ["sentence", "label"])
    with pytest.raises(ValueError, match="train.tsv: no rows"):
        read_glue(tmp_path, "sst2", "train")
    with pytest.raises(ValueError, match="no column 'question' for QNLI; it has 'a', 'b'"):
        write(tmp_path / "train.tsv", ["a", "b"], ["1", "2"])
        read_glue(tmp_path, "qnli", "train")


@pytest.mark.parametrize("task", ["cola", "sst2", "stsb"])
def test_test_sets_have_no_labels(task, tmp_path):
    write(tmp_path / "test.tsv", ["index", *TASKS[task].texts], ["0", *["words"] * len(TASKS[task].texts)])
    with pytest.raises(ValueError, match="no label; those of GLUE's test sets are not published, use the part 'dev'"):
        read_glue(tmp_path, task, "test")
    row = dict.fromkeys(TASKS[task].columns, "words")
    (tmp_path / "test.tsv").unlink()
    (tmp_path / "test.jsonl").write_text(json.dumps({**row, "label": -1}))
    with pytest.raises(ValueError, match="test.jsonl: row 1: the label is -1, not known"):
        read_glue(tmp_path, task, "test")


def test_what_is_missing_says_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"mrpc is no directory; for MRPC, download it from gluebenchmark.com"):
        read_glue(tmp_path / "mrpc", "mrpc", "train")
    with pytest.raises(ValueError, match=r"has none of train.tsv, train.jsonl; .*nyu-mll/glue"):
        read_glue(tmp_path, "mrpc", "train")
    with pytest.raises(ValueError, match="part: expected 'train', 'dev' or 'test', got 'val'"):
        read_glue(tmp_path, "mrpc", "val")
    with pytest.raises(ValueError, match="task: expected one of cola, sst2, .*, got 'MRPC'"):
        read_glue(tmp_path, "MRPC", "train")


def test_rows_that_something_else_has_read(tmp_path):
    rows = [{"idx": 0, "sentence1": b"caf\xc3\xa9", "sentence2": b"b", "label": np.int64(0)}]
    rows += [{"idx": 1, "sentence1": "c", "sentence2": "d", "label": 1}]
    texts, labels = glue_rows(iter(rows), "mrpc")
    assert texts == [("café", "b"), ("c", "d")] and labels.tolist() == [0, 1]
    assert glue_rows(rows, "mrpc", 1)[1].tolist() == [0]
    with pytest.raises(ValueError, match="records: row 1: the sentence1 is 7; expected a string"):
        glue_rows([{**rows[0], "sentence1": 7}], "mrpc")
    with gzip.open(tmp_path / "validation.jsonl.gz", "wt") as file:
        file.write(json.dumps({"sentence1": "a", "sentence2": "b", "label": 2.5}) + "\n")
    assert read_glue(tmp_path, "stsb", "dev")[1].tolist() == [2.5]


def test_real_tables(shared):
    texts, labels = read_glue(shared / "data" / "sst2_small", "sst2", "dev")
    assert len(texts) == 872 and texts[0].startswith("one long string of cliches") and labels[0] == 0
    assert set(labels.tolist()) == {0, 1}
    pairs, labels = read_glue(shared / "data" / "snli_small", "mnli", "dev")  # the same columns and names
    assert len(pairs) == 155 and pairs[0][1] == "Two surgeons are having lunch." and labels[0] == 2


def test_outputs_of_a_checkpoint():
    assert outputs_of("mnli", {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}).tolist() == [0, 1, 2]
    assert outputs_of("mnli", {"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"}).tolist() == [2, 1, 0]
    assert outputs_of("qnli", {0: "not-entailment", 1: "entailment"}).tolist() == [1, 0]
    assert outputs_of("stsb", {0: "similarity"}).tolist() == [0]
    with pytest.raises(ValueError, match="RTE takes 2 outputs, the checkpoint has 3"):
        outputs_of("rte", {0: "a", 1: "b", 2: "c"})
    with pytest.raises(ValueError, match="SST-2 has negative, positive, the checkpoint's outputs are bad, good"):
        outputs_of("sst2", {0: "bad", 1: "good"})


def test_scores():
    sklearn = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    labels, logits = random.integers(0, 2, 50), random.normal(size=(50, 2))
    said = logits.argmax(-1)
    assert glue_scores("cola", logits, labels)["matthews"] == pytest.approx(sklearn.matthews_corrcoef(labels, said))
    expected = {"accuracy": sklearn.accuracy_score(labels, said), "f1": sklearn.f1_score(labels, said)}
    assert glue_scores("mrpc", logits, labels) == pytest.approx(expected)
    three, guess = random.integers(0, 3, (2, 80))
    assert metrics.matthews(three, guess) == pytest.approx(sklearn.matthews_corrcoef(three, guess))
    scores = random.integers(0, 6, 50).astype(np.float32)  # with ties
    near = scores[:, None] + random.normal(size=(50, 1)).round(1)
    expected = {"pearson": stats.pearsonr(scores, near[:, 0])[0], "spearman": stats.spearmanr(scores, near[:, 0])[0]}
    assert glue_scores("stsb", near, scores) == pytest.approx(expected)
    assert metrics.matthews([0, 1, 1], [1, 1, 1]) == metrics.pearson([1, 2], [3, 3]) == 0
    with pytest.raises(ValueError, match=r"logits: expected \(50, 1\) for STS-B, got \(50, 2\)"):
        glue_scores("stsb", logits, labels)
    with pytest.raises(ValueError, match="must be finite"):
        metrics.spearman([1, 2], [1, np.nan])
