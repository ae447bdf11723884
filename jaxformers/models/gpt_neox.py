"""GPT-NeoX and Pythia (arXiv 2204.06745): attention and MLP side by side, rotary positions on a part of each head."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Int

from jaxformers import nn
from jaxformers.models import config as configs
from jaxformers.models.keymap import HF, per_head

NAMES = {"hidden_dropout_prob": "hidden_dropout", "attention_probs_dropout_prob": "attention_dropout"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a GPT-NeoX. ``use_parallel_residual`` False: the MLP reads what attention has added to."""

    vocab_size: int = 50432
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    classifier_dropout: float = 0.1
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    num_labels: int = 2
    rotary: nn.Rotary | None = None
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        config = configs.from_hf(cls, hf, NAMES)
        rope = {"partial_rotary_factor": hf.get("rotary_pct", 0.25), **(hf.get("rope_parameters") or {})}
        size = int(config.hidden_size // config.num_attention_heads * rope["partial_rotary_factor"])
        old = {"rope_theta": hf.get("rotary_emb_base", 10000.0), **hf}
        return dataclasses.replace(config, rotary=nn.rotary_from_hf(old, size))

    def to_hf(self) -> dict[str, Any]:
        hf = configs.to_hf(self, NAMES, "gpt_neox", skip=("rotary",))
        said = ("rope_parameters", "rope_scaling", "rotary_pct", "rotary_emb_base", "rope_theta")
        if not any(name in hf for name in said) or Config.from_hf(hf).rope != self.rope:
            hf = {name: value for name, value in hf.items() if name not in said}
            share = self.rope.size / (self.hidden_size // self.num_attention_heads)
            hf["rope_parameters"] = {**nn.rotary_to_hf(self.rope), "partial_rotary_factor": share}
        return hf

    @property
    def rope(self) -> nn.Rotary:
        size = self.hidden_size // self.num_attention_heads // 4
        return self.rotary or nn.Rotary(size, trained_length=self.max_position_embeddings)


class GPTNeoX(nnx.Module):
    """``embeddings`` → ``layers`` → ``final_norm`` → ``head``. Heads: causal_lm, sequence_ and token_classification."""

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, std = config, config.initializer_range
        self.embeddings = nn.Embeddings(c.vocab_size, c.hidden_size, rate=c.hidden_dropout_prob, std=std, rngs=rngs)
        self.layers = nn.Layers([self._block(c, rngs) for _ in range(c.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.head = nnx.data(None)
        if head == "causal_lm":
            self.head = nn.CausalLMHead(c.hidden_size, c.vocab_size, tied=c.tie_word_embeddings, std=std, rngs=rngs)
        elif head == "sequence_classification":
            self.head = nn.ClassificationHead(c.hidden_size, c.num_labels, bias=False, std=std, rngs=rngs)
        elif head == "token_classification":
            self.head = nn.ClassificationHead(
                c.hidden_size, c.num_labels, rate=c.classifier_dropout, std=std, rngs=rngs
            )

    @staticmethod
    def _block(c: Config, rngs: nnx.Rngs) -> nn.Block:
        attention = nn.Attention(
            c.hidden_size,
            c.num_attention_heads,
            bias=c.attention_bias,
            rate=c.attention_probs_dropout_prob,
            std=c.initializer_range,
            rngs=rngs,
        )
        mlp = nn.MLP(c.hidden_size, c.intermediate_size, act=c.hidden_act, std=c.initializer_range, rngs=rngs)
        norms = (nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps) for _ in range(2))
        parallel, rate = c.use_parallel_residual, c.hidden_dropout_prob
        return nn.Block(attention, mlp, *norms, prenorm=True, parallel=parallel, rate=rate)

    def empty_cache(self, batch: int, slots: int) -> nn.Cache:
        """A cache for ``batch`` sequences of up to ``slots`` tokens, in the embeddings' dtype."""
        return nn.empty_cache(self, batch, slots)

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
        """Without ``position_ids`` the positions are the slots, as in Hugging Face, also when padded on the left."""
        return nn.decode(self, input_ids, attention_mask, position_ids, inputs_embeds, cache, logits_to_keep, rngs)


Model = GPTNeoX
PREFIX = "gpt_neox"
KEYS = {
    "embeddings.token": "embed_in",
    "layers.{}.attention.query": HF("layers.{}.attention.query_key_value", part=(0, 3), rows=per_head),
    "layers.{}.attention.key": HF("layers.{}.attention.query_key_value", part=(1, 3), rows=per_head),
    "layers.{}.attention.value": HF("layers.{}.attention.query_key_value", part=(2, 3), rows=per_head),
    "layers.{}.attention.out": "layers.{}.attention.dense",
    "layers.{}.attention_norm": "layers.{}.input_layernorm",
    "layers.{}.mlp.up": "layers.{}.mlp.dense_h_to_4h",
    "layers.{}.mlp.down": "layers.{}.mlp.dense_4h_to_h",
    "layers.{}.mlp_norm": "layers.{}.post_attention_layernorm",
    "final_norm": "final_layer_norm",
}
HEADS = {
    "causal_lm": ("GPTNeoXForCausalLM", {"head.decoder": "embed_out"}),
    "sequence_classification": ("GPTNeoXForSequenceClassification", {"head.classifier": "score"}),
    "token_classification": ("GPTNeoXForTokenClassification", {"head.classifier": "classifier"}),
}
BASE_CLASS = "GPTNeoXModel"
RENAMED = ((r"^lm_head\.", "embed_out."),)
IGNORED = (r".*rotary_emb\.inv_freq", r"layers\.\d+\.attention\.(bias|masked_bias)")  # buffers of old versions
