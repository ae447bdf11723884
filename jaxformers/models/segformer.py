"""SegFormer (arXiv 2105.15203): stages of overlapping patches, attention to a reduced sequence, and an MLP decoder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformers import nn
from jaxformers.models import config as configs
from jaxformers.sites import site, wanted

NORM_EPS = 1e-5  # of every norm: Hugging Face's implementation does not read layer_norm_eps
LISTS = {
    "depths": "depths",
    "sr_ratios": "sr_ratios",
    "hidden_sizes": "hidden_sizes",
    "patch_sizes": "patch_sizes",
    "strides": "strides",
    "num_heads": "num_attention_heads",
    "mlp_ratios": "mlp_ratios",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of a SegFormer, one entry per stage in each list. ``sr_ratios``: so many times fewer rows and
    columns of keys than of queries. ``patch_sizes`` and ``strides``: of each stage's overlapping patches."""

    num_channels: int = 3
    depths: tuple[int, ...] = (2, 2, 2, 2)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    hidden_sizes: tuple[int, ...] = (32, 64, 160, 256)
    patch_sizes: tuple[int, ...] = (7, 3, 3, 3)
    strides: tuple[int, ...] = (4, 2, 2, 2)
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[int, ...] = (4, 4, 4, 4)
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    classifier_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    drop_path_rate: float = 0.1
    decoder_hidden_size: int = 256
    semantic_loss_ignore_index: int = 255
    num_labels: int = 2
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        configs.same_length(self, *LISTS)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        lists = {ours: configs.counts(hf, name, getattr(cls, ours)) for ours, name in LISTS.items()}
        stages = hf.get("num_encoder_blocks", 4)
        if stages != len(lists["depths"]):
            raise ValueError(f"config.json: num_encoder_blocks is {stages}, but depths has {len(lists['depths'])}")
        return configs.from_hf(cls, hf, LISTS, **lists)

    def to_hf(self) -> dict[str, Any]:
        hf = configs.to_hf(self, LISTS, "segformer")
        hf |= {name: list(getattr(self, ours)) for ours, name in LISTS.items()}
        return hf | {"num_encoder_blocks": len(self.depths)}

    @property
    def hidden_size(self) -> int:
        """Width of the last stage."""
        return self.hidden_sizes[-1]


class Reduction(nnx.Module):
    """``norm(conv(·))`` of a grid with stride ``ratio``: the shorter sequence of efficient self-attention."""

    def __init__(self, width: int, ratio: int, *, std: float, rngs: nnx.Rngs):
        self.path = ""
        self.conv = nn.Conv(width, width, (ratio, ratio), stride=(ratio, ratio), std=std, rngs=rngs)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def __call__(
        self, x: Float[Array, "batch length width"], grid: tuple[int, int]
    ) -> Float[Array, "batch keys width"]:
        batch, _, width = x.shape
        ratio = self.conv.stride[0]
        if min(grid) < ratio:
            raise ValueError(
                f"pixel_values: {self.path} reduces {ratio} x {ratio} cells to one, but the grid is {grid}; "
                "give larger images"
            )
        x = self.conv(x.reshape(batch, *grid, width))
        return self.norm(x.reshape(batch, -1, x.shape[-1]))


class MixMLP(nnx.Module):
    """Mix-FFN: ``down(act(conv(up(x))))``; the depthwise 3 × 3 convolution sees where a cell is. Site: ``hidden``."""

    spatial = True  # the block gives it the grid, and a key for its inner dropout

    def __init__(self, width: int, hidden: int, *, act: str, rate: float, std: float, rngs: nnx.Rngs):
        self.path = ""
        self.act, self.rate = act, rate
        self.up = nn.Linear(width, hidden, std=std, rngs=rngs)
        self.conv = nn.Conv(hidden, hidden, (3, 3), padding=(1, 1), groups=hidden, std=std, rngs=rngs)
        self.down = nn.Linear(hidden, width, std=std, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch length width"], *, grid: tuple[int, int], key: jax.Array | None = None
    ) -> Float[Array, "batch length width"]:
        batch, length, _ = x.shape
        h = self.conv(self.up(x).reshape(batch, *grid, -1)).reshape(batch, length, -1)
        return self.down(nn.dropout(site(f"{self.path}.hidden", nn.activation(self.act)(h)), self.rate, key))


def block(c: Config, stage: int, drop_path: float | None, rngs: nnx.Rngs) -> nn.Block:
    width, std, ratio = c.hidden_sizes[stage], c.initializer_range, c.sr_ratios[stage]
    reduce = Reduction(width, ratio, std=std, rngs=rngs) if ratio > 1 else None
    rate = c.attention_probs_dropout_prob
    hidden = width * c.mlp_ratios[stage]
    return nn.Block(
        nn.Attention(width, c.num_heads[stage], reduce=reduce, rate=rate, std=std, rngs=rngs),
        MixMLP(width, hidden, act=c.hidden_act, rate=c.hidden_dropout_prob, std=std, rngs=rngs),
        nn.LayerNorm(width, eps=NORM_EPS),
        nn.LayerNorm(width, eps=NORM_EPS),
        prenorm=True,
        rate=c.hidden_dropout_prob,
        drop_path=drop_path,
    )


class Stage(nnx.Module):
    """``embeddings`` → ``layers`` → ``norm``. Site: ``output`` (B, rows, columns, D)."""

    def __init__(self, c: Config, stage: int, rates: list[float | None], rngs: nnx.Rngs):
        self.path = ""
        d_in = c.hidden_sizes[stage - 1] if stage else c.num_channels
        width, std = c.hidden_sizes[stage], c.initializer_range
        sizes = c.patch_sizes[stage], c.strides[stage]
        self.embeddings = nn.OverlapEmbeddings(d_in, width, *sizes, eps=NORM_EPS, std=std, rngs=rngs)
        self.layers = nn.Layers([block(c, stage, rate, rngs) for rate in rates])
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def __call__(
        self, x: Float[Array, "batch rows columns in"], key: jax.Array | None
    ) -> Float[Array, "batch fewer_rows fewer_columns width"]:
        x, grid = self.embeddings(x)
        x, _ = self.layers(x, grid=grid, key=key)
        return site(f"{self.path}.output", self.norm(x).reshape(x.shape[0], *grid, -1))


class DecodeHead(nnx.Module):
    """All stages' maps, each projected to one width and stretched to the first one's size; fused; classified.

    ``classifier(relu(batch_norm(fuse([project_n … project_0]))))``, logits (B, labels, H/4, W/4).
    """

    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.path = ""
        width, std = c.decoder_hidden_size, c.initializer_range
        self.rate = c.classifier_dropout_prob
        self.project = nn.Stages([nn.Linear(d, width, std=std, rngs=rngs) for d in c.hidden_sizes])
        self.fuse = nn.Conv(width * len(c.hidden_sizes), width, (1, 1), bias=False, std=std, rngs=rngs)
        self.batch_norm = nn.BatchNorm(width)
        self.classifier = nn.Conv(width, c.num_labels, (1, 1), std=std, rngs=rngs)

    def __call__(
        self, maps: list[Float[Array, "batch rows columns width"]], key: jax.Array | None
    ) -> Float[Array, "batch labels rows columns"]:
        h = self._fused([self.project[i](x) for i, x in enumerate(maps)], maps[0].shape[1:3])
        h = jax.nn.relu(self.batch_norm(h, batch_statistics=key is not None))
        return jnp.moveaxis(self.classifier(nn.dropout(h, self.rate, key)), -1, 1)

    def _fused(
        self, maps: list[Float[Array, "batch rows columns width"]], size: tuple[int, int]
    ) -> Float[Array, "batch first_rows first_columns width"]:
        """``fuse`` of all maps at ``size``. Stretching acts on cells and ``fuse`` on channels, so that each map's part
        of the matrix can come first, while the map is small; whoever asks for the input of ``fuse`` gets it formed."""
        if wanted(f"{self.fuse.path}.input") or not isinstance(self.fuse.kernel.get_value(), jax.Array):
            stretched = [nn.resize(x, size, "bilinear") for x in maps]
            return self.fuse(jnp.concatenate(stretched[::-1], axis=-1))
        parts = jnp.split(self.fuse.kernel.get_value()[0, 0].astype(maps[0].dtype), len(maps))[::-1]
        small = [nn.resize(x @ part, size, "bilinear") for x, part in zip(maps[1:], parts[1:], strict=True)]
        return site(f"{self.fuse.path}.output", sum(small, maps[0] @ parts[0]))


class SegFormer(nnx.Module):
    """``stages`` → ``head``. Heads: image_classification (of the mean cell), semantic_segmentation.

    ``last_hidden_state`` is (B, L, D) of the last stage's cells, row by row. Every stage's map is at the site
    ``stages.S.output``. With ``rngs`` (training) the decoder's batch norm uses the batch's own statistics, which are at
    the sites ``head.batch_norm.mean`` and ``.var``: :func:`jaxformers.nn.follow` moves the running ones after them.
    """

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c = config
        rates = nn.drop_path_rates(c.drop_path_rate, sum(c.depths))
        starts = [sum(c.depths[:i]) for i in range(len(c.depths) + 1)]
        self.stages = nn.Stages([Stage(c, i, rates[starts[i] : starts[i + 1]], rngs) for i in range(len(c.depths))])
        self.head = nnx.data(None)
        if head == "image_classification":
            self.head = nn.ClassificationHead(c.hidden_size, c.num_labels, std=c.initializer_range, rngs=rngs)
        elif head == "semantic_segmentation":
            self.head = DecodeHead(c, rngs)

    def __call__(
        self, pixel_values: Float[Array, "batch channels height width"], *, rngs: jax.Array | None = None
    ) -> nn.Output:
        """Images of any size whose grids are nowhere smaller than what attention reduces to one cell.

        Segmentation logits are (B, labels, H/4, W/4); :func:`jaxformers.image_losses.segmentation` is their loss.
        """
        channels = self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values: expected (batch, {channels}, height, width), got {tuple(pixel_values.shape)}"
            )
        stages_key, head_key = nn.split(rngs, 2)
        dtype = self.stages[0].embeddings.patch.kernel.get_value().dtype
        x, maps = jnp.moveaxis(jnp.asarray(pixel_values), 1, -1).astype(dtype), []
        for stage, key in zip(self.stages, nn.split(stages_key, len(self.stages)), strict=True):
            x = stage(x, key)
            maps.append(x)
        h = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.head_name == "semantic_segmentation":
            return nn.Output(h, logits=self.head(maps, head_key))
        if self.head_name == "image_classification":
            return nn.Output(h, logits=self.head(h.mean(1), head_key))
        return nn.Output(h, pooled=self.head(h, None) if self.head_name == "sentence" else None)


Model = SegFormer
PREFIX = "segformer"
LAYER = "encoder.block.{}.{}"
KEYS = {
    "stages.{}.embeddings.patch": "encoder.patch_embeddings.{}.proj",
    "stages.{}.embeddings.patch_norm": "encoder.patch_embeddings.{}.layer_norm",
    "stages.{}.layers.{}.attention.query": f"{LAYER}.attention.self.query",
    "stages.{}.layers.{}.attention.key": f"{LAYER}.attention.self.key",
    "stages.{}.layers.{}.attention.value": f"{LAYER}.attention.self.value",
    "stages.{}.layers.{}.attention.reduce.conv": f"{LAYER}.attention.self.sr",
    "stages.{}.layers.{}.attention.reduce.norm": f"{LAYER}.attention.self.layer_norm",
    "stages.{}.layers.{}.attention.out": f"{LAYER}.attention.output.dense",
    "stages.{}.layers.{}.attention_norm": f"{LAYER}.layer_norm_1",
    "stages.{}.layers.{}.mlp.up": f"{LAYER}.mlp.dense1",
    "stages.{}.layers.{}.mlp.conv": f"{LAYER}.mlp.dwconv.dwconv",
    "stages.{}.layers.{}.mlp.down": f"{LAYER}.mlp.dense2",
    "stages.{}.layers.{}.mlp_norm": f"{LAYER}.layer_norm_2",
    "stages.{}.norm": "encoder.layer_norm.{}",
}
HEADS = {
    "image_classification": ("SegformerForImageClassification", {"head.classifier": "classifier"}),
    "semantic_segmentation": (
        "SegformerForSemanticSegmentation",
        {
            "head.project.{}": "decode_head.linear_c.{}.proj",
            "head.fuse": "decode_head.linear_fuse",
            "head.batch_norm": "decode_head.batch_norm",
            "head.classifier": "decode_head.classifier",
        },
    ),
}
BASE_CLASS = "SegformerModel"
IGNORED = (r".*num_batches_tracked",)
RENAMED = ((r"decode_head\.linear_projections\.", "decode_head.linear_c."),)  # transformers 5.23 and newer
