"""CLIP's vision tower (arXiv 2103.00020): a ViT with a norm before its blocks, pooled by the normed class token."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxformers import nn
from jaxformers.models import config as configs
from jaxformers.models import vit

NAMES = {"attention_probs_dropout_prob": "attention_dropout"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of a CLIP vision tower; ``image_size`` and ``patch_size`` are (height, width) in pixels."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    projection_dim: int = 512
    hidden_act: str = "quick_gelu"
    attention_probs_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-5
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (32, 32)
    num_channels: int = 3
    initializer_range: float = 0.02
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        sizes = {"image_size": configs.pair(hf, "image_size", 224), "patch_size": configs.pair(hf, "patch_size", 32)}
        return configs.from_hf(cls, hf, NAMES, **sizes)

    def to_hf(self) -> dict[str, Any]:
        hf = configs.to_hf(self, NAMES, "clip_vision_model", skip=("image_size", "patch_size"))
        return configs.put_pairs(hf, self, "image_size", "patch_size")

    qkv_bias = True
    hidden_dropout_prob = 0.0

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]


class ClipVision(nnx.Module):
    """``embeddings`` → ``layers`` → ``pool_norm`` of the class token. Head: projection, into the space of the texts."""

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, width, std = config, config.hidden_size, config.initializer_range
        self.embeddings = nn.ImageEmbeddings(
            width,
            grid=c.grid,
            patch=c.patch_size,
            channels=c.num_channels,
            patch_bias=False,
            eps=c.layer_norm_eps,
            std=std,
            rngs=rngs,
        )
        self.layers = nn.Layers([vit.block(c, rngs) for _ in range(c.num_hidden_layers)])
        self.pool_norm = nn.LayerNorm(width, eps=c.layer_norm_eps)
        self.head = nnx.data(None)
        if head == "projection":
            self.head = nn.Linear(width, c.projection_dim, bias=False, std=std, rngs=rngs)

    def __call__(
        self, pixel_values: Float[Array, "batch channels height width"], *, rngs: jax.Array | None = None
    ) -> nn.Output:
        """``last_hidden_state`` is not normed, ``pooled`` is the normed class token; ``extra["image_embeds"]``
        (B, projection) is its projection, of any length. Images of another size stretch the position table."""
        embed_key, layers_key = nn.split(rngs, 2)
        x, _ = self.embeddings(pixel_values, key=embed_key)
        h, _ = self.layers(x, key=layers_key)
        pooled = self.pool_norm(h[:, 0])
        extra = {"image_embeds": self.head(pooled)} if self.head_name == "projection" else None
        return nn.Output(h, pooled=pooled, extra=extra)


Model = ClipVision
PREFIX = "vision_model"
KEYS = {
    "embeddings.patch": "embeddings.patch_embedding",
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position": "embeddings.position_embedding",
    "embeddings.norm": "pre_layrnorm",
    "layers.{}.attention.query": "encoder.layers.{}.self_attn.q_proj",
    "layers.{}.attention.key": "encoder.layers.{}.self_attn.k_proj",
    "layers.{}.attention.value": "encoder.layers.{}.self_attn.v_proj",
    "layers.{}.attention.out": "encoder.layers.{}.self_attn.out_proj",
    "layers.{}.attention_norm": "encoder.layers.{}.layer_norm1",
    "layers.{}.mlp.up": "encoder.layers.{}.mlp.fc1",
    "layers.{}.mlp.down": "encoder.layers.{}.mlp.fc2",
    "layers.{}.mlp_norm": "encoder.layers.{}.layer_norm2",
    "pool_norm": "post_layernorm",
}
HEADS = {"projection": ("CLIPVisionModelWithProjection", {"head": "visual_projection"})}
BASE_CLASS = "CLIPVisionModel"
IGNORED = (r"embeddings\.position_ids",)
