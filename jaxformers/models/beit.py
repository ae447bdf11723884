"""BEiT (arXiv 2106.08254): a ViT with relative positions and layer scale, pre-trained to predict visual tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxformers import nn
from jaxformers.models import beit_maps, vit
from jaxformers.models import config as configs
from jaxformers.models.keymap import HF
from jaxformers.safetensors_file import show
from jaxformers.sites import reap


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of a BEiT; ``vocab_size`` counts the visual tokens.

    Positions: ``use_absolute_position_embeddings`` (a table that is added), ``use_relative_position_bias`` (a bias of
    each layer's own), ``use_shared_relative_position_bias`` (one for all layers). ``use_mean_pooling``: the image's
    vector is the normalised mean of the patches, and there is no norm behind the layers; otherwise it is the class
    token. ``layer_scale_init_value`` 0 leaves layer scale out. For segmentation: ``out_indices``, the four states that
    it reads (1: the embeddings, 2: behind the first layer, …), ``pool_scales``, the ``auxiliary_`` head, and what the
    loss is to be called with.
    """

    vocab_size: int = 8192
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
    use_mask_token: bool = False
    use_absolute_position_embeddings: bool = False
    use_relative_position_bias: bool = False
    use_shared_relative_position_bias: bool = False
    layer_scale_init_value: float = 0.1
    drop_path_rate: float = 0.1
    use_mean_pooling: bool = True
    out_indices: tuple[int, ...] | None = None
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    use_auxiliary_head: bool = True
    auxiliary_channels: int = 256
    auxiliary_num_convs: int = 1
    auxiliary_concat_input: bool = False
    auxiliary_loss_weight: float = 0.4
    semantic_loss_ignore_index: int = 255
    num_labels: int = 2
    pooler: bool = True
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        sizes = {"image_size": configs.pair(hf, "image_size", 224), "patch_size": configs.pair(hf, "patch_size", 16)}
        lists = {"pool_scales": configs.counts(hf, "pool_scales", cls.pool_scales)}
        chosen = hf.get("out_indices") or hf.get("segmentation_indices")  # the older name
        if chosen:
            if not isinstance(chosen, list | tuple) or not all(type(i) is int for i in chosen):
                raise ValueError(f"config.json: out_indices must be a list of whole numbers, got {show(chosen)}")
            lists["out_indices"] = tuple(chosen)
        return configs.from_hf(cls, hf, {}, **sizes, **lists)

    def to_hf(self) -> dict[str, Any]:
        hf = configs.to_hf(self, {}, "beit", skip=("pooler", "image_size", "patch_size"))
        hf |= {name: list(hf[name]) for name in ("out_indices", "pool_scales") if hf.get(name) is not None}
        return configs.put_pairs(hf, self, "image_size", "patch_size")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of ``image_size``."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]


def block(c: Config, drop_path: float | None, rngs: nnx.Rngs) -> nn.Block:
    width, std = c.hidden_size, c.initializer_range
    relative = nn.GridBias(c.num_attention_heads, c.grid, rngs=rngs) if c.use_relative_position_bias else None
    rate = c.attention_probs_dropout_prob
    return nn.Block(
        nn.Attention(
            width, c.num_attention_heads, key_bias=False, relative=relative, rate=rate, std=std, rngs=rngs
        ),
        nn.MLP(width, c.intermediate_size, act=c.hidden_act, std=std, rngs=rngs),
        nn.LayerNorm(width, eps=c.layer_norm_eps),
        nn.LayerNorm(width, eps=c.layer_norm_eps),
        prenorm=True,
        layer_scale=c.layer_scale_init_value or None,
        width=width,
        rate=c.hidden_dropout_prob,
        drop_path=drop_path,
    )  # fmt: skip


class TokenHead(nnx.Module):
    """``decoder(norm(h))``: scores of the visual tokens at each patch."""

    def __init__(self, width: int, vocab: int, *, eps: float, std: float, rngs: nnx.Rngs):
        self.path = ""
        self.norm = nn.LayerNorm(width, eps=eps)
        self.decoder = nn.Linear(width, vocab, std=std, rngs=rngs)

    def __call__(self, h: Float[Array, "batch patches width"]) -> Float[Array, "batch patches vocab"]:
        return self.decoder(self.norm(h))


class BEiT(nnx.Module):
    """``embeddings`` → ``layers`` → ``final_norm`` or ``pooler`` → ``head``.

    Heads: image_classification, masked_image_modeling (visual tokens (B, patches, V)), semantic_segmentation (logits
    (B, labels, 4 · rows, 4 · columns) of the grid; ``extra["auxiliary_logits"]`` (B, labels, rows, columns)).
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
            mask_token=c.use_mask_token,
            positions=c.use_absolute_position_embeddings,
            rate=c.hidden_dropout_prob,
            std=std,
            rngs=rngs,
        )
        shared = c.use_shared_relative_position_bias
        self.relative = nn.GridBias(c.num_attention_heads, c.grid, rngs=rngs) if shared else None
        rates = nn.drop_path_rates(c.drop_path_rate, c.num_hidden_layers)
        self.layers = nn.Layers([block(c, rate, rngs) for rate in rates])
        norm = lambda: nn.LayerNorm(width, eps=c.layer_norm_eps)
        self.final_norm = None if c.use_mean_pooling else norm()
        pools = c.use_mean_pooling and (head == "image_classification" or (head is None and c.pooler))
        self.pooler = norm() if pools else None
        self.head = nnx.data(None)
        if head == "image_classification":
            self.head = nn.ClassificationHead(width, c.num_labels, std=std, rngs=rngs)
        elif head == "masked_image_modeling":
            self.head = TokenHead(width, c.vocab_size, eps=c.layer_norm_eps, std=std, rngs=rngs)
        elif head == "semantic_segmentation":
            depth = c.num_hidden_layers
            if len(c.out_indices or ()) != 4 or not all(0 < i <= depth for i in c.out_indices):
                raise ValueError(f"out_indices: segmentation reads four states of 1 to {depth}, got {c.out_indices}")
            self.head = beit_maps.MapHead(c, rngs)

    def __call__(
        self,
        pixel_values: Float[Array, "batch channels height width"],
        bool_masked_pos: Bool[Array, "batch patches"] | None = None,
        *,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """Images of another size than ``image_size`` stretch the position table and the tables of relative positions.

        ``pooled`` is what a classifier reads; None with mean pooling where the checkpoint has no norm for it.
        """
        embed_key, layers_key, head_key = nn.split(rngs, 3)
        x, grid = self.embeddings(pixel_values, bool_masked_pos, key=embed_key)
        bias = None if self.relative is None else self.relative(grid)
        if self.head_name == "semantic_segmentation":
            return self._maps(x, bias, grid, layers_key)
        h, _ = self.layers(x, bias=bias, grid=grid, key=layers_key)
        h = h if self.final_norm is None else self.final_norm(h)
        if self.head_name == "masked_image_modeling":
            return nn.Output(h, logits=self.head(h[:, 1:]))
        if self.head_name == "sentence":
            return nn.Output(h, pooled=self.head(h, None))
        pooled = None if self.config.use_mean_pooling else h[:, 0]
        if self.pooler is not None:
            pooled = self.pooler(h[:, 1:].mean(1))
        if self.head_name is None:
            return nn.Output(h, pooled=pooled)
        return nn.Output(h, logits=self.head(pooled, head_key), pooled=pooled)

    def _maps(self, x: Array, bias: Array | None, grid: tuple[int, int], key: jax.Array | None) -> nn.Output:
        where = {i: f"{self.layers.path}.{i - 2}.output" for i in self.config.out_indices if i > 1}
        run = lambda x: self.layers(x, bias=bias, grid=grid, key=key)[0]
        h, seen = reap(run, tuple(where.values()))(x)
        states = [seen[where[i]] if i > 1 else x for i in self.config.out_indices]
        maps = [state[:, 1:].reshape(x.shape[0], *grid, -1) for state in states]
        logits, auxiliary = self.head(maps, training=key is not None)
        h = h if self.final_norm is None else self.final_norm(h)
        return nn.Output(h, logits=logits, extra=None if auxiliary is None else {"auxiliary_logits": auxiliary})


Model = BEiT
PREFIX = "beit"
TABLE = "relative_position_bias.relative_position_bias_table"
KEYS = {
    **{ours: name for ours, name in vit.KEYS.items() if ours not in ("final_norm", "pooler")},
    "layers.{}.attention.relative.table": f"encoder.layer.{{}}.attention.attention.{TABLE}",
    "layers.{}.attention_scale": "encoder.layer.{}.lambda_1",
    "layers.{}.mlp_scale": "encoder.layer.{}.lambda_2",
    "relative.table": f"encoder.{TABLE}",
    "final_norm": "layernorm",
    "pooler": "pooler.layernorm",
}
HEADS = {
    "image_classification": ("BeitForImageClassification", {"head.classifier": "classifier"}),
    "masked_image_modeling": (
        "BeitForMaskedImageModeling",
        {"head.norm": HF("layernorm", top=True), "head.decoder": "lm_head"},
    ),
    "semantic_segmentation": ("BeitForSemanticSegmentation", beit_maps.KEYS),
}
BASE_CLASS = "BeitModel"
IGNORED = (r".*relative_position_index", r".*num_batches_tracked")
