"""ELECTRA (arXiv 2003.10555): a BERT with narrow embeddings; the discriminator finds replaced tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers import nn
from jaxformers.models import bert
from jaxformers.models import config as configs


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of an ELECTRA. Embeddings of ``embedding_size`` are widened to ``hidden_size``."""

    vocab_size: int = 30522
    embedding_size: int = 128
    hidden_size: int = 256
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    intermediate_size: int = 1024
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
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        if hf.get("is_decoder") or hf.get("add_cross_attention"):
            raise ValueError("config.json: is_decoder/add_cross_attention: ELECTRA is loaded as an encoder only")
        return configs.from_hf(cls, hf, {})

    def to_hf(self) -> dict[str, Any]:
        return configs.to_hf(self, {}, "electra")


class DiscriminatorHead(nnx.Module):
    """One logit per token: was it replaced? ``classifier(act(dense(h)))``."""

    def __init__(self, width: int, *, act: str, std: float, rngs: nnx.Rngs):
        self.path = ""
        self.act = act
        self.dense = nn.Linear(width, width, std=std, rngs=rngs)
        self.classifier = nn.Linear(width, 1, std=std, rngs=rngs)

    def __call__(self, h: Float[Array, "batch length width"], key: jax.Array | None = None) -> jax.Array:
        return self.classifier(nn.activation(self.act)(self.dense(h)))[..., 0]


class Electra(nnx.Module):
    """``embeddings`` → ``layers`` → ``head``.

    Heads: pretraining (the discriminator, one logit a token), masked_lm (the generator), sequence_ and
    token_classification, question_answering.
    """

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, std = config, config.initializer_range
        self.embeddings = nn.Embeddings(
            c.vocab_size,
            c.embedding_size,
            positions=c.max_position_embeddings,
            token_types=c.type_vocab_size,
            out_width=c.hidden_size,
            eps=c.layer_norm_eps,
            rate=c.hidden_dropout_prob,
            std=std,
            rngs=rngs,
        )
        self.layers = nn.Layers([bert.encoder_block(c, rngs) for _ in range(c.num_hidden_layers)])
        self.head = nnx.data(None)
        rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
        if head == "pretraining":
            self.head = DiscriminatorHead(c.hidden_size, act=c.hidden_act, std=std, rngs=rngs)
        elif head == "masked_lm":
            self.head = nn.MaskedLMHead(
                c.hidden_size,
                c.vocab_size,
                act="gelu",  # whatever hidden_act says
                eps=c.layer_norm_eps,
                tied=c.tie_word_embeddings,
                token_width=c.embedding_size,
                std=std,
                rngs=rngs,
            )
        elif head == "sequence_classification":
            self.head = nn.ClassificationHead(
                c.hidden_size, c.num_labels, dense="gelu", rate=rate, dense_rate=rate, std=std, rngs=rngs
            )
        elif head == "token_classification":
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
        return nn.encoder_output(self, h, attention_mask, None, head_key)


Model = Electra
PREFIX = "electra"
KEYS = {
    **{ours: theirs for ours, theirs in bert.KEYS.items() if ours != "pooler"},
    "embeddings.widen": "embeddings_project",
}
HEADS = {
    "pretraining": (
        "ElectraForPreTraining",
        {
            "head.dense": "discriminator_predictions.dense",
            "head.classifier": "discriminator_predictions.dense_prediction",
        },
    ),
    "masked_lm": (
        "ElectraForMaskedLM",
        {
            "head.dense": "generator_predictions.dense",
            "head.norm": "generator_predictions.LayerNorm",
            "head.decoder": "generator_lm_head",
            "head.bias": "generator_lm_head.bias",
        },
    ),
    "sequence_classification": (
        "ElectraForSequenceClassification",
        {"head.dense": "classifier.dense", "head.classifier": "classifier.out_proj"},
    ),
    "token_classification": ("ElectraForTokenClassification", {"head.classifier": "classifier"}),
    "question_answering": ("ElectraForQuestionAnswering", {"head.classifier": "qa_outputs"}),
}
BASE_CLASS = "ElectraModel"
IGNORED = (r".*position_ids",)
