"""RoBERTa (arXiv 1907.11692), XLM-RoBERTa (1911.02116), CamemBERT (1911.03894): BERT whose positions skip padding."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Int

from jaxformers import nn
from jaxformers.models import bert
from jaxformers.models import config as configs


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of a RoBERTa. Positions start at ``pad_token_id + 1``: 514 rows serve 512 tokens.

    ``is_decoder``: tokens see only those before them; ``add_cross_attention``: and the memory of an encoder.
    """

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 1
    tie_word_embeddings: bool = True
    num_labels: int = 2
    pooler: bool = True
    is_decoder: bool = False
    add_cross_attention: bool = False
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        bert.check_decoder(self)

    @property
    def first_position(self) -> int:
        return self.pad_token_id + 1

    @property
    def max_length(self) -> int:
        """Longest input: the positions up to ``pad_token_id`` serve padding."""
        return self.max_position_embeddings - self.pad_token_id - 1

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        absolute = hf.get("position_embedding_type") or "absolute"
        if absolute != "absolute":
            raise ValueError(f"config.json: position_embedding_type {absolute!r} is not supported, only 'absolute'")
        config = configs.from_hf(cls, hf, {})
        bert.check_memory_width(hf, config)
        return config

    def to_hf(self) -> dict[str, Any]:
        model_type = json.loads(self.hf).get("model_type", "roberta")  # or xlm-roberta, camembert
        return bert.decoder_to_hf(configs.to_hf(self, {}, model_type, skip=("pooler", *bert.DECODER)), self)


class Roberta(nnx.Module):
    """``embeddings`` → ``layers`` → ``pooler`` or ``head``.

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
        self.layers = nn.Layers([bert.encoder_block(c, rngs) for _ in range(c.num_hidden_layers)])
        with_pooler = head is None and c.pooler
        self.pooler = nn.Linear(c.hidden_size, c.hidden_size, std=std, rngs=rngs) if with_pooler else None
        self.head = nnx.data(None)
        check_head(config, head)
        if head in ("masked_lm", "causal_lm"):
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
            rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
            dense = "tanh" if head == "sequence_classification" else None
            self.head = nn.ClassificationHead(
                c.hidden_size, c.num_labels, dense=dense, rate=rate, dense_rate=rate, std=std, rngs=rngs
            )
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
        """Positions come from the ids that are not padding, whatever ``attention_mask`` says, as in Hugging Face.

        ``memory``, ``cache`` and ``logits_to_keep`` are for decoders. Tokens in a cache count as real, padding too:
        where they are padded on the left give ``position_ids``, the first of them ``config.first_position``.
        """
        batch, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        first = self.config.first_position
        nn.check_length(length, self.config.max_length, cache if position_ids is None else None)
        embed_key, layers_key, head_key = nn.split(rngs, 3)
        context, slots, cache = bert.surroundings(self.config, batch, length, attention_mask, memory, cache)
        if position_ids is None:
            used = 0 if cache is None else cache.used
            by_ids = inputs_embeds is None
            position_ids = nn.padded_positions(input_ids, first - 1, used) if by_ids else slots + first
        x = self.embeddings(
            input_ids,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            key=embed_key,
        )
        h, layers = self.layers(x, cache=None if cache is None else cache.layers, key=layers_key, **context)
        cache = nn.advance(cache, layers, length)
        return bert.output(self, h, attention_mask, cache, logits_to_keep, head_key)


check_head = bert.check_head
Model = Roberta
PREFIX = "roberta"
KEYS = bert.KEYS
LM_HEAD = {
    "head.dense": "lm_head.dense",
    "head.norm": "lm_head.layer_norm",
    "head.decoder": "lm_head.decoder",
    "head.bias": "lm_head.bias",
}
HEADS = {
    "masked_lm": ("RobertaForMaskedLM", LM_HEAD),
    "causal_lm": ("RobertaForCausalLM", LM_HEAD),
    "sequence_classification": (
        "RobertaForSequenceClassification",
        {"head.dense": "classifier.dense", "head.classifier": "classifier.out_proj"},
    ),
    "token_classification": ("RobertaForTokenClassification", {"head.classifier": "classifier"}),
    "question_answering": ("RobertaForQuestionAnswering", {"head.classifier": "qa_outputs"}),
}
BASE_CLASS = "RobertaModel"
IGNORED = (r".*position_ids",)
