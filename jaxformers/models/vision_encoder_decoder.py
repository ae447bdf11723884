"""An image encoder and a text decoder that attends to it: TrOCR (arXiv 2109.10282), captioning models.

Both are architectures of the library, as ``encoder`` and ``decoder`` of ``config.json`` name them: ViT, DeiT, BEiT, …;
TrOCR's decoder, or a BERT or RoBERTa with cross-attention. ``model.encoder`` and ``model.decoder`` are models of their
own.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers import models, nn
from jaxformers.models import bert, vit
from jaxformers.models import config as configs
from jaxformers.models.keymap import HF, body_keys, nested, nested_ignored, prefix_of

DEFAULT_HEAD = "seq2seq_lm"


@dataclasses.dataclass(frozen=True)
class Config:
    """The parts' configs, and the ids that begin and pad what the decoder reads."""

    encoder: Any = vit.Config()
    decoder: Any = bert.Config(is_decoder=True, add_cross_attention=True)
    decoder_start_token_id: int | None = None
    pad_token_id: int | None = None
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        if not models.reads_images(self.encoder):
            raise ValueError("config.json: encoder: expected an encoder of images")
        if not getattr(self.decoder, "add_cross_attention", False):
            raise ValueError(
                "config.json: decoder: expected a decoder with cross-attention (is_decoder and add_cross_attention)"
            )
        width = getattr(self.decoder, "cross_attention_hidden_size", None)
        if width not in (None, self.encoder.hidden_size):
            raise ValueError(
                f"config.json: decoder: cross_attention_hidden_size {width} must be the encoder's hidden_size, "
                f"{self.encoder.hidden_size}"
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        parts = {}
        for name, kind in (("encoder", "vit"), ("decoder", "bert")):
            section = configs.section(hf, name)
            if section:
                parts[name] = models.architecture(section.get("model_type") or kind).Config.from_hf(section)
        return configs.from_hf(cls, hf, {}, **parts)

    def to_hf(self) -> dict[str, Any]:
        hf = configs.to_hf(self, {}, "vision-encoder-decoder", skip=("encoder", "decoder"))
        return {**hf, "encoder": self.encoder.to_hf(), "decoder": self.decoder.to_hf()}

    @property
    def projects(self) -> bool:
        """Is there a linear map from the encoder's width to the decoder's?"""
        reads = getattr(self.decoder, "cross_attention_hidden_size", None)
        return reads is None and self.encoder.hidden_size != self.decoder.hidden_size

    @property
    def start_id(self) -> int:
        """What the decoder's input begins with. Raises ValueError where nobody says."""
        decoder = json.loads(self.decoder.hf)
        for found in (self.decoder_start_token_id, decoder.get("decoder_start_token_id"), decoder.get("bos_token_id")):
            if found is not None:
                return found
        raise ValueError("config.json: decoder_start_token_id missing; the decoder's input must begin with a token")

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def max_position_embeddings(self) -> int | None:
        return configs.positions_of(self.decoder)


class VisionEncoderDecoder(nnx.Module):
    """``encoder`` → ``memory_projection`` (where the widths differ) → ``decoder`` with its head. Head: seq2seq_lm."""

    def __init__(self, config: Config, *, head: str | None = DEFAULT_HEAD, rngs: nnx.Rngs):
        check_head(config, head)
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c = config
        self.encoder = models.module_of(c.encoder).Model(c.encoder, rngs=rngs)
        widths = (c.encoder.hidden_size, c.decoder.hidden_size)
        std = c.decoder.initializer_range
        self.memory_projection = nn.Linear(*widths, std=std, rngs=rngs) if c.projects else None
        self.decoder = models.module_of(c.decoder).Model(c.decoder, head="causal_lm", rngs=rngs)

    def encode(
        self, pixel_values: Float[Array, "batch channels height width"], *, rngs: jax.Array | None = None
    ) -> nn.Memory:
        """What the decoder attends to: the encoder's states, in the decoder's width."""
        return self._memory(self.encoder(pixel_values, rngs=rngs).last_hidden_state)

    def _memory(self, h: Float[Array, "batch keys width"]) -> nn.Memory:
        return nn.Memory(h if self.memory_projection is None else self.memory_projection(h))

    def empty_cache(self, batch: int, slots: int, memory: nn.Memory) -> nn.Cache:
        """A cache for ``batch`` sequences of up to ``slots`` tokens, with the keys and values of ``memory`` in it."""
        return self.decoder.empty_cache(batch, slots, memory)

    def __call__(
        self,
        pixel_values: Float[Array, "batch channels height width"] | None = None,
        decoder_input_ids: Int[Array, "batch target"] | None = None,
        decoder_attention_mask: Int[Array, "batch target"] | None = None,
        *,
        decoder_inputs_embeds: Float[Array, "batch target width"] | None = None,
        memory: nn.Memory | None = None,
        cache: nn.Cache | None = None,
        logits_to_keep: int = 0,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """The encoder sees ``pixel_values`` unless ``memory``, its output, or ``cache`` is given.

        For training ``decoder_input_ids`` are ``nn.shift_right(labels, config.start_id, config.pad_token_id)``, and the
        loss is the cross-entropy of logits and labels as they are. ``extra``: ``encoder_last_hidden_state``, where the
        encoder ran.
        """
        encoder_key, decoder_key = nn.split(rngs, 2)
        if sum(given is not None for given in (pixel_values, memory, cache)) != 1:
            raise ValueError("pixel_values, memory, cache: give exactly one of the three; each stands for the encoder")
        extra = None
        if pixel_values is not None:
            h = self.encoder(pixel_values, rngs=encoder_key).last_hidden_state
            memory, extra = self._memory(h), {"encoder_last_hidden_state": h}
        out = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            memory=memory,
            cache=cache,
            logits_to_keep=logits_to_keep,
            rngs=decoder_key,
        )
        return dataclasses.replace(out, extra=extra)


def check_head(config: Config, head: str | None) -> None:
    """Its decoder always writes."""
    if head != DEFAULT_HEAD:
        raise ValueError(f"head: a vision-encoder-decoder has the head {DEFAULT_HEAD} and no other, got {head!r}")


def keys(config: Config) -> dict[str, HF]:
    """The tables of encoder and decoder, the decoder's head included."""
    encoder, decoder = (models.module_of(part) for part in (config.encoder, config.decoder))
    prefix, head = prefix_of(decoder, "causal_lm"), decoder.HEADS["causal_lm"][1]
    return {
        **nested(body_keys(encoder, config.encoder), "encoder", "encoder"),
        **nested(body_keys(decoder, config.decoder), "decoder", f"decoder.{prefix}".rstrip(".")),
        **nested(head, "decoder", "decoder"),
    }


def ignored(config: Config) -> tuple[str, ...]:
    """What encoder and decoder ignore."""
    encoder, decoder = (models.module_of(part) for part in (config.encoder, config.decoder))
    prefix = f"decoder.{prefix_of(decoder, 'causal_lm')}".rstrip(".")
    return nested_ignored(encoder, config.encoder, "encoder") + nested_ignored(decoder, config.decoder, prefix)


def settle(config: Config, tensors: Mapping[str, Any]) -> Config:
    """The config with what only the checkpoint's ``tensors`` tell: whether the encoder has a pooler."""
    return dataclasses.replace(config, encoder=configs.without_pooler(config.encoder, tensors, "encoder.pooler."))


Model = VisionEncoderDecoder
PREFIX = ""
KEYS = {"memory_projection": "enc_to_dec_proj"}
HEADS = {DEFAULT_HEAD: ("VisionEncoderDecoderModel", {})}
BASE_CLASS = "VisionEncoderDecoderModel"
OPTIONAL = ("decoder.head.decoder", "decoder.head.bias")  # a tied matrix that is stored again, with its bias
IGNORED = ()
