"""MPNet (arXiv 2004.09297): post-norm encoder with learned positions and a relative bias that all layers share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers import nn
from jaxformers.models import config as configs
from jaxformers.models.bert import encoder_block

PAD = 1  # where positions start, whatever pad_token_id says
BUCKETS = 32  # of the relative bias, whatever relative_attention_num_buckets says: that is the table's height only


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of an MPNet. 514 positions serve 512 tokens."""

    vocab_size: int = 30527
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    relative_attention_num_buckets: int = BUCKETS
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = PAD
    tie_word_embeddings: bool = True
    num_labels: int = 2
    pooler: bool = True
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @property
    def max_length(self) -> int:
        """Longest input: the positions up to ``PAD`` serve padding."""
        return self.max_position_embeddings - PAD - 1

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        config = configs.from_hf(cls, hf, {})
        if config.relative_attention_num_buckets < BUCKETS:
            found = config.relative_attention_num_buckets
            raise ValueError(f"config.json: relative_attention_num_buckets {found}: MPNet needs {BUCKETS} or more")
        return config

    def to_hf(self) -> dict[str, Any]:
        return configs.to_hf(self, {}, "mpnet", skip=("pooler",))


class MPNet(nnx.Module):
    """``embeddings``, ``relative_bias`` → ``layers`` → ``pooler`` or ``head``, the heads being BERT's."""

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, std = config, config.initializer_range
        self.embeddings = nn.Embeddings(
            c.vocab_size,
            c.hidden_size,
            positions=c.max_position_embeddings,
            eps=c.layer_norm_eps,
            rate=c.hidden_dropout_prob,
            std=std,
            rngs=rngs,
        )
        self.relative_bias = nn.Embed(c.relative_attention_num_buckets, c.num_attention_heads, std=std, rngs=rngs)
        self.layers = nn.Layers([encoder_block(c, rngs) for _ in range(c.num_hidden_layers)])
        with_pooler = head is None and c.pooler
        self.pooler = nn.Linear(c.hidden_size, c.hidden_size, std=std, rngs=rngs) if with_pooler else None
        self.head = nnx.data(None)
        if head == "masked_lm":
            self.head = nn.MaskedLMHead(
                c.hidden_size,
                c.vocab_size,
                act="gelu",  # whatever hidden_act says
                eps=c.layer_norm_eps,
                tied=c.tie_word_embeddings,
                std=std,
                rngs=rngs,
            )
        elif head in ("sequence_classification", "token_classification"):
            rate = c.hidden_dropout_prob
            dense = "tanh" if head == "sequence_classification" else None
            self.head = nn.ClassificationHead(
                c.hidden_size, c.num_labels, dense=dense, rate=rate, dense_rate=rate, std=std, rngs=rngs
            )
        elif head == "question_answering":
            self.head = nn.span_head(c.hidden_size, std=std, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """The relative bias counts slots, the learned positions count the ids that are not padding."""
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        nn.check_length(length, self.config.max_length)
        embed_key, layers_key, head_key = nn.split(rngs, 3)
        if position_ids is None:
            by_ids = inputs_embeds is None
            position_ids = nn.padded_positions(input_ids, PAD) if by_ids else jnp.arange(length)[None] + PAD + 1
        x = self.embeddings(input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds, key=embed_key)
        h, _ = self.layers(x, mask=nn.Mask(valid=attention_mask), bias=self._bias(length), key=layers_key)
        pooled = None if self.pooler is None else jnp.tanh(self.pooler(h[:, 0]))
        return nn.encoder_output(self, h, attention_mask, pooled, head_key)

    def _bias(self, length: int) -> Float[Array, "1 heads length length"]:
        slots = jnp.arange(length)
        buckets = nn.relative_buckets(slots, slots, buckets=BUCKETS, bidirectional=True)
        return self.relative_bias(buckets).transpose(2, 0, 1)[None]


Model = MPNet
PREFIX = "mpnet"
KEYS = {
    "embeddings.token": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "relative_bias": "encoder.relative_attention_bias",
    "layers.{}.attention.query": "encoder.layer.{}.attention.attn.q",
    "layers.{}.attention.key": "encoder.layer.{}.attention.attn.k",
    "layers.{}.attention.value": "encoder.layer.{}.attention.attn.v",
    "layers.{}.attention.out": "encoder.layer.{}.attention.attn.o",
    "layers.{}.attention_norm": "encoder.layer.{}.attention.LayerNorm",
    "layers.{}.mlp.up": "encoder.layer.{}.intermediate.dense",
    "layers.{}.mlp.down": "encoder.layer.{}.output.dense",
    "layers.{}.mlp_norm": "encoder.layer.{}.output.LayerNorm",
    "pooler": "pooler.dense",
}
HEADS = {
    "masked_lm": (
        "MPNetForMaskedLM",
        {
            "head.dense": "lm_head.dense",
            "head.norm": "lm_head.layer_norm",
            "head.decoder": "lm_head.decoder",
            "head.bias": "lm_head.bias",
        },
    ),
    "sequence_classification": (
        "MPNetForSequenceClassification",
        {"head.dense": "classifier.dense", "head.classifier": "classifier.out_proj"},
    ),
    "token_classification": ("MPNetForTokenClassification", {"head.classifier": "classifier"}),
    "question_answering": ("MPNetForQuestionAnswering", {"head.classifier": "qa_outputs"}),
}
BASE_CLASS = "MPNetModel"
IGNORED = (r".*position_ids",)
