"""Swin (arXiv 2103.14030): stages of attention within shifted windows; between them four neighbours become one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxformers import nn
from jaxformers.models import config as configs
from jaxformers.models import vit
from jaxformers.models.keymap import HF
from jaxformers.sites import site

NORM_EPS = 1e-5  # of the norms of patches and of merged patches, whatever layer_norm_eps says


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of a Swin. Stage i has ``depths[i]`` layers of ``num_heads[i]`` heads, width embed_dim · 2ⁱ."""

    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (4, 4)
    num_channels: int = 3
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.1
    hidden_act: str = "gelu"
    use_absolute_embeddings: bool = False
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    encoder_stride: int = 32
    num_labels: int = 2
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        configs.same_length(self, "depths", "num_heads")
        if self.window_size < 1 or self.embed_dim < 1:
            raise ValueError("config.json: window_size and embed_dim must be 1 or more")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        sizes = {"image_size": configs.pair(hf, "image_size", 224), "patch_size": configs.pair(hf, "patch_size", 4)}
        lists = {name: configs.counts(hf, name, getattr(cls, name)) for name in ("depths", "num_heads")}
        return configs.from_hf(cls, hf, {}, **sizes, **lists)

    def to_hf(self) -> dict[str, Any]:
        hf = configs.to_hf(self, {}, "swin", skip=("image_size", "patch_size"))
        hf |= {"depths": list(self.depths), "num_heads": list(self.num_heads), "hidden_size": self.hidden_size}
        return configs.put_pairs(hf, self, "image_size", "patch_size")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of ``image_size``; what fills no patch is padded."""
        return tuple(-(-n // p) for n, p in zip(self.image_size, self.patch_size, strict=True))

    @property
    def hidden_size(self) -> int:
        """Width behind the last stage."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)


def block(c: Config, stage: int, layer: int, drop_path: float | None, rngs: nnx.Rngs) -> nn.Block:
    width, heads, std = c.embed_dim * 2**stage, c.num_heads[stage], c.initializer_range
    return nn.Block(
        nn.WindowAttention(
            width,
            heads,
            window=c.window_size,
            shift=c.window_size // 2 if layer % 2 else 0,
            bias=c.qkv_bias,
            rate=c.attention_probs_dropout_prob,
            std=std,
            rngs=rngs,
        ),
        nn.MLP(width, int(c.mlp_ratio * width), act=c.hidden_act, std=std, rngs=rngs),
        nn.LayerNorm(width, eps=c.layer_norm_eps),
        nn.LayerNorm(width, eps=c.layer_norm_eps),
        prenorm=True,
        rate=c.hidden_dropout_prob,
        drop_path=drop_path,
    )


class Stage(nnx.Module):
    """``layers``, then ``merge`` in all stages but the last. Site: ``output`` (B, L, D), after merging."""

    def __init__(self, blocks: list[nn.Block], merge: nn.PatchMerging | None):
        self.path = ""
        self.layers = nn.Layers(blocks)
        self.merge = merge if merge is not None else nnx.data(None)

    def __call__(
        self, x: Float[Array, "batch length width"], grid: tuple[int, int], key: jax.Array | None
    ) -> tuple[Float[Array, "batch shorter wider"], tuple[int, int]]:
        x, _ = self.layers(x, grid=grid, key=key)
        if self.merge is not None:
            x, grid = self.merge(x, grid)
        return site(f"{self.path}.output", x), grid


class Swin(nnx.Module):
    """``embeddings`` → ``stages`` → ``final_norm`` → ``head``; ``pooled`` is the mean of all cells.

    Heads: image_classification, masked_image_modeling (the image's pixels, as SimMIM, arXiv 2111.09886).
    """

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, std = config, config.initializer_range
        self.embeddings = nn.ImageEmbeddings(
            c.embed_dim,
            grid=c.grid,
            patch=c.patch_size,
            channels=c.num_channels,
            cls_token=False,
            mask_token=head == "masked_image_modeling",
            positions=c.use_absolute_embeddings,
            patch_eps=NORM_EPS,
            pad=True,
            rate=c.hidden_dropout_prob,
            std=std,
            rngs=rngs,
        )
        rates = iter(nn.drop_path_rates(c.drop_path_rate, sum(c.depths)))
        stages = []
        for i, depth in enumerate(c.depths):
            blocks = [block(c, i, layer, next(rates), rngs) for layer in range(depth)]
            last = i + 1 == len(c.depths)
            merge = None if last else nn.PatchMerging(c.embed_dim * 2**i, eps=NORM_EPS, std=std, rngs=rngs)
            stages.append(Stage(blocks, merge))
        self.stages = nn.Stages(stages)
        self.final_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.head = nnx.data(None)
        if head == "image_classification":
            self.head = nn.ClassificationHead(c.hidden_size, c.num_labels, std=std, rngs=rngs)
        elif head == "masked_image_modeling":
            self.head = vit.PixelHead(c.hidden_size, c.encoder_stride, c.num_channels, std=std, rngs=rngs)

    def __call__(
        self,
        pixel_values: Float[Array, "batch channels height width"],
        bool_masked_pos: Bool[Array, "batch patches"] | None = None,
        *,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """Images of any size whose grid is nowhere smaller than a window; a position table is stretched."""
        embed_key, stages_key, head_key = nn.split(rngs, 3)
        x, grid = self.embeddings(pixel_values, bool_masked_pos, key=embed_key)
        for stage, key in zip(self.stages, nn.split(stages_key, len(self.stages)), strict=True):
            x, grid = stage(x, grid, key)
        h = self.final_norm(x)
        if self.head_name == "masked_image_modeling":
            return nn.Output(h, logits=self.head(h.reshape(h.shape[0], *grid, -1)))
        if self.head_name == "sentence":
            return nn.Output(h, pooled=self.head(h, None))
        pooled = h.mean(1)
        if self.head_name is None:
            return nn.Output(h, pooled=pooled)
        return nn.Output(h, logits=self.head(pooled, head_key), pooled=pooled)


Model = Swin
PREFIX = "swin"
LAYER = "encoder.layers.{}.blocks.{}"
KEYS = {
    "embeddings.patch": "embeddings.patch_embeddings.projection",
    "embeddings.patch_norm": "embeddings.norm",
    "embeddings.mask_token": HF("embeddings.mask_token", ones=2),
    "embeddings.position.embedding": HF("embeddings.position_embeddings", ones=1),
    "stages.{}.layers.{}.attention.query": f"{LAYER}.attention.self.query",
    "stages.{}.layers.{}.attention.key": f"{LAYER}.attention.self.key",
    "stages.{}.layers.{}.attention.value": f"{LAYER}.attention.self.value",
    "stages.{}.layers.{}.attention.relative.table": f"{LAYER}.attention.self.relative_position_bias_table",
    "stages.{}.layers.{}.attention.out": f"{LAYER}.attention.output.dense",
    "stages.{}.layers.{}.attention_norm": f"{LAYER}.layernorm_before",
    "stages.{}.layers.{}.mlp.up": f"{LAYER}.intermediate.dense",
    "stages.{}.layers.{}.mlp.down": f"{LAYER}.output.dense",
    "stages.{}.layers.{}.mlp_norm": f"{LAYER}.layernorm_after",
    "stages.{}.merge.norm": "encoder.layers.{}.downsample.norm",
    "stages.{}.merge.reduction": "encoder.layers.{}.downsample.reduction",
    "final_norm": "layernorm",
}
HEADS = {
    "image_classification": ("SwinForImageClassification", {"head.classifier": "classifier"}),
    "masked_image_modeling": ("SwinForMaskedImageModeling", {"head.decoder": "decoder.0"}),
}
BASE_CLASS = "SwinModel"
IGNORED = (r".*relative_position_index",)
