"""DeBERTa v2 and v3 (arXiv 2006.03654, 2111.09543): attention between contents and relative positions.

    A(q, k) = [ Q_q · K_k  +  Q_q · Kʳ_{δ(q,k)}  +  K_k · Qʳ_{δ(q,k)} ] / sqrt(d · terms)

with δ the bucket of the distance q − k (exact when near, logarithmic when far), and Kʳ, Qʳ projections of one table of
relative embeddings that all layers share.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers import nn
from jaxformers.models import bert
from jaxformers.models import config as configs
from jaxformers.sites import site


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of a DeBERTa v2 or v3.

    ``pos_att_type``: which position terms there are, of "c2p" and "p2c". ``position_buckets`` −1: one bucket per
    distance up to ``max_relative_positions`` (−1: as many as positions). ``share_att_key``: positions pass through the
    contents' projections. ``conv_kernel_size`` > 0: a convolution beside the first layer.
    """

    vocab_size: int = 128100
    embedding_size: int | None = None
    hidden_size: int = 1536
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    pooler_dropout: float = 0.0
    pooler_hidden_act: str = "gelu"
    cls_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 0
    relative_attention: bool = False
    position_buckets: int = -1
    max_relative_positions: int = -1
    position_biased_input: bool = True
    pos_att_type: tuple[str, ...] = ()
    share_att_key: bool = False
    norm_rel_ebd: str = "none"
    conv_kernel_size: int = 0
    conv_groups: int = 1
    conv_act: str = "tanh"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-7
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    num_labels: int = 2
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        unknown = set(self.pos_att_type) - {"c2p", "p2c"}
        if unknown:
            raise ValueError(f"pos_att_type: {sorted(unknown)} not supported, only c2p and p2c")
        if self.norm_rel_ebd not in ("none", "layer_norm"):
            raise ValueError(f"norm_rel_ebd: must be none or layer_norm, got {self.norm_rel_ebd!r}")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        kinds = hf.get("pos_att_type") or ()
        kinds = [k.strip() for k in kinds.lower().split("|")] if isinstance(kinds, str) else kinds
        signed = {name: hf[name] for name in ("position_buckets", "max_relative_positions") if hf.get(name) is not None}
        for name, value in signed.items():
            if not isinstance(value, int) or not -1 <= value < 1 << 20:
                raise ValueError(f"config.json: {name} must be a whole number of -1 or more, got {value!r}")
        unsigned = {name: value for name, value in hf.items() if name not in signed}
        config = configs.from_hf(cls, unsigned, {}, pos_att_type=tuple(k for k in kinds if k), **signed)
        return dataclasses.replace(config, hf=configs.kept(hf))

    def to_hf(self) -> dict[str, Any]:
        hf = configs.to_hf(self, {}, "deberta-v2", skip=("pos_att_type",))
        if "legacy" in hf:
            hf["legacy"] = True  # the masked-LM head is written under its older name
        return hf if "pos_att_type" in hf or not self.pos_att_type else {**hf, "pos_att_type": list(self.pos_att_type)}

    @property
    def farthest(self) -> int:
        return self.max_position_embeddings if self.max_relative_positions < 1 else self.max_relative_positions

    @property
    def span(self) -> int:
        """Buckets on each side of zero."""
        return self.position_buckets if self.position_buckets > 0 else self.farthest


def rows_by_distance(length: int, span: int, buckets: int, farthest: int) -> np.ndarray:
    """Row of the relative table for each key − query from −(length − 1) to length − 1, (2 length − 1,).

    On the host and in float32, as the checkpoints were trained: another rounding would move distances between buckets.
    """
    distance = np.arange(length - 1, -length, -1)  # query − key
    if buckets > 0:
        middle = buckets // 2
        far = np.where(np.abs(distance) < middle, middle - 1, np.abs(distance)).astype(np.float32)
        ratio = np.log(far / np.float32(middle)) / np.log(np.float32((farthest - 1) / middle))
        log = np.ceil(ratio * np.float32(middle - 1)) + middle
        distance = np.where(far <= middle, distance, np.sign(distance) * log).astype(np.int64)
    return np.clip(distance + span, 0, 2 * span - 1)


def by_pair(x: Float[Array, "*batch rows distances"]) -> Float[Array, "*batch rows rows"]:
    """(…, L, 2L − 1), the last axis by key − query from −(L − 1), to (…, L, L): out[q, k] = x[q, k − q + L − 1].

    Reshapes only: a gather of L² entries is slow everywhere.
    """
    n = x.shape[-2]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]).reshape(*x.shape[:-2], -1)
    return x[..., n - 1 : n - 1 + n * (2 * n - 1)].reshape(*x.shape[:-1], n, 2 * n - 1)[..., :n]


class DisentangledAttention(nnx.Module):
    """Projections ``query``, ``key``, ``value``, ``out``, and where not shared ``position_key``, ``position_query``."""

    top_k: int | None = None

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        width, std = c.hidden_size, c.initializer_range
        if width % c.num_attention_heads:
            raise ValueError(f"attention: width {width} is not divisible by {c.num_attention_heads} heads")
        self.path = ""
        self.heads, self.size = c.num_attention_heads, width // c.num_attention_heads
        self.rate, self.position_rate = c.attention_probs_dropout_prob, c.hidden_dropout_prob
        self.kinds = c.pos_att_type
        self.scale = (self.size * (1 + len(c.pos_att_type))) ** -0.5
        self.span, self.buckets, self.farthest = c.span, c.position_buckets, c.farthest
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, std=std, rngs=rngs) for _ in range(4))
        own = c.relative_attention and not c.share_att_key
        self.position_key = nn.Linear(width, width, std=std, rngs=rngs) if own and "c2p" in self.kinds else None
        self.position_query = nn.Linear(width, width, std=std, rngs=rngs) if own and "p2c" in self.kinds else None

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        *,
        mask: nn.Mask | None = None,
        bias: Float[Array, "rows width"] | None = None,
        rotary: None = None,
        cache: None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "batch length width"], None]:
        """``bias`` is the table of relative embeddings, out of which each layer makes its position terms."""
        batch, length, _ = x.shape
        drop, position_drop = nn.split(key, 2)
        heads = lambda y: y.reshape(*y.shape[:-1], self.heads, self.size)
        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        terms = None
        if bias is not None:
            table = nn.dropout(bias, self.position_rate, position_drop)
            rows = rows_by_distance(length, self.span, self.buckets, self.farthest)
            terms = 0
            if "c2p" in self.kinds:
                position = heads((self.key if self.position_key is None else self.position_key)(table))[rows]
                terms = terms + by_pair(jnp.einsum("bqhd,rhd->bhqr", q, position))
            if "p2c" in self.kinds:  # the distance runs the other way from a key's point of view
                position = heads((self.query if self.position_query is None else self.position_query)(table))[rows]
                terms = terms + by_pair(jnp.einsum("bkhd,rhd->bhkr", k, position[::-1])).swapaxes(-1, -2)
            terms = terms * self.scale if self.kinds else None
        options = {"scale": self.scale, "path": self.path, "rate": self.rate, "top_k": self.top_k}
        context = nn.attend(q, k, v, mask=mask, bias=terms, key=drop, **options)
        context = site(f"{self.path}.context", context)
        return self.out(context.reshape(batch, length, self.heads * self.size)), None


class ConvBlock(nnx.Module):
    """A post-norm block with a convolution of its input beside it: ``norm(block(x) + act(conv(x)))``."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        width, size = c.hidden_size, c.conv_kernel_size
        self.path = ""
        self.rate, self.act = c.hidden_dropout_prob, c.conv_act
        self.attention = DisentangledAttention(c, rngs=rngs)
        self.attention_norm = nn.LayerNorm(width, eps=c.layer_norm_eps)
        self.mlp = nn.MLP(width, c.intermediate_size, act=c.hidden_act, std=c.initializer_range, rngs=rngs)
        self.mlp_norm = nn.LayerNorm(width, eps=c.layer_norm_eps)
        groups, std = c.conv_groups, c.initializer_range
        padding = ((size - 1) // 2,)
        self.conv = nn.Conv(width, width, (size,), stride=(1,), padding=padding, groups=groups, std=std, rngs=rngs)
        self.conv_norm = nn.LayerNorm(width, eps=c.layer_norm_eps)

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        *,
        mask: nn.Mask,
        bias: jax.Array | None = None,
        cache: None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "batch length width"], None]:
        x = site(f"{self.path}.input", x)
        attention_key, drop1, drop2, drop3 = nn.split(key, 4)
        h, _ = self.attention(x, mask=mask, bias=bias, key=attention_key)
        h = self.attention_norm(x + nn.dropout(h, self.rate, drop1))
        h = self.mlp_norm(h + nn.dropout(self.mlp(h), self.rate, drop2))
        local = self.conv(x)
        real = None if mask.valid is None else mask.valid[..., None] != 0
        local = local if real is None else jnp.where(real, local, 0)
        h = self.conv_norm(h + nn.activation(self.act)(nn.dropout(local, self.rate, drop3)))
        return site(f"{self.path}.output", h if real is None else jnp.where(real, h, 0)), None


class Embeddings(nnx.Module):
    """Tokens, and positions and token types where there are any; widened, normalised, zero at padding."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.path = ""
        narrow, std = c.embedding_size or c.hidden_size, c.initializer_range
        self.rate = c.hidden_dropout_prob
        self.token = nn.Embed(c.vocab_size, narrow, std=std, rngs=rngs)
        positions, types = c.max_position_embeddings, c.type_vocab_size
        self.position = nn.Embed(positions, narrow, std=std, rngs=rngs) if c.position_biased_input else None
        self.token_type = nn.Embed(types, narrow, std=std, rngs=rngs) if types else None
        wide = c.hidden_size
        self.widen = None if narrow == wide else nn.Linear(narrow, wide, bias=False, std=std, rngs=rngs)
        self.norm = nn.LayerNorm(wide, eps=c.layer_norm_eps)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None,
        attention_mask: Int[Array, "batch length"] | None,
        token_type_ids: Int[Array, "batch length"] | None,
        position_ids: Int[Array, "#batch length"],
        inputs_embeds: Float[Array, "batch length narrow"] | None,
        key: jax.Array | None,
    ) -> Float[Array, "batch length width"]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: give exactly one of the two")
        x = self.token(input_ids) if inputs_embeds is None else inputs_embeds
        if self.position is not None:
            x = x + self.position(position_ids)
        if self.token_type is not None:
            x = x + self.token_type(jnp.zeros(x.shape[:2], int) if token_type_ids is None else token_type_ids)
        x = self.norm(x if self.widen is None else self.widen(x))
        x = x if attention_mask is None else x * attention_mask[..., None].astype(x.dtype)
        return site(self.path, nn.dropout(x, self.rate, key))


class DebertaV2(nnx.Module):
    """``embeddings`` → ``layers`` (with ``relative``, the table they share) → ``head``.

    Heads: masked_lm, sequence_ (with ``pooler``) and token_classification, question_answering.
    """

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, width, std = config, config.hidden_size, config.initializer_range
        self.embeddings = Embeddings(c, rngs=rngs)
        self.relative = nn.Embed(2 * c.span, width, std=std, rngs=rngs) if c.relative_attention else None
        normed = c.relative_attention and c.norm_rel_ebd == "layer_norm"
        self.relative_norm = nn.LayerNorm(width, eps=c.layer_norm_eps) if normed else None
        self.layers = nn.Layers([self._block(c, i, rngs) for i in range(c.num_hidden_layers)])
        with_pooler = head == "sequence_classification"
        self.pooler = nn.Linear(width, width, std=std, rngs=rngs) if with_pooler else None
        self.head = nnx.data(None)
        if head == "masked_lm":
            self.head = nn.MaskedLMHead(
                width,
                c.vocab_size,
                act=c.hidden_act,
                eps=c.layer_norm_eps,
                tied=c.tie_word_embeddings,
                token_width=c.embedding_size,
                std=std,
                rngs=rngs,
            )
        elif head in ("sequence_classification", "token_classification"):
            rate = c.hidden_dropout_prob if c.cls_dropout is None or not with_pooler else c.cls_dropout
            self.head = nn.ClassificationHead(width, c.num_labels, rate=rate, std=std, rngs=rngs)
        elif head == "question_answering":
            self.head = nn.span_head(width, std=std, rngs=rngs)

    @staticmethod
    def _block(c: Config, layer: int, rngs: nnx.Rngs) -> nnx.Module:
        if layer == 0 and c.conv_kernel_size:
            return ConvBlock(c, rngs=rngs)
        width, eps = c.hidden_size, c.layer_norm_eps
        return nn.Block(
            DisentangledAttention(c, rngs=rngs),
            nn.MLP(width, c.intermediate_size, act=c.hidden_act, std=c.initializer_range, rngs=rngs),
            nn.LayerNorm(width, eps=eps),
            nn.LayerNorm(width, eps=eps),
            prenorm=False,
            rate=c.hidden_dropout_prob,
        )

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
        c = self.config
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        if self.embeddings.position is not None:
            nn.check_length(length, c.max_position_embeddings)
        embed_key, layers_key, pool_key, head_key = nn.split(rngs, 4)
        position_ids = jnp.arange(length)[None] if position_ids is None else position_ids
        x = self.embeddings(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, embed_key)
        table = None if self.relative is None else self.relative.embedding.get_value()
        table = table if self.relative_norm is None else self.relative_norm(table)
        mask = nn.Mask(valid=attention_mask, segments=attention_mask)  # padding sees nothing either, as in training
        h, _ = self.layers(x, mask=mask, bias=table, key=layers_key)
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(nn.dropout(h[:, 0], c.pooler_dropout, pool_key))
            pooled = nn.activation(c.pooler_hidden_act)(pooled)
        return nn.encoder_output(self, h, attention_mask, pooled, head_key)


Model = DebertaV2
PREFIX = "deberta"
KEYS = {
    **{ours: theirs for ours, theirs in bert.KEYS.items() if ".attention." not in ours and ours != "pooler"},
    "embeddings.widen": "embeddings.embed_proj",
    "relative": "encoder.rel_embeddings",
    "relative_norm": "encoder.LayerNorm",
    "layers.{}.attention.query": "encoder.layer.{}.attention.self.query_proj",
    "layers.{}.attention.key": "encoder.layer.{}.attention.self.key_proj",
    "layers.{}.attention.value": "encoder.layer.{}.attention.self.value_proj",
    "layers.{}.attention.position_key": "encoder.layer.{}.attention.self.pos_key_proj",
    "layers.{}.attention.position_query": "encoder.layer.{}.attention.self.pos_query_proj",
    "layers.{}.attention.out": "encoder.layer.{}.attention.output.dense",
    "layers.{}.conv": "encoder.conv.conv",
    "layers.{}.conv_norm": "encoder.conv.LayerNorm",
}
HEADS = {
    "masked_lm": ("DebertaV2ForMaskedLM", bert.HEADS["masked_lm"][1]),
    "sequence_classification": (
        "DebertaV2ForSequenceClassification",
        {"pooler": "pooler.dense", "head.classifier": "classifier"},
    ),
    "token_classification": ("DebertaV2ForTokenClassification", {"head.classifier": "classifier"}),
    "question_answering": ("DebertaV2ForQuestionAnswering", {"head.classifier": "qa_outputs"}),
}
BASE_CLASS = "DebertaV2Model"
RENAMED = (
    (r"^lm_predictions\.lm_head\.(dense|LayerNorm)\.", r"cls.predictions.transform.\1."),
    (r"^lm_predictions\.lm_head\.bias$", "cls.predictions.bias"),
)
IGNORED = (r".*position_ids", r"mask_predictions\..*")  # the discriminator of v3's pre-training
