"""GPT-BigCode (SantaCoder, StarCoder; arXiv 2301.03988, 2305.06161): a GPT-2 whose query heads share one key head."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from jaxformers import nn
from jaxformers.models import config as configs
from jaxformers.models.gpt2 import NAMES
from jaxformers.models.keymap import HF, per_head


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a GPT-BigCode. ``multi_query`` False gives every query head a key head of its own."""

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    multi_query: bool = True
    intermediate_size: int | None = None
    hidden_act: str = "gelu_pytorch_tanh"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    embedding_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 1024
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    scale_attn_weights: bool = True
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    num_labels: int = 2
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        if hf.get("add_cross_attention"):
            raise ValueError("config.json: add_cross_attention: GPT-BigCode is loaded as a decoder of its own only")
        return configs.from_hf(cls, hf, NAMES)

    def to_hf(self) -> dict[str, Any]:
        return configs.to_hf(self, NAMES, "gpt_bigcode")


class GPTBigCode(nnx.Module):
    """``embeddings`` → ``layers`` → ``final_norm`` → ``head``. Heads: causal_lm, sequence_ and token_classification."""

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, std = config, config.initializer_range
        self.embeddings = nn.Embeddings(
            c.vocab_size,
            c.hidden_size,
            positions=c.max_position_embeddings,
            rate=c.embedding_dropout_prob,
            std=std,
            rngs=rngs,
        )
        self.layers = nn.Layers([self._block(c, rngs) for _ in range(c.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.head = nnx.data(None)
        if head == "causal_lm":
            self.head = nn.CausalLMHead(c.hidden_size, c.vocab_size, tied=c.tie_word_embeddings, std=std, rngs=rngs)
        elif head == "sequence_classification":
            self.head = nn.ClassificationHead(c.hidden_size, c.num_labels, bias=False, std=std, rngs=rngs)
        elif head == "token_classification":
            rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
            self.head = nn.ClassificationHead(c.hidden_size, c.num_labels, rate=rate, std=std, rngs=rngs)

    @staticmethod
    def _block(c: Config, rngs: nnx.Rngs) -> nn.Block:
        attention = nn.Attention(
            c.hidden_size,
            c.num_attention_heads,
            kv_heads=1 if c.multi_query else None,
            scale=None if c.scale_attn_weights else 1.0,
            rate=c.attention_probs_dropout_prob,
            std=c.initializer_range,
            rngs=rngs,
        )
        hidden = c.intermediate_size or 4 * c.hidden_size
        mlp = nn.MLP(c.hidden_size, hidden, act=c.hidden_act, std=c.initializer_range, rngs=rngs)
        norms = (nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps) for _ in range(2))
        return nn.Block(attention, mlp, *norms, prenorm=True, rate=c.hidden_dropout_prob)

    def empty_cache(self, batch: int, slots: int) -> nn.Cache:
        """A cache for ``batch`` sequences of up to ``slots`` tokens, in the embeddings' dtype."""
        return nn.empty_cache(self, batch, slots)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        cache: nn.Cache | None = None,
        logits_to_keep: int = 0,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """Without ``position_ids`` the positions are the slots, as in Hugging Face, also when padded on the left."""
        return nn.decode(self, input_ids, attention_mask, position_ids, inputs_embeds, cache, logits_to_keep, rngs)


def fused_rows(c: Config, total: int) -> list[np.ndarray]:
    """Query, key and value rows of ``c_attn``: all queries, then one key and one value; or head by head."""
    if not c.multi_query:
        return per_head(c, total)
    size = c.hidden_size // c.num_attention_heads
    queries = c.hidden_size if total % size or total < 3 * size else total - 2 * size
    return np.split(np.arange(queries + 2 * size), [queries, queries + size])


Model = GPTBigCode
PREFIX = "transformer"
KEYS = {
    "embeddings.token": "wte",
    "embeddings.position": "wpe",
    "layers.{}.attention.query": HF("h.{}.attn.c_attn", part=(0, 3), rows=fused_rows),
    "layers.{}.attention.key": HF("h.{}.attn.c_attn", part=(1, 3), rows=fused_rows),
    "layers.{}.attention.value": HF("h.{}.attn.c_attn", part=(2, 3), rows=fused_rows),
    "layers.{}.attention.out": "h.{}.attn.c_proj",
    "layers.{}.attention_norm": "h.{}.ln_1",
    "layers.{}.mlp.up": "h.{}.mlp.c_fc",
    "layers.{}.mlp.down": "h.{}.mlp.c_proj",
    "layers.{}.mlp_norm": "h.{}.ln_2",
    "final_norm": "ln_f",
}
HEADS = {
    "causal_lm": ("GPTBigCodeForCausalLM", {"head.decoder": "lm_head"}),
    "sequence_classification": ("GPTBigCodeForSequenceClassification", {"head.classifier": "score"}),
    "token_classification": ("GPTBigCodeForTokenClassification", {"head.classifier": "classifier"}),
}
BASE_CLASS = "GPTBigCodeModel"
IGNORED = (r"h\.\d+\.attn\.(bias|masked_bias)",)  # the causal mask, stored by old versions
