"""GLM-4 (arXiv 2406.12793): a llama that rotates half of each head, in neighbouring pairs, with a fused gate and up."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxformers import nn
from jaxformers.models import config as configs
from jaxformers.models import llama
from jaxformers.models.keymap import HF


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a GLM-4."""

    vocab_size: int = 151552
    hidden_size: int = 4096
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 2
    head_dim: int | None = 128
    intermediate_size: int = 13696
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    layer_norm_eps: float = 1.5625e-07
    attention_bias: bool = True
    mlp_bias: bool = False
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    pad_token_id: int | None = 151329
    tie_word_embeddings: bool = False
    num_labels: int = 2
    rotary: nn.Rotary | None = None
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        config = configs.from_hf(cls, hf, llama.NAMES)
        share = (hf.get("rope_parameters") or {}).get("partial_rotary_factor", hf.get("partial_rotary_factor", 0.5))
        size = int(config.head_size * share)
        return dataclasses.replace(config, rotary=nn.rotary_from_hf(dict(hf), size, interleaved=True))

    def to_hf(self) -> dict[str, Any]:
        return llama.to_hf(self, "glm", skip=("mlp_bias",))

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope(self) -> nn.Rotary:
        return self.rotary or nn.Rotary(
            self.head_size // 2, trained_length=self.max_position_embeddings, interleaved=True
        )

    out_bias = False

    @property
    def windows(self) -> tuple[int | None, ...]:
        return (None,) * self.num_hidden_layers


Model = llama.Llama
PREFIX = llama.PREFIX
KEYS = {
    **llama.KEYS,
    "layers.{}.mlp.gate": HF("layers.{}.mlp.gate_up_proj", part=(0, 2)),
    "layers.{}.mlp.up": HF("layers.{}.mlp.gate_up_proj", part=(1, 2)),
}
HEADS = llama.heads("Glm")
BASE_CLASS = "GlmModel"
IGNORED = llama.IGNORED
