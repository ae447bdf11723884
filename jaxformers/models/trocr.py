"""TrOCR's decoder (arXiv 2109.10282), which writes the text that an image encoder sees: BART's, post-norm.

It is the decoder of a vision-encoder-decoder; see :mod:`jaxformers.models.vision_encoder_decoder`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers import nn
from jaxformers.models import config as configs

NAMES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "decoder_layers",
    "num_attention_heads": "decoder_attention_heads",
    "intermediate_size": "decoder_ffn_dim",
    "hidden_act": "activation_function",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "activation_dropout_prob": "activation_dropout",
    "initializer_range": "init_std",
}
OFFSET = 2  # the first rows of the learned position table are never used
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of a TrOCR decoder. ``cross_attention_hidden_size``: the memory's width, None: the decoder's.

    Without ``use_learned_position_embeddings`` positions are sines and cosines, and skip padding.
    """

    vocab_size: int = 50265
    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    cross_attention_hidden_size: int | None = None
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.0
    activation_dropout_prob: float = 0.0
    max_position_embeddings: int = 512
    scale_embedding: bool = False
    use_learned_position_embeddings: bool = True
    layernorm_embedding: bool = True
    initializer_range: float = 0.02
    pad_token_id: int = 1
    decoder_start_token_id: int = 2
    tie_word_embeddings: bool = True
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        if hf.get("decoder_layerdrop"):
            raise ValueError(f"config.json: decoder_layerdrop {hf['decoder_layerdrop']!r} is not supported, only 0")
        config = configs.from_hf(cls, hf, NAMES)
        if not config.use_learned_position_embeddings and (config.hidden_size % 2 or config.hidden_size < 4):
            raise ValueError(f"config.json: d_model {config.hidden_size}: sines and cosines need an even width of 4 up")
        return config

    def to_hf(self) -> dict[str, Any]:
        return configs.to_hf(self, NAMES, "trocr")

    add_cross_attention = is_decoder = True

    @property
    def token_scale(self) -> float:
        return math.sqrt(self.hidden_size) if self.scale_embedding else 1.0

    @property
    def first_position(self) -> int:
        return 0 if self.use_learned_position_embeddings else self.pad_token_id + 1


class TrOCR(nnx.Module):
    """``embeddings`` → ``layers`` with cross-attention → ``head``. Head: causal_lm."""

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, std = config, config.initializer_range
        self.embeddings = nn.Embeddings(
            c.vocab_size,
            c.hidden_size,
            positions=c.max_position_embeddings + OFFSET if c.use_learned_position_embeddings else 0,
            scale=c.token_scale,
            eps=EPS if c.layernorm_embedding else None,
            rate=c.hidden_dropout_prob,
            std=std,
            rngs=rngs,
        )
        self.layers = nn.Layers([self._block(c, rngs) for _ in range(c.num_hidden_layers)])
        self.head = nnx.data(None)
        if head == "causal_lm":
            self.head = nn.CausalLMHead(c.hidden_size, c.vocab_size, tied=c.tie_word_embeddings, std=std, rngs=rngs)

    @staticmethod
    def _block(c: Config, rngs: nnx.Rngs) -> nn.Block:
        width, std = c.hidden_size, c.initializer_range
        attention = lambda memory: nn.Attention(
            width,
            c.num_attention_heads,
            memory_width=memory,
            rate=c.attention_probs_dropout_prob,
            std=std,
            rngs=rngs,
        )
        norm = lambda: nn.LayerNorm(width, eps=EPS)
        mlp = nn.MLP(
            width, c.intermediate_size, act=c.hidden_act, rate=c.activation_dropout_prob, std=std, rngs=rngs
        )  # fmt: skip
        return nn.Block(
            attention(None),
            mlp,
            norm(),
            norm(),
            prenorm=False,
            cross_attention=attention(c.cross_attention_hidden_size),
            cross_attention_norm=norm(),
            rate=c.hidden_dropout_prob,
        )

    def empty_cache(self, batch: int, slots: int, memory: nn.Memory | None = None) -> nn.Cache:
        """A cache for ``batch`` sequences of up to ``slots`` tokens, with ``memory`` where there is one."""
        return nn.empty_cache(self, batch, slots, memory)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        memory: nn.Memory | None = None,
        cache: nn.Cache | None = None,
        logits_to_keep: int = 0,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """Learned positions are the slots, also when padded on the left; sines and cosines skip the padding's ids."""
        batch, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        c = self.config
        embed_key, layers_key, head_key = nn.split(rngs, 3)
        mask, slots, cache = nn.causal_mask(batch, length, attention_mask, cache)
        if c.use_learned_position_embeddings:
            nn.check_length(length, c.max_position_embeddings, cache if position_ids is None else None)
            position_ids = (slots if position_ids is None else position_ids) + OFFSET
        else:
            input_ids, inputs_embeds = None, self._with_sinusoids(input_ids, inputs_embeds, position_ids, cache)
        x = self.embeddings(input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds, key=embed_key)
        context = {"mask": mask, **nn.memory_context(memory, cache)}
        h, layers = self.layers(x, cache=None if cache is None else cache.layers, key=layers_key, **context)
        cache = nn.advance(cache, layers, length)
        return nn.decoder_output(self, h, input_ids, attention_mask, cache, logits_to_keep, head_key)

    def _with_sinusoids(
        self, input_ids: jax.Array | None, rows: jax.Array | None, positions: jax.Array | None, cache: nn.Cache | None
    ) -> Float[Array, "batch length width"]:
        c = self.config
        if positions is None:
            if input_ids is None:
                raise ValueError("position_ids: sines and cosines skip padding, which inputs_embeds do not show")
            positions = nn.padded_positions(input_ids, c.pad_token_id, 0 if cache is None else cache.used)
        rows = self.embeddings.token(input_ids) * c.token_scale if rows is None else rows
        return rows + sinusoids(positions, c.hidden_size, c.pad_token_id).astype(rows.dtype)


def sinusoids(positions: Int[Array, "batch length"], width: int, pad: int) -> Float[Array, "batch length width"]:
    """Sines of ``position / 10000^(i / (width/2 − 1))``, then the cosines (tensor2tensor's form of arXiv 1706.03762,
    section 3.5); zeros at position ``pad``."""
    half = width // 2
    angles = positions[..., None] * np.exp(np.arange(half) * (-math.log(10000) / (half - 1))).astype(np.float32)
    return jnp.where(positions[..., None] == pad, 0.0, jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))


Model = TrOCR
PREFIX = "model"
KEYS = {
    "embeddings.token": "decoder.embed_tokens",
    "embeddings.position": "decoder.embed_positions",
    "embeddings.norm": "decoder.layernorm_embedding",
    "layers.{}.attention.query": "decoder.layers.{}.self_attn.q_proj",
    "layers.{}.attention.key": "decoder.layers.{}.self_attn.k_proj",
    "layers.{}.attention.value": "decoder.layers.{}.self_attn.v_proj",
    "layers.{}.attention.out": "decoder.layers.{}.self_attn.out_proj",
    "layers.{}.attention_norm": "decoder.layers.{}.self_attn_layer_norm",
    "layers.{}.cross_attention.query": "decoder.layers.{}.encoder_attn.q_proj",
    "layers.{}.cross_attention.key": "decoder.layers.{}.encoder_attn.k_proj",
    "layers.{}.cross_attention.value": "decoder.layers.{}.encoder_attn.v_proj",
    "layers.{}.cross_attention.out": "decoder.layers.{}.encoder_attn.out_proj",
    "layers.{}.cross_attention_norm": "decoder.layers.{}.encoder_attn_layer_norm",
    "layers.{}.mlp.up": "decoder.layers.{}.fc1",
    "layers.{}.mlp.down": "decoder.layers.{}.fc2",
    "layers.{}.mlp_norm": "decoder.layers.{}.final_layer_norm",
}
HEADS = {"causal_lm": ("TrOCRForCausalLM", {"head.decoder": "output_projection"})}
BASE_CLASS = "TrOCRDecoder"
IGNORED = (r"decoder\.(version|embed_positions\._float_tensor)",)
