"""Heads: what turns the last hidden state into logits or a sentence embedding.

A model keeps its head's name in ``head_name``: None, ``"masked_lm"``, ``"causal_lm"``, ``"sequence_classification"``,
``"token_classification"``, ``"question_answering"`` or ``"sentence"``; images have more, see their models.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers.nn.dropout import dropout, split
from jaxformers.nn.linear import Embed, Linear, add_bias
from jaxformers.nn.mlp import activation
from jaxformers.nn.norms import LayerNorm
from jaxformers.nn.output import Output
from jaxformers.nn.pooling import normalize, pool


class MaskedLMHead(nnx.Module):
    """``norm(act(dense(h))) Eᵀ + bias`` with the token embeddings E, or a ``decoder`` with its own bias when untied.

    ``token_width``: the width of E where it is not the model's.
    """

    def __init__(
        self,
        width: int,
        vocab: int,
        *,
        act: str,
        eps: float,
        tied: bool,
        token_width: int | None = None,
        std: float,
        rngs: nnx.Rngs,
    ):
        token_width = width if token_width is None else token_width
        self.path = ""
        self.act = act
        self.dense = Linear(width, token_width, std=std, rngs=rngs)
        self.norm = LayerNorm(token_width, eps=eps)
        self.decoder = None if tied else Linear(token_width, vocab, std=std, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(vocab)) if tied else None

    def __call__(self, h: Float[Array, "batch length width"], token: Embed) -> Float[Array, "batch length vocab"]:
        h = self.norm(activation(self.act)(self.dense(h)))
        if self.decoder is not None:
            return self.decoder(h)
        return add_bias(token.attend(h), self.bias.get_value())


class CausalLMHead(nnx.Module):
    """``h Eᵀ`` with the token embeddings E, or a ``decoder`` of its own when untied."""

    def __init__(self, width: int, vocab: int, *, tied: bool, bias: bool = False, std: float, rngs: nnx.Rngs):
        if tied and bias:
            raise ValueError("causal_lm head: a bias is for an untied decoder")
        self.path = ""
        self.decoder = None if tied else Linear(width, vocab, bias=bias, std=std, rngs=rngs)

    def __call__(self, h: Float[Array, "batch length width"], token: Embed) -> Float[Array, "batch length vocab"]:
        return token.attend(h) if self.decoder is None else self.decoder(h)


class ClassificationHead(nnx.Module):
    """``classifier(dropout(h))``, after ``act(dense(dropout(h)))`` where the architecture has one.

    Serves sequences (h is one vector each) and tokens alike.
    """

    def __init__(
        self,
        width: int,
        labels: int,
        *,
        dense: str | None = None,
        rate: float = 0.0,
        dense_rate: float = 0.0,
        bias: bool = True,
        std: float = 0.02,
        rngs: nnx.Rngs,
    ):
        self.path = ""
        self.act, self.rate, self.dense_rate = dense, rate, dense_rate
        self.dense = None if dense is None else Linear(width, width, std=std, rngs=rngs)
        self.classifier = Linear(width, labels, bias=bias, std=std, rngs=rngs)

    def __call__(self, h: Float[Array, "*batch width"], key: jax.Array | None = None) -> Float[Array, "*batch labels"]:
        first, second = split(key, 2)
        if self.dense is not None:
            h = activation(self.act)(self.dense(dropout(h, self.dense_rate, first)))
        return self.classifier(dropout(h, self.rate, second))


def span_head(width: int, *, rate: float = 0.0, std: float, rngs: nnx.Rngs) -> ClassificationHead:
    """Extractive question answering: two logits a token, of the answer's first and of its last token (B, L, 2)."""
    return ClassificationHead(width, 2, rate=rate, std=std, rngs=rngs)


class SentenceHead(nnx.Module):
    """A sentence embedding: pooled hidden states, ``act(dense(·))`` where there is one, unit length where asked.

    The parts are those of the sentence-transformers layout (Pooling, Dense, Normalize).
    """

    def __init__(
        self,
        width: int,
        *,
        pooling: str = "mean",
        out: int | None = None,
        act: str = "linear",
        bias: bool = True,
        normalize: bool = False,
        rngs: nnx.Rngs,
    ):
        self.path = ""
        self.pooling, self.act, self.normalize = pooling, act, normalize
        self.dense = None if out is None else Linear(width, out, bias=bias, rngs=rngs)

    def __call__(
        self, h: Float[Array, "batch length width"], attention_mask: Int[Array, "batch length"] | None
    ) -> Float[Array, "batch out"]:
        pooled = pool(h, attention_mask, self.pooling)
        if self.dense is not None:
            pooled = activation(self.act)(self.dense(pooled))
        return normalize(pooled) if self.normalize else pooled


def last_token(
    h: Float[Array, "batch length width"],
    input_ids: Int[Array, "batch length"] | None,
    attention_mask: Int[Array, "batch length"] | None,
    pad_id: int | None,
) -> Float[Array, "batch width"]:
    """The hidden state of each row's last real token, by ``pad_id`` where known (as Hugging Face), else by the mask."""
    if pad_id is not None and input_ids is not None:
        attention_mask = input_ids != pad_id
    return pool(h, attention_mask, "last")


def encoder_output(
    model: Any,
    h: Float[Array, "batch length width"],
    attention_mask: Int[Array, "batch length"] | None,
    pooled: Float[Array, "batch width"] | None,
    key: jax.Array | None,
) -> Output:
    """Run an encoder's head. A sequence classifier reads ``pooled`` where there is one, else the first token."""
    if model.head_name is None:
        return Output(h, pooled=pooled)
    if model.head_name == "sentence":
        return Output(h, pooled=model.head(h, attention_mask))
    if model.head_name == "masked_lm":
        return Output(h, logits=model.head(h, model.embeddings.token), pooled=pooled)
    if model.head_name == "sequence_classification":
        return Output(h, logits=model.head(h[:, 0] if pooled is None else pooled, key), pooled=pooled)
    return Output(h, logits=model.head(h, key), pooled=pooled)


def decoder_output(
    model: Any,
    h: Float[Array, "batch length width"],
    input_ids: Int[Array, "batch length"] | None,
    attention_mask: Int[Array, "batch length"] | None,
    cache: Any,
    logits_to_keep: int,
    key: jax.Array | None,
) -> Output:
    """Run a decoder's head. ``logits_to_keep`` > 0 forms the logits of the last so many positions only."""
    if model.head_name is None:
        return Output(h, cache=cache)
    if model.head_name == "sentence":
        return Output(h, pooled=model.head(h, attention_mask), cache=cache)
    if model.head_name == "causal_lm":
        return Output(h, logits=model.head(h[:, -logits_to_keep:], model.embeddings.token), cache=cache)
    if model.head_name == "sequence_classification":
        last = last_token(h, input_ids, attention_mask, model.config.pad_token_id)
        return Output(h, logits=model.head(last, key), cache=cache)
    return Output(h, logits=model.head(h, key), cache=cache)


def new_sentence_head(model: Any, **settings: Any) -> Any:
    """Give ``model`` (changed in place) a :class:`SentenceHead`; see there for the settings."""
    model.head = nnx.data(SentenceHead(model.config.hidden_size, **settings))
    model.head_name = "sentence"
    return model
