"""SQuAD: windows by hand and by BERT's published example, spans that come back as text, the official scores."""

import gzip
import json
import re

import numpy as np
import pytest

from jaxformers.data.squad import (
    Question,
    Span,
    best_spans,
    chosen_answers,
    normal_answer,
    read_squad,
    squad_scores,
    squad_windows,
)
from jaxformers.data.tokenizers import load_tokenizer, train_bpe, train_wordpiece

MILK = "the man went to the store and bought a gallon of milk"
TEXTS = [
    MILK,
    'Normandy ("Nourmaundie"), a region, was named after the Normans; they raided it in the 10th century.',
    "Der Brückenbau über den Fluß begann 1923, kostete 4 000 000 Mark und wurde – trotz Kälte – im März fertig.",
    "日本語 text and 😀 smileys, naïve café.",
]


@pytest.fixture(scope="module")
def words():
    return train_wordpiece([MILK, "who what"] * 3, 400)


def peaked(windows, where):
    """Logits that want window i's span ``where[i]``, or nothing."""
    logits = np.zeros((*windows.central.shape, 2))
    for i, (a, b) in where.items():
        logits[i, a, 0] = logits[i, b, 1] = 5
    return logits


def test_windows_of_berts_example(words):
    """BERT's published code explains by this text, in parts of five words and a stride of three, what sees most."""
    question = Question("q", "who", MILK, (("bought a gallon", MILK.index("bought")),))
    windows = squad_windows(words, [question], length=9, stride=3)  # [CLS] who [SEP], five words, [SEP]
    shown = [words.decode(row) for row in windows.inputs["input_ids"]]
    parts = ["the man went to the", "to the store and bought", "and bought a gallon of", "gallon of milk"]
    assert shown == [f"who {part}" for part in parts]
    assert windows.inputs["token_type_ids"].tolist() == [[0] * 3 + [1] * 6] * 3 + [[0] * 3 + [1] * 4 + [0] * 2]
    assert windows.inputs["attention_mask"].sum(1).tolist() == [9, 9, 9, 7]
    kept = [[MILK[a:b] for (a, b), best in zip(o, c) if best] for o, c in zip(windows.offsets, windows.central)]
    assert kept == [["the", "man", "went", "to"], ["the", "store", "and"], ["bought", "a", "gallon"], ["of", "milk"]]
    assert windows.targets["start_positions"].tolist() == [0, 0, 4, 0]  # only the third holds all of it
    assert windows.targets["end_positions"].tolist() == [0, 0, 6, 0]
    assert windows.question.tolist() == [0] * 4


@pytest.mark.parametrize("kind", ["trained", "bytebpe"])
def test_every_answer_comes_back_as_its_text(kind, oracles):
    tokenizer = train_wordpiece(TEXTS, 90) if kind == "trained" else load_tokenizer(oracles / "tokenizers" / kind)
    spans = [(t, match) for t in TEXTS for match in re.finditer(r"\w+", t)]
    questions = [Question(str(i), "what?", t, ((m.group(), m.start()),)) for i, (t, m) in enumerate(spans)]
    for length, stride in ((384, 128), (48, 12)):
        windows = squad_windows(tokenizer, questions, length=length, stride=stride)
        starts, ends = windows.targets.values()
        held = {i: (a, b) for i, (a, b) in enumerate(zip(starts, ends)) if a}
        assert {windows.question[i] for i in held} == set(range(len(questions)))
        whole = np.ones_like(windows.central)
        for i, (a, b) in held.items():  # in any window that holds it
            q = questions[windows.question[i]]
            said = q.context[windows.offsets[i, a, 0] : windows.offsets[i, b, 1]]
            assert said == q.answers[0][0]
        for number in range(len(questions)):  # each token of the context is central once
            mine = windows.question == number
            places = [tuple(p) for p in windows.offsets[mine][windows.central[mine]]]
            every = {tuple(p) for p in windows.offsets[mine][whole[mine]] if p[0] >= 0}
            assert set(places) == every
            if kind == "trained":
                assert len(places) == len(every)


def test_windows_are_hugging_faces_pairs(words):
    """Where a context fits, a row is the tokenizer's own pair; questions are cut."""
    question = Question("q", "who what who", MILK, ())
    windows = squad_windows(words, [question], length=24, question_length=2)
    row = words(["who what"], [MILK], max_length=24, buckets=(24,))
    for name, value in row.items():
        np.testing.assert_array_equal(windows.inputs[name], value)
    assert windows.targets["start_positions"].tolist() == [0]


def test_best_spans(words):
    q = Question("q", "who", MILK, (("store", MILK.index("store")),))
    w = squad_windows(words, [q, q], length=9, stride=3)
    logits = peaked(w, {1: (5, 5), 5: (4, 5)})
    logits[2, 4, 0], logits[2, 6, 1] = 3, 3  # bought a gallon: 6
    logits[:, 0] = 1.5  # no answer: 3 in all windows but one
    logits[3, 0] = 1
    found = best_spans(w, [q, Question("r", "who", MILK, ())], logits)
    assert [(s.text, s.score) for s in found["q"][:2]] == [("store", 10), ("bought a gallon", 6)]
    assert found["q"][-1].text == "" and found["q"][-1].score == 2
    assert found["r"][0].text == "the store" and found["r"][-1].score == 3
    assert len({s.text for s in found["q"]}) == len(found["q"]) <= 21
    assert max(len(s.text.split()) for s in best_spans(w, [q, q], logits, max_tokens=2)["q"]) == 2
    assert chosen_answers(found) == {"q": "store", "r": "the store"}
    assert chosen_answers(found, -7.5) == {"q": "store", "r": ""}  # 2 - 10 = -8, 3 - 10 = -7
    assert chosen_answers(found, 0.0) == chosen_answers(found)


def test_a_span_begins_where_its_window_sees_most(words):
    q = Question("q", "who", MILK, ())
    w = squad_windows(words, [q], length=9, stride=3)
    logits = np.zeros((4, 9, 2))
    logits[1, 7, 0] = 5  # "bought", at the end of the second window; the third sees more of it
    logits[2, 4] = 1
    assert best_spans(w, [q], logits)["q"][0] == Span("bought", 2.0)
    with pytest.raises(ValueError, match=r"logits: expected \(4, 9, 2\), got \(4, 9\)"):
        best_spans(w, [q], logits[..., 0])


def test_scores_are_the_official_ones():
    assert normal_answer("The  Denver-Broncos, (an) A.F.C. team!") == "denverbroncos afc team"
    q = [
        Question("a", "", "", (("Denver Broncos", 0), ("The Broncos", 0))),
        Question("b", "", "", (("gold, silver and gold", 0),)),
        Question("c", "", "", ()),
    ]
    scores = squad_scores({"a": "the broncos", "b": "gold gold coins", "c": ""}, q)
    # a: 1, 1. b: 0, words shared 2 of 3 and of 4: 2 · 2 / 7. c: 1, 1
    assert scores == pytest.approx({
        "exact_match": 2 / 3, "f1": (2 + 4 / 7) / 3, "f1_answerable": (1 + 4 / 7) / 2, "f1_unanswerable": 1
    })  # fmt: skip
    assert squad_scores({"a": "Broncos of Denver"}, q[:1]) == pytest.approx({"exact_match": 0, "f1": 0.8})
    assert squad_scores({"c": "x"}, q[2:]) == {"exact_match": 0, "f1": 0}
    assert squad_scores({"b": ""}, q[1:2]) == {"exact_match": 0, "f1": 0}
    with pytest.raises(ValueError, match="answers: none for question b"):
        squad_scores({"a": ""}, q)


def test_files(tmp_path):
    qas = [
        {"id": "1", "question": " Who? ", "answers": [{"text": "man", "answer_start": 4}]},
        {"id": "2", "question": "Why?", "is_impossible": True, "answers": [], "plausible_answers": [{"text": "x"}]},
    ]
    data = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": MILK, "qas": qas}]}]}
    path = tmp_path / "dev-v2.0.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump(data, file)
    assert read_squad(path) == [Question("1", "Who?", MILK, (("man", 4),)), Question("2", "Why?", MILK, ())]
    assert [q.id for q in read_squad(path, 1)] == ["1"]
    plain = tmp_path / "dev.json"
    qas[0]["answers"][0]["answer_start"] = 5
    plain.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="question 1: its context does not hold 'man' at character 5"):
        read_squad(plain)
    for text, match in (("{", "not valid JSON"), ("[]", "not SQuAD's layout"), ('{"data": []}', "no questions")):
        plain.write_text(text)
        with pytest.raises(ValueError, match=match):
            read_squad(plain)
    with pytest.raises(ValueError, match="none.json is no file; download train-v1.1.json"):
        read_squad(tmp_path / "none.json")


def test_errors(words):
    question = Question("q", "who what", MILK, ())
    with pytest.raises(ValueError, match="questions: there are none"):
        squad_windows(words, [])
    with pytest.raises(ValueError, match="stride, question_length: expected 1 or more, got 0, 64"):
        squad_windows(words, [question], stride=0)
    with pytest.raises(ValueError, match="length=5: no room beside 5 tokens of question q"):
        squad_windows(words, [question], length=5)
    with pytest.raises(ValueError, match=r"tokenizer: spans need one that puts \[CLS\]"):
        squad_windows(train_bpe([MILK], 300), [question], length=64)
