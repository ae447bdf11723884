"""OPT (arXiv 2205.01068): decoder with learned positions that skip padding; pre-norm, but for the 350M model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from jaxformers import nn
from jaxformers.models import config as configs

NAMES = {
    "intermediate_size": "ffn_dim",
    "hidden_act": "activation_function",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "initializer_range": "init_std",
    "embedding_size": "word_embed_proj_dim",
    "prenorm": "do_layer_norm_before",
    "remove_final_norm": "_remove_final_layer_norm",
    "norm_affine": "layer_norm_elementwise_affine",
}
OFFSET = 2  # the first two rows of the position table serve padding
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of an OPT. ``embedding_size`` (None: the width) is that of token rows and of what ``head`` reads.

    ``final_norm`` exists in pre-norm models, unless ``remove_final_norm``.
    """

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    embedding_size: int | None = None
    hidden_act: str = "relu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.0
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    prenorm: bool = True
    remove_final_norm: bool = False
    norm_affine: bool = True
    enable_bias: bool = True
    pad_token_id: int | None = 1
    tie_word_embeddings: bool = True
    num_labels: int = 2
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        if hf.get("layerdrop"):
            raise ValueError(f"config.json: layerdrop {hf['layerdrop']!r} is not supported, only 0")
        return configs.from_hf(cls, hf, NAMES)

    def to_hf(self) -> dict[str, Any]:
        return configs.to_hf(self, NAMES, "opt")

    @property
    def token_width(self) -> int:
        return self.embedding_size or self.hidden_size


class OPT(nnx.Module):
    """``embeddings`` → ``layers`` → ``final_norm`` → ``project_out`` → ``head``: causal_lm, sequence_classification."""

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, std = config, config.initializer_range
        self.embeddings = nn.Embeddings(
            c.vocab_size,
            c.hidden_size,
            positions=c.max_position_embeddings + OFFSET,
            token_width=c.token_width,
            std=std,
            rngs=rngs,
        )
        self.layers = nn.Layers([self._block(c, rngs) for _ in range(c.num_hidden_layers)])
        final = c.prenorm and not c.remove_final_norm
        self.final_norm = nn.LayerNorm(c.hidden_size, eps=EPS, affine=c.norm_affine) if final else None
        narrow = c.token_width != c.hidden_size
        self.project_out = nn.Linear(c.hidden_size, c.token_width, bias=False, std=std, rngs=rngs) if narrow else None
        self.head = nnx.data(None)
        if head == "causal_lm":
            self.head = nn.CausalLMHead(c.token_width, c.vocab_size, tied=c.tie_word_embeddings, std=std, rngs=rngs)
        elif head == "sequence_classification":
            self.head = nn.ClassificationHead(c.token_width, c.num_labels, bias=False, std=std, rngs=rngs)

    @staticmethod
    def _block(c: Config, rngs: nnx.Rngs) -> nn.Block:
        attention = nn.Attention(
            c.hidden_size,
            c.num_attention_heads,
            bias=c.enable_bias,
            rate=c.attention_probs_dropout_prob,
            std=c.initializer_range,
            rngs=rngs,
        )
        mlp = nn.MLP(
            c.hidden_size,
            c.intermediate_size,
            act=c.hidden_act,
            bias=c.enable_bias,
            std=c.initializer_range,
            rngs=rngs,
        )
        norms = (nn.LayerNorm(c.hidden_size, eps=EPS, affine=c.norm_affine) for _ in range(2))
        return nn.Block(attention, mlp, *norms, prenorm=c.prenorm, rate=c.hidden_dropout_prob)

    def empty_cache(self, batch: int, slots: int) -> nn.Cache:
        """A cache for ``batch`` sequences of up to ``slots`` tokens, in the embeddings' dtype."""
        dtype = self.embeddings.token.embedding.get_value().dtype
        return nn.new_cache(self.layers.empty_cache(batch, slots, dtype), batch, slots)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        cache: nn.Cache | None = None,
        logits_to_keep: int = 0,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """Without ``position_ids`` real tokens are counted from 0, so padding on the left moves nothing.

        ``last_hidden_state`` has the width of the token rows, after ``project_out``.
        """
        batch, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        nn.check_length(length, self.config.max_position_embeddings)
        layers_key, head_key = nn.split(rngs, 2)
        mask, slots, cache = nn.causal_mask(batch, length, attention_mask, cache)
        if position_ids is None:
            position_ids = slots if mask.valid is None else _real_positions(mask, length)
        x = self.embeddings(input_ids, position_ids=position_ids + OFFSET, inputs_embeds=inputs_embeds)
        layer_caches = None if cache is None else cache.layers
        h, layer_caches = self.layers(x, mask=mask, cache=layer_caches, key=layers_key)
        cache = nn.advance(cache, layer_caches, length)
        h = h if self.final_norm is None else self.final_norm(h)
        h = h if self.project_out is None else self.project_out(h)
        return nn.decoder_output(self, h, input_ids, attention_mask, cache, logits_to_keep, head_key)


def _real_positions(mask: nn.Mask, length: int) -> Int[Array, "batch length"]:
    """How many real tokens precede each of the ``length`` new ones, those in the cache included; padding: -1."""
    valid = mask.valid.astype(jnp.int32)
    counted = jnp.cumsum(valid, axis=1) * valid - 1
    return jax.lax.dynamic_slice_in_dim(counted, mask.start, length, axis=1)


Model = OPT
PREFIX = "model"
KEYS = {
    "embeddings.token": "decoder.embed_tokens",
    "embeddings.project": "decoder.project_in",
    "embeddings.position": "decoder.embed_positions",
    "layers.{}.attention.query": "decoder.layers.{}.self_attn.q_proj",
    "layers.{}.attention.key": "decoder.layers.{}.self_attn.k_proj",
    "layers.{}.attention.value": "decoder.layers.{}.self_attn.v_proj",
    "layers.{}.attention.out": "decoder.layers.{}.self_attn.out_proj",
    "layers.{}.attention_norm": "decoder.layers.{}.self_attn_layer_norm",
    "layers.{}.mlp.up": "decoder.layers.{}.fc1",
    "layers.{}.mlp.down": "decoder.layers.{}.fc2",
    "layers.{}.mlp_norm": "decoder.layers.{}.final_layer_norm",
    "final_norm": "decoder.final_layer_norm",
    "project_out": "decoder.project_out",
}
HEADS = {
    "causal_lm": ("OPTForCausalLM", {"head.decoder": "lm_head"}),
    "sequence_classification": ("OPTForSequenceClassification", {"head.classifier": "score"}),
}
BASE_CLASS = "OPTModel"
IGNORED = (r"decoder\.version",)
