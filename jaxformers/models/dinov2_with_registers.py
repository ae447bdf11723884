"""DINOv2 with registers (arXiv 2309.16588): tokens that take in what DINOv2 would write over idle patches."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxformers.models import config as configs
from jaxformers.models import dinov2
from jaxformers.models.keymap import HF


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of a DINOv2, and the number of its registers. Its position table stretches with anti-aliasing."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    num_channels: int = 3
    qkv_bias: bool = True
    layerscale_value: float = 1.0
    drop_path_rate: float = 0.0
    use_swiglu_ffn: bool = False
    num_register_tokens: int = 4
    num_labels: int = 2
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        sizes = {"image_size": configs.pair(hf, "image_size", 224), "patch_size": configs.pair(hf, "patch_size", 16)}
        return configs.from_hf(cls, hf, {}, **sizes)

    def to_hf(self) -> dict[str, Any]:
        hf = configs.to_hf(self, {}, "dinov2_with_registers", skip=("image_size", "patch_size"))
        return configs.put_pairs(hf, self, "image_size", "patch_size")

    use_mask_token = True
    antialias = True
    grid = dinov2.Config.grid
    intermediate_size = dinov2.Config.intermediate_size


Model = dinov2.DINOv2
PREFIX = "dinov2_with_registers"
KEYS = {**dinov2.KEYS, "embeddings.register_tokens": HF("embeddings.register_tokens", ones=1)}
keys = dinov2.keys
HEADS = {"image_classification": ("Dinov2WithRegistersForImageClassification", {"head.classifier": "classifier"})}
BASE_CLASS = "Dinov2WithRegistersModel"
IGNORED = ()
