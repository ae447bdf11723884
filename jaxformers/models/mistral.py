"""Mistral (arXiv 2310.06825): a llama whose layers may see a window of the latest tokens only."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxformers import nn
from jaxformers.models import config as configs
from jaxformers.models import llama


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a Mistral. ``sliding_window``: a token sees so many, itself included; None: all before it."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    intermediate_size: int = 14336
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    layer_norm_eps: float = 1e-6
    sliding_window: int | None = 4096
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
        config = configs.from_hf(cls, hf, llama.NAMES)
        window = hf.get("sliding_window", 4096)
        return dataclasses.replace(config, sliding_window=window, rotary=nn.rotary_from_hf(dict(hf), config.head_size))

    def to_hf(self) -> dict[str, Any]:
        hf = llama.to_hf(self, "mistral", skip=("mlp_bias",))
        return {**hf, "sliding_window": self.sliding_window}

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope(self) -> nn.Rotary:
        return self.rotary or nn.Rotary(self.head_size, trained_length=self.max_position_embeddings)

    attention_bias = out_bias = False

    @property
    def windows(self) -> tuple[int | None, ...]:
        return (self.sliding_window,) * self.num_hidden_layers


Model = llama.Llama
PREFIX = llama.PREFIX
KEYS = llama.KEYS
HEADS = llama.heads("Mistral")
BASE_CLASS = "MistralModel"
IGNORED = llama.IGNORED
