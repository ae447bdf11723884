"""DeiT (arXiv 2012.12877): a ViT with a second special token, which learns from a teacher."""

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


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of a DeiT; ``image_size`` and ``patch_size`` are (height, width) in pixels."""

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
        hf = configs.to_hf(self, {}, "deit", skip=("pooler", "image_size", "patch_size"))
        return configs.put_pairs(hf, self, "image_size", "patch_size")

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]


class TeacherHead(nnx.Module):
    """Two classifiers, of the class token and of the distillation token; the logits are their mean."""

    def __init__(self, width: int, labels: int, *, std: float, rngs: nnx.Rngs):
        self.path = ""
        self.classifier = nn.Linear(width, labels, std=std, rngs=rngs)
        self.distillation_classifier = nn.Linear(width, labels, std=std, rngs=rngs)

    def __call__(self, h: Float[Array, "batch length width"]) -> tuple[jax.Array, dict[str, jax.Array]]:
        first, second = self.classifier(h[:, 0]), self.distillation_classifier(h[:, 1])
        return (first + second) / 2, {"cls_logits": first, "distillation_logits": second}


class DeiT(nnx.Module):
    """``embeddings`` → ``layers`` → ``final_norm`` → ``pooler`` or ``head``.

    Heads: image_classification, image_classification_with_teacher (``extra``: cls_logits, distillation_logits),
    masked_image_modeling (the image's pixels).
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
            distillation=True,
            mask_token=head == "masked_image_modeling",
            rate=c.hidden_dropout_prob,
            std=std,
            rngs=rngs,
        )
        self.layers = nn.Layers([vit.block(c, rngs) for _ in range(c.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(width, eps=c.layer_norm_eps)
        with_pooler = head is None and c.pooler
        self.pooler = nn.Linear(width, c.pooler_output_size or width, std=std, rngs=rngs) if with_pooler else None
        self.head = nnx.data(None)
        if head == "image_classification":
            self.head = nn.ClassificationHead(width, c.num_labels, std=std, rngs=rngs)
        elif head == "image_classification_with_teacher":
            self.head = TeacherHead(width, c.num_labels, std=std, rngs=rngs)
        elif head == "masked_image_modeling":
            self.head = vit.PixelHead(width, c.encoder_stride, c.num_channels, std=std, rngs=rngs)

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
        if self.head_name == "image_classification_with_teacher":
            logits, both = self.head(h)
            return nn.Output(h, logits=logits, extra=both)
        if self.head_name == "masked_image_modeling":
            return nn.Output(h, logits=self.head(h[:, 2:].reshape(h.shape[0], *grid, -1)))
        if self.head_name == "sentence":
            return nn.Output(h, pooled=self.head(h, None))
        pooled = None if self.pooler is None else nn.activation(self.config.pooler_act)(self.pooler(h[:, 0]))
        return nn.Output(h, pooled=pooled)


Model = DeiT
PREFIX = "deit"
KEYS = {**vit.KEYS, "embeddings.distillation_token": HF("embeddings.distillation_token", ones=2)}
HEADS = {
    "image_classification": ("DeiTForImageClassification", {"head.classifier": "classifier"}),
    "image_classification_with_teacher": (
        "DeiTForImageClassificationWithTeacher",
        {"head.classifier": "cls_classifier", "head.distillation_classifier": "distillation_classifier"},
    ),
    "masked_image_modeling": ("DeiTForMaskedImageModeling", {"head.decoder": "decoder.0"}),
}
BASE_CLASS = "DeiTModel"
IGNORED = (r"embeddings\.mask_token",)  # a body without a head that predicts pixels reads none
