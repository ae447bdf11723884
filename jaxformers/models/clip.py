"""CLIP (arXiv 2103.00020): an image and a text tower, trained so that what belongs together lies close together.

logits = exp(logit_scale) · image_embeds text_embedsᵀ, both of unit length after each tower's projection (figure 3). The
towers are models of their own: ``model.vision`` and ``model.text`` can be run, changed and saved alone.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers import nn
from jaxformers.models import clip_text, clip_vision
from jaxformers.models import config as configs
from jaxformers.models.keymap import nested, nested_ignored


@dataclasses.dataclass(frozen=True)
class Config:
    """The two towers' configs, and the width ``projection_dim`` of the space that they share."""

    vision: clip_vision.Config = clip_vision.Config()
    text: clip_text.Config = clip_text.Config()
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    num_labels: int = 2
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        towers = {
            name: tower.Config.from_hf(_section(hf, f"{name}_config"))
            for name, tower in (("vision", clip_vision), ("text", clip_text))
        }
        return configs.from_hf(cls, hf, {}, **towers)

    def to_hf(self) -> dict[str, Any]:
        hf = configs.to_hf(self, {}, "clip", skip=("vision", "text"))
        hf.pop("vision_config_dict", None)
        hf.pop("text_config_dict", None)
        return {**hf, "vision_config": self.vision.to_hf(), "text_config": self.text.to_hf()}

    @property
    def max_position_embeddings(self) -> int:
        return self.text.max_position_embeddings


def _section(hf: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A tower's settings. Early writers repeat them under ``…_config_dict``, which wins, its defaults too."""
    old = configs.section(hf, f"{name}_dict")
    return old or configs.section(hf, name)


class Clip(nnx.Module):
    """``vision`` and ``text`` with ``vision_projection``, ``text_projection`` and ``logit_scale``.

    Head: image_classification, of the mean over patches; such a model has the vision tower alone.
    """

    joint = True  # jf.embed puts texts and images into one space

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c = config
        both = head is None
        project = lambda of: nn.Linear(
            of.hidden_size, c.projection_dim, bias=False, std=of.initializer_range, rngs=rngs
        )
        self.vision = clip_vision.ClipVision(c.vision, rngs=rngs)
        self.text = clip_text.ClipText(c.text, rngs=rngs) if both else None
        self.vision_projection = project(c.vision) if both else None
        self.text_projection = project(c.text) if both else None
        self.logit_scale = nnx.Param(jnp.float32(c.logit_scale_init_value)) if both else None
        self.head = nnx.data(None)
        if head == "image_classification":
            width, std = c.vision.hidden_size, c.vision.initializer_range
            self.head = nn.ClassificationHead(width, c.num_labels, std=std, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "texts length"] | None = None,
        pixel_values: Float[Array, "images channels height width"] | None = None,
        attention_mask: Int[Array, "texts length"] | None = None,
        position_ids: Int[Array, "#texts length"] | None = None,
        *,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """Texts, images, or both. ``extra``: ``image_embeds`` (images, D) and ``text_embeds`` (texts, D) of unit
        length (``pooled``, where one is asked for alone), and the towers' own outputs, ``vision_model_output`` and
        ``text_model_output``. With both there are ``logits`` (images, texts), and ``extra["logits_per_text"]``, their
        transpose. The loss that CLIP was trained with is :func:`jaxformers.losses.info_nce` of the two with the model's
        ``logit_scale``."""
        vision_key, text_key, head_key = nn.split(rngs, 3)
        if self.head_name == "image_classification":
            if pixel_values is None or input_ids is not None:
                raise ValueError("pixel_values: this model classifies images, and takes nothing else")
            h = self.vision(pixel_values, rngs=vision_key).last_hidden_state
            return nn.Output(h, logits=self.head(h[:, 1:].mean(axis=1), head_key))
        if input_ids is None and pixel_values is None:
            raise ValueError("input_ids, pixel_values: give at least one of the two")
        extra: dict[str, Any] = {}
        if pixel_values is not None:
            seen = self.vision(pixel_values, rngs=vision_key)
            embeds = nn.normalize(self.vision_projection(seen.pooled))
            extra |= {"vision_model_output": seen, "image_embeds": embeds}
        if input_ids is not None:
            read = self.text(input_ids, attention_mask, position_ids, rngs=text_key)
            embeds = nn.normalize(self.text_projection(read.pooled))
            extra |= {"text_model_output": read, "text_embeds": embeds}
        if len(extra) < 4:
            return nn.Output(pooled=embeds, extra=extra)
        scale = jnp.exp(self.logit_scale.get_value())
        cosines = jnp.matmul(extra["image_embeds"], extra["text_embeds"].T, precision="highest")
        logits = cosines * scale.astype(cosines.dtype)
        return nn.Output(logits=logits, extra=extra | {"logits_per_text": logits.T})


Model = Clip
PREFIX = ""
KEYS = {
    **nested(clip_vision.KEYS, "vision", "vision_model"),
    **nested(clip_text.KEYS, "text", "text_model"),
    "vision_projection": "visual_projection",
    "text_projection": "text_projection",
    "logit_scale": "logit_scale",
}
HEADS = {"image_classification": ("CLIPForImageClassification", {"head.classifier": "classifier"})}
BASE_CLASS = "CLIPModel"
OPTIONAL = ("text", "vision_projection", "text_projection", "logit_scale")
IGNORED = (*nested_ignored(clip_vision, None, "vision_model"), *nested_ignored(clip_text, None, "text_model"))
