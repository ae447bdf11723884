"""Tokenizers against the outputs of Hugging Face's, for every file layout, and against malformed files."""

import json
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformers.data.tokenizers import (
    length_buckets,
    load_tokenizer,
    train_bpe,
    train_wordpiece,
)

KINDS = ("wordpiece-lower", "bytebpe", "unigram-xlmr")


@pytest.fixture(scope="module", params=KINDS)
def case(request, oracles):
    directory = oracles / "tokenizers" / request.param
    return load_tokenizer(directory), json.loads((directory / "cases.json").read_text())


def check_row(out: dict, want: dict) -> None:
    """One unpadded row of `Tokenizer.offsets` against one entry of cases.json."""
    row = {key: value[0].tolist() for key, value in out.items()}
    assert row["input_ids"] == want["ids"]
    assert row["token_type_ids"] == want["type_ids"]
    assert row["offsets"] == want["offsets"]
    assert row["word_ids"] == [-1 if word is None else word for word in want["word_ids"]]
    assert row["special_tokens_mask"] == want["special"]
    assert set(row["attention_mask"]) == {1}
    in_text = [special == 0 for special in want["special"]]
    assert [sequence >= 0 for sequence in row["sequence_ids"]] == in_text


def test_single_texts_equal_the_oracle(case):
    tokenizer, cases = case
    for want in cases["single"]:
        check_row(tokenizer.offsets([want["text"]]), want)
        assert tokenizer.encode(want["text"]) == want["ids"]
        assert tokenizer.tokenize(want["text"]) == want["tokens"]
        assert tokenizer.encode(want["text"], add_special_tokens=False) == want["nospecial"]
        assert tokenizer.decode(want["ids"]) == want["decode"]


def test_pairs_equal_the_oracle(case):
    tokenizer, cases = case
    for want in cases["pair"]:
        check_row(tokenizer.offsets([want["a"]], [want["b"]]), want)
    for want in cases["pair_truncated"]["items"]:
        check_row(tokenizer.offsets([want["a"]], [want["b"]], max_length=cases["pair_truncated"]["max_length"]), want)


def test_batches_equal_the_oracle(case):
    tokenizer, cases = case
    want = cases["batch"]
    out = tokenizer(want["texts"], max_length=want["max_length"])
    assert out["input_ids"].tolist() == want["ids"]
    assert out["attention_mask"].tolist() == want["attention_mask"]
    assert all(value.dtype == np.int32 for value in out.values())


def test_left_padding_moves_each_row_and_nothing_else(case):
    tokenizer, cases = case
    texts = cases["batch"]["texts"]
    right, left = (tokenizer.offsets(texts, max_length=16, padding_side=side) for side in ("right", "left"))
    for i, length in enumerate(right["attention_mask"].sum(1)):
        for key in right:
            np.testing.assert_array_equal(right[key][i, :length], left[key][i, left[key].shape[1] - length :])
        assert set(left["attention_mask"][i, : 16 - length]) <= {0}
        assert set(left["input_ids"][i, : 16 - length]) <= {tokenizer.pad_id}


def test_special_tokens_are_found_without_a_configuration(oracles):
    bert, roberta = (load_tokenizer(oracles / "tokenizers" / kind) for kind in KINDS[:2])
    assert (bert.cls_token, bert.sep_token, bert.pad_id, bert.mask_id, bert.unk_id) == ("[CLS]", "[SEP]", 0, 4, 1)
    assert (bert.bos_id, bert.eos_id) == (None, None)
    assert (roberta.cls_id, roberta.sep_id, roberta.pad_id, roberta.bos_id, roberta.eos_id) == (0, 2, 1, 0, 2)


# --- the other file layouts -----------------------------------------------------------------------------------------


def write(directory: Path, **files) -> Path:
    """Files by name (`__` for a dot), as text or as JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return directory


def model_of(oracles: Path, kind: str) -> dict:
    return json.loads((oracles / "tokenizers" / kind / "tokenizer.json").read_text())["model"]


def vocab_txt(oracles: Path) -> str:
    vocab = model_of(oracles, "wordpiece-lower")["vocab"]
    return "".join(f"{token}\n" for token in sorted(vocab, key=vocab.get))


def merges_txt(oracles: Path) -> str:
    merges = model_of(oracles, "bytebpe")["merges"]
    return "#version: 0.2\n" + "".join(f"{' '.join(m) if isinstance(m, list) else m}\n" for m in merges)


def cases_of(oracles: Path, kind: str) -> list[dict]:
    return json.loads((oracles / "tokenizers" / kind / "cases.json").read_text())["single"]


def test_vocab_txt_gives_the_same_tokenizer_as_tokenizer_json(oracles, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, vocab__txt=vocab_txt(oracles), config__json={"model_type": "bert"}))
    for want in cases_of(oracles, "wordpiece-lower"):
        check_row(tokenizer.offsets([want["text"]]), want)


def test_vocab_txt_with_case_kept(oracles, tmp_path):
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    cased = load_tokenizer(write(tmp_path / "txt", vocab__txt=vocab_txt(oracles), tokenizer_config__json=config))
    assert cased.unk_id in cased.encode("The") and cased.unk_id not in cased.encode("the")
    # tokenizer_config.json wins over tokenizer.json
    shutil.copytree(oracles / "tokenizers" / "wordpiece-lower", tmp_path / "json")
    again = load_tokenizer(write(tmp_path / "json", tokenizer_config__json=config))
    for text in ("The Hound", "naïve ÀÉ", "日本 x"):
        assert again.encode(text) == cased.encode(text)


def test_vocab_json_and_merges_give_roberta(oracles, tmp_path):
    directory = write(
        tmp_path,
        vocab__json=model_of(oracles, "bytebpe")["vocab"],
        merges__txt=merges_txt(oracles),
        tokenizer_config__json={"tokenizer_class": "RobertaTokenizer", "model_max_length": 512},
    )
    tokenizer = load_tokenizer(directory)
    assert tokenizer.max_length == 512
    for want in cases_of(oracles, "bytebpe"):
        if "<mask>" not in want["text"]:
            check_row(tokenizer.offsets([want["text"]]), want)
    # RoBERTa's mask takes the blank before it, so that a masked word stands where the word stood.
    a, b = (tokenizer.encode(text, add_special_tokens=False) for text in ("a", " b"))
    assert tokenizer.encode("a <mask> b") == [0, *a, 4, *b, 2]


def test_vocab_json_and_merges_give_gpt2_and_opt(oracles, tmp_path):
    vocab = model_of(oracles, "bytebpe")["vocab"]
    gpt2 = load_tokenizer(
        write(
            tmp_path / "gpt2",
            vocab__json=vocab | {"<|endoftext|>": len(vocab)},
            merges__txt=merges_txt(oracles),
            config__json={"model_type": "gpt2"},
        )
    )
    opt = load_tokenizer(
        write(
            tmp_path / "opt",
            vocab__json=vocab,
            merges__txt=merges_txt(oracles),
            tokenizer_config__json={"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}
            | {"bos_token": {"content": "</s>", "normalized": True}, "eos_token": "</s>", "unk_token": "</s>"}
            | {"pad_token": "<pad>"},
        )
    )
    assert (gpt2.bos_id, gpt2.eos_id, gpt2.pad_id, gpt2.pad_token) == (len(vocab), len(vocab), len(vocab), None)
    assert (opt.bos_id, opt.eos_id, opt.pad_id) == (2, 2, 1)
    for want in cases_of(oracles, "bytebpe"):
        if "<" not in want["text"]:
            assert gpt2.encode(want["text"]) == want["nospecial"]
            assert opt.encode(want["text"]) == [2, *want["nospecial"]]
    assert opt(["a"], ["b"])["input_ids"].tolist() == [[2, *gpt2.encode("a"), 2, *gpt2.encode("b")]]


def test_leading_space_of_the_configuration_wins(oracles, tmp_path):
    shutil.copytree(oracles / "tokenizers" / "bytebpe", tmp_path / "t")
    plain = load_tokenizer(tmp_path / "t")
    spaced = load_tokenizer(write(tmp_path / "t", tokenizer_config__json={"add_prefix_space": True}))
    assert spaced.encode("the end") == plain.encode(" the end") != plain.encode("the end")
    assert spaced.offsets(["the end"])["offsets"][0, 1].tolist() == [0, 3]


def test_added_tokens_get_their_ids(oracles, tmp_path):
    added = {
        "1500": {"content": "[E1]", "special": True},
        "1501": {"content": "Neoplasia", "special": False, "normalized": True},
    }
    config = {"tokenizer_class": "BertTokenizer", "added_tokens_decoder": added, "pad_token": "[FILL]"}
    config["additional_special_tokens"] = ["[E1]", "[E2]"]
    tokenizer = load_tokenizer(write(tmp_path, vocab__txt=vocab_txt(oracles), tokenizer_config__json=config))
    assert tokenizer.encode("[E1]neoplasia [E2]", add_special_tokens=False) == [1500, 1501, 1503]
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (1502, 1504)
    config["added_tokens_decoder"] = {"1700": {"content": "[E1]"}}
    with pytest.raises(ValueError, match=r"'\[E1\]' should have id 1700, the vocabulary has 1500"):
        load_tokenizer(write(tmp_path, tokenizer_config__json=config))


def test_sentence_transformers_length_wins(oracles, tmp_path):
    shutil.copytree(oracles / "tokenizers" / "wordpiece-lower", tmp_path / "m")
    config = {"model_max_length": 512}
    assert load_tokenizer(write(tmp_path / "m", tokenizer_config__json=config)).max_length == 512
    sentence = {"max_seq_length": 8, "do_lower_case": False}
    tokenizer = load_tokenizer(write(tmp_path / "m", sentence_bert_config__json=sentence))
    assert tokenizer.max_length == 8
    assert tokenizer(["a " * 50])["input_ids"].shape == (1, 8)
    assert len(tokenizer.encode("a " * 50)) == 52
    assert load_tokenizer(write(tmp_path / "m", sentence_bert_config__json={"max_seq_length": None})).max_length == 512
    config = {"model_max_length": 1e30}
    (tmp_path / "m" / "sentence_bert_config.json").unlink()
    assert load_tokenizer(write(tmp_path / "m", tokenizer_config__json=config)).max_length is None


def test_sentence_transformers_lower_casing_and_module_directory(oracles, tmp_path):
    shutil.copytree(oracles / "tokenizers" / "bytebpe", tmp_path / "0_Transformer")
    plain = load_tokenizer(tmp_path / "0_Transformer")
    write(tmp_path / "0_Transformer", sentence_bert_config__json={"max_seq_length": 99, "do_lower_case": True})
    write(tmp_path, modules__json=[{"idx": 0, "path": "0_Transformer"}])
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("The HOUND") == plain.encode("the hound")
    assert tokenizer.max_length == 99
    write(tmp_path, modules__json=[{"idx": 0, "path": "../elsewhere"}])
    with pytest.raises(ValueError, match="leads out of the directory"):
        load_tokenizer(tmp_path)


def test_real_minilm_ids_equal_the_oracle(minilm, oracles):
    want = json.loads((oracles / "tokenizers" / "minilm_texts.json").read_text())
    tokenizer = load_tokenizer(minilm)
    assert (tokenizer.max_length, tokenizer.vocab_size, tokenizer.pad_id) == (256, 30522, 0)
    out = tokenizer(want["texts"])
    assert [row[:n].tolist() for row, n in zip(out["input_ids"], out["attention_mask"].sum(1))] == want["ids"]
    assert [tokenizer.tokenize(text)[:255] for text in want["texts"]] == [tokens[:255] for tokens in want["tokens"]]


# --- saving, training, using ----------------------------------------------------------------------------------------


def test_saved_tokenizers_load_equal(case, tmp_path):
    tokenizer, cases = case
    tokenizer.save(tmp_path / "a")
    again = load_tokenizer(tmp_path / "a")
    again.save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for want in cases["single"]:
        check_row(again.offsets([want["text"]]), want)
    for name in ("pad", "bos", "eos", "unk", "sep", "cls", "mask"):
        assert getattr(again, f"{name}_id") == getattr(tokenizer, f"{name}_id")


def test_pickled_tokenizers_stay_equal(case):
    tokenizer, cases = case
    again = pickle.loads(pickle.dumps(tokenizer))
    first, second = (t(cases["batch"]["texts"])["input_ids"] for t in (tokenizer, again))
    np.testing.assert_array_equal(first, second)


CORPUS = ["the quick brown fox", "the lazy dog, the end", "quick quick brown dogs"] * 20


def test_trained_bpe_knows_every_text(tmp_path):
    tokenizer = train_bpe(CORPUS, 300, max_length=64)
    assert 257 < tokenizer.vocab_size <= 300
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.pad_id == 0
    for text in (*CORPUS[:3], "zwölf Boxkämpfer 日本 🙂\n\t  x", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the quick")) < len("the quick")
    assert train_bpe(iter(CORPUS), 300).core.to_str() == tokenizer.core.to_str()
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.max_length == 64 and again.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])
    assert again.pad_token is None


@given(st.text())
def test_byte_level_bpe_is_lossless(text):
    tokenizer = train_bpe_once()
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def train_bpe_once(made=[]):  # noqa: B006 (kept between examples)
    if not made:
        made.append(train_bpe(CORPUS, 300))
    return made[0]


def test_trained_wordpiece_frames_and_lower_cases(tmp_path):
    tokenizer = train_wordpiece(CORPUS, 60)
    assert tokenizer.encode("The  FOX") == tokenizer.encode("the fox")
    pair = tokenizer(["the fox"], ["the dog"])
    ids = pair["input_ids"][0].tolist()
    assert ids[0] == tokenizer.cls_id and ids.count(tokenizer.sep_id) == 2
    first = ids.index(tokenizer.sep_id)
    assert pair["token_type_ids"][0].tolist() == [0] * (first + 1) + [1] * (len(ids) - first - 1)
    assert train_wordpiece(CORPUS, 60).core.to_str() == tokenizer.core.to_str()
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("The fox") == tokenizer.encode("the fox")
    cased = train_wordpiece(CORPUS, 60, lowercase=False)
    assert cased.encode("THE") != cased.encode("the")
    assert len(tokenizer.encode("quick")) < len("quick") and tokenizer.decode(tokenizer.encode("quick")) == "quick"


def test_training_is_the_same_in_every_process(tmp_path):
    """The library's hash tables are seeded per process: ties must not be broken by their order."""
    code = (
        "import hashlib; from jaxformers.data.tokenizers import train_bpe, train_wordpiece; "
        "texts = [' '.join(str(i * 7919 % 1000) + 'ab'[i % 2] for i in range(j, j + 30)) for j in range(40)]; "
        "made = [train(texts, 400).core.to_str() for train in (train_bpe, train_wordpiece)]; "
        "print([hashlib.sha256(text.encode()).hexdigest() for text in made])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert len({run.stdout for run in runs}) == 1


def test_buckets_bound_the_shapes(oracles):
    tokenizer = load_tokenizer(oracles / "tokenizers" / "bytebpe")
    assert length_buckets(100) == (16, 24, 32, 48, 64, 96, 100)
    assert length_buckets(8) == (8,)
    assert length_buckets(40, smallest=8, per_doubling=4) == (8, 10, 12, 14, 16, 20, 24, 28, 32, 40)
    buckets = length_buckets(128)
    for n in (1, 14, 15, 40, 126):
        out = tokenizer(["a" + " b" * (n - 1)], buckets=buckets)
        assert out["attention_mask"].sum() == n + 2
        assert out["input_ids"].shape[1] == min(b for b in buckets if b >= n + 2)
    with pytest.raises(ValueError, match="a row of 129 tokens is longer than the largest, 128; give max_length"):
        tokenizer(["a" + " b" * 126], buckets=buckets)
    assert tokenizer(["a" + " b" * 126], max_length=128, buckets=buckets)["input_ids"].shape == (1, 128)
    assert tokenizer([], buckets=buckets)["input_ids"].shape == (0, 16)
    assert tokenizer([])["input_ids"].shape == (0, 0)


def test_threads_do_not_mix_their_lengths(oracles):
    tokenizer = load_tokenizer(oracles / "tokenizers" / "bytebpe")
    texts, wrong = ["word " * 100] * 20, []

    def work(length):
        for _ in range(30):
            if tokenizer(texts, max_length=length)["input_ids"].shape != (20, length):
                wrong.append(length)

    threads = [threading.Thread(target=work, args=(length,)) for length in (5, 17, 60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(tokenizer.encode(texts[0])) > 60


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: t("one text"), "texts: expected a sequence of strings, got a str"),
        (lambda t: t(["a", None]), "item 1 is None, a NoneType; expected a string"),
        (lambda t: t(["a", float("nan")]), "item 1 is nan, a float"),
        (lambda t: t(["a"], ["b", "c"]), "pairs: 2 for 1 texts"),
        (lambda t: t(["a"], [3]), "item 0 is 3, a int"),
        (lambda t: t(["ok", "a\ud800"]), "item 1 is not valid Unicode: a lone surrogate at character 1"),
        (lambda t: t(["a"], max_length=2), "max_length=2: no room beside 2 special tokens; give at least 3"),
        (lambda t: t(["a"], max_length=0), "max_length=0"),
        (lambda t: t(["a"], ["b"], max_length=4), "max_length=4: no room beside 4 special tokens"),
        (lambda t: t(["a"], padding_side="middle"), "padding_side='middle': expected 'right' or 'left'"),
        (lambda t: t(["a"], buckets=(0, 4)), "buckets=.* expected positive lengths"),
        (lambda t: t.decode([1, -100]), "ids: expected a vector of integers >= 0"),
        (lambda t: t.decode([[1]]), "ids: expected a vector of integers >= 0"),
        (lambda t: t.decode([0.5]), "ids: expected a vector of integers >= 0"),
        (lambda t: train_bpe(["a"], 200), "vocab_size=200: 256 bytes and 1 special tokens need 257"),
        (lambda t: train_wordpiece(["a"], 3), "vocab_size=3: special tokens and the characters of the texts need 6"),
        (lambda t: train_bpe(["a", 5], 300), "item 1 is 5, a int"),
        (lambda t: length_buckets(0), "max_length=0"),
    ],
)
def test_wrong_arguments_are_named(oracles, call, message):
    with pytest.raises(ValueError, match=message):
        call(load_tokenizer(oracles / "tokenizers" / "bytebpe"))


# --- malformed files ------------------------------------------------------------------------------------------------


def wordpiece(**changes) -> dict:
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    return {"model": model | {"max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "a": 1}} | changes}


MERGES = {"merges__txt": "#version: 0.2\na b\n", "config__json": {"model_type": "gpt2"}}
ABC = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "looked for tokenizer.json, vocab.json with merges.txt, and vocab.txt"),
        ({"spiece__model": "x"}, r"bare SentencePiece file \(spiece.model\)"),
        ({"tokenizer__json": ""}, "tokenizer.json: EOF"),
        ({"tokenizer__json": "{"}, "tokenizer.json: EOF"),
        ({"tokenizer__json": []}, "tokenizer.json: invalid type"),
        ({"tokenizer__json": {}}, "tokenizer.json: Model missing"),
        ({"tokenizer__json": '{"model":' * 5000}, "tokenizer.json: "),
        ({"tokenizer__json": wordpiece(vocab={"a": -1})}, "tokenizer.json: invalid value"),
        ({"tokenizer__json": wordpiece(vocab={"a": 2**60})}, "tokenizer.json: invalid value"),
        ({"tokenizer__json": wordpiece(vocab={"a": 1})}, r"tokenizer.json: the unknown token '\[UNK\]'"),
        ({"tokenizer__json": wordpiece(), "tokenizer_config__json": "{"}, "tokenizer_config.json: not valid JSON"),
        ({"tokenizer__json": wordpiece(), "tokenizer_config__json": "[" * 10**5}, "config.json: not valid JSON"),
        ({"tokenizer__json": wordpiece(), "tokenizer_config__json": [1]}, "config.json: expected a JSON object"),
        ({"tokenizer__json": wordpiece(), "tokenizer_config__json": {"pad_token": 7}}, "pad_token is 7"),
        ({"tokenizer__json": wordpiece(), "tokenizer_config__json": {"model_max_length": "x"}}, "length of 'x'"),
        ({"tokenizer__json": wordpiece(), "tokenizer_config__json": {"model_max_length": -5}}, "maximum length of -5"),
        ({"tokenizer__json": wordpiece(), "tokenizer_config__json": {"padding_side": "up"}}, "padding_side='up'"),
        ({"tokenizer__json": wordpiece(), "tokenizer_config__json": {"pad_token": "\ud800"}}, "surrogate|surrogates"),
        ({"tokenizer__json": wordpiece(), "tokenizer_config__json": {"added_tokens_decoder": {"x": 1}}}, "entry 'x'"),
        ({"tokenizer__json": wordpiece(), "added_tokens__json": {"x": "y"}}, "added_tokens.json: the id of 'x' is 'y'"),
        ({"tokenizer__json": wordpiece(), "sentence_bert_config__json": {"max_seq_length": 0}}, "maximum length of 0"),
        ({"vocab__txt": "a\nb\n"}, "vocab.txt of the family None"),
        ({"vocab__txt": "a\nb\n", "config__json": {"model_type": "esm"}}, "vocab.txt of the family 'esm'"),
        ({"vocab__txt": "[CLS]\n[SEP]\n"}, r"vocab.txt: the unknown token '\[UNK\]'"),
        ({"vocab__json": "[]", **MERGES}, "vocab.json: expected a JSON object"),
        ({"vocab__json": {"a": "0"}, **MERGES}, "vocab.json: the id of 'a' is '0'"),
        ({"vocab__json": {"a": 0, "b": 0}, **MERGES}, "vocab.json: 'a' and 'b' have the same id 0"),
        ({"vocab__json": ABC, **MERGES, "merges__txt": "a b\na  b\n"}, "merges.txt, line 2: expected two tokens"),
        ({"vocab__json": ABC, **MERGES, "merges__txt": "a c\n"}, "merges.txt: .*c"),
        ({"vocab__json": ABC, **MERGES, "config__json": {"model_type": "clip"}}, "of the family 'clip'"),
    ],
)
def test_malformed_files_are_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(write(tmp_path, **files))
    assert str(tmp_path) in str(error.value) or "padding_side" in message


def test_missing_directories_and_bytes_that_are_no_text(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such directory"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "vocab.txt").write_bytes(b"[UNK]\n\xff\xfe\n")
    with pytest.raises(ValueError, match="vocab.txt: not UTF-8 at byte 6"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(ValueError, match="tokenizer.json: cannot be read"):
        load_tokenizer(tmp_path)


def test_huge_files_are_refused_unread(tmp_path):
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(2**33)  # sparse
    with pytest.raises(ValueError, match="tokenizer.json: 8589934592 bytes"):
        load_tokenizer(tmp_path)
