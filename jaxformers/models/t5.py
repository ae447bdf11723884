"""T5 and mT5 (arXiv 1910.10683, 2002.05202, 2010.11934): pre-norm encoder–decoder, RMSNorm, relative position bias.

Scores are not divided by the root of the head size; each stack adds one learned bias per head and bucket of the
distance between two tokens, computed once for all its layers. One embedding table serves encoder, decoder and, where
tied, the output, then after multiplication of the decoder's states by width^-1/2.
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
from jaxformers.models import config as configs
from jaxformers.models.t5_stack import Stack
from jaxformers.safetensors_file import show

NAMES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "head_dim": "d_kv",
    "intermediate_size": "d_ff",
    "hidden_dropout_prob": "dropout_rate",
    "layer_norm_eps": "layer_norm_epsilon",
}
MT5 = {  # what an mT5's config.json may leave out
    "vocab_size": 250112,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "scale_decoder_outputs": False,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of a T5. ``num_decoder_layers`` None: as many as the encoder has.

    ``feed_forward_proj``: an activation, or ``gated-<activation>``; ``dense_act_fn`` overrides the activation.
    ``scale_decoder_outputs``: states times width^-1/2 before the output projection (v1.0; v1.1 and mT5 do not).
    ``decoder_start_token_id`` None: the padding token.
    """

    vocab_size: int = 32128
    hidden_size: int = 512
    head_dim: int = 64
    intermediate_size: int = 2048
    num_hidden_layers: int = 6
    num_decoder_layers: int | None = None
    num_attention_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    hidden_dropout_prob: float = 0.1
    classifier_dropout: float = 0.0
    layer_norm_eps: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    dense_act_fn: str | None = None
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int | None = None
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True
    num_labels: int = 2
    model_type: str = "t5"
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        kind, gate, _ = self.feed_forward_proj.partition("-")
        if gate and kind != "gated":
            raise ValueError(f"config.json: feed_forward_proj {show(self.feed_forward_proj)}: expected an activation "
                             "such as 'relu', or gated- and an activation")  # fmt: skip
        buckets, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or farthest <= buckets // 2:
            raise ValueError(
                f"config.json: relative_attention_num_buckets {buckets} must be 4 or more, and "
                f"relative_attention_max_distance {farthest} more than half of it"
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        multilingual = hf.get("model_type") == "mt5"
        absent = {name: v for name, v in MT5.items() if multilingual and hf.get(NAMES.get(name, name)) is None}
        if hf.get("scale_decoder_outputs") is None and not multilingual:  # older files say it by the tie alone
            absent["scale_decoder_outputs"] = hf.get("tie_word_embeddings") is not False
        config = configs.from_hf(cls, hf, NAMES, **absent)
        if hf.get("is_gated_act") not in (None, config.gated):
            raise ValueError(f"config.json: is_gated_act and feed_forward_proj {config.feed_forward_proj!r} disagree")
        return config

    def to_hf(self) -> dict[str, Any]:
        hf = configs.to_hf(self, NAMES, self.model_type)
        if "is_gated_act" in hf:
            hf["is_gated_act"] = self.gated
        return hf

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated-")

    @property
    def hidden_act(self) -> str:
        if self.dense_act_fn is not None:
            return self.dense_act_fn
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else self.feed_forward_proj.removeprefix("gated-")

    @property
    def decoder_layers(self) -> int:
        return self.num_hidden_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def start_id(self) -> int:
        return self.pad_token_id if self.decoder_start_token_id is None else self.decoder_start_token_id


class T5(nnx.Module):
    """``embeddings`` → ``encoder`` → ``decoder`` → ``head``.

    Heads: ``seq2seq_lm``; ``seq2seq``, the decoder's states; ``sequence_classification``, from the decoder's state at
    the last end token; ``question_answering``, from all its states; ``token_classification`` and None (T5EncoderModel),
    of the encoder alone.
    """

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, std = config, config.initializer_factor
        self.embeddings = nn.Embeddings(c.vocab_size, c.hidden_size, std=std, rngs=rngs)
        self.encoder = Stack(c, decoder=False, rngs=rngs)
        with_decoder = head in ("seq2seq", "seq2seq_lm", "sequence_classification", "question_answering")
        self.decoder = nnx.data(Stack(c, decoder=True, rngs=rngs) if with_decoder else None)
        self.head = nnx.data(None)
        if head == "seq2seq_lm":
            self.head = nn.CausalLMHead(c.hidden_size, c.vocab_size, tied=c.tie_word_embeddings, std=std, rngs=rngs)
        elif head in ("sequence_classification", "token_classification"):
            tokens, rate = head == "token_classification", c.classifier_dropout
            self.head = nn.ClassificationHead(
                c.hidden_size,
                c.num_labels,
                dense=None if tokens else "tanh",
                rate=rate,
                dense_rate=rate,
                std=std if tokens else std * c.hidden_size**-0.5,
                rngs=rngs,
            )
        elif head == "question_answering":
            self.head = nn.span_head(c.hidden_size, std=std * c.hidden_size**-0.5, rngs=rngs)

    def encode(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Int[Array, "batch length"] | None = None,
        *,
        inputs_embeds: Float[Array, "batch length width"] | None = None,
        rngs: jax.Array | None = None,
    ) -> nn.Memory:
        """The encoder's output and which of its positions are real: what the decoder attends to."""
        x = self._embed("input_ids", input_ids, inputs_embeds)
        h, _ = self.encoder(x, mask=nn.Mask(valid=attention_mask), keys=x.shape[1], key=rngs)
        return nn.Memory(h, attention_mask)

    def empty_cache(self, batch: int, slots: int, memory: nn.Memory) -> nn.Cache:
        """A cache for ``batch`` sequences of up to ``slots`` tokens, with the keys and values of ``memory`` in it."""
        if self.decoder is None:
            raise ValueError(f"model: head {self.head_name!r} has no decoder to keep a cache for")
        dtype = self.embeddings.token.embedding.get_value().dtype
        return nn.memory_cache(self.decoder.layers, memory, batch, slots, dtype)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Int[Array, "batch length"] | None = None,
        decoder_input_ids: Int[Array, "batch target"] | None = None,
        decoder_attention_mask: Int[Array, "batch target"] | None = None,
        *,
        inputs_embeds: Float[Array, "batch length width"] | None = None,
        decoder_inputs_embeds: Float[Array, "batch target width"] | None = None,
        memory: nn.Memory | None = None,
        cache: nn.Cache | None = None,
        logits_to_keep: int = 0,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """The encoder reads ``input_ids`` unless ``memory``, its output, or ``cache`` is given.

        ``last_hidden_state`` and ``logits`` are the decoder's where there is one; then ``extra`` has
        ``encoder_last_hidden_state``, unless a cache stood for it. With a head for sequences or spans the decoder reads
        the input shifted right where no ``decoder_input_ids`` are given.
        """
        encoder_key, decoder_key, head_key = nn.split(rngs, 3)
        encoded = input_ids if inputs_embeds is None else inputs_embeds
        if sum(given is not None for given in (encoded, memory, cache)) != 1:
            raise ValueError("input_ids, memory, cache: give exactly one of the three; each stands for the encoder")
        if memory is None and cache is None:
            memory = self.encode(input_ids, attention_mask, inputs_embeds=inputs_embeds, rngs=encoder_key)
        if self.decoder is None:
            if memory is None or decoder_input_ids is not None or decoder_inputs_embeds is not None:
                raise ValueError(f"decoder_input_ids, cache: a T5 with head {self.head_name!r} has no decoder")
            return nn.encoder_output(self, memory.hidden, memory.valid, None, head_key)
        if self.head_name == "sequence_classification" and input_ids is None:
            raise ValueError("input_ids: a sequence classifier looks for the end token in them")
        given = decoder_input_ids is not None or decoder_inputs_embeds is not None
        if not given and input_ids is not None and self.head_name in ("sequence_classification", "question_answering"):
            decoder_input_ids = nn.shift_right(input_ids, self.config.start_id, self.config.pad_token_id)
        x = self._embed("decoder_input_ids", decoder_input_ids, decoder_inputs_embeds)
        mask, _, cache = nn.causal_mask(*x.shape[:2], decoder_attention_mask, cache)
        h, layers = self.decoder(
            x,
            mask=mask,
            keys=x.shape[1] if cache is None else cache.slots,
            cache=None if cache is None else cache.layers,
            key=decoder_key,
            **nn.memory_context(memory, cache),
        )
        cache = nn.advance(cache, layers, x.shape[1])
        extra = None if memory is None else {"encoder_last_hidden_state": memory.hidden}
        return nn.Output(h, logits=self._logits(h, input_ids, logits_to_keep, head_key), cache=cache, extra=extra)

    def _embed(self, name: str, ids: jax.Array | None, embeds: jax.Array | None) -> Float[Array, "batch length width"]:
        if (ids is None) == (embeds is None):
            raise ValueError(f"{name}, {name.replace('input_ids', 'inputs_embeds')}: give exactly one of the two")
        return self.embeddings.token(ids) if embeds is None else embeds

    def _logits(
        self, h: jax.Array, input_ids: jax.Array | None, logits_to_keep: int, key: jax.Array | None
    ) -> jax.Array | None:
        if self.head_name == "sequence_classification":
            at = jnp.arange(h.shape[1]) * (input_ids == self.config.eos_token_id)
            return self.head(jnp.take_along_axis(h, at.argmax(1)[:, None, None], axis=1)[:, 0], key)
        if self.head_name == "question_answering":
            return self.head(h, key)
        if self.head_name == "seq2seq":
            return None
        h = h[:, -logits_to_keep:]
        scale = self.config.hidden_size**-0.5 if self.config.scale_decoder_outputs else 1.0
        return self.head(h * jnp.asarray(scale, h.dtype), self.embeddings.token)


def settle(config: Config, tensors: Mapping[str, Any]) -> Config:
    """The config with what only the checkpoint's ``tensors`` tell: whether the output has a matrix of its own.

    Hugging Face's newer files claim a tie also for untied models; older ones store a tied matrix twice.
    """
    plain = {name.removeprefix(f"{PREFIX}."): tensor for name, tensor in tensors.items()}
    own = any(name.startswith("lm_head.") for name in plain)
    twice = config.tie_word_embeddings and _equal(plain.get("lm_head.weight"), plain.get("shared.weight"))
    return dataclasses.replace(config, tie_word_embeddings=not own or twice)


def _equal(a: Any, b: Any) -> bool:
    return a is not None and b is not None and a.shape == b.shape and np.array_equal(a.read(), b.read())


def _stack_keys(stack: str, mlp: int) -> dict[str, str]:
    ours, theirs = f"{stack}.layers.{{}}", f"{stack}.block.{{}}.layer"
    keys = {f"{ours}.attention_norm": f"{theirs}.0.layer_norm", f"{ours}.mlp_norm": f"{theirs}.{mlp}.layer_norm"}
    for name, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
        keys[f"{ours}.attention.{name}"] = f"{theirs}.0.SelfAttention.{letter}"
        if stack == "decoder":
            keys[f"{ours}.cross_attention.{name}"] = f"{theirs}.1.EncDecAttention.{letter}"
    if stack == "decoder":
        keys[f"{ours}.cross_attention_norm"] = f"{theirs}.1.layer_norm"
    return {
        **keys,
        f"{stack}.relative_bias": f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias",
        f"{ours}.mlp.down": f"{theirs}.{mlp}.DenseReluDense.wo",
        f"{stack}.final_norm": f"{stack}.final_layer_norm",
    }


def keys(config: Config) -> dict[str, str]:
    """The feed-forward names, which a gate changes."""
    table = {}
    for stack, mlp in (("encoder", 1), ("decoder", 2)):
        theirs = f"{stack}.block.{{}}.layer.{mlp}.DenseReluDense"
        if config.gated:
            table[f"{stack}.layers.{{}}.mlp.gate"] = f"{theirs}.wi_0"
        table[f"{stack}.layers.{{}}.mlp.up"] = f"{theirs}.wi_1" if config.gated else f"{theirs}.wi"
    return table


Model = T5
PREFIX = "transformer"
UNPREFIXED = ("seq2seq", "seq2seq_lm", "question_answering")
OPTIONAL = ("decoder",)
KEYS = {"embeddings.token": "shared", **_stack_keys("encoder", 1), **_stack_keys("decoder", 2)}
HEADS = {
    "seq2seq_lm": ("T5ForConditionalGeneration", {"head.decoder": "lm_head"}),
    "seq2seq": ("T5Model", {}),
    "sequence_classification": (
        "T5ForSequenceClassification",
        {"head.dense": "classification_head.dense", "head.classifier": "classification_head.out_proj"},
    ),
    "token_classification": ("T5ForTokenClassification", {"head.classifier": "classifier"}),
    "question_answering": ("T5ForQuestionAnswering", {"head.classifier": "qa_outputs"}),
}
BASE_CLASS = "T5EncoderModel"
ALIASES = {"shared.weight": ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")}
IGNORED = (
    r"(encoder|decoder)\.embed_tokens\.weight",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",  # never used, in old files
)
