"""Qwen2 and Qwen2.5 (arXiv 2407.10671): a llama with biases on query, key and value."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxformers import nn
from jaxformers.models import config as configs
from jaxformers.models import llama


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a Qwen2. With ``use_sliding_window`` the layers that ``layer_types`` names (by default those from
    ``max_window_layers`` on) see the latest ``sliding_window`` tokens only."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    head_dim: int | None = None
    intermediate_size: int = 22016
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    layer_norm_eps: float = 1e-6
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None
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
        types = hf.get("layer_types")
        if types is not None:
            unknown = set(types) - {"full_attention", "sliding_attention"}
            if unknown:
                raise ValueError(f"config.json: layer_types has {sorted(unknown)}; known: full_attention, "
                                 "sliding_attention")  # fmt: skip
            types = tuple(types)
        config = configs.from_hf(cls, hf, llama.NAMES, layer_types=types)
        return dataclasses.replace(config, rotary=nn.rotary_from_hf(dict(hf), config.head_size))

    def to_hf(self) -> dict[str, Any]:
        hf = llama.to_hf(self, "qwen2", skip=("mlp_bias", "layer_types", "sliding_window"))
        if self.layer_types is not None:
            hf["layer_types"] = list(self.layer_types)
        return {**hf, "sliding_window": self.sliding_window if self.use_sliding_window else hf.get("sliding_window")}

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope(self) -> nn.Rotary:
        return self.rotary or nn.Rotary(self.head_size, trained_length=self.max_position_embeddings)

    attention_bias, out_bias = True, False

    @property
    def windows(self) -> tuple[int | None, ...]:
        if not self.use_sliding_window:
            return (None,) * self.num_hidden_layers
        depth = range(self.num_hidden_layers)
        types = self.layer_types or tuple(
            ("full", "sliding")[i >= self.max_window_layers] + "_attention" for i in depth
        )
        if len(types) < len(depth):
            raise ValueError(f"layer_types: {len(types)} of them for {len(depth)} layers")
        return tuple(self.sliding_window if types[i] == "sliding_attention" else None for i in depth)


Model = llama.Llama
PREFIX = llama.PREFIX
KEYS = llama.KEYS
HEADS = llama.heads("Qwen2")
BASE_CLASS = "Qwen2Model"
IGNORED = llama.IGNORED
