"""The command line on a small checkpoint: every verb, and errors as one line with exit code 2."""

import json

import jax
import numpy as np
import pytest

import jaxformers as jf
from jaxformers import cli
from jaxformers.data import text
from jaxformers.data.tokenizers import train_bpe
from jaxformers.models import llama

PROSE = list(text.english_text().values())[:6]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli") / "model"
    tokenizer = train_bpe(PROSE, 320)
    config = llama.Config(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    jf.save(jf.init(config, head="causal_lm", key=jax.random.key(0)), directory, tokenizer=tokenizer)
    return directory


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text("\n\n".join(PROSE))
    return file


def fails(capsys, *argv):
    """The one line that a failing command prints."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in argv])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("jaxformers: error: ") and said.err.count("\n") == 1
    return said.err


def test_info(checkpoint, capsys):
    cli.main(["info", str(checkpoint)])
    said = capsys.readouterr().out
    assert "layers.*.mlp.gate.kernel" in said and "2 ×" in said and "Llama, head: causal_lm" in said
    total = sum(int(np.prod(a.shape)) for a in jax.tree.leaves(jf.functional(jf.load(checkpoint))[1]))
    assert f"{total:,} parameters" in said


def test_generate_is_what_the_library_generates(checkpoint, capsys):
    cli.main(["generate", str(checkpoint), "The value", "An object", "--max-new-tokens", "4"])
    said = capsys.readouterr().out
    expected = jf.generate(jf.load(checkpoint), ["The value", "An object"], max_new_tokens=4)
    assert said == f"The value{expected[0]}\nAn object{expected[1]}\n"


def test_sampling_follows_its_seed(checkpoint, capsys):
    said = []
    for seed in (1, 1, 2):
        argv = ["generate", str(checkpoint), "The", "--max-new-tokens", "8", "--temperature", "1", "--seed", str(seed)]
        cli.main(argv)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_settings_of_generate_reach_the_library(checkpoint, capsys):
    model = jf.load(checkpoint)
    free = jf.generate(model, "The value", max_new_tokens=12)
    for flags, settings in (
        (["--num-beams", "3", "--length-penalty", "2", "--early-stopping", "never"],
         dict(num_beams=3, length_penalty=2.0, early_stopping="never")),
        (["--repetition-penalty", "1.7", "--stop", free[4:6]], dict(repetition_penalty=1.7, stop_sequences=free[4:6])),
        (["--temperature", "1", "--min-p", "0.3", "--seed", "3"],
         dict(temperature=1.0, min_p=0.3, key=jax.random.key(3))),
    ):  # fmt: skip
        cli.main(["generate", str(checkpoint), "The value", "--max-new-tokens", "12", *flags])
        expected = jf.generate(model, "The value", max_new_tokens=12, **settings)
        assert capsys.readouterr().out == f"The value{expected}\n"


@pytest.mark.parametrize("stops", [False, True])
def test_streamed_text_is_the_whole_text(checkpoint, capsys, monkeypatch, stops):
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *what, end="\n", **_: pieces.append("".join(what) + end))
    free = jf.generate(jf.load(checkpoint), "The value", max_new_tokens=12)
    stop = ["--stop", free[5:8]] if stops else []
    cli.main(["generate", str(checkpoint), "The value", "--max-new-tokens", "12", "--stream", *stop])
    text = free[: free.index(free[5:8])] if stops else free
    assert "".join(pieces) == f"The value{text}\n"
    assert len([piece for piece in pieces if piece.strip()]) > (1 if stops else 3)


def test_perplexity(checkpoint, prose, capsys):
    cli.main(["perplexity", str(checkpoint), "--text", str(prose), "--length", "32"])
    found = json.loads(capsys.readouterr().out)
    vocab = jf.load(checkpoint).config.vocab_size
    assert found["length"] == 32 and found["windows"] == found["tokens"] // 32
    assert 0.5 * vocab < found["perplexity"] < 2 * vocab  # an untrained model knows nothing


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "npy"])
def test_quantize_takes_every_kind_of_calibration(checkpoint, prose, tmp_path, capsys, suffix):
    file = tmp_path / f"calibration.{suffix}"
    if suffix == "txt":
        file.write_text(prose.read_text())
    elif suffix == "jsonl":
        file.write_text("\n".join(json.dumps({"text": t}) for t in PROSE))
    else:
        np.save(file, np.arange(8 * 32).reshape(8, 32) % 300)
    cli.main([
        "quantize", str(checkpoint), "--out", str(tmp_path / "small"), "--calibration", str(file), "--group-size", "32",
        "--samples", "8", "--act-order", "--no-sym",
    ])  # fmt: skip
    assert "layers.0.attention.query" in capsys.readouterr().out
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["desc_act"], config["sym"]) == (4, 32, True, False)
    assert jf.generate(jf.load(tmp_path / "small"), "The", max_new_tokens=2)


def test_embed_and_link(minilm, tmp_path, capsys):
    cli.main(["embed", "all-MiniLM-L6-v2", "a cat", "a kitten", "tax law"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    a, b, c = (np.array(row["embedding"]) for row in rows)
    assert a @ b > a @ c
    (tmp_path / "left.csv").write_text("name,price\nApple iPhone 15,900\nGarden hose,20\n")
    (tmp_path / "right.csv").write_text("name\nhose for the garden\nsmartphone by Apple\n")
    cli.main(["link", str(tmp_path / "left.csv"), str(tmp_path / "right.csv"), "--on", "name", "--out",
              str(tmp_path / "out.csv")])  # fmt: skip
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert "smartphone by Apple" in lines[1] and "hose for the garden" in lines[2]


def test_errors_are_one_line(checkpoint, prose, tmp_path, capsys):
    assert "no such directory" in fails(capsys, "info", tmp_path / "nothing")
    assert "texts" in fails(capsys, "embed", checkpoint)
    assert "calibration" in fails(capsys, "quantize", checkpoint, "--out", tmp_path / "o")
    assert "damp" in fails(capsys, "quantize", checkpoint, "--out", tmp_path / "o", "--calibration", prose, "--damp", 2)
    assert "does not exist" in fails(capsys, "perplexity", checkpoint, "--text", tmp_path / "nothing.txt")
    assert "temperature" in fails(capsys, "generate", checkpoint, "The", "--temperature", "-1")
    assert "prompts" in fails(capsys, "generate", checkpoint)
    assert "stream" in fails(capsys, "generate", checkpoint, "a", "b", "--stream")
    assert "num_beams" in fails(capsys, "generate", checkpoint, "a", "--length-penalty", "2")
    assert "cannot be read as CSV" in fails(capsys, "link", tmp_path / "a.csv", tmp_path / "b.csv")


@pytest.mark.parametrize("verb", [verb.__name__.replace("_", "-") for verb in cli.VERBS])
def test_help_of_each_verb_explains_its_arguments(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "usage: jaxformers" in said and len(said) > 500


def test_dry_run_refuses_before_it_compiles(checkpoint, capsys):
    pytest.importorskip("libtpu")
    for argv, message in (
        (["llama-7b", "--topology", "v9:2x2"], "expected a generation"),
        (["llama-7b", "--topology", "v5e:2x2", "--mesh", "fsdp=2"], "it takes 2 of the 4 devices"),
        (["llama-7b", "--topology", "v5e:2x2", "--batch", "3"], "does not divide over the 4 devices"),
        (["bert-base-uncased", "--topology", "v5e:2x2", "--step", "decode"], "decode with decoders alone"),
        (["opt-125m", "--topology", "v5e:2x2", "--seq", "4096"], "exceed the 2048 positions"),
        (["llama-7b", "--topology", "v5e:2x2", "--head", "token_classification", "--seq", "0"], "expected 1 or more"),
        ([tmp_of(checkpoint), "--topology", "v5e:2x2"], "has no config.json"),
    ):
        assert message in fails(capsys, "dry-run", *argv), argv


def tmp_of(checkpoint):
    (checkpoint.parent / "empty").mkdir(exist_ok=True)
    return checkpoint.parent / "empty"


@pytest.mark.parametrize(
    ("argv", "messages"),
    [
        (["frobnicate"], ["frobnicate", "quickstart", "dry-run"]),
        ([], ["quickstart"]),
        (["info"], ["MODEL", "(jaxformers info --help)"]),
        (["quantize", "m", "--bitz", "4"], ["--out PATH", "Unrecognized options: --bitz 4"]),
        (["perplexity", "m", "--text", "t", "--length", "abc"], ["--length", "'abc'"]),
        (["generate", "m", "a", "--early-stopping", "maybe"], ["'maybe'", "'never'"]),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(argv, messages, capsys):
    said = fails(capsys, *argv)
    assert all(message in said for message in messages) and not set(said) & set("│╭╰─"), said
