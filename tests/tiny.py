"""Models small enough to compile in a second."""

import dataclasses

import jax
import numpy as np

import jaxformers as jf
from jaxformers.models import bert, gpt2, llama

BERT = bert.Config(
    vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12,
    max_position_embeddings=12, initializer_range=0.4,
)  # fmt: skip
LLAMA = llama.Config(
    vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=12, max_position_embeddings=12, initializer_range=0.4,
)  # fmt: skip
GPT2 = gpt2.Config(
    vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12,
    initializer_range=0.4,
)  # fmt: skip
CONFIGS = {"bert": (BERT, "masked_lm"), "llama": (LLAMA, "causal_lm"), "gpt2": (GPT2, "causal_lm")}


def model(name: str, head: str | None = "lm", **changes):
    """A random model with its language-model head, or with another ``head``; ``changes`` to its config."""
    config, lm = CONFIGS[name]
    config = dataclasses.replace(config, **changes)
    return jf.init(config, head=lm if head == "lm" else head, key=jax.random.key(0))


def batch(rows: int = 2, length: int = 6) -> dict[str, np.ndarray]:
    """Ids with padding on the right of the last row."""
    ids = np.random.default_rng(0).integers(1, 20, (rows, length))
    mask = np.ones_like(ids)
    mask[-1, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def largest_difference(a, b) -> float:
    """Over two trees of one structure."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(*map(jax.tree.leaves, (a, b))))
