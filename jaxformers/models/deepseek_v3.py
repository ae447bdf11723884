"""DeepSeek-V3 (arXiv 2412.19437): a decoder with multi-head latent attention and, after some layers, experts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Int

from jaxformers import nn
from jaxformers.models import config as configs
from jaxformers.models import llama
from jaxformers.models.keymap import HF
from jaxformers.safetensors_file import show

NAMES = {"layer_norm_eps": "rms_norm_eps", "attention_probs_dropout_prob": "attention_dropout"}
ONLY = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}  # what other models' configs vary


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a DeepSeek-V3; ``decode``: see :class:`jaxformers.nn.LatentAttention`.

    ``num_nextn_predict_layers``: so many layers behind the last predict further tokens in training. They are no part
    of the model, here as in Hugging Face: not read, and not written.

    ``rotary`` None stands for plain rotary positions with base 10000. ``mscale_all_dim`` > 0: with stretched positions
    the scores are multiplied by (0.1 · mscale_all_dim · ln(factor) + 1)² (yarn, arXiv 2309.00071, section 3.4).
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 3
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    layer_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    rope_interleave: bool = True
    num_nextn_predict_layers: int = 1
    num_labels: int = 2
    rotary: nn.Rotary | None = None
    mscale_all_dim: float = 0.0
    decode: str = "absorbed"
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        for name, only in ONLY.items():
            if hf.get(name, only) != only:
                raise ValueError(f"config.json: {name} {show(hf[name])} is not supported, only {only!r}")
        rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
        computed = {"mscale_all_dim": float(rope.get("mscale_all_dim") or 0), "decode": "absorbed"}
        if "q_lora_rank" in hf:  # null means none, which is not the default
            computed["q_lora_rank"] = hf["q_lora_rank"]
        config = configs.from_hf(cls, hf, NAMES, **computed)
        nn.check_routing(
            config.n_routed_experts,
            config.num_experts_per_tok,
            score="sigmoid",
            groups=config.n_group,
            top_groups=config.topk_group,
        )
        heads = hf.get("num_key_value_heads") or config.num_attention_heads
        if heads != config.num_attention_heads:
            raise ValueError(
                f"config.json: num_key_value_heads must be num_attention_heads ({config.num_attention_heads}), as all "
                f"of them share one latent, got {show(heads)}"
            )
        rotary = nn.rotary_from_hf(dict(hf), config.qk_rope_head_dim, interleaved=config.rope_interleave)
        return dataclasses.replace(config, rotary=rotary)

    def to_hf(self) -> dict[str, Any]:
        hf = configs.to_hf(self, NAMES, "deepseek_v3", skip=("rotary", "mscale_all_dim", "decode"))
        said = {"rope_parameters", "rope_theta", "rope_scaling"} & set(hf)
        read = Config.from_hf(hf) if said else None
        if read is None or (read.rope, read.scale) != (self.rope, self.scale):
            hf = {name: value for name, value in hf.items() if name not in said}
            hf["rope_parameters"] = nn.rotary_to_hf(self.rope)
            if self.mscale_all_dim:
                hf["rope_parameters"]["mscale_all_dim"] = self.mscale_all_dim
        return hf | {"q_lora_rank": self.q_lora_rank, "num_key_value_heads": self.num_attention_heads}

    @property
    def rope(self) -> nn.Rotary:
        plain = nn.Rotary(
            self.qk_rope_head_dim, trained_length=self.max_position_embeddings, interleaved=self.rope_interleave
        )
        return self.rotary or plain

    @property
    def scale(self) -> float:
        """What scores are multiplied by before the softmax."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        if self.rope.kind == "default" or not self.mscale_all_dim or self.rope.factor <= 1:
            return scale
        return scale * (0.1 * self.mscale_all_dim * math.log(self.rope.factor) + 1.0) ** 2


class DeepseekV3(nnx.Module):
    """``embeddings`` → ``layers`` → ``final_norm`` → ``head``. Heads: causal_lm, sequence_ and token_classification.

    Layers before ``first_k_dense_replace`` have a plain MLP, the others :class:`jaxformers.nn.MoE`.
    """

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, std = config, config.initializer_range
        self.embeddings = nn.Embeddings(c.vocab_size, c.hidden_size, std=std, rngs=rngs)
        self.layers = nn.Layers([_block(c, i >= c.first_k_dense_replace, rngs) for i in range(c.num_hidden_layers)])
        self.final_norm = nn.RMSNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.head = nnx.data(None)
        if head == "causal_lm":
            self.head = nn.CausalLMHead(c.hidden_size, c.vocab_size, tied=c.tie_word_embeddings, std=std, rngs=rngs)
        elif head in ("sequence_classification", "token_classification"):
            tokens = head == "token_classification"
            rate = 0.1 if tokens else 0.0
            self.head = nn.ClassificationHead(c.hidden_size, c.num_labels, rate=rate, bias=tokens, std=std, rngs=rngs)

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


def _block(c: Config, sparse: bool, rngs: nnx.Rngs) -> nn.Block:
    width, std = c.hidden_size, c.initializer_range
    attention = nn.LatentAttention(
        width,
        c.num_attention_heads,
        query_rank=c.q_lora_rank,
        rank=c.kv_lora_rank,
        nope=c.qk_nope_head_dim,
        rope=c.qk_rope_head_dim,
        value_size=c.v_head_dim,
        bias=c.attention_bias,
        scale=c.scale,
        interleaved=c.rope_interleave,
        decode=c.decode,
        rate=c.attention_probs_dropout_prob,
        std=std,
        rngs=rngs,
    )
    if sparse:
        mlp = nn.MoE(
            width,
            c.moe_intermediate_size,
            experts=c.n_routed_experts,
            k=c.num_experts_per_tok,
            act=c.hidden_act,
            score="sigmoid",
            correction=True,
            groups=c.n_group,
            top_groups=c.topk_group,
            normalize=c.norm_topk_prob,
            scale=c.routed_scaling_factor,
            shared=c.n_shared_experts * c.moe_intermediate_size,
            std=std,
            rngs=rngs,
        )
    else:
        mlp = nn.MLP(width, c.intermediate_size, act=c.hidden_act, gated=True, bias=False, std=std, rngs=rngs)
    norms = (nn.RMSNorm(width, eps=c.layer_norm_eps) for _ in range(2))
    return nn.Block(attention, mlp, *norms, prenorm=True)


Model = DeepseekV3
PREFIX = "model"
_EXPERTS = "layers.{}.mlp.experts"
KEYS = {
    "embeddings.token": "embed_tokens",
    "layers.{}.attention.query": "layers.{}.self_attn.q_proj",
    "layers.{}.attention.query_down": "layers.{}.self_attn.q_a_proj",
    "layers.{}.attention.query_norm": "layers.{}.self_attn.q_a_layernorm",
    "layers.{}.attention.query_up": "layers.{}.self_attn.q_b_proj",
    "layers.{}.attention.kv_down": "layers.{}.self_attn.kv_a_proj_with_mqa",
    "layers.{}.attention.kv_norm": "layers.{}.self_attn.kv_a_layernorm",
    "layers.{}.attention.kv_up": "layers.{}.self_attn.kv_b_proj",
    "layers.{}.attention.out": "layers.{}.self_attn.o_proj",
    "layers.{}.attention_norm": "layers.{}.input_layernorm",
    "layers.{}.mlp.gate": "layers.{}.mlp.gate_proj",
    "layers.{}.mlp.up": "layers.{}.mlp.up_proj",
    "layers.{}.mlp.down": "layers.{}.mlp.down_proj",
    "layers.{}.mlp.router": "layers.{}.mlp.gate",
    "layers.{}.mlp.correction": "layers.{}.mlp.gate.e_score_correction_bias",
    "layers.{}.mlp.experts.gate": HF(_EXPERTS + ".{{}}.gate_proj", whole=(_EXPERTS + ".gate_up_proj", 0, 2)),
    "layers.{}.mlp.experts.up": HF(_EXPERTS + ".{{}}.up_proj", whole=(_EXPERTS + ".gate_up_proj", 1, 2)),
    "layers.{}.mlp.experts.down": HF(_EXPERTS + ".{{}}.down_proj", whole=(_EXPERTS + ".down_proj", 0, 1)),
    "layers.{}.mlp.shared.gate": "layers.{}.mlp.shared_experts.gate_proj",
    "layers.{}.mlp.shared.up": "layers.{}.mlp.shared_experts.up_proj",
    "layers.{}.mlp.shared.down": "layers.{}.mlp.shared_experts.down_proj",
    "layers.{}.mlp_norm": "layers.{}.post_attention_layernorm",
    "final_norm": "norm",
}
HEADS = llama.heads("DeepseekV3")
BASE_CLASS = "DeepseekV3Model"
IGNORED = (r".*rotary_emb\.inv_freq",)


def ignored(config: Config) -> tuple[str, ...]:
    """Patterns of the tensors of the layers behind the last."""
    first = config.num_hidden_layers
    return tuple(rf"layers\.{first + i}\..*" for i in range(config.num_nextn_predict_layers))


FLOAT32 = ("layers.*.mlp.{router.kernel,correction}",)
