"""DINOv2 (arXiv 2304.07193): a ViT with layer scale, patches of 14 pixels, and in its giant size a gated MLP."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxformers import nn
from jaxformers.models import config as configs
from jaxformers.models import vit
from jaxformers.models.keymap import HF


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of a DINOv2. ``use_swiglu_ffn``: ``down(silu(gate) · up)`` of two thirds of the width."""

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
    patch_size: tuple[int, int] = (14, 14)
    num_channels: int = 3
    qkv_bias: bool = True
    layerscale_value: float = 1.0
    drop_path_rate: float = 0.0
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True
    num_labels: int = 2
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        sizes = {"image_size": configs.pair(hf, "image_size", 224), "patch_size": configs.pair(hf, "patch_size", 14)}
        return configs.from_hf(cls, hf, {}, **sizes)

    def to_hf(self) -> dict[str, Any]:
        hf = configs.to_hf(self, {}, "dinov2", skip=("image_size", "patch_size"))
        return configs.put_pairs(hf, self, "image_size", "patch_size")

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    num_register_tokens = 0  # those of dinov2_with_registers differ, and how they stretch the position table
    antialias = False

    @property
    def intermediate_size(self) -> int:
        hidden = int(self.hidden_size * self.mlp_ratio)
        return (int(hidden * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else hidden


class DINOv2(nnx.Module):
    """``embeddings`` → ``layers`` → ``final_norm`` → ``head``; ``pooled`` is the class token.

    Head: image_classification, of the class token beside the mean of the patches.
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
            registers=c.num_register_tokens,
            mask_token=c.use_mask_token,
            antialias=c.antialias,
            rate=c.hidden_dropout_prob,
            std=std,
            rngs=rngs,
        )
        self.layers = nn.Layers([self._block(c, rngs) for _ in range(c.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(width, eps=c.layer_norm_eps)
        self.head = nnx.data(None)
        if head == "image_classification":
            self.head = nn.ClassificationHead(2 * width, c.num_labels, std=std, rngs=rngs)

    @staticmethod
    def _block(c: Config, rngs: nnx.Rngs) -> nn.Block:
        # one rate of stochastic depth for all layers, as DINOv2 was trained
        block = vit.block(c, rngs, layer_scale=c.layerscale_value, drop_path=c.drop_path_rate or None)
        if c.use_swiglu_ffn:
            std = c.initializer_range
            block.mlp = nn.MLP(c.hidden_size, c.intermediate_size, act="silu", gated=True, std=std, rngs=rngs)
        block.rate = 0.0  # hidden_dropout_prob acts on attention's output and on the embeddings only
        return block

    def __call__(
        self,
        pixel_values: Float[Array, "batch channels height width"],
        bool_masked_pos: Bool[Array, "batch patches"] | None = None,
        *,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """Images of another size than ``image_size`` stretch the position table."""
        embed_key, layers_key, head_key = nn.split(rngs, 3)
        x, _ = self.embeddings(pixel_values, bool_masked_pos, key=embed_key)
        h, _ = self.layers(x, key=layers_key)
        h = self.final_norm(h)
        if self.head_name is None:
            return nn.Output(h, pooled=h[:, 0])
        if self.head_name == "sentence":
            return nn.Output(h, pooled=self.head(h, None))
        patches = h[:, 1 + self.config.num_register_tokens :]
        both = jnp.concatenate([h[:, 0], patches.mean(1)], axis=-1)
        return nn.Output(h, logits=self.head(both, head_key), pooled=h[:, 0])


Model = DINOv2
PREFIX = "dinov2"
KEYS = {
    **vit.KEYS,
    "embeddings.mask_token": HF("embeddings.mask_token", ones=1),
    "layers.{}.attention_norm": "encoder.layer.{}.norm1",
    "layers.{}.attention_scale": "encoder.layer.{}.layer_scale1.lambda1",
    "layers.{}.mlp_norm": "encoder.layer.{}.norm2",
    "layers.{}.mlp_scale": "encoder.layer.{}.layer_scale2.lambda1",
}


def keys(config: Config) -> dict[str, str | HF]:
    """The MLP's names depend on whether it is gated."""
    if config.use_swiglu_ffn:
        fused = "encoder.layer.{}.mlp.weights_in"
        gated = {"layers.{}.mlp.gate": HF(fused, part=(0, 2)), "layers.{}.mlp.up": HF(fused, part=(1, 2))}
        return {**gated, "layers.{}.mlp.down": "encoder.layer.{}.mlp.weights_out"}
    return {"layers.{}.mlp.up": "encoder.layer.{}.mlp.fc1", "layers.{}.mlp.down": "encoder.layer.{}.mlp.fc2"}


HEADS = {"image_classification": ("Dinov2ForImageClassification", {"head.classifier": "classifier"})}
BASE_CLASS = "Dinov2Model"
IGNORED = ()
