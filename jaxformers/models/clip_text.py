"""CLIP's text tower (arXiv 2103.00020): a causal pre-norm transformer, pooled at the end token."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers import nn
from jaxformers.models import clip_vision, vit
from jaxformers.models import config as configs

LEGACY_END = 2  # what config.json of early checkpoints says, whose texts end with the largest id instead


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of a CLIP text tower."""

    vocab_size: int = 49408
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    projection_dim: int = 512
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    attention_probs_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    pad_token_id: int | None = 1
    eos_token_id: int = 49407
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        return configs.from_hf(cls, hf, clip_vision.NAMES)

    def to_hf(self) -> dict[str, Any]:
        return configs.to_hf(self, clip_vision.NAMES, "clip_text_model")

    qkv_bias = True
    hidden_dropout_prob = 0.0


class ClipText(nnx.Module):
    """``embeddings`` → ``layers`` → ``final_norm``. Head: projection, into the space of the images."""

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, width, std = config, config.hidden_size, config.initializer_range
        self.embeddings = nn.Embeddings(c.vocab_size, width, positions=c.max_position_embeddings, std=std, rngs=rngs)
        self.layers = nn.Layers([vit.block(c, rngs) for _ in range(c.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(width, eps=c.layer_norm_eps)
        self.head = nnx.data(None)
        if head == "projection":
            self.head = nn.Linear(width, c.projection_dim, bias=False, std=std, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        *,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """``pooled`` is the state of the end token; ``extra["text_embeds"]`` (B, projection) is its projection, of any
        length. Positions are the slots, also when padded on the left."""
        length = input_ids.shape[1]
        nn.check_length(length, self.config.max_position_embeddings)
        embed_key, layers_key, head_key = nn.split(rngs, 3)
        positions = jnp.arange(length)[None] if position_ids is None else position_ids
        x = self.embeddings(input_ids, position_ids=positions, key=embed_key)
        h, _ = self.layers(x, mask=nn.Mask(valid=attention_mask, causal=True), key=layers_key)
        h = self.final_norm(h)
        if self.head_name == "sentence":
            return nn.encoder_output(self, h, attention_mask, None, head_key)
        pooled = end_state(h, input_ids, self.config.eos_token_id)
        extra = {"text_embeds": self.head(pooled)} if self.head_name == "projection" else None
        return nn.Output(h, pooled=pooled, extra=extra)


def end_state(
    h: Float[Array, "batch length width"], input_ids: Int[Array, "batch length"], end: int
) -> Float[Array, "batch width"]:
    """The state of each row's first ``end`` token; where ``end`` is 2, of the first token with the row's largest id.

    The latter is OpenAI's own rule, which checkpoints whose config.json says 2 were trained with. A row without the
    end token gives its first state, as in Hugging Face.
    """
    where = input_ids if end == LEGACY_END else (input_ids == end).astype(jnp.int32)
    return jnp.take_along_axis(h, where.argmax(axis=1)[:, None, None], axis=1)[:, 0]


Model = ClipText
PREFIX = "text_model"
LAYERS = {path: name for path, name in clip_vision.KEYS.items() if path.startswith("layers.")}
KEYS = {
    "embeddings.token": "embeddings.token_embedding",
    "embeddings.position": "embeddings.position_embedding",
    **LAYERS,
    "final_norm": "final_layer_norm",
}
HEADS = {"projection": ("CLIPTextModelWithProjection", {"head": "text_projection"})}
BASE_CLASS = "CLIPTextModel"
IGNORED = (r"embeddings\.position_ids",)
