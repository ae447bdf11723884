"""BERT (arXiv 1810.04805): post-norm encoder with learned positions and token types."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers import nn
from jaxformers.models import config as configs


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of a BERT; the field names are Hugging Face's for BERT in every architecture.

    ``is_decoder``: tokens see only those before them; ``add_cross_attention``: and the memory of an encoder.
    """

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
    is_decoder: bool = False
    add_cross_attention: bool = False
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        check_decoder(self)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        absolute = hf.get("position_embedding_type") or "absolute"
        if absolute != "absolute":
            raise ValueError(f"config.json: position_embedding_type {absolute!r} is not supported, only 'absolute'")
        config = configs.from_hf(cls, hf, {})
        check_memory_width(hf, config)
        return config

    def to_hf(self) -> dict[str, Any]:
        return decoder_to_hf(configs.to_hf(self, {}, "bert", skip=("pooler", *DECODER)), self)


DECODER = ("is_decoder", "add_cross_attention")


def check_decoder(config: Any) -> None:
    """Cross-attention is a decoder's."""
    if config.add_cross_attention and not config.is_decoder:
        raise ValueError("config.json: add_cross_attention is for decoders; is_decoder must be true too")


def check_memory_width(hf: Mapping[str, Any], config: Any) -> None:
    """Cross-attention reads a memory as wide as the model."""
    width = hf.get("cross_attention_hidden_size")
    if width not in (None, config.hidden_size):
        raise ValueError(
            f"config.json: cross_attention_hidden_size {width!r} is not supported, only the hidden_size, "
            f"{config.hidden_size}"
        )


def decoder_to_hf(hf: dict[str, Any], config: Any) -> dict[str, Any]:
    """``hf`` with what says that ``config`` is a decoder's; an encoder's file says nothing unless it did before."""
    return hf | {name: getattr(config, name) for name in DECODER if getattr(config, name) or name in hf}


class Bert(nnx.Module):
    """``embeddings`` → ``layers`` → ``pooler`` and ``head``.

    Heads: masked_lm, causal_lm (of a decoder), sequence_ and token_classification, question_answering.
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
        check_head(config, head)
        if head in ("masked_lm", "causal_lm"):
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

    def empty_cache(self, batch: int, slots: int, memory: nn.Memory | None = None) -> nn.Cache:
        """A decoder's cache for ``batch`` sequences of up to ``slots`` tokens, with ``memory`` where there is one."""
        return nn.empty_cache(self, batch, slots, memory)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Int[Array, "batch length"] | None = None,
        token_type_ids: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        memory: nn.Memory | None = None,
        cache: nn.Cache | None = None,
        logits_to_keep: int = 0,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """``memory``, ``cache`` and ``logits_to_keep`` are for decoders."""
        batch, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        nn.check_length(length, self.config.max_position_embeddings, cache if position_ids is None else None)
        embed_key, layers_key, head_key = nn.split(rngs, 3)
        context, slots, cache = surroundings(self.config, batch, length, attention_mask, memory, cache)
        x = self.embeddings(
            input_ids,
            position_ids=slots if position_ids is None else position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            key=embed_key,
        )
        h, layers = self.layers(x, cache=None if cache is None else cache.layers, key=layers_key, **context)
        cache = nn.advance(cache, layers, length)
        return output(self, h, attention_mask, cache, logits_to_keep, head_key)


def check_head(config: Any, head: str | None) -> None:
    """Only a decoder predicts the next token."""
    if head == "causal_lm" and not config.is_decoder:
        raise ValueError("head: causal_lm is a decoder's; config.json (or a config override) must say is_decoder")


def surroundings(
    config: Any,
    batch: int,
    length: int,
    attention_mask: Int[Array, "batch length"] | None,
    memory: nn.Memory | None,
    cache: nn.Cache | None,
) -> tuple[dict[str, Any], Int[Array, "1 length"], nn.Cache | None]:
    """``(what the layers take, slots of the tokens, cache)`` of an encoder, or of a decoder as ``config`` says."""
    if memory is not None and not config.add_cross_attention:
        raise ValueError(nn.NO_CROSS_ATTENTION)
    if not config.is_decoder:
        if cache is not None:
            raise ValueError("cache: for decoders; this model's config.json does not say is_decoder")
        return {"mask": nn.Mask(valid=attention_mask)}, jnp.arange(length)[None], None
    mask, slots, cache = nn.causal_mask(batch, length, attention_mask, cache)
    return {"mask": mask, **nn.memory_context(memory, cache)}, slots, cache


def output(
    model: Any,
    h: Float[Array, "batch length width"],
    attention_mask: Int[Array, "batch length"] | None,
    cache: nn.Cache | None,
    logits_to_keep: int,
    key: jax.Array | None,
) -> nn.Output:
    """Run the pooler and the head of a BERT or a RoBERTa."""
    if model.head_name == "causal_lm":
        return nn.Output(h, logits=model.head(h[:, -logits_to_keep:], model.embeddings.token), cache=cache)
    pooled = None if model.pooler is None else jnp.tanh(model.pooler(h[:, 0]))
    return dataclasses.replace(nn.encoder_output(model, h, attention_mask, pooled, key), cache=cache)


def encoder_block(c: Any, rngs: nnx.Rngs) -> nn.Block:
    """A post-norm encoder block, shared by BERT's descendants; with cross-attention where the config adds it."""
    width, std = c.hidden_size, c.initializer_range
    attention = lambda: nn.Attention(
        width, c.num_attention_heads, rate=c.attention_probs_dropout_prob, std=std, rngs=rngs
    )
    norm = lambda: nn.LayerNorm(width, eps=c.layer_norm_eps)
    own, mlp = attention(), nn.MLP(width, c.intermediate_size, act=c.hidden_act, std=std, rngs=rngs)
    cross = {}
    if getattr(c, "add_cross_attention", False):
        cross = {"cross_attention": attention(), "cross_attention_norm": norm()}
    return nn.Block(own, mlp, norm(), norm(), prenorm=False, rate=c.hidden_dropout_prob, **cross)


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
    "layers.{}.cross_attention.query": "encoder.layer.{}.crossattention.self.query",
    "layers.{}.cross_attention.key": "encoder.layer.{}.crossattention.self.key",
    "layers.{}.cross_attention.value": "encoder.layer.{}.crossattention.self.value",
    "layers.{}.cross_attention.out": "encoder.layer.{}.crossattention.output.dense",
    "layers.{}.cross_attention_norm": "encoder.layer.{}.crossattention.output.LayerNorm",
    "layers.{}.mlp.up": "encoder.layer.{}.intermediate.dense",
    "layers.{}.mlp.down": "encoder.layer.{}.output.dense",
    "layers.{}.mlp_norm": "encoder.layer.{}.output.LayerNorm",
    "pooler": "pooler.dense",
}
LM_HEAD = {
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.decoder": "cls.predictions.decoder",
    "head.bias": "cls.predictions.bias",
}
HEADS = {
    "masked_lm": ("BertForMaskedLM", LM_HEAD),
    "causal_lm": ("BertLMHeadModel", LM_HEAD),
    "sequence_classification": ("BertForSequenceClassification", {"head.classifier": "classifier"}),
    "token_classification": ("BertForTokenClassification", {"head.classifier": "classifier"}),
    "question_answering": ("BertForQuestionAnswering", {"head.classifier": "qa_outputs"}),
}
BASE_CLASS = "BertModel"
IGNORED = (r".*position_ids", r"cls\.seq_relationship\..*")
