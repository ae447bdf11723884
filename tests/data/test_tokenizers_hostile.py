"""Damaged tokenizer files: each loads and works, or is a ValueError that names the place. Nothing else, and soon."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformers.data.tokenizers import load_tokenizer

KINDS = ("wordpiece-lower", "bytebpe", "unigram-xlmr")
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 2**31, 2**32, 2**63, 2**64, 10**400, 0.5, float("nan"), float("inf")]),
    st.text(max_size=5),
    st.lists(st.text(max_size=2), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@pytest.fixture(scope="module")
def specs(oracles):
    """{kind: tokenizer.json with the vocabulary cut to its first 300 entries}, small enough to load many times."""
    out = {}
    for kind in KINDS:
        spec = json.loads((oracles / "tokenizers" / kind / "tokenizer.json").read_text())
        vocab = spec["model"]["vocab"]
        if isinstance(vocab, dict):
            vocab = {token: i for token, i in vocab.items() if i < 300}
        spec["model"]["vocab"] = vocab if isinstance(vocab, dict) else vocab[:300]
        if "merges" in spec["model"]:
            pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in spec["model"]["merges"]]
            spec["model"]["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= vocab.keys()]
        out[kind] = spec
    return out


def places(value, path=()):
    """Every place in a JSON value, as the keys that lead to it; of a long list or object only the first few entries."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:12]:
        yield from places(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def check_loads_or_names(directory) -> None:
    try:
        tokenizer = load_tokenizer(directory)
    except ValueError as error:
        assert str(directory) in str(error) or "padding_side" in str(error) or "truncation_side" in str(error)
        return
    try:
        tokenizer.decode(range(0, 300, 7))
        out = tokenizer.offsets(["the Hound <mask> of é", ""], ["日本 [MASK]", "b"], max_length=12)
    except ValueError as error:
        assert str(error).startswith(("texts", "ids", "rows", "max_length"))
    else:
        assert out["input_ids"].shape == out["attention_mask"].shape and out["input_ids"].shape[1] <= 12


@settings(max_examples=150)
@given(data=st.data())
def test_any_value_of_tokenizer_json_may_be_wrong(specs, tmp_path_factory, data):
    spec = specs[data.draw(st.sampled_from(KINDS))]
    directory = tmp_path_factory.getbasetemp() / "value"
    directory.mkdir(exist_ok=True)
    damaged = replaced(spec, data.draw(st.sampled_from(list(places(spec)))), data.draw(ODD))
    (directory / "tokenizer.json").write_text(json.dumps(damaged))
    check_loads_or_names(directory)


@settings(max_examples=100)
@given(data=st.data())
def test_any_byte_of_tokenizer_json_may_be_wrong(specs, tmp_path_factory, data):
    content = bytearray(json.dumps(specs[data.draw(st.sampled_from(KINDS))]).encode())
    directory = tmp_path_factory.getbasetemp() / "bytes"
    directory.mkdir(exist_ok=True)
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    (directory / "tokenizer.json").write_bytes(content[:cut])
    check_loads_or_names(directory)


NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
KEYS = [f"{name}_token" for name in NAMES] + [
    "tokenizer_class",
    "model_max_length",
    "max_len",
    "do_lower_case",
    "strip_accents",
    "tokenize_chinese_chars",
    "add_prefix_space",
    "add_bos_token",
    "padding_side",
    "truncation_side",
    "additional_special_tokens",
    "extra_special_tokens",
    "added_tokens_decoder",
]
TOKEN = st.fixed_dictionaries({"content": ODD}, optional={"lstrip": ODD, "normalized": ODD, "special": ODD})


@settings(max_examples=150)
@given(
    kind=st.sampled_from([*KINDS, "vocab.txt", "merges"]),
    config=st.dictionaries(st.sampled_from(KEYS), st.one_of(ODD, TOKEN, st.lists(TOKEN, max_size=2)), max_size=4),
    added=st.dictionaries(st.text(max_size=3), ODD, max_size=2),
    sentence=st.dictionaries(st.sampled_from(["max_seq_length", "do_lower_case"]), ODD),
)
def test_any_configuration_may_be_wrong(specs, tmp_path_factory, kind, config, added, sentence):
    directory = tmp_path_factory.getbasetemp() / "configuration"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    if kind == "vocab.txt":
        (directory / "vocab.txt").write_text("\n".join(specs[KINDS[0]]["model"]["vocab"]))
    elif kind == "merges":
        (directory / "vocab.json").write_text(json.dumps(specs[KINDS[1]]["model"]["vocab"]))
        merges = specs[KINDS[1]]["model"]["merges"]
        (directory / "merges.txt").write_text("\n".join(" ".join(pair) for pair in merges))
    else:
        (directory / "tokenizer.json").write_text(json.dumps(specs[kind]))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if added:
        (directory / "added_tokens.json").write_text(json.dumps(added))
    (directory / "sentence_bert_config.json").write_text(json.dumps(sentence))
    check_loads_or_names(directory)


@settings(max_examples=60)
@given(vocab=st.binary(max_size=80), merges=st.binary(max_size=80))
def test_any_bytes_as_vocabulary(tmp_path_factory, vocab, merges):
    directory = tmp_path_factory.getbasetemp() / "vocabulary"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    (directory / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (directory / "merges.txt").write_bytes(b"a b\n" + merges)
    check_loads_or_names(directory)
    (directory / "vocab.json").unlink()
    (directory / "config.json").write_text('{"model_type": "bert"}')
    (directory / "vocab.txt").write_bytes(b"[UNK]\n[CLS]\n[SEP]\n" + vocab)
    check_loads_or_names(directory)
