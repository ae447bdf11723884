"""ESM-1b and ESM-2 (Rives et al. 2021; Lin et al. 2022): pre-norm protein models, rotary or learned positions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers import nn
from jaxformers.models import bert, roberta
from jaxformers.models import config as configs
from jaxformers.sites import reap, site

MASKED_IN_TRAINING = 0.15 * 0.8  # the share of tokens that the pre-training saw as <mask>


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of an ESM.

    ``token_dropout``: masked tokens enter as zeros, and all embeddings are scaled by (1 − 0.12) / (1 − share of masked
    tokens), with and without training. Learned positions start at ``pad_token_id + 1``, as RoBERTa's.
    """

    vocab_size: int = 33
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 1026
    position_embedding_type: str = "absolute"
    rope_theta: float = 10000.0
    emb_layer_norm_before: bool = False
    token_dropout: bool = False
    mask_token_id: int | None = None
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 1
    tie_word_embeddings: bool = True
    num_labels: int = 2
    pooler: bool = True
    contact_head: bool = True
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.position_embedding_type not in ("rotary", "absolute"):
            kind = self.position_embedding_type
            raise ValueError(f"position_embedding_type {kind!r} is not supported, only 'rotary' and 'absolute'")
        if self.token_dropout and self.mask_token_id is None:
            raise ValueError("mask_token_id: token_dropout needs to know which token is <mask>")

    @property
    def max_length(self) -> int | None:
        """Longest input; None where positions rotate."""
        learned = self.position_embedding_type == "absolute"
        return self.max_position_embeddings - self.pad_token_id - 1 if learned else None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        if hf.get("is_folding_model"):
            raise ValueError("config.json: is_folding_model: the structure module of ESMFold is not supported")
        if hf.get("is_decoder") or hf.get("add_cross_attention"):
            raise ValueError("config.json: is_decoder/add_cross_attention: ESM is loaded as an encoder only")
        theta = (hf.get("rope_parameters") or {}).get("rope_theta", hf.get("rope_theta", 10000.0))
        return configs.from_hf(cls, hf, {}, rope_theta=float(theta))

    def to_hf(self) -> dict[str, Any]:
        return configs.to_hf(self, {}, "esm", skip=("pooler", "contact_head", "rope_theta"))


class Embeddings(nnx.Module):
    """Token (and learned position) embeddings with ESM's token dropout; padding becomes zero. Site: ``embeddings``."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.path = ""
        std, learned = c.initializer_range, c.position_embedding_type == "absolute"
        self.mask_token_id = c.mask_token_id if c.token_dropout else None
        self.token = nn.Embed(c.vocab_size, c.hidden_size, std=std, rngs=rngs)
        self.position = nn.Embed(c.max_position_embeddings, c.hidden_size, std=std, rngs=rngs) if learned else None
        self.norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps) if c.emb_layer_norm_before else None

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None,
        attention_mask: Int[Array, "batch length"] | None,
        position_ids: Int[Array, "#batch length"],
        inputs_embeds: Float[Array, "batch length width"] | None,
    ) -> Float[Array, "batch length width"]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: give exactly one of the two")
        x = self.token(input_ids) if inputs_embeds is None else inputs_embeds
        if self.mask_token_id is not None and input_ids is not None:
            hidden = input_ids == self.mask_token_id
            length = input_ids.shape[1] if attention_mask is None else attention_mask.sum(-1)
            kept = 1 - hidden.sum(-1) / length
            x = jnp.where(hidden[..., None], 0, x * ((1 - MASKED_IN_TRAINING) / kept)[:, None, None].astype(x.dtype))
        if self.position is not None:
            x = x + self.position(position_ids)
        x = x if self.norm is None else self.norm(x)
        x = x if attention_mask is None else x * attention_mask[..., None].astype(x.dtype)
        return site(self.path, x)


class ESM(nnx.Module):
    """``embeddings`` → ``layers`` → ``final_norm`` → ``pooler`` or ``head``; ``contact_head`` serves predict_contacts.

    Heads: masked_lm, sequence_ and token_classification.
    """

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, width, std = config, config.hidden_size, config.initializer_range
        self.embeddings = Embeddings(c, rngs=rngs)
        self.layers = nn.Layers([self._block(c, rngs) for _ in range(c.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(width, eps=c.layer_norm_eps)
        self.pooler = nn.Linear(width, width, std=std, rngs=rngs) if head is None and c.pooler else None
        maps = c.num_hidden_layers * c.num_attention_heads
        self.contact_head = nn.Linear(maps, 1, std=std, rngs=rngs) if c.contact_head else None
        self.head = nnx.data(None)
        rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
        if head == "masked_lm":
            eps, tied = c.layer_norm_eps, c.tie_word_embeddings
            self.head = nn.MaskedLMHead(width, c.vocab_size, act="gelu", eps=eps, tied=tied, std=std, rngs=rngs)
        elif head == "sequence_classification":
            rate = c.hidden_dropout_prob
            self.head = nn.ClassificationHead(
                width, c.num_labels, dense="tanh", rate=rate, dense_rate=rate, std=std, rngs=rngs
            )
        elif head == "token_classification":
            self.head = nn.ClassificationHead(width, c.num_labels, rate=c.hidden_dropout_prob, std=std, rngs=rngs)

    @staticmethod
    def _block(c: Config, rngs: nnx.Rngs) -> nn.Block:
        width, std = c.hidden_size, c.initializer_range
        return nn.Block(
            nn.Attention(width, c.num_attention_heads, rate=c.attention_probs_dropout_prob, std=std, rngs=rngs),
            nn.MLP(width, c.intermediate_size, act="gelu", std=std, rngs=rngs),
            nn.LayerNorm(width, eps=c.layer_norm_eps),
            nn.LayerNorm(width, eps=c.layer_norm_eps),
            prenorm=True,
            rate=c.hidden_dropout_prob,
        )

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """Rotary positions are the slots; learned ones count the tokens that are not padding, as RoBERTa's."""
        c = self.config
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        layers_key, head_key = nn.split(rngs, 2)
        slots, rotary, first = jnp.arange(length)[None], None, c.pad_token_id + 1
        if self.embeddings.position is None:
            table = nn.Rotary(c.hidden_size // c.num_attention_heads, theta=c.rope_theta)
            rotary = nn.rotary_table(table, slots if position_ids is None else position_ids)
        else:
            nn.check_length(length, c.max_length)
            if position_ids is None:
                by_ids = input_ids is not None
                position_ids = nn.padded_positions(input_ids, c.pad_token_id) if by_ids else slots + first
        x = self.embeddings(input_ids, attention_mask, position_ids, inputs_embeds)
        h, _ = self.layers(x, mask=nn.Mask(valid=attention_mask), rotary=rotary, key=layers_key)
        h = self.final_norm(h)
        pooled = None if self.pooler is None else jnp.tanh(self.pooler(h[:, 0]))
        return nn.encoder_output(self, h, attention_mask, pooled, head_key)


def predict_contacts(
    apply: Callable, params: Mapping[str, Any], batch: Mapping[str, jax.Array], *, eos_token_id: int = 2
) -> Float[Array, "batch residues residues"]:
    """Probability that two residues touch, (B, L − 2, L − 2): without the first token and the last column.

    A logistic regression on all attention maps, symmetrised and corrected by the average product (Rao et al. 2021).
    ``apply, params`` are those of jf.functional for a model with a contact head; ``batch`` holds input_ids and maybe an
    attention_mask. Raises ValueError without a contact head.
    """
    if "contact_head" not in params:
        raise ValueError("params: this checkpoint has no contact head (contact_head.kernel)")
    _, seen = reap(apply, "layers.*.attention.probs")(params, batch)
    maps = jnp.concatenate([seen[f"layers.{i}.attention.probs"] for i in range(len(seen))], axis=1).astype(jnp.float32)
    seen_by = batch["input_ids"] != eos_token_id
    if batch.get("attention_mask") is not None:
        seen_by = seen_by & (batch["attention_mask"] != 0)
    maps = maps * (seen_by[:, None, :, None] & seen_by[:, None, None, :])
    maps = maps[:, :, 1:-1, 1:-1]
    maps = maps + maps.swapaxes(-1, -2)
    rows, columns = maps.sum(-1, keepdims=True), maps.sum(-2, keepdims=True)
    corrected = maps - rows * columns / maps.sum((-1, -2), keepdims=True)
    head = params["contact_head"]
    logits = jnp.einsum("bmij,mo->bij", corrected, head["kernel"], precision="highest") + head["bias"]
    return jax.nn.sigmoid(logits)


Model = ESM
PREFIX = "esm"
KEYS = {
    **{ours: theirs for ours, theirs in bert.KEYS.items() if ours != "embeddings.token_type"},
    "embeddings.norm": "embeddings.layer_norm",
    "layers.{}.attention_norm": "encoder.layer.{}.attention.LayerNorm",
    "layers.{}.mlp_norm": "encoder.layer.{}.LayerNorm",
    "final_norm": "encoder.emb_layer_norm_after",
    "contact_head": "contact_head.regression",
}
HEADS = {
    # an untied decoder's bias is the head's own there
    "masked_lm": ("EsmForMaskedLM", {**roberta.HEADS["masked_lm"][1], "head.decoder.bias": "lm_head.bias"}),
    "sequence_classification": ("EsmForSequenceClassification", roberta.HEADS["sequence_classification"][1]),
    "token_classification": ("EsmForTokenClassification", {"head.classifier": "classifier"}),
}
BASE_CLASS = "EsmModel"
IGNORED = (r".*position_ids", r".*rotary_embeddings\.inv_freq", r"embeddings\.position_embeddings\.weight")
