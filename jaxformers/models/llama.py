"""Llama (arXiv 2302.13971, 2307.09288, 2407.21783): pre-norm decoder, RMSNorm, rotary positions, gated MLP, GQA."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Int

from jaxformers import nn
from jaxformers.models import config as configs

NAMES = {"layer_norm_eps": "rms_norm_eps", "attention_probs_dropout_prob": "attention_dropout"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a llama. ``rotary`` None stands for plain rotary positions with base 10000 over the whole head."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 11008
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    num_labels: int = 2
    rotary: nn.Rotary | None = None
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        config = configs.from_hf(cls, hf, NAMES)
        return dataclasses.replace(config, rotary=nn.rotary_from_hf(dict(hf), config.head_size))

    def to_hf(self) -> dict[str, Any]:
        return to_hf(self, "llama")

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope(self) -> nn.Rotary:
        return self.rotary or nn.Rotary(self.head_size, trained_length=self.max_position_embeddings)

    @property
    def out_bias(self) -> bool:
        return self.attention_bias

    @property
    def windows(self) -> tuple[int | None, ...]:
        return (None,) * self.num_hidden_layers


def to_hf(config: Any, model_type: str, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """``config.json`` of a llama or a descendant; the rotary settings in the words in which they were read."""
    hf = configs.to_hf(config, NAMES, model_type, skip=("rotary", *skip))
    said = {"rope_parameters", "rope_theta", "rope_scaling"} & set(hf)
    read = type(config).from_hf(hf) if said else None
    if read is None or read.rope != config.rope:
        hf = {name: value for name, value in hf.items() if name not in said}
        hf["rope_parameters"] = nn.rotary_to_hf(config.rope)
        if config.rope.size != config.head_size:
            hf["rope_parameters"]["partial_rotary_factor"] = config.rope.size / config.head_size
    hf["num_key_value_heads"] = config.num_key_value_heads or config.num_attention_heads
    return hf


class Llama(nnx.Module):
    """A llama or a descendant: whoever's config has the fields and properties above (Mistral, Qwen2, GLM).

    ``embeddings`` → ``layers`` → ``final_norm`` → ``head``. Heads: causal_lm, sequence_ and token_classification."""

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, std = config, config.initializer_range
        self.embeddings = nn.Embeddings(c.vocab_size, c.hidden_size, std=std, rngs=rngs)
        self.layers = nn.Layers([self._block(c, c.windows[i], rngs) for i in range(c.num_hidden_layers)])
        self.final_norm = nn.RMSNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.head = nnx.data(None)
        if head == "causal_lm":
            self.head = nn.CausalLMHead(c.hidden_size, c.vocab_size, tied=c.tie_word_embeddings, std=std, rngs=rngs)
        elif head in ("sequence_classification", "token_classification"):
            tokens = head == "token_classification"
            rate = 0.1 if tokens else 0.0
            self.head = nn.ClassificationHead(c.hidden_size, c.num_labels, rate=rate, bias=tokens, std=std, rngs=rngs)

    @staticmethod
    def _block(c: Any, window: int | None, rngs: nnx.Rngs) -> nn.Block:
        attention = nn.Attention(
            c.hidden_size,
            c.num_attention_heads,
            kv_heads=c.num_key_value_heads,
            head_size=c.head_size,
            bias=c.attention_bias,
            out_bias=c.out_bias,
            interleaved=c.rope.interleaved,
            window=window,
            rate=c.attention_probs_dropout_prob,
            std=c.initializer_range,
            rngs=rngs,
        )
        mlp = nn.MLP(
            c.hidden_size,
            c.intermediate_size,
            act=c.hidden_act,
            gated=True,
            bias=c.mlp_bias,
            std=c.initializer_range,
            rngs=rngs,
        )
        norms = (nn.RMSNorm(c.hidden_size, eps=c.layer_norm_eps) for _ in range(2))
        return nn.Block(attention, mlp, *norms, prenorm=True)

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


Model = Llama
PREFIX = "model"
KEYS = {
    "embeddings.token": "embed_tokens",
    "layers.{}.attention.query": "layers.{}.self_attn.q_proj",
    "layers.{}.attention.key": "layers.{}.self_attn.k_proj",
    "layers.{}.attention.value": "layers.{}.self_attn.v_proj",
    "layers.{}.attention.out": "layers.{}.self_attn.o_proj",
    "layers.{}.attention_norm": "layers.{}.input_layernorm",
    "layers.{}.mlp.gate": "layers.{}.mlp.gate_proj",
    "layers.{}.mlp.up": "layers.{}.mlp.up_proj",
    "layers.{}.mlp.down": "layers.{}.mlp.down_proj",
    "layers.{}.mlp_norm": "layers.{}.post_attention_layernorm",
    "final_norm": "norm",
}


def heads(family: str) -> dict[str, tuple[str, dict[str, str]]]:
    """The heads of a llama-like ``family`` and where its checkpoints keep them."""
    return {
        "causal_lm": (f"{family}ForCausalLM", {"head.decoder": "lm_head"}),
        "sequence_classification": (f"{family}ForSequenceClassification", {"head.classifier": "score"}),
        "token_classification": (f"{family}ForTokenClassification", {"head.classifier": "score"}),
    }


HEADS = heads("Llama")
BASE_CLASS = "LlamaModel"
IGNORED = (r".*rotary_emb\.inv_freq",)
