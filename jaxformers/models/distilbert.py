"""DistilBERT (arXiv 1910.01108): BERT with half the layers, without token types and pooler."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers import nn
from jaxformers.models import config as configs
from jaxformers.models.bert import encoder_block

NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": "seq_classif_dropout",
    "sinusoidal": "sinusoidal_pos_embds",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of a DistilBERT. ``sinusoidal``: positions start as sines and cosines instead of noise."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float = 0.2
    qa_dropout: float = 0.1
    max_position_embeddings: int = 512
    sinusoidal: bool = False
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    num_labels: int = 2
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        return configs.from_hf(cls, hf, NAMES)

    def to_hf(self) -> dict[str, Any]:
        return configs.to_hf(self, NAMES, "distilbert")

    @property
    def layer_norm_eps(self) -> float:
        return 1e-12


class DistilBert(nnx.Module):
    """``embeddings`` → ``layers`` → ``head``.

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
            eps=c.layer_norm_eps,
            rate=c.hidden_dropout_prob,
            std=std,
            rngs=rngs,
        )
        if c.sinusoidal:
            self.embeddings.position.embedding.set_value(sinusoids(c.max_position_embeddings, c.hidden_size))
        self.layers = nn.Layers([encoder_block(c, rngs) for _ in range(c.num_hidden_layers)])
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
        elif head == "sequence_classification":
            self.head = nn.ClassificationHead(
                c.hidden_size, c.num_labels, dense="relu", rate=c.classifier_dropout, std=std, rngs=rngs
            )
        elif head == "token_classification":
            rate = c.hidden_dropout_prob
            self.head = nn.ClassificationHead(c.hidden_size, c.num_labels, rate=rate, std=std, rngs=rngs)
        elif head == "question_answering":
            self.head = nn.span_head(c.hidden_size, rate=c.qa_dropout, std=std, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Int[Array, "batch length"] | None = None,
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
            inputs_embeds=inputs_embeds,
            key=embed_key,
        )
        h, _ = self.layers(x, mask=nn.Mask(valid=attention_mask), key=layers_key)
        return nn.encoder_output(self, h, attention_mask, None, head_key)


def sinusoids(positions: int, width: int) -> Float[Array, "positions width"]:
    """sin (even columns) and cos (odd) of ``position / 10000^(2⌊j/2⌋/width)`` (arXiv 1706.03762, section 3.5)."""
    angles = np.arange(positions)[:, None] / 10000.0 ** (2 * (np.arange(width) // 2) / width)
    table = np.where(np.arange(width) % 2 == 0, np.sin(angles), np.cos(angles))
    return jnp.asarray(table, jnp.float32)


Model = DistilBert
PREFIX = "distilbert"
KEYS = {
    "embeddings.token": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "layers.{}.attention.query": "transformer.layer.{}.attention.q_lin",
    "layers.{}.attention.key": "transformer.layer.{}.attention.k_lin",
    "layers.{}.attention.value": "transformer.layer.{}.attention.v_lin",
    "layers.{}.attention.out": "transformer.layer.{}.attention.out_lin",
    "layers.{}.attention_norm": "transformer.layer.{}.sa_layer_norm",
    "layers.{}.mlp.up": "transformer.layer.{}.ffn.lin1",
    "layers.{}.mlp.down": "transformer.layer.{}.ffn.lin2",
    "layers.{}.mlp_norm": "transformer.layer.{}.output_layer_norm",
}
HEADS = {
    "masked_lm": (
        "DistilBertForMaskedLM",
        {
            "head.dense": "vocab_transform",
            "head.norm": "vocab_layer_norm",
            "head.decoder": "vocab_projector",
            "head.bias": "vocab_projector.bias",
        },
    ),
    "sequence_classification": (
        "DistilBertForSequenceClassification",
        {"head.dense": "pre_classifier", "head.classifier": "classifier"},
    ),
    "token_classification": ("DistilBertForTokenClassification", {"head.classifier": "classifier"}),
    "question_answering": ("DistilBertForQuestionAnswering", {"head.classifier": "qa_outputs"}),
}
BASE_CLASS = "DistilBertModel"
IGNORED = (r".*position_ids",)
