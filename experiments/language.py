"""A small language model on real text, which several experiments start from."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxformers as jf
from experiments import common
from jaxformers import losses
from jaxformers.data import batches, text
from jaxformers.data.tokenizers import Tokenizer, train_bpe
from jaxformers.models import llama
from jaxformers.train import OptimConfig, TrainConfig, fit


def corpus(data: Path | None = None, test: Path | None = None) -> tuple[list[str], list[str]]:
    """(texts to train and calibrate on, texts to evaluate on): two files, or wikitext2_small beside the repository,
    or the Python reference and the standard library's sources, whole files held out."""
    if (data is None) != (test is None):
        raise ValueError("data, test: give both or neither")
    if data is not None:
        return read(data), read(test)
    shared = common.shared_data("wikitext2_small")
    if shared is not None:
        return [text.read_text(shared / "valid.txt.gz")], [text.read_text(shared / "test.txt.gz")]
    parts = [text.split_documents(d) for d in (text.english_text(), text.python_sources(1_000_000))]
    return [t for part in parts for t in part[0].values()], [t for part in parts for t in part[1].values()]


def read(path: Path) -> list[str]:
    """A file's text, or the rows of a table."""
    kind = [suffix for suffix in path.suffixes if suffix != ".gz"][-1:]
    return text.read_texts(path) if kind and kind[0] in (".jsonl", ".csv", ".tsv") else [text.read_text(path)]


def stream(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """All texts as one stream of token ids."""
    return text.join_documents([tokenizer.encode(t) for t in texts], tokenizer.eos_id)


def trained(
    texts: list[str],
    *,
    vocab: int,
    width: int,
    layers: int,
    heads: int,
    mlp: int,
    length: int,
    steps: int,
    batch: int = 8,
    rate: float = 3e-3,
    seed: int = 0,
) -> tuple[nnx.Module, Tokenizer]:
    """A llama trained on ``texts`` from nothing, with a BPE vocabulary of theirs."""
    tokenizer = train_bpe(texts, vocab, max_length=length)
    shape = llama.Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        max_position_embeddings=length,
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    model = fitted(shape, stream(texts, tokenizer), length=length, steps=steps, batch=batch, rate=rate, seed=seed)
    return model, tokenizer


def fitted(shape: Any, ids: np.ndarray, *, length: int, steps: int, batch: int, rate: float, seed: int) -> nnx.Module:
    """A causal language model of the Config ``shape``, trained from nothing on windows of the stream ``ids``."""
    model = jf.init(shape, head="causal_lm", key=jax.random.key(seed))
    data = batches.token_batches(ids, length, batch, seed=seed)
    optim = OptimConfig(learning_rate=rate, schedule="cosine", warmup=0.05, weight_decay=0.1)
    settings = TrainConfig(steps=steps, optim=optim, scan_layers=True, log_every=max(1, steps // 10))

    def next_token(apply: Any, params: Any, batch: Any, key: Any) -> tuple[jax.Array, dict[str, Any]]:
        logits = apply(params, batch, rngs=key).logits
        return losses.cross_entropy(logits[:, :-1], batch["input_ids"][:, 1:]), {}

    return fit(next_token, model, data, settings, key=jax.random.key(seed)).model
