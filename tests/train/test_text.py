"""`jaxformers train`: from a TOML file, on from a checkpoint, in several processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxformers as jf
from jaxformers import cli
from jaxformers.data import text
from jaxformers.data.tokenizers import load_tokenizer, train_wordpiece
from jaxformers.models import bert
from jaxformers.train.text import TextRun, masked_tokens, read_toml, train_on_text

ROOT = Path(__file__).resolve().parents[2]
TOML = """
vocab = 300
length = 16
batch = 8
seed = 3

[config]
model_type = "llama"
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 24

[train]
steps = 30
log_every = 10
checkpoint_every = 10
progress = false

[train.optim]
learning_rate = 1e-2
warmup = 0.1
"""


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text("\n\n".join(list(text.english_text().values())[:3])[:20_000])
    return file


@pytest.fixture(scope="module")
def begun(prose, tmp_path_factory):
    """(directory, what the command printed) of a run that a TOML file describes."""
    out = tmp_path_factory.mktemp("run")
    (out / "run.toml").write_text(TOML)
    command = ["train", str(out / "run.toml"), "--text", str(prose), "--out", str(out / "run"), "--valid", str(prose)]
    done = subprocess.run(
        [sys.executable, "-m", "jaxformers.cli", *command], capture_output=True, text=True, cwd=ROOT, timeout=240,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out / "run", json.loads(done.stdout)


def losses(directory):
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if r["kind"] == "train"]


def test_a_run_from_a_file_learns_and_leaves_a_model(begun):
    directory, said = begun
    assert said["step"] == 30 and len(losses(directory)) == 3 and losses(directory)[-1] < losses(directory)[0] - 0.3
    assert said["eval_loss"] < np.log(300)
    model = jf.load(directory / "model")
    assert model.config.vocab_size == 300 and model.head_name == "causal_lm"
    assert load_tokenizer(directory / "model").vocab_size == 300


def test_a_checkpoint_goes_on(begun, prose, tmp_path, capsys):
    argv = ["train", str(begun[0] / "model"), "--text", str(prose), "--out", str(tmp_path), "--steps", "2", "--batch"]
    cli.main([*argv, "8", "--length", "16", "--learning-rate", "1e-9"])
    assert abs(json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] - begun[1]["eval_loss"]) < 0.5


def test_an_encoder_learns_masked_tokens(prose, tmp_path):
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 24}  # fmt: skip
    train = jf.TrainConfig(steps=3, progress=False, log_every=1)
    run = TextRun((str(prose),), str(tmp_path), config=config, vocab=300, length=16, batch=4, train=train)
    result = train_on_text(run)
    assert result.model.head_name == "masked_lm" and np.log(300) - 1 < result.last("loss") < np.log(300) + 1


def test_masking_is_berts(prose):
    """Shares of masked, replaced and kept tokens; special ones are left alone; the loss is of the chosen ones only."""
    tokenizer = train_wordpiece([prose.read_text()], 300)
    ids = np.random.default_rng(0).integers(10, 300, (64, 128))
    ids[:, 0], ids[:, -8:] = tokenizer.cls_id, tokenizer.pad_id
    seen = {}

    def apply(params, batch, *, rngs=None):
        seen.update(batch)
        return jf.Output(None, logits=jax.nn.one_hot(ids, 300) * 100.0)

    batch = {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_id).astype(int)}
    loss, metrics = masked_tokens(tokenizer, 0.15)(apply, {}, batch, jax.random.key(0))
    changed = np.asarray(seen["input_ids"]) != ids
    assert not changed[:, 0].any() and not changed[:, -8:].any()
    share, free = float(metrics["weight"]), 64 * 119
    assert abs(share / free - 0.15) < 0.02
    assert abs((np.asarray(seen["input_ids"]) == tokenizer.mask_id).sum() / share - 0.8) < 0.05
    assert abs(changed.sum() / share - 0.9) < 0.04
    assert float(loss) < 1e-3  # the logits know all answers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("steps = 30", "'stepps' is no field of TrainConfig"),
        ('model_type = "llama"', "model_type"),
        ("vocab = 300", "'vokab' is no field of TextRun"),
        ("learning_rate = 1e-2", "cannot be read as TOML"),
    ],
)
def test_files_that_make_no_sense(tmp_path, prose, capsys, change, message):
    wrong = {"steps = 30": "stepps = 30", "vocab = 300": "vokab = 300", "learning_rate = 1e-2": "learning_rate = ="}
    (tmp_path / "run.toml").write_text(TOML.replace(change, wrong.get(change, "")))
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", str(tmp_path / "run.toml"), "--text", str(prose), "--out", str(tmp_path / "o")])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_arguments_that_make_no_sense(tmp_path, prose):
    with pytest.raises(ValueError, match="give one of the two"):
        TextRun(("a",), "o")
    with pytest.raises(ValueError, match="exceed the model's 12 positions"):
        config = bert.Config(200, 8, 1, 1, 8, max_position_embeddings=12)
        tokenizer = train_wordpiece([prose.read_text()], 200)
        jf.save(jf.init(config, head="masked_lm", key=jax.random.key(0)), tmp_path, tokenizer)
        train_on_text(TextRun((str(prose),), "o", model=str(tmp_path), length=16))
    (tmp_path / "x.toml").write_text('text = "a.txt"\nout = "o"\n')
    assert read_toml(tmp_path / "x.toml") == {"text": ("a.txt",), "out": "o"}


@pytest.mark.slow
def test_two_processes_by_hand(begun, prose, tmp_path):
    """The command with --coordinator: the losses of one process, one writer, one model."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    (tmp_path / "run.toml").write_text(TOML)
    command = [sys.executable, "-m", "jaxformers.cli", "train", str(tmp_path / "run.toml"), "--text", str(prose),
               "--out", str(tmp_path / "run"), "--valid", str(prose), "--coordinator", f"localhost:{port}",
               "--processes", "2", "--process"]  # fmt: skip
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    together = [subprocess.Popen([*command, str(i)], cwd=ROOT, env=environment, stderr=-1, text=True) for i in range(2)]
    said = [process.communicate(timeout=240)[1] for process in together]
    assert [process.returncode for process in together] == [0, 0], said
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(begun[0]), rtol=1e-5)
    for path, ours in jf.paths.flatten(jf.functional(jf.load(tmp_path / "run" / "model"))[1]).items():
        theirs = jf.paths.flatten(jf.functional(jf.load(begun[0] / "model"))[1])[path]
        np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=path)
