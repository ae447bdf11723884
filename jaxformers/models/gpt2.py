"""GPT-2 (Radford et al. 2019): pre-norm decoder with learned positions and tied embeddings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Int

from jaxformers import nn
from jaxformers.models import config as configs
from jaxformers.models.keymap import HF

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
    """Sizes and rates of a GPT-2. ``intermediate_size`` None stands for four times the width.

    Scores are multiplied by head size^-1/2 (``scale_attn_weights``) and by 1 / (layer + 1)
    (``scale_attn_by_inverse_layer_idx``; such layers differ, so they cannot be stacked for a scan).
    """

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    embedding_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 1024
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    num_labels: int = 2
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        return configs.from_hf(cls, hf, NAMES)

    def to_hf(self) -> dict[str, Any]:
        hf = configs.to_hf(self, NAMES, "gpt2", skip=("add_cross_attention",))
        if self.add_cross_attention or "add_cross_attention" in hf:
            hf["add_cross_attention"] = self.add_cross_attention
        return hf

    is_decoder = True


class GPT2(nnx.Module):
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
        self.layers = nn.Layers([self._block(c, i, rngs) for i in range(c.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.head = nnx.data(None)
        if head == "causal_lm":
            self.head = nn.CausalLMHead(c.hidden_size, c.vocab_size, tied=c.tie_word_embeddings, std=std, rngs=rngs)
        elif head == "sequence_classification":
            self.head = nn.ClassificationHead(c.hidden_size, c.num_labels, bias=False, std=std, rngs=rngs)
        elif head == "token_classification":
            rate = 0.1 if c.classifier_dropout is None else c.classifier_dropout
            self.head = nn.ClassificationHead(c.hidden_size, c.num_labels, rate=rate, std=std, rngs=rngs)

    @staticmethod
    def _block(c: Config, layer: int, rngs: nnx.Rngs) -> nn.Block:
        size = c.hidden_size // c.num_attention_heads
        scale = size**-0.5 if c.scale_attn_weights else 1.0
        attention = lambda: nn.Attention(
            c.hidden_size,
            c.num_attention_heads,
            scale=scale / (layer + 1) if c.scale_attn_by_inverse_layer_idx else scale,
            rate=c.attention_probs_dropout_prob,
            std=c.initializer_range,
            rngs=rngs,
        )
        norm = lambda: nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        hidden = c.intermediate_size or 4 * c.hidden_size
        own = attention()
        mlp = nn.MLP(c.hidden_size, hidden, act=c.hidden_act, std=c.initializer_range, rngs=rngs)
        cross = {"cross_attention": attention(), "cross_attention_norm": norm()} if c.add_cross_attention else {}
        return nn.Block(own, mlp, norm(), norm(), prenorm=True, rate=c.hidden_dropout_prob, **cross)

    def empty_cache(self, batch: int, slots: int, memory: nn.Memory | None = None) -> nn.Cache:
        """A cache for ``batch`` sequences of up to ``slots`` tokens, with ``memory`` where there is one."""
        return nn.empty_cache(self, batch, slots, memory)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        memory: nn.Memory | None = None,
        cache: nn.Cache | None = None,
        logits_to_keep: int = 0,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """Without ``position_ids`` the positions are the slots, as in Hugging Face, also when padded on the left.

        ``memory`` is what cross-attention attends to, where the config adds it.
        """
        return nn.decode(
            self, input_ids, attention_mask, position_ids, inputs_embeds, cache, logits_to_keep, rngs, memory
        )


Model = GPT2
PREFIX = "transformer"
KEYS = {
    "embeddings.token": "wte",
    "embeddings.position": "wpe",
    "layers.{}.attention.query": HF("h.{}.attn.c_attn", conv1d=True, part=(0, 3)),
    "layers.{}.attention.key": HF("h.{}.attn.c_attn", conv1d=True, part=(1, 3)),
    "layers.{}.attention.value": HF("h.{}.attn.c_attn", conv1d=True, part=(2, 3)),
    "layers.{}.attention.out": HF("h.{}.attn.c_proj", conv1d=True),
    "layers.{}.attention_norm": "h.{}.ln_1",
    "layers.{}.cross_attention.query": HF("h.{}.crossattention.q_attn", conv1d=True),
    "layers.{}.cross_attention.key": HF("h.{}.crossattention.c_attn", conv1d=True, part=(0, 2)),
    "layers.{}.cross_attention.value": HF("h.{}.crossattention.c_attn", conv1d=True, part=(1, 2)),
    "layers.{}.cross_attention.out": HF("h.{}.crossattention.c_proj", conv1d=True),
    "layers.{}.cross_attention_norm": "h.{}.ln_cross_attn",
    "layers.{}.mlp.up": HF("h.{}.mlp.c_fc", conv1d=True),
    "layers.{}.mlp.down": HF("h.{}.mlp.c_proj", conv1d=True),
    "layers.{}.mlp_norm": "h.{}.ln_2",
    "final_norm": "ln_f",
}
HEADS = {
    "causal_lm": ("GPT2LMHeadModel", {"head.decoder": "lm_head"}),
    "sequence_classification": ("GPT2ForSequenceClassification", {"head.classifier": "score"}),
    "token_classification": ("GPT2ForTokenClassification", {"head.classifier": "classifier"}),
}
BASE_CLASS = "GPT2Model"
IGNORED = (r"h\.\d+\.(attn|crossattention)\.(bias|masked_bias)",)  # the causal mask, stored by old versions
