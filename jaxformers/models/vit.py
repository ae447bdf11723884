"""ViT (arXiv 2010.11929): an encoder over patches of an image."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxformers import nn
from jaxformers.models import config as configs
from jaxformers.models.keymap import HF


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of a ViT; ``image_size`` and ``patch_size`` are (height, width) in pixels."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    num_channels: int = 3
    qkv_bias: bool = True
    encoder_stride: int = 16
    pooler_act: str = "tanh"
    pooler_output_size: int | None = None
    num_labels: int = 2
    pooler: bool = True
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        sizes = {"image_size": configs.pair(hf, "image_size", 224), "patch_size": configs.pair(hf, "patch_size", 16)}
        return configs.from_hf(cls, hf, {}, **sizes)

    def to_hf(self) -> dict[str, Any]:
        hf = configs.to_hf(self, {}, "vit", skip=("pooler", "image_size", "patch_size"))
        return configs.put_pairs(hf, self, "image_size", "patch_size")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of ``image_size``."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]


def block(c: Any, rngs: nnx.Rngs, **options: Any) -> nn.Block:
    """A pre-norm block, shared by ViT's descendants."""
    width, std = c.hidden_size, c.initializer_range
    rate = c.attention_probs_dropout_prob
    return nn.Block(
        nn.Attention(width, c.num_attention_heads, bias=c.qkv_bias, out_bias=True, rate=rate, std=std, rngs=rngs),
        nn.MLP(width, c.intermediate_size, act=c.hidden_act, std=std, rngs=rngs),
        nn.LayerNorm(width, eps=c.layer_norm_eps),
        nn.LayerNorm(width, eps=c.layer_norm_eps),
        prenorm=True,
        rate=c.hidden_dropout_prob,
        width=width,
        **options,
    )


class PixelHead(nnx.Module):
    """SimMIM's decoder (arXiv 2111.09886): a linear map from each patch to its pixels, (B, channels, height, width)."""

    def __init__(self, width: int, stride: int, channels: int, *, std: float, rngs: nnx.Rngs):
        self.path = ""
        self.stride = stride
        self.decoder = nn.Conv(width, stride**2 * channels, (1, 1), std=std, rngs=rngs)

    def __call__(self, h: Float[Array, "batch rows columns width"]) -> Float[Array, "batch channels height width"]:
        return nn.pixel_shuffle(self.decoder(h), self.stride)


class ViT(nnx.Module):
    """``embeddings`` → ``layers`` → ``final_norm`` → ``pooler`` or ``head``.

    Heads: image_classification (of the class token), masked_image_modeling (the image's pixels).
    """

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, width, std = config, config.hidden_size, config.initializer_range
        self.embeddings = nn.ImageEmbeddings(
            width,
            grid=c.grid,
            patch=c.patch_size,
            channels=c.num_channels,
            mask_token=head == "masked_image_modeling",
            rate=c.hidden_dropout_prob,
            std=std,
            rngs=rngs,
        )
        self.layers = nn.Layers([block(c, rngs) for _ in range(c.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(width, eps=c.layer_norm_eps)
        with_pooler = head is None and c.pooler
        self.pooler = nn.Linear(width, c.pooler_output_size or width, std=std, rngs=rngs) if with_pooler else None
        self.head = nnx.data(None)
        if head == "image_classification":
            self.head = nn.ClassificationHead(width, c.num_labels, std=std, rngs=rngs)
        elif head == "masked_image_modeling":
            self.head = PixelHead(width, c.encoder_stride, c.num_channels, std=std, rngs=rngs)

    def __call__(
        self,
        pixel_values: Float[Array, "batch channels height width"],
        bool_masked_pos: Bool[Array, "batch patches"] | None = None,
        *,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """Images of another size than ``image_size`` stretch the position table."""
        embed_key, layers_key, head_key = nn.split(rngs, 3)
        x, grid = self.embeddings(pixel_values, bool_masked_pos, key=embed_key)
        h, _ = self.layers(x, key=layers_key)
        h = self.final_norm(h)
        if self.head_name == "image_classification":
            return nn.Output(h, logits=self.head(h[:, 0], head_key))
        if self.head_name == "masked_image_modeling":
            return nn.Output(h, logits=self.head(h[:, 1:].reshape(h.shape[0], *grid, -1)))
        if self.head_name == "sentence":
            return nn.Output(h, pooled=self.head(h, None))
        pooled = None if self.pooler is None else nn.activation(self.config.pooler_act)(self.pooler(h[:, 0]))
        return nn.Output(h, pooled=pooled)


Model = ViT
PREFIX = "vit"
KEYS = {
    "embeddings.patch": "embeddings.patch_embeddings.projection",
    "embeddings.cls_token": HF("embeddings.cls_token", ones=2),
    "embeddings.mask_token": HF("embeddings.mask_token", ones=2),
    "embeddings.position.embedding": HF("embeddings.position_embeddings", ones=1),
    "layers.{}.attention.query": "encoder.layer.{}.attention.attention.query",
    "layers.{}.attention.key": "encoder.layer.{}.attention.attention.key",
    "layers.{}.attention.value": "encoder.layer.{}.attention.attention.value",
    "layers.{}.attention.out": "encoder.layer.{}.attention.output.dense",
    "layers.{}.attention_norm": "encoder.layer.{}.layernorm_before",
    "layers.{}.mlp.up": "encoder.layer.{}.intermediate.dense",
    "layers.{}.mlp.down": "encoder.layer.{}.output.dense",
    "layers.{}.mlp_norm": "encoder.layer.{}.layernorm_after",
    "final_norm": "layernorm",
    "pooler": "pooler.dense",
}
HEADS = {
    "image_classification": ("ViTForImageClassification", {"head.classifier": "classifier"}),
    "masked_image_modeling": ("ViTForMaskedImageModeling", {"head.decoder": "decoder.0"}),
}
BASE_CLASS = "ViTModel"
IGNORED = ()
