"""Embedded text, files good and bad, and the windows that are cut for training, calibration and evaluation."""

import csv
import gzip
import json
import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformers.data.text import (
    english_text,
    join_documents,
    pack_blocks,
    python_sources,
    random_document_windows,
    random_windows,
    read_labelled,
    read_records,
    read_text,
    read_texts,
    read_token_ids,
    split_documents,
    wikitext_document,
    windows,
)


def test_embedded_text_is_real_and_repeatable():
    topics, sources = english_text(), python_sources(300_000)
    assert sum(map(len, topics.values())) > 300_000 and "statement" in topics["assert"]
    assert 250_000 < sum(len(text.encode()) for text in sources.values()) <= 300_000
    assert sum("def " in text for text in sources.values()) > len(sources) / 2
    assert len({name.split("/")[0] for name in sources}) > 5
    assert python_sources(300_000) == sources and english_text() == topics
    assert not any(re.search(r"site-packages|(^|/)tests?/", name) for name in sources)


@pytest.mark.parametrize("held_out", [0.05, 0.1, 0.5])
def test_split_is_by_document_and_of_the_size_asked(held_out):
    documents = python_sources(500_000)
    train, held = split_documents(documents, held_out)
    assert train.keys().isdisjoint(held) and train | held == documents
    total = sum(map(len, documents.values()))
    assert 0.5 * held_out < sum(map(len, held.values())) / total <= held_out
    shuffled = dict(random.Random(1).sample(list(documents.items()), len(documents)))
    assert split_documents(shuffled, held_out)[1].keys() == held.keys()


def test_split_leaves_neither_side_empty():
    assert split_documents({"a": "x" * 9, "b": "x" * 10}, 0.01) == ({"b": "x" * 10}, {"a": "x" * 9})
    train, held = split_documents({"a": "x", "b": "x"}, 0.999)
    assert len(train) == len(held) == 1
    for documents, held_out in (({"a": ""}, 0.5), ({"a": "", "b": ""}, 0), ({"a": "", "b": ""}, 1.0)):
        with pytest.raises(ValueError, match="documents|held_out"):
            split_documents(documents, held_out)


# --- files ----------------------------------------------------------------------------------------------------------

ROWS = [
    {"text": "plain", "label": "0"},
    {"text": 'a "quoted", cell\nof two lines', "label": "1"},
    {"text": "", "label": "é"},
]


def write_rows(path, rows, kind):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if kind == "jsonl":
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        else:
            writer = csv.DictWriter(file, rows[0], lineterminator="\r\n")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.csv.gz", "ROWS.CSV"])
def test_tables_come_back_as_written(tmp_path, name):
    path = write_rows(tmp_path / name, ROWS, "jsonl" if "jsonl" in name else "csv")
    assert read_records(path) == ROWS
    assert read_texts(path) == [row["text"] for row in ROWS]
    assert read_texts(path, "label") == ["0", "1", "é"]


def test_tsv_has_no_quoting(tmp_path):
    (tmp_path / "a.tsv").write_text('sentence\tlabel\nhe said "no\t1\n"yes\t0\n')
    assert read_records(tmp_path / "a.tsv") == [
        {"sentence": 'he said "no', "label": "1"},
        {"sentence": '"yes', "label": "0"},
    ]


def test_texts_and_pairs_with_labels(tmp_path):
    (tmp_path / "a.tsv").write_text("sentence\tlabel\nfine\t1\npoor\t0\n")
    rows = '{"text": "a", "text2": "b", "label": 2}', '{"text": "c", "text2": "d", "label": "0"}'
    (tmp_path / "b.jsonl").write_text("\n".join(rows))
    texts, labels = read_labelled(tmp_path / "a.tsv", "sentence")
    assert texts == ["fine", "poor"] and labels.dtype == np.int32 and labels.tolist() == [1, 0]
    texts, labels = read_labelled(tmp_path / "b.jsonl")
    assert texts == [("a", "b"), ("c", "d")] and labels.tolist() == [2, 0]
    for row, message in (
        ('{"text": "e", "label": 1}', "row 3 has no 'text2'"),
        ('{"text": "e", "text2": "f", "label": -1}', "row 3 has the label -1; expected a whole number"),
        ('{"text": "e", "text2": 4, "label": 1}', "row 3 has the text2 4; expected a string"),
    ):
        good = (tmp_path / "b.jsonl").read_text()
        (tmp_path / "c.jsonl").write_text(f"{good}\n{row}")
        with pytest.raises(ValueError, match=message):
            read_labelled(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="row 1 has no 'text'; it has 'sentence'"):
        read_labelled(tmp_path / "a.tsv")


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufefféin\r\nzwei\rdrei\n".encode())
    assert read_text(tmp_path / "a.txt") == "éin\nzwei\ndrei\n"
    assert read_texts(tmp_path / "a.txt") == ["éin", "zwei", "drei"]
    with gzip.open(tmp_path / "b.raw.gz", "wb") as file:
        file.write(b"x\n\ny")
    assert read_texts(tmp_path / "b.raw.gz") == ["x", "", "y"]


def test_long_cells_and_the_csv_limit_of_others(tmp_path):
    before = csv.field_size_limit()
    path = write_rows(tmp_path / "long.csv", [{"text": "x" * 300_000}], "csv")
    assert len(read_texts(path)[0]) == 300_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', "a.jsonl, line 3: expected a JSON object, found list"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not valid JSON"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "a.jsonl: row 1 has no 'text'; it has 'body', 'id'"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl: row 1 has the text 5; expected a string"),
        ("a.csv", b"text,label\nx\n", "a.csv, line 2: 1 cells, but the header has 2"),
        ("a.csv", b"text,label\nx,1,2\n", "a.csv, line 2: 3 cells, but the header has 2"),
        ("a.csv", b'text\n"open\n', "a.csv, line 2: unexpected end of data"),
        ("a.csv", b"text,text\n", "names a column twice"),
        ("a.csv", b"", "a.csv: empty"),
        ("a.csv", b"text\n\0\n", "a.csv: holds a zero byte"),
        ("a.tsv", b"text\tlabel\nx\n", "a.tsv, line 2: 1 cells, but the header has 2"),
        ("a.txt", b"ab\xff", "a.txt: not UTF-8 at byte 2"),
        ("a.txt.gz", b"plain", "a.txt.gz: damaged gzip archive"),
        ("a.txt.gz", gzip.compress(b"some text" * 100, mtime=0)[:-12], "a.txt.gz: damaged gzip archive"),
        ("a.txt.gz", gzip.compress(b"some text", mtime=0)[:12] + b"\xff\xff\xff\xff", "a.txt.gz: damaged gzip archive"),
    ],
)
def test_malformed_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_texts(tmp_path / name)


def test_missing_files_unknown_endings_and_archives_that_explode(tmp_path):
    with pytest.raises(ValueError, match="none.txt: cannot be read"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_text(tmp_path)
    with pytest.raises(ValueError, match="a.xlsx: expected a table"):
        read_records(tmp_path / "a.xlsx")
    with gzip.open(tmp_path / "bomb.txt.gz", "wb") as file:
        for _ in range(20):
            file.write(b" " * 1_000_000)
    with pytest.raises(ValueError, match="bomb.txt.gz: more than 1000000 bytes"):
        read_text(tmp_path / "bomb.txt.gz", max_bytes=1_000_000)


@given(st.binary(max_size=200), st.sampled_from([".jsonl", ".csv", ".tsv", ".txt", ".txt.gz", ".csv.gz", ".npy"]))
def test_any_bytes_are_read_or_refused_by_name(tmp_path_factory, data, ending):
    path = tmp_path_factory.getbasetemp() / f"any{ending}"
    path.write_bytes(data)
    try:
        found = read_token_ids(path) if ending == ".npy" else read_texts(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert ending == ".npy" or all(isinstance(text, str) for text in found)


@given(st.lists(st.fixed_dictionaries({"a": st.text(), "b": st.text()}), min_size=1))
def test_any_strings_survive_a_jsonl_table(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "any-rows.jsonl"
    write_rows(path, rows, "jsonl")
    assert read_records(path) == rows


def test_real_files(shared):
    data = shared / "data"
    dev = read_records(data / "sst2_small" / "dev.tsv.gz")
    assert len(dev) == 872 and {row["label"] for row in dev} == {"0", "1"}
    assert len(read_texts(data / "novels33_small" / "passages.jsonl.gz")) == 1580
    text = read_text(data / "wikitext2_raw" / "wiki.test.raw.gz")
    assert text.count("\n") == 2891 and "\r" not in text
    assert text.startswith(" = Robert Boulter = \n Robert Boulter is an English film")
    assert wikitext_document(text).count("\n") == 3 * 2891 - 2


def test_wikitext_rows_are_joined_as_published():
    text = " \n = Title = \n \n One\u2028line . \n Two . \n"
    rows = ["", " = Title = \n", "", " One\u2028line . \n", " Two . \n"]
    assert wikitext_document(text) == "\n\n".join(rows)


# --- windows --------------------------------------------------------------------------------------------------------


def test_windows_are_disjoint_and_drop_the_tail():
    out = windows(range(10), 3)
    assert out.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]] and out.dtype == np.int32
    assert join_documents([[1, 2], [], [3]], 9).tolist() == [1, 2, 9, 9, 3, 9]
    assert join_documents([[1, 2], [], [3]], None).tolist() == [1, 2, 3]
    assert join_documents([], 9).tolist() == []


def test_random_windows_are_those_of_python_random():
    ids = np.arange(1000) * 3
    random.seed(0)  # the published protocol, word for word
    want = []
    for _ in range(20):
        start = random.randint(0, len(ids) - 16 - 1)
        want.append(ids[start : start + 16].tolist())
    assert random_windows(ids, 20, 16).tolist() == want
    assert random_windows(ids, 20, 16, seed=1).tolist() != want
    assert random_windows(range(17), 5, 16).tolist() == [list(range(16))] * 5


def test_random_document_windows_are_those_of_python_random():
    documents = ["x" * n for n in (3, 50, 16, 17, 200, 8)]
    encode = lambda text: list(range(len(text)))
    random.seed(7)
    want = []
    for _ in range(30):
        while True:
            i = random.randint(0, len(documents) - 1)
            if len(documents[i]) > 16:
                break
        start = random.randint(0, len(documents[i]) - 16 - 1)
        want.append(list(range(start, start + 16)))
    assert random_document_windows(documents, encode, 30, 16, seed=7).tolist() == want
    with pytest.raises(ValueError, match="none of 6 has more than length=200 tokens"):
        random_document_windows(documents, encode, 2, 200)


@given(st.lists(st.lists(st.integers(5, 99), max_size=20), max_size=8), st.integers(3, 12))
def test_packed_blocks_hold_every_token_once(documents, length):
    out = pack_blocks(documents, length, cls_id=1, sep_id=2, pad_id=0)
    ids, mask = out["input_ids"], out["attention_mask"]
    stream = [token for document in documents for token in document]
    assert ids[(ids > 2)].tolist() == stream
    assert ids.shape == mask.shape == (-(-len(stream) // (length - 2)), length)
    np.testing.assert_array_equal(mask == 0, ids == 0)
    for row, real in zip(ids, mask.sum(1)):
        assert row[0] == 1 and row[real - 1] == 2 and (row == 1).sum() == (row == 2).sum() == 1
    assert (mask[:-1] == 1).all()


def test_token_files(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(12).reshape(3, 4))
    assert read_token_ids(tmp_path / "a.npy").tolist() == np.arange(12).reshape(3, 4).tolist()
    for array, message in (
        (np.arange(3), r"shape \(3,\); expected integers of shape \(samples, length\)"),
        (np.ones((2, 2)), "float64"),
        (np.full((2, 2), -1), "ids from -1 to -1"),
        (np.full((2, 2), 2**40), "ids from"),
        (np.zeros((0, 4), int), "expected integers"),
    ):
        np.save(tmp_path / "b.npy", array)
        with pytest.raises(ValueError, match=message):
            read_token_ids(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", np.array([{"a": 1}], object))
    with pytest.raises(ValueError, match="c.npy: no readable .npy array"):
        read_token_ids(tmp_path / "c.npy")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: windows(range(3), 4), "ids: 3 tokens, fewer than one window of length=4"),
        (lambda: windows([0.5], 1), "ids: expected a vector of token ids, got float64"),
        (lambda: windows([[1, 2]], 1), "ids: expected a vector"),
        (lambda: windows([1, 2], 0), "length=0: expected at least 1"),
        (lambda: random_windows(range(16), 1, 16), "ids: 16 tokens; windows of length=16 need at least 17"),
        (lambda: random_windows(range(17), 0, 16), "samples=0"),
        (lambda: random_document_windows([], len, 1, 1), "documents: there are none"),
        (lambda: pack_blocks([[1]], 2, cls_id=0, sep_id=1, pad_id=2), "length=2: a block is"),
        (lambda: python_sources(0), "max_bytes=0"),
        (lambda: python_sources(1), "no Python source of at most 1 bytes"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
