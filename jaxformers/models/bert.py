"""BERT (arXiv 1810.04805): post-norm encoder with learned positions and token types."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from jaxformers import nn
from jaxformers.models import config as configs


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of a BERT; the field names are Hugging Face's for BERT in every architecture."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    num_labels: int = 2
    pooler: bool = True
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        if hf.get("is_decoder") or hf.get("add_cross_attention"):
            raise ValueError("config.json: is_decoder/add_cross_attention: BERT is loaded as an encoder only")
        absolute = hf.get("position_embedding_type") or "absolute"
        if absolute != "absolute":
            raise ValueError(f"config.json: position_embedding_type {absolute!r} is not supported, only 'absolute'")
        return configs.from_hf(cls, hf, {})

    def to_hf(self) -> dict[str, Any]:
        return configs.to_hf(self, {}, "bert", skip=("pooler",))


class Bert(nnx.Module):
    """``embeddings`` → ``layers`` → ``pooler`` and ``head``.

    Heads: masked_lm, sequence_ and token_classification, question_answering.
    """

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, std = config, config.initializer_range
        self.embeddings = nn.Embeddings(
            c.vocab_size,
            c.hidden_size,
            positions=c.max_position_embeddings,
            token_types=c.type_vocab_size,
            eps=c.layer_norm_eps,
            rate=c.hidden_dropout_prob,
            std=std,
            rngs=rngs,
        )
        self.layers = nn.Layers([encoder_block(c, rngs) for _ in range(c.num_hidden_layers)])
        with_pooler = head == "sequence_classification" or (head is None and c.pooler)
        self.pooler = nn.Linear(c.hidden_size, c.hidden_size, std=std, rngs=rngs) if with_pooler else None
        self.head = nnx.data(None)
        if head == "masked_lm":
            self.head = nn.MaskedLMHead(
                c.hidden_size,
                c.vocab_size,
                act=c.hidden_act,
                eps=c.layer_norm_eps,
                tied=c.tie_word_embeddings,
                std=std,
                rngs=rngs,
            )
        elif head in ("sequence_classification", "token_classification"):
            rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
            self.head = nn.ClassificationHead(c.hidden_size, c.num_labels, rate=rate, std=std, rngs=rngs)
        elif head == "question_answering":
            self.head = nn.span_head(c.hidden_size, std=std, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Int[Array, "batch length"] | None = None,
        token_type_ids: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        nn.check_length(length, self.config.max_position_embeddings)
        embed_key, layers_key, head_key = nn.split(rngs, 3)
        x = self.embeddings(
            input_ids,
            position_ids=jnp.arange(length)[None] if position_ids is None else position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            key=embed_key,
        )
        h, _ = self.layers(x, mask=nn.Mask(valid=attention_mask), key=layers_key)
        pooled = None if self.pooler is None else jnp.tanh(self.pooler(h[:, 0]))
        return nn.encoder_output(self, h, attention_mask, pooled, head_key)


def encoder_block(c: Any, rngs: nnx.Rngs) -> nn.Block:
    """A post-norm encoder block, shared by BERT's descendants."""
    width, std = c.hidden_size, c.initializer_range
    return nn.Block(
        nn.Attention(width, c.num_attention_heads, rate=c.attention_probs_dropout_prob, std=std, rngs=rngs),
        nn.MLP(width, c.intermediate_size, act=c.hidden_act, std=std, rngs=rngs),
        nn.LayerNorm(width, eps=c.layer_norm_eps),
        nn.LayerNorm(width, eps=c.layer_norm_eps),
        prenorm=False,
        rate=c.hidden_dropout_prob,
    )


Model = Bert
PREFIX = "bert"
KEYS = {
    "embeddings.token": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "layers.{}.attention.query": "encoder.layer.{}.attention.self.query",
    "layers.{}.attention.key": "encoder.layer.{}.attention.self.key",
    "layers.{}.attention.value": "encoder.layer.{}.attention.self.value",
    "layers.{}.attention.out": "encoder.layer.{}.attention.output.dense",
    "layers.{}.attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layers.{}.mlp.up": "encoder.layer.{}.intermediate.dense",
    "layers.{}.mlp.down": "encoder.layer.{}.output.dense",
    "layers.{}.mlp_norm": "encoder.layer.{}.output.LayerNorm",
    "pooler": "pooler.dense",
}
HEADS = {
    "masked_lm": (
        "BertForMaskedLM",
        {
            "head.dense": "cls.predictions.transform.dense",
            "head.norm": "cls.predictions.transform.LayerNorm",
            "head.decoder": "cls.predictions.decoder",
            "head.bias": "cls.predictions.bias",
        },
    ),
    "sequence_classification": ("BertForSequenceClassification", {"head.classifier": "classifier"}),
    "token_classification": ("BertForTokenClassification", {"head.classifier": "classifier"}),
    "question_answering": ("BertForQuestionAnswering", {"head.classifier": "qa_outputs"}),
}
BASE_CLASS = "BertModel"
IGNORED = (r".*position_ids", r"cls\.seq_relationship\..*")
