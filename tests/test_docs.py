"""The documentation says what is so: code is run, tables are compared with the library, pages build."""

import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

import jaxformers as jf
from jaxformers import models
from jaxformers.data.tokenizers import train_bpe, train_wordpiece

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TEXTS = ["a first text and a second one", "one another", "what stands under jaxformers is run by the tests"] * 4


def blocks(page: str) -> list[str]:
    """The Python that a page shows for jaxformers: fenced blocks, but not those under the tab of another library."""
    found, tab = [], ""
    for match in re.finditer(r'^=== "([^"]+)"$|^( *)```python\n(.*?)^\2```$', page, re.M | re.S):
        if match[1]:
            tab = match[1]
        elif not match[2] or tab == "jaxformers":
            found.append(textwrap.dedent(match[3]))
    return found


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """Tiny checkpoints under the names that the pages use, in the working directory."""
    monkeypatch.chdir(tmp_path)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    wordpiece, bpe = train_wordpiece(TEXTS, vocab_size=80), train_bpe(TEXTS, vocab_size=300)
    bert = {"model_type": "bert", "vocab_size": wordpiece.vocab_size, "max_position_embeddings": 32, **small}
    gpt2 = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    gpt2 |= {"model_type": "gpt2", "vocab_size": bpe.vocab_size}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    t5 |= {"model_type": "t5", "vocab_size": bpe.vocab_size, "feed_forward_proj": "gated-gelu"}
    key = jax.random.key(0)
    jf.save(jf.init(bert, head="masked_lm", key=key), "bert-base-uncased", tokenizer=wordpiece)
    jf.save(jf.init(t5, head="seq2seq_lm", key=key), "t5-small", tokenizer=bpe)
    jf.save(jf.init(gpt2, head="causal_lm", key=key), "gpt2", tokenizer=bpe)


def test_the_porting_page_runs(checkpoints):
    page = (DOCS / "porting.md").read_text()
    code = blocks(page)
    assert len(code) >= 11
    names: dict = {}
    for block in code:
        exec(compile(block, "docs/porting.md", "exec"), names)
    assert names["seen"]["layers.0.attention.probs"].shape[1] == 2 and len(names["texts"]) == 2
    assert json.loads(Path("tuned/config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    assert names["no_decay"]["layers.0.attention.query.kernel"] and not names["no_decay"]["layers.1.mlp_norm.scale"]
    assert names["result"].history and len(names["translated"]) == 2 and names["logits"].shape[:2] == (2, 5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
def test_the_scaling_page_runs(checkpoints):
    names: dict = {}
    for block in blocks((DOCS / "scaling.md").read_text()):
        exec(compile(block, "docs/scaling.md", "exec"), names)
    assert names["logits"].shape == (8, 16, 80) and len(names["logits"].sharding.device_set) == 8
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, names["spread"], names["params"]))


def test_the_heads_of_the_porting_page_are_those_of_the_library():
    page = (DOCS / "porting.md").read_text()
    rows = re.findall(r'^\| (`Flax.+) \| `head="(\w+)"`.* \|$', page, re.M)
    pairs = [(name, head) for names, head in rows for name in re.findall(r"`Flax(\w+)`", names)]
    assert len(pairs) > 20
    known = {}
    for module in {models.architecture(kind) for kind in models.ARCHITECTURES}:
        known[module.BASE_CLASS] = {"none"}
        for head, (name, _) in module.HEADS.items():
            known.setdefault(name, set()).add(head)
    for name, head in pairs:
        own = known.get(name.replace("XLMRoberta", "Roberta").replace("MT5", "T5"))
        assert own is not None and head in own, f"Flax{name}: {head} is not what the library has, {own}"


def test_the_architectures_page_lists_every_architecture_and_head():
    page = (DOCS / "architectures.md").read_text()
    lines = re.findall(r"^\| `.+$", page, re.M)
    rows = {kind: line for line in lines for kind in re.findall(r"`([^`]+)`", line.split("|")[1])}
    del rows["model_type"]  # the heading
    assert set(rows) == set(models.ARCHITECTURES)
    for kind in rows:
        heads = {h.strip().strip("`") for h in rows[kind].split("|")[2].split(",")} - {"–"}
        assert heads - {"sentence"} == set(models.architecture(kind).HEADS), kind


def test_the_pages_build(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install 'jaxformers[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Apply" in (tmp_path / "site" / "api" / "core" / "index.html").read_text()
