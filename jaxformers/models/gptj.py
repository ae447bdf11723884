"""GPT-J (Wang & Komatsuzaki 2021): attention and MLP side by side behind one norm, rotary in neighbouring pairs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Int

from jaxformers import nn
from jaxformers.models import config as configs

NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
    "hidden_dropout_prob": "resid_pdrop",
    "attention_probs_dropout_prob": "attn_pdrop",
    "embedding_dropout_prob": "embd_pdrop",
    "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a GPT-J; ``rotary_dim`` dimensions of each head are rotated."""

    vocab_size: int = 50400
    hidden_size: int = 4096
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    intermediate_size: int | None = None
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    embedding_dropout_prob: float = 0.0
    max_position_embeddings: int = 2048
    rotary_dim: int = 64
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    num_labels: int = 2
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        if "rotary_dim" in hf and hf["rotary_dim"] is None:
            raise ValueError("config.json: rotary_dim must say how many dimensions of a head are rotated, got null")
        return configs.from_hf(cls, hf, NAMES)

    def to_hf(self) -> dict[str, Any]:
        return configs.to_hf(self, NAMES, "gptj")

    @property
    def rope(self) -> nn.Rotary:
        return nn.Rotary(self.rotary_dim, trained_length=self.max_position_embeddings, interleaved=True)


class GPTJ(nnx.Module):
    """``embeddings`` → ``layers`` → ``final_norm`` → ``head``. Heads: causal_lm, sequence_classification."""

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, std = config, config.initializer_range
        self.embeddings = nn.Embeddings(c.vocab_size, c.hidden_size, rate=c.embedding_dropout_prob, std=std, rngs=rngs)
        self.layers = nn.Layers([self._block(c, rngs) for _ in range(c.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.head = nnx.data(None)
        if head == "causal_lm":
            tied = c.tie_word_embeddings
            self.head = nn.CausalLMHead(c.hidden_size, c.vocab_size, tied=tied, bias=True, std=std, rngs=rngs)
        elif head == "sequence_classification":
            self.head = nn.ClassificationHead(c.hidden_size, c.num_labels, bias=False, std=std, rngs=rngs)

    @staticmethod
    def _block(c: Config, rngs: nnx.Rngs) -> nn.Block:
        attention = nn.Attention(
            c.hidden_size,
            c.num_attention_heads,
            bias=False,
            interleaved=True,
            rate=c.attention_probs_dropout_prob,
            std=c.initializer_range,
            rngs=rngs,
        )
        hidden = c.intermediate_size or 4 * c.hidden_size
        mlp = nn.MLP(c.hidden_size, hidden, act=c.hidden_act, std=c.initializer_range, rngs=rngs)
        norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        return nn.Block(attention, mlp, norm, None, prenorm=True, parallel=True, rate=c.hidden_dropout_prob)

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


Model = GPTJ
PREFIX = "transformer"
KEYS = {
    "embeddings.token": "wte",
    "layers.{}.attention.query": "h.{}.attn.q_proj",
    "layers.{}.attention.key": "h.{}.attn.k_proj",
    "layers.{}.attention.value": "h.{}.attn.v_proj",
    "layers.{}.attention.out": "h.{}.attn.out_proj",
    "layers.{}.attention_norm": "h.{}.ln_1",
    "layers.{}.mlp.up": "h.{}.mlp.fc_in",
    "layers.{}.mlp.down": "h.{}.mlp.fc_out",
    "final_norm": "ln_f",
}
HEADS = {
    "causal_lm": ("GPTJForCausalLM", {"head.decoder": "lm_head"}),
    "sequence_classification": ("GPTJForSequenceClassification", {"head.classifier": "score"}),
}
BASE_CLASS = "GPTJModel"
IGNORED = (r"h\.\d+\.attn\.(bias|masked_bias|embed_positions)",)  # buffers of old versions
