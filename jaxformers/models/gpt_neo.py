"""GPT-Neo (Black et al. 2021): a GPT-2 with unscaled scores whose layers see, in turns, everything and a window."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Int

from jaxformers import nn
from jaxformers.models import config as configs

NAMES = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "hidden_act": "activation_function",
    "hidden_dropout_prob": "resid_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "embedding_dropout_prob": "embed_dropout",
    "layer_norm_eps": "layer_norm_epsilon",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a GPT-Neo. ``attention_layers``: "global", or "local": that one sees ``window_size`` tokens."""

    vocab_size: int = 50257
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    attention_layers: tuple[str, ...] = ("global", "local") * 12
    window_size: int = 256
    intermediate_size: int | None = None
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    embedding_dropout_prob: float = 0.0
    classifier_dropout: float = 0.1
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    num_labels: int = 2
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        kinds = tuple(k for kinds, times in hf.get("attention_types") or [[["global", "local"], 12]]
                      for k in list(kinds) * times)  # fmt: skip
        if set(kinds) - {"global", "local"}:
            raise ValueError(f"config.json: attention_types must name global and local layers, got {kinds}")
        return configs.from_hf(cls, hf, NAMES, attention_layers=kinds)

    def __post_init__(self) -> None:
        if len(self.attention_layers) < self.num_hidden_layers:
            kinds, depth = len(self.attention_layers), self.num_hidden_layers
            raise ValueError(f"attention_layers: {kinds} kinds for {depth} layers")

    def to_hf(self) -> dict[str, Any]:
        hf = configs.to_hf(self, NAMES, "gpt_neo", skip=("attention_layers",))
        kinds = self.attention_layers[: self.num_hidden_layers]
        if "attention_types" not in hf or Config.from_hf({**hf, "num_layers": 0}).attention_layers != kinds:
            hf |= {"attention_types": [[list(kinds), 1]], "attention_layers": list(kinds)}
        return hf


class GPTNeo(nnx.Module):
    """``embeddings`` → ``layers`` → ``final_norm`` → ``head``. Heads: causal_lm, sequence_ and token_classification."""

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, std = config, config.initializer_range
        self.embeddings = nn.Embeddings(
            c.vocab_size,
            c.hidden_size,
            positions=c.max_position_embeddings,
            rate=c.embedding_dropout_prob,
            std=std,
            rngs=rngs,
        )
        self.layers = nn.Layers([self._block(c, c.attention_layers[i], rngs) for i in range(c.num_hidden_layers)])
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
    def _block(c: Config, kind: str, rngs: nnx.Rngs) -> nn.Block:
        attention = nn.Attention(
            c.hidden_size,
            c.num_attention_heads,
            bias=False,
            out_bias=True,
            scale=1.0,
            window=c.window_size if kind == "local" else None,
            rate=c.attention_probs_dropout_prob,
            std=c.initializer_range,
            rngs=rngs,
        )
        hidden = c.intermediate_size or 4 * c.hidden_size
        mlp = nn.MLP(c.hidden_size, hidden, act=c.hidden_act, std=c.initializer_range, rngs=rngs)
        norms = (nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps) for _ in range(2))
        return nn.Block(attention, mlp, *norms, prenorm=True, rate=c.hidden_dropout_prob)

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


Model = GPTNeo
PREFIX = "transformer"
KEYS = {
    "embeddings.token": "wte",
    "embeddings.position": "wpe",
    "layers.{}.attention.query": "h.{}.attn.attention.q_proj",
    "layers.{}.attention.key": "h.{}.attn.attention.k_proj",
    "layers.{}.attention.value": "h.{}.attn.attention.v_proj",
    "layers.{}.attention.out": "h.{}.attn.attention.out_proj",
    "layers.{}.attention_norm": "h.{}.ln_1",
    "layers.{}.mlp.up": "h.{}.mlp.c_fc",
    "layers.{}.mlp.down": "h.{}.mlp.c_proj",
    "layers.{}.mlp_norm": "h.{}.ln_2",
    "final_norm": "ln_f",
}
HEADS = {
    "causal_lm": ("GPTNeoForCausalLM", {"head.decoder": "lm_head"}),
    "sequence_classification": ("GPTNeoForSequenceClassification", {"head.classifier": "score"}),
    "token_classification": ("GPTNeoForTokenClassification", {"head.classifier": "classifier"}),
}
BASE_CLASS = "GPTNeoModel"
IGNORED = (r"h\.\d+\.attn\.attention\.(bias|masked_bias)",)  # the causal mask, stored by old versions
